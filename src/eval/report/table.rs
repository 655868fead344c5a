//! An outcome as plain text for a terminal.

use std::fmt::Write;

use super::names::{HEADLINE, ScoreName, is_measured, p_value, score_name};
use crate::{
    eval::{
        caveat::too_few,
        findings::{Finding, score::percent},
        outcome::{EvalOutcome, SystemScores},
        probability::evaluation::{FEW, ProbabilityOutcome, ProbabilityScores, Quality},
        subgroups::{self, SCORES},
    },
    study::counted,
};

/// The tables of `outcome`: scores of all systems, findings of the first, and the comparison. With `all`, every
/// score, else those of [`HEADLINE`].
pub fn text(outcome: &EvalOutcome, all: bool) -> String {
    let mut out = String::new();
    score_table(&mut out, outcome, all);
    out.push('\n');
    finding_table(&mut out, &outcome.systems[0]);
    if let Some(found) = &outcome.probabilities {
        out.push('\n');
        probability_table(&mut out, found, all);
    }
    subgroup_tables(&mut out, outcome);
    if outcome.comparison.is_some() {
        out.push('\n');
        comparison_table(&mut out, outcome, all);
    }
    out
}

/// Names of the scores a table shows.
pub(super) fn shown(outcome: &EvalOutcome, all: bool) -> Vec<&str> {
    outcome.systems[0]
        .scores
        .0
        .iter()
        .map(|(name, _)| name.as_str())
        .filter(|name| {
            // Classes have a table of their own.
            let class = name.strip_prefix("findings.").is_some_and(|name| {
                Finding::ALL
                    .iter()
                    .any(|f| name.split('.').next() == Some(f.key()))
            });
            let wanted = if all { !class } else { HEADLINE.contains(name) };
            wanted && is_measured(name, outcome.systems.iter().map(|system| &system.scores))
        })
        .collect()
}

/// Width of a text on a terminal: Chinese characters take two columns.
fn width(text: &str) -> usize {
    text.chars()
        .map(|c| if c >= '\u{1100}' { 2 } else { 1 })
        .sum()
}

/// Lines up rows, the first column to the left and the others to the right.
fn align(out: &mut String, rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| {
            let cells = rows.iter().filter(|row| row.len() > 1);
            cells
                .filter_map(|row| row.get(column))
                .map(|cell| width(cell))
                .max()
                .unwrap_or(0)
        })
        .collect();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let pad = " ".repeat(widths[column].saturating_sub(width(cell)));
            if column == 0 {
                line.push_str(cell);
                line.push_str(&pad);
            } else {
                line.push_str("  ");
                line.push_str(&pad);
                line.push_str(cell);
            }
        }
        // Writing to a string cannot fail.
        let _ = writeln!(out, "{}", line.trim_end());
    }
}

fn group_rows<'a>(
    names: &[&'a str],
    row: impl Fn(&'a str, &ScoreName) -> Option<Vec<String>>,
) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut group = "";
    for name in names {
        let label = score_name(name);
        let Some(cells) = row(name, &label) else {
            continue;
        };
        if label.group.1 != group {
            group = label.group.1;
            rows.push(vec![group.to_owned()]);
        }
        rows.push(cells);
    }
    rows
}

fn score_table(out: &mut String, outcome: &EvalOutcome, all: bool) {
    let bootstrap = &outcome.settings.bootstrap;
    let _ = writeln!(
        out,
        "{} of {}; in brackets the {:.0} % interval of {} draws by study; per cent but for CIDEr-D",
        counted(outcome.cases.len(), "report", "reports"),
        counted(outcome.studies, "study", "studies"),
        100.0 * bootstrap.confidence,
        bootstrap.resamples
    );
    let mut header = vec![String::new()];
    header.extend(
        outcome
            .systems
            .iter()
            .map(|system| system.system.key().to_owned()),
    );
    let mut rows = vec![header];
    rows.extend(group_rows(&shown(outcome, all), |name, label| {
        let mut row = vec![format!("  {}", label.english)];
        for (at, system) in outcome.systems.iter().enumerate() {
            let score = system.scores.get(name)?;
            row.push(if at == 0 {
                label.interval(score)
            } else {
                label.value(score.value)
            });
        }
        Some(row)
    }));
    let mut row = vec!["  identical outputs".to_owned()];
    row.extend(outcome.systems.iter().map(|system| {
        let rate = system.findings.identical_outputs;
        percent(rate.value())
    }));
    rows.push(row);
    let mut row = vec!["  empty answers (count)".to_owned()];
    row.extend(
        outcome
            .systems
            .iter()
            .map(|system| system.findings.empty_outputs.count.to_string()),
    );
    rows.push(row);
    let mut row = vec!["  unread text, truth / answer".to_owned()];
    row.extend(outcome.systems.iter().map(|system| {
        let of = &system.findings;
        format!(
            "{} / {}",
            percent(Some(of.unread_truth)),
            percent(Some(of.unread_prediction))
        )
    }));
    rows.push(row);
    align(out, &rows);
}

fn finding_table(out: &mut String, system: &SystemScores) {
    let header = ["finding", "", "true", "said", "both", "P", "R", "F1"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for (finding, counts) in &system.findings.by_finding {
        if counts.support() + counts.false_positive == 0 {
            continue;
        }
        rows.push(vec![
            finding.to_string(),
            finding.chinese().to_owned(),
            counts.support().to_string(),
            (counts.true_positive + counts.false_positive).to_string(),
            counts.true_positive.to_string(),
            percent(counts.precision()),
            percent(counts.recall()),
            percent(counts.f1()),
        ]);
    }
    let named = system.findings.by_finding.len() - (rows.len() - 1);
    align(out, &rows);
    if named > 0 {
        let _ = writeln!(
            out,
            "{} in no report and no answer",
            if named == 1 {
                "1 more finding is".to_owned()
            } else {
                format!("{named} more findings are")
            }
        );
    }
    let averaged = &system.findings.macro_classes;
    let normal = if averaged.contains(&Finding::NoFinding) {
        ", no_finding among them"
    } else {
        ""
    };
    let _ = writeln!(
        out,
        "macro: mean over the {} in truth or answer{normal}; 0 where a share has no case",
        counted(averaged.len(), "finding", "findings")
    );
}

/// Scores of probabilities: over all classes, with `all` also by class.
fn probability_table(out: &mut String, found: &ProbabilityOutcome, all: bool) {
    let number = |value: f64| {
        if value.is_nan() {
            "–".to_owned()
        } else {
            format!("{value:.3}")
        }
    };
    let share = |value: f64| format!("{:.1} %", 100.0 * value);
    let either = |quality: Option<&Quality>, value: &dyn Fn(&Quality) -> String| {
        quality.map_or("–".to_owned(), value)
    };
    let header = [
        "probabilities",
        "",
        "with",
        "without",
        "AUC",
        "interval",
        "ECE",
        "calibrated",
        "Brier",
        "calibrated",
        "coverage",
        "calibrated",
        "decided",
        "wrong",
    ];
    let row = |english: String, chinese: &str, scores: &ProbabilityScores| {
        let (before, after) = (scores.before.as_ref(), scores.after.as_ref());
        let decided = scores.decided.filter(|decided| decided.cases > 0);
        let mut row = vec![
            english,
            chinese.to_owned(),
            scores.positives.to_string(),
            scores.negatives.to_string(),
            number(scores.auc.value),
            format!("{} – {}", number(scores.auc.low), number(scores.auc.high)),
        ];
        let values: [&dyn Fn(&Quality) -> String; 3] = [
            &|quality| number(quality.ece),
            &|quality| number(quality.brier),
            &|quality| share(quality.coverage),
        ];
        for value in values {
            row.push(either(before, value));
            row.push(either(after, value));
        }
        row.push(decided.map_or("–".to_owned(), |d| {
            share(d.decided as f64 / d.cases as f64)
        }));
        let decided = decided.filter(|decided| decided.decided > 0);
        row.push(decided.map_or("–".to_owned(), |d| {
            share(d.errors as f64 / d.decided as f64)
        }));
        row
    };
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.push(row("  together".to_owned(), "合计", &found.all));
    if all {
        for (finding, scores) in &found.classes {
            let few = if scores.is_few() { " *" } else { "" };
            rows.push(row(format!("  {finding}{few}"), finding.chinese(), scores));
        }
    }
    align(out, &rows);
    let _ = writeln!(
        out,
        "macro AUC {} ({} – {}); together: classes that some reports have and some lack; coverage: answered with {} wrong",
        number(found.macro_auc.value),
        number(found.macro_auc.low),
        number(found.macro_auc.high),
        share(found.target_error)
    );
    let coverage = &found.all.coverage;
    let _ = writeln!(
        out,
        "together, answered with {} wrong: {} ({} – {})",
        share(found.target_error),
        share(coverage.value),
        share(coverage.low),
        share(coverage.high)
    );
    if all {
        let _ = writeln!(out, "*: fewer than {FEW} reports with it, or without it");
    } else {
        out.push_str("--all lists the classes\n");
    }
}

/// Scores by subgroup; groups of few reports have no intervals.
fn subgroup_tables(out: &mut String, outcome: &EvalOutcome) {
    for divided in &outcome.subgroups {
        out.push('\n');
        let mut header = vec![format!("by {}", divided.key), "reports".to_owned()];
        header.extend(SCORES.map(|name| score_name(name).english));
        let mut rows = vec![header];
        for group in &divided.groups {
            let value = group.value.as_deref().unwrap_or("not given");
            let few = if group.few { " *" } else { "" };
            let mut row = vec![format!("  {value}{few}"), group.reports.to_string()];
            row.extend(SCORES.map(|name| {
                let Some(score) = group.scores.get(name) else {
                    return "–".to_owned();
                };
                let label = score_name(name);
                let value = label.value(score.value);
                if score.low.is_nan() {
                    value
                } else {
                    format!("{value} ({})", label.ends(score))
                }
            }));
            rows.push(row);
        }
        align(out, &rows);
        if divided.groups.iter().any(|group| group.few) {
            let _ = writeln!(out, "*: fewer than {} reports", subgroups::FEW);
        }
    }
}

fn comparison_table(out: &mut String, outcome: &EvalOutcome, all: bool) {
    let Some(comparison) = &outcome.comparison else {
        return;
    };
    let header = ["compared", "other", "this", "difference", "p", "p, Holm"];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    rows.extend(group_rows(&shown(outcome, all), |name, label| {
        let compared = comparison.get(name)?;
        Some(vec![
            format!("  {}", label.english),
            label.value(compared.first),
            label.value(compared.second),
            label.interval(&compared.difference),
            p_value(compared.p),
            p_value(compared.p_adjusted),
        ])
    }));
    align(out, &rows);
    out.push_str(
        "p: paired approximate randomisation by study; Holm: corrected for the number of scores compared\n",
    );
    if let Some(caveat) = too_few(outcome.studies, true) {
        let _ = writeln!(out, "{}", caveat.english);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_over_chinese() {
        let mut out = String::new();
        let row = |cells: [&str; 3]| cells.map(str::to_owned).to_vec();
        align(
            &mut out,
            &[
                row(["a", "气胸", "1"]),
                row(["bb", "x", "22"]),
                vec!["title".into()],
            ],
        );
        assert_eq!(out, "a   气胸   1\nbb     x  22\ntitle\n");
    }
}

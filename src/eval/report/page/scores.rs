//! Charts and tables of the scores, and the comparison with another run.

use std::fmt::Write;

use super::markup::{english, escape, section};
use crate::eval::{
    findings::score::Rate,
    outcome::{EvalOutcome, SystemScores},
    report::{
        charts::dots,
        names::{p_value, score_name},
        table::shown,
    },
};

/// Scores that get a chart.
const CHARTS: [&str; 6] = [
    "findings.micro.f1",
    "findings.macro.f1",
    "findings.false_normal",
    "findings.invented",
    "characters.rouge_l",
    "characters.bleu_4",
];

pub(super) fn charts(page: &mut String, outcome: &EvalOutcome) {
    section(page, "与基线比较", "beside the baselines");
    page.push_str(
        "<p class=\"muted\">基线不看所见：同一份报告给所有人、训练集中任一报告、最相似影像的报告。影像互换后模型的分数应明显下降，\
         否则它没有看图。<br><small>The baselines look for no finding. With images swapped the model should fall visibly, \
         else it does not look.</small></p><div class=\"charts\">",
    );
    for name in CHARTS {
        let chart = dots(outcome, name);
        if chart.is_empty() {
            continue;
        }
        let label = score_name(name);
        let less = if label.less_is_better { " ↓" } else { "" };
        let group = if label.group.1 == "findings" {
            String::new()
        } else {
            format!("（{}）", label.group.0)
        };
        let _ = write!(
            page,
            "<div class=\"card\"><h3>{}{group}{less}<small>{}</small></h3>{chart}</div>",
            label.chinese,
            english(&label)
        );
    }
    page.push_str("</div>\n");
    for system in outcome.systems.iter().filter(|s| !s.note.is_empty()) {
        let (chinese, english) = system.system.names();
        let _ = writeln!(
            page,
            "<p class=\"muted\">{chinese} <small>{english}</small>：{}</p>",
            escape(&system.note)
        );
    }
}

pub(super) fn scores(page: &mut String, outcome: &EvalOutcome) {
    section(page, "分数", "scores");
    page.push_str("<p class=\"muted\">百分数，CIDEr-D 为 0 到 10 · per cent, CIDEr-D from 0 to 10</p><div class=\"card scroll\">");
    score_table(page, outcome, &shown(outcome, false));
    page.push_str(
        "</div><details><summary>全部分数 · all scores</summary><div class=\"card scroll\">",
    );
    score_table(page, outcome, &shown(outcome, true));
    page.push_str("</div></details>\n");
}

fn score_table(page: &mut String, outcome: &EvalOutcome, names: &[&str]) {
    page.push_str("<table><thead><tr><th></th>");
    for (at, system) in outcome.systems.iter().enumerate() {
        let (chinese, english) = system.system.names();
        let _ = write!(page, "<th>{chinese}<small>{english}</small></th>");
        if at == 0 {
            page.push_str("<th>区间<small>interval</small></th>");
        }
    }
    page.push_str("</tr></thead><tbody>");
    let is_finding = |name: &&&str| name.starts_with("findings.");
    let findings = names.iter().filter(is_finding);
    let texts = names.iter().filter(|name| !is_finding(name));
    let mut group = "";
    for name in findings.chain(texts) {
        let label = score_name(name);
        if label.group.1 != group {
            if group == "findings" {
                rate_rows(page, outcome);
            }
            group = label.group.1;
            let english = if label.group.0 == group { "" } else { group };
            let _ = write!(
                page,
                "<tr class=\"group\"><td colspan=\"{}\">{} <small>{english}</small></td></tr>",
                outcome.systems.len() + 2,
                label.group.0
            );
        }
        let english = if label.chinese == label.english {
            ""
        } else {
            &label.english
        };
        let less = if label.less_is_better { " ↓" } else { "" };
        let _ = write!(
            page,
            "<tr><td>{}{less} <small>{english}</small></td>",
            label.chinese
        );
        for (at, system) in outcome.systems.iter().enumerate() {
            let Some(score) = system.scores.get(name) else {
                continue;
            };
            let _ = write!(page, "<td>{}</td>", label.value(score.value));
            if at == 0 {
                let _ = write!(page, "<td class=\"muted\">{}</td>", label.ends(score));
            }
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table>");
}

/// Shares of equal outputs, which have no interval: a draw with repeats would make equals.
fn rate_rows(page: &mut String, outcome: &EvalOutcome) {
    type RateOf = fn(&SystemScores) -> Rate;
    let rates: [(&str, &str, RateOf); 3] = [
        ("空白回答占比", "empty answers", |s| {
            s.findings.empty_outputs
        }),
        ("相同输出占比", "identical outputs", |s| {
            s.findings.identical_outputs
        }),
        ("最常见输出占比", "most frequent output", |s| {
            s.findings.most_frequent_output
        }),
    ];
    for (chinese, english, rate) in rates {
        let _ = write!(page, "<tr><td>{chinese} <small>{english}</small></td>");
        for (at, system) in outcome.systems.iter().enumerate() {
            let value = rate(system).value().unwrap_or(f64::NAN);
            let _ = write!(page, "<td>{:.1}</td>", 100.0 * value);
            if at == 0 {
                page.push_str("<td></td>");
            }
        }
        page.push_str("</tr>");
    }
    type ShareOf = fn(&SystemScores) -> f64;
    let shares: [(&str, &str, ShareOf); 2] = [
        (
            "真值中规则未读懂的文字",
            "unread text of the truth",
            |s| s.findings.unread_truth,
        ),
        (
            "回答中规则未读懂的文字",
            "unread text of the answer",
            |s| s.findings.unread_prediction,
        ),
    ];
    for (chinese, english, share) in shares {
        let _ = write!(page, "<tr><td>{chinese} <small>{english}</small></td>");
        for (at, system) in outcome.systems.iter().enumerate() {
            let _ = write!(page, "<td>{:.1}</td>", 100.0 * share(system));
            if at == 0 {
                page.push_str("<td></td>");
            }
        }
        page.push_str("</tr>");
    }
}

pub(super) fn comparison(page: &mut String, outcome: &EvalOutcome) {
    let Some(comparison) = &outcome.comparison else {
        return;
    };
    section(
        page,
        "与另一次运行成对比较",
        "paired comparison with another run",
    );
    page.push_str(
        "<div class=\"card scroll\"><table><thead><tr><th></th><th>另一次<small>other</small></th><th>本次<small>this</small></th>\
         <th>差<small>difference</small></th><th>区间<small>interval</small></th><th>p</th><th>p 校正<small>Holm</small></th></tr></thead><tbody>",
    );
    for name in shown(outcome, false) {
        let Some(compared) = comparison.get(name) else {
            continue;
        };
        let label = score_name(name);
        let _ = write!(
            page,
            "<tr><td>{} <small>{} · {}</small></td><td>{}</td><td>{}</td><td>{}</td><td class=\"muted\">{}</td><td>{}</td><td>{}</td></tr>",
            label.chinese,
            label.group.0,
            label.english,
            label.value(compared.first),
            label.value(compared.second),
            label.value(compared.difference.value),
            label.ends(&compared.difference),
            p_value(compared.p),
            p_value(compared.p_adjusted)
        );
    }
    page.push_str("</tbody></table></div>\n");
}

//! Probabilities of findings: scores by class, reliability, coverage against error.

use std::fmt::Write;

use super::markup::{SIGNIFICANT, difference, section};
use crate::{
    eval::{
        bootstrap::Interval,
        findings::Finding,
        outcome::EvalOutcome,
        probability::{
            comparison::{ProbabilityComparison, ProbabilityDifference},
            evaluation::{FEW, ProbabilityScores, Quality},
        },
        report::{
            curves::{coverage, reliability},
            names::{ScoreName, ScoreScale},
        },
    },
    study::counted,
};

pub(super) fn probabilities(page: &mut String, outcome: &EvalOutcome) {
    let Some(found) = &outcome.probabilities else {
        return;
    };
    section(page, "所见的概率", "probabilities of findings");
    let _ = write!(
        page,
        "<p class=\"muted\">{} 份有概率 <small>{} with probabilities{}</small>。合计：真值中既有又无的各类 \
         <small>together: classes that some reports have and some lack</small></p><div class=\"charts\">",
        found.cases,
        counted(found.cases, "report", "reports"),
        if found.missing > 0 {
            format!(", {} without", found.missing)
        } else {
            String::new()
        }
    );
    chart(
        page,
        "可靠性，合计",
        "reliability, all classes together",
        &reliability(&found.all),
    );
    let comparison = outcome.probability_comparison.as_ref();
    let other = comparison.map(|compared| &compared.other);
    chart(
        page,
        "可不作答时：覆盖率与错误率，合计",
        "error against coverage when the model may abstain, together",
        &coverage(
            &found.all,
            other.map(|other| &other.all),
            found.target_error,
        ),
    );
    page.push_str("</div>");
    let _ = write!(
        page,
        "<p>错误率不超过 {:.0} % 时可回答 <b>{}</b>{} <small>can be answered with at most that share of errors</small></p>",
        100.0 * found.target_error,
        share(found.all.coverage.value),
        ends(&found.all.coverage, share)
    );
    let error = 100.0 * found.target_error;
    let _ = write!(
        page,
        "<div class=\"card scroll\"><table class=\"probabilities\"><caption class=\"hidden\">所见的概率 probabilities by class</caption><thead><tr><th scope=\"col\">所见<small>finding</small></th><th scope=\"col\">有<small>with</small></th>\
         <th scope=\"col\">无<small>without</small></th><th scope=\"col\">AUC</th><th scope=\"col\">区间<small>interval</small></th>\
         <th scope=\"col\">校准误差<small>ECE, before</small></th><th scope=\"col\">校准后<small>ECE, after</small></th>\
         <th scope=\"col\">Brier<small>before</small></th><th scope=\"col\">Brier<small>after</small></th>\
         <th scope=\"col\">覆盖率<small>coverage at {error:.0} % error</small></th><th scope=\"col\">区间<small>interval</small></th>\
         <th scope=\"col\">无 ≤<small>absent, best here</small></th><th scope=\"col\">有 ≥<small>present, best here</small></th>\
         <th scope=\"col\">已判定<small>decided</small></th><th scope=\"col\">判错<small>wrong among them</small></th></tr></thead><tbody>"
    );
    row(page, "合计", "together", &found.all, "");
    for (finding, scores) in &found.classes {
        let few = if scores.is_few() {
            " class=\"few\""
        } else {
            ""
        };
        row(page, finding.chinese(), &english(*finding), scores, few);
    }
    let [mean, low, high] = [
        found.macro_auc.value,
        found.macro_auc.low,
        found.macro_auc.high,
    ]
    .map(number);
    let _ = write!(
        page,
        "</tbody></table><p class=\"muted\">AUC 宏平均 {mean}（{low} – {high}） <small>macro AUC</small></p>\
         <p class=\"muted\">灰色：有或无少于 {FEW} 例 <small>grey: fewer than {FEW} with it or without it</small>。\
         “无 ≤、有 ≥”：在本测试集上错误不超过 {error:.0} % 的阈值；“已判定”按预测所带的阈值 \
         <small>thresholds that this set would choose; decisions are those of the predictions</small></p></div>"
    );
    if let Some(compared) = comparison {
        models(page, compared);
    }
    let drawn: Vec<_> = found
        .classes
        .iter()
        .filter(|(_, scores)| scores.positives > 0 && scores.negatives > 0)
        .collect();
    if drawn.is_empty() {
        return;
    }
    page.push_str(
        "<details><summary>逐项曲线 <small>curves by class</small></summary><div class=\"charts\">",
    );
    for (finding, scores) in drawn {
        let few = if scores.is_few() { " few" } else { "" };
        let english = english(*finding);
        let _ = write!(
            page,
            "<div class=\"card{few}\"><h3>{}<small>{english}, {}</small></h3>{}{}</div>",
            finding.chinese(),
            counted(scores.positives, "case", "cases"),
            reliability(scores),
            coverage(
                scores,
                other.and_then(|other| other.classes.get(finding)),
                found.target_error
            )
        );
    }
    page.push_str("</div></details>\n");
}

fn english(finding: Finding) -> String {
    finding.key().replace('_', " ")
}

fn chart(page: &mut String, chinese: &str, english: &str, svg: &str) {
    let _ = write!(
        page,
        "<div class=\"card\"><h3>{chinese}<small>{english}</small></h3>{svg}</div>"
    );
}

/// Two models beside each other, class by class.
fn models(page: &mut String, compared: &ProbabilityComparison) {
    let _ = write!(
        page,
        "<div class=\"card scroll\"><table><caption>两次的概率 <small>probabilities of both runs, {}</small></caption><thead>\
         <tr><th rowspan=\"2\" scope=\"col\">所见<small>finding</small></th><th colspan=\"5\" scope=\"colgroup\">AUC</th>\
         <th colspan=\"5\" scope=\"colgroup\">错误 {:.0} % 时的覆盖率<small>coverage at that error</small></th></tr><tr>",
        counted(compared.cases, "report", "reports"),
        100.0 * compared.other.target_error
    );
    for _ in 0..2 {
        page.push_str(
            "<th scope=\"col\">本次<small>this</small></th><th scope=\"col\">另一次<small>other</small></th>\
             <th scope=\"col\">差<small>difference</small></th><th scope=\"col\">区间<small>interval</small></th>\
             <th scope=\"col\">p 校正<small>Holm</small></th>",
        );
    }
    page.push_str("</tr></thead><tbody>");
    // Shares from 0 to 1, more being better.
    let name = ScoreName {
        group: ("", ""),
        chinese: String::new(),
        english: String::new(),
        scale: ScoreScale::Share,
        less_is_better: false,
    };
    let mut row = |chinese: &str, english: &str, one: &ProbabilityDifference| {
        let _ = write!(
            page,
            "<tr><th scope=\"row\">{chinese} <small>{english}</small></th>"
        );
        for score in [&one.auc, &one.coverage] {
            let _ = write!(
                page,
                "<td>{}</td><td>{}</td>",
                name.value(score.second),
                name.value(score.first)
            );
            difference(page, Some(score), &name);
        }
        page.push_str("</tr>");
    };
    row("合计", "together", &compared.all);
    for (finding, one) in &compared.classes {
        row(finding.chinese(), &english(*finding), one);
    }
    let _ = write!(page, "</tbody></table>{SIGNIFICANT}</div>");
}

fn share(value: f64) -> String {
    if value.is_nan() {
        "–".to_owned()
    } else {
        format!("{:.1} %", 100.0 * value)
    }
}

/// The ends of an interval in brackets; empty where there is none.
fn ends(interval: &Interval, text: fn(f64) -> String) -> String {
    if interval.low.is_nan() {
        return String::new();
    }
    format!("（{} – {}）", text(interval.low), text(interval.high))
}

fn number(value: f64) -> String {
    if value.is_nan() {
        "–".to_owned()
    } else {
        format!("{value:.3}")
    }
}

fn row(page: &mut String, chinese: &str, english: &str, scores: &ProbabilityScores, few: &str) {
    let of = |quality: &Option<Quality>, value: fn(&Quality) -> f64| {
        quality
            .as_ref()
            .map_or("–".to_owned(), |q| number(value(q)))
    };
    let interval = if scores.auc.low.is_nan() {
        String::new()
    } else {
        format!("{} – {}", number(scores.auc.low), number(scores.auc.high))
    };
    let threshold =
        |value: Option<f64>| value.map_or("–".to_owned(), |value| format!("{value:.3}"));
    let decided = scores.decided;
    let ratio = |count: usize, of: usize| (of > 0).then(|| count as f64 / of as f64);
    let _ = write!(
        page,
        "<tr{few}><th scope=\"row\">{chinese} <small>{english}</small></th><td>{}</td><td>{}</td><td>{}</td><td class=\"muted\">{interval}</td>\
         <td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td class=\"muted\">{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
        scores.positives,
        scores.negatives,
        number(scores.auc.value),
        of(&scores.before, |q| q.ece),
        of(&scores.after, |q| q.ece),
        of(&scores.before, |q| q.brier),
        of(&scores.after, |q| q.brier),
        share(scores.coverage.value),
        ends(&scores.coverage, share),
        threshold(scores.thresholds.absent_to),
        threshold(scores.thresholds.present_from),
        share(
            decided
                .and_then(|d| ratio(d.decided, d.cases))
                .unwrap_or(f64::NAN)
        ),
        share(
            decided
                .and_then(|d| ratio(d.errors, d.decided))
                .unwrap_or(f64::NAN)
        ),
    );
}

//! Probabilities of findings: scores by class, reliability, coverage against error.

use std::fmt::Write;

use super::markup::section;
use crate::{
    eval::{
        findings::Finding,
        outcome::EvalOutcome,
        probability::evaluation::{FEW, ProbabilityScores, Quality},
        report::curves::{coverage, reliability},
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
    chart(
        page,
        "覆盖率与错误率，合计",
        "error against coverage, all classes together",
        &coverage(&found.all, found.target_error),
    );
    page.push_str("</div>");
    let error = 100.0 * found.target_error;
    let _ = write!(
        page,
        "<div class=\"card scroll\"><table class=\"probabilities\"><thead><tr><th>所见<small>finding</small></th><th>有<small>with</small></th>\
         <th>无<small>without</small></th><th>AUC</th><th>区间<small>interval</small></th>\
         <th>校准误差<small>ECE, before</small></th><th>校准后<small>ECE, after</small></th>\
         <th>Brier<small>before</small></th><th>Brier<small>after</small></th>\
         <th>覆盖率<small>coverage at {error:.0} % error</small></th><th>已判定<small>decided</small></th>\
         <th>判错<small>wrong among them</small></th></tr></thead><tbody>"
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
         <p class=\"muted\">灰色：有或无少于 {FEW} 例 <small>grey: fewer than {FEW} with it or without it</small></p></div>"
    );
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
            coverage(scores, found.target_error)
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
    let share = |value: Option<f64>| {
        value.map_or("–".to_owned(), |value| format!("{:.1} %", 100.0 * value))
    };
    let coverage = scores.after.as_ref().or(scores.before.as_ref());
    let decided = scores.decided;
    let ratio = |count: usize, of: usize| (of > 0).then(|| count as f64 / of as f64);
    let _ = write!(
        page,
        "<tr{few}><td>{chinese} <small>{english}</small></td><td>{}</td><td>{}</td><td>{}</td><td class=\"muted\">{interval}</td>\
         <td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
        scores.positives,
        scores.negatives,
        number(scores.auc.value),
        of(&scores.before, |q| q.ece),
        of(&scores.after, |q| q.ece),
        of(&scores.before, |q| q.brier),
        of(&scores.after, |q| q.brier),
        share(coverage.map(|q| q.coverage)),
        share(decided.and_then(|d| ratio(d.decided, d.cases))),
        share(decided.and_then(|d| ratio(d.errors, d.decided))),
    );
}

//! Scores by subgroup.

use std::fmt::Write;

use super::markup::{english, escape, section};
use crate::eval::{
    bootstrap::Interval,
    outcome::{EvalOutcome, NamedValues, Subgroup},
    report::names::score_name,
    subgroups::{FEW, SCORES},
};

pub(super) fn subgroups(page: &mut String, outcome: &EvalOutcome) {
    if outcome.subgroups.is_empty() {
        return;
    }
    section(page, "分组", "by subgroup");
    for divided in &outcome.subgroups {
        let guessed = if divided.guessed {
            "（键由名称推断 key guessed by its name）"
        } else {
            ""
        };
        let key = escape(&divided.key);
        let _ = write!(
            page,
            "<div class=\"card scroll\"><table><caption>按 {key}{guessed} <small>by {key}</small></caption><thead><tr>\
             <th scope=\"col\">组<small>group</small></th><th scope=\"col\">报告<small>reports</small></th>\
             <th scope=\"col\">检查<small>studies</small></th>"
        );
        for name in SCORES {
            let label = score_name(name);
            let less = if label.less_is_better { " ↓" } else { "" };
            let _ = write!(
                page,
                "<th scope=\"col\">{}{less}<small>{}</small></th>",
                label.chinese,
                english(&label)
            );
        }
        page.push_str("</tr></thead><tbody>");
        for group in &divided.groups {
            row(page, group);
        }
        page.push_str("</tbody></table></div>\n");
    }
    let _ = writeln!(
        page,
        "<p class=\"muted\">灰色：少于 {FEW} 份，不给区间 <small>grey: fewer than {FEW} reports, no interval</small></p>"
    );
}

fn row(page: &mut String, group: &Subgroup) {
    let few = if group.few { " class=\"few\"" } else { "" };
    let value = group.value.as_deref();
    let value = value.map_or("未给 not given".to_owned(), escape);
    let _ = write!(
        page,
        "<tr{few}><th scope=\"row\">{value}</th><td>{}</td><td>{}</td>",
        group.reports, group.studies
    );
    for name in SCORES {
        let label = score_name(name);
        let cell = |scores: &NamedValues<Interval>| {
            let Some(score) = scores.get(name) else {
                return "–".to_owned();
            };
            let ends = label.ends(score);
            let ends = match group.few || ends.is_empty() || score.low.is_nan() {
                true => String::new(),
                false => format!("<small>{ends}</small>"),
            };
            format!("{}{ends}", label.value(score.value))
        };
        let _ = write!(page, "<td class=\"stacked\">{}", cell(&group.scores));
        if let Some(other) = &group.other {
            let _ = write!(
                page,
                "<span class=\"muted other\">另 other {}</span>",
                cell(other)
            );
        }
        page.push_str("</td>");
    }
    page.push_str("</tr>");
}

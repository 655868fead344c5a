//! Findings class by class: counts, ratios, and the confusion of truth and answer.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write,
};

use super::markup::{SIGNIFICANT, difference, escape, section, status_names};
use crate::{
    eval::{
        findings::{
            Finding, FindingLabel, Status,
            score::{ClassCounts, percent},
        },
        outcome::{Confusion, EvalOutcome, STATUSES, SystemScores},
        report::names::score_name,
    },
    study::counted,
};

/// Fewer cases than this say little.
const FEW: usize = 10;

pub(super) fn findings(page: &mut String, outcome: &EvalOutcome) {
    section(page, "逐项所见", "by finding");
    let other = outcome.other.as_ref().zip(outcome.comparison.as_ref());
    page.push_str(
        "<div class=\"card scroll\"><table><caption class=\"hidden\">逐项所见 by finding</caption><thead><tr>\
         <th scope=\"col\">所见<small>finding</small></th><th scope=\"col\">真值<small>true</small></th>\
         <th scope=\"col\">模型说有<small>said</small></th><th scope=\"col\">一致<small>both</small></th>\
         <th scope=\"col\">漏报<small>missed</small></th><th scope=\"col\">误报<small>invented</small></th>\
         <th scope=\"col\">精确率<small>precision</small></th><th scope=\"col\">召回率<small>recall</small></th>\
         <th scope=\"col\">F1</th><th scope=\"col\">区间<small>interval</small></th>",
    );
    page.push_str(if other.is_some() {
        "<th scope=\"col\">另一次 F1<small>other F1</small></th><th scope=\"col\">区间<small>interval</small></th>\
         <th scope=\"col\">差<small>difference</small></th><th scope=\"col\">区间<small>interval</small></th>\
         <th scope=\"col\">p 校正<small>p, Holm</small></th></tr></thead><tbody>"
    } else {
        "<td></td></tr></thead><tbody>"
    });
    let model = &outcome.systems[0];
    let mut absent = Vec::new();
    for (finding, counts) in &model.findings.by_finding {
        let of_other = other.map(|(run, _)| run.scores.findings.by_finding.get(finding));
        let said_by_other = of_other.flatten().map_or(0, |counts| counts.false_positive);
        if counts.support() + counts.false_positive + said_by_other == 0 {
            absent.push(finding.chinese());
            continue;
        }
        let ends_of = |system: &SystemScores, what: &str| {
            let name = format!("findings.{finding}.{what}");
            let score = system.scores.get(&name);
            score.map_or_else(String::new, |score| score_name(&name).ends(score))
        };
        let ends = |what: &str| ends_of(model, what);
        let few = if counts.support() < FEW {
            " class=\"few\""
        } else {
            ""
        };
        let _ = write!(
            page,
            "<tr{few}><th scope=\"row\">{} <small>{}</small></th><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{}</td>\
             <td title=\"{}\">{}</td><td title=\"{}\">{}</td><td>{}</td><td class=\"muted\">{}</td>",
            finding.chinese(),
            finding.key().replace('_', " "),
            counts.support(),
            counts.true_positive + counts.false_positive,
            counts.true_positive,
            counts.false_negative,
            counts.false_positive,
            ends("precision"),
            percent(counts.precision()),
            ends("recall"),
            percent(counts.recall()),
            percent(counts.f1()),
            ends("f1"),
        );
        let name = format!("findings.{finding}.f1");
        match other {
            Some((run, comparison)) => {
                let _ = write!(
                    page,
                    "<td>{}</td><td class=\"muted\">{}</td>",
                    percent(of_other.flatten().and_then(ClassCounts::f1)),
                    ends_of(&run.scores, "f1")
                );
                difference(page, comparison.get(&name), &score_name(&name));
            }
            None => {
                let _ = write!(
                    page,
                    "<td class=\"bar\"><span style=\"width:{:.0}px\"></span></td>",
                    120.0 * counts.f1().unwrap_or(0.0)
                );
            }
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table>");
    if !absent.is_empty() {
        let _ = write!(
            page,
            "<p class=\"muted\">真值与回答中都没有 <small>in no report and no answer</small>：{}</p>",
            absent.join("、")
        );
    }
    let averaged = model.findings.macro_classes.len();
    let _ = write!(
        page,
        "<p class=\"muted\">宏平均：真值或回答中出现的 {averaged} 类所见的平均（含“未见异常”），没有例数的比值按 0 计 \
         <small>macro: mean over the {} in truth or answer, no finding among them where it occurs; 0 where a share has no case</small></p>",
        counted(averaged, "class", "classes")
    );
    let _ = writeln!(
        page,
        "<p class=\"muted\">灰色：真值少于 {FEW} 例 <small>grey: fewer than {FEW} in the truth</small></p>"
    );
    if other.is_some() {
        page.push_str(SIGNIFICANT);
    }
    page.push_str("</div>\n");
    others(page, outcome);
}

/// Abnormalities outside the twenty classes: counted, not in any average.
fn others(page: &mut String, outcome: &EvalOutcome) {
    let mut counts: BTreeMap<&str, ClassCounts> = BTreeMap::new();
    let is_there =
        |label: Option<&FindingLabel>| label.is_some_and(|l| l.status >= Status::Uncertain);
    for pair in &outcome.labels {
        let keys: BTreeSet<&String> = pair
            .truth
            .others
            .keys()
            .chain(pair.prediction.others.keys())
            .collect();
        for key in keys {
            let truth = is_there(pair.truth.others.get(key));
            let answer = is_there(pair.prediction.others.get(key));
            counts
                .entry(key)
                .or_default()
                .add(Some(truth), Some(answer));
        }
    }
    counts.retain(|_, counts| counts.occurs());
    if counts.is_empty() {
        return;
    }
    section(page, "二十类以外的异常", "outside the twenty classes");
    page.push_str(
        "<div class=\"card scroll\"><table><thead><tr><th></th><th>真值<small>true</small></th><th>模型说有<small>said</small></th>\
         <th>一致<small>both</small></th><th>F1</th></tr></thead><tbody>",
    );
    for (key, counts) in counts {
        let few = if counts.support() < FEW {
            " class=\"few\""
        } else {
            ""
        };
        let chinese = outcome.others.get(key).map_or(key, String::as_str);
        let _ = write!(
            page,
            "<tr{few}><td>{} <small>{}</small></td><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
            escape(chinese),
            escape(&key.replace('_', " ")),
            counts.support(),
            counts.true_positive + counts.false_positive,
            counts.true_positive,
            percent(counts.f1())
        );
    }
    page.push_str("</tbody></table></div>\n");
}

pub(super) fn confusion(page: &mut String, outcome: &EvalOutcome) {
    section(page, "真值与回答的混淆", "confusion of truth and answer");
    page.push_str("<div class=\"card\"><select id=\"confusion-select\" aria-label=\"所见 finding\" hidden><option value=\"all\">全部所见 · all findings</option>");
    for finding in Finding::ALL {
        let _ = write!(
            page,
            "<option value=\"{finding}\">{} · {}</option>",
            finding.chinese(),
            finding.key().replace('_', " ")
        );
    }
    page.push_str("</select><div class=\"pair\">");
    let other = outcome.other.as_ref();
    let runs = [
        (Some(&outcome.confusion), "本次", "this run"),
        (other.map(|run| &run.confusion), "另一次", "the other run"),
    ];
    for (confusion, chinese, english) in runs {
        let Some(confusion) = confusion else {
            continue;
        };
        let name = other.map(|_| (chinese, english));
        confusion_table(page, confusion, name);
    }
    page.push_str("</div></div>\n");
}

/// One table, with its numbers by finding for the page's choice.
fn confusion_table(
    page: &mut String,
    confusion: &BTreeMap<Finding, Confusion>,
    name: Option<(&str, &str)>,
) {
    let mut all = Confusion::default();
    for (finding, table) in confusion {
        if *finding == Finding::NoFinding {
            continue;
        }
        for (sums, row) in all.iter_mut().zip(table) {
            for (sum, count) in sums.iter_mut().zip(row) {
                *sum += count;
            }
        }
    }
    page.push_str("<div class=\"scroll\"><table class=\"confusion\">");
    if let Some((chinese, english)) = name {
        let _ = write!(
            page,
            "<caption>{chinese} <small>{english}</small></caption>"
        );
    }
    page.push_str("<thead><tr><th scope=\"col\">真值 ↓ 回答 →<small>truth ↓ answer →</small></th>");
    for status in STATUSES {
        let (chinese, english) = status_names(status);
        let _ = write!(
            page,
            "<th scope=\"col\">{chinese}<small>{english}</small></th>"
        );
    }
    page.push_str("</tr></thead><tbody>");
    for (row, status) in STATUSES.into_iter().enumerate() {
        let (chinese, english) = status_names(status);
        let _ = write!(
            page,
            "<tr><th scope=\"row\">{chinese} <small>{english}</small></th>"
        );
        for (column, count) in all[row].iter().enumerate() {
            let class = if row == column {
                " class=\"agree\""
            } else {
                ""
            };
            let _ = write!(page, "<td{class}>{count}</td>");
        }
        page.push_str("</tr>");
    }
    let tables = confusion.iter().map(|(f, table)| (f.key(), table));
    let tables: BTreeMap<&str, &Confusion> = tables.chain(std::iter::once(("all", &all))).collect();
    // Only keys of ours and numbers: nothing in it can end the script.
    let data = serde_json::to_string(&tables).unwrap_or_else(|_| "{}".to_owned());
    let _ = write!(
        page,
        "</tbody></table><script type=\"application/json\" class=\"confusion-data\">{data}</script></div>"
    );
}

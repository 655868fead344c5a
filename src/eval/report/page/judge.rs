//! What a judge said, by kind of error, and how far it can be believed.

use std::fmt::Write;

use super::markup::{escape, section};
use crate::eval::{
    judge::{ErrorKind, JudgeOutcome},
    outcome::EvalOutcome,
};

pub(super) fn judge(page: &mut String, outcome: &EvalOutcome) {
    let Some(found) = &outcome.judge else {
        return;
    };
    section(page, "语言模型评审", "a language model as judge");
    let green = found.green.as_ref().map_or_else(
        || "–".to_owned(),
        |green| format!("{:.3} [{:.3}, {:.3}]", green.value, green.low, green.high),
    );
    let _ = write!(
        page,
        "<p class=\"muted\">参考报告与模型报告已发送到 {url}，由 {model} 评审：可读 {judged} 份，不可读 {unreadable} 份，无回答 {failed} 份。\
         <small>references and answers were sent to {url} and judged by {model}: {judged} judged, {unreadable} unreadable, {failed} without \
         an answer</small></p><p><b>GREEN {green}</b> <small>一致 ÷（一致＋重要错误） · matched / (matched + significant errors)</small></p>",
        url = escape(&found.url),
        model = escape(&found.model),
        judged = found.judged,
        unreadable = found.unreadable,
        failed = found.failed,
    );
    kinds(page, found);
    if let Some(check) = &found.check {
        let _ = write!(
            page,
            "<p class=\"muted\">植入错误的召回与精确：体模报告中按规则各植入一处错误；无错误的 {} 对中 {} 对被判为无错。\
             <small>recall and precision on planted errors; {} of {} pairs without an error were called so, {} answers were \
             unreadable</small></p>",
            check.clean, check.called_clean, check.called_clean, check.clean, check.unreadable
        );
    }
}

fn kinds(page: &mut String, found: &JudgeOutcome) {
    page.push_str(
        "<div class=\"card scroll\"><table><thead><tr><th>错误<small>error</small></th><th>重要<small>significant</small></th>\
         <th>不重要<small>others</small></th><th>涉及报告<small>reports</small></th>",
    );
    if found.check.is_some() {
        page.push_str(
            "<th>植入<small>planted</small></th><th>召回<small>recall</small></th><th>精确<small>precision</small></th>",
        );
    }
    page.push_str("</tr></thead><tbody>");
    let share = |share: Option<f64>| {
        share.map_or_else(|| "–".to_owned(), |share| format!("{:.1} %", 100.0 * share))
    };
    for kind in ErrorKind::ALL {
        let counts = found.by_kind.get(&kind).copied().unwrap_or_default();
        let _ = write!(
            page,
            "<tr><td>{} <small>{}</small></td><td>{}</td><td>{}</td><td>{}</td>",
            kind.chinese(),
            kind.key().replace('_', " "),
            counts.significant,
            counts.insignificant,
            counts.reports
        );
        if let Some(check) = found
            .check
            .as_ref()
            .and_then(|check| check.by_kind.get(&kind))
        {
            let _ = write!(
                page,
                "<td>{}</td><td>{}</td><td>{}</td>",
                check.planted,
                share(check.recall),
                share(check.precision)
            );
        }
        page.push_str("</tr>");
    }
    page.push_str("</tbody></table></div>\n");
}

//! Pieces of HTML that the parts of a page share.

use std::fmt::Write;

use crate::eval::{
    bootstrap::Comparison,
    findings::Status,
    report::names::{ScoreName, p_value},
};

/// Text as HTML shows it, in elements and in attributes.
pub(in crate::eval::report) fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            c => safe.push(c),
        }
    }
    safe
}

// Writing to a string cannot fail, here and below.
pub(super) fn section(page: &mut String, chinese: &str, english: &str) {
    let _ = writeln!(page, "<h2>{chinese}<small>{english}</small></h2>");
}

pub(in crate::eval::report) fn status_names(status: Status) -> (&'static str, &'static str) {
    match status {
        Status::Present => ("有", "present"),
        Status::Uncertain => ("可疑", "uncertain"),
        Status::Absent => ("无", "absent"),
        Status::NotMentioned => ("未提及", "not mentioned"),
    }
}

/// What marks a difference in a table.
pub(super) const SIGNIFICANT: &str = "<p class=\"muted\"><b class=\"better\">↑ *</b>、<b class=\"worse\">↓ *</b>：校正后 p &lt; 0.05，本次较好、较差 \
     <small>* corrected p below 0.05: this run is better (↑), worse (↓)</small></p>";

/// Below this a corrected p value is marked.
const LEVEL: f64 = 0.05;

/// Cells of a difference, its interval and its corrected p value; a mark where that is small.
pub(super) fn difference(page: &mut String, compared: Option<&Comparison>, name: &ScoreName) {
    let Some(compared) = compared else {
        page.push_str("<td>–</td><td></td><td></td>");
        return;
    };
    let mark = if compared.p_adjusted < LEVEL {
        match (compared.difference.value > 0.0) != name.less_is_better {
            true => "<b class=\"better\">↑ *</b> ",
            false => "<b class=\"worse\">↓ *</b> ",
        }
    } else {
        ""
    };
    let _ = write!(
        page,
        "<td>{mark}{}</td><td class=\"muted\">{}</td><td>{}</td>",
        name.value(compared.difference.value),
        name.ends(&compared.difference),
        p_value(compared.p_adjusted)
    );
}

/// The English name, with its tokens where the Chinese one names them too.
pub(super) fn english(label: &ScoreName) -> String {
    if label.group.1 == "findings" {
        label.english.clone()
    } else {
        format!("{}, {}", label.english, label.group.1)
    }
}

//! Pieces of HTML that the parts of a page share.

use std::fmt::Write;

use crate::eval::{findings::Status, report::names::ScoreName};

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

/// The English name, with its tokens where the Chinese one names them too.
pub(super) fn english(label: &ScoreName) -> String {
    if label.group.1 == "findings" {
        label.english.clone()
    } else {
        format!("{}, {}", label.english, label.group.1)
    }
}

//! A report printed as it grows.

use std::io::{Write, stdout};

use crate::processor::message::split_thinking;

/// The report as it grows: reasoning is kept back, the answer goes to stdout.
pub(super) struct Shown {
    starts_inside: bool,
    text: String,
    printed: String,
}

impl Shown {
    pub(super) fn new(starts_inside: bool) -> Self {
        Self {
            starts_inside,
            text: String::new(),
            printed: String::new(),
        }
    }

    pub(super) fn push(&mut self, piece: &str) {
        self.text.push_str(piece);
        // What may still become an opening mark is not an answer yet.
        if "<think>".starts_with(self.text.trim_start()) {
            return;
        }
        let (_, answer) = split_thinking(&self.text, self.starts_inside);
        if !answer.starts_with(&self.printed) {
            // A closing mark came where no block was open: what was shown was reasoning.
            let _ = writeln!(stdout());
            self.printed.clear();
        }
        let _ = write!(stdout(), "{}", &answer[self.printed.len()..]);
        let _ = stdout().flush();
        self.printed = answer;
    }

    pub(super) fn end(&mut self) {
        let _ = writeln!(stdout());
    }
}

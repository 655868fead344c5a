//! Tokens to text that can be shown as it comes: whole characters, stop strings held back.

use crate::processor::tokenizer::{StreamDecoder, Tokenizer};

/// Detokenises one answer piece by piece.
pub struct TextStream {
    decoder: StreamDecoder,
    stop: Vec<String>,
    /// Decoded, not shown yet: may be the beginning of a stop string.
    held: String,
    text: String,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends before the first of `stop`; special tokens are left out, but for the
    /// thinking marks, which are text.
    pub fn new(tokenizer: &Tokenizer, stop: &[String]) -> Self {
        Self {
            decoder: tokenizer.stream(true),
            stop: stop
                .iter()
                .filter(|stop| !stop.is_empty())
                .cloned()
                .collect(),
            held: String::new(),
            text: String::new(),
            stopped: false,
        }
    }

    /// Takes a token and returns the text that can be shown now.
    pub fn push(&mut self, token: u32) -> String {
        let piece = self.decoder.push(token);
        self.take(&piece, false)
    }

    /// Returns what is left at the end of the answer.
    pub fn finish(&mut self) -> String {
        let piece = self.decoder.flush();
        self.take(&piece, true)
    }

    /// Whether a stop string was met; what follows is not text any more.
    pub fn stopped(&self) -> bool {
        self.stopped
    }

    /// All text shown so far.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn take(&mut self, piece: &str, last: bool) -> String {
        if self.stopped {
            return String::new();
        }
        self.held.push_str(piece);
        let stop_at = self
            .stop
            .iter()
            .filter_map(|stop| self.held.find(stop.as_str()))
            .min();
        let shown = if let Some(at) = stop_at {
            self.stopped = true;
            self.held.truncate(at);
            std::mem::take(&mut self.held)
        } else if last {
            std::mem::take(&mut self.held)
        } else {
            let keep = self
                .stop
                .iter()
                .map(|stop| overlap(&self.held, stop))
                .max()
                .unwrap_or(0);
            let rest = self.held.split_off(self.held.len() - keep);
            std::mem::replace(&mut self.held, rest)
        };
        self.text.push_str(&shown);
        shown
    }
}

/// Bytes at the end of `text` that are the beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    stop.char_indices()
        .map(|(at, _)| at)
        .filter(|at| *at > 0 && text.ends_with(&stop[..*at]))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_a_stop_string_is_held_back() {
        assert_eq!(overlap("心影正常。结", "结束"), 3);
        assert_eq!(overlap("心影正常。", "结束"), 0);
        assert_eq!(overlap("aab", "abc"), 2);
    }
}

//! Tokens to text that can be shown as it comes: whole characters, stop strings held back.

use crate::processor::tokenizer::{StreamDecoder, Tokenizer};

/// What a [`TextStream`] shows besides plain text.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StreamOptions {
    /// The stop string that ends the text.
    pub include_stop: bool,
    /// Special tokens.
    pub keep_special: bool,
}

/// Detokenises one answer piece by piece.
pub struct TextStream {
    decoder: StreamDecoder,
    stop: Vec<String>,
    /// Shows the stop string that ends the text.
    shows_stop: bool,
    /// Decoded, not shown yet: may be the beginning of a stop string.
    held: String,
    text: String,
    stopped: bool,
}

impl TextStream {
    /// A stream that ends before the first of `stop`; special tokens are left out, but for the
    /// thinking marks, which are text.
    pub fn new(tokenizer: &Tokenizer, stop: &[String]) -> Self {
        Self::with(tokenizer, stop, StreamOptions::default())
    }

    /// As [`Self::new`], with options.
    pub fn with(tokenizer: &Tokenizer, stop: &[String], options: StreamOptions) -> Self {
        Self {
            decoder: tokenizer.stream(!options.keep_special),
            shows_stop: options.include_stop,
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
        let found = self
            .stop
            .iter()
            .filter_map(|stop| Some((self.held.find(stop.as_str())?, stop.len())))
            .min();
        let stop_at = found.map(|(at, length)| at + usize::from(self.shows_stop) * length);
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
    fn a_stop_string_and_special_tokens_are_shown_where_they_are_wanted() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        let tokenizer = Tokenizer::from_folder(folder).unwrap();
        let ids = tokenizer.encode("心影正常<|im_end|>").unwrap();
        let stop = ["正".to_owned()];
        let text = |stop: &[String], options| {
            let mut stream = TextStream::with(&tokenizer, stop, options);
            let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
            text.push_str(&stream.finish());
            text
        };
        let options = StreamOptions::default();
        assert_eq!(text(&stop, options), "心影");
        assert_eq!(text(&[], options), "心影正常");
        let shown = StreamOptions {
            include_stop: true,
            keep_special: true,
        };
        assert_eq!(text(&stop, shown), "心影正");
        assert_eq!(text(&[], shown), "心影正常<|im_end|>");
    }

    #[test]
    fn the_beginning_of_a_stop_string_is_held_back() {
        assert_eq!(overlap("心影正常。结", "结束"), 3);
        assert_eq!(overlap("心影正常。", "结束"), 0);
        assert_eq!(overlap("aab", "abc"), 2);
    }
}

//! Calls of functions in an answer's text, while it is still coming: Hermes' form,
//! `<tool_call>{"name": …, "arguments": …}</tool_call>`.

use serde_json::Value;

use crate::processor::tools::{CALL_CLOSE, CALL_OPEN};

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CallPiece {
    /// Words.
    Text(String),
    /// A call begins.
    Begin {
        /// Number of the call in the answer, from 0.
        index: usize,
        /// The function.
        name: String,
    },
    /// More of a call's arguments, as text of JSON.
    Arguments {
        /// Number of the call.
        index: usize,
        /// The text.
        text: String,
    },
}

#[derive(Debug, Clone)]
enum State {
    Text,
    /// Inside of a call.
    Call {
        /// What came since the opening mark.
        raw: String,
        /// Where its arguments begin, and how far they are known to be arguments; `None` before that.
        arguments: Option<Arguments>,
    },
}

/// Place in the arguments of a call.
#[derive(Debug, Clone)]
struct Arguments {
    /// Bytes of the call that were looked at.
    at: usize,
    depth: usize,
    in_text: bool,
    escaped: bool,
    over: bool,
}

/// Splits a text that comes in pieces into words and calls.
///
/// A call that is no JSON object with a name and arguments is passed on as words, as far as that is known
/// before its arguments are.
#[derive(Debug, Clone)]
pub struct CallSplitter {
    state: State,
    held: String,
    calls: usize,
    /// Whether nothing but blanks came after the last call.
    after_call: bool,
}

impl Default for CallSplitter {
    fn default() -> Self {
        Self {
            state: State::Text,
            held: String::new(),
            calls: 0,
            after_call: false,
        }
    }
}

impl CallSplitter {
    /// Number of calls so far.
    pub fn calls(&self) -> usize {
        self.calls
    }

    /// Takes a piece and gives what is certain by now.
    pub fn push(&mut self, text: &str) -> Vec<CallPiece> {
        self.held.push_str(text);
        self.advance(false)
    }

    /// Gives what was held back at the end of the text.
    pub fn finish(&mut self) -> Vec<CallPiece> {
        self.advance(true)
    }

    fn advance(&mut self, last: bool) -> Vec<CallPiece> {
        let mut pieces = Vec::new();
        while self.step(last, &mut pieces) {}
        pieces
    }

    /// Goes on by a mark; `false` when there is no more to be done with what came.
    fn step(&mut self, last: bool, pieces: &mut Vec<CallPiece>) -> bool {
        match std::mem::replace(&mut self.state, State::Text) {
            State::Text => self.text(last, pieces),
            State::Call { raw, arguments } => self.call(raw, arguments, last, pieces),
        }
    }

    fn text(&mut self, last: bool, pieces: &mut Vec<CallPiece>) -> bool {
        let found = self.held.find(CALL_OPEN);
        let rest = match found {
            Some(at) => {
                let rest = self.held.split_off(at + CALL_OPEN.len());
                self.held.truncate(at);
                rest
            }
            None if last => String::new(),
            None => {
                let keep = uncertain(&self.held);
                self.held.split_off(self.held.len() - keep)
            }
        };
        let mut words = std::mem::replace(&mut self.held, rest);
        // Blanks next to a call are no words.
        if self.after_call {
            words = words.trim_start().to_owned();
        }
        if found.is_some() || (last && self.calls > 0) {
            words.truncate(words.trim_end().len());
        }
        if !words.is_empty() {
            self.after_call = false;
            pieces.push(CallPiece::Text(words));
        }
        if found.is_some() {
            self.state = State::Call {
                raw: String::new(),
                arguments: None,
            };
        }
        found.is_some()
    }

    fn call(
        &mut self,
        mut raw: String,
        mut arguments: Option<Arguments>,
        last: bool,
        pieces: &mut Vec<CallPiece>,
    ) -> bool {
        let index = self.calls;
        raw.push_str(&std::mem::take(&mut self.held));
        if arguments.is_none()
            && let Some((name, at)) = head(&raw)
        {
            pieces.push(CallPiece::Begin { index, name });
            arguments = Some(Arguments {
                at,
                depth: 0,
                in_text: false,
                escaped: false,
                over: false,
            });
        }
        // A closing mark inside of the arguments is one of their letters.
        let mut search_from = Some(0);
        if let Some(arguments) = &mut arguments {
            let text = arguments.take(&raw);
            if !text.is_empty() {
                pieces.push(CallPiece::Arguments { index, text });
            }
            search_from = arguments.over.then_some(arguments.at);
        }
        let closed = search_from.and_then(|from| Some(from + raw[from..].find(CALL_CLOSE)?));
        if let Some(at) = closed {
            self.held = raw.split_off(at + CALL_CLOSE.len());
            raw.truncate(at);
        } else if !last {
            self.state = State::Call { raw, arguments };
            return false;
        }
        if arguments.is_some() {
            self.calls += 1;
            self.after_call = true;
        } else {
            self.late_call(&raw, closed.is_some(), pieces);
        }
        closed.is_some()
    }

    /// A call whose beginning was of another form: whole now, or words.
    fn late_call(&mut self, raw: &str, closed: bool, pieces: &mut Vec<CallPiece>) {
        let whole = serde_json::from_str::<Value>(raw.trim()).ok();
        let call = whole.and_then(|value| {
            let name = value.get("name")?.as_str()?.to_owned();
            let arguments = match value.get("arguments") {
                None => "{}".to_owned(),
                Some(Value::String(text)) => text.clone(),
                Some(value) => value.to_string(),
            };
            Some((name, arguments))
        });
        match call {
            Some((name, text)) => {
                let index = self.calls;
                pieces.push(CallPiece::Begin { index, name });
                pieces.push(CallPiece::Arguments { index, text });
                self.calls += 1;
                self.after_call = true;
            }
            None => {
                let close = if closed { CALL_CLOSE } else { "" };
                self.after_call = false;
                pieces.push(CallPiece::Text(format!("{CALL_OPEN}{raw}{close}")));
            }
        }
    }
}

/// Bytes at the end that may belong to an opening mark, with the blanks before it.
fn uncertain(text: &str) -> usize {
    let mark = overlap(text, CALL_OPEN);
    let before = &text[..text.len() - mark];
    text.len() - before.trim_end_matches(['\n', ' ']).len()
}

/// Bytes at the end of `text` that are the beginning of `mark`.
fn overlap(text: &str, mark: &str) -> usize {
    (1..mark.len())
        .rev()
        .find(|length| text.ends_with(&mark[..*length]))
        .unwrap_or(0)
}

/// The name and where the arguments begin, once both are there: `{"name": "…", "arguments": {`.
fn head(raw: &str) -> Option<(String, usize)> {
    let rest = raw.trim_start().strip_prefix('{')?.trim_start();
    let rest = rest.strip_prefix("\"name\"")?.trim_start();
    let rest = rest.strip_prefix(':')?.trim_start();
    let inner = rest.strip_prefix('"')?;
    let end = inner.find('"')?;
    let name = &inner[..end];
    if name.is_empty() || name.contains('\\') {
        return None;
    }
    let rest = inner[end + 1..].trim_start().strip_prefix(',')?;
    let rest = rest.trim_start().strip_prefix("\"arguments\"")?;
    let rest = rest.trim_start().strip_prefix(':')?.trim_start();
    rest.starts_with('{')
        .then(|| (name.to_owned(), raw.len() - rest.len()))
}

impl Arguments {
    /// What came of the arguments, up to the end of their object.
    fn take(&mut self, raw: &str) -> String {
        let begin = self.at;
        for byte in &raw.as_bytes()[begin..] {
            if self.over {
                break;
            }
            self.at += 1;
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' if self.in_text => self.escaped = true,
                b'"' => self.in_text = !self.in_text,
                b'{' | b'[' if !self.in_text => self.depth += 1,
                b'}' | b']' if !self.in_text => {
                    self.depth = self.depth.saturating_sub(1);
                    self.over = self.depth == 0;
                }
                _ => {}
            }
        }
        raw[begin..self.at].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words and calls of a text that comes in pieces of `size` letters.
    fn run(text: &str, size: usize) -> (String, Vec<(String, String)>) {
        let mut splitter = CallSplitter::default();
        let letters: Vec<char> = text.chars().collect();
        let mut pieces = Vec::new();
        for chunk in letters.chunks(size) {
            pieces.extend(splitter.push(&chunk.iter().collect::<String>()));
        }
        pieces.extend(splitter.finish());
        let (mut words, mut calls) = (String::new(), Vec::new());
        for piece in pieces {
            match piece {
                CallPiece::Text(text) => words.push_str(&text),
                CallPiece::Begin { index, name } => {
                    assert_eq!(index, calls.len());
                    calls.push((name, String::new()));
                }
                CallPiece::Arguments { index, text } => calls[index].1.push_str(&text),
            }
        }
        assert_eq!(splitter.calls(), calls.len());
        (words, calls)
    }

    #[test]
    fn pieces_of_any_size_give_the_same_words_and_calls() {
        let call = |name: &str, arguments: &str| (name.to_owned(), arguments.to_owned());
        let nested = "{\"a\": \"}</tool_call>\", \"b\": [{\"c\": \"\\\"\"}]}";
        for (text, words, calls) in [
            ("心影正常。", "心影正常。", vec![]),
            ("a < b\n", "a < b\n", vec![]),
            (
                "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1}}\n</tool_call>",
                "",
                vec![call("f", "{\"x\": 1}")],
            ),
            (
                "先查。\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n{\"name\": \"g\", \"arguments\": {}}\n</tool_call>\n",
                "先查。",
                vec![call("f", "{}"), call("g", "{}")],
            ),
            (
                "<tool_call>{\"arguments\": {\"x\": 1}, \"name\": \"f\"}</tool_call>",
                "",
                vec![call("f", "{\"x\":1}")],
            ),
            (
                "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": 1",
                "",
                vec![call("f", "{\"x\": 1")],
            ),
            (
                "<tool_call>nonsense</tool_call>",
                "<tool_call>nonsense</tool_call>",
                vec![],
            ),
            ("<tool_call>\n{\"na", "<tool_call>\n{\"na", vec![]),
        ] {
            for size in 1..=text.chars().count() {
                assert_eq!(
                    run(text, size),
                    (words.to_owned(), calls.clone()),
                    "{text:?} by {size}"
                );
            }
        }
        let text =
            format!("<tool_call>\n{{\"name\": \"f\", \"arguments\": {nested}}}\n</tool_call>");
        for size in 1..=text.chars().count() {
            assert_eq!(run(&text, size).1, [call("f", nested)], "by {size}");
        }
    }
}

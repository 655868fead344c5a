//! Separates reasoning from answer while the text is still coming.

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Belongs to the reasoning.
    Reasoning(String),
    /// Meant for the reader.
    Answer(String),
}

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nothing but perhaps the beginning of an opening mark so far.
    Start,
    Reasoning,
    /// Between the closing mark and the answer's first letter.
    Gap,
    Answer,
}

/// Splits a text that comes in pieces at its thinking marks; newlines at the seams are dropped.
///
/// The whole of what it gives equals `split_thinking` of the whole text, but for one case: a closing
/// mark where no block was opened stays in the answer, which was shown by then.
#[derive(Debug, Clone)]
pub struct ReasoningSplitter {
    state: State,
    held: String,
    /// Whether any reasoning was given; before that, newlines are dropped.
    begun: bool,
}

impl ReasoningSplitter {
    /// `starts_inside`: the prompt already opened the block.
    pub fn new(starts_inside: bool) -> Self {
        Self {
            state: if starts_inside {
                State::Reasoning
            } else {
                State::Start
            },
            held: String::new(),
            begun: false,
        }
    }

    /// Whether what comes next belongs to the reasoning.
    pub fn is_inside(&self) -> bool {
        self.state == State::Reasoning
    }

    /// Takes a piece and gives what is certain by now.
    pub fn push(&mut self, text: &str) -> Vec<Piece> {
        self.held.push_str(text);
        self.advance(false)
    }

    /// Gives what was held back at the end of the text.
    pub fn finish(&mut self) -> Vec<Piece> {
        self.advance(true)
    }

    fn advance(&mut self, last: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        loop {
            match self.state {
                State::Start => {
                    let trimmed = self.held.trim_start();
                    if let Some(rest) = trimmed.strip_prefix(OPEN) {
                        self.held = rest.to_owned();
                        self.state = State::Reasoning;
                    } else if OPEN.starts_with(trimmed) && !last {
                        return pieces;
                    } else {
                        self.state = State::Answer;
                    }
                }
                State::Reasoning => {
                    if let Some(at) = self.held.find(CLOSE) {
                        let rest = self.held.split_off(at + CLOSE.len());
                        self.held.truncate(at);
                        let text = std::mem::replace(&mut self.held, rest);
                        self.reason(text.trim_end_matches('\n'), &mut pieces);
                        self.state = State::Gap;
                        continue;
                    }
                    let keep = if last { 0 } else { uncertain(&self.held) };
                    let rest = self.held.split_off(self.held.len() - keep);
                    let text = std::mem::replace(&mut self.held, rest);
                    let text = if last {
                        text.trim_end_matches('\n')
                    } else {
                        &text
                    };
                    self.reason(text, &mut pieces);
                    return pieces;
                }
                State::Gap => {
                    self.held = self.held.trim_start_matches('\n').to_owned();
                    if self.held.is_empty() {
                        return pieces;
                    }
                    self.state = State::Answer;
                }
                State::Answer => {
                    if !self.held.is_empty() {
                        pieces.push(Piece::Answer(std::mem::take(&mut self.held)));
                    }
                    return pieces;
                }
            }
        }
    }

    fn reason(&mut self, text: &str, pieces: &mut Vec<Piece>) {
        let text = if self.begun {
            text
        } else {
            text.trim_start_matches('\n')
        };
        if !text.is_empty() {
            self.begun = true;
            pieces.push(Piece::Reasoning(text.to_owned()));
        }
    }
}

/// Bytes at the end that may belong to a closing mark, with the newlines before it.
fn uncertain(text: &str) -> usize {
    let mark = (1..CLOSE.len())
        .rev()
        .find(|length| text.ends_with(&CLOSE[..*length]))
        .unwrap_or(0);
    let before = &text[..text.len() - mark];
    text.len() - before.trim_end_matches('\n').len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::message::split_thinking;

    fn run(text: &str, inside: bool, size: usize) -> (String, String) {
        let mut splitter = ReasoningSplitter::new(inside);
        let chars: Vec<char> = text.chars().collect();
        let mut pieces = Vec::new();
        for chunk in chars.chunks(size) {
            pieces.extend(splitter.push(&chunk.iter().collect::<String>()));
        }
        pieces.extend(splitter.finish());
        let (mut reasoning, mut answer) = (String::new(), String::new());
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => reasoning.push_str(&text),
                Piece::Answer(text) => answer.push_str(&text),
            }
        }
        (reasoning, answer)
    }

    #[test]
    fn pieces_of_any_size_give_what_the_whole_gives() {
        for (text, inside) in [
            ("心影正常。", false),
            (
                "<think>\n先看心影。\n\n看肺。\n</think>\n\n心影正常。\n",
                false,
            ),
            ("先看心影。\n</think>\n\n心影正常。", true),
            ("先看<b>心影</thin。\n", true),
            ("<thin", false),
            ("<think>没有结束\n", false),
            ("</think>答", true),
            ("", true),
        ] {
            let (thinking, answer) = split_thinking(text, inside);
            let want = (thinking.unwrap_or_default(), answer);
            for size in 1..=text.chars().count().max(1) {
                assert_eq!(run(text, inside, size), want, "{text:?} by {size}");
            }
        }
    }
}

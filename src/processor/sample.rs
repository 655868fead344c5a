//! One line of a training file in ms-swift's form, checked.
//!
//! `{"messages": [{"role": "user", "content": "<image>…"}, {"role": "assistant", "content": "…"}],
//! "images": ["a.png"]}`: each `<image>` in a question is the place of the next image.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::chat::{Content, Message, Part, Role};
use crate::study::{PATIENT_KEYS, STUDY_KEYS, keys_of};

/// What ms-swift writes where an image belongs.
pub const IMAGE_TAG: &str = "<image>";

/// Why a line is no sample; every message names the file and the row.
#[derive(Debug, thiserror::Error)]
pub enum SampleError {
    /// The line is not JSON of the expected form.
    #[error("`{}` row {row}: not a sample: {cause}", .file.display())]
    Json {
        /// File the line is from.
        file: PathBuf,
        /// Row in the file, from 1.
        row: usize,
        /// What the parser said.
        #[source]
        cause: serde_json::Error,
    },
    /// A value under a key is not what the form asks for.
    #[error("`{}` row {row}: `{key}` is {found}; expected {expected}", .file.display())]
    Key {
        /// File the line is from.
        file: PathBuf,
        /// Row in the file, from 1.
        row: usize,
        /// Path of the key inside the line.
        key: String,
        /// What is there.
        found: String,
        /// What should be there.
        expected: &'static str,
    },
    /// More image places than images.
    #[error(
        "`{}` row {row}: the text has {placeholders} `<image>` placeholders but `images` holds {images}; expected no more placeholders than images",
        .file.display()
    )]
    Placeholders {
        /// File the line is from.
        file: PathBuf,
        /// Row in the file, from 1.
        row: usize,
        /// Number of `<image>` in the questions.
        placeholders: usize,
        /// Number of images.
        images: usize,
    },
}

/// A question and its answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Turn {
    /// The question, its images in place.
    pub question: Vec<Part>,
    /// The answer; absent only in the last turn of a sample made for inference.
    pub answer: Option<String>,
}

/// A conversation of turns, as training sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Conversation {
    /// What sets the scene.
    pub system: Option<String>,
    /// At least one question with its answer.
    pub turns: Vec<Turn>,
}

impl Conversation {
    /// One question about `images` images at its front, with its answer.
    pub fn single(images: usize, question: impl Into<String>, answer: impl Into<String>) -> Self {
        let mut parts = vec![Part::Image; images];
        parts.push(Part::Text {
            text: question.into(),
        });
        Self {
            system: None,
            turns: vec![Turn {
                question: parts,
                answer: Some(answer.into()),
            }],
        }
    }

    /// Number of image places.
    pub fn image_count(&self) -> usize {
        self.turns
            .iter()
            .flat_map(|turn| &turn.question)
            .filter(|part| **part == Part::Image)
            .count()
    }

    /// Answer of the last turn: the reference text of an evaluation.
    pub fn last_answer(&self) -> Option<&str> {
        self.turns.last()?.answer.as_deref()
    }

    /// The messages up to and including the last question, for a chat template.
    pub fn prompt_messages(&self) -> Vec<Message> {
        let mut messages = self.messages();
        if self.last_answer().is_some() {
            messages.pop();
        }
        messages
    }

    /// All messages.
    pub fn messages(&self) -> Vec<Message> {
        let system = self
            .system
            .iter()
            .map(|text| Message::text(Role::System, text));
        let turns = self.turns.iter().flat_map(|turn| {
            let question = Message {
                role: Role::User,
                content: Content::Parts(turn.question.clone()),
                reasoning_content: None,
            };
            let answer = turn
                .answer
                .iter()
                .map(|text| Message::text(Role::Assistant, text));
            std::iter::once(question).chain(answer)
        });
        system.chain(turns).collect()
    }

    /// Adds the places of images that have none to the front of the first question, as ms-swift does.
    ///
    /// Source: `_add_default_tags`, ms-swift, `template/base.py`.
    fn place_images(&mut self, images: usize) {
        let missing = images.saturating_sub(self.image_count());
        if let Some(first) = self.turns.first_mut() {
            first
                .question
                .splice(0..0, std::iter::repeat_n(Part::Image, missing));
        }
    }
}

/// One checked line of a training file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// The conversation, with a place for each image.
    pub conversation: Conversation,
    /// Paths as the line gives them, in the order of their places.
    pub images: Vec<String>,
    /// Keys with a text or a number, as text: a study may be named by one.
    pub keys: BTreeMap<String, String>,
    /// Keys that were passed over, such as `objects` or `messages[0].loss`.
    pub unknown_keys: Vec<String>,
}

#[derive(Deserialize)]
struct Line {
    messages: Vec<MessageLine>,
    #[serde(default)]
    images: Option<Value>,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

#[derive(Deserialize)]
struct MessageLine {
    role: String,
    content: Value,
    #[serde(flatten)]
    unknown: Map<String, Value>,
}

/// Reads and checks one line; `file` and `row` (from 1) only serve the error messages.
///
/// # Errors
/// [`SampleError`]: not JSON, a key of another type, an unknown role, roles out of order, an empty
/// answer, an image place outside a question, or more places than images.
pub fn parse_line(line: &str, file: &Path, row: usize) -> Result<Sample, SampleError> {
    let at = |key: String, found: String, expected| SampleError::Key {
        file: file.to_owned(),
        row,
        key,
        found,
        expected,
    };
    let parsed: Line = serde_json::from_str(line).map_err(|cause| SampleError::Json {
        file: file.to_owned(),
        row,
        cause,
    })?;
    let keys = keys_of(&parsed.unknown);
    let names_study = |key: &&String| {
        !STUDY_KEYS.contains(&key.as_str()) && !PATIENT_KEYS.contains(&key.as_str())
    };
    let mut unknown_keys: Vec<String> =
        parsed.unknown.keys().filter(names_study).cloned().collect();
    let images =
        image_paths(parsed.images).map_err(|(key, found, expected)| at(key, found, expected))?;

    let mut conversation = Conversation::default();
    for (index, message) in parsed.messages.into_iter().enumerate() {
        unknown_keys.extend(
            message
                .unknown
                .keys()
                .map(|key| format!("messages[{index}].{key}")),
        );
        let content = format!("messages[{index}].content");
        let Value::String(text) = message.content else {
            return Err(at(content, kind_of(&message.content).into(), "a text"));
        };
        let role = format!("messages[{index}].role");
        let answered = conversation.turns.last().is_none_or(|t| t.answer.is_some());
        if message.role != "user" && text.contains(IMAGE_TAG) {
            let expected = "`<image>` in messages of `user` only";
            return Err(at(content, "a text with `<image>`".into(), expected));
        }
        match message.role.as_str() {
            "system" if index == 0 => conversation.system = Some(text),
            "user" if answered => conversation.turns.push(Turn {
                question: split_tags(&text),
                answer: None,
            }),
            "assistant" if !answered => {
                if text.trim().is_empty() {
                    return Err(at(content, "empty".into(), "an answer to learn from"));
                }
                if let Some(turn) = conversation.turns.last_mut() {
                    turn.answer = Some(text);
                }
            }
            other => {
                let expected = "an optional `system`, then `user` and `assistant` by turns";
                return Err(at(role, format!("`{other}`"), expected));
            }
        }
    }
    if conversation.turns.is_empty() {
        let expected = "at least one message of `user`";
        return Err(at("messages".into(), "without a question".into(), expected));
    }
    let placeholders = conversation.image_count();
    if placeholders > images.len() {
        return Err(SampleError::Placeholders {
            file: file.to_owned(),
            row,
            placeholders,
            images: images.len(),
        });
    }
    conversation.place_images(images.len());
    Ok(Sample {
        conversation,
        images,
        keys,
        unknown_keys,
    })
}

type Mismatch = (String, String, &'static str);

/// Paths from `"a.png"`, `["a.png"]` or `[{"path": "a.png"}]`.
fn image_paths(images: Option<Value>) -> Result<Vec<String>, Mismatch> {
    let entries = match images {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(entries)) => entries,
        Some(path @ Value::String(_)) => vec![path],
        Some(other) => {
            let expected = "a list of paths";
            return Err(("images".into(), kind_of(&other).into(), expected));
        }
    };
    let path_of = |(index, entry): (usize, Value)| {
        let path = match &entry {
            Value::String(path) => Some(path),
            Value::Object(fields) => match fields.get("path") {
                Some(Value::String(path)) => Some(path),
                _ => None,
            },
            _ => None,
        };
        path.filter(|path| !path.is_empty()).cloned().ok_or((
            format!("images[{index}]"),
            kind_of(&entry).into(),
            "the path of an image file",
        ))
    };
    entries.into_iter().enumerate().map(path_of).collect()
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(text) if text.is_empty() => "an empty text",
        Value::String(_) => "a text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// A question's words and the places of its images, in order.
fn split_tags(text: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    for (index, words) in text.split(IMAGE_TAG).enumerate() {
        if index > 0 {
            parts.push(Part::Image);
        }
        if !words.is_empty() {
            parts.push(Part::Text {
                text: words.to_owned(),
            });
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Sample, SampleError> {
        parse_line(line, Path::new("train.jsonl"), 7)
    }

    fn words(text: &str) -> Part {
        Part::Text { text: text.into() }
    }

    #[test]
    fn a_line_of_swift_is_read() {
        let sample = parse(
            r#"{"messages":[{"role":"system","content":"s"},{"role":"user","content":"<image>图一<image>q"},
            {"role":"assistant","content":"a"}],"images":["a.png",{"path":"b.png"}],"objects":{}}"#,
        )
        .unwrap();
        assert_eq!(sample.images, ["a.png", "b.png"]);
        assert_eq!(sample.unknown_keys, ["objects"]);
        let conversation = &sample.conversation;
        assert_eq!(conversation.system.as_deref(), Some("s"));
        assert_eq!(
            conversation.turns[0].question,
            [Part::Image, words("图一"), Part::Image, words("q")]
        );
        assert_eq!(conversation.last_answer(), Some("a"));
        assert_eq!(conversation.messages().len(), 3);
        assert_eq!(conversation.prompt_messages().len(), 2);
    }

    #[test]
    fn images_without_a_place_go_to_the_front() {
        let sample = parse(
            r#"{"messages":[{"role":"user","content":"q<image>"},{"role":"assistant","content":"a"}],
            "images":["a.png","b.png"]}"#,
        )
        .unwrap();
        assert_eq!(
            sample.conversation.turns[0].question,
            [Part::Image, words("q"), Part::Image]
        );
        let alone = parse(r#"{"messages":[{"role":"user","content":"q"}],"images":"a.png"}"#);
        assert_eq!(alone.unwrap().conversation.image_count(), 1);
    }

    #[test]
    fn keys_of_a_message_are_reported_too() {
        let sample = parse(r#"{"messages":[{"role":"user","content":"q","loss":false}]}"#).unwrap();
        assert_eq!(sample.unknown_keys, ["messages[0].loss"]);
        assert_eq!(sample.conversation.last_answer(), None);
    }

    #[test]
    fn errors_name_file_row_and_key() {
        for (line, word) in [
            ("{", "not a sample"),
            ("{}", "messages"),
            (r#"{"messages":[]}"#, "`messages`"),
            (
                r#"{"messages":[{"role":"user","content":5}]}"#,
                "`messages[0].content` is a number",
            ),
            (
                r#"{"messages":[{"role":"tool","content":"x"}]}"#,
                "`messages[0].role` is `tool`",
            ),
            (
                r#"{"messages":[{"role":"assistant","content":"x"}]}"#,
                "`messages[0].role`",
            ),
            (
                r#"{"messages":[{"role":"user","content":"x"},{"role":"user","content":"y"}]}"#,
                "`messages[1].role`",
            ),
            (
                r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":" \n"}]}"#,
                "`messages[1].content` is empty",
            ),
            (
                r#"{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"<image>"}],"images":["a"]}"#,
                "`messages[1].content`",
            ),
            (
                r#"{"messages":[{"role":"user","content":"<image><image>"}],"images":["a"]}"#,
                "2 `<image>` placeholders but `images` holds 1",
            ),
            (
                r#"{"messages":[{"role":"user","content":"x"}],"images":[3]}"#,
                "`images[0]`",
            ),
            (
                r#"{"messages":[{"role":"user","content":"x"}],"images":3}"#,
                "`images` is a number",
            ),
        ] {
            let message = parse(line).unwrap_err().to_string();
            assert!(message.starts_with("`train.jsonl` row 7: "), "{message}");
            assert!(message.contains(word), "{message}");
        }
    }
}

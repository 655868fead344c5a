//! Predictions in the forms that tools write them, one JSON object a line.
//!
//! Known are this program's batch runs and generated reports of a training run, ms-swift's and LLaMA-Factory's
//! result files, and answers in the form of OpenAI's interface, as vLLM's batch runs write them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::base::text_file::{TextFileError, read_text};
use crate::processor::message::split_thinking;
use crate::study::keys_of;

/// Most bytes of a file of predictions.
const MAX_BYTES: u64 = 4 << 30;

/// Keys under which an answer is looked for, in this order.
pub const ANSWER_KEYS: [&str; 9] = [
    "report",
    "response",
    "generated",
    "generated_text",
    "prediction",
    "predict",
    "outputs",
    "choices",
    "text",
];

/// Keys under which a reference is looked for, in this order.
pub const REFERENCE_KEYS: [&str; 6] = [
    "reference",
    "truth",
    "labels",
    "label",
    "ground_truth",
    "target",
];

/// Why a file of predictions cannot be evaluated.
#[derive(Debug, thiserror::Error)]
pub enum PredictionsError {
    /// The file cannot be read.
    #[error("cannot read the predictions `{}`: {cause}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The file is no text.
    #[error(transparent)]
    Text(TextFileError),
    /// There is no row.
    #[error("`{}` holds no prediction; expected one JSON object a line", .0.display())]
    Empty(PathBuf),
    /// A line is not a JSON object.
    #[error("`{}` row {row}: not a JSON object ({reason}); expected one prediction a line", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Row, from 1.
        row: usize,
        /// What the parser said.
        reason: String,
    },
    /// A key is missing or of another type.
    #[error("`{}` row {row}: {what}; expected {expected}", .path.display())]
    Key {
        /// The file.
        path: PathBuf,
        /// Row, from 1.
        row: usize,
        /// What is there.
        what: String,
        /// What should be there.
        expected: String,
    },
}

/// Where to look in a row; the known keys when absent.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PredictionKeys {
    /// Key of the answer.
    pub answer: Option<String>,
    /// Key of the reference.
    pub reference: Option<String>,
}

/// One answer of a model.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Prediction {
    /// Row in the file, from 1.
    pub row: usize,
    /// Keys with a short text or a number, as text: a study may be named by one.
    pub keys: BTreeMap<String, String>,
    /// Images as the row names them.
    pub images: Vec<String>,
    /// What is meant for the reader; empty where the model failed or wrote nothing ([`is_no_answer`]).
    pub answer: String,
    /// The reasoning before it.
    pub thinking: Option<String>,
    /// What the data set says, where the row holds it; without reasoning.
    pub reference: Option<String>,
    /// Why there is no answer.
    pub error: Option<String>,
}

impl Prediction {
    /// What the row is called: its images, else its place.
    pub fn name(&self) -> String {
        if self.images.is_empty() {
            format!("row {}", self.row)
        } else {
            self.images.join(";")
        }
    }
}

/// Whether a text is none: nothing but white space and marks, or what programs write for a missing value.
pub fn is_no_answer(text: &str) -> bool {
    const NONE: [&str; 7] = ["null", "none", "nan", "n/a", "nil", "undefined", "<empty>"];
    let text = text.trim().trim_matches(['"', '\'']);
    let nothing = !text.chars().any(char::is_alphanumeric);
    nothing || NONE.iter().any(|none| none.eq_ignore_ascii_case(text))
}

/// Reads a file of predictions; blank lines are passed over.
///
/// # Errors
/// [`PredictionsError`] names the file, the row and the key.
pub fn read_predictions(
    path: &Path,
    keys: &PredictionKeys,
) -> Result<Vec<Prediction>, PredictionsError> {
    let text = read_text(path, MAX_BYTES).map_err(|error| match error {
        TextFileError::Read { path, cause } => PredictionsError::Read { path, cause },
        error => PredictionsError::Text(error),
    })?;
    let text = text.text;
    let predictions: Vec<Prediction> = text
        .lines()
        .enumerate()
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            let row = index + 1;
            let reason = |reason: String| PredictionsError::Json {
                path: path.to_owned(),
                row,
                reason,
            };
            match serde_json::from_str(line) {
                Ok(Value::Object(fields)) => PredictionRow {
                    path,
                    row,
                    fields: &fields,
                }
                .read(keys),
                Ok(_) => Err(reason("another kind of value".into())),
                Err(cause) => Err(reason(cause.to_string())),
            }
        })
        .collect::<Result<_, _>>()?;
    if predictions.is_empty() {
        return Err(PredictionsError::Empty(path.to_owned()));
    }
    Ok(predictions)
}

/// A row of the file, with what an error says of it.
struct PredictionRow<'a> {
    path: &'a Path,
    row: usize,
    fields: &'a Map<String, Value>,
}

impl PredictionRow<'_> {
    fn read(&self, keys: &PredictionKeys) -> Result<Prediction, PredictionsError> {
        let error = match self.fields.get("error") {
            None | Some(Value::Null) => None,
            Some(Value::String(text)) => Some(text.clone()),
            Some(other) => Some(other.to_string()),
        };
        let written = self.answer(keys, error.is_some())?;
        let (thinking, mut answer) = split_thinking(&written, false);
        if is_no_answer(&answer) {
            answer.clear();
        }
        let fields = self.fields;
        let thinking = match fields.get("thinking").or_else(|| fields.get("reasoning")) {
            Some(Value::String(text)) if !text.trim().is_empty() => Some(text.clone()),
            _ => thinking,
        };
        Ok(Prediction {
            row: self.row,
            keys: keys_of(fields),
            images: images(fields),
            answer,
            thinking,
            reference: self.reference(keys)?,
            error,
        })
    }

    /// The answer as it was written; empty where there is none for a reason.
    fn answer(&self, keys: &PredictionKeys, failed: bool) -> Result<String, PredictionsError> {
        let found = match &keys.answer {
            Some(key) => self.fields.get_key_value(key),
            None => self.first_of(&ANSWER_KEYS),
        };
        match found {
            Some((_, value)) if is_nothing(value) => Ok(String::new()),
            Some((key, value)) => match answer_text(value) {
                Some(text) => Ok(text),
                None if failed => Ok(String::new()),
                None => Err(self.wrong(
                    format!("`{key}` holds no text"),
                    "the answer as a text, or as `choices` with a message".into(),
                )),
            },
            None if failed => Ok(String::new()),
            None => {
                let expected = keys.answer.as_ref().map_or_else(
                    || {
                        format!(
                            "the answer under one of {}; hint: name its key",
                            listed(&ANSWER_KEYS)
                        )
                    },
                    |key| format!("the answer under `{key}`"),
                );
                Err(self.wrong(format!("no answer among {}", names(self.fields)), expected))
            }
        }
    }

    /// The true report; `None` where the row holds none and no key was named for it.
    fn reference(&self, keys: &PredictionKeys) -> Result<Option<String>, PredictionsError> {
        let found = match &keys.reference {
            Some(key) => Some(self.fields.get_key_value(key).ok_or_else(|| {
                self.wrong(
                    format!("no `{key}` among {}", names(self.fields)),
                    "the true report under it".into(),
                )
            })?),
            None => self.first_of(&REFERENCE_KEYS),
        };
        match found {
            None | Some((_, Value::Null)) => Ok(None),
            Some((_, Value::String(text))) => Ok(Some(split_thinking(text, false).1)),
            Some((key, _)) => {
                Err(self.wrong(format!("`{key}` is not a text"), "the true report".into()))
            }
        }
    }

    fn first_of(&self, keys: &[&str]) -> Option<(&String, &Value)> {
        keys.iter().find_map(|key| self.fields.get_key_value(*key))
    }

    fn wrong(&self, what: String, expected: String) -> PredictionsError {
        PredictionsError::Key {
            path: self.path.to_owned(),
            row: self.row,
            what,
            expected,
        }
    }
}

/// Whether a value means no answer at all: null, an empty list, or a list or message of such.
fn is_nothing(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Array(list) => list.first().is_none_or(is_nothing),
        Value::Object(fields) => ["body", "choices", "message", "content", "text"]
            .iter()
            .find_map(|key| fields.get(*key))
            .is_some_and(is_nothing),
        _ => false,
    }
}

/// The text of an answer: itself, or the first one of a list of outputs or choices, or of a response's body.
fn answer_text(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => answer_text(list.first()?),
        Value::Object(fields) => ["body", "choices", "message", "content", "text"]
            .iter()
            .find_map(|key| answer_text(fields.get(*key)?)),
        _ => None,
    }
}

/// The images that a row names, whatever the key.
pub(super) fn images(fields: &Map<String, Value>) -> Vec<String> {
    let one = |value: &Value| match value {
        Value::String(path) => Some(path.clone()),
        Value::Object(fields) => ["path", "url", "image"]
            .iter()
            .find_map(|key| fields.get(*key)?.as_str().map(str::to_owned)),
        _ => None,
    };
    let named = ["images", "image", "img", "image_id"]
        .iter()
        .find_map(|key| fields.get(*key));
    let all = match named {
        Some(Value::Array(list)) => list.iter().filter_map(one).collect(),
        // Batch runs separate the views of a study by `;`.
        Some(Value::String(paths)) => paths.split(';').map(str::to_owned).collect(),
        Some(other) => one(other).into_iter().collect(),
        None => Vec::new(),
    };
    // An image inside the row has no name.
    all.into_iter()
        .filter(|path| !path.is_empty() && !path.starts_with("data:"))
        .collect()
}

fn listed(keys: &[&str]) -> String {
    let keys: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
    keys.join(", ")
}

fn names(fields: &Map<String, Value>) -> String {
    let keys: Vec<&str> = fields.keys().map(String::as_str).collect();
    if keys.is_empty() {
        "no keys".into()
    } else {
        listed(&keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: &str, keys: &PredictionKeys) -> Result<Prediction, PredictionsError> {
        let Ok(Value::Object(fields)) = serde_json::from_str(line) else {
            panic!("not an object: {line}");
        };
        PredictionRow {
            path: Path::new("p.jsonl"),
            row: 3,
            fields: &fields,
        }
        .read(keys)
    }

    #[test]
    fn every_form_gives_the_same_answer() {
        for line in [
            r#"{"image":"a/7_1.png","report":"心影增大。","thinking":"想","truth":"正常。"}"#,
            r#"{"response":"<think>\n想\n</think>\n\n心影增大。","labels":"正常。","images":[{"bytes":null,"path":"a/7_1.png"}]}"#,
            r#"{"prompt":"?","predict":"<think>想</think>心影增大。","label":"正常。","image":"a/7_1.png"}"#,
            r#"{"response":{"status_code":200,"body":{"choices":[{"message":{"role":"assistant","content":"<think>想</think>心影增大。"}}]}},"reference":"正常。","images":["a/7_1.png"]}"#,
            r#"{"generated":"<think>想</think>心影增大。","target":"<think>x</think>正常。","img":"a/7_1.png","error":null}"#,
        ] {
            let read = read(line, &PredictionKeys::default()).unwrap();
            let expected = Prediction {
                row: 3,
                keys: read.keys.clone(),
                images: vec!["a/7_1.png".into()],
                answer: "心影增大。".into(),
                thinking: Some("想".into()),
                reference: Some("正常。".into()),
                error: None,
            };
            assert_eq!(read, expected, "{line}");
            assert_eq!(read.name(), "a/7_1.png");
        }
    }

    #[test]
    fn named_keys_count_and_failures_are_empty_answers() {
        let keys = PredictionKeys {
            answer: Some("out".into()),
            reference: Some("gold".into()),
        };
        let line = r#"{"out":"甲","report":"乙","gold":"丙","uid":12}"#;
        let found = read(line, &keys).unwrap();
        assert_eq!(
            (found.answer.as_str(), found.keys["uid"].as_str()),
            ("甲", "12")
        );
        assert_eq!(found.reference.as_deref(), Some("丙"));
        let failed = r#"{"image":"x.png","report":"","error":"out of memory"}"#;
        let failed = read(failed, &PredictionKeys::default()).unwrap();
        assert_eq!((failed.answer.as_str(), failed.reference), ("", None));
        assert_eq!(failed.error.as_deref(), Some("out of memory"));
    }

    #[test]
    fn what_is_missing_is_named() {
        let keys = PredictionKeys::default();
        let error = read(r#"{"image":"x.png"}"#, &keys).unwrap_err().to_string();
        assert!(
            error.contains("`p.jsonl` row 3") && error.contains("`image`"),
            "{error}"
        );
        assert!(error.contains("`report`"), "{error}");
        let error = read(r#"{"report":5}"#, &keys).unwrap_err().to_string();
        assert!(error.contains("`report` holds no text"), "{error}");
        let error = read(r#"{"report":"a","label":3}"#, &keys)
            .unwrap_err()
            .to_string();
        assert!(error.contains("`label` is not a text"), "{error}");
    }

    #[test]
    fn an_answer_that_says_nothing_is_empty() {
        for written in [
            r#"null"#,
            r#""""#,
            r#"" \n\t ""#,
            r#""null""#,
            r#""None""#,
            r#""NaN""#,
            r#""N/A""#,
            r#""。""#,
            r#"[]"#,
            r#"[""]"#,
            r#"[null]"#,
            r#"{"choices":[{"message":{"content":null}}]}"#,
            r#""<think>想</think>""#,
            r#""\"null\"""#,
        ] {
            let line = format!(r#"{{"image":"1.png","report":{written},"reference":"正常。"}}"#);
            let read = read(&line, &PredictionKeys::default()).unwrap();
            assert_eq!(read.answer, "", "{written}");
        }
        for text in ["正常。", "none seen", "0"] {
            assert!(!is_no_answer(text), "{text}");
        }
    }
}

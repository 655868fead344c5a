//! Distilled reasoning: a file of texts by image.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::corpora::text_of;
use super::corpus::stem_of;
use super::error::ConvertError;

/// Reasoning about one image, and the answer that follows from it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Distilled {
    thinking: String,
    answer: Option<String>,
}

/// Reasoning by image id.
#[derive(Debug, Default)]
pub(super) struct Thinking {
    by_id: BTreeMap<String, Distilled>,
    used: BTreeSet<String>,
}

impl Thinking {
    /// Reads `{"ID": "text"}`, `{"ID": {"thinking": …, "answer": …}}`, or rows of `image_id`,
    /// `thinking` and perhaps `answer`, as a list or one a line.
    pub(super) fn read(path: &Path) -> Result<Self, ConvertError> {
        let text = text_of(path)?;
        let text = text.as_str();
        let mut found = Self::default();
        match serde_json::from_str(text) {
            Ok(Value::Object(fields)) if fields.contains_key("image_id") => {
                found.add_row(path, 1, &fields)?;
            }
            Ok(Value::Object(fields)) => {
                for (index, (id, value)) in fields.iter().enumerate() {
                    match value {
                        Value::Object(fields) => found.add(path, index + 1, id, fields)?,
                        other => {
                            let mut fields = Map::new();
                            fields.insert("thinking".into(), other.clone());
                            found.add(path, index + 1, id, &fields)?;
                        }
                    }
                }
            }
            Ok(Value::Array(rows)) => {
                for (index, row) in rows.iter().enumerate() {
                    found.add_value(path, index + 1, row)?;
                }
            }
            Ok(_) => return Err(wrong(path, 1, "the file", "rows with `image_id`")),
            Err(whole) => {
                let lines = text.lines().enumerate();
                for (index, line) in lines.filter(|(_, line)| !line.trim().is_empty()) {
                    // Of a file that is one broken object, the error of the whole is reported.
                    let row = serde_json::from_str(line).map_err(|cause| ConvertError::Json {
                        path: path.to_owned(),
                        row: index + 1,
                        reason: if index == 0 { &whole } else { &cause }.to_string(),
                    })?;
                    found.add_value(path, index + 1, &row)?;
                }
            }
        }
        Ok(found)
    }

    fn add_value(&mut self, path: &Path, row: usize, value: &Value) -> Result<(), ConvertError> {
        match value {
            Value::Object(fields) => self.add_row(path, row, fields),
            _ => Err(wrong(path, row, "the row", "an object with `image_id`")),
        }
    }

    fn add_row(
        &mut self,
        path: &Path,
        row: usize,
        fields: &Map<String, Value>,
    ) -> Result<(), ConvertError> {
        match fields.get("image_id") {
            Some(Value::String(id)) if !id.is_empty() => self.add(path, row, id, fields),
            _ => Err(wrong(path, row, "`image_id`", "the id of an image")),
        }
    }

    fn add(
        &mut self,
        path: &Path,
        row: usize,
        id: &str,
        fields: &Map<String, Value>,
    ) -> Result<(), ConvertError> {
        let text = |key: &str| match fields.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) if text.contains("<think>") || text.contains("</think>") => {
                let expected = "a text without `<think>` and `</think>`, which are added";
                Err(wrong(path, row, &format!("`{key}`"), expected))
            }
            Some(Value::String(text)) if !text.trim().is_empty() => Ok(Some(text.clone())),
            Some(_) => Err(wrong(path, row, &format!("`{key}`"), "a text")),
        };
        let Some(thinking) = text("thinking")? else {
            return Err(wrong(path, row, "`thinking`", "the reasoning"));
        };
        let distilled = Distilled {
            thinking,
            answer: text("answer")?,
        };
        match self.by_id.insert(stem_of(id).to_owned(), distilled) {
            None => Ok(()),
            Some(_) => Err(wrong(
                path,
                row,
                &format!("image `{id}`"),
                "each image once",
            )),
        }
    }

    /// The answer with its reasoning, as a Thinking model is to write it; `None` without a text
    /// for this image.
    pub(super) fn answer(&mut self, id: &str, report: &str) -> Option<String> {
        let Distilled { thinking, answer } = self.by_id.get(id)?;
        self.used.insert(id.to_owned());
        let answer = answer.as_deref().unwrap_or(report);
        Some(format!(
            "<think>\n{}\n</think>\n\n{}",
            thinking.trim(),
            answer.trim()
        ))
    }

    /// Images with a text that no row was about, sorted.
    pub(super) fn unused(&self) -> Vec<String> {
        let unused = self.by_id.keys().filter(|id| !self.used.contains(*id));
        unused.cloned().collect()
    }
}

fn wrong(path: &Path, row: usize, what: &str, expected: &str) -> ConvertError {
    ConvertError::Form {
        path: PathBuf::from(path),
        row,
        what: what.to_owned(),
        expected: expected.to_owned(),
    }
}

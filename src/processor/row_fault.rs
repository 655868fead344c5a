//! What can be wrong with a row of a training file.

use std::path::PathBuf;

use serde_json::Value;

use crate::study::counted;

/// Why a line is no sample; the message names the file and the row.
#[derive(Debug, thiserror::Error)]
#[error("`{}` row {row}: {fault}", .file.display())]
pub struct SampleError {
    /// File the line is from.
    pub file: PathBuf,
    /// Row in the file, from 1.
    pub row: usize,
    /// What is wrong.
    pub fault: RowFault,
}

/// What is wrong with a row.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RowFault {
    /// The line is not JSON.
    #[error("not JSON: {0}")]
    Json(String),
    /// The row of a table cannot be read.
    #[error("{0}")]
    Table(String),
    /// The row is in another form.
    #[error("found {found}; expected {expected}; hint: {hint}")]
    Form {
        /// What is there.
        found: String,
        /// The line that would be right.
        expected: String,
        /// How to bring it into the form that is read.
        hint: String,
    },
    /// A value under a key is of another form.
    #[error("`{key}` is {found}; expected {expected}")]
    Key {
        /// Path of the key inside the line.
        key: String,
        /// What is there.
        found: String,
        /// What should be there.
        expected: String,
    },
    /// An answer is empty.
    #[error("`{key}` is empty; expected an answer to learn from")]
    EmptyAnswer {
        /// Path of the key inside the line.
        key: String,
    },
    /// A key would change what is learnt, and is not supported.
    #[error("the key `{key}` is not supported: {cure}")]
    Refused {
        /// Path of the key inside the line.
        key: String,
        /// What to do.
        cure: &'static str,
    },
    /// A key that looks like one that is read.
    #[error(
        "the key `{key}` is not known; hint: is `{nearest}` meant? If not, begin its name with `_`, and it is passed over"
    )]
    Slip {
        /// Path of the key inside the line.
        key: String,
        /// The key that is read.
        nearest: &'static str,
    },
    /// A tag where it has no meaning.
    #[error(
        "`{key}` holds `{tag}`; {expected}; hint: a backslash before a tag makes it plain words, in JSON `\\\\{tag}`"
    )]
    Tag {
        /// Path of the key inside the line.
        key: String,
        /// The tag as it is written.
        tag: String,
        /// What should be there.
        expected: &'static str,
    },
    /// The row's own pixel limits cannot be used.
    #[error("`chat_template_kwargs`: {0}")]
    Limits(String),
    /// More image places than images.
    #[error(
        "the text has {} but `images` holds {images}; expected no more placeholders than images",
        counted(*.placeholders, "`<image>` placeholder", "`<image>` placeholders")
    )]
    Placeholders {
        /// Number of `<image>` in the questions.
        placeholders: usize,
        /// Number of images.
        images: usize,
    },
}

impl RowFault {
    pub(crate) fn key(
        key: impl Into<String>,
        found: impl Into<String>,
        expected: impl Into<String>,
    ) -> Self {
        Self::Key {
            key: key.into(),
            found: found.into(),
            expected: expected.into(),
        }
    }
}

/// A value in a message: short ones as they are, others by their kind.
pub(super) fn shown(value: &Value) -> String {
    match value {
        Value::Bool(_) | Value::Number(_) => format!("`{value}`"),
        Value::String(text) if !text.is_empty() && text.chars().count() <= 40 => {
            format!("the text `{text}`")
        }
        other => kind_of(other).to_owned(),
    }
}

/// The kind of a JSON value.
pub(super) fn kind_of(value: &Value) -> &'static str {
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

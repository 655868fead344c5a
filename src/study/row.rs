//! What one row of a data file says about its study.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

/// Keys under which a row may name its study, in this order.
pub const STUDY_KEYS: [&str; 3] = ["study", "study_id", "uid"];

/// Keys under which a row may name its patient, in this order.
pub const PATIENT_KEYS: [&str; 3] = ["patient", "patient_id", "subject_id"];

/// What a row says about its study.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct StudyRow {
    /// What the row is called in an error.
    pub name: String,
    /// Its keys with a short text or a number, as text: [`keys_of`].
    pub keys: BTreeMap<String, String>,
    /// Paths of its images as the row names them.
    pub images: Vec<String>,
    /// Folder that the paths are relative to; empty if unknown.
    pub folder: String,
}

/// The keys of a row that may name its study: those with a number or a text that is no report, as text.
pub fn keys_of(row: &Map<String, Value>) -> BTreeMap<String, String> {
    const LONGEST: usize = 256;
    let texts = row.iter().filter_map(|(key, value)| {
        let text = match value {
            Value::String(text) if text.len() <= LONGEST && !text.trim().is_empty() => {
                text.trim().to_owned()
            }
            Value::Number(number) => number.to_string(),
            _ => return None,
        };
        Some((key.clone(), text))
    });
    texts.collect()
}

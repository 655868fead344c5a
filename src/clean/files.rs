//! Corpus files in and out: rows, corrected copies, diffs.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;
use serde_json::Value;

use super::{CleanError, Correction, Row};

/// The changes as a unified diff: one hunk a row, line numbers being row numbers from 1.
pub fn unified_diff(corrections: &[Correction]) -> String {
    let mut diff = String::new();
    let mut file = None;
    for correction in corrections {
        if file != Some(&correction.file) {
            file = Some(&correction.file);
            // Writing to a string cannot fail.
            let _ = write!(diff, "--- {0}\n+++ {0} (corrected)\n", correction.file);
        }
        let line = correction.row + 1;
        let _ = writeln!(diff, "@@ -{line} +{line} @@ {}", correction.id);
        let _ = write!(diff, "-{}\n+{}\n", correction.before, correction.after);
    }
    diff
}

/// Defects or corrections as one JSON object a line.
pub fn to_jsonl<T: Serialize>(items: &[T]) -> Result<String, serde_json::Error> {
    items
        .iter()
        .map(|item| serde_json::to_string(item).map(|line| line + "\n"))
        .collect()
}

/// Reads the rows of a corpus file of schema A (`annotations`) or B (a list with `img` and `label`).
///
/// `sources` gives the English text by picture id, if known.
///
/// # Errors
/// [`CleanError::Json`] and [`CleanError::Schema`].
pub fn read_rows(
    file: &str,
    json: &str,
    sources: &BTreeMap<String, String>,
) -> Result<Vec<Row>, CleanError> {
    let mut value = parse(file, json)?;
    let (rows, id_key, text_key) = row_list(&mut value).ok_or_else(|| CleanError::Schema {
        file: file.to_owned(),
        row: 0,
    })?;
    let mut read = Vec::with_capacity(rows.len());
    for (number, row) in rows.iter().enumerate() {
        let field = |key: &str| row.get(key).and_then(Value::as_str);
        let (Some(id), Some(text)) = (field(id_key), field(text_key)) else {
            return Err(CleanError::Schema {
                file: file.to_owned(),
                row: number,
            });
        };
        let name = id.rsplit(['/', '\\']).next().unwrap_or(id);
        let id = name
            .rsplit_once('.')
            .map_or(name, |(stem, _)| stem)
            .to_owned();
        let source = sources.get(&id).cloned();
        read.push(Row {
            file: file.to_owned(),
            row: number,
            id,
            text: text.to_owned(),
            source,
        });
    }
    Ok(read)
}

/// A copy of the corpus file `json` with `corrections` made, in the same schema and key order.
///
/// # Errors
/// [`CleanError::Json`], [`CleanError::Schema`], and [`CleanError::TextChanged`] if a row is not the one corrected.
pub fn correct_json(
    file: &str,
    json: &str,
    corrections: &[Correction],
) -> Result<String, CleanError> {
    let mut value = parse(file, json)?;
    let (rows, _, text_key) = row_list(&mut value).ok_or_else(|| CleanError::Schema {
        file: file.to_owned(),
        row: 0,
    })?;
    for correction in corrections
        .iter()
        .filter(|correction| correction.file == file)
    {
        let place = rows
            .get_mut(correction.row)
            .and_then(|row| row.get_mut(text_key));
        let text = place.ok_or_else(|| CleanError::Schema {
            file: file.to_owned(),
            row: correction.row,
        })?;
        if text.as_str() != Some(&correction.before) {
            return Err(CleanError::TextChanged {
                file: file.to_owned(),
                row: correction.row,
                start: 0,
                expected: correction.before.clone(),
            });
        }
        *text = Value::String(correction.after.clone());
    }
    serde_json::to_string_pretty(&value).map_err(|cause| CleanError::Json {
        file: file.to_owned(),
        cause,
    })
}

fn parse(file: &str, json: &str) -> Result<Value, CleanError> {
    serde_json::from_str(json).map_err(|cause| CleanError::Json {
        file: file.to_owned(),
        cause,
    })
}

/// The rows of a corpus file with the keys of id and text.
fn row_list(value: &mut Value) -> Option<(&mut Vec<Value>, &'static str, &'static str)> {
    match value {
        Value::Array(rows) => Some((rows, "img", "label")),
        Value::Object(map) => Some((
            map.get_mut("annotations")?.as_array_mut()?,
            "image_id",
            "caption",
        )),
        _ => None,
    }
}

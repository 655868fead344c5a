//! Corpus files in and out: rows, corrected copies, diffs.

use std::{collections::BTreeMap, fmt::Write as _};

use serde::Serialize;
use serde_json::Value;

use super::{
    defects::{CorpusReport, Correction},
    error::CleanError,
};

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

/// Reads the rows of a corpus file: schema A (`annotations`), schema B (a list with `img` and `label`), or rows of
/// `messages` in ms-swift's form, as a list or one a line, whose last answer is the report.
///
/// `sources` gives the English text by image id, if known.
///
/// # Errors
/// [`CleanError::Json`] and [`CleanError::Schema`].
pub fn read_rows(
    file: &str,
    text: &str,
    sources: &BTreeMap<String, String>,
) -> Result<Vec<CorpusReport>, CleanError> {
    let mut corpus = Corpus::parse(file, text)?;
    let mut read = Vec::new();
    for (number, row) in corpus.rows() {
        let id = corpus_id(row);
        let Some(text) = report_of(row).and_then(|text| text.as_str()) else {
            return Err(schema(file, number));
        };
        let Some(id) = id else {
            return Err(schema(file, number));
        };
        read.push(CorpusReport {
            file: file.to_owned(),
            row: number,
            source: sources.get(&id).cloned(),
            id,
            text: text.to_owned(),
        });
    }
    Ok(read)
}

/// A copy of the corpus file `text` with `corrections` made, in the same schema and key order; in files of one row
/// a line, all other lines stay as they are.
///
/// # Errors
/// [`CleanError::Json`], [`CleanError::Schema`], and [`CleanError::TextChanged`] if a row is not the one corrected.
pub fn correct_json(
    file: &str,
    text: &str,
    corrections: &[Correction],
) -> Result<String, CleanError> {
    let mut corpus = Corpus::parse(file, text)?;
    let mut wanted: BTreeMap<usize, &Correction> = corrections
        .iter()
        .filter(|correction| correction.file == file)
        .map(|correction| (correction.row, correction))
        .collect();
    let mut changed = Vec::new();
    for (number, row) in corpus.rows() {
        let Some(correction) = wanted.remove(&number) else {
            continue;
        };
        let text = report_of(row).ok_or_else(|| schema(file, number))?;
        if text.as_str() != Some(&correction.before) {
            return Err(CleanError::TextChanged {
                file: file.to_owned(),
                row: number,
                start: 0,
                expected: correction.before.clone(),
            });
        }
        *text = Value::String(correction.after.clone());
        changed.push(number);
    }
    if let Some(row) = wanted.keys().next() {
        return Err(CleanError::NoSuchRow {
            file: file.to_owned(),
            row: *row,
        });
    }
    corpus.write(file, text, &changed)
}

/// A corpus file as JSON.
enum Corpus {
    /// One value.
    Whole(Value),
    /// One row a line, with the number of its line from 0.
    Lines(Vec<(usize, Value)>),
}

impl Corpus {
    fn parse(file: &str, text: &str) -> Result<Self, CleanError> {
        let failed = |cause| CleanError::Json {
            file: file.to_owned(),
            cause,
        };
        let is_lines = |text: &str| {
            let first = text.lines().find(|line| !line.trim().is_empty());
            let first = first.and_then(|line| serde_json::from_str::<Value>(line).ok());
            first.is_some_and(|row| row.get("messages").is_some())
        };
        if !is_lines(text) {
            let value: Value = serde_json::from_str(text).map_err(failed)?;
            let known = value.is_array() || value.get("annotations").is_some_and(Value::is_array);
            return if known {
                Ok(Self::Whole(value))
            } else {
                Err(schema(file, 0))
            };
        }
        let lines = text.lines().enumerate();
        let rows = lines
            .filter(|(_, line)| !line.trim().is_empty())
            .map(|(number, line)| {
                let row = serde_json::from_str(line).map_err(|cause| CleanError::Line {
                    file: file.to_owned(),
                    row: number,
                    cause,
                })?;
                Ok((number, row))
            });
        Ok(Self::Lines(rows.collect::<Result<_, CleanError>>()?))
    }

    /// The rows with their numbers, from 0.
    fn rows(&mut self) -> Vec<(usize, &mut Value)> {
        match self {
            Self::Whole(Value::Array(rows)) => rows.iter_mut().enumerate().collect(),
            Self::Whole(value) => {
                let rows = value.get_mut("annotations").and_then(Value::as_array_mut);
                rows.into_iter().flatten().enumerate().collect()
            }
            Self::Lines(rows) => rows.iter_mut().map(|(n, row)| (*n, row)).collect(),
        }
    }

    fn write(self, file: &str, text: &str, changed: &[usize]) -> Result<String, CleanError> {
        let failed = |cause| CleanError::Json {
            file: file.to_owned(),
            cause,
        };
        let rows = match self {
            Self::Whole(value) => return serde_json::to_string_pretty(&value).map_err(failed),
            Self::Lines(rows) => rows,
        };
        let mut written: BTreeMap<usize, String> = BTreeMap::new();
        for (number, row) in rows.iter().filter(|(number, _)| changed.contains(number)) {
            written.insert(*number, serde_json::to_string(row).map_err(failed)?);
        }
        let mut copy = String::with_capacity(text.len());
        for (number, line) in text.split_inclusive('\n').enumerate() {
            match written.get(&number) {
                Some(row) => {
                    copy.push_str(row);
                    copy.push_str(&line[line.trim_end_matches(['\r', '\n']).len()..]);
                }
                None => copy.push_str(line),
            }
        }
        Ok(copy)
    }
}

fn schema(file: &str, row: usize) -> CleanError {
    CleanError::Schema {
        file: file.to_owned(),
        row,
    }
}

/// Name of a row's image without folder and ending; empty for a conversation without image.
fn corpus_id(row: &Value) -> Option<String> {
    let named = match (
        row.get("img").or_else(|| row.get("image_id")),
        row.get("images"),
    ) {
        (Some(name), _) => name.as_str()?,
        (None, Some(Value::Array(images))) => match images.first() {
            Some(Value::Object(image)) => image.get("path").and_then(Value::as_str)?,
            Some(image) => image.as_str()?,
            None => "",
        },
        (None, Some(Value::String(image))) => image,
        (None, _) if row.get("messages").is_some() => "",
        _ => return None,
    };
    let name = named.rsplit(['/', '\\']).next().unwrap_or(named);
    let stem = name.rsplit_once('.').map_or(name, |(stem, _)| stem);
    Some(stem.to_owned())
}

/// Where a row keeps its report.
fn report_of(row: &mut Value) -> Option<&mut Value> {
    if row.get("messages").is_none() {
        let key = if row.get("img").is_some() {
            "label"
        } else {
            "caption"
        };
        return row.get_mut(key);
    }
    let last = row.get_mut("messages")?.as_array_mut()?.last_mut()?;
    if last.get("role").and_then(Value::as_str) == Some("assistant") {
        last.get_mut("content")
    } else {
        None
    }
}

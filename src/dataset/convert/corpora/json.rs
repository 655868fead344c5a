//! Corpora in JSON: lists, lists under keys, and one row a line.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::{Map, Value};

use super::super::corpus::{CorpusRow, message_row};
use super::super::error::ConvertError;
use super::super::form::{CorpusForm, CorpusKeys};
use super::super::selection::Part;
use super::named::{KeyNames, are_known, record};
use super::record::Records;
use super::table::text_of;
use crate::dataset::image_store::ImageStore;
use crate::processor::strict_json;

/// What a JSON file holds.
pub(super) enum JsonCorpus {
    /// Rows of `messages`.
    Messages(Vec<CorpusRow>),
    /// Rows with a report.
    Records(CorpusForm, Records),
}

/// Rows with their numbers and parts.
type NumberedRows = Vec<(usize, Option<Part>, Value)>;

/// Reads a JSON corpus, in the form that is wanted or in the one it has.
pub(super) fn read(
    path: &Path,
    keys: Option<&CorpusKeys>,
    wanted: Option<CorpusForm>,
    store: &ImageStore,
) -> Result<JsonCorpus, ConvertError> {
    let text = text_of(path)?;
    let file: Arc<Path> = path.into();
    let (shape, rows) = match strict_json::parse(&text) {
        Ok(Value::Object(fields)) => lists_of(fields),
        Ok(Value::Array(rows)) => (Shape::Lines, numbered(rows)),
        Ok(_) => return Err(unknown(path)),
        Err(reason) => (Shape::Lines, lines(path, &text, reason)?),
    };
    let first = rows.first().and_then(|(_, _, row)| row.as_object());
    let has = |key: &str| first.is_some_and(|row| row.contains_key(key));
    let form = if keys.is_some() {
        CorpusForm::Keys
    } else if let Some(wanted) = wanted {
        wanted
    } else if has("messages") {
        CorpusForm::Messages
    } else if has("image_id") && has("caption") && shape == Shape::Annotations {
        CorpusForm::Annotations
    } else if has("img") && has("label") {
        CorpusForm::Prompts
    } else if shape == Shape::Parts && first.is_some_and(|row| are_known(row.keys())) {
        CorpusForm::R2gen
    } else if first.is_some_and(|row| are_known(row.keys())) {
        CorpusForm::Rows
    } else if rows.is_empty() {
        return if shape == Shape::Annotations {
            Err(ConvertError::Empty(path.to_owned()))
        } else {
            Err(unknown(path))
        };
    } else if shape == Shape::Annotations {
        CorpusForm::Annotations
    } else if first.is_some() && shape == Shape::Lines && text.trim_start().starts_with('{') {
        // The rows of other programs have errors that say what to do.
        CorpusForm::Messages
    } else {
        return Err(unknown(path));
    };
    if form == CorpusForm::Messages {
        let rows = rows.iter();
        let rows = rows.map(|(number, _, row)| message_row(&file, *number, &row.to_string()));
        return Ok(JsonCorpus::Messages(rows.collect::<Result<_, _>>()?));
    }
    let names = match (form, keys) {
        (CorpusForm::Keys, Some(keys)) => KeyNames::Given {
            image: &keys.image,
            report: &keys.report,
        },
        (CorpusForm::Annotations, _) => KeyNames::Given {
            image: "image_id",
            report: "caption",
        },
        (CorpusForm::Prompts, _) => KeyNames::Given {
            image: "img",
            report: "label",
        },
        _ => KeyNames::Known,
    };
    let mut found = Records {
        files: vec![file.clone()],
        ..Records::default()
    };
    for (number, part, row) in &rows {
        let record = record(&file, *number, row, names, *part, form, store)?;
        found.records.push(record);
    }
    if form == CorpusForm::R2gen {
        found.study_rule = Some("the ids of R2Gen, `CXRn_…`, or `study_id` and `subject_id`");
        if found.records.iter().any(|record| record.study.is_none()) {
            found.study_rule = None;
        }
    }
    Ok(JsonCorpus::Records(form, found))
}

/// How the rows of a file are arranged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// One a line, or one list.
    Lines,
    /// Under `annotations`.
    Annotations,
    /// Under `train`, `val`, `test`.
    Parts,
    /// Under another key.
    Other,
}

fn numbered(rows: Vec<Value>) -> NumberedRows {
    let rows = rows.into_iter().enumerate();
    rows.map(|(at, row)| (at + 1, None, row)).collect()
}

/// The rows of one object: lists under its keys, or itself.
fn lists_of(mut fields: Map<String, Value>) -> (Shape, NumberedRows) {
    let is_row = fields.contains_key("messages") || are_known(fields.keys());
    if let Some(Value::Array(_)) = fields.get("annotations") {
        let Some(Value::Array(mut rows)) = fields.shift_remove("annotations") else {
            return (Shape::Annotations, Vec::new());
        };
        if let Some(Value::Array(images)) = fields.get("images") {
            name_images(&mut rows, images);
        }
        return (Shape::Annotations, numbered(rows));
    }
    // A list of texts is a part of a row.
    let holds_rows = |value: &Value| {
        let rows = value.as_array();
        rows.is_some_and(|rows| rows.iter().all(Value::is_object) && !rows.is_empty())
    };
    let lists = || fields.iter().filter(|(_, value)| holds_rows(value));
    let parts = lists().filter(|(key, _)| Part::of(key).is_some()).count();
    if parts == 0 && (is_row || lists().next().is_none()) {
        return (Shape::Lines, vec![(1, None, Value::Object(fields))]);
    }
    let shape = if parts > 0 {
        Shape::Parts
    } else {
        Shape::Other
    };
    let mut rows = Vec::new();
    for (key, value) in fields {
        let part = Part::of(&key);
        if (parts == 0 || part.is_some())
            && holds_rows(&value)
            && let Value::Array(list) = value
        {
            for row in list {
                rows.push((rows.len() + 1, part, row));
            }
        }
    }
    (shape, rows)
}

/// In COCO's form of captions, `images` holds the names: they take the place of the numbers.
fn name_images(rows: &mut [Value], images: &[Value]) {
    let names: BTreeMap<String, &Value> = images
        .iter()
        .filter_map(|image| Some((image.get("id")?.to_string(), image.get("file_name")?)))
        .collect();
    for row in rows {
        let name = row
            .get("image_id")
            .and_then(|id| names.get(&id.to_string()));
        if let Some(name) = name {
            row["image_id"] = (*name).clone();
        }
    }
}

/// One row a line; `reason` is why the whole is no JSON.
fn lines(path: &Path, text: &str, reason: String) -> Result<NumberedRows, ConvertError> {
    let first = text.lines().find(|line| !line.trim().is_empty());
    let is_row = |line: &str| matches!(serde_json::from_str(line), Ok(Value::Object(_)));
    if !first.is_some_and(is_row) {
        if text.trim().is_empty() {
            return Err(ConvertError::Empty(path.to_owned()));
        }
        let (path, row) = (path.to_owned(), 1);
        return Err(ConvertError::Json { path, row, reason });
    }
    let lines = text.lines().enumerate();
    lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| {
            let row = strict_json::parse(line).map_err(|reason| ConvertError::Json {
                path: path.to_owned(),
                row: index + 1,
                reason,
            })?;
            Ok((index + 1, None, row))
        })
        .collect()
}

fn unknown(path: &Path) -> ConvertError {
    ConvertError::UnknownForm {
        path: path.to_owned(),
    }
}

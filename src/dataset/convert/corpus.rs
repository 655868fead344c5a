//! The forms of a corpus, read into rows of one kind.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::error::ConvertError;
use super::training::training_rows;
use crate::base::text_file;
use crate::dataset::reader::DataOptions;
use crate::dataset::rows::text_error;
pub(super) use crate::processor::image::ENDINGS;
use crate::processor::row_keys::{KeyUse, of_row};
use crate::processor::sample::{IMAGE_TAG, ImageSource, Sample, parse_row};
use crate::processor::strict_json;
use crate::study::keys_of;

/// The form of an input file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum CorpusForm {
    /// `{"annotations": [{"image_id", "caption"}]}`.
    Annotations,
    /// `[{"img", "prompt", "label"}]`.
    Prompts,
    /// Rows of `messages` and `images`, one a line or as a list.
    Messages,
    /// Rows of any keys, one a line, as a list, or as lists under keys such as `train` and `val`.
    Keys,
}

/// The keys of a corpus in no known form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorpusKeys {
    /// Key of the image: a path, or a list of paths.
    pub image: String,
    /// Key of the report.
    pub report: String,
}

/// What a row says.
#[derive(Debug, Clone)]
pub(super) enum Body {
    /// A report, the answer to a drawn question.
    Report(String),
    /// A conversation with its row as it was.
    Messages {
        sample: Box<Sample>,
        row: Map<String, Value>,
    },
}

/// One row of a corpus.
#[derive(Debug, Clone)]
pub(super) struct CorpusRow {
    /// Place in the file, from 1; the line of a JSONL file.
    pub(super) number: usize,
    /// Images as the row names them.
    pub(super) images: Vec<String>,
    /// Keys with a text or a number, as text.
    pub(super) keys: BTreeMap<String, String>,
    /// Keys that neither a row of training nor a study is made of.
    pub(super) unused: Vec<String>,
    pub(super) body: Body,
}

impl CorpusRow {
    /// Name of the first image without folder and ending.
    pub(super) fn id(&self) -> &str {
        self.images.first().map_or("", |image| stem_of(image))
    }

    /// The file of an image that was in the row or on the web.
    pub(super) fn kept(&self, index: usize) -> Option<&PathBuf> {
        match &self.body {
            Body::Messages { sample, .. } => match sample.sources.get(&index)? {
                ImageSource::Kept(path) => Some(path),
                _ => None,
            },
            Body::Report(_) => None,
        }
    }

    /// The report: the answer of the last turn.
    pub(super) fn report(&self) -> &str {
        match &self.body {
            Body::Report(report) => report,
            Body::Messages { sample, .. } => sample.conversation.last_answer().unwrap_or_default(),
        }
    }
}

/// Last part of a path of any system.
pub(super) fn base_name(path: &str) -> &str {
    path.rsplit(['/', '\\']).next().unwrap_or(path)
}

/// Name of an image without folder and endings: `a/2_1.png` gives `2_1`, `1.dcm.png` gives `1`.
pub(super) fn stem_of(path: &str) -> &str {
    let name = base_name(path);
    let mut stem = name
        .strip_suffix(".gz")
        .filter(|name| name.ends_with(".nii"))
        .unwrap_or(name);
    while let Some((shorter, ending)) = stem.rsplit_once('.')
        && ENDINGS.contains(&ending.to_lowercase().as_str())
    {
        stem = shorter;
    }
    stem
}

/// Reads a corpus whose keys are named by the user.
pub(super) fn read_keyed(
    path: &Path,
    keys: &CorpusKeys,
) -> Result<(CorpusForm, Vec<CorpusRow>), ConvertError> {
    let text = read_text(path)?;
    let rows: Vec<Value> = match strict_json::parse(&text) {
        Ok(Value::Array(rows)) => rows,
        Ok(Value::Object(fields))
            if !fields.contains_key(&keys.report) && fields.values().any(Value::is_array) =>
        {
            let lists = fields.into_iter().filter_map(|(_, value)| match value {
                Value::Array(rows) => Some(rows),
                _ => None,
            });
            lists.flatten().collect()
        }
        Ok(row) => vec![row],
        Err(_) => {
            let lines = text.lines().enumerate();
            lines
                .filter(|(_, line)| !line.trim().is_empty())
                .map(|(index, line)| {
                    strict_json::parse(line).map_err(|reason| ConvertError::Json {
                        path: path.to_owned(),
                        row: index + 1,
                        reason,
                    })
                })
                .collect::<Result<_, _>>()?
        }
    };
    let rows = rows.iter().enumerate();
    let rows = rows.map(|(at, row)| report_row(path, at + 1, row, &keys.image, &keys.report));
    Ok((CorpusForm::Keys, rows.collect::<Result<_, _>>()?))
}

/// The text of a file of any encoding, plain or packed.
pub(super) fn read_text(path: &Path) -> Result<String, ConvertError> {
    const LIMIT: u64 = 8 << 30;
    let read = text_file::read_text(path, LIMIT);
    Ok(read.map_err(|error| text_error(path, error))?.text)
}

/// Reads a corpus in any of its forms.
pub(super) fn read(
    path: &Path,
    reading: &DataOptions,
) -> Result<(CorpusForm, Vec<CorpusRow>), ConvertError> {
    // Rows that training reads as they are, in any file.
    if let Some(rows) = training_rows(path, reading)? {
        return Ok((CorpusForm::Messages, rows));
    }
    let text = read_text(path)?;
    let text = text.as_str();
    let (form, rows) = match strict_json::parse(text) {
        Ok(Value::Object(mut fields)) => match fields.shift_remove("annotations") {
            Some(Value::Array(rows)) => (CorpusForm::Annotations, rows),
            _ if fields.contains_key("img") => (CorpusForm::Prompts, vec![Value::Object(fields)]),
            _ => return Err(unknown(path)),
        },
        Ok(Value::Array(rows)) => match rows.first() {
            Some(first) if first.get("img").is_some() => (CorpusForm::Prompts, rows),
            Some(first) if first.get("messages").is_some() => (CorpusForm::Messages, rows),
            _ => return Err(unknown(path)),
        },
        Ok(_) => return Err(unknown(path)),
        Err(reason) => {
            let first = text.lines().find(|line| !line.trim().is_empty());
            let is_row = |line: &str| matches!(serde_json::from_str(line), Ok(Value::Object(_)));
            if first.is_some_and(is_row) {
                return lines(path, text);
            }
            let ending = path.extension().and_then(|ending| ending.to_str());
            if ending.is_some_and(|ending| ["csv", "tsv", "xlsx"].contains(&ending)) {
                return Err(unknown(path));
            }
            if text.trim().is_empty() {
                return Err(ConvertError::Empty(path.to_owned()));
            }
            let (path, row) = (path.to_owned(), 1);
            return Err(ConvertError::Json { path, row, reason });
        }
    };
    let rows = rows.into_iter().enumerate();
    let rows = rows.map(|(index, row)| match form {
        CorpusForm::Annotations => report_row(path, index + 1, &row, "image_id", "caption"),
        CorpusForm::Prompts => report_row(path, index + 1, &row, "img", "label"),
        CorpusForm::Messages | CorpusForm::Keys => message_row(path, index + 1, &row.to_string()),
    });
    Ok((form, rows.collect::<Result<_, _>>()?))
}

fn unknown(path: &Path) -> ConvertError {
    ConvertError::UnknownForm {
        path: path.to_owned(),
    }
}

fn lines(path: &Path, text: &str) -> Result<(CorpusForm, Vec<CorpusRow>), ConvertError> {
    let lines = text.lines().enumerate();
    let rows = lines
        .filter(|(_, line)| !line.trim().is_empty())
        .map(|(index, line)| message_row(path, index + 1, line));
    Ok((CorpusForm::Messages, rows.collect::<Result<_, _>>()?))
}

fn report_row(
    path: &Path,
    number: usize,
    row: &Value,
    image: &str,
    report: &str,
) -> Result<CorpusRow, ConvertError> {
    let wrong = |key: &str, expected: &str| ConvertError::Form {
        path: path.to_owned(),
        row: number,
        what: format!("`{key}`"),
        expected: expected.to_owned(),
    };
    let text = |key: &str| match row.get(key) {
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(text.clone()),
        _ => Err(wrong(key, "a text that is not empty")),
    };
    let paths = match row.get(image) {
        Some(Value::Array(paths)) if !paths.is_empty() => paths
            .iter()
            .map(|path| match path {
                Value::String(path) if !path.trim().is_empty() => Ok(path.clone()),
                _ => Err(wrong(image, "a path, or a list of paths")),
            })
            .collect::<Result<_, _>>()?,
        _ => vec![text(image)?],
    };
    let words = text(report)?;
    if words.contains(IMAGE_TAG) {
        return Err(wrong(report, "a report without `<image>`"));
    }
    Ok(CorpusRow {
        number,
        images: paths,
        keys: row.as_object().map(keys_of).unwrap_or_default(),
        unused: row
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, value)| {
                let known = [image, report, "prompt"].contains(&key.as_str());
                !known && of_row(key, value) != KeyUse::Harmless
            })
            .map(|(key, _)| key.clone())
            .collect(),
        body: Body::Report(words),
    })
}

fn message_row(path: &Path, number: usize, line: &str) -> Result<CorpusRow, ConvertError> {
    let (sample, row) = parse_row(line, path, number)?;
    messages_row(path, number, sample, row)
}

/// A row of `messages` that was read.
pub(super) fn messages_row(
    path: &Path,
    number: usize,
    sample: Sample,
    row: Map<String, Value>,
) -> Result<CorpusRow, ConvertError> {
    if sample.conversation.last_answer().is_none() {
        return Err(ConvertError::Form {
            path: path.to_owned(),
            row: number,
            what: "`messages`".into(),
            expected: "an answer at the end".into(),
        });
    }
    Ok(CorpusRow {
        number,
        images: sample.images.clone(),
        keys: sample.keys.clone(),
        unused: sample.unknown_keys.clone(),
        body: Body::Messages {
            sample: Box::new(sample),
            row,
        },
    })
}

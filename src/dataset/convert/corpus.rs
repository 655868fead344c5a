//! The rows that a corpus of any form is read into.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::error::ConvertError;
use super::selection::Part;
pub(super) use crate::processor::image::ENDINGS;
use crate::processor::sample::{ImageSource, Sample, parse_row};

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
    /// Names and boxes: an answer with their tags, and `objects`.
    Objects {
        answer: String,
        objects: Map<String, Value>,
    },
}

/// One row of a corpus.
#[derive(Debug, Clone)]
pub(super) struct CorpusRow {
    /// File of the corpus.
    pub(super) file: Arc<Path>,
    /// Place in the file, from 1; the line of a JSONL file.
    pub(super) number: usize,
    /// Images as the row names them.
    pub(super) images: Vec<String>,
    /// Keys with a text or a number, as text.
    pub(super) keys: BTreeMap<String, String>,
    /// Keys that neither a row of training nor a study is made of.
    pub(super) unused: Vec<String>,
    /// Where the corpus' own split has it.
    pub(super) part: Option<Part>,
    /// Files of images that were in the row or on the web, by their places.
    pub(super) kept: BTreeMap<usize, PathBuf>,
    pub(super) body: Body,
}

impl CorpusRow {
    /// Name of the first image without folder and ending.
    pub(super) fn id(&self) -> &str {
        self.images.first().map_or("", |image| stem_of(image))
    }

    /// The file of an image that was in the row or on the web.
    pub(super) fn kept(&self, index: usize) -> Option<&PathBuf> {
        self.kept.get(&index)
    }

    /// The report: the answer of the last turn.
    pub(super) fn report(&self) -> &str {
        match &self.body {
            Body::Report(report) => report,
            Body::Objects { answer, .. } => answer,
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

/// A row of `messages`.
pub(super) fn message_row(
    path: &Arc<Path>,
    number: usize,
    line: &str,
) -> Result<CorpusRow, ConvertError> {
    let (sample, row) = parse_row(line, path, number)?;
    messages_row(path, number, sample, row)
}

/// A row of `messages` that was read.
pub(super) fn messages_row(
    path: &Arc<Path>,
    number: usize,
    sample: Sample,
    row: Map<String, Value>,
) -> Result<CorpusRow, ConvertError> {
    if sample.conversation.last_answer().is_none() {
        return Err(ConvertError::Form {
            path: path.to_path_buf(),
            row: number,
            what: "`messages`".into(),
            expected: "an answer at the end".into(),
        });
    }
    Ok(CorpusRow {
        file: path.clone(),
        part: None,
        number,
        images: sample.images.clone(),
        kept: sample
            .sources
            .iter()
            .filter_map(|(index, source)| match source {
                ImageSource::Kept(path) => Some((*index, path.clone())),
                _ => None,
            })
            .collect(),
        keys: sample.keys.clone(),
        unused: sample.unknown_keys.clone(),
        body: Body::Messages {
            sample: Box::new(sample),
            row,
        },
    })
}

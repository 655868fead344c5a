//! Rows of data files as questions: what precedes their last answer, and that answer as a reference.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{
    error::DatasetError,
    reader::{ColumnsSeen, DataOptions, Plain, ReadFile, read_rows_as},
    rows::DataFile,
};
use crate::{
    base::files::sha256_bytes,
    processor::{
        message::{Content, Message, Part, Role},
        sample::{RowFault, Sample, SampleError, parse_question},
    },
    study::{PATIENT_KEYS, STUDY_KEYS},
};

/// Keys under which a row may name itself, in this order.
const ID_KEYS: [&str; 8] = [
    "id",
    "sample_id",
    "row_id",
    "question_id",
    "image_id",
    "uuid",
    "idx",
    "index",
];

/// Longest name of a row that is kept, in bytes.
const LONGEST_ID: usize = 1024;

/// A row that is to be answered.
#[derive(Debug, Clone)]
pub struct Question {
    /// The row, checked.
    pub sample: Sample,
    /// What the row calls itself, a text or a number.
    pub id: Option<Value>,
    /// The study it names.
    pub study: Option<String>,
    /// The patient it names.
    pub patient: Option<String>,
    /// Hash of the row in its plain form: of its messages, image names and all other keys.
    pub sha256: String,
    /// Question of a row that has images alone.
    standard: String,
}

/// A question as it is put to a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AskedQuestion {
    /// The messages up to and including it.
    pub messages: Vec<Message>,
    /// Its words.
    pub prompt: String,
    /// The answer of the row.
    pub reference: Option<String>,
}

impl Question {
    fn new((sample, row): (Sample, Map<String, Value>), standard: &str) -> Self {
        let is_name = |value: &&Value| match value {
            Value::String(text) => !text.is_empty() && text.len() <= LONGEST_ID,
            Value::Number(_) => true,
            _ => false,
        };
        let first = |keys: &[&str]| keys.iter().find_map(|key| sample.keys.get(*key).cloned());
        Self {
            id: ID_KEYS
                .iter()
                .find_map(|key| row.get(*key).filter(is_name).cloned()),
            study: first(&STUDY_KEYS),
            patient: first(&PATIENT_KEYS),
            sha256: sha256_bytes(Value::Object(row).to_string().as_bytes()),
            standard: standard.to_owned(),
            sample,
        }
    }

    /// The question with the boxes of its objects, `system` before a conversation that has no system message.
    /// `sizes` are the widths and heights of the images, as they are shown.
    ///
    /// # Errors
    /// [`RowFault::Key`] if a box is outside its image.
    pub fn asked(
        &self,
        system: Option<&str>,
        sizes: &[(usize, usize)],
    ) -> Result<AskedQuestion, RowFault> {
        let conversation = self.sample.placed(sizes)?;
        let mut messages = conversation.prompt_messages();
        if let (None, Some(system)) = (&conversation.system, system) {
            messages.insert(0, Message::text(Role::System, system));
        }
        if let Some(Message {
            content: Content::Parts(parts),
            ..
        }) = messages.last_mut()
            && parts.iter().all(is_silent)
        {
            parts.push(Part::Text {
                text: self.standard.clone(),
            });
        }
        Ok(AskedQuestion {
            prompt: messages
                .last()
                .map(|last| last.content.text())
                .unwrap_or_default(),
            reference: conversation.last_answer().map(str::to_owned),
            messages,
        })
    }

    /// The last question without its images; boxes of objects are still `<bbox>`.
    pub fn text(&self) -> String {
        match self.own_parts() {
            parts if parts.iter().all(is_silent) => self.standard.clone(),
            parts => Content::Parts(parts.to_vec()).text(),
        }
    }

    /// Whether the last question is the one for rows without.
    pub fn has_standard_question(&self) -> bool {
        self.text() == self.standard
    }

    fn own_parts(&self) -> &[Part] {
        let turn = self.sample.conversation.turns.last();
        turn.map_or(&[], |turn| &turn.question)
    }

    /// Bytes of all texts before the answer.
    pub fn text_bytes(&self) -> usize {
        let messages = self.sample.conversation.prompt_messages();
        let texts = messages.iter().map(|message| message.content.text().len());
        texts.sum::<usize>() + self.standard.len()
    }

    /// Its system message.
    pub fn system(&self) -> Option<&str> {
        self.sample.conversation.system.as_deref()
    }

    /// The answer of the row, which the model is not shown; boxes of objects are still `<bbox>`.
    pub fn reference(&self) -> Option<&str> {
        self.sample.conversation.last_answer()
    }
}

fn is_silent(part: &Part) -> bool {
    match part {
        Part::Image => true,
        Part::Text { text } => text.trim().is_empty(),
    }
}

/// The questions of a data file.
#[derive(Debug)]
pub struct QuestionFile {
    /// The file.
    pub path: PathBuf,
    /// The rows with their numbers; what is wrong with a row is in its place.
    pub rows: Vec<(usize, Result<Question, SampleError>)>,
    /// What a reader of a result should know of the file.
    pub remarks: Vec<String>,
}

/// Reads all rows of some files. A row with images alone asks `standard`.
///
/// # Errors
/// [`DatasetError`] if a file cannot be read, holds no row, or no row of all files has a column that was named.
pub fn read_questions(
    paths: &[PathBuf],
    options: &DataOptions,
    standard: &str,
) -> Result<Vec<QuestionFile>, DatasetError> {
    let mut columns = ColumnsSeen::default();
    let mut files = Vec::new();
    for path in paths {
        let file = DataFile::read(path)?;
        let parse = |row| parse_question(row, standard);
        let read: ReadFile = read_rows_as(&file, options, Plain::Keep, false, &parse)?;
        columns.add(&read.columns);
        if read.rows.is_empty() {
            return Err(DatasetError::Empty(path.display().to_string()));
        }
        let rows = read.rows.into_iter().map(|(number, row)| {
            let row = row.map(|row| Question::new(row, standard));
            let row = row.map_err(|fault| SampleError {
                file: path.clone(),
                row: number,
                fault,
            });
            (number, row)
        });
        files.push(QuestionFile {
            path: path.clone(),
            rows: rows.collect(),
            remarks: read.remarks,
        });
    }
    let named = paths.first().map_or(Path::new(""), PathBuf::as_path);
    columns.expect_all(&options.columns, named)?;
    Ok(files)
}

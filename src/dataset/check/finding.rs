//! What a check found.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::dataset::convert::Spread;
use crate::study::StudyFacts;

/// Whether training may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// The row cannot be used, or the validation would be wrong.
    Error,
    /// Worth a look.
    Warning,
}

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The file holds no sample.
    Empty,
    /// The line is not JSON, or no text.
    Json,
    /// Something to know of the file as a whole.
    File,
    /// A key is missing or of another type, or roles are out of order.
    Form,
    /// A question without an answer, or an empty answer.
    NoAnswer,
    /// The number of `<image>` marks is not that of the images.
    ImageMarks,
    /// A row whose first question has no words.
    NoQuestion,
    /// A row without any image.
    NoImage,
    /// An image is missing or cannot be used.
    Image,
    /// The text holds a token that steers the model.
    ControlToken,
    /// The row has more tokens than allowed.
    TooLong,
    /// The row cannot be encoded for another reason.
    Encode,
    /// A key that nothing uses.
    UnknownKey,
    /// A key that would change what is learnt and is not supported.
    RefusedKey,
    /// Reasoning in the answers, and none in the chat template, or the other way round.
    Thinking,
    /// The same images with the same conversation came before.
    Duplicate,
    /// The same images came before with another answer.
    AnswersDiffer,
    /// An image of a validation row is in the training file.
    LeakImage,
    /// Another view of a validation row's study is in the training file.
    LeakStudy,
    /// Another study of a validation row's patient is in the training file.
    LeakPatient,
    /// A validation row's report is in the training file.
    LeakReport,
    /// The studies are not what one would expect of the files.
    Studies,
}

impl Kind {
    /// The name as listings write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::Json => "json",
            Self::File => "file",
            Self::Form => "form",
            Self::NoAnswer => "no-answer",
            Self::ImageMarks => "image-marks",
            Self::NoQuestion => "no-question",
            Self::NoImage => "no-image",
            Self::Image => "image",
            Self::ControlToken => "control-token",
            Self::TooLong => "too-long",
            Self::Encode => "encode",
            Self::UnknownKey => "unknown-key",
            Self::RefusedKey => "refused-key",
            Self::Thinking => "thinking",
            Self::Duplicate => "duplicate",
            Self::AnswersDiffer => "answers-differ",
            Self::LeakImage => "leak-image",
            Self::LeakStudy => "leak-study",
            Self::LeakPatient => "leak-patient",
            Self::LeakReport => "leak-report",
            Self::Studies => "studies",
        }
    }
}

/// One thing that was found; its text form is one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Whether training may go on.
    pub severity: Severity,
    /// What is wrong.
    pub kind: Kind,
    /// File of the row.
    pub file: PathBuf,
    /// Line of the row, from 1; 0 for the file as a whole.
    pub line: usize,
    /// The reason, in words.
    pub message: String,
}

impl Finding {
    pub(super) fn new(
        severity: Severity,
        kind: Kind,
        file: &Path,
        line: usize,
        message: String,
    ) -> Self {
        Self {
            severity,
            kind,
            file: file.to_owned(),
            line,
            message,
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        // A message may quote a text with line ends; a finding is one line all the same.
        let message = self.message.replace(['\n', '\r'], " ");
        write!(
            f,
            "{}:{}: {severity}: {}: {message}",
            self.file.display(),
            self.line,
            self.kind.as_str()
        )
    }
}

/// Rows of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FileCount {
    /// The file.
    pub file: PathBuf,
    /// Its lines that are not blank.
    pub rows: usize,
}

/// All that was found.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckReport {
    /// Training file, then the validation file if there is one.
    pub files: Vec<FileCount>,
    /// Image files that were decoded, or should have been.
    pub images: usize,
    /// Number of errors.
    pub errors: usize,
    /// Number of warnings.
    pub warnings: usize,
    /// Rows that are longer than allowed.
    pub too_long: usize,
    /// Tokens of the rows that could be encoded, image tokens included.
    pub row_tokens: Option<Spread>,
    /// How studies were found; absent if no row could be read.
    pub study: Option<StudyFacts>,
    /// Everything found, by file and line.
    #[serde(skip)]
    pub findings: Vec<Finding>,
}

impl CheckReport {
    pub(super) fn new(
        files: Vec<FileCount>,
        images: usize,
        row_tokens: &[usize],
        study: Option<StudyFacts>,
        findings: Vec<Finding>,
    ) -> Self {
        let of = |severity| {
            let same = findings.iter().filter(|found| found.severity == severity);
            same.count()
        };
        let too_long = findings.iter().filter(|found| found.kind == Kind::TooLong);
        Self {
            files,
            images,
            too_long: too_long.count(),
            errors: of(Severity::Error),
            warnings: of(Severity::Warning),
            row_tokens: Spread::of(row_tokens),
            study,
            findings,
        }
    }
}

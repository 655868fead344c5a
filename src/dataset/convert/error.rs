//! Why a corpus could not be converted.

use std::path::PathBuf;

use crate::{
    base::files::FileError,
    dataset::{
        error::DatasetError,
        rows::{DataFileError, RowsError},
    },
    processor::{sample::SampleError, supervised::SupervisedError, tokenizer::TokenizerError},
    study::{StudyError, counted},
};

/// Why a corpus could not be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// An input file cannot be read.
    #[error("cannot read `{}`: {cause}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// An input file is not JSON.
    #[error("`{}` row {row}: not JSON: {reason}", .path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Row or line, from 1.
        row: usize,
        /// What the parser said.
        reason: String,
    },
    /// The corpus is in none of the known forms.
    #[error(
        "`{}` is in no known form; expected `{{\"annotations\": [{{\"image_id\", \"caption\"}}]}}`, `[{{\"img\", \"prompt\", \"label\"}}]`, rows of `messages` and `images`, or JSON rows of other keys with `--image-key` and `--report-key` (a table has to become JSON first)", .path.display()
    )]
    UnknownForm {
        /// The file.
        path: PathBuf,
    },
    /// A row lacks something.
    #[error("`{}` row {row}: {what} is not as expected; expected {expected}", .path.display())]
    Form {
        /// The file.
        path: PathBuf,
        /// Row or line, from 1.
        row: usize,
        /// What is wrong.
        what: String,
        /// What should be there.
        expected: String,
    },
    /// An input file is not text, or not one row a line.
    #[error(transparent)]
    Rows(#[from] RowsError),
    /// A row of `messages` is no sample.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// A data file cannot be read, or an image of it cannot be kept.
    #[error(transparent)]
    Data(Box<DatasetError>),
    /// An image may be one of several files, or a file one of several images.
    #[error(
        "`{}` row {row}: image `{image}` {what}; expected one file an image: give the folder that the paths of the rows begin in (`--images`)", .path.display()
    )]
    Ambiguous {
        /// The corpus.
        path: PathBuf,
        /// Row or line, from 1.
        row: usize,
        /// As the row names it.
        image: String,
        /// Both paths, in words.
        what: String,
    },
    /// The output folder holds something.
    #[error("`{}` exists and is not an empty folder; choose another folder or remove it", .0.display())]
    Exists(PathBuf),
    /// A rule for studies does not fit.
    #[error(transparent)]
    Study(#[from] StudyError),
    /// There is no folder of images.
    #[error("{}; expected the folder with the images of the corpus (`--images`)", match .0 {
        Some(path) => format!("`{}` is not a folder", path.display()),
        None => "no folder of images was given".to_owned(),
    })]
    NoImages(Option<PathBuf>),
    /// No row is left.
    #[error(
        "none of {} of `{}` can be used ({reason}); see `{}`", counted(*.rows, "row", "rows"), .path.display(), .missing.display()
    )]
    NoneLeft {
        /// The corpus.
        path: PathBuf,
        /// Its rows.
        rows: usize,
        /// Why the first was left out.
        reason: String,
        /// The list of all.
        missing: PathBuf,
    },
    /// The corpus has no row.
    #[error("`{}` holds no row", .0.display())]
    Empty(PathBuf),
    /// Validation would take all there is.
    #[error(
        "{0}; hint: `--val-ratio 0` puts all into train.jsonl, a smaller `--val-ratio` takes less, `--study-regex` or a key `study` in each row defines what a study is"
    )]
    CannotSplit(String),
    /// The share of validation is no share.
    #[error("val_ratio is {0}; expected 0 or more and less than 1")]
    ValRatio(f64),
    /// There is no usable question.
    #[error("the list of questions {0}; expected one question a line, without `<image>`")]
    Prompts(&'static str),
    /// A path cannot be written into JSON.
    #[error("`{}` is not UTF-8; rename it", .0.display())]
    PathText(PathBuf),
    /// A row cannot become tokens.
    #[error("`{}` row {row}: {cause}", .path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// Row or line, from 1.
        row: usize,
        /// Why.
        cause: SupervisedError,
    },
    /// A text cannot become tokens.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// An output file cannot be written.
    #[error(transparent)]
    File(#[from] FileError),
}

impl From<DataFileError> for ConvertError {
    fn from(error: DataFileError) -> Self {
        match error {
            DataFileError::Read { path, cause } => Self::Read { path, cause },
            DataFileError::Rows(error) => Self::Rows(error),
        }
    }
}

impl From<DatasetError> for ConvertError {
    fn from(error: DatasetError) -> Self {
        match error {
            DatasetError::Rows(error) => Self::Rows(error),
            error => Self::Data(Box::new(error)),
        }
    }
}

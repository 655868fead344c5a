//! Why a corpus could not be converted.

use std::path::PathBuf;

use super::form::CorpusForm;
use crate::{
    base::{files::FileError, text_file::TextFileError},
    dataset::{
        error::DatasetError,
        rows::{DataFileError, RowsError},
    },
    processor::{
        sample::{RowFault, SampleError},
        supervised::SupervisedError,
        tokenizer::TokenizerError,
    },
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
        "`{}` is in no known form; expected `{{\"annotations\": [{{\"image_id\", \"caption\"}}]}}`, `[{{\"img\", \"prompt\", \"label\"}}]`, rows of `messages` and `images`, rows of an image and a report under known keys (`image`, `image_path`, 文件名; `report`, `findings`, `impression`, 影像所见, 影像诊断), a table of such columns, or JSON rows of other keys with `--image-key` and `--report-key`", .path.display()
    )]
    UnknownForm {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read as text.
    #[error(transparent)]
    Text(#[from] TextFileError),
    /// A folder holds no corpus.
    #[error("`{}` holds {}", .path.display(), match .wanted {
        Some(form) => format!("no corpus `{}`; expected {}", form.name(), form.files()),
        None => "no corpus that is known; name its file, or the corpus with `--corpus` (`convert --help` lists them)".to_owned(),
    })]
    NoCorpus {
        /// The folder.
        path: PathBuf,
        /// What was looked for.
        wanted: Option<CorpusForm>,
    },
    /// A folder holds several corpora.
    #[error("`{}` holds several corpora: {found}; hint: name one with `--corpus`, or its file", .path.display())]
    SeveralCorpora {
        /// The folder.
        path: PathBuf,
        /// The corpora, in words.
        found: String,
    },
    /// A folder holds several files of one kind.
    #[error("`{}` holds several files that may be the corpus ({corpus}): {files}; hint: name one of them", .path.display())]
    SeveralFiles {
        /// The folder.
        path: PathBuf,
        /// The corpus.
        corpus: &'static str,
        /// Some of the files.
        files: String,
    },
    /// A corpus lacks a part of its files.
    #[error("`{}` was taken for the corpus `{corpus}`, but lacks {lacks}", .path.display())]
    Lacks {
        /// File or folder.
        path: PathBuf,
        /// The corpus.
        corpus: &'static str,
        /// What is missing.
        lacks: String,
    },
    /// Keys were to be named.
    #[error("the corpus `keys` is read by `--image-key` and `--report-key`; expected both")]
    NoKeys,
    /// Rows of conversations have neither views nor sections.
    #[error(
        "rows of `messages` stay as they are; `--views` and `--sections` are for corpora of reports"
    )]
    NotForMessages,
    /// Two inputs do not go into one output.
    #[error(
        "the inputs are of two {what}: `{}` is {}, `{}` is {}; convert them one by one, and name the results together: `--train-data a/train.jsonl,b/train.jsonl`",
        .first.display(), .names[0], .other.display(), .names[1]
    )]
    Inputs {
        /// The first input.
        first: PathBuf,
        /// The one that differs.
        other: PathBuf,
        /// Forms or languages.
        what: &'static str,
        /// What each is.
        names: [String; 2],
    },
    /// The projections of images are not known.
    #[error(
        "nothing in the corpus `{0}` says which images are frontal; expected `--views all` or `one-per-image`, or a column `view`"
    )]
    NoViews(&'static str),
    /// A section was wanted that no report has.
    #[error(
        "no report of the corpus `{corpus}` has {section} of its own; leave `--sections` out to take whole reports"
    )]
    NoSection {
        /// The corpus.
        corpus: &'static str,
        /// The section.
        section: &'static str,
    },
    /// The corpus' own split was wanted, and there is none.
    #[error("`{}` has no split of its own; expected `--split uid` or `--split image`", .0.display())]
    NoSplit(PathBuf),
    /// Boxes are in pixels of another copy of the image.
    #[error(
        "`{}` row {row}: the boxes are in pixels of the published DICOM file, and the size of `{image}` may be another; expected the DICOM files, columns `image_width` and `image_height`, or `train_meta.csv` (`image_id,dim0,dim1`) beside the table", .path.display()
    )]
    BoxSizes {
        /// The table.
        path: PathBuf,
        /// Row of the first box.
        row: usize,
        /// The image.
        image: String,
    },
    /// A box is outside its image.
    #[error("`{}` row {row}: {cause}", .path.display())]
    Boxes {
        /// The table.
        path: PathBuf,
        /// Row of the first box.
        row: usize,
        /// Why.
        cause: RowFault,
    },
    /// More than half of the rows cannot be used.
    #[error(
        "{left} of {} of `{}` have no image or no text that can be used (the first: {reason}); `{}` lists them all; hint: `--images` names the folder that holds the images, `--allow-missing` converts the rest", counted(*.rows, "row", "rows"), .path.display(), .missing.display()
    )]
    MostMissing {
        /// The corpus.
        path: PathBuf,
        /// Rows left out.
        left: usize,
        /// All rows.
        rows: usize,
        /// Why the first was left out.
        reason: String,
        /// The list of all.
        missing: PathBuf,
    },
    /// The folder of images cannot be searched.
    #[error("`{}` holds more than {most} files, too many to look for images by name; expected the folder that the paths of the rows begin in (`--images`)", .path.display())]
    TooManyFiles {
        /// The folder.
        path: PathBuf,
        /// The most that are searched.
        most: usize,
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
    /// A data file cannot be read, or an image of it cannot be kept.
    #[error(transparent)]
    Data(Box<DatasetError>),
    /// A row of `messages` is no sample.
    #[error(transparent)]
    Sample(#[from] SampleError),
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
    #[error("`{}` exists and is not an empty folder; choose another folder, remove it, or replace an earlier conversion with `--overwrite`", .0.display())]
    Exists(PathBuf),
    /// The input is one of the files that are written.
    #[error("`{}` would be replaced by the result; choose another `--output`", .0.display())]
    OverInput(PathBuf),
    /// A rule for studies does not fit.
    #[error(transparent)]
    Study(#[from] StudyError),
    /// The folder of images is none.
    #[error("`{}` is not a folder; expected the folder with the images of the corpus (`--images`)", .0.display())]
    NoImages(PathBuf),
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

//! What can be wrong with a data set.

use std::path::PathBuf;

use super::rows::{DataFileError, RowsError};
use crate::{
    base::files::FileError,
    batch::positions::PositionError,
    processor::{image::ImageError, sample::SampleError, supervised::SupervisedError},
};

/// What can be wrong with a data set.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The file cannot be read.
    #[error("cannot read `{}`: {cause}; expected a data file (JSONL, JSON, CSV, TSV or Parquet), or `phantom:SEED:FROM..TO[:plain|terse|partial|mixed|house]`", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A phantom data set is not named as expected.
    #[error(
        "`{0}` does not name a phantom data set; expected `phantom:SEED:FROM..TO` with an optional `:plain`, `:terse`, `:partial`, `:mixed` or `:house`"
    )]
    Phantom(String),
    /// Several data sets are not named as expected.
    #[error(
        "data set `{name}` {reason}; expected `[NAME=]PATH[:WEIGHT][#ROWS]`, several separated by commas"
    )]
    Name {
        /// The part of the name.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// An image of a row or of the web cannot be kept as a file.
    #[error(
        "{0}; images that are in rows or on the web are kept there; hint: XRAY_CACHE_DIR names another folder"
    )]
    Keep(#[from] FileError),
    /// Drawn studies have no second answer.
    #[error(
        "`{0}` has no rejected answers; `objective = \"dpo\"` learns from rows with `rejected_response`, which `prefer` makes"
    )]
    Rejected(String),
    /// There is no row.
    #[error("`{0}` holds no sample")]
    Empty(String),
    /// The file is not one row a line.
    #[error(transparent)]
    Rows(#[from] RowsError),
    /// A row is not in the expected form.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// Nothing can be held out for validation.
    #[error(
        "`{file}`: no rows can be held out for validation (split_dataset_ratio {ratio}): {reason}; name validation data (`val_data`), or set `split_dataset_ratio = 0` to train without"
    )]
    HoldOut {
        /// The data set.
        file: String,
        /// The share that was wanted.
        ratio: f64,
        /// Why.
        reason: String,
    },
    /// An image of a row cannot be read.
    #[error("`{file}`, row {row}: image `{image}`: {}", in_words(.cause))]
    Image {
        /// The data set.
        file: String,
        /// The row, from 1.
        row: usize,
        /// The image.
        image: String,
        /// Why.
        cause: ImageError,
    },
    /// A row cannot be encoded.
    #[error("`{file}`, row {row}: {cause}")]
    Encode {
        /// The data set.
        file: String,
        /// The row, from 1.
        row: usize,
        /// Why.
        cause: SupervisedError,
    },
    /// Image tokens and images of a row do not agree.
    #[error("`{file}`, row {row}: {cause}")]
    Positions {
        /// The data set.
        file: String,
        /// The row, from 1.
        row: usize,
        /// Why.
        cause: PositionError,
    },
    /// The samples of a step were not read in time.
    #[error(
        "`{file}`: the samples of step {step} (rows {rows:?}) were not read within {seconds} s while the devices wait; is an image on a slow or broken disk? Raise ddp_timeout if it is only slow"
    )]
    Slow {
        /// The data set.
        file: String,
        /// The step, from 1.
        step: usize,
        /// Rows of the step, from 1.
        rows: Vec<usize>,
        /// How long the loader waited.
        seconds: f64,
    },
    /// A sample is not as long as its image's header and its text say, by which other processes count.
    #[error(
        "`{file}` row {row}: {found} when it is read, {measured} by its text and the headers of its images; run `check` on the file"
    )]
    Measured {
        /// The data set.
        file: String,
        /// The row, from 1.
        row: usize,
        /// Tokens and targets of the sample.
        found: String,
        /// Those that it was expected to have.
        measured: String,
    },
    /// Every row is longer than allowed, and such rows are left out.
    #[error(
        "`{file}`: {}, and `overlong = \"skip\"` leaves such rows out: nothing is left to learn; raise max_length or lower max_pixels",
        match .rows {
            1 => format!("its only row has {shortest} tokens, more than max_length {max_length}"),
            rows => format!("all {rows} rows are longer than max_length {max_length} (the shortest has {shortest} tokens)"),
        }
    )]
    AllTooLong {
        /// The data set.
        file: String,
        /// Its rows.
        rows: usize,
        /// Tokens of the shortest.
        shortest: usize,
        /// The limit.
        max_length: usize,
    },
    /// A row is longer than allowed.
    #[error(
        "`{file}`, row {row}: {tokens} tokens ({image} of them image tokens), more than max_length {max_length}; raise max_length, lower max_pixels, or set `overlong = \"skip\"`"
    )]
    TooLong {
        /// The data set.
        file: String,
        /// The row, from 1.
        row: usize,
        /// Tokens of the row.
        tokens: usize,
        /// Image tokens among them.
        image: usize,
        /// The limit.
        max_length: usize,
    },
}

impl From<DataFileError> for DatasetError {
    fn from(error: DataFileError) -> Self {
        match error {
            DataFileError::Read { path, cause } => Self::Read { path, cause },
            DataFileError::Rows(error) => Self::Rows(error),
        }
    }
}

/// An error with its causes: the system's own words say whether a file is missing or forbidden.
pub(super) fn in_words(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}

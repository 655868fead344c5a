//! Why a check could not be made at all.

use std::path::PathBuf;

use crate::study::StudyError;

/// Why a check could not be made at all.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A data file cannot be read.
    #[error(
        "cannot read `{}`: {cause}; expected a JSONL file in ms-swift's form", .path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A rule for studies does not fit.
    #[error(transparent)]
    Study(#[from] StudyError),
    /// The threads could not be started.
    #[error("cannot start the threads of the check: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

//! Why a check could not be made at all.

use crate::dataset::error::DatasetError;
use crate::study::StudyError;

/// Why a check could not be made at all.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A data file cannot be read, or an image of it cannot be kept.
    #[error(transparent)]
    Data(Box<DatasetError>),
    /// A rule for studies does not fit.
    #[error(transparent)]
    Study(#[from] StudyError),
    /// The threads could not be started.
    #[error("cannot start the threads of the check: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

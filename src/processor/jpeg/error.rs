//! Why a JPEG gave no pixels.

/// Why a JPEG gave no pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::processor) enum JpegError {
    /// It ends before its end mark.
    Truncated,
    /// It breaks the rules.
    Damaged(String),
    /// It is of a kind that is not read here.
    Unsupported(&'static str),
    /// Its coefficients and planes take more than the limit.
    TooMuchMemory,
}

/// [`JpegError::Damaged`] with this reason.
pub(super) fn damaged(reason: impl ToString) -> JpegError {
    JpegError::Damaged(reason.to_string())
}

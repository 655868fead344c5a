//! Why a DICOM file gave no picture.

/// Why a DICOM file gave no picture; the caller adds the file's name.
///
/// Nothing here carries a value of the file but numbers, the identifier of its transfer syntax and
/// code words of technical attributes: a message must never say whose picture it is.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DicomError {
    /// The pixels are stored in a way that is not read.
    #[error("is stored as {syntax} ({uid}), which is not read; hint: {hint}")]
    TransferSyntax {
        /// Name of the transfer syntax.
        syntax: String,
        /// Its identifier.
        uid: String,
        /// How to convert the file.
        hint: &'static str,
    },
    /// There is no picture in the file.
    #[error(
        "holds no pixel data; expected a CR or DX image; hint: it may be a report, a directory (DICOMDIR) or a list of measurements"
    )]
    NoPixels,
    /// An attribute that a picture cannot do without.
    #[error("lacks {attribute}; hint: export it again")]
    Missing {
        /// Name of the attribute.
        attribute: &'static str,
    },
    /// An attribute with a value that cannot be used.
    #[error(
        "has {attribute} {found}, expected {expected}; hint: export it as an 8 or 16 bit image"
    )]
    Value {
        /// Name of the attribute.
        attribute: &'static str,
        /// What it holds, a number or a code word.
        found: String,
        /// What it may hold.
        expected: &'static str,
    },
    /// Several frames, and none was chosen.
    #[error("holds {frames} frames; hint: choose one with --frame N, counted from 1")]
    ManyFrames {
        /// How many.
        frames: usize,
    },
    /// The chosen frame does not exist.
    #[error("has no frame {frame}, expected 1 to {frames}")]
    NoFrame {
        /// The chosen frame, counted from 1.
        frame: usize,
        /// How many there are.
        frames: usize,
    },
    /// The header announces more pixels than the limit.
    #[error("is {columns} × {rows} pixels")]
    TooManyPixels {
        /// Width.
        columns: u32,
        /// Height.
        rows: u32,
    },
    /// Decoding would take more memory than the limit.
    #[error("needs too much memory")]
    TooMuchMemory,
    /// The file ends before its pixels do.
    #[error("is cut off")]
    Truncated,
    /// The content breaks the rules of the format.
    #[error("is damaged ({0})")]
    Damaged(String),
}

impl DicomError {
    pub(super) fn damaged(reason: impl ToString) -> Self {
        Self::Damaged(reason.to_string())
    }
}

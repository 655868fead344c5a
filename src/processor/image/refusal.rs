//! Why a decoder of this module gave no picture, before the picture's name is known.

use super::error::ImageError;
use super::format::PictureFormat;
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::jpeg::JpegError;

/// Why a decoder gave no picture; [`Self::of`] adds the name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The file ends before its pixels do.
    Truncated,
    /// The content breaks the rules of its format.
    Damaged(String),
    /// Pixels of a kind that is not read.
    Unsupported(String),
    /// More than two dimensions, of these lengths, and how many planes they make.
    Volume(String, usize),
    /// The chosen frame, and how many there are.
    NoFrame(usize, usize),
    /// The header announces more pixels than the limit.
    TooManyPixels(u64, u64),
    /// Decoding takes more memory than the limit.
    TooMuchMemory,
}

impl Refusal {
    pub(super) fn damaged(reason: impl ToString) -> Self {
        Self::Damaged(reason.to_string())
    }

    pub(super) fn unsupported(found: impl ToString) -> Self {
        Self::Unsupported(found.to_string())
    }

    /// The error of the picture called `name`.
    pub(super) fn of(self, format: PictureFormat, name: &str, limits: &DecodeLimits) -> ImageError {
        let name = name.to_owned();
        match self {
            Self::Truncated => ImageError::Truncated { name, format },
            Self::Damaged(reason) => ImageError::Damaged {
                name,
                format,
                reason,
            },
            Self::Unsupported(found) => ImageError::UnsupportedPixels {
                name,
                format,
                found,
            },
            Self::Volume(sides, planes) => ImageError::Volume {
                name,
                format,
                sides,
                planes: u32::try_from(planes).unwrap_or(u32::MAX),
            },
            Self::NoFrame(frame, frames) => ImageError::NoFrame {
                name,
                format,
                frame,
                frames,
            },
            Self::TooManyPixels(width, height) => {
                let side = |side: u64| u32::try_from(side).unwrap_or(u32::MAX);
                ImageError::TooManyPixels {
                    name,
                    width: side(width),
                    height: side(height),
                    limit: limits.max_decoded_pixels,
                }
            }
            Self::TooMuchMemory => ImageError::TooMuchMemory {
                name,
                limit: limits.max_decoded_bytes,
            },
        }
    }
}

impl From<JpegError> for Refusal {
    fn from(cause: JpegError) -> Self {
        match cause {
            JpegError::Truncated => Self::Truncated,
            JpegError::Damaged(reason) => Self::Damaged(reason),
            JpegError::Unsupported(found) => Self::unsupported(found),
            JpegError::TooMuchMemory => Self::TooMuchMemory,
        }
    }
}

/// Width and height that a header announces, checked against the limits; decoding a pixel holds
/// `bytes_a_pixel`.
///
/// # Errors
/// A side of zero, or one of the limits.
pub(super) fn checked_size(
    width: u64,
    height: u64,
    bytes_a_pixel: u64,
    limits: &DecodeLimits,
) -> Result<(usize, usize), Refusal> {
    if width == 0 || height == 0 {
        return Err(Refusal::Damaged(format!("its size is {width} × {height}")));
    }
    let pixels = width.saturating_mul(height);
    if pixels > limits.max_decoded_pixels || pixels > u64::from(u32::MAX) {
        return Err(Refusal::TooManyPixels(width, height));
    }
    if pixels.saturating_mul(bytes_a_pixel) > limits.max_decoded_bytes {
        return Err(Refusal::TooMuchMemory);
    }
    // Neither side is larger than the product, which fits.
    Ok((width as usize, height as usize))
}

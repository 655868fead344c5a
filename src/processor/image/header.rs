//! Opening a picture: its header checked against the limits, and decoders' errors as ours.

use std::io::{self, BufRead, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{ColorType, ImageDecoder, ImageReader};

use super::error::{ImageError, PictureFormat};
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::dicom::DicomError;

/// Puts what is wrong with a DICOM file into the words of all pictures where there are such.
pub(super) fn dicom_refusal(cause: DicomError, name: &str, limits: &DecodeLimits) -> ImageError {
    let name = name.to_owned();
    let format = PictureFormat::Dicom;
    match cause {
        DicomError::Truncated => ImageError::Truncated { name, format },
        DicomError::Damaged(reason) => ImageError::Damaged {
            name,
            format,
            reason,
        },
        DicomError::TooManyPixels { columns, rows } => ImageError::TooManyPixels {
            name,
            width: columns,
            height: rows,
            limit: limits.max_decoded_pixels,
        },
        DicomError::TooMuchMemory => ImageError::TooMuchMemory {
            name,
            limit: limits.max_decoded_bytes,
        },
        cause => ImageError::Dicom {
            name,
            cause: Box::new(cause),
        },
    }
}

/// # Errors
/// [`ImageError::FileTooLarge`].
pub(super) fn check_file_size(
    bytes: u64,
    name: &str,
    limits: &DecodeLimits,
) -> Result<(), ImageError> {
    let limit = limits.max_file_bytes;
    if bytes > limit {
        return Err(ImageError::FileTooLarge {
            name: name.to_owned(),
            bytes,
            limit,
        });
    }
    Ok(())
}

/// Reason given for a picture whose decoder failed in an unforeseen way.
pub(super) const DECODER_PANIC: &str = "the decoder gave up";

/// Runs a decoder such that a fault inside it costs one picture, not the program.
pub(super) fn guarded<T>(
    format: PictureFormat,
    name: &str,
    run: impl FnOnce() -> Result<T, ImageError>,
) -> Result<T, ImageError> {
    // Nothing the closure could leave half done outlives it.
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| {
        Err(ImageError::Damaged {
            name: name.to_owned(),
            format,
            reason: DECODER_PANIC.to_owned(),
        })
    })
}

/// Reads the header and checks it against the limits.
pub(super) fn open<'a, R: BufRead + Seek + 'a>(
    reader: R,
    format: PictureFormat,
    name: &str,
    limits: &DecodeLimits,
) -> Result<impl ImageDecoder + 'a, ImageError> {
    let Some(decoder_format) = format.decoder_format() else {
        return Err(ImageError::unsupported(
            format,
            name,
            "not one of a plain picture",
        ));
    };
    let mut reader = ImageReader::with_format(reader, decoder_format);
    let mut memory = image::Limits::no_limits();
    memory.max_alloc = Some(limits.max_decoded_bytes);
    reader.limits(memory);
    let decoder = reader
        .into_decoder()
        .map_err(|cause| refusal(cause, format, name, limits))?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        let reason = format!("its size is {width} × {height}");
        return Err(ImageError::Damaged {
            name: name.to_owned(),
            format,
            reason,
        });
    }
    if u64::from(width) * u64::from(height) > limits.max_decoded_pixels {
        let limit = limits.max_decoded_pixels;
        return Err(ImageError::TooManyPixels {
            name: name.to_owned(),
            width,
            height,
            limit,
        });
    }
    if decoder.total_bytes() > limits.max_decoded_bytes {
        let limit = limits.max_decoded_bytes;
        return Err(ImageError::TooMuchMemory {
            name: name.to_owned(),
            limit,
        });
    }
    let color = decoder.color_type();
    if matches!(color, ColorType::Rgb32F | ColorType::Rgba32F) {
        return Err(ImageError::unsupported(format, name, "32-bit fractions"));
    }
    Ok(decoder)
}

/// The orientation in the header; a broken tag is no reason to refuse sound pixels.
///
/// Some writers put the mark of a JPEG's Exif segment before the Exif of a WebP or PNG file.
pub(super) fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    const MARK: &[u8] = b"Exif\0\0";
    let exif = decoder.exif_metadata().ok().flatten();
    let marked = exif.as_deref().and_then(|exif| exif.strip_prefix(MARK));
    marked
        .and_then(Orientation::from_exif_chunk)
        .or_else(|| decoder.orientation().ok())
        .unwrap_or(Orientation::NoTransforms)
}

/// The error of a decoder of the `image` crate.
pub(super) fn refusal(
    cause: image::ImageError,
    format: PictureFormat,
    name: &str,
    limits: &DecodeLimits,
) -> ImageError {
    let name = name.to_owned();
    match cause {
        image::ImageError::IoError(cause) if cause.kind() == io::ErrorKind::UnexpectedEof => {
            ImageError::Truncated { name, format }
        }
        image::ImageError::Limits(_) => ImageError::TooMuchMemory {
            name,
            limit: limits.max_decoded_bytes,
        },
        image::ImageError::Unsupported(cause) => ImageError::unsupported(format, &name, cause),
        other => ImageError::Damaged {
            name,
            format,
            reason: other.to_string(),
        },
    }
}

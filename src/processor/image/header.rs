//! Opening a picture: its header checked against the limits, and decoders' errors as ours.

use std::io::{self, BufRead, Cursor, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{ColorType, ImageDecoder, ImageReader};

use super::coded::{self, CodedHeader};
use super::error::ImageError;
use super::format::PictureFormat;
use super::plane::Plane;
use super::tiff::Tiff;
use super::{gif, nifti, nrrd, pnm};
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::dicom::DicomError;
use crate::processor::jpeg;

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

/// What a header says of a picture, checked against the limits.
pub(super) struct Announced {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) orientation: Orientation,
    /// Bytes that decoding holds, those of the 8-bit RGB picture that remains included.
    pub(super) bytes: u64,
}

/// What the header of any picture but DICOM says.
///
/// # Errors
/// Those of [`super::decode`] that a header can show.
pub(super) fn announced(
    bytes: &[u8],
    format: PictureFormat,
    name: &str,
    limits: &DecodeLimits,
) -> Result<Announced, ImageError> {
    let upright = |(width, height): (usize, usize), bytes| Announced {
        width,
        height,
        orientation: Orientation::NoTransforms,
        bytes,
    };
    let own = match format {
        PictureFormat::Tiff => Tiff::new(bytes).map(|tiff| {
            tiff.header(0, limits).map(|page| Announced {
                orientation: page.orientation,
                ..upright((page.width, page.height), page.bytes)
            })
        }),
        PictureFormat::Gif => {
            Some(gif::size(bytes, limits).map(|size| upright(size, (size.0 * size.1 * 7) as u64)))
        }
        PictureFormat::Pnm => Some(
            pnm::header(bytes, limits)
                .map(|header| upright((header.width, header.height), header.bytes())),
        ),
        PictureFormat::Jpeg2000 => Some(coded::jpeg_2000_header(bytes, limits).map(coded_size)),
        PictureFormat::JpegLs => Some(coded::jpeg_ls_header(bytes, limits).map(coded_size)),
        PictureFormat::Nifti => Some(nifti::header(bytes, limits).map(plane_size)),
        PictureFormat::Nrrd => Some(nrrd::header(bytes, limits).map(plane_size)),
        PictureFormat::Jpeg => jpeg::frame_header(bytes)
            .filter(|header| header.is_lossless || header.precision != 8)
            .map(|header| coded::deep_jpeg_header(&header, limits).map(coded_size)),
        _ => None,
    };
    if let Some(own) = own {
        return own.map_err(|refusal| refusal.of(format, name, limits));
    }
    let mut decoder = open(Cursor::new(bytes), format, name, limits)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    let stored = decoder.total_bytes();
    // Coefficients of a progressive file, 16 bits each.
    let coefficients = match format {
        PictureFormat::Jpeg => 2 * stored,
        _ => 0,
    };
    let orientation = orientation(&mut decoder);
    let rotated = match orientation {
        Orientation::NoTransforms => 0,
        _ => stored,
    };
    Ok(Announced {
        width: width as usize,
        height: height as usize,
        orientation,
        bytes: stored + coefficients.max(rotated) + 3 * pixels,
    })
}

fn coded_size(header: CodedHeader) -> Announced {
    Announced {
        width: header.width,
        height: header.height,
        orientation: Orientation::NoTransforms,
        bytes: header.bytes,
    }
}

fn plane_size(plane: Plane) -> Announced {
    Announced {
        width: plane.width,
        height: plane.height,
        orientation: plane.orientation,
        bytes: plane.bytes_needed(),
    }
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

//! Picture files to RGB pixels: PNG, JPEG, WebP, BMP, TIFF and DICOM, recognised by content.
//!
//! What a pixel becomes follows the reference pipeline (`to_rgb` of `qwen_vl_utils` over Pillow):
//! red, green, blue and alpha are laid on white, and so is 16-bit grey with alpha; 8-bit grey with
//! alpha, and transparency of a palette or of a single colour, lose it as Pillow's `convert("RGB")`
//! does; 16-bit colour keeps its high byte. One deviation: Pillow clips 16-bit grey at 255, which
//! leaves a radiograph white, and here it is scaled to 8 bits, `value / 257` rounded; 16-bit levels
//! that use fewer bits are scaled by the bits in use. JPEG of one and three channels gives
//! Pillow's pixels exactly; JPEG of four channels, and JPEG inside TIFF, may round in
//! another way.
//! The orientation a camera wrote is applied. For grey levels of DICOM see [`super::dicom`].
//!
//! Nothing is allocated for pixels before the header's size has passed [`DecodeLimits`]. This module
//! knows nothing of patches, tensors or windows of grey levels.

mod cost;
mod error;
mod frames;
mod header;
mod rgb;
mod rgb_image;
#[cfg(test)]
mod tests;
mod tiff;

use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, ImageDecoder};

pub use super::decode_limits::DecodeLimits;
use super::dicom;
use super::jpeg::{self, JpegError, jpeg_has_end};
use super::remark::{Remark, RemarkKind};
pub use cost::{DecodingCost, decoding_cost};
pub use error::{ImageError, PictureFormat};
use frames::animation_frames;
use header::{check_file_size, dicom_refusal, guarded, open, orientation, refusal};
use rgb::{Storage, drops_alpha, to_rgb};
pub use rgb_image::RgbImage;
use tiff::{BitOrder, Tiff};

/// A picture, and what a reader of a report on it should know.
#[derive(Debug, Clone)]
pub struct Reading {
    /// The pixels, upright.
    pub picture: RgbImage,
    /// What is no error but should reach whoever reads the report.
    pub remarks: Vec<Remark>,
}

/// Reads and decodes the picture at `path`.
///
/// # Errors
/// Those of [`decode`], and [`ImageError::Read`]; each names the file.
pub fn load(path: &Path, limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    read(path, None, limits).map(|reading| reading.picture)
}

/// Reads and decodes a frame of the picture at `path`; see [`decode_frame`].
///
/// # Errors
/// Those of [`decode_frame`], and [`ImageError::Read`]; each names the file.
pub fn read(
    path: &Path,
    frame: Option<usize>,
    limits: &DecodeLimits,
) -> Result<Reading, ImageError> {
    let name = path.display().to_string();
    decode_frame(&read_bytes(path, limits)?, &name, frame, limits)
}

/// The bytes of the picture at `path`, no more than the limit.
///
/// # Errors
/// [`ImageError::Read`] or [`ImageError::FileTooLarge`]; both name the file.
pub fn read_bytes(path: &Path, limits: &DecodeLimits) -> Result<Vec<u8>, ImageError> {
    let name = path.display().to_string();
    let read = |cause| ImageError::Read {
        name: name.clone(),
        cause,
    };
    let file = File::open(path).map_err(read)?;
    let size = file.metadata().map_err(read)?.len();
    check_file_size(size, &name, limits)?;
    let mut bytes = Vec::with_capacity(size as usize);
    // A file may grow, or be a pipe without a size.
    file.take(limits.max_file_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(read)?;
    check_file_size(bytes.len() as u64, &name, limits)?;
    Ok(bytes)
}

/// Decodes the picture in `bytes`; `name` is its name in messages.
///
/// # Errors
/// Any of the first twelve kinds of [`ImageError`] but [`ImageError::Read`]: empty, too large, of
/// unknown format, cut off or damaged. No content makes it panic.
pub fn decode(bytes: &[u8], name: &str, limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    decode_frame(bytes, name, None, limits).map(|reading| reading.picture)
}

/// Decodes frame `frame`, counted from 1, of the picture in `bytes`.
///
/// Of a DICOM file with several frames one has to be chosen; of a TIFF file the first page is taken otherwise,
/// with a remark. Any other picture counts as one, also an animation, of which the first frame is
/// taken with a remark.
///
/// # Errors
/// As [`decode`], and of a frame that is not there.
pub fn decode_frame(
    bytes: &[u8],
    name: &str,
    frame: Option<usize>,
    limits: &DecodeLimits,
) -> Result<Reading, ImageError> {
    check_file_size(bytes.len() as u64, name, limits)?;
    let format = PictureFormat::of(bytes, name)?;
    let Reading {
        picture,
        mut remarks,
    } = guarded(format, name, || match format {
        PictureFormat::Dicom => decode_dicom(bytes, name, frame, limits),
        _ => decode_plain(bytes, format, name, frame, limits),
    })?;
    let (pixels, _) = picture.pixels().as_chunks::<3>();
    if pixels.iter().all(|pixel| *pixel == pixels[0]) {
        remarks.push(Remark::new(
            RemarkKind::OneColour,
            "all its pixels have one colour: a report on it means nothing",
        ));
    }
    Ok(Reading { picture, remarks })
}

fn decode_dicom(
    bytes: &[u8],
    name: &str,
    frame: Option<usize>,
    limits: &DecodeLimits,
) -> Result<Reading, ImageError> {
    let decoded =
        dicom::decode(bytes, frame, limits).map_err(|cause| dicom_refusal(cause, name, limits))?;
    let mut picture = decoded.picture;
    picture.apply_orientation(decoded.orientation);
    let mut remarks = decoded.remarks;
    let storage = Storage::default();
    let picture = to_rgb(picture, storage, PictureFormat::Dicom, name, &mut remarks)?;
    Ok(Reading { picture, remarks })
}

/// Decodes any picture but DICOM.
fn decode_plain(
    bytes: &[u8],
    format: PictureFormat,
    name: &str,
    frame: Option<usize>,
    limits: &DecodeLimits,
) -> Result<Reading, ImageError> {
    let mut remarks = Vec::new();
    let mut storage = Storage {
        drops_alpha: drops_alpha(format, bytes),
        white_is_zero: false,
    };
    let tiff = Tiff::new(bytes).filter(|_| format == PictureFormat::Tiff);
    let pages = tiff.as_ref().map_or(1, Tiff::page_count);
    if let Some(frame) = frame.filter(|frame| !(1..=pages).contains(frame)) {
        return Err(ImageError::NoFrame {
            name: name.to_owned(),
            format,
            frame,
            frames: pages,
        });
    }
    let first_of = |what| {
        Remark::new(
            RemarkKind::FirstOfSeveralPages,
            format!("it holds {what}, of which the first is used"),
        )
    };
    let frames = animation_frames(format, bytes);
    if frames > 1 {
        remarks.push(first_of(format!("an animation of {frames} frames")));
    }
    if pages > 1 && frame.is_none() {
        remarks.push(first_of(format!("{pages} pages")));
    }
    let mut bytes = Cow::Borrowed(bytes);
    if let Some(tiff) = tiff {
        (bytes, storage.white_is_zero) =
            tiff.page(frame.unwrap_or(1) - 1)
                .map_err(|cause| match cause {
                    BitOrder::Compression => ImageError::unsupported(
                        format,
                        name,
                        "compressed bits in reverse order, FillOrder 2",
                    ),
                    BitOrder::Strips => ImageError::Damaged {
                        name: name.to_owned(),
                        format,
                        reason: "its strips are not where it says".to_owned(),
                    },
                })?;
    }
    if format == PictureFormat::Jpeg {
        check_jpeg(&bytes, name)?;
    }
    let mut decoder = open(Cursor::new(&bytes[..]), format, name, limits)?;
    let orientation = orientation(&mut decoder);
    let jpeg = if format == PictureFormat::Jpeg {
        decode_jpeg(&bytes, name, limits, &mut remarks)?
    } else {
        None
    };
    let mut picture = match jpeg {
        Some(picture) => picture,
        None => DynamicImage::from_decoder(decoder)
            .map_err(|cause| refusal(cause, format, name, limits))?,
    };
    picture.apply_orientation(orientation);
    let picture = to_rgb(picture, storage, format, name, &mut remarks)?;
    Ok(Reading { picture, remarks })
}

/// Refuses a JPEG that is cut off, or of a kind for which decoders have no clear error.
fn check_jpeg(bytes: &[u8], name: &str) -> Result<(), ImageError> {
    let format = PictureFormat::Jpeg;
    if !jpeg_has_end(bytes) {
        return Err(ImageError::Truncated {
            name: name.to_owned(),
            format,
        });
    }
    match jpeg::frame_header(bytes) {
        Some(header) if header.is_lossless => {
            Err(ImageError::unsupported(format, name, "JPEG without loss"))
        }
        Some(header) if header.precision != 8 => {
            let found = format!("levels of {} bits", header.precision);
            Err(ImageError::unsupported(format, name, found))
        }
        _ => Ok(()),
    }
}

/// Decodes a JPEG of one or three channels as the reference does; `None` for one of another kind,
/// which the `image` crate may read.
fn decode_jpeg(
    bytes: &[u8],
    name: &str,
    limits: &DecodeLimits,
    remarks: &mut Vec<Remark>,
) -> Result<Option<DynamicImage>, ImageError> {
    let format = PictureFormat::Jpeg;
    let refused = |cause| {
        let name = name.to_owned();
        match cause {
            JpegError::Truncated => ImageError::Truncated { name, format },
            JpegError::TooMuchMemory => ImageError::TooMuchMemory {
                name,
                limit: limits.max_decoded_bytes,
            },
            JpegError::Unsupported(found) => ImageError::unsupported(format, &name, found),
            JpegError::Damaged(reason) => ImageError::Damaged {
                name,
                format,
                reason,
            },
        }
    };
    let decoded = match jpeg::decode(bytes, None, limits.max_decoded_bytes) {
        Err(JpegError::Unsupported(_)) => return Ok(None),
        decoded => decoded.map_err(refused)?,
    };
    remarks.extend(decoded.damage.remark().map_err(refused)?);
    let (width, height) = (decoded.width as u32, decoded.height as u32);
    Ok(match decoded.pixels {
        jpeg::JpegPixels::Gray(levels) => {
            let levels = levels.into_iter().map(|level| level as u8).collect();
            GrayImage::from_raw(width, height, levels).map(DynamicImage::ImageLuma8)
        }
        jpeg::JpegPixels::Rgb(pixels) => {
            image::RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8)
        }
    })
}

/// The technical tags of the DICOM file in `bytes`, by name; see [`dicom::technical`].
///
/// # Errors
/// [`ImageError::UnknownFormat`] or [`ImageError::NotDicom`] for other files, or a damaged one.
pub fn technical(
    bytes: &[u8],
    name: &str,
    limits: &DecodeLimits,
) -> Result<Vec<(&'static str, String)>, ImageError> {
    let format = PictureFormat::of(bytes, name)?;
    if format != PictureFormat::Dicom {
        return Err(ImageError::NotDicom {
            name: name.to_owned(),
            format,
        });
    }
    guarded(format, name, || {
        dicom::technical(bytes, limits).map_err(|cause| dicom_refusal(cause, name, limits))
    })
}

/// Width and height of the picture at `path` in pixels, upright, from its header alone.
///
/// It meets the limits and is of a kind that is read; its pixels may still be damaged. A DICOM
/// file is read whole, since its header ends where its pixels begin, wherever that is.
///
/// # Errors
/// Those of [`load`] that a header can show.
pub fn probe(path: &Path, limits: &DecodeLimits) -> Result<(usize, usize), ImageError> {
    let name = path.display().to_string();
    let read = |cause| ImageError::Read {
        name: name.clone(),
        cause,
    };
    let file = File::open(path).map_err(read)?;
    check_file_size(file.metadata().map_err(read)?.len(), &name, limits)?;
    let mut reader = BufReader::new(file);
    let format = PictureFormat::of(reader.fill_buf().map_err(read)?, &name)?;
    guarded(format, &name, || {
        let (width, height, orientation) = if format == PictureFormat::Dicom {
            let (width, height, orientation) = dicom::probe(&read_bytes(path, limits)?, limits)
                .map_err(|cause| dicom_refusal(cause, &name, limits))?;
            (width.into(), height.into(), orientation)
        } else {
            let mut decoder = open(reader, format, &name, limits)?;
            let (width, height) = decoder.dimensions();
            (width, height, orientation(&mut decoder))
        };
        let (width, height) = (width as usize, height as usize);
        Ok(match orientation {
            Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH => (height, width),
            _ => (width, height),
        })
    })
}

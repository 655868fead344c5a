//! Picture files to RGB pixels, recognised by content; [`PictureFormat`] lists them.
//!
//! What a pixel becomes follows the reference pipeline (`to_rgb` of `qwen_vl_utils` over Pillow):
//! red, green, blue and alpha are laid on white, and so is 16-bit grey with alpha; 8-bit grey with
//! alpha, and transparency of a palette or of a single colour, lose it as Pillow's `convert("RGB")`
//! does; 16-bit colour keeps its high byte. One deviation: Pillow clips 16-bit grey at 255, which
//! leaves a radiograph white, and here it is scaled to 8 bits, `value / 257` rounded; 16-bit levels
//! that use fewer bits are scaled by the bits in use. Numbers with a sign, fractions and numbers of
//! 32 bits are shown from their 1st to their 99th percentile. JPEG of one and three channels gives
//! Pillow's pixels exactly; JPEG of four channels may round in another way.
//! The orientation a camera wrote is applied. For grey levels of DICOM see [`super::dicom`].
//!
//! Each format that is not the `image` crate's has a module; what it cannot read is a `Refusal`, which gets
//! the file's name here. Nothing is allocated for pixels before the header's size has passed [`DecodeLimits`]. This module
//! knows nothing of patches, tensors or windows of grey levels.

mod coded;
mod cost;
mod error;
mod format;
mod frames;
mod gif;
mod header;
mod measured;
mod nifti;
mod nrrd;
mod plane;
mod pnm;
mod recognise;
mod refusal;
mod rgb;
mod rgb_image;
#[cfg(test)]
mod tests;
mod tiff;

use std::fs::File;
use std::io::{BufRead, BufReader, Cursor, Read};
use std::path::Path;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder};

pub use super::decode_limits::DecodeLimits;
use super::dicom;
use super::jpeg::{self, JpegError, JpegPixels, jpeg_has_end};
use super::remark::{Remark, RemarkKind};
pub use cost::{DecodingCost, decoding_cost};
pub use error::ImageError;
pub use format::{ENDINGS, NAMES, PictureFormat, has_picture_ending};
use frames::animation_frames;
use header::{announced, check_file_size, dicom_refusal, guarded, open, orientation, refusal};
use refusal::Refusal;
use rgb::{Storage, drops_alpha, to_rgb};
pub use rgb_image::RgbImage;
use tiff::Tiff;

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
/// Of a DICOM file with several frames and of a volume one has to be chosen; of a TIFF file the first page is taken otherwise,
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
    let tiff = Tiff::new(bytes).filter(|_| format == PictureFormat::Tiff);
    let pages = tiff.as_ref().map_or(1, Tiff::page_count);
    // Of a volume they are counted where it is read.
    let is_array = matches!(format, PictureFormat::Nifti | PictureFormat::Nrrd);
    if let Some(frame) = frame.filter(|frame| !is_array && !(1..=pages).contains(frame)) {
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
    let refused = |refusal: Refusal| refusal.of(format, name, limits);
    let mut storage = Storage {
        drops_alpha: drops_alpha(format, bytes),
        ..Storage::default()
    };
    let mut hung = Orientation::NoTransforms;
    let mut picture = match (format, tiff) {
        (_, Some(tiff)) => {
            let page = tiff.page(frame.unwrap_or(1) - 1, limits, &mut remarks);
            let page = page.map_err(refused)?;
            hung = page.orientation;
            storage.white_is_zero = page.white_is_zero;
            storage.precision = page.precision;
            page.picture
        }
        (PictureFormat::Gif, _) => gif::decode(bytes, limits).map_err(refused)?,
        (PictureFormat::Pnm, _) => pnm::decode(bytes, limits).map_err(refused)?,
        (PictureFormat::Jpeg2000 | PictureFormat::JpegLs, _) => {
            let coded = match format {
                PictureFormat::JpegLs => coded::jpeg_ls(bytes, limits),
                _ => coded::jpeg_2000(bytes, limits, &mut remarks),
            };
            let coded = coded.map_err(refused)?;
            storage.precision = coded.precision;
            coded.picture
        }
        (PictureFormat::Nifti | PictureFormat::Nrrd, _) => {
            let decoded = match format {
                PictureFormat::Nifti => nifti::decode(bytes, frame, limits, &mut remarks),
                _ => nrrd::decode(bytes, frame, limits, &mut remarks),
            };
            let (picture, plane) = decoded.map_err(refused)?;
            hung = plane.orientation;
            if hung != Orientation::NoTransforms {
                remarks.push(Remark::new(
                    RemarkKind::Turned,
                    "it is turned or mirrored as its axes say, to head up and left on the right",
                ));
            }
            picture
        }
        (PictureFormat::Jpeg, _) => {
            let read = decode_jpeg(bytes, limits, &mut storage, &mut remarks);
            match read.map_err(refused)? {
                Some((picture, orientation)) => {
                    hung = orientation;
                    picture
                }
                None => decode_by_crate(bytes, format, name, limits, &mut hung)?,
            }
        }
        _ => decode_by_crate(bytes, format, name, limits, &mut hung)?,
    };
    picture.apply_orientation(hung);
    let picture = to_rgb(picture, storage, format, name, &mut remarks)?;
    Ok(Reading { picture, remarks })
}

/// Decodes by the `image` crate; `hung` is how the picture has to be rotated or mirrored.
fn decode_by_crate(
    bytes: &[u8],
    format: PictureFormat,
    name: &str,
    limits: &DecodeLimits,
    hung: &mut Orientation,
) -> Result<DynamicImage, ImageError> {
    let mut decoder = open(Cursor::new(bytes), format, name, limits)?;
    *hung = orientation(&mut decoder);
    DynamicImage::from_decoder(decoder).map_err(|cause| refusal(cause, format, name, limits))
}

/// Decodes a JPEG of one or three channels as the reference does, and how it has to be rotated or mirrored;
/// `None` for one of another kind, which the `image` crate may read.
fn decode_jpeg(
    bytes: &[u8],
    limits: &DecodeLimits,
    storage: &mut Storage,
    remarks: &mut Vec<Remark>,
) -> Result<Option<(DynamicImage, Orientation)>, Refusal> {
    if !jpeg_has_end(bytes) {
        return Err(Refusal::Truncated);
    }
    let header = jpeg::frame_header(bytes);
    if let Some(header) = header.filter(|header| header.is_lossless) {
        let coded = coded::jpeg_lossless(bytes, &header, limits)?;
        storage.precision = coded.precision;
        return Ok(Some((coded.picture, Orientation::NoTransforms)));
    }
    let is_deep = header.is_some_and(|header| header.precision != 8);
    let mut hung = Orientation::NoTransforms;
    if let Some(header) = header.filter(|_| is_deep) {
        storage.precision = header.precision.into();
        coded::deep_jpeg_header(&header, limits)?;
    } else if let Ok(mut decoder) = open(Cursor::new(bytes), PictureFormat::Jpeg, "", limits) {
        hung = orientation(&mut decoder);
    } else {
        // The decoder that comes next says what is wrong.
        return Ok(None);
    }
    let decoded = match jpeg::decode(bytes, None, limits.max_decoded_bytes) {
        Err(JpegError::Unsupported(_)) if !is_deep => return Ok(None),
        decoded => decoded?,
    };
    remarks.extend(decoded.damage.remark()?);
    let size = (decoded.width, decoded.height);
    let picture = match decoded.pixels {
        JpegPixels::Gray(levels) => {
            let precision = if is_deep { storage.precision } else { 8 };
            coded::gray(size, precision, levels)?
        }
        JpegPixels::Rgb(pixels) => {
            let picture = image::RgbImage::from_raw(size.0 as u32, size.1 as u32, pixels);
            DynamicImage::ImageRgb8(picture.ok_or(Refusal::Truncated)?)
        }
    };
    Ok(Some((picture, hung)))
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
/// It meets the limits and is of a kind that is read; its pixels may still be damaged. DICOM and TIFF
/// files are read whole, since their headers end wherever their pixels begin, and so are a few others.
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
        } else if let Some(mut decoder) = format
            .decoder_format()
            .and_then(|_| open(reader, format, &name, limits).ok())
        {
            let (width, height) = decoder.dimensions();
            (width as usize, height as usize, orientation(&mut decoder))
        } else {
            let found = announced(&read_bytes(path, limits)?, format, &name, limits)?;
            (found.width, found.height, found.orientation)
        };
        Ok(match orientation {
            Orientation::Rotate90
            | Orientation::Rotate270
            | Orientation::Rotate90FlipH
            | Orientation::Rotate270FlipH => (height, width),
            _ => (width, height),
        })
    })
}

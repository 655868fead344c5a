//! Picture files to RGB pixels: PNG, JPEG, WebP, BMP, TIFF and DICOM, told apart by content.
//!
//! What a pixel becomes follows the reference pipeline (`to_rgb` of `qwen_vl_utils` over Pillow):
//! red, green, blue and alpha are laid on white, and so is 16-bit grey with alpha; 8-bit grey with
//! alpha, and transparency of a palette or of a single colour, lose it as Pillow's `convert("RGB")`
//! does; 16-bit colour keeps its high byte. Two deviations: Pillow clips 16-bit grey at 255, which
//! leaves a radiograph white, and here it is scaled to 8 bits, `value / 257` rounded; and the
//! decoder of JPEG rounds in another way, by up to 4 levels where colour is stored at half size.
//! The orientation a camera wrote is applied. Grey levels of DICOM are [`super::dicom`]'s.
//!
//! Nothing is allocated for pixels before the header's size has passed [`DecodeLimits`]. This module
//! knows nothing of patches, tensors or windows of grey levels.

mod cost;
mod error;
mod jpeg;
#[cfg(test)]
mod tests;

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use image::metadata::Orientation;
use image::{ColorType, DynamicImage, ImageDecoder, ImageReader};

use super::dicom::{self, DicomError};
use super::remark::Remark;
pub use cost::{DecodingCost, decoding_cost};
pub use error::{ImageError, PictureFormat};
pub(super) use jpeg::jpeg_has_end;

/// What a picture from outside may cost, checked before the cost is paid.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DecodeLimits {
    /// Largest file, in bytes.
    pub max_file_bytes: u64,
    /// Largest width times height in a header.
    pub max_decoded_pixels: u64,
    /// Largest buffer of decoded pixels, in bytes.
    pub max_decoded_bytes: u64,
}

impl Default for DecodeLimits {
    /// 512 MiB of file, 200 million pixels, 1 GiB decoded: room for any radiograph, and a scan of
    /// 20,000 × 10,000 pixels in 8-bit colour.
    fn default() -> Self {
        Self {
            max_file_bytes: 512 << 20,
            max_decoded_pixels: 200_000_000,
            max_decoded_bytes: 1 << 30,
        }
    }
}

/// A picture of 8-bit red, green and blue, row by row from the top left.
#[derive(Clone, PartialEq, Eq)]
pub struct RgbImage {
    width: usize,
    height: usize,
    pixels: Vec<u8>,
}

impl fmt::Debug for RgbImage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RgbImage({} × {})", self.width, self.height)
    }
}

impl RgbImage {
    /// Takes `pixels` of layout `[height, width, 3]`.
    ///
    /// # Errors
    /// [`ImageError::PixelCount`] if a side is zero or the length is not `height × width × 3`.
    pub fn from_rgb(width: usize, height: usize, pixels: Vec<u8>) -> Result<Self, ImageError> {
        let expected = width
            .checked_mul(height)
            .and_then(|count| count.checked_mul(3));
        if pixels.is_empty() || expected != Some(pixels.len()) {
            return Err(ImageError::PixelCount {
                width,
                height,
                bytes: pixels.len(),
            });
        }
        Ok(Self {
            width,
            height,
            pixels,
        })
    }

    /// Spreads grey `pixels` of layout `[height, width]` over the three channels.
    ///
    /// # Errors
    /// [`ImageError::PixelCount`] if a side is zero or the length is not `height × width`.
    pub fn from_gray(width: usize, height: usize, pixels: &[u8]) -> Result<Self, ImageError> {
        Self::from_rgb(width, height, spread(pixels.iter().copied()))
    }

    /// Width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Pixels `[height, width, 3]`.
    pub fn pixels(&self) -> &[u8] {
        &self.pixels
    }

    /// Gives the pixels `[height, width, 3]` away.
    pub fn into_pixels(self) -> Vec<u8> {
        self.pixels
    }
}

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
    // A file may grow, or be a pipe that tells no size.
    file.take(limits.max_file_bytes.saturating_add(1))
        .read_to_end(&mut bytes)
        .map_err(read)?;
    check_file_size(bytes.len() as u64, &name, limits)?;
    Ok(bytes)
}

/// Decodes the picture in `bytes`; `name` stands for it in messages.
///
/// # Errors
/// Any of the first twelve kinds of [`ImageError`] but [`ImageError::Read`]: empty, too large, of
/// unknown format, cut off or damaged. No content makes it panic.
pub fn decode(bytes: &[u8], name: &str, limits: &DecodeLimits) -> Result<RgbImage, ImageError> {
    decode_frame(bytes, name, None, limits).map(|reading| reading.picture)
}

/// Decodes frame `frame`, counted from 1, or the only one, of the picture in `bytes`.
///
/// Several frames are known of DICOM alone; any other picture counts as one.
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
    if format == PictureFormat::Dicom {
        return guarded(format, name, || {
            let decoded = dicom::decode(bytes, frame, limits)
                .map_err(|cause| dicom_refusal(cause, name, limits))?;
            let mut picture = decoded.picture;
            picture.apply_orientation(decoded.orientation);
            Ok(Reading {
                picture: to_rgb(picture, true, format, name)?,
                remarks: decoded.remarks,
            })
        });
    }
    if let Some(frame) = frame.filter(|frame| *frame != 1) {
        return Err(ImageError::NoFrame {
            name: name.to_owned(),
            format,
            frame,
        });
    }
    if format == PictureFormat::Jpeg && !jpeg_has_end(bytes) {
        // The decoder would fill the missing part with grey and say nothing.
        return Err(ImageError::Truncated {
            name: name.to_owned(),
            format,
        });
    }
    let picture = guarded(format, name, || {
        let mut decoder = open(Cursor::new(bytes), format, name, limits)?;
        let orientation = orientation(&mut decoder);
        let mut picture = DynamicImage::from_decoder(decoder)
            .map_err(|cause| refusal(cause, format, name, limits))?;
        picture.apply_orientation(orientation);
        to_rgb(picture, drops_alpha(format, bytes), format, name)
    })?;
    Ok(Reading {
        picture,
        remarks: Vec::new(),
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
/// It meets the limits and is of a kind that is read; its pixels may still turn out damaged. A DICOM
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

/// Puts what is wrong with a DICOM file into the words of all pictures where there are such.
fn dicom_refusal(cause: DicomError, name: &str, limits: &DecodeLimits) -> ImageError {
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

fn check_file_size(bytes: u64, name: &str, limits: &DecodeLimits) -> Result<(), ImageError> {
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
const DECODER_PANIC: &str = "the decoder gave up";

/// Runs a decoder such that a fault inside it costs one picture, not the program.
fn guarded<T>(
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

/// Reads the header and holds it against the limits.
fn open<'a, R: BufRead + Seek + 'a>(
    reader: R,
    format: PictureFormat,
    name: &str,
    limits: &DecodeLimits,
) -> Result<impl ImageDecoder + 'a, ImageError> {
    let Some(decoder_format) = format.decoder_format() else {
        return Err(unsupported(format, name, "not one of a plain picture"));
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
        return Err(unsupported(format, name, "32-bit fractions"));
    }
    Ok(decoder)
}

/// The orientation in the header; a broken tag is no reason to refuse sound pixels.
fn orientation(decoder: &mut impl ImageDecoder) -> Orientation {
    decoder.orientation().unwrap_or(Orientation::NoTransforms)
}

fn unsupported(format: PictureFormat, name: &str, found: impl ToString) -> ImageError {
    ImageError::UnsupportedPixels {
        name: name.to_owned(),
        format,
        found: found.to_string(),
    }
}

/// Puts what a decoder says into our words.
fn refusal(
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
        image::ImageError::Unsupported(cause) => unsupported(format, &name, cause),
        other => ImageError::Damaged {
            name,
            format,
            reason: other.to_string(),
        },
    }
}

/// Whether the reference loses the alpha channel of this picture instead of using it.
///
/// Pillow opens a PNG as RGBA, which the reference lays on white, only for colour type 6 and for
/// 16-bit grey with alpha; the decoder used here also makes alpha of a `tRNS` chunk, which Pillow
/// keeps aside.
fn drops_alpha(format: PictureFormat, bytes: &[u8]) -> bool {
    /// Bit depth and colour type follow width and height in the first chunk.
    const DEPTH_AND_COLOR: std::ops::Range<usize> = 24..26;
    const GRAY_WITH_ALPHA: u8 = 4;
    const TRUECOLOR_WITH_ALPHA: u8 = 6;
    let kept = matches!(
        bytes.get(DEPTH_AND_COLOR),
        Some([_, TRUECOLOR_WITH_ALPHA] | [16, GRAY_WITH_ALPHA])
    );
    format == PictureFormat::Png && !kept
}

/// Decoded pixels of any kind as 8-bit RGB.
fn to_rgb(
    picture: DynamicImage,
    drops_alpha: bool,
    format: PictureFormat,
    name: &str,
) -> Result<RgbImage, ImageError> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let high = |value: u16| (value >> 8) as u8;
    let rgb = |[red, green, blue, alpha]: [u8; 4]| {
        [red, green, blue].map(|value| {
            if drops_alpha {
                value
            } else {
                over_white(value, alpha)
            }
        })
    };
    let pixels = match picture {
        DynamicImage::ImageRgb8(buffer) => buffer.into_raw(),
        DynamicImage::ImageLuma8(buffer) => spread(buffer.into_raw().into_iter()),
        DynamicImage::ImageLumaA8(buffer) => spread(buffer.pixels().map(|pixel| pixel.0[0])),
        DynamicImage::ImageRgba8(buffer) => {
            buffer.pixels().flat_map(|pixel| rgb(pixel.0)).collect()
        }
        DynamicImage::ImageLuma16(buffer) => spread(buffer.into_raw().into_iter().map(gray_to_u8)),
        DynamicImage::ImageLumaA16(buffer) => spread(buffer.pixels().map(|pixel| {
            let [gray, alpha] = pixel.0;
            if drops_alpha {
                gray_to_u8(gray)
            } else {
                over_white(high(gray), high(alpha))
            }
        })),
        DynamicImage::ImageRgb16(buffer) => buffer.into_raw().into_iter().map(high).collect(),
        DynamicImage::ImageRgba16(buffer) => buffer
            .pixels()
            .flat_map(|pixel| rgb(pixel.0.map(high)))
            .collect(),
        other => return Err(unsupported(format, name, format!("{:?}", other.color()))),
    };
    RgbImage::from_rgb(width, height, pixels)
}

/// One level of colour on white paper, in Pillow's integers.
///
/// Source: `BLEND` and `DIV255`, Pillow, `ImagingUtils.h`.
fn over_white(value: u8, alpha: u8) -> u8 {
    let sum = 255 * (255 - u32::from(alpha)) + u32::from(value) * u32::from(alpha) + 128;
    (((sum >> 8) + sum) >> 8) as u8
}

/// The whole range of 16-bit grey on the whole range of 8 bits, rounded.
fn gray_to_u8(value: u16) -> u8 {
    ((u32::from(value) + 128) / 257) as u8
}

fn spread(gray: impl ExactSizeIterator<Item = u8>) -> Vec<u8> {
    let mut pixels = vec![0; gray.len() * 3];
    for (pixel, value) in pixels.as_chunks_mut::<3>().0.iter_mut().zip(gray) {
        *pixel = [value; 3];
    }
    pixels
}

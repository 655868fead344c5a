//! Pictures that are one coded stream: JPEG 2000, JPEG-LS, and JPEG of 12 bits or without loss.

use image::{DynamicImage, GrayImage, ImageBuffer, Luma, RgbImage, RgbaImage};
use jpeg_decoder::ColorTransform;

use super::measured;
use super::refusal::{Refusal, checked_size};
use super::rgb::cmyk_to_rgb;
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::jpeg::{FrameHeader, JpegError};
use crate::processor::jpeg_2000::{self, Channel, Colours, WORKING_BYTES};
use crate::processor::jpeg_lossless::{self, LosslessPixels};
use crate::processor::jpeg_ls;
use crate::processor::remark::Remark;

/// A picture and the bits of its numbers.
pub(super) struct Coded {
    pub(super) picture: DynamicImage,
    pub(super) precision: u32,
}

/// Size and memory of a picture, by its header.
pub(super) struct CodedHeader {
    pub(super) width: usize,
    pub(super) height: usize,
    /// Bytes that decoding it holds.
    pub(super) bytes: u64,
}

fn checked(
    (width, height): (u64, u64),
    bytes_a_pixel: u64,
    limits: &DecodeLimits,
) -> Result<CodedHeader, Refusal> {
    let (width, height) = checked_size(width, height, bytes_a_pixel, limits)?;
    Ok(CodedHeader {
        width,
        height,
        bytes: bytes_a_pixel * (width * height) as u64,
    })
}

/// The header of a JPEG 2000 picture, checked against the limits.
///
/// # Errors
/// A header that is damaged, or one of the limits.
pub(super) fn jpeg_2000_header(
    bytes: &[u8],
    limits: &DecodeLimits,
) -> Result<CodedHeader, Refusal> {
    /// A palette makes as many of one.
    const MOST_COLOURS: u64 = 4;
    let found = jpeg_2000::header(bytes)?;
    let channels = (found.channels as u64).max(MOST_COLOURS);
    let size = (found.width.into(), found.height.into());
    checked(size, WORKING_BYTES * channels + 4, limits)
}

/// Decodes a JPEG 2000 picture; remarks on it are added to `remarks`.
///
/// # Errors
/// Any [`Refusal`].
pub(super) fn jpeg_2000(
    bytes: &[u8],
    limits: &DecodeLimits,
    remarks: &mut Vec<Remark>,
) -> Result<Coded, Refusal> {
    jpeg_2000_header(bytes, limits)?;
    let signed = jpeg_2000::header(bytes)?.signed;
    let decoded = jpeg_2000::decode(bytes, true)?;
    let (width, height) = (decoded.width, decoded.height);
    let channels = &decoded.channels[..];
    let precision = channels[0].bits;
    let level = |channel: &Channel, at: usize| {
        let top = ((1_u32 << channel.bits) - 1) as f32;
        let value = channel.samples[at].round().clamp(0.0, top);
        match channel.bits {
            8 => value as u8,
            // The high byte of what is deeper, as of any colour of 16 bits.
            9.. => (value as u32 >> (channel.bits - 8)) as u8,
            _ => (value * 255.0 / top).round() as u8,
        }
    };
    let pixels = 0..channels[0].samples.len();
    let kind = match (decoded.colours, channels.len()) {
        (Colours::Gray, _) | (_, 1 | 2) => Colours::Gray,
        (Colours::Cmyk, 4..) => Colours::Cmyk,
        (_, 3..) => Colours::Rgb,
        (_, count) => return Err(Refusal::Unsupported(format!("{count} channels"))),
    };
    let picture = match kind {
        Colours::Gray if signed => {
            let half = f64::from(1_u32 << (precision - 1));
            let values: Vec<f64> = channels[0]
                .samples
                .iter()
                .map(|v| f64::from(*v) - half)
                .collect();
            GrayImage::from_raw(width, height, measured::levels(&values, false, remarks))
                .map(DynamicImage::ImageLuma8)
        }
        Colours::Gray if precision > 8 => {
            let numbers = channels[0].samples.iter().map(|value| value.round() as u16);
            ImageBuffer::<Luma<u16>, _>::from_raw(width, height, numbers.collect())
                .map(DynamicImage::ImageLuma16)
        }
        Colours::Gray => {
            let gray = pixels.map(|at| level(&channels[0], at)).collect();
            GrayImage::from_raw(width, height, gray).map(DynamicImage::ImageLuma8)
        }
        Colours::Cmyk => {
            let colours = pixels.flat_map(|at| {
                cmyk_to_rgb([0, 1, 2, 3].map(|channel: usize| level(&channels[channel], at)))
            });
            RgbImage::from_raw(width, height, colours.collect()).map(DynamicImage::ImageRgb8)
        }
        // Four channels that nothing is said of are taken for colours and alpha, as by Pillow.
        _ if channels.len() == 4 || (decoded.has_alpha && channels.len() > 3) => {
            let colours = pixels
                .flat_map(|at| [0, 1, 2, 3].map(|channel: usize| level(&channels[channel], at)));
            RgbaImage::from_raw(width, height, colours.collect()).map(DynamicImage::ImageRgba8)
        }
        _ => {
            let colours =
                pixels.flat_map(|at| [0, 1, 2].map(|channel: usize| level(&channels[channel], at)));
            RgbImage::from_raw(width, height, colours.collect()).map(DynamicImage::ImageRgb8)
        }
    };
    Ok(Coded {
        picture: picture.ok_or(Refusal::Truncated)?,
        precision,
    })
}

/// The header of a JPEG-LS picture, checked against the limits.
///
/// # Errors
/// A header that is damaged or of a kind that is not read, or one of the limits.
pub(super) fn jpeg_ls_header(bytes: &[u8], limits: &DecodeLimits) -> Result<CodedHeader, Refusal> {
    let found = jpeg_ls::header(bytes)?;
    let size = (found.width as u64, found.height as u64);
    checked(size, 4 * found.channels as u64 + 3, limits)
}

/// Decodes a JPEG-LS picture.
///
/// # Errors
/// Any [`Refusal`].
pub(super) fn jpeg_ls(bytes: &[u8], limits: &DecodeLimits) -> Result<Coded, Refusal> {
    jpeg_ls_header(bytes, limits)?;
    let decoded = jpeg_ls::decode(bytes)?;
    let (header, numbers) = (decoded.header, decoded.numbers);
    let picture = match header.channels {
        1 => gray((header.width, header.height), header.precision, numbers)?,
        3 => {
            let top = (1_u32 << header.precision) - 1;
            let level = |number: u16| match header.precision {
                8.. => (number >> (header.precision - 8)) as u8,
                _ => ((u32::from(number) * 255 + top / 2) / top) as u8,
            };
            let pixels = numbers.into_iter().map(level).collect();
            let picture = RgbImage::from_raw(header.width as u32, header.height as u32, pixels);
            DynamicImage::ImageRgb8(picture.ok_or(Refusal::Truncated)?)
        }
        count => return Err(Refusal::Unsupported(format!("{count} channels"))),
    };
    Ok(Coded {
        picture,
        precision: header.precision,
    })
}

/// Grey numbers of `precision` bits as a picture of 8 or 16.
pub(super) fn gray(
    (width, height): (usize, usize),
    precision: u32,
    numbers: Vec<u16>,
) -> Result<DynamicImage, Refusal> {
    let (width, height) = (width as u32, height as u32);
    let picture = if precision > 8 {
        ImageBuffer::from_raw(width, height, numbers).map(DynamicImage::ImageLuma16)
    } else {
        let top = (1_u32 << precision) - 1;
        let level = |number: u16| ((u32::from(number) * 255 + top / 2) / top) as u8;
        let levels = numbers.into_iter().map(level).collect();
        GrayImage::from_raw(width, height, levels).map(DynamicImage::ImageLuma8)
    };
    picture.ok_or(Refusal::Truncated)
}

/// Size and memory of a JPEG that the `image` crate does not open: of 12 bits, or without loss.
///
/// # Errors
/// One of the limits.
pub(super) fn deep_jpeg_header(
    header: &FrameHeader,
    limits: &DecodeLimits,
) -> Result<CodedHeader, Refusal> {
    // Three channels of 16 bits, coefficients or bytes, and the picture.
    checked((header.width.into(), header.height.into()), 15, limits)
}

/// Decodes a JPEG without loss.
///
/// # Errors
/// Any [`Refusal`].
pub(super) fn jpeg_lossless(
    bytes: &[u8],
    header: &FrameHeader,
    limits: &DecodeLimits,
) -> Result<Coded, Refusal> {
    let size = deep_jpeg_header(header, limits)?;
    let pixels = size.width * size.height;
    // Colours are stored as they are where nothing says otherwise.
    let decoded = jpeg_lossless::decode(bytes, ColorTransform::RGB, pixels * 6)?;
    let precision = u32::from(header.precision);
    let short = || Refusal::from(JpegError::Truncated);
    let picture = match decoded {
        LosslessPixels::Gray(numbers)
            if numbers.len() == pixels && (2..=16).contains(&precision) =>
        {
            gray((size.width, size.height), precision, numbers)?
        }
        LosslessPixels::Gray(_) => return Err(short()),
        LosslessPixels::Rgb(colours) => {
            let picture = RgbImage::from_raw(size.width as u32, size.height as u32, colours);
            DynamicImage::ImageRgb8(picture.ok_or_else(short)?)
        }
    };
    Ok(Coded { picture, precision })
}

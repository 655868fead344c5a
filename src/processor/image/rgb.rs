//! Decoded pixels of any kind to 8-bit red, green and blue.

use image::DynamicImage;

use super::error::ImageError;
use super::format::PictureFormat;
use super::rgb_image::{RgbImage, spread};
use crate::processor::remark::{Remark, RemarkKind};

/// How a file stores its pixels.
#[derive(Debug, Clone, Copy)]
pub(super) struct Storage {
    /// Whether the reference loses the alpha channel instead of using it.
    pub(super) drops_alpha: bool,
    /// Whether the decoder inverted grey, because the lowest stored level is white.
    pub(super) white_is_zero: bool,
    /// Bits that the file states for levels of more than 8.
    pub(super) precision: u32,
}

impl Default for Storage {
    fn default() -> Self {
        Self {
            drops_alpha: false,
            white_is_zero: false,
            precision: u16::BITS,
        }
    }
}

/// Whether the reference loses the alpha channel of this picture instead of using it.
///
/// Pillow opens a PNG as RGBA, which the reference lays on white, only for colour type 6 and for
/// 16-bit grey with alpha; the decoder used here also makes alpha of a `tRNS` chunk, which Pillow
/// keeps aside.
pub(super) fn drops_alpha(format: PictureFormat, bytes: &[u8]) -> bool {
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

/// Decoded pixels of any kind as 8-bit RGB; remarks on them are added to `remarks`.
pub(super) fn to_rgb(
    picture: DynamicImage,
    storage: Storage,
    format: PictureFormat,
    name: &str,
    remarks: &mut Vec<Remark>,
) -> Result<RgbImage, ImageError> {
    let (width, height) = (picture.width() as usize, picture.height() as usize);
    let Storage {
        drops_alpha,
        white_is_zero,
        precision,
    } = storage;
    let rgb = |[red, green, blue, alpha]: [u8; 4]| {
        [red, green, blue].map(|value| {
            if drops_alpha {
                value
            } else {
                over_white(value, alpha)
            }
        })
    };
    let deep = UsedBits::of(&picture, white_is_zero, precision);
    let high = |value: u16| (value >> 8) as u8;
    let pixels = match picture {
        DynamicImage::ImageRgb8(buffer) => buffer.into_raw(),
        DynamicImage::ImageLuma8(buffer) => spread(buffer.into_raw().into_iter()),
        DynamicImage::ImageLumaA8(buffer) => spread(buffer.pixels().map(|pixel| pixel.0[0])),
        DynamicImage::ImageRgba8(buffer) => {
            buffer.pixels().flat_map(|pixel| rgb(pixel.0)).collect()
        }
        DynamicImage::ImageLuma16(buffer) => {
            spread(buffer.into_raw().into_iter().map(|value| deep.gray(value)))
        }
        DynamicImage::ImageLumaA16(buffer) => spread(buffer.pixels().map(|pixel| {
            let [gray, alpha] = pixel.0;
            if drops_alpha {
                deep.gray(gray)
            } else {
                over_white(deep.colour(gray), high(alpha))
            }
        })),
        DynamicImage::ImageRgb16(buffer) => buffer
            .into_raw()
            .into_iter()
            .map(|value| deep.colour(value))
            .collect(),
        DynamicImage::ImageRgba16(buffer) => buffer
            .pixels()
            .flat_map(|pixel| {
                let [red, green, blue, alpha] = pixel.0;
                let [red, green, blue] = [red, green, blue].map(|value| deep.colour(value));
                rgb([red, green, blue, high(alpha)])
            })
            .collect(),
        other => {
            return Err(ImageError::unsupported(
                format,
                name,
                format!("{:?}", other.color()),
            ));
        }
    };
    remarks.extend(deep.remark());
    RgbImage::from_rgb(width, height, pixels)
}

/// How many of its bits, 16 if it states no other number, a picture of more than 8 uses.
///
/// Detectors give 10 to 15 bits, and exporters put these into 16 unscaled: shown as they are, such a
/// radiograph is nearly black. So a picture whose highest level leaves bits unused is shown by the bits
/// in use, 8 at least; one that reaches the upper half of the range is shown by all 16.
#[derive(Debug, Clone, Copy)]
struct UsedBits {
    bits: u32,
    highest: u16,
    white_is_zero: bool,
    precision: u32,
}

impl UsedBits {
    fn of(picture: &DynamicImage, white_is_zero: bool, precision: u32) -> Self {
        let highest = match picture {
            // Inverted back to what is stored, the lowest is the highest.
            DynamicImage::ImageLuma16(buffer) if white_is_zero => {
                buffer.iter().min().map(|lowest| u16::MAX - lowest)
            }
            DynamicImage::ImageLuma16(buffer) => buffer.iter().max().copied(),
            DynamicImage::ImageLumaA16(buffer) => buffer.pixels().map(|pixel| pixel.0[0]).max(),
            DynamicImage::ImageRgb16(buffer) => buffer.iter().max().copied(),
            DynamicImage::ImageRgba16(buffer) => {
                let colours = buffer
                    .pixels()
                    .flat_map(|pixel| pixel.0.into_iter().take(3));
                colours.max()
            }
            _ => None,
        };
        let highest = highest.unwrap_or(u16::MAX);
        let precision = precision.clamp(8, u16::BITS);
        Self {
            bits: (u16::BITS - highest.leading_zeros()).max(8),
            highest,
            white_is_zero,
            precision,
        }
    }

    /// Grey on the whole range of 8 bits, rounded.
    fn gray(self, value: u16) -> u8 {
        let stored = if self.white_is_zero {
            u16::MAX - value
        } else {
            value
        };
        let top = u32::from(u16::MAX >> (u16::BITS - self.bits));
        let level = ((u32::from(stored) * 255 + top / 2) / top) as u8;
        if self.white_is_zero {
            255 - level
        } else {
            level
        }
    }

    /// Colour by its 8 highest bits in use, as Pillow does with 16.
    fn colour(self, value: u16) -> u8 {
        (value >> (self.bits - 8)) as u8
    }

    fn remark(self) -> Option<Remark> {
        let Self {
            bits,
            highest,
            precision,
            ..
        } = self;
        (bits < precision).then(|| {
            Remark::new(
                RemarkKind::NarrowRange,
                format!(
                    "its {precision}-bit levels use {bits} bits (the highest is {highest}); these are shown as the whole range"
                ),
            )
        })
    }
}

/// One level of colour on white paper, in Pillow's integers.
///
/// Source: `BLEND` and `DIV255`, Pillow, `ImagingUtils.h`.
fn over_white(value: u8, alpha: u8) -> u8 {
    let sum = 255 * (255 - u32::from(alpha)) + u32::from(value) * u32::from(alpha) + 128;
    (((sum >> 8) + sum) >> 8) as u8
}

/// Cyan, magenta, yellow and black as red, green and blue, in Pillow's integers.
///
/// Source: `cmyk2rgb`, Pillow, `Convert.c`.
pub(super) fn cmyk_to_rgb([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    let light = 255 - u32::from(black);
    [cyan, magenta, yellow].map(|ink| {
        let product = u32::from(ink) * light + 128;
        (light - (((product >> 8) + product) >> 8)) as u8
    })
}

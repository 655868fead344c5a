//! The numbers of a page to a picture, by what they mean.

use image::{DynamicImage, GrayImage, ImageBuffer, Luma, Rgb, RgbImage, Rgba, RgbaImage};

use super::super::measured;
use super::super::refusal::Refusal;
use super::super::rgb::cmyk_to_rgb;
use super::chunks::PageValues;
use super::directory::{Directory, Tiff, tag};
use super::layout::{Alpha, Layout, Photometric};
use crate::processor::remark::Remark;

/// The picture that `numbers` make; remarks on it are added to `remarks`.
///
/// # Errors
/// A palette that is missing or too short.
pub(super) fn picture(
    tiff: &Tiff<'_>,
    directory: &Directory,
    layout: &Layout,
    numbers: PageValues,
    remarks: &mut Vec<Remark>,
) -> Result<DynamicImage, Refusal> {
    let levels = match numbers {
        PageValues::Levels(levels) => levels,
        PageValues::Measured(values) => {
            let shown = measured::levels(&values, layout.white_is_zero(), remarks);
            let size = (layout.width as u32, layout.height as u32);
            return GrayImage::from_raw(size.0, size.1, shown)
                .map(DynamicImage::ImageLuma8)
                .ok_or(Refusal::Truncated);
        }
    };
    let pixels = || levels.chunks_exact(layout.samples);
    let (width, height) = (layout.width as u32, layout.height as u32);
    let rgb8 =
        |pixels: Vec<u8>| RgbImage::from_raw(width, height, pixels).map(DynamicImage::ImageRgb8);
    let eight = EightBits::of(layout);
    let made = match layout.photometric {
        Photometric::WhiteIsZero | Photometric::BlackIsZero if layout.bits > 8 => {
            let inverted = if layout.white_is_zero() { u16::MAX } else { 0 };
            let gray = pixels().map(|pixel| pixel[0] ^ inverted).collect();
            ImageBuffer::<Luma<u16>, _>::from_raw(width, height, gray)
                .map(DynamicImage::ImageLuma16)
        }
        Photometric::WhiteIsZero | Photometric::BlackIsZero => {
            let inverted = if layout.white_is_zero() { u8::MAX } else { 0 };
            let gray = pixels().map(|pixel| eight.level(pixel[0]) ^ inverted);
            GrayImage::from_raw(width, height, gray.collect()).map(DynamicImage::ImageLuma8)
        }
        Photometric::Rgb if layout.alpha != Alpha::None => {
            rgba(layout, &levels, eight, (width, height))
        }
        Photometric::Rgb if layout.bits == 16 => {
            let colours = pixels().flat_map(|pixel| pixel[..3].iter().copied());
            ImageBuffer::<Rgb<u16>, _>::from_raw(width, height, colours.collect())
                .map(DynamicImage::ImageRgb16)
        }
        Photometric::Rgb => rgb8(three(pixels(), |number| eight.level(number))),
        // The stream's own colours are red, green and blue by now.
        Photometric::YCbCr { .. } if layout.compression.is_jpeg() => {
            rgb8(three(pixels(), |number| number as u8))
        }
        Photometric::YCbCr { .. } => {
            let conversion = YCbCr::new(tiff, directory);
            let colours = pixels().flat_map(|pixel| conversion.rgb(pixel));
            rgb8(colours.collect())
        }
        Photometric::Palette => {
            let palette = palette(tiff, directory, layout)?;
            let colours = pixels().flat_map(|pixel| palette[usize::from(pixel[0])]);
            rgb8(colours.collect())
        }
        Photometric::Cmyk => rgb8(pixels().flat_map(|pixel| cmyk(layout, pixel)).collect()),
        Photometric::CieLab => rgb8(pixels().flat_map(lab).collect()),
    };
    made.ok_or(Refusal::Truncated)
}

fn three<'a>(pixels: impl Iterator<Item = &'a [u16]>, level: impl Fn(u16) -> u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(pixels.size_hint().0 * 3);
    for pixel in pixels {
        bytes.extend(pixel[..3].iter().map(|number| level(*number)));
    }
    bytes
}

/// Numbers of fewer or more than 8 bits on the whole range of 8.
#[derive(Clone, Copy)]
struct EightBits {
    highest: u32,
}

impl EightBits {
    fn of(layout: &Layout) -> Self {
        Self {
            highest: (1 << layout.bits.min(16)) - 1,
        }
    }

    fn level(self, number: u16) -> u8 {
        if self.highest == 255 {
            return number as u8;
        }
        ((u32::from(number) * 255 + self.highest / 2) / self.highest) as u8
    }
}

fn rgba(
    layout: &Layout,
    levels: &[u16],
    eight: EightBits,
    (width, height): (u32, u32),
) -> Option<DynamicImage> {
    let pixels = levels.chunks_exact(layout.samples);
    if layout.bits == 16 && layout.alpha == Alpha::Unassociated {
        let colours = pixels.flat_map(|pixel| pixel[..4].iter().copied());
        return ImageBuffer::<Rgba<u16>, _>::from_raw(width, height, colours.collect())
            .map(DynamicImage::ImageRgba16);
    }
    let colours = pixels.flat_map(|pixel| {
        let level = |number: u16| match layout.bits {
            // The high byte, as Pillow takes it.
            16 => (number >> 8) as u8,
            _ => eight.level(number),
        };
        let alpha = level(pixel[3]);
        // Source: `rgba2rgbA`'s reverse `rgbA2rgba`, Pillow, `Convert.c`.
        let colour = |number: u16| match (layout.alpha, alpha) {
            (Alpha::Associated, 1..=254) => {
                (255 * u32::from(level(number)) / u32::from(alpha)).min(255) as u8
            }
            _ => level(number),
        };
        [colour(pixel[0]), colour(pixel[1]), colour(pixel[2]), alpha]
    });
    RgbaImage::from_raw(width, height, colours.collect()).map(DynamicImage::ImageRgba8)
}

/// The colours of a palette, one for each number there can be.
fn palette(
    tiff: &Tiff<'_>,
    directory: &Directory,
    layout: &Layout,
) -> Result<Vec<[u8; 3]>, Refusal> {
    let count = 1 << layout.bits;
    let values = tiff.values(directory, tag::COLOR_MAP);
    let values = values.filter(|values| values.len() >= 3 * count);
    let values = values.ok_or_else(|| Refusal::damaged("its ColorMap is missing or too short"))?;
    // Some writers put 8 bits where 16 belong, as libtiff knows.
    let shift = if values.iter().all(|value| *value < 256) {
        0
    } else {
        8
    };
    let colour = |at: usize| (values[at] >> shift) as u8;
    let stride = values.len() / 3;
    Ok((0..count)
        .map(|at| [colour(at), colour(stride + at), colour(2 * stride + at)])
        .collect())
}

fn cmyk(layout: &Layout, pixel: &[u16]) -> [u8; 3] {
    cmyk_to_rgb([0, 1, 2, 3].map(|at: usize| match layout.bits {
        16 => (pixel[at] >> 8) as u8,
        _ => pixel[at] as u8,
    }))
}

/// From luminance and colour differences to red, green and blue.
///
/// Source: TIFF 6.0, sections 20 and 21; `TIFFYCbCrToRGBInit`, libtiff, `tif_color.c`.
struct YCbCr {
    red: f64,
    green: f64,
    blue: f64,
    /// Lowest and highest of each sample.
    range: [f64; 6],
}

impl YCbCr {
    fn new(tiff: &Tiff<'_>, directory: &Directory) -> Self {
        let luma = tiff.fractions(directory, tag::YCBCR_COEFFICIENTS);
        let (red, green, blue) = match luma.as_deref() {
            Some([red, green, blue]) if *green > 0.0 => (*red, *green, *blue),
            _ => (0.299, 0.587, 0.114),
        };
        let range = tiff.fractions(directory, tag::REFERENCE_BLACK_WHITE);
        let range = range.and_then(|range| <[f64; 6]>::try_from(range).ok());
        let usable = |range: &[f64; 6]| {
            range
                .as_chunks::<2>()
                .0
                .iter()
                .all(|[low, high]| low < high)
        };
        Self {
            red,
            green,
            blue,
            range: range
                .filter(usable)
                .unwrap_or([0.0, 255.0, 128.0, 255.0, 128.0, 255.0]),
        }
    }

    fn rgb(&self, pixel: &[u16]) -> [u8; 3] {
        let value = |at: usize, span: f64| {
            let [low, high] = [self.range[2 * at], self.range[2 * at + 1]];
            (f64::from(pixel[at]) - low) * span / (high - low)
        };
        let (light, blue, red) = (value(0, 255.0), value(1, 127.0), value(2, 127.0));
        let r = light + red * (2.0 - 2.0 * self.red);
        let b = light + blue * (2.0 - 2.0 * self.blue);
        let g = (light - self.red * r - self.blue * b) / self.green;
        [r, g, b].map(|level| level.clamp(0.0, 255.0).round() as u8)
    }
}

/// CIE L*a*b* under D50 as sRGB.
///
/// Source: TIFF 6.0, section 23; IEC 61966-2-1 with Bradford's adaptation to D50, as ICC profiles hold it.
fn lab(pixel: &[u16]) -> [u8; 3] {
    const WHITE: [f64; 3] = [0.964_22, 1.0, 0.825_21];
    const TO_LINEAR: [[f64; 3]; 3] = [
        [3.133_856_1, -1.616_866_7, -0.490_614_6],
        [-0.978_768_4, 1.916_141_5, 0.033_454_0],
        [0.071_945_3, -0.228_991_4, 1.405_242_7],
    ];
    let signed = |number: u16| f64::from(number as u8 as i8);
    let light = (f64::from(pixel[0]) * 100.0 / 255.0 + 16.0) / 116.0;
    let parts = [
        light + signed(pixel[1]) / 500.0,
        light,
        light - signed(pixel[2]) / 200.0,
    ];
    let cube = |part: f64| {
        if part > 6.0 / 29.0 {
            part * part * part
        } else {
            (part - 16.0 / 116.0) * 108.0 / 841.0
        }
    };
    let xyz = [0, 1, 2].map(|at| cube(parts[at]) * WHITE[at]);
    TO_LINEAR.map(|row| {
        let linear: f64 = row
            .iter()
            .zip(xyz)
            .map(|(weight, part)| weight * part)
            .sum();
        let linear = linear.clamp(0.0, 1.0);
        let level = if linear <= 0.003_130_8 {
            12.92 * linear
        } else {
            1.055 * linear.powf(1.0 / 2.4) - 0.055
        };
        (level * 255.0).round() as u8
    })
}

//! Portable bitmaps, graymaps and pixmaps, plain and raw: `P1` to `P6`.
//!
//! Levels are scaled to 8 bits by the highest that the header states, as Pillow does; those of 16 bits are
//! left to the rule of all such pictures.
//!
//! Source: the manual pages of Netpbm, pbm(5), pgm(5) and ppm(5).

use image::{DynamicImage, GrayImage, ImageBuffer, Luma, Rgb, RgbImage};

use super::refusal::{Refusal, checked_size};
use crate::processor::decode_limits::DecodeLimits;

/// What precedes the pixels.
pub(super) struct PnmHeader<'a> {
    pub(super) width: usize,
    pub(super) height: usize,
    channels: usize,
    /// The highest level.
    highest: u32,
    /// Whether levels are words of digits.
    is_plain: bool,
    is_bitmap: bool,
    rest: Words<'a>,
}

impl PnmHeader<'_> {
    /// Bytes that decoding holds.
    pub(super) fn bytes(&self) -> u64 {
        (self.width * self.height * (3 * self.channels + 3)) as u64
    }
}

/// Whether `bytes` begin as such a picture does.
pub(super) fn is_pnm(bytes: &[u8]) -> bool {
    matches!(
        bytes,
        [b'P', b'1'..=b'6', b' ' | b'\t' | b'\r' | b'\n' | b'#', ..]
    )
}

/// Words between blanks and comments.
struct Words<'a> {
    bytes: &'a [u8],
}

impl<'a> Words<'a> {
    /// Skips blanks and comments.
    fn skip(&mut self) {
        loop {
            match self.bytes {
                [b'#', ..] => {
                    let end = self
                        .bytes
                        .iter()
                        .position(|byte| matches!(byte, b'\n' | b'\r'));
                    self.bytes = &self.bytes[end.unwrap_or(self.bytes.len())..];
                }
                [byte, rest @ ..] if byte.is_ascii_whitespace() => self.bytes = rest,
                _ => return,
            }
        }
    }

    fn number(&mut self) -> Result<u32, Refusal> {
        self.skip();
        let length = self
            .bytes
            .iter()
            .take_while(|byte| byte.is_ascii_digit())
            .count();
        let (digits, rest) = self.bytes.split_at(length);
        if digits.is_empty() {
            return Err(match rest {
                [] => Refusal::Truncated,
                _ => Refusal::damaged("a number is expected and not there"),
            });
        }
        self.bytes = rest;
        let text = std::str::from_utf8(digits).unwrap_or_default();
        text.parse()
            .map_err(|_| Refusal::damaged("a number is too large"))
    }

    /// A digit of a plain bitmap, where none needs a blank after it.
    fn bit(&mut self) -> Result<u32, Refusal> {
        self.skip();
        match self.bytes {
            [bit @ (b'0' | b'1'), rest @ ..] => {
                self.bytes = rest;
                Ok((bit - b'0').into())
            }
            [] => Err(Refusal::Truncated),
            _ => Err(Refusal::damaged("a bit is neither 0 nor 1")),
        }
    }
}

/// The header of a picture, checked against the limits.
///
/// # Errors
/// A header that is cut off or damaged, or one of the limits.
pub(super) fn header<'a>(bytes: &'a [u8], limits: &DecodeLimits) -> Result<PnmHeader<'a>, Refusal> {
    let kind = *bytes.get(1).ok_or(Refusal::Truncated)?;
    let is_plain = kind <= b'3';
    let is_bitmap = matches!(kind, b'1' | b'4');
    let channels = if matches!(kind, b'3' | b'6') { 3 } else { 1 };
    let mut rest = Words { bytes: &bytes[2..] };
    let (width, height) = (rest.number()?, rest.number()?);
    let highest = if is_bitmap { 1 } else { rest.number()? };
    if !(1..=65535).contains(&highest) {
        return Err(Refusal::Damaged(format!(
            "its highest level is {highest}, expected 1 to 65535"
        )));
    }
    if !is_plain {
        // One blank, and no more.
        let first = rest.bytes.split_first().ok_or(Refusal::Truncated)?;
        rest.bytes = first.1;
    }
    let memory = 3 * channels as u64 + 3;
    let (width, height) = checked_size(width.into(), height.into(), memory, limits)?;
    Ok(PnmHeader {
        width,
        height,
        channels,
        highest,
        is_plain,
        is_bitmap,
        rest,
    })
}

/// Decodes a picture.
///
/// # Errors
/// Any [`Refusal`] but those of frames.
pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<DynamicImage, Refusal> {
    let mut header = header(bytes, limits)?;
    let count = header.width * header.height * header.channels;
    // The shortest level takes so many bytes, a bitmap's less.
    let least = match (header.is_bitmap, header.is_plain) {
        (true, false) => header.width.div_ceil(8) * header.height,
        (false, false) if header.highest > 255 => 2 * count,
        _ => count,
    };
    let data = header.rest.bytes;
    if data.len() < least {
        return Err(Refusal::Truncated);
    }
    let numbers: Vec<u16> = match (header.is_bitmap, header.is_plain) {
        (true, true) => {
            let bits = (0..count).map(|_| header.rest.bit().map(|bit| 1 - bit as u16));
            bits.collect::<Result<_, _>>()?
        }
        (true, false) => {
            let rows = data
                .chunks_exact(header.width.div_ceil(8))
                .take(header.height);
            let bit = |row: &[u8], x: usize| u16::from(row[x / 8] & (0x80 >> (x % 8)) == 0);
            rows.flat_map(|row| (0..header.width).map(move |x| bit(row, x)))
                .collect()
        }
        (false, true) => {
            let numbers = (0..count).map(|_| header.rest.number().map(|n| n.min(65535) as u16));
            numbers.collect::<Result<_, _>>()?
        }
        (false, false) if header.highest > 255 => {
            let words = data.as_chunks::<2>().0[..count].iter();
            words.map(|word| u16::from_be_bytes(*word)).collect()
        }
        (false, false) => data[..count].iter().map(|byte| u16::from(*byte)).collect(),
    };
    let (width, height) = (header.width as u32, header.height as u32);
    let highest = header.highest;
    let picture = match (highest, header.channels) {
        (65535, 1) => ImageBuffer::<Luma<u16>, _>::from_raw(width, height, numbers)
            .map(DynamicImage::ImageLuma16),
        (65535, _) => ImageBuffer::<Rgb<u16>, _>::from_raw(width, height, numbers)
            .map(DynamicImage::ImageRgb16),
        (_, channels) => {
            let level = |number: u16| {
                let number = u32::from(number).min(highest);
                ((number * 255 + highest / 2) / highest) as u8
            };
            let levels = numbers.into_iter().map(level).collect();
            if channels == 1 {
                GrayImage::from_raw(width, height, levels).map(DynamicImage::ImageLuma8)
            } else {
                RgbImage::from_raw(width, height, levels).map(DynamicImage::ImageRgb8)
            }
        }
    };
    picture.ok_or(Refusal::Truncated)
}

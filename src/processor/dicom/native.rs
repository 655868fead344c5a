//! Numbers as they are stored, in run lengths or plain: one to 32 bits, grey, indices and colours.

use std::borrow::Cow;

use dicom_core::VR;

use super::encoding::Encoding;
use super::error::DicomError;
use super::header::{Header, Photometric};
use super::samples::Samples;
use crate::processor::pack_bits::unpack;

/// The numbers of frame `frame` of `frames`, counted from 0.
///
/// # Errors
/// [`DicomError::Truncated`] if there are too few bytes.
pub(super) fn native(
    header: &Header,
    vr: VR,
    bytes: &[u8],
    encoding: Encoding,
    (frame, frames): (usize, usize),
) -> Result<Samples, DicomError> {
    if header.allocated == 1 {
        return one_bit(header, bytes, frame);
    }
    let full = header.pixels() * header.samples * (header.allocated as usize / 8);
    let subsampled = header.pixels() * 2;
    let holds = |length: usize| bytes.len() as u64 >= (frames as u64).saturating_mul(length as u64);
    // Some writers say YBR_FULL_422 of pixels that have all their numbers.
    let is_subsampled = header.subsampled
        && header.allocated == 8
        && header.columns.is_multiple_of(2)
        && !holds(full);
    let length = if is_subsampled { subsampled } else { full };
    let from = frame.checked_mul(length).ok_or(DicomError::Truncated)?;
    let to = from.checked_add(length).ok_or(DicomError::Truncated)?;
    let bytes = if header.allocated == 8 && encoding == Encoding::ExplicitBig && vr == VR::OW {
        // Pairs of 8-bit numbers were written as one of 16 bits; a frame may begin inside a pair.
        let pairs = bytes.get(from & !1..to.next_multiple_of(2));
        let mut pairs = pairs.ok_or(DicomError::Truncated)?.to_vec();
        for pair in pairs.as_chunks_mut::<2>().0 {
            pair.swap(0, 1);
        }
        Cow::Owned(pairs[from & 1..][..length].to_vec())
    } else {
        Cow::Borrowed(bytes.get(from..to).ok_or(DicomError::Truncated)?)
    };
    if is_subsampled {
        // Two luminances, then the colour differences of both.
        let pairs = bytes.as_chunks::<4>().0.iter();
        let pixels = pairs
            .flat_map(|[first, second, blue, red]| [*first, *blue, *red, *second, *blue, *red]);
        return Ok(colour(header, pixels.collect(), false));
    }
    let words = || {
        bytes
            .as_chunks::<2>()
            .0
            .iter()
            .map(|word| encoding.u16(*word))
    };
    let wide = || {
        bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|number| encoding.u32(*number))
    };
    if !header.photometric.is_one_sample() {
        let level = |number: u32| eight_bits(header, number);
        let levels = match header.allocated {
            8 if header.stored == 8 => bytes.into_owned(),
            8 => bytes.iter().map(|byte| level((*byte).into())).collect(),
            16 => words().map(|word| level(word.into())).collect(),
            _ => wide().map(level).collect(),
        };
        return Ok(colour(header, levels, header.planar));
    }
    Ok(match header.allocated {
        8 => gray(header, bytes.iter().map(|byte| u16::from(*byte)).collect()),
        16 => gray(header, words().collect()),
        _ => wide_gray(header, wide().collect()),
    })
}

/// Pixels of one bit, the lowest of a byte first; frames follow each other without a gap.
///
/// Source: PS3.5, 8.1.1 and annex D.
fn one_bit(header: &Header, bytes: &[u8], frame: usize) -> Result<Samples, DicomError> {
    let count = header.pixels();
    let from = frame.checked_mul(count).ok_or(DicomError::Truncated)?;
    let to = from.checked_add(count).ok_or(DicomError::Truncated)?;
    if bytes.len() < to.div_ceil(8) {
        return Err(DicomError::Truncated);
    }
    let bit = |at: usize| u16::from(bytes[at / 8] >> (at % 8) & 1);
    Ok(Samples::Gray((from..to).map(bit).collect()))
}

/// Moves the bits that count down and clears the others, which may hold overlays.
fn gray(header: &Header, mut numbers: Vec<u16>) -> Samples {
    let shift = header.high + 1 - header.stored;
    let mask = header.mask() as u16;
    for number in &mut numbers {
        *number = (*number >> shift) & mask;
    }
    Samples::Gray(numbers)
}

fn wide_gray(header: &Header, mut numbers: Vec<u32>) -> Samples {
    let shift = header.high + 1 - header.stored;
    for number in &mut numbers {
        *number = (*number >> shift) & header.mask();
    }
    if header.stored <= 16 {
        return Samples::Gray(numbers.into_iter().map(|number| number as u16).collect());
    }
    Samples::Wide(numbers)
}

/// A stored number of a colour as one of 8 bits: of more bits the highest, of fewer the whole range.
fn eight_bits(header: &Header, number: u32) -> u8 {
    let number = (number >> (header.high + 1 - header.stored)) & header.mask();
    level_of_bits(number, header.stored)
}

/// A number of `bits` bits of a colour as one of 8.
pub(super) fn level_of_bits(number: u32, bits: u32) -> u8 {
    if bits >= 8 {
        return (number >> (bits - 8)).min(255) as u8;
    }
    let top = (1 << bits) - 1;
    ((number.min(top) * 255 + top / 2) / top) as u8
}

/// Colour levels of any order as red, green, blue, pixel by pixel.
pub(super) fn colour(header: &Header, numbers: Vec<u8>, planar: bool) -> Samples {
    let mut pixels = if planar {
        let mut pixels = vec![0; numbers.len()];
        for (channel, plane) in numbers.chunks_exact(header.pixels()).enumerate() {
            for (pixel, value) in pixels.as_chunks_mut::<3>().0.iter_mut().zip(plane) {
                pixel[channel] = *value;
            }
        }
        pixels
    } else {
        numbers
    };
    if header.photometric == Photometric::YbrFull {
        pixels
            .as_chunks_mut::<3>()
            .0
            .iter_mut()
            .for_each(|pixel| *pixel = ybr_to_rgb(*pixel));
    }
    Samples::Rgb(pixels)
}

/// Source: PS3.3, C.7.6.3.1.2, solved for red, green and blue.
fn ybr_to_rgb([y, blue, red]: [u8; 3]) -> [u8; 3] {
    let (y, blue, red) = (
        f32::from(y),
        f32::from(blue) - 128.0,
        f32::from(red) - 128.0,
    );
    [
        y + 1.402 * red,
        y - 0.344_136 * blue - 0.714_136 * red,
        y + 1.772 * blue,
    ]
    .map(|value| value.round() as u8)
}

/// Source: PS3.5, annex G.
pub(super) fn rle(header: &Header, data: &[u8]) -> Result<Samples, DicomError> {
    const OFFSETS: usize = 15;
    if header.allocated == 1 {
        return Err(DicomError::damaged("its run lengths hold single bits"));
    }
    let bytes_a_number = header.allocated as usize / 8;
    let expected = header.samples * bytes_a_number;
    let words = data.as_chunks::<4>().0;
    let Some([count, offsets @ ..]) = words.get(..=OFFSETS) else {
        return Err(DicomError::Truncated);
    };
    if u32::from_le_bytes(*count) as usize != expected {
        return Err(DicomError::Damaged(format!(
            "its run lengths have {} segments, expected {expected}",
            u32::from_le_bytes(*count)
        )));
    }
    let mut planes = Vec::with_capacity(expected);
    for (segment, start) in offsets.iter().enumerate().take(expected) {
        let start = u32::from_le_bytes(*start) as usize;
        let end = match offsets.get(segment + 1) {
            Some(next) if segment + 1 < expected => u32::from_le_bytes(*next) as usize,
            _ => data.len(),
        };
        let bytes = data.get(start..end).ok_or(DicomError::Truncated)?;
        planes.push(unpack(bytes, header.pixels()).ok_or(DicomError::Truncated)?);
    }
    // The planes of a number are its bytes, the highest first.
    let number = |planes: &[Vec<u8>], at: usize| {
        let join = |sum: u32, plane: &Vec<u8>| sum << 8 | u32::from(plane[at]);
        planes.iter().fold(0, join)
    };
    if !header.photometric.is_one_sample() {
        if bytes_a_number == 1 && header.stored == 8 {
            return Ok(colour(header, planes.concat(), true));
        }
        let levels = planes.chunks_exact(bytes_a_number).flat_map(|planes| {
            (0..header.pixels()).map(move |at| eight_bits(header, number(planes, at)))
        });
        return Ok(colour(header, levels.collect(), true));
    }
    let numbers = (0..header.pixels()).map(|at| number(&planes, at));
    Ok(if bytes_a_number > 2 {
        wide_gray(header, numbers.collect())
    } else {
        gray(header, numbers.map(|number| number as u16).collect())
    })
}

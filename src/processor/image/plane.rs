//! Arrays of numbers from NIfTI and NRRD files as pictures: one plane, hung by its axes.
//!
//! Bytes without a scale are grey levels as they are; all other numbers are shown as [`super::measured`] says.

use std::borrow::Cow;
use std::io::Read;

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, RgbImage};

use super::measured;
use super::refusal::{Refusal, checked_size};
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::remark::Remark;

/// What a number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NumberKind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
}

impl NumberKind {
    pub(super) fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    fn value(self, bytes: &[u8], big_endian: bool) -> f64 {
        let mut whole = [0; 8];
        let size = self.size().min(bytes.len());
        whole[..size].copy_from_slice(&bytes[..size]);
        if big_endian {
            whole[..size].reverse();
        }
        let bits = u64::from_le_bytes(whole);
        match self {
            Self::U8 | Self::U16 | Self::U32 | Self::U64 => bits as f64,
            Self::I8 => (bits as i8).into(),
            Self::I16 => (bits as i16).into(),
            Self::I32 => (bits as i32).into(),
            Self::I64 => bits as i64 as f64,
            Self::F32 => f32::from_bits(bits as u32).into(),
            Self::F64 => f64::from_bits(bits),
        }
    }
}

/// What a header says of one plane.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plane {
    pub(super) width: usize,
    pub(super) height: usize,
    /// Planes before it in the file.
    pub(super) before: usize,
    pub(super) kind: NumberKind,
    /// 1, or 3 and 4 of colours, which are bytes.
    pub(super) channels: usize,
    pub(super) big_endian: bool,
    /// What a number is multiplied by, and what is added then.
    pub(super) scale: (f64, f64),
    pub(super) orientation: Orientation,
}

/// Where a plane is in a file.
pub(super) struct PlanePlace {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) before: usize,
    /// Planes in the file.
    pub(super) planes: usize,
}

impl PlanePlace {
    /// The only plane of an array, or plane number `frame`, counted from 1, out of the lengths of all axes, the first
    /// changing fastest; checked against the limits.
    ///
    /// # Errors
    /// A volume without a number, a plane that is not there, or one of the limits.
    pub(super) fn new(
        lengths: &[u64],
        frame: Option<usize>,
        bytes_a_pixel: u64,
        limits: &DecodeLimits,
    ) -> Result<Self, Refusal> {
        let (plane, more) = lengths.split_at(lengths.len().min(2));
        let planes = more.iter().try_fold(1_usize, |planes, length| {
            planes.checked_mul(usize::try_from(*length).ok()?)
        });
        let planes = planes.filter(|planes| *planes > 0);
        let planes = planes.ok_or_else(|| Refusal::damaged("its axes have no lengths"))?;
        let before = match frame {
            None if planes == 1 => 0,
            None => {
                let sides: Vec<String> = lengths.iter().map(u64::to_string).collect();
                return Err(Refusal::Volume(sides.join(" × "), planes));
            }
            Some(frame) if (1..=planes).contains(&frame) => frame - 1,
            Some(frame) => return Err(Refusal::NoFrame(frame, planes)),
        };
        let &[width, height] = plane else {
            return Err(Refusal::damaged("it has fewer than two axes"));
        };
        let (width, height) = checked_size(width, height, bytes_a_pixel, limits)?;
        Ok(Self {
            width,
            height,
            before,
            planes,
        })
    }
}

impl Plane {
    /// Bytes that the numbers take in the file.
    pub(super) fn stored_bytes(&self) -> usize {
        self.width * self.height * self.channels * self.kind.size()
    }

    /// Bytes of the planes before it.
    ///
    /// # Errors
    /// [`Refusal::Truncated`] if no file can have so many.
    pub(super) fn bytes_before(&self) -> Result<usize, Refusal> {
        let before = self.stored_bytes().checked_mul(self.before);
        before.ok_or(Refusal::Truncated)
    }

    /// Bytes that decoding holds.
    pub(super) fn bytes_needed(&self) -> u64 {
        (self.width * self.height) as u64 * bytes_a_pixel(self.kind, self.channels)
    }

    /// The picture of the numbers in `data`; remarks on it are added to `remarks`.
    ///
    /// # Errors
    /// [`Refusal::Truncated`] if there are too few.
    pub(super) fn picture(
        &self,
        data: &[u8],
        remarks: &mut Vec<Remark>,
    ) -> Result<DynamicImage, Refusal> {
        let data = data.get(..self.stored_bytes()).ok_or(Refusal::Truncated)?;
        let (width, height) = (self.width as u32, self.height as u32);
        let picture = if self.channels > 1 {
            let pixels = data.chunks_exact(self.channels);
            let colours = pixels.flat_map(|pixel| pixel[..3].iter().copied());
            RgbImage::from_raw(width, height, colours.collect()).map(DynamicImage::ImageRgb8)
        } else {
            let levels = if self.kind == NumberKind::U8 && self.scale == (1.0, 0.0) {
                data.to_vec()
            } else {
                let (slope, intercept) = self.scale;
                let numbers = data.chunks_exact(self.kind.size());
                let value = |bytes| self.kind.value(bytes, self.big_endian) * slope + intercept;
                let values: Vec<f64> = numbers.map(value).collect();
                measured::levels(&values, false, remarks)
            };
            GrayImage::from_raw(width, height, levels).map(DynamicImage::ImageLuma8)
        };
        picture.ok_or(Refusal::Truncated)
    }
}

/// Bytes that decoding a pixel holds: as stored, as a number with its copy to be sorted, and the picture.
pub(super) fn bytes_a_pixel(kind: NumberKind, channels: usize) -> u64 {
    (kind.size() * channels + 17 + 3) as u64
}

/// How a plane has to be rotated or mirrored by the directions of its two axes in the patient, which are
/// right, front and head where they are positive.
///
/// It is hung as radiographs and slices are: the patient's left on the right, else the back on the right;
/// the head up, else the front up.
pub(super) fn hung(first: [f64; 3], second: [f64; 3]) -> Orientation {
    let main = |direction: [f64; 3]| {
        let largest = |a: &usize, b: &usize| direction[*a].abs().total_cmp(&direction[*b].abs());
        let axis = (0..3).max_by(largest)?;
        (direction[axis] != 0.0 && direction[axis].is_finite())
            .then_some((axis, direction[axis] > 0.0))
    };
    let (Some(first), Some(second)) = (main(first), main(second)) else {
        return Orientation::NoTransforms;
    };
    if first.0 == second.0 {
        return Orientation::NoTransforms;
    }
    let transposed = first.0 > second.0;
    let (across, down) = if transposed {
        (second, first)
    } else {
        (first, second)
    };
    match (transposed, across.1, down.1) {
        (false, false, false) => Orientation::NoTransforms,
        (false, true, false) => Orientation::FlipHorizontal,
        (false, false, true) => Orientation::FlipVertical,
        (false, true, true) => Orientation::Rotate180,
        (true, false, false) => Orientation::Rotate90FlipH,
        (true, true, false) => Orientation::Rotate90,
        (true, false, true) => Orientation::Rotate270,
        (true, true, true) => Orientation::Rotate270FlipH,
    }
}

/// `bytes`, or what they inflate to where they begin as gzip does; no more than `most` bytes.
///
/// # Errors
/// A damaged or cut off stream.
pub(super) fn gunzipped(bytes: &[u8], most: u64) -> Result<Cow<'_, [u8]>, Refusal> {
    if !bytes.starts_with(GZIP) {
        return Ok(Cow::Borrowed(bytes));
    }
    let mut inflated = Vec::new();
    let mut reader = flate2::read::MultiGzDecoder::new(bytes).take(most);
    match reader.read_to_end(&mut inflated) {
        Ok(_) => Ok(Cow::Owned(inflated)),
        Err(cause) if cause.kind() == std::io::ErrorKind::UnexpectedEof => Err(Refusal::Truncated),
        Err(cause) => Err(Refusal::damaged(cause)),
    }
}

/// Bytes before the numbers that are skipped at most; what the cost of a picture leaves out.
pub(super) const MOST_TO_SKIP: usize = 16 << 20;

/// How gzip begins.
pub(super) const GZIP: &[u8] = b"\x1f\x8b";

/// The first `most` bytes of what `bytes`, or the start of them, inflate to.
pub(super) fn gunzipped_head(bytes: &[u8], most: usize) -> Vec<u8> {
    let mut head = vec![0; most];
    let mut reader = flate2::read::GzDecoder::new(bytes);
    let mut filled = 0;
    while let Ok(read @ 1..) = reader.read(&mut head[filled..]) {
        filled += read;
    }
    head.truncate(filled);
    head
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plane_is_hung_by_the_directions_of_its_axes() {
        const LEFT: [f64; 3] = [-1.0, 0.1, 0.0];
        const RIGHT: [f64; 3] = [1.0, 0.0, 0.0];
        const BACK: [f64; 3] = [0.0, -1.0, 0.0];
        const FEET: [f64; 3] = [0.0, 0.2, -2.0];
        const HEAD: [f64; 3] = [0.0, 0.0, 1.0];
        for (first, second, expected) in [
            (LEFT, FEET, Orientation::NoTransforms),
            (LEFT, BACK, Orientation::NoTransforms),
            (BACK, FEET, Orientation::NoTransforms),
            (RIGHT, FEET, Orientation::FlipHorizontal),
            (LEFT, HEAD, Orientation::FlipVertical),
            (RIGHT, HEAD, Orientation::Rotate180),
            // Rows run down: transposed.
            (FEET, LEFT, Orientation::Rotate90FlipH),
            (FEET, RIGHT, Orientation::Rotate90),
            (HEAD, LEFT, Orientation::Rotate270),
            (HEAD, RIGHT, Orientation::Rotate270FlipH),
            ([0.0; 3], FEET, Orientation::NoTransforms),
            (LEFT, RIGHT, Orientation::NoTransforms),
        ] {
            assert_eq!(hung(first, second), expected, "{first:?} {second:?}");
        }
    }

    #[test]
    fn numbers_of_every_kind_are_read_in_both_orders() {
        for (kind, little, value) in [
            (NumberKind::I8, vec![0xfe], -2.0),
            (NumberKind::U16, vec![1, 2], 513.0),
            (NumberKind::I16, vec![0xff, 0xff], -1.0),
            (NumberKind::U32, vec![0, 0, 0, 0x80], 2_147_483_648.0),
            (NumberKind::I32, vec![0, 0, 0, 0x80], -2_147_483_648.0),
            (NumberKind::F32, 1.5_f32.to_le_bytes().to_vec(), 1.5),
            (NumberKind::F64, (-0.25_f64).to_le_bytes().to_vec(), -0.25),
            (NumberKind::I64, (-7_i64).to_le_bytes().to_vec(), -7.0),
        ] {
            assert_eq!(kind.value(&little, false), value);
            let big: Vec<u8> = little.into_iter().rev().collect();
            assert_eq!(kind.value(&big, true), value);
        }
    }
}

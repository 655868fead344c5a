//! Types of GGUF tensors, and how their blocks become floats.
//!
//! Source: `gguf-py/gguf/quants.py` of llama.cpp, which agrees with ggml bit for bit.

use burn::tensor::DType;
use half::{bf16, f16};

use crate::{
    ops::quantised::Format,
    qwen3_vl::weights::{
        forms::Slice,
        stored::{Decode, Groups},
    },
};

/// Type of a tensor that is read here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, non_camel_case_types, reason = "the names of ggml")]
pub(super) enum Kind {
    F32,
    F16,
    BF16,
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

/// The values of IQ4's sixteen levels.
const IQ4: [i8; 16] = [
    -127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113,
];

/// Twice the values of the sixteen floats of four bits (E2M1).
const MXFP4: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// Names of types by their number, for messages.
const NAMES: [(u32, &str); 15] = [
    (9, "Q8_1"),
    (15, "Q8_K"),
    (16, "IQ2_XXS"),
    (17, "IQ2_XS"),
    (18, "IQ3_XXS"),
    (19, "IQ1_S"),
    (21, "IQ3_S"),
    (22, "IQ2_S"),
    (24, "I8"),
    (26, "I32"),
    (28, "F64"),
    (29, "IQ1_M"),
    (34, "TQ1_0"),
    (35, "TQ2_0"),
    (40, "NVFP4"),
];

/// Elements of a block of the types with K in their name.
const K: usize = 256;

impl Kind {
    /// By its number; the error is its name.
    pub(super) fn new(number: u32) -> Result<Self, String> {
        Ok(match number {
            0 => Self::F32,
            1 => Self::F16,
            2 => Self::Q4_0,
            3 => Self::Q4_1,
            6 => Self::Q5_0,
            7 => Self::Q5_1,
            8 => Self::Q8_0,
            10 => Self::Q2_K,
            11 => Self::Q3_K,
            12 => Self::Q4_K,
            13 => Self::Q5_K,
            14 => Self::Q6_K,
            20 => Self::IQ4_NL,
            23 => Self::IQ4_XS,
            39 => Self::MXFP4,
            30 => Self::BF16,
            other => {
                let name = NAMES.iter().find(|(number, _)| *number == other);
                return Err(name.map_or(format!("{other}"), |(_, name)| (*name).to_string()));
            }
        })
    }

    /// Elements of a block.
    pub(super) fn block(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => 32,
            Self::IQ4_NL | Self::MXFP4 => 32,
            Self::Q2_K | Self::Q3_K | Self::Q4_K | Self::Q5_K | Self::Q6_K | Self::IQ4_XS => K,
        }
    }

    /// Bytes of a block.
    pub(super) fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::MXFP4 => 17,
            Self::Q4_0 | Self::IQ4_NL => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2_K => 84,
            Self::Q3_K => 110,
            Self::IQ4_XS => 136,
            Self::Q4_K => 144,
            Self::Q5_K => 176,
            Self::Q6_K => 210,
        }
    }

    /// The type as one of floats.
    pub(super) fn float(self) -> Option<DType> {
        match self {
            Self::F32 => Some(DType::F32),
            Self::F16 => Some(DType::F16),
            Self::BF16 => Some(DType::BF16),
            _ => None,
        }
    }

    /// Whole blocks to floats.
    pub(super) fn decode(self, bytes: &[u8], out: &mut [f32]) {
        for (block, out) in bytes
            .chunks_exact(self.bytes())
            .zip(out.chunks_exact_mut(self.block()))
        {
            match self {
                Self::F32 => out[0] = f32::from_le_bytes([block[0], block[1], block[2], block[3]]),
                Self::F16 => out[0] = half_at(block, 0),
                Self::BF16 => out[0] = bf16::from_le_bytes([block[0], block[1]]).to_f32(),
                Self::Q8_0 => {
                    let scale = half_at(block, 0);
                    for (value, out) in block[2..].iter().zip(out) {
                        *out = f32::from(*value as i8) * scale;
                    }
                }
                Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 => small_blocks(self, block, out),
                Self::Q2_K => q2_k(block, out),
                Self::Q3_K => q3_k(block, out),
                Self::Q4_K | Self::Q5_K => q45_k(self, block, out),
                Self::Q6_K => q6_k(block, out),
                Self::IQ4_NL => levels(half_at(block, 0), &IQ4, &block[2..], out),
                Self::IQ4_XS => iq4_xs(block, out),
                Self::MXFP4 => levels(half_power_of_two(block[0]), &MXFP4, &block[1..], out),
            }
        }
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// 32 values: a scale, for `_1` the least value, for five bits their highest ones, halves of bytes.
fn small_blocks(kind: Kind, block: &[u8], out: &mut [f32]) {
    let (with_least, five) = match kind {
        Kind::Q4_0 => (false, false),
        Kind::Q4_1 => (true, false),
        Kind::Q5_0 => (false, true),
        _ => (true, true),
    };
    let scale = half_at(block, 0);
    let least = if with_least { half_at(block, 2) } else { 0.0 };
    let at = if with_least { 4 } else { 2 };
    let high = match five {
        true => u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]),
        false => 0,
    };
    let values = &block[if five { at + 4 } else { at }..];
    let middle = match (with_least, five) {
        (true, _) => 0,
        (false, false) => 8,
        (false, true) => 16,
    };
    for (place, out) in out.iter_mut().enumerate() {
        let byte = values[place % 16];
        let low = if place < 16 { byte & 15 } else { byte >> 4 };
        let value = i32::from(low) | (((high >> place) & 1) << 4) as i32;
        let scaled = scale * (value - middle) as f32;
        *out = if with_least { scaled + least } else { scaled };
    }
}

fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, values) = (&block[..16], &block[16..80]);
    let (scale, least) = (half_at(block, 80), half_at(block, 82));
    for (place, out) in out.iter_mut().enumerate() {
        let value = values[place / 128 * 32 + place % 32] >> (2 * (place % 128 / 32)) & 3;
        let both = scales[place / 16];
        *out = scale * f32::from(both & 15) * f32::from(value) - least * f32::from(both >> 4);
    }
}

fn q3_k(block: &[u8], out: &mut [f32]) {
    let (high, values, packed) = (&block[..32], &block[32..96], &block[96..108]);
    let scale = half_at(block, 108);
    for (place, out) in out.iter_mut().enumerate() {
        let group = place / 16;
        let low = packed[group % 8] >> (4 * (group / 8)) & 15;
        let upper = packed[8 + group % 4] >> (2 * (group / 4)) & 3;
        let group_scale = f32::from(((low | (upper << 4)) as i8) - 32);
        let value = values[place / 128 * 32 + place % 32] >> (2 * (place % 128 / 32)) & 3;
        // The offset is taken off where the bit is not set.
        let bit = high[place % 32] >> (place / 32) & 1;
        let value = f32::from(value as i8 - ((1 - bit as i8) << 2));
        *out = scale * group_scale * value;
    }
}

/// Scale and least value of the eight groups, six bits each.
fn scale_min(packed: &[u8], group: usize) -> (f32, f32) {
    let (scale, least) = if group < 4 {
        (packed[group] & 63, packed[group + 4] & 63)
    } else {
        let both = packed[group + 4];
        (
            (both & 15) | (packed[group - 4] >> 2 & 0x30),
            (both >> 4) | (packed[group] >> 2 & 0x30),
        )
    };
    (f32::from(scale), f32::from(least))
}

fn q45_k(kind: Kind, block: &[u8], out: &mut [f32]) {
    let (scale, least) = (half_at(block, 0), half_at(block, 2));
    let packed = &block[4..16];
    let five = kind == Kind::Q5_K;
    let values = &block[if five { 48 } else { 16 }..];
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let (group_scale, group_least) = scale_min(packed, group);
        let (scale, least) = (scale * group_scale, least * group_least);
        for (place, out) in out.iter_mut().enumerate() {
            let byte = values[group / 2 * 32 + place];
            let low = if group % 2 == 0 { byte & 15 } else { byte >> 4 };
            let high = if five {
                block[16 + place] >> group & 1
            } else {
                0
            };
            *out = scale * f32::from(low | (high << 4)) - least;
        }
    }
}

fn q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let scale = half_at(block, 208);
    for (place, out) in out.iter_mut().enumerate() {
        let (half, inside) = (place / 128, place % 128);
        let byte = low[half * 64 + inside % 64];
        let four = if inside < 64 { byte & 15 } else { byte >> 4 };
        let two = high[half * 32 + inside % 32] >> (2 * (inside / 32)) & 3;
        let value = f32::from((four | (two << 4)) as i8 - 32);
        *out = scale * f32::from(scales[place / 16] as i8) * value;
    }
}

/// Values by a table: the first half in the lower halves of the bytes, the second in the upper.
fn levels(scale: f32, table: &[i8; 16], bytes: &[u8], out: &mut [f32]) {
    let half = out.len() / 2;
    for (place, out) in out.iter_mut().enumerate() {
        let byte = bytes[place % half];
        let level = if place < half { byte & 15 } else { byte >> 4 };
        *out = scale * f32::from(table[usize::from(level)]);
    }
}

/// Half of the power of two that an exponent of eight bits (E8M0) says: the table holds twice the values.
fn half_power_of_two(exponent: u8) -> f32 {
    let bits = match exponent {
        // Below the smallest normal number.
        0 | 1 => 0x0020_0000 << exponent,
        _ => (u32::from(exponent) - 1) << 23,
    };
    f32::from_bits(bits)
}

/// Eight groups of 32 levels, each with a scale of six bits.
fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let scale = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let (low, values) = (&block[4..8], &block[8..]);
    for (group, out) in out.chunks_exact_mut(32).enumerate() {
        let four = low[group / 2] >> (4 * (group % 2)) & 15;
        let two = (high >> (2 * group) & 3) as u8;
        let group_scale = scale * f32::from((four | (two << 4)) as i8 - 32);
        levels(group_scale, &IQ4, &values[16 * group..][..16], out);
    }
}

/// A tensor, row by row.
pub(super) struct Blocks {
    /// Its bytes.
    pub(super) slice: Slice,
    /// Its type.
    pub(super) kind: Kind,
    /// Elements of a row.
    pub(super) columns: usize,
}

impl Decode for Blocks {
    fn rows(&self, first: usize, out: &mut [f32]) {
        let row = self.columns / self.kind.block() * self.kind.bytes();
        let count = out.len() / self.columns;
        self.kind
            .decode(&self.slice.bytes()[first * row..][..count * row], out);
    }

    fn dtype(&self) -> Option<DType> {
        self.kind.float()
    }

    fn keeps(&self, format: Format) -> bool {
        self.kind == Kind::Q4_0 && format == Format::Int4 { group: 32 }
    }

    fn levels(&self, row: usize, _format: Format, levels: &mut [u32], groups: Groups<'_>) {
        let bytes = self.kind.bytes();
        let count = self.columns / self.kind.block();
        let blocks = &self.slice.bytes()[row * count * bytes..][..count * bytes];
        for ((block, levels), scale) in blocks
            .chunks_exact(bytes)
            .zip(levels.chunks_exact_mut(self.kind.block()))
            .zip(groups.scales)
        {
            *scale = half_at(block, 0);
            let (low, high) = levels.split_at_mut(16);
            for ((byte, low), high) in block[2..].iter().zip(low).zip(high) {
                (*low, *high) = (u32::from(byte & 15), u32::from(byte >> 4));
            }
        }
    }
}

/// The patch embedding, which llama.cpp splits in two along time: `[out, channels, side, side]` each becomes
/// `[out, channels, 2, side, side]`.
pub(super) struct PatchEmbed {
    /// The first frame, then the second.
    pub(super) frames: [Blocks; 2],
    /// Elements of a channel of a frame.
    pub(super) area: usize,
}

impl Decode for PatchEmbed {
    fn rows(&self, first: usize, out: &mut [f32]) {
        let columns = self.frames[0].columns;
        let mut frame = vec![0.0; columns];
        for (row, out) in (first..).zip(out.chunks_mut(2 * columns)) {
            for (time, source) in self.frames.iter().enumerate() {
                source.rows(row, &mut frame);
                for (channel, values) in frame.chunks(self.area).enumerate() {
                    let at = (2 * channel + time) * self.area;
                    out[at..at + self.area].copy_from_slice(values);
                }
            }
        }
    }

    fn dtype(&self) -> Option<DType> {
        self.frames[0].dtype()
    }
}

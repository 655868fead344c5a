//! Buffers read sixteen bytes at a time, whatever type their elements have.

use burn::tensor::DType;
use cubecl::prelude::*;
use half::f16;

/// How elements are packed into words of 32 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Packing {
    /// One f32 a word.
    F32,
    /// Two f16 a word, the first in the low half.
    F16,
    /// Two bf16 a word, the first in the low half.
    Bf16,
}

impl Packing {
    /// How a type is packed, for the types the kernels support.
    pub(super) fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(Self::F32),
            DType::F16 => Some(Self::F16),
            DType::BF16 => Some(Self::Bf16),
            _ => None,
        }
    }

    /// Elements in sixteen bytes.
    pub(super) const fn piece(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 8,
        }
    }

    /// Pairs of elements in sixteen bytes.
    pub(super) const fn pairs(self) -> usize {
        self.piece() / 2
    }
}

/// Sixteen bytes.
pub(super) type Piece = Vector<u32, Const<4>>;

/// The pair of this number out of a piece.
#[cube]
pub(super) fn pair(
    piece: Vector<u32, Const<4>>,
    #[comptime] index: usize,
    #[comptime] packing: Packing,
) -> Vector<f32, Const<2>> {
    let mut values = Vector::<f32, Const<2>>::empty();
    if comptime!(packing == Packing::F32) {
        values[0] = f32::reinterpret(piece[2 * index]);
        values[1] = f32::reinterpret(piece[2 * index + 1]);
    } else if comptime!(packing == Packing::F16) {
        let halves = Vector::<f16, Const<2>>::reinterpret(piece[index]);
        values[0] = f32::cast_from(halves[0]);
        values[1] = f32::cast_from(halves[1]);
    } else {
        // A bf16 is the upper half of an f32.
        let word = piece[index];
        values[0] = f32::reinterpret(word << 16u32);
        values[1] = f32::reinterpret(word & 0xffff_0000u32);
    }
    values
}

/// `value`, or the largest finite one of its sign in the packing: f16 ends at 65,504, and an infinity
/// becomes a NaN two operations later.
#[cube]
pub(super) fn within(value: f32, #[comptime] packing: Packing) -> f32 {
    if comptime!(packing == Packing::F16) {
        clamp(value, -65504.0f32, 65504.0f32)
    } else {
        value
    }
}

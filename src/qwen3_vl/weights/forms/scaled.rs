//! Matrices of small floats or bytes with scales of blocks: fp8, int8, with and without zero points.

use safetensors::Dtype;

use crate::ops::quantised::Format;

use super::super::stored::{Decode, Groups};
use super::numbers::{Floats, Round, Slice, e4m3, e5m2};

/// What is stored for an element.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Element {
    /// `float8_e4m3fn`.
    E4M3,
    /// `float8_e5m2`.
    E5M2,
    /// A whole number, -128 to 127.
    I8,
}

impl Element {
    /// Of a type in a file.
    pub(super) fn of(dtype: Dtype) -> Option<Self> {
        match dtype {
            Dtype::F8_E4M3 => Some(Self::E4M3),
            Dtype::F8_E5M2 => Some(Self::E5M2),
            Dtype::I8 => Some(Self::I8),
            _ => None,
        }
    }

    fn table(self) -> [f32; 256] {
        match self {
            Self::E4M3 => e4m3(),
            Self::E5M2 => e5m2(),
            Self::I8 => std::array::from_fn(|byte| f32::from(byte as u8 as i8)),
        }
    }
}

/// Blocks that share a scale.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    /// Rows of a block.
    pub(super) rows: usize,
    /// Columns of a block.
    pub(super) columns: usize,
    /// Blocks beside each other.
    pub(super) across: usize,
}

/// `(element - zero) · scale`, each step rounded to the type of the scales.
pub(super) struct Scaled {
    values: Slice,
    columns: usize,
    table: Box<[f32; 256]>,
    /// Whether the elements are whole numbers.
    whole: bool,
    scales: Floats,
    zeros: Option<Slice>,
    grid: Grid,
    round: Round,
    /// Multiplied last.
    factor: f32,
}

impl Scaled {
    /// `values` `[rows, columns]` with a scale for each block of `grid`.
    pub(super) fn new(
        values: Slice,
        columns: usize,
        element: Element,
        scales: Floats,
        grid: Grid,
        round: Round,
    ) -> Self {
        Self {
            values,
            columns,
            table: Box::new(element.table()),
            whole: element == Element::I8,
            scales,
            zeros: None,
            grid,
            round,
            factor: 1.0,
        }
    }

    /// With a zero point for each block, a byte.
    pub(super) fn with_zeros(mut self, zeros: Option<Slice>) -> Self {
        self.zeros = zeros;
        self
    }

    /// With a factor for all.
    pub(super) fn with_factor(mut self, factor: f32) -> Self {
        self.factor = factor;
        self
    }
}

impl Decode for Scaled {
    fn keeps(&self, format: Format) -> bool {
        // A scale a row; -128 has a word of its own too.
        format == Format::Int8
            && self.whole
            && self.zeros.is_none()
            && self.factor == 1.0
            && self.grid.columns == self.columns
    }

    fn levels(&self, row: usize, format: Format, levels: &mut [u32], groups: Groups<'_>) {
        let values = &self.values.bytes()[row * self.columns..][..self.columns];
        for (level, value) in levels.iter_mut().zip(values) {
            *level = (i32::from(*value as i8) + format.offset()) as u32;
        }
        groups
            .scales
            .fill(self.scales.get(row / self.grid.rows * self.grid.across));
    }

    fn rows(&self, first: usize, out: &mut [f32]) {
        for (row, out) in (first..).zip(out.chunks_mut(self.columns)) {
            let values = &self.values.bytes()[row * self.columns..][..out.len()];
            let block = row / self.grid.rows * self.grid.across;
            for (at, (values, out)) in values
                .chunks(self.grid.columns)
                .zip(out.chunks_mut(self.grid.columns))
                .enumerate()
            {
                let scale = self.scales.get(block + at);
                let zero = self
                    .zeros
                    .as_ref()
                    .map_or(0.0, |zeros| f32::from(zeros.bytes()[block + at] as i8));
                for (value, out) in values.iter().zip(out) {
                    let value = self.round.apply(self.table[usize::from(*value)] - zero);
                    *out = self.round.apply(value * scale) * self.factor;
                }
            }
        }
    }
}

//! Token vectors of a step's tokens, out of a table of f16 or f32, or of 8 bits.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::{
    launch::{Buffer, array, cubes, elements, empty, pieces},
    matrix::Matrix,
    words::Piece,
};
use crate::ops::quantised::Format;

const UNITS: usize = 128;

#[cube(launch_unchecked)]
fn embed_floats(
    tokens: &Array<i32>,
    table: &Array<Piece>,
    x: &mut Array<Piece>,
    count: usize,
    row_pieces: usize,
) {
    if ABSOLUTE_POS < count {
        let token = tokens[ABSOLUTE_POS / row_pieces] as usize;
        x[ABSOLUTE_POS] = table[token * row_pieces + ABSOLUTE_POS % row_pieces];
    }
}

/// A unit a word of four levels.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn embed_levels<F: Float>(
    tokens: &Array<i32>,
    words: &Array<u32>,
    scales: &Array<f32>,
    x: &mut Array<Vector<F, Const<4>>>,
    count: usize,
    row_quads: usize,
    words_row: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < count {
        let token = tokens[ABSOLUTE_POS / row_quads] as usize;
        let word = words[token * words_row + ABSOLUTE_POS % row_quads];
        let mut values = Vector::<F, Const<4>>::empty();
        #[unroll]
        for c in 0..4usize {
            let level = (word >> comptime!(8 * c as u32)) & 0xffu32;
            let level = f32::cast_from(level) - 128.0f32;
            values[c] = F::cast_from(level * scales[token]);
        }
        x[ABSOLUTE_POS] = values;
    }
}

/// Whether the kernels read this table `[vocab, width]` as rows of `dtype`.
pub(super) fn covers<R: CubeRuntime>(table: &Matrix<R>, width: usize, dtype: DType) -> bool {
    match table {
        Matrix::Floats(table) => {
            table.dtype == dtype
                && table.is_contiguous()
                && (width * dtype.size()).is_multiple_of(16)
        }
        Matrix::Quantised(table) => {
            let (_, scales, format) = table.parts();
            format == Format::Int8 && scales.dtype == DType::F32 && width.is_multiple_of(4)
        }
    }
}

/// Rows of the table for `tokens` `[rows]`, which are its rows' numbers: `[rows, width]`.
pub(super) fn embed<R: CubeRuntime>(
    tokens: &Buffer<R>,
    table: &Matrix<R>,
    width: usize,
    dtype: DType,
) -> Buffer<R> {
    let [rows] = tokens.meta.shape().dims();
    let x = empty(tokens, [rows, width], dtype);
    // SAFETY: tokens are rows of the table; the arrays are as long as rows and widths say.
    #[allow(unsafe_code)]
    unsafe {
        match table {
            Matrix::Floats(table) => {
                let row_pieces = width * dtype.size() / 16;
                embed_floats::launch_unchecked::<R>(
                    &x.client,
                    cubes((rows * row_pieces).div_ceil(UNITS)),
                    CubeDim::new_1d(UNITS as u32),
                    elements(tokens),
                    pieces(table),
                    pieces(&x),
                    rows * row_pieces,
                    row_pieces,
                );
            }
            Matrix::Quantised(table) => {
                let (words, scales, format) = table.parts();
                embed_levels::launch_unchecked::<R>(
                    &x.client,
                    cubes((rows * width / 4).div_ceil(UNITS)),
                    CubeDim::new_1d(UNITS as u32),
                    elements(tokens),
                    elements(words),
                    elements(scales),
                    array(&x, 4 * dtype.size()),
                    rows * width / 4,
                    width / 4,
                    format.words(width),
                    dtype.into(),
                );
            }
        }
    }
    x
}

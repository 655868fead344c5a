//! Stages of [`super::tiles`]: pieces of the input and of the matrix on their way into shared memory.

use cubecl::prelude::*;
use half::f16;

use super::{
    matmul_config::Matrices,
    tile_config::{HALVES, LANES, PLANES, SIDE, TileConfig, UNITS},
    words::{Packing, Piece, pair, within},
};

/// The inputs of a piece in the order in which [`store_matrix`] leaves the levels of a word: of eight
/// inputs, each of the first four with the one four places after it; of four, with the one two places after it.
#[cube]
fn ordered(piece: Piece, #[comptime] bits: usize) -> Piece {
    if comptime!(bits == 0) {
        piece
    } else {
        let mut out = Piece::empty();
        #[unroll]
        for word in 0..4usize {
            let first = comptime!(if bits == 4 {
                word
            } else {
                word / 2 * 4 + word % 2
            });
            let second = comptime!(first + if bits == 4 { 4 } else { 2 });
            let low = Vector::<f16, Const<2>>::reinterpret(piece[comptime!(first / 2)]);
            let high = Vector::<f16, Const<2>>::reinterpret(piece[comptime!(second / 2)]);
            let mut both = Vector::<f16, Const<2>>::empty();
            both[0] = low[comptime!(first % 2)];
            both[1] = high[comptime!(second % 2)];
            out[word] = u32::reinterpret(both);
        }
        out
    }
}

/// Values times the scales of a norm and one over a row's root mean square.
#[cube]
fn normalised(values: Piece, scales: Piece, root: f32) -> Piece {
    let mut out = Piece::empty();
    #[unroll]
    for word in 0..4usize {
        let value = pair(values, word, Packing::F16) * pair(scales, word, Packing::F16);
        let value = value * Vector::new(root);
        let mut both = Vector::<f16, Const<2>>::empty();
        both[0] = f16::cast_from(within(value[0], Packing::F16));
        both[1] = f16::cast_from(within(value[1], Packing::F16));
        out[word] = u32::reinterpret(both);
    }
    out
}

/// One over the root mean square of each of the tile's rows from `row` on, into shared memory.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn find_roots(
    x: &Array<Piece>,
    roots: &mut SharedMemory<f32>,
    row: usize,
    rows: usize,
    row_pieces: usize,
    epsilon: f32,
    #[comptime] config: TileConfig,
) {
    let unit = UNIT_POS as usize;
    let mut parts = SharedMemory::<f32>::new(comptime!(config.rows * PLANES));
    let mut all = SharedMemory::<f32>::new(comptime!(if config.cooperative { 1 } else { UNITS }));
    for index in 0..min(rows - row, config.rows) {
        let start = (row + index) * row_pieces;
        let mut sum = 0.0f32;
        for at in range_stepped(unit, row_pieces, UNITS) {
            let values = x[start + at];
            #[unroll]
            for word in 0..4usize {
                let value = pair(values, word, Packing::F16);
                sum = fma(value[0], value[0], fma(value[1], value[1], sum));
            }
        }
        if config.cooperative {
            sum = plane_sum(sum);
        } else {
            all[unit] = sum;
            sync_cube();
            sum = 0.0f32;
            for lane in 0..LANES {
                sum += all[unit / LANES * LANES + lane];
            }
            sync_cube();
        }
        let lane = unit % LANES;
        if lane == 0 {
            parts[index * PLANES + unit / LANES] = sum;
        }
    }
    sync_cube();
    if unit < config.rows {
        let mut sum = 0.0f32;
        if row + unit < rows {
            #[unroll]
            for plane in 0..PLANES {
                sum += parts[unit * PLANES + plane];
            }
        }
        let count = f32::cast_from(row_pieces * HALVES);
        roots[unit] = 1.0f32 / (sum / count + epsilon).sqrt();
    }
    sync_cube();
}

/// Loads this unit's pieces of the input rows from `row` on and inputs from piece `at` on; zeros outside. All
/// are of the same inputs, and so have the same piece of a norm's scales.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn load_input(
    x: &Array<Piece>,
    norm: &Array<Piece>,
    loaded: &mut Array<Piece>,
    gains: &mut Array<Piece>,
    row: usize,
    rows: usize,
    at: usize,
    row_pieces: usize,
    #[comptime] config: TileConfig,
) {
    let per_row = comptime!(config.depth / HALVES);
    if config.norm {
        let piece = at + UNIT_POS as usize % per_row;
        gains[0] = norm[min(piece, row_pieces - 1)];
    }
    #[unroll]
    for index in 0..config.input_loads() {
        let task = UNIT_POS as usize + comptime!(index * UNITS);
        let from = row + task / per_row;
        let piece = at + task % per_row;
        let mut value = Piece::new(0u32);
        if task < comptime!(config.input_pieces()) && from < rows && piece < row_pieces {
            value = x[from * row_pieces + piece];
        }
        loaded[index] = value;
    }
}

/// Writes the loaded pieces of the input into shared memory, as far as the tile has `rows`: what a row of
/// zeros or of anything else would give is not written either.
#[cube]
pub(super) fn store_input(
    loaded: &Array<Piece>,
    gains: &Array<Piece>,
    roots: &SharedMemory<f32>,
    shared: &mut SharedMemory<Piece>,
    rows: usize,
    #[comptime] config: TileConfig,
) {
    let per_row = comptime!(config.depth / HALVES);
    #[unroll]
    for index in 0..config.input_loads() {
        let task = UNIT_POS as usize + comptime!(index * UNITS);
        let row = task / per_row;
        if task < comptime!(config.input_pieces()) && row < rows {
            let mut value = loaded[index];
            if config.norm {
                value = normalised(value, gains[0], roots[row]);
            }
            let place = row * comptime!(config.stride()) + task % per_row;
            shared[place] = ordered(value, comptime!(config.bits()));
        }
    }
}

/// Loads this unit's pieces of the matrix for the outputs from `column` on and inputs from piece `at` on,
/// and their scales; outputs past the last repeat it, and so do inputs of quantised rows (the input is zero
/// there), while floats are zero.
#[cube]
#[allow(clippy::too_many_arguments)]
pub(super) fn load_matrix<S: Numeric>(
    words: &Array<Piece>,
    scales: &Array<S>,
    second_words: &Array<Piece>,
    second_scales: &Array<S>,
    third_words: &Array<Piece>,
    third_scales: &Array<S>,
    matrix: usize,
    loaded: &mut Array<Piece>,
    factors: &mut Array<f16>,
    column: usize,
    width: usize,
    at: usize,
    row_pieces: usize,
    #[comptime] config: TileConfig,
) {
    let per_row = comptime!(config.depth / config.piece());
    #[unroll]
    for index in 0..config.matrix_loads() {
        let task = UNIT_POS as usize + comptime!(index * UNITS);
        let output = task / per_row;
        let mut of = matrix;
        let mut channel = column + output;
        if comptime!(config.matrices == Matrices::Pair) {
            of = output / SIDE;
            channel = column + output % SIDE;
        }
        channel = min(channel, width - 1);
        let piece = at + task % per_row;
        let inside = min(piece, row_pieces - 1);
        let from = channel * row_pieces + inside;
        let group = channel * (row_pieces / comptime!(config.group_pieces()))
            + inside / comptime!(config.group_pieces());
        let mut value = Piece::new(0u32);
        let mut factor = f16::from_int(0);
        if comptime!(config.matrix_pieces().is_multiple_of(UNITS))
            || task < comptime!(config.matrix_pieces())
        {
            if comptime!(config.matrices == Matrices::One) || of == 0 {
                value = words[from];
                if comptime!(config.has_groups()) {
                    factor = f16::cast_from(scales[group]);
                }
            } else if comptime!(config.matrices == Matrices::Pair) || of == 1 {
                value = second_words[from];
                if comptime!(config.has_groups()) {
                    factor = f16::cast_from(second_scales[group]);
                }
            } else {
                value = third_words[from];
                if comptime!(config.has_groups()) {
                    factor = f16::cast_from(third_scales[group]);
                }
            }
        }
        if comptime!(config.bits() == 0) {
            // A weight that is no number must not meet the zeros of the input.
            if piece >= row_pieces {
                value = Piece::new(0u32);
            }
        }
        loaded[index] = value;
        factors[index] = factor;
    }
}

/// Writes the loaded pieces of the matrix into shared memory as f16, levels in the order of [`ordered`].
#[cube]
pub(super) fn store_matrix(
    loaded: &Array<Piece>,
    factors: &Array<f16>,
    shared: &mut SharedMemory<Piece>,
    #[comptime] config: TileConfig,
) {
    let per_row = comptime!(config.depth / config.piece());
    let parts = comptime!(config.piece() / HALVES);
    let bits = comptime!(config.bits());
    #[unroll]
    for index in 0..config.matrix_loads() {
        let task = UNIT_POS as usize + comptime!(index * UNITS);
        if comptime!(config.matrix_pieces().is_multiple_of(UNITS))
            || task < comptime!(config.matrix_pieces())
        {
            let place = task / per_row * comptime!(config.stride()) + task % per_row * parts;
            if comptime!(bits == 0) {
                shared[place] = loaded[index];
            } else {
                let offset = Vector::<f16, Const<2>>::new(f16::new(comptime!(
                    (1024 + (1 << (bits - 1))) as f32
                )));
                let factor = Vector::<f16, Const<2>>::new(factors[index]);
                #[unroll]
                for part in 0..parts {
                    let mut out = Piece::empty();
                    #[unroll]
                    for word in 0..4usize {
                        // Eight levels are one word of four bits each, or two words of eight bits.
                        let source = comptime!(if bits == 4 { part } else { 2 * part + word / 2 });
                        let shift = comptime!(if bits == 4 { 4 * word } else { word % 2 * 8 });
                        let mask = comptime!(if bits == 4 {
                            0x000f_000fu32
                        } else {
                            0x00ff_00ffu32
                        });
                        let levels = ((loaded[index][source] >> comptime!(shift as u32)) & mask)
                            | 0x6400_6400u32;
                        let mut values = Vector::<f16, Const<2>>::reinterpret(levels) - offset;
                        if comptime!(config.has_groups()) {
                            values *= factor;
                        }
                        out[word] = u32::reinterpret(values);
                    }
                    shared[place + part] = out;
                }
            }
        }
    }
}

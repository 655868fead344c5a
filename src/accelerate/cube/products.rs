//! Matmul of one to eight rows with matrices `[out, in]`, of floats ([`super::matvec`]) or quantised
//! ([`super::quantized`]): limited by the memory bandwidth of reading the matrices.
//!
//! A group of units computes a few outputs for all rows. It reads the rows of the matrix sixteen bytes a
//! unit, side by side; the input rows come out of the cache. A norm before the matmul costs nothing here:
//! its scale multiplies the input, its mean square is summed beside the dot products, and its root divides
//! their sums. Operations are on four values each and the code of a step is there once, whatever the
//! matrices: drivers take seconds over long kernels, and loads further ahead were not faster.

use cubecl::prelude::*;

use super::{
    matmul_config::{MatmulConfig, Matrices},
    sums::{Group, group_sum},
    words::{Packing, Piece, pair, within},
};

/// Four inputs, as they are stored.
pub(super) type Quad<F> = Vector<F, Const<4>>;

/// The quad of this number out of a piece.
#[cube]
fn four(
    piece: Piece,
    #[comptime] quad: usize,
    #[comptime] packing: Packing,
) -> Vector<f32, Const<4>> {
    let low = pair(piece, comptime!(2 * quad), packing);
    let high = pair(piece, comptime!(2 * quad + 1), packing);
    let mut values = Vector::<f32, Const<4>>::empty();
    values[0] = low[0];
    values[1] = low[1];
    values[2] = high[0];
    values[3] = high[1];
    values
}

/// Loads piece number `at`, and its scale if there is one, for the outputs from `from` up to `to`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load<S: Numeric>(
    words: &Array<Piece>,
    scales: &Array<S>,
    channels: &Array<usize>,
    at: usize,
    loaded: &mut Array<Piece>,
    factors: &mut Array<f32>,
    #[comptime] from: usize,
    #[comptime] to: usize,
    #[comptime] config: MatmulConfig,
) {
    #[unroll]
    for output in from..to {
        let channel = channels[output];
        loaded[output] = words[channel * config.vectors + at];
        if comptime!(config.is_quantised()) {
            let group =
                channel * comptime!(config.scales()) + at / comptime!(config.group_vectors());
            factors[output] = f32::cast_from(scales[group]);
        }
    }
}

/// Adds the dot products with piece number `at` of each row.
///
/// A level masked but not shifted is `2^bit` times itself, so the input is scaled by `2^-bit`; the
/// offset of the levels is subtracted as offset times the sum of the inputs.
#[cube]
#[allow(clippy::too_many_arguments)]
fn add_step<S: Numeric, F: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
    words: &Array<Piece>,
    scales: &Array<S>,
    second_words: &Array<Piece>,
    second_scales: &Array<S>,
    third_words: &Array<Piece>,
    third_scales: &Array<S>,
    matrix: usize,
    channels: &Array<usize>,
    at: usize,
    sums: &mut Array<f32>,
    squares: &mut Array<f32>,
    #[comptime] config: MatmulConfig,
) {
    let outputs = comptime!(config.outputs);
    let half = comptime!(config.outputs / 2);
    let mut loaded = Array::<Piece>::new(outputs);
    let mut factors = Array::<f32>::new(outputs);
    let (l, f) = (&mut loaded, &mut factors);
    if comptime!(config.matrices == Matrices::One) {
        load(words, scales, channels, at, l, f, 0usize, outputs, config);
    } else if comptime!(config.matrices == Matrices::Pair) {
        load(words, scales, channels, at, l, f, 0usize, half, config);
        load(
            second_words,
            second_scales,
            channels,
            at,
            l,
            f,
            half,
            outputs,
            config,
        );
    } else if matrix == 0 {
        load(words, scales, channels, at, l, f, 0usize, outputs, config);
    } else if matrix == 1 {
        load(
            second_words,
            second_scales,
            channels,
            at,
            l,
            f,
            0usize,
            outputs,
            config,
        );
    } else {
        load(
            third_words,
            third_scales,
            channels,
            at,
            l,
            f,
            0usize,
            outputs,
            config,
        );
    }
    let ones = Vector::<f32, Const<4>>::new(1.0f32);
    let mut dots = Array::<f32>::new(comptime!(config.rows * config.outputs));
    let mut totals = Array::<f32>::new(comptime!(config.rows));
    #[unroll]
    for row in 0..config.rows {
        totals[row] = 0.0f32;
        #[unroll]
        for output in 0..outputs {
            dots[row * outputs + output] = 0.0f32;
        }
    }
    #[unroll]
    for quad in 0..config.quads() {
        let mut shrink = Vector::<f32, Const<4>>::empty();
        let mut factor = Array::<Vector<f32, Const<4>>>::new(outputs);
        if comptime!(config.is_quantised()) {
            let mut mask = Vector::<u32, Const<4>>::empty();
            #[unroll]
            for value in 0..4usize {
                mask[value] = comptime!(config.mask(quad, value));
                shrink[value] = comptime!(config.shrink(quad, value));
            }
            #[unroll]
            for output in 0..outputs {
                let word = loaded[output][comptime!(config.word(quad))];
                let masked = Vector::<u32, Const<4>>::new(word) & mask;
                factor[output] = Vector::<f32, Const<4>>::cast_from(masked);
            }
        } else {
            #[unroll]
            for output in 0..outputs {
                factor[output] = four(loaded[output], quad, comptime!(config.packing()));
            }
        }
        #[unroll]
        for row in 0..config.rows {
            let from = (row * config.vectors + at) * comptime!(config.quads()) + quad;
            let mut values = Vector::<f32, Const<4>>::cast_from(x[from]);
            if config.norm {
                squares[row] += values.dot(values);
                values *=
                    Vector::<f32, Const<4>>::cast_from(norm[at * comptime!(config.quads()) + quad]);
            }
            if comptime!(config.is_quantised()) {
                totals[row] += values.dot(ones);
                values *= shrink;
            }
            #[unroll]
            for output in 0..outputs {
                dots[row * outputs + output] += values.dot(factor[output]);
            }
        }
    }
    #[unroll]
    for row in 0..config.rows {
        #[unroll]
        for output in 0..outputs {
            let dot = dots[row * outputs + output];
            if comptime!(config.is_quantised()) {
                let dot = dot - comptime!(config.offset()) * totals[row];
                let sum = sums[row * outputs + output];
                sums[row * outputs + output] = fma(factors[output], dot, sum);
            } else {
                sums[row * outputs + output] += dot;
            }
        }
    }
}

/// The group's dot products with the columns from `first` on of matrix number `matrix`. Each unit gets that
/// of row `lane / columns` and column `first + lane % columns`, and where there are two matrices, the
/// second's after it.
#[cube]
#[allow(clippy::too_many_arguments)]
fn dot_products<S: Numeric, F: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
    words: &Array<Piece>,
    scales: &Array<S>,
    second_words: &Array<Piece>,
    second_scales: &Array<S>,
    third_words: &Array<Piece>,
    third_scales: &Array<S>,
    low: &Array<f32>,
    up: &Array<f32>,
    matrix: usize,
    first: usize,
    width: usize,
    rank: usize,
    epsilon: f32,
    #[comptime] config: MatmulConfig,
) -> Vector<f32, Const<2>> {
    let lanes = comptime!(config.group.lanes);
    let outputs = comptime!(config.outputs);
    let columns = comptime!(config.columns());
    let lane = UNIT_POS as usize % lanes;
    let mut sums = Array::<f32>::new(comptime!(config.rows * config.outputs));
    let mut squares = Array::<f32>::new(comptime!(config.rows));
    let mut channels = Array::<usize>::new(outputs);
    #[unroll]
    for output in 0..outputs {
        // Columns past the last repeat it; they are not written.
        channels[output] = min(first + comptime!(output % columns), width - 1);
    }
    #[unroll]
    for row in 0..config.rows {
        squares[row] = 0.0f32;
        #[unroll]
        for output in 0..outputs {
            sums[row * outputs + output] = 0.0f32;
        }
    }
    for at in range_stepped(lane, config.vectors, lanes) {
        add_step(
            x,
            norm,
            words,
            scales,
            second_words,
            second_scales,
            third_words,
            third_scales,
            matrix,
            &channels,
            at,
            &mut sums,
            &mut squares,
            config,
        );
    }
    if config.adapter {
        for r in range_stepped(lane, rank, lanes) {
            #[unroll]
            for output in 0..outputs {
                let factor = up[channels[output] * rank + r];
                #[unroll]
                for row in 0..config.rows {
                    let sum = sums[row * outputs + output];
                    sums[row * outputs + output] = fma(factor, low[row * rank + r], sum);
                }
            }
        }
    }
    let mut mine = Vector::<f32, Const<2>>::new(0.0f32);
    let mut square = 0.0f32;
    if config.group.plane {
        #[unroll]
        for row in 0..config.rows {
            let mut of_row = 0.0f32;
            if config.norm {
                of_row = plane_sum(squares[row]);
            }
            #[unroll]
            for output in 0..outputs {
                let sum = plane_sum(sums[row * outputs + output]);
                let place = comptime!(output / columns);
                let is_mine = lane == comptime!(row * columns + output % columns);
                mine[place] = select(is_mine, sum, mine[place]);
                square = select(is_mine, of_row, square);
            }
        }
    } else {
        let results = comptime!(config.rows * config.outputs);
        let mut shared = SharedMemory::<f32>::new(comptime!(
            (config.rows * config.outputs + config.rows) * config.group.lanes
        ));
        #[unroll]
        for result in 0..results {
            shared[result * lanes + lane] = sums[result];
        }
        #[unroll]
        for row in 0..config.rows {
            shared[(results + row) * lanes + lane] = squares[row];
        }
        sync_cube();
        if lane < comptime!(config.rows * columns) {
            let row = lane / columns;
            let first = row * outputs + lane % columns;
            for other in 0..lanes {
                mine[0] += shared[first * lanes + other];
                if comptime!(columns < outputs) {
                    mine[1] += shared[(first + columns) * lanes + other];
                }
                square += shared[(results + row) * lanes + other];
            }
        }
    }
    if config.norm {
        let count = comptime!((config.vectors * config.quads() * 4) as f32);
        let root = (square / count + epsilon).sqrt();
        mine[0] /= root;
        mine[1] /= root;
    }
    mine
}

/// The first column of this unit's group.
#[cube]
fn first_column(#[comptime] config: MatmulConfig) -> usize {
    let group = UNIT_POS as usize / comptime!(config.group.lanes);
    (CUBE_POS * config.groups + group) * comptime!(config.columns())
}

/// `y = norm(x) Wᵀ (+ bias) (+ residual) (+ low Bᵀ)`; `low` `[rows, rank]` scaled already, `up` `[out, rank]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn one_matrix<S: Numeric, F: Numeric, O: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
    words: &Array<Piece>,
    scales: &Array<S>,
    bias: &Array<O>,
    residual: &Array<O>,
    low: &Array<f32>,
    up: &Array<f32>,
    y: &mut Array<O>,
    width: usize,
    rank: usize,
    epsilon: f32,
    #[comptime] config: MatmulConfig,
    #[comptime] out: Packing,
    #[define(S, F, O)] _types: [StorageType; 3],
) {
    let first = first_column(config);
    let sums = dot_products(
        x, norm, words, scales, words, scales, words, scales, low, up, 0usize, first, width, rank,
        epsilon, config,
    );
    let mut value = sums[0];
    let lane = UNIT_POS as usize % comptime!(config.group.lanes);
    let column = first + lane % config.columns();
    if lane < comptime!(config.rows * config.columns()) && column < width {
        let at = lane / config.columns() * width + column;
        if config.bias {
            value += f32::cast_from(bias[column]);
        }
        if config.residual {
            value += f32::cast_from(residual[at]);
        }
        y[at] = O::cast_from(within(value, out));
    }
}

/// Three matmuls of one normalised input, outputs concatenated.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn three_matrices<S: Numeric, F: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
    first_words: &Array<Piece>,
    first_scales: &Array<S>,
    second_words: &Array<Piece>,
    second_scales: &Array<S>,
    third_words: &Array<Piece>,
    third_scales: &Array<S>,
    none: &Array<f32>,
    y: &mut Array<F>,
    first_width: usize,
    second_width: usize,
    third_width: usize,
    epsilon: f32,
    #[comptime] config: MatmulConfig,
    #[comptime] out: Packing,
    #[define(S, F)] _types: [StorageType; 2],
) {
    let width = first_width + second_width + third_width;
    let first = first_column(config);
    // The widths are multiples of a group's columns, so a group has one matrix.
    let mut matrix = 0usize;
    let mut before = 0usize;
    let mut own_width = first_width;
    if first >= first_width + second_width {
        matrix = 2usize;
        before = first_width + second_width;
        own_width = third_width;
    } else if first >= first_width {
        matrix = 1usize;
        before = first_width;
        own_width = second_width;
    }
    let sums = dot_products(
        x,
        norm,
        first_words,
        first_scales,
        second_words,
        second_scales,
        third_words,
        third_scales,
        none,
        none,
        matrix,
        first - before,
        own_width,
        0usize,
        epsilon,
        config,
    );
    let lane = UNIT_POS as usize % comptime!(config.group.lanes);
    let column = first + lane % config.columns();
    if lane < comptime!(config.rows * config.columns()) && column < width {
        let at = lane / config.columns() * width + column;
        y[at] = F::cast_from(within(sums[0], out));
    }
}

/// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn swiglu_matrices<S: Numeric, F: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
    gate_words: &Array<Piece>,
    gate_scales: &Array<S>,
    up_words: &Array<Piece>,
    up_scales: &Array<S>,
    none: &Array<f32>,
    y: &mut Array<F>,
    width: usize,
    epsilon: f32,
    #[comptime] config: MatmulConfig,
    #[comptime] out: Packing,
    #[define(S, F)] _types: [StorageType; 2],
) {
    let first = first_column(config);
    let sums = dot_products(
        x,
        norm,
        gate_words,
        gate_scales,
        up_words,
        up_scales,
        gate_words,
        gate_scales,
        none,
        none,
        0usize,
        first,
        width,
        0usize,
        epsilon,
        config,
    );
    let lane = UNIT_POS as usize % comptime!(config.group.lanes);
    let column = first + lane % config.columns();
    if lane < comptime!(config.rows * config.columns()) && column < width {
        let value = sums[0] / (1.0f32 + (-sums[0]).exp()) * sums[1];
        y[lane / config.columns() * width + column] = F::cast_from(within(value, out));
    }
}

/// `low = scaling · x Aᵀ`: `x` `[rows, in]`, `a` `[rank, in]`, `low` `[rows, rank]`; a group of units a
/// rank. `in` is a multiple of a piece of the input.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn low_rank(
    x: &Array<Piece>,
    a: &Array<Vector<f32, Const<4>>>,
    low: &mut Array<f32>,
    rank: usize,
    pieces: usize,
    scaling: f32,
    #[comptime] rows: usize,
    #[comptime] group: Group,
    #[comptime] groups: usize,
    #[comptime] packing: Packing,
) {
    let lanes = comptime!(group.lanes);
    let lane = UNIT_POS as usize % lanes;
    let r = CUBE_POS * groups + UNIT_POS as usize / lanes;
    let from = min(r, rank - 1);
    let quads = comptime!(packing.piece() / 4);
    let mut sums = Array::<f32>::new(rows);
    #[unroll]
    for row in 0..rows {
        sums[row] = 0.0f32;
    }
    for at in range_stepped(lane, pieces, lanes) {
        #[unroll]
        for row in 0..rows {
            let values = x[row * pieces + at];
            #[unroll]
            for index in 0..packing.pairs() {
                let value = pair(values, index, packing);
                let factors = a[(from * pieces + at) * quads + comptime!(index / 2)];
                #[unroll]
                for half in 0..2usize {
                    let factor = factors[comptime!(index % 2 * 2 + half)];
                    sums[row] = fma(value[half], factor, sums[row]);
                }
            }
        }
    }
    #[unroll]
    for row in 0..rows {
        let sum = group_sum(sums[row], group);
        if lane == 0 && r < rank {
            low[row * rank + r] = sum * scaling;
        }
    }
}

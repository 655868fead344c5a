//! Matmul of rows with matrices `[out, in]` in tiles: floats, or quantised levels unpacked on the way.
//!
//! A cube computes a tile of the result, stage by stage along the inputs: while its planes multiply one stage
//! with cooperative matrices (tensor cores), sums in f32, the next is written into shared memory as f16, and
//! the pieces of those behind it are on their way. Few rows have small tiles whose planes share the inputs
//! between them; their sums are added at the end. Levels become exact f16 numbers by their bits: a level under
//! the exponent of 1,024 is 1,024 and the level.

use cubecl::{cmma, prelude::*};
use half::f16;

use super::{
    products::Matrices,
    tile_config::{AREA, HALVES, LANES, PLANES, SIDE, TileConfig, UNITS},
    words::{Packing, Piece, pair, within},
};

/// The inputs of a piece in the order in which [`store_matrix`] leaves the levels of a word: of eight
/// inputs, each of the first four with the one four behind it; of four, with the one two behind.
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
fn find_roots(
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
        if unit % LANES == 0 {
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
fn load_input(
    x: &Array<Piece>,
    norm: &Array<Piece>,
    loaded: &mut Array<Piece>,
    gains: &mut Array<Piece>,
    row: usize,
    rows: usize,
    at: usize,
    row_pieces: usize,
    #[comptime] slot: usize,
    #[comptime] config: TileConfig,
) {
    let per_row = comptime!(config.depth / HALVES);
    if config.norm {
        let piece = at + UNIT_POS as usize % per_row;
        gains[slot] = norm[min(piece, row_pieces - 1)];
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
        loaded[comptime!(slot * config.input_loads() + index)] = value;
    }
}

/// Writes the loaded pieces of the input into shared memory, as far as the tile has `rows`: what a row of
/// zeros or of anything else would give is not written either.
#[cube]
fn store_input(
    loaded: &Array<Piece>,
    gains: &Array<Piece>,
    roots: &SharedMemory<f32>,
    shared: &mut SharedMemory<Piece>,
    rows: usize,
    #[comptime] slot: usize,
    #[comptime] buffer: usize,
    #[comptime] config: TileConfig,
) {
    let per_row = comptime!(config.depth / HALVES);
    #[unroll]
    for index in 0..config.input_loads() {
        let task = UNIT_POS as usize + comptime!(index * UNITS);
        let row = task / per_row;
        if task < comptime!(config.input_pieces()) && row < rows {
            let mut value = loaded[comptime!(slot * config.input_loads() + index)];
            if config.norm {
                value = normalised(value, gains[slot], roots[row]);
            }
            let place = (row + comptime!(buffer * config.rows)) * comptime!(config.stride())
                + task % per_row;
            shared[place] = ordered(value, comptime!(config.bits()));
        }
    }
}

/// Loads this unit's pieces of the matrix for the outputs from `column` on and inputs from piece `at` on,
/// and their scales; outputs past the last repeat it, and so do inputs of quantised rows (the input is zero
/// there), while floats are zero.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load_matrix<S: Numeric>(
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
    #[comptime] slot: usize,
    #[comptime] config: TileConfig,
) {
    let per_row = comptime!(config.depth / config.piece());
    #[unroll]
    for index in 0..config.matrix_loads() {
        let place = comptime!(slot * config.matrix_loads() + index);
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
        if comptime!(config.matrix_pieces() % UNITS == 0)
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
        loaded[place] = value;
        factors[place] = factor;
    }
}

/// Writes the loaded pieces of the matrix into shared memory as f16, levels in the order of [`ordered`].
#[cube]
fn store_matrix(
    loaded: &Array<Piece>,
    factors: &Array<f16>,
    shared: &mut SharedMemory<Piece>,
    #[comptime] slot: usize,
    #[comptime] buffer: usize,
    #[comptime] config: TileConfig,
) {
    let per_row = comptime!(config.depth / config.piece());
    let parts = comptime!(config.piece() / HALVES);
    let bits = comptime!(config.bits());
    #[unroll]
    for index in 0..config.matrix_loads() {
        let from = comptime!(slot * config.matrix_loads() + index);
        let task = UNIT_POS as usize + comptime!(index * UNITS);
        if comptime!(config.matrix_pieces() % UNITS == 0)
            || task < comptime!(config.matrix_pieces())
        {
            let place = (task / per_row + comptime!(buffer * config.outputs))
                * comptime!(config.stride())
                + task % per_row * parts;
            if comptime!(bits == 0) {
                shared[place] = loaded[from];
            } else {
                let offset = Vector::<f16, Const<2>>::new(f16::new(comptime!(
                    (1024 + (1 << (bits - 1))) as f32
                )));
                let factor = Vector::<f16, Const<2>>::new(factors[from]);
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
                        let levels = ((loaded[from][source] >> comptime!(shift as u32)) & mask)
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

/// Adds this plane's products of a stage to its cooperative matrices.
#[cube]
#[allow(unsafe_code)]
fn multiply(
    input: &SharedMemory<Piece>,
    matrix: &SharedMemory<Piece>,
    sums: &Sequence<cmma::Matrix<f32>>,
    high_at: usize,
    wide_at: usize,
    deep_at: usize,
    #[comptime] buffer: usize,
    #[comptime] config: TileConfig,
) {
    let stride = comptime!(config.stride());
    // In words, which the pieces consist of.
    let words = comptime!((config.stride() * 4) as u32);
    let (high, wide) = comptime!((config.high(), config.wide()));
    #[unroll]
    for step in 0..config.steps() {
        let at = (deep_at * comptime!(config.steps()) + step) * comptime!(SIDE / HALVES);
        let mut columns = Sequence::<cmma::Matrix<f16>>::new();
        #[unroll]
        for index in 0..wide {
            let from = ((wide_at * wide + index) * SIDE + comptime!(buffer * config.outputs))
                * stride
                + at;
            // SAFETY: it is loaded before it is read.
            let b = unsafe {
                cmma::Matrix::<f16>::uninitialized(
                    cmma::MatrixIdent::B,
                    SIDE,
                    SIDE,
                    SIDE,
                    cmma::MatrixLayout::ColMajor,
                )
            };
            cmma::load(&b, &matrix.slice(from, from + SIDE * stride), words);
            columns.push(b);
        }
        #[unroll]
        for row in 0..high {
            let from =
                ((high_at * high + row) * SIDE + comptime!(buffer * config.rows)) * stride + at;
            // SAFETY: as above.
            let a = unsafe {
                cmma::Matrix::<f16>::uninitialized(
                    cmma::MatrixIdent::A,
                    SIDE,
                    SIDE,
                    SIDE,
                    cmma::MatrixLayout::RowMajor,
                )
            };
            cmma::load(&a, &input.slice(from, from + SIDE * stride), words);
            #[unroll]
            for index in 0..wide {
                let sum = sums.index(comptime!(row * wide + index));
                cmma::execute::<f16, f16, f32, f32>(&a, columns.index(index), sum, sum);
            }
        }
    }
}

/// The same without cooperative matrices: a unit has some elements of each.
#[cube]
fn multiply_plainly(
    input: &SharedMemory<Piece>,
    matrix: &SharedMemory<Piece>,
    sums: &mut Array<f32>,
    high_at: usize,
    wide_at: usize,
    deep_at: usize,
    #[comptime] buffer: usize,
    #[comptime] config: TileConfig,
) {
    let stride = comptime!(config.stride());
    let (high, wide) = comptime!((config.high(), config.wide()));
    let each = comptime!(AREA / LANES);
    let lane = UNIT_POS as usize % LANES;
    let count = comptime!(config.steps() * SIDE / HALVES);
    for piece in 0..count {
        let at = deep_at * count + piece;
        #[unroll]
        for row in 0..high {
            #[unroll]
            for index in 0..wide {
                #[unroll]
                for element in 0..each {
                    let element_at = lane + element * LANES;
                    let x_row = (high_at * high + row) * SIDE + element_at / SIDE;
                    let w_row = (wide_at * wide + index) * SIDE + element_at % SIDE;
                    let left = input[(x_row + comptime!(buffer * config.rows)) * stride + at];
                    let right = matrix[(w_row + comptime!(buffer * config.outputs)) * stride + at];
                    let place = comptime!((row * wide + index) * each + element);
                    let mut sum = sums[place];
                    #[unroll]
                    for part in 0..comptime!(HALVES / 2) {
                        let a = pair(left, part, Packing::F16);
                        let b = pair(right, part, Packing::F16);
                        sum = fma(a[0], b[0], fma(a[1], b[1], sum));
                    }
                    sums[place] = sum;
                }
            }
        }
    }
}

/// A row's scale, out of the matrix that a tile has its outputs of.
#[cube]
fn scale_of<S: Numeric>(
    scales: &Array<S>,
    second_scales: &Array<S>,
    third_scales: &Array<S>,
    matrix: usize,
    channel: usize,
    #[comptime] matrices: Matrices,
) -> f32 {
    if comptime!(matrices == Matrices::One) || matrix == 0 {
        f32::cast_from(scales[channel])
    } else if comptime!(matrices == Matrices::Pair) || matrix == 1 {
        f32::cast_from(second_scales[channel])
    } else {
        f32::cast_from(third_scales[channel])
    }
}

/// One of the planes' sums in shared memory.
#[cube]
fn sum_at(
    matrices: &SharedMemory<Piece>,
    plain: &SharedMemory<f32>,
    at: usize,
    #[comptime] cooperative: bool,
) -> f32 {
    if cooperative {
        f32::reinterpret(matrices[at / 4][at % 4])
    } else {
        plain[at]
    }
}

/// `y = norm(x) Wᵀ (+ bias) (+ residual)` `[rows, out]`; of three matrices concatenated, of two `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
///
/// `x` `[rows, in]` in f16, its rows of `input_pieces` pieces; rows of the matrices have `row_pieces` pieces.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn tiled<S: Numeric, O: Numeric>(
    x: &Array<Piece>,
    norm: &Array<Piece>,
    words: &Array<Piece>,
    scales: &Array<S>,
    second_words: &Array<Piece>,
    second_scales: &Array<S>,
    third_words: &Array<Piece>,
    third_scales: &Array<S>,
    bias: &Array<O>,
    residual: &Array<O>,
    y: &mut Array<O>,
    rows: usize,
    first_width: usize,
    second_width: usize,
    third_width: usize,
    input_pieces: usize,
    row_pieces: usize,
    epsilon: f32,
    #[comptime] config: TileConfig,
    #[comptime] out: Packing,
    #[define(S, O)] _types: [StorageType; 2],
) {
    let mut input = SharedMemory::<Piece>::new(comptime!(2 * config.rows * config.stride()));
    let mut matrix = SharedMemory::<Piece>::new(comptime!(2 * config.outputs * config.stride()));
    // Cooperative matrices are stored where the input was.
    let mut plain_sums = SharedMemory::<f32>::new(comptime!(if config.cooperative {
        1
    } else {
        PLANES * AREA
    }));
    let unit = UNIT_POS as usize;
    let lane = unit % LANES;
    let plane = unit / LANES;
    let [down, across, deep] = comptime!(config.planes);
    let (high, wide) = comptime!((config.high(), config.wide()));
    let spread = comptime!(config.spread());
    let each = comptime!(AREA / LANES);
    let high_at = plane % spread / across;
    let wide_at = plane % across;
    let deep_at = plane / spread;

    let is_pair = comptime!(config.matrices == Matrices::Pair);
    let row = CUBE_POS_X as usize * config.rows;
    let place = CUBE_POS_Y as usize * comptime!(if is_pair { SIDE } else { config.outputs });
    // The widths of three matrices are multiples of a tile's outputs, so a tile has one matrix.
    let mut total = first_width;
    let mut which = 0usize;
    let mut before = 0usize;
    let mut width = first_width;
    if comptime!(config.matrices == Matrices::Three) {
        total = first_width + second_width + third_width;
        if place >= first_width + second_width {
            which = 2usize;
            before = first_width + second_width;
            width = third_width;
        } else if place >= first_width {
            which = 1usize;
            before = first_width;
            width = second_width;
        }
    }
    let column = place - before;

    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    let mut plain = Array::<f32>::new(comptime!(if config.cooperative {
        1
    } else {
        high * wide * each
    }));
    if config.cooperative {
        #[unroll]
        for _ in 0..comptime!(high * wide) {
            sums.push(cmma::Matrix::<f32>::from_value(
                cmma::MatrixIdent::Accumulator,
                SIDE,
                SIDE,
                SIDE,
                cmma::MatrixLayout::Undefined,
                0.0f32,
            ));
        }
    } else {
        #[unroll]
        for index in 0..comptime!(high * wide * each) {
            plain[index] = 0.0f32;
        }
    }

    let ahead = comptime!(config.ahead);
    let input_step = comptime!(config.depth / HALVES);
    let step = comptime!(config.depth / config.piece());
    let stages = input_pieces.div_ceil(input_step);
    let mut x_loaded = Array::<Piece>::new(comptime!(config.ahead * config.input_loads()));
    let mut gains = Array::<Piece>::new(comptime!(config.ahead));
    let mut w_loaded = Array::<Piece>::new(comptime!(config.ahead * config.matrix_loads()));
    let mut factors = Array::<f16>::new(comptime!(config.ahead * config.matrix_loads()));
    let mut roots = SharedMemory::<f32>::new(comptime!(config.rows));
    #[unroll]
    for slot in 0..ahead {
        load_matrix(
            words,
            scales,
            second_words,
            second_scales,
            third_words,
            third_scales,
            which,
            &mut w_loaded,
            &mut factors,
            column,
            width,
            slot * step,
            row_pieces,
            slot,
            config,
        );
    }
    if config.norm {
        find_roots(x, &mut roots, row, rows, input_pieces, epsilon, config);
    }
    #[unroll]
    for slot in 0..ahead {
        load_input(
            x,
            norm,
            &mut x_loaded,
            &mut gains,
            row,
            rows,
            slot * input_step,
            input_pieces,
            slot,
            config,
        );
    }
    // The stages from -1 on: one is written while the one before is multiplied.
    for turn in range_stepped(0usize, stages + 1, ahead) {
        #[unroll]
        for slot in 0..ahead {
            let stage = turn + slot;
            let buffer = comptime!(slot % 2);
            if stage <= stages {
                if stage > 0 {
                    let before = comptime!((slot + 1) % 2);
                    if config.cooperative {
                        multiply(
                            &input, &matrix, &sums, high_at, wide_at, deep_at, before, config,
                        );
                    } else {
                        multiply_plainly(
                            &input, &matrix, &mut plain, high_at, wide_at, deep_at, before, config,
                        );
                    }
                }
                if stage < stages {
                    store_input(
                        &x_loaded,
                        &gains,
                        &roots,
                        &mut input,
                        rows - row,
                        slot,
                        buffer,
                        config,
                    );
                    store_matrix(&w_loaded, &factors, &mut matrix, slot, buffer, config);
                    let next = stage + ahead;
                    if next < stages {
                        load_matrix(
                            words,
                            scales,
                            second_words,
                            second_scales,
                            third_words,
                            third_scales,
                            which,
                            &mut w_loaded,
                            &mut factors,
                            column,
                            width,
                            next * step,
                            row_pieces,
                            slot,
                            config,
                        );
                        load_input(
                            x,
                            norm,
                            &mut x_loaded,
                            &mut gains,
                            row,
                            rows,
                            next * input_step,
                            input_pieces,
                            slot,
                            config,
                        );
                    }
                }
                sync_cube();
            }
        }
    }

    let tiles = comptime!(if is_pair { down } else { down * across });
    #[unroll]
    for r in 0..high {
        #[unroll]
        for c in 0..wide {
            if config.cooperative {
                cmma::store(
                    &mut input.slice_mut(plane * AREA / 4, (plane + 1) * AREA / 4),
                    sums.index(comptime!(r * wide + c)),
                    comptime!(SIDE as u32),
                    cmma::MatrixLayout::RowMajor,
                );
            } else {
                #[unroll]
                for element in 0..each {
                    plain_sums[plane * AREA + lane + element * LANES] =
                        plain[comptime!((r * wide + c) * each + element)];
                }
            }
            sync_cube();
            for at in range_stepped(unit, comptime!(tiles * AREA), UNITS) {
                let tile = at / AREA;
                let element = at % AREA;
                let source = comptime!(if is_pair { 2 } else { 1 }) * tile;
                let mut value = 0.0f32;
                let mut other = 0.0f32;
                #[unroll]
                for part in 0..deep {
                    let from = (source + part * spread) * AREA + element;
                    value += sum_at(&input, &plain_sums, from, config.cooperative);
                    if comptime!(is_pair) {
                        other += sum_at(&input, &plain_sums, from + AREA, config.cooperative);
                    }
                }
                let mut tile_row = tile;
                let mut tile_column = 0usize;
                if comptime!(!is_pair) {
                    tile_row = tile / across;
                    tile_column = tile % across;
                }
                let y_row = row + (tile_row * high + r) * SIDE + element / SIDE;
                let channel = column + (tile_column * wide + c) * SIDE + element % SIDE;
                if y_row < rows && channel < width {
                    if config.row_scale {
                        value *= scale_of(
                            scales,
                            second_scales,
                            third_scales,
                            which,
                            channel,
                            config.matrices,
                        );
                    }
                    if comptime!(is_pair) {
                        if config.row_scale {
                            other *= f32::cast_from(second_scales[channel]);
                        }
                        value = value / (1.0f32 + (-value).exp()) * other;
                    }
                    let place = y_row * total + before + channel;
                    if config.bias {
                        value += f32::cast_from(bias[channel]);
                    }
                    if config.residual {
                        value += f32::cast_from(residual[place]);
                    }
                    y[place] = O::cast_from(within(value, out));
                }
            }
            sync_cube();
        }
    }
}

//! Matmul of rows with matrices `[out, in]` in tiles: floats, or quantised levels unpacked on the way.
//!
//! A cube computes a tile of the result, stage by stage along the inputs: it loads a piece of the input rows
//! and of the matrix into shared memory as f16, while the next stage's pieces are on their way, and its
//! planes multiply them with cooperative matrices (tensor cores), sums in f32. Few rows have small tiles whose
//! planes share the inputs between them, so that a cube reads as much at once as it can; their sums are added
//! at the end. Levels become exact f16 numbers by their bits: a level under the exponent of 1,024 is 1,024 and
//! the level.

use cubecl::{cmma, prelude::*};
use half::f16;

use super::{
    matmul_config::Matrices,
    tile_config::{AREA, HALVES, LANES, PLANES, SIDE, TileConfig, UNITS},
    tile_stage::{find_roots, load_input, load_matrix, store_input, store_matrix},
    words::{Packing, Piece, pair, within},
};

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
            let from = (wide_at * wide + index) * SIDE * stride + at;
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
            let from = (high_at * high + row) * SIDE * stride + at;
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
                    let left = input[x_row * stride + at];
                    let right = matrix[w_row * stride + at];
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

/// `y = norm(x) Wᵀ (+ bias) (+ residual)` `[rows, out]`; of three matrices concatenated, of two
/// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
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
    let mut input = SharedMemory::<Piece>::new(comptime!(config.rows * config.stride()));
    let mut matrix = SharedMemory::<Piece>::new(comptime!(config.outputs * config.stride()));
    let mut shared_sums = SharedMemory::<f32>::new(comptime!(PLANES * AREA));
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

    let input_step = comptime!(config.depth / HALVES);
    let step = comptime!(config.depth / config.piece());
    let stages = input_pieces.div_ceil(input_step);
    let mut x_loaded = Array::<Piece>::new(comptime!(config.input_loads()));
    let mut gains = Array::<Piece>::new(1usize);
    let mut w_loaded = Array::<Piece>::new(comptime!(config.matrix_loads()));
    let mut factors = Array::<f16>::new(comptime!(config.matrix_loads()));
    let mut roots = SharedMemory::<f32>::new(comptime!(config.rows));
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
        0usize,
        row_pieces,
        config,
    );
    if config.norm {
        find_roots(x, &mut roots, row, rows, input_pieces, epsilon, config);
    }
    load_input(
        x,
        norm,
        &mut x_loaded,
        &mut gains,
        row,
        rows,
        0usize,
        input_pieces,
        config,
    );
    for stage in 0..stages {
        store_input(&x_loaded, &gains, &roots, &mut input, rows - row, config);
        store_matrix(&w_loaded, &factors, &mut matrix, config);
        sync_cube();
        // Past the last stage the last pieces come again, which nothing is done with.
        load_input(
            x,
            norm,
            &mut x_loaded,
            &mut gains,
            row,
            rows,
            (stage + 1) * input_step,
            input_pieces,
            config,
        );
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
            (stage + 1) * step,
            row_pieces,
            config,
        );
        if config.cooperative {
            multiply(&input, &matrix, &sums, high_at, wide_at, deep_at, config);
        } else {
            multiply_plainly(
                &input, &matrix, &mut plain, high_at, wide_at, deep_at, config,
            );
        }
        sync_cube();
    }

    let tiles = comptime!(if is_pair { down } else { down * across });
    #[unroll]
    for r in 0..high {
        #[unroll]
        for c in 0..wide {
            if config.cooperative {
                cmma::store(
                    &mut shared_sums.slice_mut(plane * AREA, (plane + 1) * AREA),
                    sums.index(comptime!(r * wide + c)),
                    comptime!(SIDE as u32),
                    cmma::MatrixLayout::RowMajor,
                );
            } else {
                #[unroll]
                for element in 0..each {
                    shared_sums[plane * AREA + lane + element * LANES] =
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
                    value += shared_sums[from];
                    if comptime!(is_pair) {
                        other += shared_sums[from + AREA];
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

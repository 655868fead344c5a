//! Norms over rows: a cube a row, statistics in f32.

use burn::tensor::Tensor;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::{
    launch::{Buffer, Cube, contiguous, cubes, elements, empty, pieces, tensor},
    sums::cube_sum,
    words::{Packing, Piece, pair, within},
};

/// Units of a row's cube.
const UNITS: usize = 128;

/// The comptime configuration of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct NormConfig {
    units: usize,
    packing: Packing,
    /// Layer norm with a shift, else root mean square.
    centred: bool,
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn norm_rows<F: Numeric>(
    x: &Array<Piece>,
    weight: &Array<Piece>,
    bias: &Array<Piece>,
    y: &mut Array<F>,
    rows: usize,
    row_pieces: usize,
    epsilon: f32,
    #[comptime] config: NormConfig,
    #[define(F)] _dtype: StorageType,
) {
    let packing = comptime!(config.packing);
    let pairs = comptime!(config.packing.pairs());
    // Cubes past the last row compute it again, so that all reach the barriers of the sums.
    let row = min(CUBE_POS, rows - 1);
    let start = row * row_pieces;
    let count = f32::cast_from(row_pieces * comptime!(config.packing.piece()));
    let unit = UNIT_POS as usize;
    let mut mean = 0.0f32;
    if config.centred {
        let mut sum = 0.0f32;
        for at in range_stepped(unit, row_pieces, config.units) {
            let piece = x[start + at];
            #[unroll]
            for index in 0..pairs {
                let value = pair(piece, index, packing);
                sum += value[0] + value[1];
            }
        }
        mean = cube_sum(sum, config.units) / count;
    }
    let mut squares = 0.0f32;
    for at in range_stepped(unit, row_pieces, config.units) {
        let piece = x[start + at];
        #[unroll]
        for index in 0..pairs {
            let value = pair(piece, index, packing) - Vector::new(mean);
            squares = fma(value[0], value[0], fma(value[1], value[1], squares));
        }
    }
    let root = 1.0f32 / (cube_sum(squares, config.units) / count + epsilon).sqrt();
    for at in range_stepped(unit, row_pieces, config.units) {
        let piece = x[start + at];
        let factors = weight[at];
        let shifts = bias[at];
        #[unroll]
        for index in 0..pairs {
            let value = (pair(piece, index, packing) - Vector::new(mean)) * Vector::new(root);
            let mut value = value * pair(factors, index, packing);
            if config.centred {
                value += pair(shifts, index, packing);
            }
            let place = (start + at) * comptime!(config.packing.piece()) + 2 * index;
            y[place] = F::cast_from(within(value[0], packing));
            y[place + 1] = F::cast_from(within(value[1], packing));
        }
    }
}

/// Root-mean-square norm without `bias`, layer norm with it.
pub(super) fn norm<R: CubeRuntime>(
    x: &Tensor<Cube<R>, 2>,
    weight: &Tensor<Cube<R>, 1>,
    bias: Option<&Tensor<Cube<R>, 1>>,
    epsilon: f64,
) -> Option<Tensor<Cube<R>, 2>> {
    let [_, width] = x.dims();
    let packing = Packing::of(x.dtype())?;
    // Without a shift it is not read; any buffer takes its place.
    let (centred, bias) = (bias.is_some(), bias.unwrap_or(weight));
    if [weight.dtype(), bias.dtype()] != [x.dtype(); 2] || !width.is_multiple_of(packing.piece()) {
        return None;
    }
    let x = contiguous(x.clone());
    let (weight, bias) = (contiguous(weight.clone()), contiguous(bias.clone()));
    Some(tensor(normalised(&x, &weight, &bias, epsilon, centred)))
}

/// [`norm`] of buffers of one type and whole pieces; `bias` is read where rows are `centred`.
fn normalised<R: CubeRuntime>(
    x: &Buffer<R>,
    weight: &Buffer<R>,
    bias: &Buffer<R>,
    epsilon: f64,
    centred: bool,
) -> Buffer<R> {
    let [rows, width] = x.meta.shape().dims();
    let packing = Packing::of(x.dtype).expect("the kernels support the type");
    let row_pieces = width / packing.piece();
    let config = NormConfig {
        units: UNITS.min(row_pieces.next_power_of_two()),
        packing,
        centred,
    };
    let y = empty(x, [rows, width], x.dtype);
    // SAFETY: the arrays are as long as rows and width say.
    #[allow(unsafe_code)]
    unsafe {
        norm_rows::launch_unchecked::<R>(
            &x.client,
            cubes(rows),
            CubeDim::new_1d(config.units as u32),
            pieces(x),
            pieces(weight),
            pieces(bias),
            elements(&y),
            rows,
            row_pieces,
            epsilon as f32,
            config,
            x.dtype.into(),
        );
    }
    y
}

/// Root-mean-square norm of buffers of one type and whole pieces.
pub(super) fn root_mean_square<R: CubeRuntime>(
    x: &Buffer<R>,
    weight: &Buffer<R>,
    epsilon: f64,
) -> Buffer<R> {
    normalised(x, weight, weight, epsilon, false)
}

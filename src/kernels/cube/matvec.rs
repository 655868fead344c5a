//! Products of one to eight rows with matrices `[out, in]`: as fast as the matrices can be read.
//!
//! A group of units works out a few outputs for all rows. It reads the rows of the matrix sixteen bytes a
//! unit, side by side, several loads ahead; the input rows come out of the cache. A norm before the
//! product costs nothing here: its scale goes onto the input, its mean square is summed beside the
//! products, and its root divides their sums.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::{
    launch::{Buffer, cubes, elements, empty, pieces},
    sums::Group,
    words::{Packing, Piece, pair, within},
};

/// Most rows of one product.
pub(super) const MOST_ROWS: usize = 8;

/// Units of a cube of planes.
const UNITS: usize = 256;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Form {
    rows: usize,
    /// Outputs of a group.
    outputs: usize,
    /// Loads in flight of each row of the matrix.
    ahead: usize,
    /// Sixteen-byte pieces of a row of the matrix.
    pieces: usize,
    group: Group,
    /// Groups of a cube.
    groups: usize,
    packing: Packing,
    norm: bool,
    bias: bool,
    residual: bool,
}

impl Form {
    fn new<R: CubeRuntime>(x: &Buffer<R>, matrices: usize) -> Self {
        let [rows, width] = x.meta.shape().dims();
        let packing = Packing::of(x.dtype).expect("`covers` was asked");
        let group = Group::of(&x.client);
        // As many loads in flight as the size of the code allows: drivers take seconds over long kernels.
        // A cube that stands in for a plane is short of nothing else.
        let ahead = match (group.plane, rows) {
            (true, 1..=2) => 4 / matrices.min(2),
            (true, 3..=4) => 2,
            _ => 1,
        };
        Self {
            rows,
            outputs: 2,
            ahead,
            pieces: width / packing.piece(),
            group,
            groups: if group.plane { UNITS / group.lanes } else { 1 },
            packing,
            norm: false,
            bias: false,
            residual: false,
        }
    }

    fn count(&self, outputs: usize) -> CubeCount {
        cubes(outputs.div_ceil(self.outputs * self.groups))
    }

    fn dim(&self) -> CubeDim {
        CubeDim::new_1d((self.group.lanes * self.groups) as u32)
    }
}

/// Whether a product can be worked out here; `x` `[rows, in]`, `weight` `[out, in]`.
pub(super) fn covers<R: CubeRuntime>(x: &Buffer<R>, weight: &Buffer<R>) -> bool {
    let [rows, width] = x.meta.shape().dims();
    (1..=MOST_ROWS).contains(&rows)
        && x.dtype == weight.dtype
        && Packing::of(x.dtype).is_some_and(|packing| width.is_multiple_of(packing.piece()))
        && weight.is_contiguous()
}

/// Adds the products of one step of the group: `ahead` pieces a unit, the first at `at`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn add_step(
    x: &Array<Piece>,
    scale: &Array<Piece>,
    weight: &Array<Piece>,
    starts: &Array<usize>,
    at: usize,
    sums: &mut Array<f32>,
    squares: &mut Array<f32>,
    #[comptime] ahead: usize,
    #[comptime] form: Form,
) {
    let lanes = comptime!(form.group.lanes);
    let outputs = comptime!(form.outputs);
    let mut loaded = Array::<Piece>::new(comptime!(ahead * form.outputs));
    #[unroll]
    for step in 0..ahead {
        #[unroll]
        for output in 0..outputs {
            loaded[step * outputs + output] = weight[starts[output] + at + step * lanes];
        }
    }
    #[unroll]
    for step in 0..ahead {
        let place = at + step * lanes;
        #[unroll]
        for row in 0..form.rows {
            let values = x[row * form.pieces + place];
            #[unroll]
            for index in 0..form.packing.pairs() {
                let mut value = pair(values, index, form.packing);
                if form.norm {
                    squares[row] = fma(value[0], value[0], squares[row]);
                    squares[row] = fma(value[1], value[1], squares[row]);
                    value *= pair(scale[place], index, form.packing);
                }
                #[unroll]
                for output in 0..outputs {
                    let factor = pair(loaded[step * outputs + output], index, form.packing);
                    let sum = sums[row * outputs + output];
                    sums[row * outputs + output] =
                        fma(value[0], factor[0], fma(value[1], factor[1], sum));
                }
            }
        }
    }
}

/// The group's products with the outputs from `first` on, and `1 / rms` of the rows where there is a
/// norm. Each unit gets one: that of row `lane / outputs` and output `first + lane % outputs`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn products(
    x: &Array<Piece>,
    scale: &Array<Piece>,
    weight: &Array<Piece>,
    first: usize,
    width: usize,
    epsilon: f32,
    #[comptime] form: Form,
) -> f32 {
    let lanes = comptime!(form.group.lanes);
    let outputs = comptime!(form.outputs);
    let lane = UNIT_POS as usize % lanes;
    let mut sums = Array::<f32>::new(comptime!(form.rows * form.outputs));
    let mut squares = Array::<f32>::new(comptime!(form.rows));
    let mut starts = Array::<usize>::new(outputs);
    #[unroll]
    for output in 0..outputs {
        // Outputs behind the last repeat it; nobody writes them.
        starts[output] = min(first + output, width - 1) * form.pieces;
    }
    #[unroll]
    for row in 0..form.rows {
        squares[row] = 0.0f32;
        #[unroll]
        for output in 0..outputs {
            sums[row * outputs + output] = 0.0f32;
        }
    }
    let step = comptime!(form.ahead * form.group.lanes);
    let whole = comptime!(form.pieces / step * step);
    for round in 0..comptime!(form.pieces / step) {
        add_step(
            x,
            scale,
            weight,
            &starts,
            round * step + lane,
            &mut sums,
            &mut squares,
            form.ahead,
            form,
        );
    }
    for rest in 0..comptime!((form.pieces - whole).div_ceil(form.group.lanes)) {
        let at = whole + rest * lanes + lane;
        if at < form.pieces {
            add_step(
                x,
                scale,
                weight,
                &starts,
                at,
                &mut sums,
                &mut squares,
                1usize,
                form,
            );
        }
    }
    let mut mine = 0.0f32;
    let mut square = 0.0f32;
    if form.group.plane {
        #[unroll]
        for row in 0..form.rows {
            let mut of_row = 0.0f32;
            if form.norm {
                of_row = plane_sum(squares[row]);
            }
            #[unroll]
            for output in 0..outputs {
                let sum = plane_sum(sums[row * outputs + output]);
                let is_mine = lane == row * outputs + output;
                mine = select(is_mine, sum, mine);
                square = select(is_mine, of_row, square);
            }
        }
    } else {
        let results = comptime!(form.rows * form.outputs);
        let mut shared = SharedMemory::<f32>::new(comptime!(
            (form.rows * form.outputs + form.rows) * form.group.lanes
        ));
        #[unroll]
        for result in 0..results {
            shared[result * lanes + lane] = sums[result];
        }
        #[unroll]
        for row in 0..form.rows {
            shared[(results + row) * lanes + lane] = squares[row];
        }
        sync_cube();
        if lane < results {
            for other in 0..lanes {
                mine += shared[lane * lanes + other];
                square += shared[(results + lane / outputs) * lanes + other];
            }
        }
    }
    if form.norm {
        let count = comptime!((form.pieces * form.packing.piece()) as f32);
        mine /= (square / count + epsilon).sqrt();
    }
    mine
}

/// The first output of this unit's group.
#[cube]
fn first_output(#[comptime] form: Form) -> usize {
    let group = UNIT_POS as usize / comptime!(form.group.lanes);
    (CUBE_POS * form.groups + group) * form.outputs
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn one_matrix<O: Numeric>(
    x: &Array<Piece>,
    scale: &Array<Piece>,
    weight: &Array<Piece>,
    bias: &Array<O>,
    residual: &Array<O>,
    y: &mut Array<O>,
    width: usize,
    epsilon: f32,
    #[comptime] form: Form,
    #[comptime] out: Packing,
    #[define(O)] _out: StorageType,
) {
    let first = first_output(form);
    let mut value = products(x, scale, weight, first, width, epsilon, form);
    let lane = UNIT_POS as usize % comptime!(form.group.lanes);
    let column = first + lane % form.outputs;
    if lane < comptime!(form.rows * form.outputs) && column < width {
        let at = lane / form.outputs * width + column;
        if form.bias {
            value += f32::cast_from(bias[column]);
        }
        if form.residual {
            value += f32::cast_from(residual[at]);
        }
        y[at] = O::cast_from(within(value, out));
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn three_matrices<O: Numeric>(
    x: &Array<Piece>,
    scale: &Array<Piece>,
    first_weight: &Array<Piece>,
    second_weight: &Array<Piece>,
    third_weight: &Array<Piece>,
    y: &mut Array<O>,
    first_width: usize,
    second_width: usize,
    third_width: usize,
    epsilon: f32,
    #[comptime] form: Form,
    #[define(O)] _out: StorageType,
) {
    let width = first_width + second_width + third_width;
    let first = first_output(form);
    // The widths are multiples of a group's outputs, so a group has one matrix.
    let value = if first < first_width {
        products(x, scale, first_weight, first, first_width, epsilon, form)
    } else if first < first_width + second_width {
        let first = first - first_width;
        products(x, scale, second_weight, first, second_width, epsilon, form)
    } else {
        let first = first - first_width - second_width;
        products(x, scale, third_weight, first, third_width, epsilon, form)
    };
    let lane = UNIT_POS as usize % comptime!(form.group.lanes);
    let column = first + lane % form.outputs;
    if lane < comptime!(form.rows * form.outputs) && column < width {
        let at = lane / form.outputs * width + column;
        y[at] = O::cast_from(within(value, form.packing));
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn gated_matrices<O: Numeric>(
    x: &Array<Piece>,
    scale: &Array<Piece>,
    gate: &Array<Piece>,
    up: &Array<Piece>,
    y: &mut Array<O>,
    width: usize,
    epsilon: f32,
    #[comptime] form: Form,
    #[define(O)] _out: StorageType,
) {
    let first = first_output(form);
    let gate = products(x, scale, gate, first, width, epsilon, form);
    let up = products(x, scale, up, first, width, epsilon, form);
    let lane = UNIT_POS as usize % comptime!(form.group.lanes);
    let column = first + lane % form.outputs;
    if lane < comptime!(form.rows * form.outputs) && column < width {
        let value = gate / (1.0f32 + (-gate).exp()) * up;
        y[lane / form.outputs * width + column] = O::cast_from(within(value, form.packing));
    }
}

/// A norm that is taken of the input before it is multiplied.
#[derive(Debug, Clone)]
pub(super) struct InputNorm<R: CubeRuntime> {
    /// `[in]`.
    pub weight: Buffer<R>,
    /// Added to the mean square.
    pub epsilon: f64,
}

/// `norm(x) Wᵀ + bias + residual` in `out` type, which is that of bias and residual.
pub(super) fn product<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: Option<&InputNorm<R>>,
    weight: &Buffer<R>,
    bias: Option<&Buffer<R>>,
    residual: Option<&Buffer<R>>,
    out: DType,
) -> Buffer<R> {
    let [width, _] = weight.meta.shape().dims();
    let form = Form {
        norm: norm.is_some(),
        bias: bias.is_some(),
        residual: residual.is_some(),
        ..Form::new(x, 1)
    };
    let y = empty(x, [form.rows, width], out);
    // SAFETY: the arrays are as long as the form and the widths say; what stands for an operand that is
    // not there is not read.
    #[allow(unsafe_code)]
    unsafe {
        one_matrix::launch_unchecked::<R>(
            &x.client,
            form.count(width),
            form.dim(),
            pieces(x),
            pieces(norm.map_or(x, |norm| &norm.weight)),
            pieces(weight),
            elements(bias.unwrap_or(&y)),
            elements(residual.unwrap_or(&y)),
            elements(&y),
            width,
            norm.map_or(0.0, |norm| norm.epsilon as f32),
            form,
            Packing::of(out).expect("an output has a type the kernels know"),
            out.into(),
        );
    }
    y
}

/// Products of one input with three matrices, side by side `[rows, out₁ + out₂ + out₃]`.
///
/// # Panics
/// If a width is no multiple of four.
pub(super) fn three_products<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: &InputNorm<R>,
    weights: [&Buffer<R>; 3],
) -> Buffer<R> {
    let widths = weights.map(|weight| weight.meta.shape()[0]);
    assert!(
        widths.iter().all(|width| width.is_multiple_of(4)),
        "widths {widths:?} are no multiples of four"
    );
    let width = widths.iter().sum();
    let form = Form {
        norm: true,
        ..Form::new(x, 1)
    };
    let y = empty(x, [form.rows, width], x.dtype);
    // SAFETY: as for `product`.
    #[allow(unsafe_code)]
    unsafe {
        three_matrices::launch_unchecked::<R>(
            &x.client,
            form.count(width),
            form.dim(),
            pieces(x),
            pieces(&norm.weight),
            pieces(weights[0]),
            pieces(weights[1]),
            pieces(weights[2]),
            elements(&y),
            widths[0],
            widths[1],
            widths[2],
            norm.epsilon as f32,
            form,
            x.dtype.into(),
        );
    }
    y
}

/// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
pub(super) fn gated_product<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: &InputNorm<R>,
    gate: &Buffer<R>,
    up: &Buffer<R>,
) -> Buffer<R> {
    let [width, _] = gate.meta.shape().dims();
    let form = Form {
        norm: true,
        ..Form::new(x, 2)
    };
    let y = empty(x, [form.rows, width], x.dtype);
    // SAFETY: as for `product`.
    #[allow(unsafe_code)]
    unsafe {
        gated_matrices::launch_unchecked::<R>(
            &x.client,
            form.count(width),
            form.dim(),
            pieces(x),
            pieces(&norm.weight),
            pieces(gate),
            pieces(up),
            elements(&y),
            width,
            norm.epsilon as f32,
            form,
            x.dtype.into(),
        );
    }
    y
}

//! SwiGLU (`silu(x) · y`) and both GELUs, computed in f32.

use burn::tensor::Tensor;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::{
    launch::{Cube, contiguous, cubes, elements, empty, pieces, tensor},
    words::{Packing, Piece, pair, within},
};

const UNITS: usize = 128;

/// The operation a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Operation {
    /// `silu(x) · y`.
    SwiGlu,
    /// GELU in the tanh form.
    GeluTanh,
    /// GELU with the error function.
    GeluExact,
}

#[cube]
fn apply(x: f32, y: f32, #[comptime] operation: Operation) -> f32 {
    if comptime!(operation == Operation::SwiGlu) {
        x / (1.0f32 + (-x).exp()) * y
    } else if comptime!(operation == Operation::GeluTanh) {
        // x · (1 + tanh(a)) / 2 is x / (1 + exp(-2a)), and the cube stays finite in f32.
        let a = 0.797_884_6f32 * x * (1.0f32 + 0.044715f32 * x * x);
        x / (1.0f32 + (-2.0f32 * a).exp())
    } else {
        0.5f32 * x * (1.0f32 + Erf::erf(x * 0.707_106_77f32))
    }
}

#[cube(launch_unchecked)]
fn pointwise<F: Numeric>(
    x: &Array<Piece>,
    y: &Array<Piece>,
    out: &mut Array<F>,
    count: usize,
    #[comptime] operation: Operation,
    #[comptime] packing: Packing,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < count {
        let first = x[ABSOLUTE_POS];
        let second = y[ABSOLUTE_POS];
        #[unroll]
        for index in 0..packing.pairs() {
            let a = pair(first, index, packing);
            let b = pair(second, index, packing);
            let place = ABSOLUTE_POS * packing.piece() + 2 * index;
            out[place] = F::cast_from(within(apply(a[0], b[0], operation), packing));
            out[place + 1] = F::cast_from(within(apply(a[1], b[1], operation), packing));
        }
    }
}

/// The operation over all elements; `y` is `x` again where it has one operand.
pub(super) fn run<R: CubeRuntime>(
    operation: Operation,
    x: &Tensor<Cube<R>, 2>,
    y: &Tensor<Cube<R>, 2>,
) -> Option<Tensor<Cube<R>, 2>> {
    let [rows, width] = x.dims();
    let packing = Packing::of(x.dtype())?;
    let whole = (rows * width).is_multiple_of(packing.piece());
    if x.dtype() != y.dtype() || rows * width == 0 || !whole {
        return None;
    }
    let (x, y) = (contiguous(x.clone()), contiguous(y.clone()));
    let out = empty(&x, [rows, width], x.dtype);
    let count = rows * width / packing.piece();
    // SAFETY: all three have `count` pieces.
    #[allow(unsafe_code)]
    unsafe {
        pointwise::launch_unchecked::<R>(
            &x.client,
            cubes(count.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            pieces(&x),
            pieces(&y),
            elements(&out),
            count,
            operation,
            packing,
            x.dtype.into(),
        );
    }
    Some(tensor(out))
}

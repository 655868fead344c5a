//! New keys and values into a cache, in place.

use burn::tensor::Tensor;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::launch::{Buffer, Cube, cubes, elements, strided, tensor, with_contiguous_heads};
use crate::ops::KeysAndValues;

const UNITS: usize = 128;

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn append_rows<F: Numeric>(
    new: &Array<F>,
    held: &mut Array<F>,
    count: usize,
    heads: usize,
    rows: usize,
    head_dim: usize,
    capacity: usize,
    at: usize,
    batch_stride: usize,
    head_stride: usize,
    row_stride: usize,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < count {
        let element = ABSOLUTE_POS % head_dim;
        let place = ABSOLUTE_POS / head_dim;
        let row = place % rows;
        let head = place / rows;
        let source = head / heads * batch_stride + head % heads * head_stride + row * row_stride;
        held[(head * capacity + at + row) * head_dim + element] = new[source + element];
    }
}

/// Writes new keys and values `[b, h, rows, d]` into `[b, h, capacity, d]` from row `at` on, where nobody
/// else holds the buffers.
pub(super) fn append<R: CubeRuntime>(
    buffers: KeysAndValues<Cube<R>>,
    new: &KeysAndValues<Cube<R>>,
    at: usize,
) -> Result<KeysAndValues<Cube<R>>, KeysAndValues<Cube<R>>> {
    let buffers = buffers.map(strided);
    let covered = |(held, new): (&Buffer<R>, &Tensor<Cube<R>, 4>)| {
        held.can_mut()
            && held.is_contiguous()
            && held.dtype == new.dtype()
            && at + new.dims()[2] <= held.meta.shape()[2]
    };
    if !buffers.iter().zip(new).all(covered) {
        return Err(buffers.map(tensor));
    }
    for (held, new) in buffers.iter().zip(new) {
        write(held, &with_contiguous_heads(new.clone()), at);
    }
    Ok(buffers.map(tensor))
}

/// Writes `new`, whose heads are contiguous, into `held`.
fn write<R: CubeRuntime>(held: &Buffer<R>, new: &Buffer<R>, at: usize) {
    let [batch, heads, rows, head_dim] = new.meta.shape().dims();
    let strides = new.meta.strides();
    let count = batch * heads * rows * head_dim;
    // SAFETY: `append` has checked the buffer; the strides are those of the buffer.
    #[allow(unsafe_code)]
    unsafe {
        append_rows::launch_unchecked::<R>(
            &held.client,
            cubes(count.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            elements(new),
            elements(held),
            count,
            heads,
            rows,
            head_dim,
            held.meta.shape()[2],
            at,
            strides[0],
            strides[1],
            strides[2],
            held.dtype.into(),
        );
    }
}

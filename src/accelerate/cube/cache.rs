//! New keys and values into a cache, in place.

use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::launch::{Buffer, cubes, elements};

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

/// Whether new rows can be written into the buffer: nobody else holds it, and it is contiguous.
pub(super) fn covers<R: CubeRuntime>(held: &Buffer<R>, new: &Buffer<R>, at: usize) -> bool {
    held.can_mut()
        && held.is_contiguous()
        && held.dtype == new.dtype
        && new.meta.strides()[3] == 1
        && at + new.meta.shape()[2] <= held.meta.shape()[2]
}

/// Writes `new` `[b, h, rows, d]` into `held` `[b, h, capacity, d]` from row `at` on.
pub(super) fn append<R: CubeRuntime>(held: &Buffer<R>, new: &Buffer<R>, at: usize) {
    let [batch, heads, rows, head_dim] = new.meta.shape().dims();
    let strides = new.meta.strides();
    let count = batch * heads * rows * head_dim;
    // SAFETY: `covers` has checked the buffer; the strides are those of the buffer.
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

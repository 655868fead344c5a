//! Buffers of tensors as arguments of kernels.

use burn::tensor::DType;
use burn_cubecl::{CubeRuntime, tensor::CubeTensor};
use cubecl::prelude::*;

/// The buffer of a tensor, with its shape and strides.
pub(super) type Buffer<R> = CubeTensor<R>;

/// A new buffer whose elements lie row after row, not initialised.
pub(super) fn empty<R: CubeRuntime, const D: usize>(
    like: &Buffer<R>,
    shape: [usize; D],
    dtype: DType,
) -> Buffer<R> {
    burn_cubecl::ops::numeric::empty_device_contiguous_dtype(
        like.client.clone(),
        like.device.clone(),
        shape.into(),
        dtype,
    )
}

/// A buffer as an array of elements of `bytes` bytes each.
pub(super) fn array<R: CubeRuntime>(buffer: &Buffer<R>, bytes: usize) -> ArrayArg<R> {
    let length = buffer.meta.num_elements() * buffer.dtype.size() / bytes;
    // SAFETY: a buffer holds at least the elements of its shape.
    #[allow(unsafe_code)]
    unsafe {
        ArrayArg::from_raw_parts(buffer.handle.clone(), length)
    }
}

/// A buffer as an array of its elements.
pub(super) fn elements<R: CubeRuntime>(buffer: &Buffer<R>) -> ArrayArg<R> {
    array(buffer, buffer.dtype.size())
}

/// A buffer as an array of pieces of sixteen bytes.
pub(super) fn pieces<R: CubeRuntime>(buffer: &Buffer<R>) -> ArrayArg<R> {
    array(buffer, 16)
}

/// So many cubes, in a grid the adapter allows: [`CUBE_POS`] counts them, and may count some more.
pub(super) fn cubes(count: usize) -> CubeCount {
    const WIDEST: usize = 65_535;
    let rows = count.div_ceil(WIDEST);
    CubeCount::Static(count.div_ceil(rows) as u32, rows as u32, 1)
}

//! Buffers of tensors as arguments of kernels.

use burn::tensor::{DType, Tensor, TensorPrimitive};
use burn_cubecl::{CubeBackend, CubeRuntime, kernel::into_contiguous, tensor::CubeTensor};
use cubecl::prelude::*;

/// A backend of cubecl as Burn instantiates it.
pub(super) type Cube<R> = CubeBackend<R, f32, i32, u8>;

/// The buffer of a tensor, with its shape and strides.
pub(super) type Buffer<R> = CubeTensor<R>;

/// The buffer of a tensor, with any strides.
pub(super) fn strided<R: CubeRuntime, const D: usize>(tensor: Tensor<Cube<R>, D>) -> Buffer<R> {
    tensor.into_primitive().tensor()
}

/// The buffer of a tensor, copied if it is not contiguous.
pub(super) fn contiguous<R: CubeRuntime, const D: usize>(tensor: Tensor<Cube<R>, D>) -> Buffer<R> {
    into_contiguous(strided(tensor))
}

/// Heads with contiguous elements; the other axes may have any stride.
pub(super) fn with_contiguous_heads<R: CubeRuntime, const D: usize>(
    tensor: Tensor<Cube<R>, D>,
) -> Buffer<R> {
    let buffer = strided(tensor);
    if buffer.meta.strides().last() == Some(&1) {
        buffer
    } else {
        into_contiguous(buffer)
    }
}

/// A tensor over a buffer.
pub(super) fn tensor<R: CubeRuntime, const D: usize>(buffer: Buffer<R>) -> Tensor<Cube<R>, D> {
    Tensor::from_primitive(TensorPrimitive::Float(buffer))
}

/// A new contiguous buffer, not initialised.
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

/// A buffer as an array of four elements each.
pub(super) fn quads<R: CubeRuntime>(buffer: &Buffer<R>) -> ArrayArg<R> {
    array(buffer, 4 * buffer.dtype.size())
}

/// A grid of at least so many cubes within the adapter's limits; [`CUBE_POS`] may exceed the count.
pub(super) fn cubes(count: usize) -> CubeCount {
    const WIDEST: usize = 65_535;
    let rows = count.div_ceil(WIDEST);
    CubeCount::Static(count.div_ceil(rows) as u32, rows as u32, 1)
}

/// Keys and values, `[b, key_value_heads, keys, d]`, heads contiguous, both with the same strides.
pub(super) struct Cache<'a, R: CubeRuntime> {
    pub keys: &'a Buffer<R>,
    pub values: &'a Buffer<R>,
}

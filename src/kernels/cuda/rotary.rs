//! Norm and rotation of heads: `rotary.cu`.

use burn::{prelude::*, tensor::DType};

use super::{
    HeadNorm,
    launch::{Backend, Kernel, contiguous, empty, float_bits, launch, strided, tensor},
    scalar_of,
};

const SOURCES: &[&str] = &[include_str!("scalar.cuh"), include_str!("rotary.cu")];

/// Whether heads of this width can be turned.
pub(super) fn covers(head_dim: usize, dtype: DType) -> bool {
    scalar_of(dtype).is_some() && head_dim.is_multiple_of(2) && head_dim <= 128
}

/// Heads whose elements lie together; tokens and heads may lie apart.
fn with_dense_heads(x: Tensor<Backend, 3>) -> super::launch::Buffer {
    let buffer = strided(x);
    if buffer.meta.strides()[2] == 1 {
        buffer
    } else {
        burn_cubecl::kernel::into_contiguous(buffer)
    }
}

/// Forward where `dy` is `None`.
pub(super) fn rotate(
    x: Tensor<Backend, 3>,
    norm: Option<HeadNorm<Backend>>,
    cos: Tensor<Backend, 2>,
    sin: Tensor<Backend, 2>,
    dy: Option<Tensor<Backend, 3>>,
) -> Tensor<Backend, 3> {
    let [tokens, heads, head_dim] = x.dims();
    let (bf16, _) = scalar_of(x.dtype()).expect("`covers` was asked");
    let kernel = Kernel::new(
        "rotate_heads",
        SOURCES,
        vec![
            ("SCALAR_BF16", bf16),
            ("HEAD_DIM", head_dim as i64),
            ("WITH_NORM", i64::from(norm.is_some())),
            ("BACKWARD", i64::from(dy.is_some())),
        ],
        256,
    );
    let x = with_dense_heads(x);
    let dy = dy.map(with_dense_heads);
    let out = empty(&x, [tokens, heads, head_dim], x.dtype);
    let epsilon = norm.as_ref().map_or(0.0, |norm| norm.epsilon);
    // Without a norm the weight is not read; any buffer takes its place.
    let weight = norm.map_or_else(|| x.clone(), |norm| contiguous(norm.weight));
    let (cos, sin) = (contiguous(cos), contiguous(sin));
    let stride = |buffer: &super::launch::Buffer, axis: usize| buffer.meta.strides()[axis] as u64;
    let parameters = vec![
        tokens as u64,
        heads as u64,
        stride(&x, 0),
        stride(&x, 1),
        dy.as_ref().map_or(0, |dy| stride(dy, 0)),
        dy.as_ref().map_or(0, |dy| stride(dy, 1)),
        float_bits(epsilon),
    ];
    let mut buffers = vec![&x, &weight, &cos, &sin];
    buffers.extend(dy.as_ref());
    buffers.push(&out);
    let grid = [(tokens * heads).div_ceil(8), 1, 1];
    launch(&x.client, kernel, grid, &buffers, parameters);
    tensor(out)
}

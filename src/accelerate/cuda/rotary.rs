//! Norm and rotation of heads: `rotary.cu`.

use burn::{prelude::*, tensor::DType};

use super::{
    launch::{Backend, Buffer, Kernel, contiguous, empty, float_bits, launch, strided, tensor},
    operand::Operand,
    scalar_of,
};
use crate::ops::HeadNorm;

const SOURCES: &[&str] = &[include_str!("scalar.cuh"), include_str!("rotary.cu")];

/// Whether the kernels cover the rotation of heads of this width.
fn covers<const D: usize>(x: &Tensor<Backend, D>, head_dim: usize) -> bool {
    super::supported(x) && head_dim.is_multiple_of(2) && head_dim <= 128
}

/// Heads with contiguous elements; tokens and heads may have any stride.
fn with_contiguous_heads(x: &Tensor<Backend, 3>) -> Buffer {
    let buffer = strided(x.clone());
    if buffer.meta.strides()[2] == 1 {
        buffer
    } else {
        burn_cubecl::kernel::into_contiguous(buffer)
    }
}

/// Forward where `dy` is `None`.
pub(super) fn rotate(
    x: &Tensor<Backend, 3>,
    norm: Option<&HeadNorm<Backend>>,
    cos: &Tensor<Backend, 2>,
    sin: &Tensor<Backend, 2>,
    dy: Option<&Tensor<Backend, 3>>,
) -> Option<Tensor<Backend, 3>> {
    let [tokens, heads, head_dim] = x.dims();
    let (bf16, _) = scalar_of(x.dtype())?;
    let one_type = norm.is_none_or(|norm| norm.weight.dtype() == x.dtype())
        && dy.is_none_or(|dy| dy.dtype() == x.dtype());
    if !one_type || !covers(x, head_dim) {
        return None;
    }
    let kernel = Kernel::new(
        "rotate_heads",
        SOURCES,
        vec![
            ("SCALAR_BF16", bf16),
            ("HEAD_DIM", head_dim as i64),
            ("WITH_NORM", i64::from(norm.is_some())),
            ("BACKWARD", i64::from(dy.is_some())),
            ("SPLIT", 0),
        ],
        256,
    );
    let x = with_contiguous_heads(x);
    let dy = dy.map(with_contiguous_heads);
    let out = empty(&x, [tokens, heads, head_dim], x.dtype);
    let epsilon = norm.map_or(0.0, |norm| norm.epsilon);
    let weight = norm.map(|norm| contiguous(norm.weight.clone()));
    let (cos, sin) = (contiguous(cos.clone()), contiguous(sin.clone()));
    let stride = |buffer: &Buffer, axis: usize| buffer.meta.strides()[axis] as u64;
    let parameters = vec![
        tokens as u64,
        heads as u64,
        stride(&x, 0),
        stride(&x, 1),
        dy.as_ref().map_or(0, |dy| stride(dy, 0)),
        dy.as_ref().map_or(0, |dy| stride(dy, 1)),
        float_bits(epsilon),
    ];
    let of_heads = |one| Operand::contiguous_rows(one, x.dtype, [tokens, heads, head_dim]);
    let angles = |one| Operand::contiguous(one, DType::F32, [tokens, head_dim]);
    // Without a norm the weight is not read; any buffer takes its place.
    let weight = (weight.as_ref()).map_or(Operand::unused(&x), |weight| {
        Operand::contiguous(weight, x.dtype, [head_dim])
    });
    let mut operands = vec![of_heads(&x), weight, angles(&cos), angles(&sin)];
    operands.extend(dy.as_ref().map(of_heads));
    operands.push(of_heads(&out));
    let grid = [(tokens * heads).div_ceil(8), 1, 1];
    launch(&x.client, kernel, grid, &operands, parameters);
    Some(tensor(out))
}

/// Queries and keys rotated (RoPE), values unchanged, out of a fused projection `[tokens, 3 · heads · d]`.
pub(super) fn split_and_rotate(
    qkv: &Tensor<Backend, 2>,
    heads: usize,
    cos: &Tensor<Backend, 2>,
    sin: &Tensor<Backend, 2>,
) -> Option<[Tensor<Backend, 3>; 3]> {
    let [tokens, width] = qkv.dims();
    let head_dim = width / 3 / heads;
    let (bf16, _) = scalar_of(qkv.dtype())?;
    // The three parts start at multiples of what the allocator and other kernels rely on.
    let aligned = (tokens * width / 3 * qkv.dtype().size()).is_multiple_of(256);
    if !aligned || !covers(qkv, head_dim) {
        return None;
    }
    let kernel = Kernel::new(
        "split_and_rotate",
        SOURCES,
        vec![
            ("SCALAR_BF16", bf16),
            ("HEAD_DIM", head_dim as i64),
            ("WITH_NORM", 0),
            ("BACKWARD", 0),
            ("SPLIT", 1),
        ],
        256,
    );
    let x = contiguous(qkv.clone());
    let out = empty(&x, [3, tokens, heads, head_dim], x.dtype);
    let (cos, sin) = (contiguous(cos.clone()), contiguous(sin.clone()));
    let parameters = vec![
        tokens as u64,
        heads as u64,
        width as u64,
        head_dim as u64,
        0,
        0,
        0,
    ];
    let grid = [(3 * tokens * heads).div_ceil(8), 1, 1];
    let angles = |one| Operand::contiguous(one, DType::F32, [tokens, head_dim]);
    // Without a norm the weight is not read; any buffer takes its place.
    launch(
        &x.client,
        kernel,
        grid,
        &[
            Operand::contiguous(&x, x.dtype, [tokens, width]),
            Operand::unused(&x),
            angles(&cos),
            angles(&sin),
            Operand::contiguous(&out, x.dtype, [3, tokens, heads, head_dim]),
        ],
        parameters,
    );
    let bytes = (tokens * heads * head_dim * x.dtype.size()) as u64;
    let parts = [0, 1, 2].map(|part| {
        let mut view = out.clone();
        view.handle = view
            .handle
            .offset_start(part * bytes)
            .offset_end((2 - part) * bytes);
        *view.meta = burn_cubecl::cubecl::zspace::metadata::Metadata::new(
            [tokens, heads, head_dim],
            [heads * head_dim, head_dim, 1],
        );
        tensor(view)
    });
    Some(parts)
}

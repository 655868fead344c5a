//! Matmuls of many rows with quantised weights: a matrix is dequantised for one matmul of `gemm.rs` and dropped.
//!
//! A matrix goes whole, as bf16 (96 MiB for the largest of the 8B): a launch then has as many tiles as with stored
//! floats, and bias and residual are its epilogue. A head goes in pieces.

use burn::{prelude::*, tensor::DType};
use cubecl::Runtime;
use cubecl_cuda::CudaRuntime;

use super::{
    frozen_matrix::{covers, whole},
    gemm,
    launch::Backend,
    lora, memory,
};
use crate::ops::{ForwardOps, LowRank, quantised::QuantisedWeight};

/// Rows up to which other kernels read the quantised words themselves.
pub(super) const FEW_ROWS: usize = 64;

/// Bytes of bf16 up to which a matrix goes whole.
const LARGEST: usize = 512 << 20;

/// [`covers`], and the matrix is small enough to go whole.
fn goes_whole(x: &Tensor<Backend, 2>, weight: &QuantisedWeight<Backend>) -> bool {
    let [out, d_input] = weight.dims();
    covers(x, weight) && out * d_input * DType::BF16.size() <= LARGEST
}

/// Rows of the matrix in bf16, some at a time: the first, their number, and they.
pub(super) fn pieces(
    weight: &QuantisedWeight<Backend>,
) -> impl Iterator<Item = ((usize, usize), Tensor<Backend, 2>)> {
    weight.row_pieces(DType::BF16).map(|(start, count)| {
        let rows = Backend::dequantise_for_matmul(weight, start, count, DType::BF16);
        ((start, count), rows)
    })
}

/// [`ForwardOps::dequantise_for_matmul`]: in memory of the exact size. Burn's persistent allocation would end
/// that of the step around it.
pub(super) fn for_matmul(
    weight: &QuantisedWeight<Backend>,
    start: usize,
    count: usize,
    dtype: DType,
) -> Option<Tensor<Backend, 2>> {
    let client = CudaRuntime::client(&weight.device());
    let dequantise = || Backend::dequantise_rows(weight, start, count, dtype);
    Some(memory::exact(&client, dequantise))
}

/// [`ForwardOps::linear_quantised`] of many rows.
pub(super) fn linear(
    x: &Tensor<Backend, 2>,
    weight: &QuantisedWeight<Backend>,
    bias: Option<&Tensor<Backend, 1>>,
    residual: Option<&Tensor<Backend, 2>>,
) -> Option<Tensor<Backend, 2>> {
    goes_whole(x, weight)
        .then(|| gemm::linear(x, &whole(weight), bias, residual, None))
        .flatten()
}

/// [`ForwardOps::adapted_linear_quantised`] of many rows.
pub(super) fn adapted(
    x: &Tensor<Backend, 2>,
    weight: &QuantisedWeight<Backend>,
    adapter: &LowRank<Backend>,
    residual: Option<&Tensor<Backend, 2>>,
) -> Option<Tensor<Backend, 2>> {
    if !goes_whole(x, weight) || !lora::covers(adapter, x.dtype()) {
        return None;
    }
    let low = Backend::low_rank_inputs(x.clone(), &[adapter]).remove(0);
    adapted_from_low(x, weight, &low, adapter, residual)
}

/// [`TrainingOps::adapted_linear_for_backward`](crate::ops::TrainingOps::adapted_linear_for_backward).
pub(super) fn adapted_from_low(
    x: &Tensor<Backend, 2>,
    weight: &QuantisedWeight<Backend>,
    low: &Tensor<Backend, 2>,
    adapter: &LowRank<Backend>,
    residual: Option<&Tensor<Backend, 2>>,
) -> Option<Tensor<Backend, 2>> {
    if !goes_whole(x, weight) || !lora::covers(adapter, x.dtype()) {
        return None;
    }
    lora::adapted_linear(x, &whole(weight), low, adapter, residual)
}

//! Training on quantised weights: matrices are dequantised for one matmul of `gemm.rs` and dropped.
//!
//! A matrix goes whole, as bf16 (96 MiB for the largest of the 8B): a launch then has as many tiles as with
//! stored floats and sums over all outputs in f32, so that a step gives the bits of training on the same
//! weights in bf16. The head goes in pieces.

use burn::{prelude::*, tensor::DType};
use cubecl::Runtime;
use cubecl_cuda::CudaRuntime;

use super::{
    gemm::{self, Epilogue, WeightLayout},
    launch::{Backend, contiguous, tensor},
    lora, loss, memory,
};
use crate::ops::{ForwardOps, LowRank, Matrix, TargetLoss, quantised::QuantisedWeight};

/// Whether the matmuls cover `dy W` and `x Wᵀ` with a quantised matrix dequantised as bf16; `x` has its inputs or
/// outputs.
pub(super) fn covers(x: &Tensor<Backend, 2>, weight: &QuantisedWeight<Backend>) -> bool {
    super::supported(x)
        && x.dtype() == DType::BF16
        && x.dims()[0] > 0
        && weight.dims().iter().all(|width| width.is_multiple_of(8))
}

/// Whether the matmuls cover `dy W`.
pub(super) fn covers_matrix(dy: &Tensor<Backend, 2>, weight: &Matrix<Backend>) -> bool {
    match weight {
        Matrix::Dense(weight) => gemm::covers(dy, weight),
        Matrix::Quantised(weight) => covers(dy, weight),
    }
}

/// The matrix in bf16, `[out, in]`.
pub(super) fn floats(weight: &Matrix<Backend>) -> Tensor<Backend, 2> {
    match weight {
        Matrix::Dense(weight) => weight.clone(),
        Matrix::Quantised(weight) => whole(weight),
    }
}

fn whole(weight: &QuantisedWeight<Backend>) -> Tensor<Backend, 2> {
    Backend::dequantise_for_matmul(weight, 0, weight.dims()[0], DType::BF16)
}

/// [`ForwardOps::dequantise_for_matmul`]: in memory of the exact size. Burn's persistent allocation would end
/// that of the step around it.
pub(super) fn dequantise_for_matmul(
    weight: &QuantisedWeight<Backend>,
    start: usize,
    count: usize,
    dtype: DType,
) -> Option<Tensor<Backend, 2>> {
    let client = CudaRuntime::client(&weight.device());
    let dequantise = || Backend::dequantise_rows(weight, start, count, dtype);
    Some(memory::exact(&client, dequantise))
}

/// [`TrainingOps::adapted_linear_for_backward`](crate::ops::TrainingOps::adapted_linear_for_backward).
pub(super) fn adapted_linear(
    x: &Tensor<Backend, 2>,
    weight: &QuantisedWeight<Backend>,
    low: &Tensor<Backend, 2>,
    adapter: &LowRank<Backend>,
    residual: Option<&Tensor<Backend, 2>>,
) -> Option<Tensor<Backend, 2>> {
    if !covers(x, weight) || !lora::covers(adapter, x.dtype()) {
        return None;
    }
    lora::adapted_linear(x, &whole(weight), low, adapter, residual)
}

/// [`TrainingOps::input_gradient_quantised`](crate::ops::TrainingOps::input_gradient_quantised).
pub(super) fn input_gradient(
    dy: &Tensor<Backend, 2>,
    weight: &QuantisedWeight<Backend>,
) -> Option<Tensor<Backend, 2>> {
    covers(dy, weight).then(|| gemm::input_gradient(&[(dy.clone(), whole(weight))]))
}

/// [`TrainingOps::target_loss_quantised`](crate::ops::TrainingOps::target_loss_quantised).
pub(super) fn target_loss(
    hidden: &Tensor<Backend, 2>,
    head: &QuantisedWeight<Backend>,
    ids: &Tensor<Backend, 1, Int>,
    weight: f64,
) -> Option<TargetLoss<Backend>> {
    if !covers(hidden, head) {
        return None;
    }
    let pieces: Vec<(usize, usize)> = head.row_pieces(DType::BF16).collect();
    let rows = |(start, count)| Backend::dequantise_for_matmul(head, start, count, DType::BF16);
    let logits = pieces
        .iter()
        .map(|piece| gemm::logits(hidden, &rows(*piece)));
    let logits = contiguous(Tensor::cat(logits.collect::<Option<Vec<_>>>()?, 1));
    let (sums, gradient) = loss::softmax_loss(&logits, ids, weight);
    drop(logits);
    // Summed in f32, as one matmul over the whole head would.
    let parts = pieces.iter().map(|piece| {
        let (start, count) = *piece;
        let dy = contiguous(gradient.clone().narrow(1, start, count));
        let rows = contiguous(rows(*piece));
        let pair = [(&dy, &rows)];
        let dx = gemm::matmul(&pair, WeightLayout::InOut, Epilogue::default(), DType::F32);
        tensor::<2>(dx)
    });
    let sum = parts.reduce(|sum, part| sum + part)?;
    Some(TargetLoss {
        sums,
        hidden_gradient: sum.cast(DType::BF16),
    })
}

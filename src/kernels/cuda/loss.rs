//! Cross-entropy against a frozen head: the products of `gemm.rs` around `loss.cu`.

use burn::{prelude::*, tensor::DType};

use super::{
    gemm,
    launch::{Backend, Buffer, Kernel, contiguous, empty, float_bits, launch, tensor},
};
use crate::kernels::TargetLoss;

const SOURCES: &[&str] = &[include_str!("scalar.cuh"), include_str!("loss.cu")];

/// Losses, right predictions and the logits' gradient of `weight` times the summed loss.
///
/// `logits` `[rows, vocab]` f32 → `[rows]`, `[rows]` f32 and `[rows, vocab]` bf16.
fn softmax_loss(
    logits: &Buffer,
    ids: Tensor<Backend, 1, Int>,
    weight: f64,
) -> (Tensor<Backend, 1>, Tensor<Backend, 1>, Tensor<Backend, 2>) {
    let [rows, vocab] = logits.meta.shape().dims();
    let kernel = Kernel::new("softmax_loss", SOURCES, vec![("SCALAR_BF16", 1)], 512);
    let ids = burn_cubecl::kernel::into_contiguous(ids.into_primitive());
    let nll = empty(logits, [rows], DType::F32);
    let correct = empty(logits, [rows], DType::F32);
    let gradient = empty(logits, [rows, vocab], DType::BF16);
    launch(
        &logits.client,
        kernel,
        [rows, 1, 1],
        &[logits, &ids, &nll, &correct, &gradient],
        vec![vocab as u64, float_bits(weight)],
    );
    (tensor(nll), tensor(correct), tensor(gradient))
}

/// `hidden` `[rows, width]` and `head` `[vocab, width]` in bf16.
pub(super) fn target_loss(
    hidden: Tensor<Backend, 2>,
    head: Tensor<Backend, 2>,
    ids: Tensor<Backend, 1, Int>,
    weight: f64,
) -> TargetLoss<Backend> {
    let logits = contiguous(gemm::logits(hidden, head.clone()));
    let (nll, correct, gradient) = softmax_loss(&logits, ids, weight);
    TargetLoss {
        sums: Tensor::cat(vec![nll.sum(), correct.sum()], 0),
        hidden_gradient: gemm::input_gradient(&[(gradient, head)]),
    }
}

//! Cross-entropy against a frozen head: the matmuls of `gemm.rs` around `loss.cu`.

use burn::{prelude::*, tensor::DType};

use super::{
    gemm,
    launch::{Backend, Buffer, Kernel, contiguous, empty, float_bits, launch, tensor},
    operand::Operand,
};
use crate::ops::TargetLoss;

const SOURCES: &[&str] = &[include_str!("scalar.cuh"), include_str!("loss.cu")];

/// Sums of losses and right predictions, and the logits' gradient of `weight` times the summed loss.
///
/// `logits` `[rows, vocab]` f32 → `[2]` f32 and `[rows, vocab]` bf16.
fn softmax_loss(
    logits: &Buffer,
    ids: &Tensor<Backend, 1, Int>,
    weight: f64,
) -> (Tensor<Backend, 1>, Tensor<Backend, 2>) {
    let [rows, vocab] = logits.meta.shape().dims();
    let kernel = |name, sums, threads| {
        let defines = vec![("SCALAR_BF16", 1), ("LOSS_SUMS", sums)];
        Kernel::new(name, SOURCES, defines, threads)
    };
    let ids = burn_cubecl::kernel::into_contiguous(ids.clone().into_primitive());
    let nll = empty(logits, [rows], DType::F32);
    let correct = empty(logits, [rows], DType::F32);
    let gradient = empty(logits, [rows, vocab], DType::BF16);
    let of_rows = |x| Operand::contiguous(x, DType::F32, [rows]);
    launch(
        &logits.client,
        kernel("softmax_loss", 0, 512),
        [rows, 1, 1],
        &[
            Operand::contiguous(logits, DType::F32, [rows, vocab]),
            Operand::contiguous(&ids, DType::I32, [rows]),
            of_rows(&nll),
            of_rows(&correct),
            Operand::contiguous(&gradient, DType::BF16, [rows, vocab]),
        ],
        vec![vocab as u64, float_bits(weight)],
    );
    // Burn's own sum of a whole tensor adds with atomics, in no fixed order.
    let sums = empty(logits, [2], DType::F32);
    launch(
        &logits.client,
        kernel("loss_sums", 1, 256),
        [1, 1, 1],
        &[
            of_rows(&nll),
            of_rows(&correct),
            Operand::contiguous(&sums, DType::F32, [2]),
        ],
        vec![rows as u64],
    );
    (tensor(sums), tensor(gradient))
}

/// `hidden` `[rows, width]` and `head` `[vocab, width]`, where [`gemm::logits`] covers them.
pub(super) fn target_loss(
    hidden: &Tensor<Backend, 2>,
    head: &Tensor<Backend, 2>,
    ids: &Tensor<Backend, 1, Int>,
    weight: f64,
) -> Option<TargetLoss<Backend>> {
    let logits = contiguous(gemm::logits(hidden, head)?);
    let (sums, gradient) = softmax_loss(&logits, ids, weight);
    Some(TargetLoss {
        sums,
        hidden_gradient: gemm::input_gradient(&[(gradient, head.clone())]),
    })
}

//! Matmuls with a quantised matrix in plain Burn: some rows as floats at a time.

use burn::{prelude::*, tensor::DType};

use super::QuantisedWeight;
use crate::ops::{ForwardOps, LowRank, cast::to_f32};

/// Dequantises some rows of a matrix at a time, computes `part` of them and joins the results: `[n, out]`.
pub(super) fn by_rows<B: ForwardOps>(
    weight: &QuantisedWeight<B>,
    dtype: DType,
    part: impl Fn(Tensor<B, 2>, usize, usize) -> Tensor<B, 2>,
) -> Tensor<B, 2> {
    let parts = weight.row_pieces(dtype).map(|(start, count)| {
        let rows = B::dequantise_for_matmul(weight, start, count, dtype);
        part(rows, start, count)
    });
    let mut parts: Vec<_> = parts.collect();
    if parts.len() == 1 {
        parts.remove(0)
    } else {
        Tensor::cat(parts, 1)
    }
}

/// Rows by index as floats: `indices` `[n]` → `[n, in]`.
pub(crate) fn select<B: ForwardOps>(
    weight: &QuantisedWeight<B>,
    indices: Tensor<B, 1, Int>,
) -> Tensor<B, 2> {
    let rows = weight.select(indices);
    let [count, _] = rows.dims();
    B::dequantise_rows(&rows, 0, count, weight.dtype())
}

/// `x Wᵀ + bias + residual`, `x` `[n, in]`, `residual` and result `[n, out]`: some rows of the matrix as
/// floats at a time.
pub(crate) fn linear<B: ForwardOps>(
    x: Tensor<B, 2>,
    weight: &QuantisedWeight<B>,
    bias: Option<Tensor<B, 1>>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    by_rows(weight, x.dtype(), |rows, start, count| {
        let bias = bias.clone().map(|bias| bias.narrow(0, start, count));
        let residual = residual.clone().map(|y| y.narrow(1, start, count));
        B::linear_add(x.clone(), rows, bias, residual)
    })
}

/// [`linear`] plus an adapter's share, without bias.
pub(crate) fn adapted<B: ForwardOps>(
    x: Tensor<B, 2>,
    weight: &QuantisedWeight<B>,
    adapter: &LowRank<B>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let low = B::low_rank_inputs(x.clone(), &[adapter]).remove(0);
    adapted_from_low(x, weight, low, adapter, residual)
}

/// [`adapted`] where `low` `[n, r]`, the adapter's of
/// [`low_rank_inputs`](ForwardOps::low_rank_inputs), is known.
pub(crate) fn adapted_from_low<B: ForwardOps>(
    x: Tensor<B, 2>,
    weight: &QuantisedWeight<B>,
    low: Tensor<B, 2>,
    adapter: &LowRank<B>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    by_rows(weight, x.dtype(), |rows, start, count| {
        let adapter = LowRank {
            b: adapter.b.clone().narrow(0, start, count),
            ..adapter.clone()
        };
        let residual = residual.clone().map(|y| y.narrow(1, start, count));
        B::adapted_linear(x.clone(), rows, low.clone(), &adapter, residual)
    })
}

/// Logits in f32: `hidden` `[n, width]` → `[n, vocab]`.
pub(crate) fn logits<B: ForwardOps>(
    hidden: Tensor<B, 2>,
    head: &QuantisedWeight<B>,
) -> Tensor<B, 2> {
    let hidden = to_f32(hidden);
    by_rows(head, DType::F32, |rows, _, _| {
        B::matmul(hidden.clone(), rows.transpose())
    })
}

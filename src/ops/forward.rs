//! Operations of a forward pass: the backend's kernel where that covers the operands, else plain Burn.

use burn::{prelude::*, tensor::DType};

use super::{
    Activation, AttentionSpans, Dropout, HasKernels, HeadNorm, LowRank,
    cast::to_f32,
    plain,
    quantised::{self, QuantisedWeight},
};

/// Operations of a forward pass. All backends have these: what differs is [`HasKernels`].
///
/// Shape letters: `n` tokens of all sequences, `b` sequences, `h` heads, `d` width of a head.
pub trait ForwardOps: HasKernels {
    /// `a b` over the last two axes, leading axes alike: `[.., m, k]` and `[.., k, n]` to `[.., m, n]`.
    ///
    /// f32 is multiplied in f32: a backend whose own matmul rounds the operands has a kernel.
    fn matmul<const D: usize>(a: Tensor<Self, D>, b: Tensor<Self, D>) -> Tensor<Self, D> {
        Self::matmul_kernel(&a, &b).unwrap_or_else(|| a.matmul(b))
    }

    /// `x Wᵀ + bias + residual`: `x` `[n, in]`, `weight` `[out, in]`, `residual` and result
    /// `[n, out]`.
    fn linear_add(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.linear_add)(&x, &weight, bias.as_ref(), residual.as_ref())
            .unwrap_or_else(|| plain::linear(x, weight, bias, residual))
    }

    /// `activation(x Wᵀ + bias)`: as [`ForwardOps::linear_add`], then the activation; `[n, out]`.
    fn linear_activated(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
        activation: Activation,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.linear_activated)(&x, &weight, bias.as_ref(), activation)
            .unwrap_or_else(|| Self::activate(Self::linear_add(x, weight, bias, None), activation))
    }

    /// Rows `start .. start + count` of a quantised matrix as floats, `[count, in]`.
    fn dequantise_rows(
        weight: &QuantisedWeight<Self>,
        start: usize,
        count: usize,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.dequantise_rows)(weight, start, count, dtype)
            .unwrap_or_else(|| weight.rows(start, count).unpack(dtype))
    }

    /// [`ForwardOps::dequantise_rows`] for one matmul: of the same few sizes in every layer, so memory of
    /// these sizes is kept for them.
    fn dequantise_for_matmul(
        weight: &QuantisedWeight<Self>,
        start: usize,
        count: usize,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.dequantise_for_matmul)(weight, start, count, dtype).unwrap_or_else(|| {
            let dequantise =
                |weight: QuantisedWeight<Self>| Self::dequantise_rows(&weight, start, count, dtype);
            let device = weight.device();
            quantised::weight::persistent::<Self, _, _>(&device, weight.clone(), dequantise)
        })
    }

    /// Rows of a quantised matrix by index as floats, in the type its values count as: `indices` `[n]` → `[n, in]`.
    fn select_quantised(
        weight: &QuantisedWeight<Self>,
        indices: Tensor<Self, 1, Int>,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.select_quantised)(weight, &indices)
            .unwrap_or_else(|| quantised::matmul::select(weight, indices))
    }

    /// [`ForwardOps::linear_add`] with a quantised matrix.
    fn linear_quantised(
        x: Tensor<Self, 2>,
        weight: &QuantisedWeight<Self>,
        bias: Option<Tensor<Self, 1>>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.linear_quantised)(&x, weight, bias.as_ref(), residual.as_ref())
            .unwrap_or_else(|| quantised::matmul::linear(x, weight, bias, residual))
    }

    /// [`ForwardOps::linear_quantised`] plus an adapter's share: the matrix itself is not changed.
    fn adapted_linear_quantised(
        x: Tensor<Self, 2>,
        weight: &QuantisedWeight<Self>,
        adapter: &LowRank<Self>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.adapted_linear_quantised)(&x, weight, adapter, residual.as_ref())
            .unwrap_or_else(|| quantised::matmul::adapted(x, weight, adapter, residual))
    }

    /// [`ForwardOps::logits`] with a quantised head.
    fn logits_quantised(hidden: Tensor<Self, 2>, head: &QuantisedWeight<Self>) -> Tensor<Self, 2> {
        (Self::KERNELS.logits_quantised)(&hidden, head)
            .unwrap_or_else(|| quantised::matmul::logits(hidden, head))
    }

    /// `drop(x) Aᵀ` of adapters that share their input `x` `[n, in]`: `[n, r]` each; the backward pass
    /// needs them.
    fn low_rank_inputs(x: Tensor<Self, 2>, adapters: &[&LowRank<Self>]) -> Vec<Tensor<Self, 2>> {
        (Self::KERNELS.low_rank_inputs)(&x, adapters)
            .unwrap_or_else(|| plain::low_rank_inputs(x, adapters))
    }

    /// `x Wᵀ + s · low Bᵀ + residual`, `low` `[n, r]` being the adapter's of
    /// [`ForwardOps::low_rank_inputs`].
    fn adapted_linear(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        low: Tensor<Self, 2>,
        adapter: &LowRank<Self>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.adapted_linear)(&x, &weight, &low, adapter, residual.as_ref())
            .unwrap_or_else(|| plain::adapted_linear(x, weight, low, adapter, residual))
    }

    /// Dropout mask for the inputs of an adapter, in the shape of `like`, f32: [`Dropout::mask`], bit for
    /// bit.
    fn dropout_mask(like: &Tensor<Self, 2>, dropout: Dropout) -> Tensor<Self, 2> {
        (Self::KERNELS.dropout_mask)(like, dropout)
            .unwrap_or_else(|| plain::dropout_mask(like, dropout))
    }

    /// Root-mean-square norm of each row of `[n, width]` with a scale, statistics in f32.
    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        (Self::KERNELS.rms_norm)(&x, &weight, epsilon)
            .unwrap_or_else(|| plain::rms_norm(x, weight, epsilon))
    }

    /// Layer norm of each row of `[n, width]` with scale and shift, statistics in f32.
    fn row_layer_norm(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        bias: Tensor<Self, 1>,
        epsilon: f64,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.row_layer_norm)(&x, &weight, &bias, epsilon)
            .unwrap_or_else(|| plain::layer_norm(x, weight, bias, epsilon))
    }

    /// Normalises each head where a norm is given, then rotates it by its token's angles (RoPE).
    ///
    /// `x` `[n, h, d]`; `cos`, `sin` `[n, d]`, f32, both halves of a row alike.
    fn rotate_heads(
        x: Tensor<Self, 3>,
        norm: Option<HeadNorm<Self>>,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> Tensor<Self, 3> {
        (Self::KERNELS.rotate_heads)(&x, norm.as_ref(), &cos, &sin)
            .unwrap_or_else(|| plain::rotate_heads(x, norm, cos, sin))
    }

    /// Splits a fused projection `[n, 3 · h · d]` into queries, keys and values `[n, h, d]` each, the
    /// first two rotated.
    fn split_and_rotate(
        qkv: Tensor<Self, 2>,
        heads: usize,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> [Tensor<Self, 3>; 3] {
        (Self::KERNELS.split_and_rotate)(&qkv, heads, &cos, &sin)
            .unwrap_or_else(|| plain::split_and_rotate(qkv, heads, cos, sin))
    }

    /// Scaled dot-product attention with grouped-query heads, softmax in f32.
    ///
    /// `q` `[b, h, queries, d]`; `k`, `v` `[b, key_value_heads, keys, d]`; query head `i` reads key
    /// head `i / (h / key_value_heads)`. A query that sees no key gives any finite row.
    fn span_attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        spans: &AttentionSpans<Self>,
    ) -> Tensor<Self, 4> {
        (Self::KERNELS.span_attention)(&q, &k, &v, spans)
            .unwrap_or_else(|| plain::attention(q, k, v, spans))
    }

    /// `a b` in f32, of matrices in one type, `[b, h, m, k]` and `[b, h, k, n]`: scores of f16 heads would
    /// be rounded to a thousandth of their size, or leave the type's range.
    fn matmul_f32(a: Tensor<Self, 4>, b: Tensor<Self, 4>) -> Tensor<Self, 4> {
        (Self::KERNELS.matmul_f32)(&a, &b).unwrap_or_else(|| {
            if a.dtype() == DType::F16 {
                Self::matmul(to_f32(a), to_f32(b))
            } else {
                to_f32(Self::matmul(a, b))
            }
        })
    }

    /// `silu(gate) · up`, `[n, width]`.
    fn swiglu(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        (Self::KERNELS.swiglu)(&gate, &up).unwrap_or_else(|| plain::swiglu(gate, up))
    }

    /// GELU in the tanh form, computed in f32; `[n, width]`.
    fn gelu_tanh(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        (Self::KERNELS.gelu_tanh)(&x).unwrap_or_else(|| plain::gelu_tanh(x))
    }

    /// GELU with the error function, computed in f32; `[n, width]`.
    fn gelu_exact(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        (Self::KERNELS.gelu_exact)(&x).unwrap_or_else(|| plain::gelu_exact(x))
    }

    /// An activation, computed in f32; `[n, width]`.
    fn activate(x: Tensor<Self, 2>, activation: Activation) -> Tensor<Self, 2> {
        match activation {
            Activation::GeluTanh => Self::gelu_tanh(x),
            Activation::GeluExact => Self::gelu_exact(x),
        }
    }

    /// Writes new keys and values `[b, h, new, d]` into the buffers `[b, h, capacity, d]` of a cache from
    /// token `at` on.
    fn append_to_cache(
        buffers: [Tensor<Self, 4>; 2],
        new: [Tensor<Self, 4>; 2],
        at: usize,
    ) -> [Tensor<Self, 4>; 2] {
        (Self::KERNELS.append_to_cache)(buffers, &new, at)
            .unwrap_or_else(|buffers| plain::append_to_cache(buffers, new, at))
    }

    /// Logits in f32: `hidden` `[n, width]`, `head` `[vocab, width]`, result `[n, vocab]`.
    ///
    /// The result is f32 whatever the weights are stored in: rounding it to a half type would make
    /// equals of neighbouring logits.
    fn logits(hidden: Tensor<Self, 2>, head: Tensor<Self, 2>) -> Tensor<Self, 2> {
        (Self::KERNELS.logits)(&hidden, &head).unwrap_or_else(|| plain::logits(hidden, head))
    }
}

impl<B: HasKernels> ForwardOps for B {}

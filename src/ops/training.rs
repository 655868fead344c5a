//! Operations of a backward pass and of the optimizer: the backend's kernel where that covers the operands,
//! else plain Burn.

use burn::prelude::*;

use super::{
    AdamWTensor, AttentionSpans, BackwardMatmul, ForwardOps, HasKernels, HeadNorm, LowRank,
    LowRankBackward, LowRankGradients, TargetLoss, plain, quantised::QuantisedWeight,
};

/// Operations of a backward pass and of the optimizer. All backends have these, as [`ForwardOps`].
///
/// Shape letters: as in [`ForwardOps`].
pub trait TrainingOps: ForwardOps {
    /// Gradients of adapters that share the input `x` `[n, in]`, which is that of the forward pass.
    fn low_rank_backward(
        x: Tensor<Self, 2>,
        adapters: &[LowRankBackward<Self>],
    ) -> Vec<LowRankGradients<Self>> {
        (Self::KERNELS.low_rank_backward)(&x, adapters).unwrap_or_else(|| {
            (adapters.iter())
                .map(|adapter| plain::low_rank_backward(x.clone(), adapter))
                .collect()
        })
    }

    /// Gradient of the one input of several matmuls, `Σ dy W + drop(dlow A)`, `[n, in]`.
    ///
    /// # Panics
    /// If there is no matmul.
    fn input_gradient(matmuls: &[BackwardMatmul<Self>]) -> Tensor<Self, 2> {
        (Self::KERNELS.input_gradient)(matmuls).unwrap_or_else(|| plain::input_gradient(matmuls))
    }

    /// `dy W` through a quantised matrix: `dy` `[n, out]`, result `[n, in]` in the type of `dy`.
    fn input_gradient_quantised(
        dy: Tensor<Self, 2>,
        weight: &QuantisedWeight<Self>,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.input_gradient_quantised)(&dy, weight)
            .unwrap_or_else(|| plain::input_gradient_quantised(dy, weight))
    }

    /// [`ForwardOps::adapted_linear`] with a quantised matrix: `low` `[n, r]` is the adapter's of
    /// [`ForwardOps::low_rank_inputs`], which the backward pass needs again.
    fn adapted_linear_for_backward(
        x: Tensor<Self, 2>,
        weight: &QuantisedWeight<Self>,
        low: Tensor<Self, 2>,
        adapter: &LowRank<Self>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        let kernel = Self::KERNELS.adapted_linear_for_backward;
        kernel(&x, weight, &low, adapter, residual.as_ref()).unwrap_or_else(|| {
            plain::adapted_linear_for_backward(x, weight, low, adapter, residual)
        })
    }

    /// Gradients of gate and up, `[n, width]` each, where the input of `matmul` is [`ForwardOps::swiglu`]
    /// of them.
    fn swiglu_input_gradient(
        matmul: BackwardMatmul<Self>,
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        (Self::KERNELS.swiglu_input_gradient)(&matmul, &gate, &up)
            .unwrap_or_else(|| Self::swiglu_backward(gate, up, Self::input_gradient(&[matmul])))
    }

    /// Gradient of the input of [`ForwardOps::rms_norm`], plus `residual`; `[n, width]` all but `weight`.
    fn rms_norm_backward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        dy: Tensor<Self, 2>,
        residual: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        (Self::KERNELS.rms_norm_backward)(&x, &weight, epsilon, &dy, &residual)
            .unwrap_or_else(|| residual + plain::rms_norm_backward(x, weight, epsilon, dy))
    }

    /// Gradient of the input of [`ForwardOps::rotate_heads`], `[n, h, d]` as `x` and `dy`.
    fn rotate_heads_backward(
        x: Tensor<Self, 3>,
        norm: Option<HeadNorm<Self>>,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
        dy: Tensor<Self, 3>,
    ) -> Tensor<Self, 3> {
        (Self::KERNELS.rotate_heads_backward)(&x, norm.as_ref(), &cos, &sin, &dy)
            .unwrap_or_else(|| plain::rotate_heads_backward(x, norm, cos, sin, dy))
    }

    /// [`ForwardOps::span_attention`], and the statistics that its backward pass needs besides:
    /// `[b, h, queries]`, f32.
    fn span_attention_for_backward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        spans: &AttentionSpans<Self>,
    ) -> (Tensor<Self, 4>, Option<Tensor<Self, 3>>) {
        (Self::KERNELS.span_attention_for_backward)(&q, &k, &v, spans)
            .unwrap_or_else(|| (plain::attention(q, k, v, spans), None))
    }

    /// Gradients of `q`, `k` and `v`, each in the shape of its tensor; `y` and `statistics` are those of
    /// the forward pass, `dy` has the shape of `y`.
    fn span_attention_backward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        y: Tensor<Self, 4>,
        statistics: Option<Tensor<Self, 3>>,
        dy: Tensor<Self, 4>,
        spans: &AttentionSpans<Self>,
    ) -> [Tensor<Self, 4>; 3] {
        (Self::KERNELS.span_attention_backward)(&q, &k, &v, &y, statistics.as_ref(), &dy, spans)
            .unwrap_or_else(|| plain::attention_backward(q, k, v, dy, spans))
    }

    /// Gradients of gate and up in [`ForwardOps::swiglu`], `[n, width]` all.
    fn swiglu_backward(
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
        dy: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        (Self::KERNELS.swiglu_backward)(&gate, &up, &dy)
            .unwrap_or_else(|| plain::swiglu_backward(gate, up, dy))
    }

    /// Cross-entropy of hidden states `[targets, width]` against a frozen head `[vocab, width]`, forward
    /// and backward at once; `ids` `[targets]`.
    ///
    /// The gradient is that of `weight` times the sum of the negative log likelihoods of `ids`.
    fn target_loss(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        ids: Tensor<Self, 1, Int>,
        weight: f64,
    ) -> TargetLoss<Self> {
        (Self::KERNELS.target_loss)(&hidden, &head, &ids, weight)
            .unwrap_or_else(|| plain::target_loss(hidden, head, ids, weight))
    }

    /// [`TrainingOps::target_loss`] with a quantised head, of which no float copy is made.
    fn target_loss_quantised(
        hidden: Tensor<Self, 2>,
        head: &QuantisedWeight<Self>,
        ids: Tensor<Self, 1, Int>,
        weight: f64,
    ) -> TargetLoss<Self> {
        (Self::KERNELS.target_loss_quantised)(&hidden, head, &ids, weight)
            .unwrap_or_else(|| plain::target_loss_quantised(hidden, head, ids, weight))
    }

    /// One step of AdamW for many parameters: new value, mean and mean square of each.
    ///
    /// Gradients are multiplied by the second element of `clip`, which comes from [`TrainingOps::clip_scale`].
    fn adamw(
        tensors: Vec<AdamWTensor<Self>>,
        clip: Option<Tensor<Self, 1>>,
    ) -> Vec<[Tensor<Self, 1>; 3]> {
        (Self::KERNELS.adamw)(tensors, clip.as_ref())
            .unwrap_or_else(|tensors| plain::adamw(tensors, clip))
    }

    /// Gradient clipping: the common norm of some tensors, and the factor that brings it to at most
    /// `max_norm` (1 where that is 0); `[2]`, f32. There is at least one tensor.
    fn clip_scale(tensors: Vec<Tensor<Self, 1>>, max_norm: f64) -> Tensor<Self, 1> {
        (Self::KERNELS.clip_scale)(&tensors, max_norm)
            .unwrap_or_else(|| plain::clip_scale(tensors, max_norm))
    }
}

impl<B: HasKernels> TrainingOps for B {}

//! A backend's own kernels: what it computes faster than plain Burn.

use burn::{prelude::*, tensor::DType};

use super::{
    Activation, AdamWTensor, AttentionSpans, BackwardMatmul, Dropout, HeadNorm, LowRank,
    LowRankBackward, LowRankGradients, TargetLoss, quantised::QuantisedWeight,
};

/// Keys and values of a layer.
pub type KeysAndValues<B> = [Tensor<B, 4>; 2];

/// The kernels of a backend, each for the operation of its name in [`ForwardOps`](super::ForwardOps) or
/// [`TrainingOps`](super::TrainingOps), which gives shapes and meaning of the operands.
///
/// A kernel reads its operands by reference and returns `None` where it does not cover their shapes or
/// types; the operation is then computed in plain Burn. The two that reuse the memory of their operands own
/// them, and return them in `Err` where they do not cover them.
#[expect(
    missing_docs,
    clippy::type_complexity,
    reason = "said of the operations"
)]
#[derive(Debug, Clone, Copy)]
pub struct Kernels<B: Backend> {
    // Forward.
    pub linear_add: fn(
        &Tensor<B, 2>,
        &Tensor<B, 2>,
        Option<&Tensor<B, 1>>,
        Option<&Tensor<B, 2>>,
    ) -> Option<Tensor<B, 2>>,
    pub linear_activated:
        fn(&Tensor<B, 2>, &Tensor<B, 2>, Option<&Tensor<B, 1>>, Activation) -> Option<Tensor<B, 2>>,
    pub dequantise_rows: fn(&QuantisedWeight<B>, usize, usize, DType) -> Option<Tensor<B, 2>>,
    pub linear_quantised: fn(
        &Tensor<B, 2>,
        &QuantisedWeight<B>,
        Option<&Tensor<B, 1>>,
        Option<&Tensor<B, 2>>,
    ) -> Option<Tensor<B, 2>>,
    pub adapted_linear_quantised: fn(
        &Tensor<B, 2>,
        &QuantisedWeight<B>,
        &LowRank<B>,
        Option<&Tensor<B, 2>>,
    ) -> Option<Tensor<B, 2>>,
    pub logits_quantised: fn(&Tensor<B, 2>, &QuantisedWeight<B>) -> Option<Tensor<B, 2>>,
    pub low_rank_inputs: fn(&Tensor<B, 2>, &[&LowRank<B>]) -> Option<Vec<Tensor<B, 2>>>,
    pub adapted_linear: fn(
        &Tensor<B, 2>,
        &Tensor<B, 2>,
        &Tensor<B, 2>,
        &LowRank<B>,
        Option<&Tensor<B, 2>>,
    ) -> Option<Tensor<B, 2>>,
    pub dropout_mask: fn(&Tensor<B, 2>, Dropout) -> Option<Tensor<B, 2>>,
    pub rms_norm: fn(&Tensor<B, 2>, &Tensor<B, 1>, f64) -> Option<Tensor<B, 2>>,
    pub row_layer_norm:
        fn(&Tensor<B, 2>, &Tensor<B, 1>, &Tensor<B, 1>, f64) -> Option<Tensor<B, 2>>,
    pub rotate_heads: fn(
        &Tensor<B, 3>,
        Option<&HeadNorm<B>>,
        &Tensor<B, 2>,
        &Tensor<B, 2>,
    ) -> Option<Tensor<B, 3>>,
    pub split_and_rotate:
        fn(&Tensor<B, 2>, usize, &Tensor<B, 2>, &Tensor<B, 2>) -> Option<[Tensor<B, 3>; 3]>,
    pub span_attention:
        fn(&Tensor<B, 4>, &Tensor<B, 4>, &Tensor<B, 4>, &AttentionSpans<B>) -> Option<Tensor<B, 4>>,
    pub matmul_f32: fn(&Tensor<B, 4>, &Tensor<B, 4>) -> Option<Tensor<B, 4>>,
    pub swiglu: fn(&Tensor<B, 2>, &Tensor<B, 2>) -> Option<Tensor<B, 2>>,
    pub gelu_tanh: fn(&Tensor<B, 2>) -> Option<Tensor<B, 2>>,
    pub gelu_exact: fn(&Tensor<B, 2>) -> Option<Tensor<B, 2>>,
    pub append_to_cache: fn(
        KeysAndValues<B>,
        &KeysAndValues<B>,
        usize,
    ) -> Result<KeysAndValues<B>, KeysAndValues<B>>,
    pub logits: fn(&Tensor<B, 2>, &Tensor<B, 2>) -> Option<Tensor<B, 2>>,
    // Backward and optimizer.
    pub low_rank_backward:
        fn(&Tensor<B, 2>, &[LowRankBackward<B>]) -> Option<Vec<LowRankGradients<B>>>,
    pub input_gradient: fn(&[BackwardMatmul<B>]) -> Option<Tensor<B, 2>>,
    pub swiglu_input_gradient:
        fn(&BackwardMatmul<B>, &Tensor<B, 2>, &Tensor<B, 2>) -> Option<[Tensor<B, 2>; 2]>,
    pub rms_norm_backward:
        fn(&Tensor<B, 2>, &Tensor<B, 1>, f64, &Tensor<B, 2>, &Tensor<B, 2>) -> Option<Tensor<B, 2>>,
    pub rotate_heads_backward: fn(
        &Tensor<B, 3>,
        Option<&HeadNorm<B>>,
        &Tensor<B, 2>,
        &Tensor<B, 2>,
        &Tensor<B, 3>,
    ) -> Option<Tensor<B, 3>>,
    pub span_attention_for_backward: fn(
        &Tensor<B, 4>,
        &Tensor<B, 4>,
        &Tensor<B, 4>,
        &AttentionSpans<B>,
    ) -> Option<(Tensor<B, 4>, Option<Tensor<B, 3>>)>,
    pub span_attention_backward: fn(
        &Tensor<B, 4>,
        &Tensor<B, 4>,
        &Tensor<B, 4>,
        &Tensor<B, 4>,
        Option<&Tensor<B, 3>>,
        &Tensor<B, 4>,
        &AttentionSpans<B>,
    ) -> Option<[Tensor<B, 4>; 3]>,
    pub swiglu_backward:
        fn(&Tensor<B, 2>, &Tensor<B, 2>, &Tensor<B, 2>) -> Option<[Tensor<B, 2>; 2]>,
    pub target_loss:
        fn(&Tensor<B, 2>, &Tensor<B, 2>, &Tensor<B, 1, Int>, f64) -> Option<TargetLoss<B>>,
    pub adamw: fn(
        Vec<AdamWTensor<B>>,
        Option<&Tensor<B, 1>>,
    ) -> Result<Vec<[Tensor<B, 1>; 3]>, Vec<AdamWTensor<B>>>,
    pub clip_scale: fn(&[Tensor<B, 1>], f64) -> Option<Tensor<B, 1>>,
}

impl<B: Backend> Kernels<B> {
    /// No kernel: every operation in plain Burn.
    pub const NONE: Self = Self {
        linear_add: |_, _, _, _| None,
        linear_activated: |_, _, _, _| None,
        dequantise_rows: |_, _, _, _| None,
        linear_quantised: |_, _, _, _| None,
        adapted_linear_quantised: |_, _, _, _| None,
        logits_quantised: |_, _| None,
        low_rank_inputs: |_, _| None,
        adapted_linear: |_, _, _, _, _| None,
        dropout_mask: |_, _| None,
        rms_norm: |_, _, _| None,
        row_layer_norm: |_, _, _, _| None,
        rotate_heads: |_, _, _, _| None,
        split_and_rotate: |_, _, _, _| None,
        span_attention: |_, _, _, _| None,
        matmul_f32: |_, _| None,
        swiglu: |_, _| None,
        gelu_tanh: |_| None,
        gelu_exact: |_| None,
        append_to_cache: |buffers, _, _| Err(buffers),
        logits: |_, _| None,
        low_rank_backward: |_, _| None,
        input_gradient: |_| None,
        swiglu_input_gradient: |_, _, _| None,
        rms_norm_backward: |_, _, _, _, _| None,
        rotate_heads_backward: |_, _, _, _, _| None,
        span_attention_for_backward: |_, _, _, _| None,
        span_attention_backward: |_, _, _, _, _, _, _| None,
        swiglu_backward: |_, _, _| None,
        target_loss: |_, _, _, _| None,
        adamw: |tensors, _| Err(tensors),
        clip_scale: |_, _| None,
    };
}

/// A backend and its kernels; it has all operations of [`ForwardOps`](super::ForwardOps) and
/// [`TrainingOps`](super::TrainingOps).
pub trait HasKernels: Backend {
    /// The kernels.
    const KERNELS: Kernels<Self> = Kernels::NONE;

    /// The kernel of [`ForwardOps::matmul`](super::ForwardOps::matmul), for any number of axes.
    fn matmul_kernel<const D: usize>(
        _a: &Tensor<Self, D>,
        _b: &Tensor<Self, D>,
    ) -> Option<Tensor<Self, D>> {
        None
    }
}

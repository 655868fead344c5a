//! What the model is computed with: one trait of operations, plain Burn by default.
//!
//! Every backend works with the defaults ([`plain`]). A backend with faster ways overrides methods;
//! each of its operations is compared with the default it replaces, forward and backward.

mod autodiff;
#[cfg(all(test, any(feature = "cuda", feature = "wgpu")))]
mod draws;
pub mod dropout;
mod kept;
pub mod plain;
mod spans;
pub mod upload;

#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub mod cube;
#[cfg(feature = "cuda")]
pub mod cuda;

use std::{sync::Arc, time::Duration};

use burn::{
    backend::autodiff::checkpoint::strategy::CheckpointStrategy,
    module::{ModuleMapper, Param},
    prelude::*,
    tensor::{DType, backend::AutodiffBackend, ops::FloatTensor},
};

use crate::{
    generate::{
        SamplingConfig,
        backend::{ServingDecoder, ServingLimits},
    },
    quant::{self, PackedWeight},
    qwen3_vl::{
        ImageInput, Qwen3Vl,
        cache::KeyValueCache,
        config::Qwen3VlConfig,
        nn::{gelu_exact, gelu_tanh, to_f32},
        vision::{VisionLayout, VisionModel, VisionOutput},
    },
};
pub use dropout::Dropout;
pub use kept::Kept;
pub use spans::AttentionSpans;
use upload::{Fill, Upload, UploadError};

/// What a layer's output goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU in the tanh form.
    GeluTanh,
    /// GELU with the error function.
    GeluExact,
}

impl Activation {
    /// Of each element; in f32 inside.
    pub fn of<B: Kernels>(self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::GeluTanh => B::gelu_tanh(x),
            Self::GeluExact => B::gelu_exact(x),
        }
    }
}

/// One low-rank adapter as an operand: `y += scaling · drop(x) Aᵀ Bᵀ`.
#[derive(Debug, Clone)]
pub struct LowRank<B: Backend> {
    /// `[r, in]`, f32.
    pub a: Tensor<B, 2>,
    /// `[out, r]`, f32.
    pub b: Tensor<B, 2>,
    /// Factor on the product.
    pub scaling: f64,
    /// Set in training only.
    pub dropout: Option<Dropout>,
}

/// What a low-rank adapter's backward pass starts from.
#[derive(Debug, Clone)]
pub struct LowRankFlow<B: Backend> {
    /// `drop(x) Aᵀ` of the forward pass, `[tokens, r]`.
    pub low: Tensor<B, 2>,
    /// What flows back into the layer's output, `[tokens, out]`.
    pub dy: Tensor<B, 2>,
    /// The adapter.
    pub adapter: LowRank<B>,
}

/// What flows back through a low-rank adapter.
#[derive(Debug, Clone)]
pub struct LowRankGradients<B: Backend> {
    /// Of `A`, `[r, in]`, f32.
    pub a: Tensor<B, 2>,
    /// Of `B`, `[out, r]`, f32.
    pub b: Tensor<B, 2>,
    /// Of `drop(x) Aᵀ`, `[tokens, r]`.
    pub low: Tensor<B, 2>,
}

/// A root-mean-square norm over each head.
#[derive(Debug, Clone)]
pub struct HeadNorm<B: Backend> {
    /// `[head_dim]`.
    pub weight: Tensor<B, 1>,
    /// Added to the mean square.
    pub epsilon: f64,
}

/// Loss over some targets and what flows back from it.
#[derive(Debug, Clone)]
pub struct TargetLoss<B: Backend> {
    /// Sum of the negative log likelihoods, number of right predictions; `[2]`, f32.
    pub sums: Tensor<B, 1>,
    /// Gradient of the weighted loss, `[targets, hidden]`, in the type of the hidden states.
    pub hidden_gradient: Tensor<B, 2>,
}

/// Memory of a device that this process holds, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In tensors that are alive.
    pub in_use: u64,
    /// Taken from the device; pages are kept for later tensors, so this is what was needed at most.
    pub reserved: u64,
}

/// Adds up tensors over devices.
pub trait AllReduce<B: Backend>: Send + Sync {
    /// The sum of each tensor, on the device of `tensors`. Every device calls it, each from a thread of
    /// its own, with as many f32 tensors of the same lengths; it returns once all have.
    ///
    /// # Errors
    /// What the driver or the library says; that another device did not come. The devices cannot add
    /// up any more then.
    fn sum(&self, tensors: Vec<Tensor<B, 1>>) -> Result<Vec<Tensor<B, 1>>, String>;

    /// Lets devices that wait for others end with an error.
    fn give_up(&self);

    /// Number of devices.
    fn len(&self) -> usize;

    /// Whether there is none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What one AdamW step of one tensor needs besides value and gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Share of the old mean of the gradient.
    pub beta1: f64,
    /// Share of the old mean of its square.
    pub beta2: f64,
    /// Added to the root.
    pub epsilon: f64,
    /// Learning rate over the bias correction of the mean.
    pub step_size: f64,
    /// One over the bias correction of the mean square.
    pub second_scale: f64,
    /// What the value is multiplied with before: one less learning rate times decay.
    pub keep: f64,
}

/// One parameter in an AdamW step; all `[count]`, f32.
#[derive(Debug, Clone)]
pub struct AdamWTensor<B: Backend> {
    /// The parameter.
    pub value: Tensor<B, 1>,
    /// Its gradient.
    pub gradient: Tensor<B, 1>,
    /// Running mean of the gradient.
    pub first: Tensor<B, 1>,
    /// Running mean of its square.
    pub second: Tensor<B, 1>,
    /// The rest; the first three numbers are the same for all parameters.
    pub step: AdamWStep,
}

/// Values that are on their way to the host.
pub type Reading = Box<dyn FnOnce() -> Vec<f32> + Send>;

/// One product whose input gradient is wanted.
#[derive(Debug, Clone)]
pub struct BackwardProduct<B: Backend> {
    /// What flows back into its output, `[tokens, out]`.
    pub dy: Tensor<B, 2>,
    /// `[out, in]`.
    pub weight: Tensor<B, 2>,
    /// Its adapter, and what flows back into the low-rank part `[tokens, r]`.
    pub adapter: Option<(Tensor<B, 2>, LowRank<B>)>,
}

/// Where decoding behind a prefilled cache starts.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeStart {
    /// The first new token of each row.
    pub tokens: Vec<u32>,
    /// Its position.
    pub positions: Vec<i64>,
    /// Steps that may follow.
    pub most_steps: usize,
    /// How tokens are chosen.
    pub sampling: SamplingConfig,
    /// Uniform numbers of the draws to come, a list for each row; empty when none are drawn.
    pub draws: Vec<Vec<f32>>,
    /// All tokens before the first new one, a list for each row; empty without a repetition penalty.
    pub seen: Vec<Vec<u32>>,
}

/// Decodes a batch behind a prefilled cache, one token a row and step, feeding itself.
pub trait Decoder {
    /// The token chosen behind the last one of each row; `None` where the logits are NaN. The next
    /// step takes these tokens.
    ///
    /// # Errors
    /// What the driver says.
    fn next_tokens(&mut self) -> Result<Vec<Option<u32>>, String>;

    /// Logits behind the given tokens, one a row.
    ///
    /// # Errors
    /// What the driver says.
    fn next_logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, String>;
}

/// A backend with the operations of the model.
///
/// Shape letters: `n` tokens of all sequences, `b` sequences, `h` heads, `d` width of a head.
pub trait Kernels: Backend {
    /// `a b` over the last two axes, leading axes alike: `[.., m, k]` and `[.., k, n]` to `[.., m, n]`.
    ///
    /// f32 is multiplied in f32: a backend whose own product rounds the operands brings another.
    fn product<const D: usize>(a: Tensor<Self, D>, b: Tensor<Self, D>) -> Tensor<Self, D> {
        a.matmul(b)
    }

    /// `x Wᵀ + bias + residual`: `x` `[n, in]`, `weight` `[out, in]`, `residual` `[n, out]`.
    fn dense(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        plain::linear(x, weight, bias, residual)
    }

    /// `activation(x Wᵀ + bias)`: as [`Kernels::dense`], then the activation.
    fn dense_activated(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
        activation: Activation,
    ) -> Tensor<Self, 2> {
        activation.of(Self::dense(x, weight, bias, None))
    }

    /// Rows `start .. start + count` of a packed matrix as floats, `[count, in]`.
    fn unpack_rows(
        weight: &PackedWeight<Self>,
        start: usize,
        count: usize,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        weight.rows(start, count).unpack(dtype)
    }

    /// [`Kernels::dense`] with a packed matrix.
    fn dense_packed(
        x: Tensor<Self, 2>,
        weight: &PackedWeight<Self>,
        bias: Option<Tensor<Self, 1>>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        quant::weight::dense(x, weight, bias, residual)
    }

    /// [`Kernels::dense_packed`] plus an adapter's share: the matrix stays as it is.
    fn adapted_packed(
        x: Tensor<Self, 2>,
        weight: &PackedWeight<Self>,
        adapter: &LowRank<Self>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        quant::weight::adapted(x, weight, adapter, residual)
    }

    /// [`Kernels::logits`] with a packed head.
    fn logits_packed(hidden: Tensor<Self, 2>, head: &PackedWeight<Self>) -> Tensor<Self, 2> {
        quant::weight::logits(hidden, head)
    }

    /// `drop(x) Aᵀ` of adapters that share their input, `[n, r]` each; the backward pass needs them.
    fn low_rank_inputs(x: Tensor<Self, 2>, adapters: &[&LowRank<Self>]) -> Vec<Tensor<Self, 2>> {
        adapters
            .iter()
            .map(|adapter| plain::low_rank_input(x.clone(), adapter))
            .collect()
    }

    /// `x Wᵀ + s · low Bᵀ + residual`, `low` being the adapter's of [`Kernels::low_rank_inputs`].
    fn adapted_product(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        low: Tensor<Self, 2>,
        adapter: &LowRank<Self>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        plain::adapted_product(x, weight, low, adapter, residual)
    }

    /// Gradients of adapters that share the input `x`, which is as in the forward pass.
    fn low_rank_backward(
        x: Tensor<Self, 2>,
        flows: &[LowRankFlow<Self>],
    ) -> Vec<LowRankGradients<Self>> {
        flows
            .iter()
            .map(|flow| plain::low_rank_backward(x.clone(), flow))
            .collect()
    }

    /// What flows back into the one input of several products, `Σ dy W + drop(dlow A)`, `[n, in]`.
    ///
    /// # Panics
    /// If there is no product.
    fn input_gradient(products: &[BackwardProduct<Self>]) -> Tensor<Self, 2> {
        plain::input_gradient(products)
    }

    /// What flows back into gate and up where the product's input is [`Kernels::gated`] of them.
    fn gated_input_gradient(
        product: BackwardProduct<Self>,
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        Self::gated_backward(gate, up, Self::input_gradient(&[product]))
    }

    /// What the inputs of an adapter are multiplied with, in the shape of `like`, f32: [`Dropout::mask`],
    /// bit for bit.
    fn dropout_mask(like: &Tensor<Self, 2>, dropout: Dropout) -> Tensor<Self, 2> {
        plain::dropout_mask(like, dropout)
    }

    /// Root-mean-square norm of each row of `[n, width]` with a scale, statistics in f32.
    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        plain::rms_norm(x, weight, epsilon)
    }

    /// What flows back into the input of [`Kernels::rms_norm`], plus `residual`.
    fn rms_norm_backward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        dy: Tensor<Self, 2>,
        residual: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        residual + plain::rms_norm_backward(x, weight, epsilon, dy)
    }

    /// Layer norm of each row of `[n, width]` with scale and shift, statistics in f32.
    fn row_layer_norm(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        bias: Tensor<Self, 1>,
        epsilon: f64,
    ) -> Tensor<Self, 2> {
        plain::layer_norm(x, weight, bias, epsilon)
    }

    /// Normalises each head where a norm is given, then turns it by its token's angles.
    ///
    /// `x` `[n, h, d]`; `cos`, `sin` `[n, d]`, f32, both halves of a row alike.
    fn rotate_heads(
        x: Tensor<Self, 3>,
        norm: Option<HeadNorm<Self>>,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> Tensor<Self, 3> {
        plain::rotate_heads(x, norm, cos, sin)
    }

    /// Splits a fused projection `[n, 3 · h · d]` into queries, keys and values `[n, h, d]` each, the
    /// first two turned.
    fn split_and_rotate(
        qkv: Tensor<Self, 2>,
        heads: usize,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> [Tensor<Self, 3>; 3] {
        plain::split_and_rotate(qkv, heads, cos, sin)
    }

    /// What flows back into the input of [`Kernels::rotate_heads`].
    fn rotate_heads_backward(
        x: Tensor<Self, 3>,
        norm: Option<HeadNorm<Self>>,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
        dy: Tensor<Self, 3>,
    ) -> Tensor<Self, 3> {
        plain::rotate_heads_backward(x, norm, cos, sin, dy)
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
        plain::attention(q, k, v, spans)
    }

    /// [`Kernels::span_attention`], and what its backward pass needs besides: `[b, h, queries]`, f32.
    fn span_attention_for_backward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        spans: &AttentionSpans<Self>,
    ) -> (Tensor<Self, 4>, Option<Tensor<Self, 3>>) {
        (plain::attention(q, k, v, spans), None)
    }

    /// `a b` in f32, of matrices in one type: scores of f16 heads would be rounded to a thousandth of
    /// their size, or leave the type's range.
    fn wide_product(a: Tensor<Self, 4>, b: Tensor<Self, 4>) -> Tensor<Self, 4> {
        if a.dtype() == DType::F16 {
            Self::product(to_f32(a), to_f32(b))
        } else {
            to_f32(Self::product(a, b))
        }
    }

    /// What flows back into `q`, `k` and `v`; `y` and `statistics` are the forward pass's.
    fn span_attention_backward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        _y: Tensor<Self, 4>,
        _statistics: Option<Tensor<Self, 3>>,
        dy: Tensor<Self, 4>,
        spans: &AttentionSpans<Self>,
    ) -> [Tensor<Self, 4>; 3] {
        plain::attention_backward(q, k, v, dy, spans)
    }

    /// `silu(gate) · up`, `[n, width]`.
    fn gated(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        plain::gated(gate, up)
    }

    /// What flows back into gate and up.
    fn gated_backward(
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
        dy: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        plain::gated_backward(gate, up, dy)
    }

    /// GELU in the tanh form, in f32 inside.
    fn gelu_tanh(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        gelu_tanh(x)
    }

    /// GELU with the error function, in f32 inside.
    fn gelu_exact(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        gelu_exact(x)
    }

    /// Compiles what a request of any length may need, so that none has to wait for it; what decoding
    /// batches of up to `largest_batch` takes, in the background. `on_progress` gets kernels done and in
    /// all.
    fn prepare(
        _config: &Qwen3VlConfig,
        _dtype: DType,
        _device: &Self::Device,
        _largest_batch: usize,
        _on_progress: &mut dyn FnMut(u64, u64),
    ) {
    }

    /// The vision tower over some images, for inference; `run` is the tower as it is written.
    fn vision_tower(
        _tower: &VisionModel<Self>,
        _images: &ImageInput,
        _layout: &VisionLayout<Self>,
        run: impl Fn() -> VisionOutput<Self>,
    ) -> VisionOutput<Self> {
        run()
    }

    /// Waits until what is made in the background for a model is there: before something is timed.
    fn settle(_model: &Qwen3Vl<Self>) {}

    /// Whether [`Kernels::decoder`] may take over: caches then hold all tokens of a request from the
    /// start, and what no token has been written to is never read.
    const HAS_DECODER: bool = false;

    /// Writes new keys and values `[b, h, new, d]` into the buffers `[b, h, capacity, d]` of a cache from
    /// token `at` on.
    fn append_to_cache(
        [keys, values]: [Tensor<Self, 4>; 2],
        new: [Tensor<Self, 4>; 2],
        at: usize,
    ) -> [Tensor<Self, 4>; 2] {
        plain::append_to_cache([keys, values], new, at)
    }

    /// A faster way to decode behind a prefilled cache, where there is one for the model.
    fn decoder(
        _model: &Qwen3Vl<Self>,
        _config: &Qwen3VlConfig,
        _cache: &KeyValueCache<Self>,
        _start: &DecodeStart,
    ) -> Option<Box<dyn Decoder>> {
        None
    }

    /// An engine for serving that is faster than plain operations, where there is one for the model;
    /// `on_progress` gets parts done and all parts of what is made ready beforehand.
    ///
    /// # Errors
    /// What the device has no room for, and what to lower.
    fn serving_decoder(
        _model: &Qwen3Vl<Self>,
        _config: &Qwen3VlConfig,
        _limits: &ServingLimits,
        _on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Option<ServingDecoder<Self>>, String> {
        Ok(None)
    }

    /// Logits in f32: `hidden` `[n, width]`, `head` `[vocab, width]`.
    ///
    /// The result is f32 whatever the weights are stored in: rounding it to a half type would make
    /// equals of neighbouring logits.
    fn logits(hidden: Tensor<Self, 2>, head: Tensor<Self, 2>) -> Tensor<Self, 2> {
        plain::logits(hidden, head)
    }

    /// Cross-entropy of some hidden states against a frozen head, forward and backward at once.
    ///
    /// The gradient is that of `weight` times the sum of the negative log likelihoods of `ids`.
    fn target_loss(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        ids: Tensor<Self, 1, Int>,
        weight: f64,
    ) -> TargetLoss<Self> {
        plain::target_loss(hidden, head, ids, weight)
    }

    /// One step of AdamW for many parameters: new value, mean and mean square of each.
    ///
    /// Gradients are multiplied by the second element of `clip`, which is of [`Kernels::clip_scale`].
    fn adamw(
        tensors: Vec<AdamWTensor<Self>>,
        clip: Option<Tensor<Self, 1>>,
    ) -> Vec<[Tensor<Self, 1>; 3]> {
        plain::adamw(tensors, clip)
    }

    /// The common norm of some tensors, and what they have to be multiplied with for it to be at most
    /// `max_norm` (1 where that is 0); `[2]`, f32. There is at least one tensor.
    fn clip_scale(tensors: Vec<Tensor<Self, 1>>, max_norm: f64) -> Tensor<Self, 1> {
        plain::clip_scale(tensors, max_norm)
    }

    /// Whether [`Kernels::read_later`] returns before the device has done what was asked of it so far.
    const READS_LATER: bool = false;

    /// Asks for a few values of the device as they are now; the result waits for them when called.
    fn read_later(x: Tensor<Self, 1>) -> Reading {
        Box::new(move || x.into_data().iter::<f32>().collect())
    }

    /// The same tensor with its elements one behind another: what is read again and again should not
    /// have to be copied into that form each time.
    fn compact<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        x
    }

    /// Memory that the calling thread's work holds on the device; `None` where the backend does not tell.
    fn memory_in_use(_device: &Self::Device) -> Option<DeviceMemory> {
        None
    }

    /// Memory of the device that can still be had, in bytes; `None` where the backend does not tell.
    fn free_memory(_device: &Self::Device) -> Option<u64> {
        None
    }

    /// Runs work whose tensors are to take memory of their very size, where a backend's pools would take
    /// pages that grow with the card. What the work leaves is used again by work of the same `sizes` and
    /// given back before work of others; without sizes the work belongs to that before it.
    fn in_exact_memory<R>(
        _device: &Self::Device,
        _sizes: Option<&[usize]>,
        work: impl FnOnce() -> R,
    ) -> R {
        work()
    }

    /// How these devices add up among themselves; `None` where tensors have to be brought together.
    /// `patience` bounds the wait of a device for the others.
    ///
    /// # Errors
    /// What is missing on a machine whose devices could.
    fn all_reduce(
        _devices: &[Self::Device],
        _patience: Duration,
    ) -> Result<Option<Arc<dyn AllReduce<Self>>>, String> {
        Ok(None)
    }

    /// The same tensor on another device of this process.
    fn send_to<const D: usize>(x: Tensor<Self, D>, device: &Self::Device) -> Tensor<Self, D> {
        x.to_device(device)
    }

    /// New tensors on each of some devices, elements one behind another, from bytes that `fill` writes:
    /// all pieces of one tensor, then all of the next. What it reads is read once for all devices.
    ///
    /// # Errors
    /// The first of `fill`, or that a device has no room.
    fn upload<E: From<UploadError>>(
        devices: &[Self::Device],
        tensors: &[Upload],
        fill: Fill<'_, E>,
    ) -> Result<Vec<Vec<FloatTensor<Self>>>, E> {
        upload::through_tensor_data::<Self, E>(devices, tensors, fill)
    }
}

/// A backend that trains with the operations of the model.
pub trait TrainKernels: AutodiffBackend<InnerBackend: Kernels> + Kernels {}

impl<B: AutodiffBackend<InnerBackend: Kernels> + Kernels> TrainKernels for B {}

/// Autodiff records the defaults, and products of the inner backend's form.
impl<B: Kernels, C: CheckpointStrategy> Kernels for burn::backend::Autodiff<B, C> {
    fn product<const D: usize>(a: Tensor<Self, D>, b: Tensor<Self, D>) -> Tensor<Self, D> {
        autodiff::product(a, b)
    }

    /// The inner backend's: a pass without autodiff and one with it drop the same inputs.
    fn dropout_mask(like: &Tensor<Self, 2>, dropout: Dropout) -> Tensor<Self, 2> {
        Tensor::from_inner(B::dropout_mask(&like.clone().inner(), dropout))
    }

    fn compact<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        let trained = x.is_require_grad();
        let compact = Tensor::from_inner(B::compact(x.inner()));
        if trained {
            compact.require_grad()
        } else {
            compact
        }
    }

    fn in_exact_memory<R>(
        device: &Self::Device,
        sizes: Option<&[usize]>,
        work: impl FnOnce() -> R,
    ) -> R {
        B::in_exact_memory(device, sizes, work)
    }

    fn send_to<const D: usize>(x: Tensor<Self, D>, device: &Self::Device) -> Tensor<Self, D> {
        let trained = x.is_require_grad();
        let sent = Tensor::from_inner(B::send_to(x.inner(), device));
        if trained { sent.require_grad() } else { sent }
    }

    fn upload<E: From<UploadError>>(
        devices: &[Self::Device],
        tensors: &[Upload],
        fill: Fill<'_, E>,
    ) -> Result<Vec<Vec<FloatTensor<Self>>>, E> {
        let sent = B::upload(devices, tensors, fill)?;
        let wrap = |tensors: Vec<_>| tensors.into_iter().map(Self::from_inner).collect();
        Ok(sent.into_iter().map(wrap).collect())
    }
}

/// A module on another device, through [`Kernels::send_to`].
pub fn send_module<B: Kernels, M: Module<B>>(module: M, device: &B::Device) -> M {
    struct Send<'a, B: Backend>(&'a B::Device);
    impl<B: Kernels> ModuleMapper<B> for Send<'_, B> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let trained = param.is_require_grad();
            let sent = B::send_to(param.val().detach(), self.0);
            Param::initialized(param.id, sent.set_require_grad(trained))
        }
    }
    module.map(&mut Send::<B>(device))
}

/// [`Kernels::compact`] for all parameters of a module.
pub fn compact<B: Kernels, M: Module<B>>(module: M) -> M {
    struct Compact;
    impl<B: Kernels> ModuleMapper<B> for Compact {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            param.map(B::compact)
        }
    }
    module.map(&mut Compact)
}

#[cfg(feature = "flex")]
impl Kernels for burn_flex::Flex {}

//! The operations on CUDA: this crate's own kernels where they cover the shapes, plain Burn elsewhere.
//!
//! One operation a file, Rust beside CUDA C++. The sources are compiled on the machine they run on
//! (NVRTC), include no header, and are launched on cubecl's stream over Burn's own buffers. Nothing
//! is tuned at run time: tiles are chosen from the shape.

mod attention;
mod cache;
mod collective;
mod compiled;
mod decode;
mod gemm;
pub(crate) mod launch;
mod lora;
mod loss;
mod memory;
mod module;
mod nccl;
mod operand;
mod optimizer;
mod plan;
mod pointwise;
pub(crate) mod poison;
mod product;
mod quantised_training;
mod recording;
mod rotary;
mod rows;
mod stream;
#[cfg(test)]
pub(crate) mod tests;
mod upload;
mod vision;

use std::{
    sync::{Arc, Once},
    time::Duration,
};

use burn::{
    prelude::*,
    tensor::{DType, ops::FloatTensor},
};
use cubecl_common::config::RuntimeConfig;
use cubecl_runtime::config::{CubeClRuntimeConfig, cache::CacheConfig};

use super::cube::{self, quantized};
use crate::{
    base::device_name::DeviceKind,
    batch::images::ImageInput,
    ops::{
        Activation, AdamWTensor, AllReduce, AttentionSpans, BackwardMatmul, DeviceMemory,
        DeviceOps, Dropout, ForwardOps, HeadNorm, LowRank, LowRankBackward, LowRankGradients,
        Reading, TargetLoss, TrainingOps, plain,
        quantised::QuantisedWeight,
        upload::{Fill, Upload, UploadError},
    },
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        key_values::KeyValueCache,
        vision::{VisionLayout, VisionModel, VisionOutput},
    },
    runtime::{
        accelerator::{Accelerator, DecodeStart, Decoder},
        generate::backend::{ServingDecoder, ServingLimits},
    },
};
pub(crate) use launch::Backend as Cuda;

/// Whether the kernels run on the card that holds a tensor.
fn supported<const D: usize>(x: &Tensor<Cuda, D>) -> bool {
    plan::card(x.device().index).is_supported()
}

/// Whether tensors have the type of the first.
fn one_type<const N: usize>(dtypes: [DType; N]) -> bool {
    dtypes.iter().all(|dtype| *dtype == dtypes[0])
}

/// For a type the kernels support: whether it is bf16, and how many elements 16 bytes hold.
fn scalar_of(dtype: DType) -> Option<(i64, usize)> {
    match dtype {
        DType::BF16 => Some((1, 8)),
        DType::F32 => Some((0, 4)),
        _ => None,
    }
}

/// Configures cubecl to cache compiled kernels on disk; call it before the first use of a device.
pub fn configure() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
        if config.compilation.cache.is_none() {
            config.compilation.cache = compiled::shared_folder().map(CacheConfig::File);
        }
        // The first reader of the configuration fixes it; a later change has no effect.
        let _ = crate::base::panics::quietly(|| CubeClRuntimeConfig::set(config));
    });
}

/// Whether the kernels cover the backward pass of a matmul and its adapter.
fn covers_backward(matmul: &BackwardMatmul<Cuda>) -> bool {
    quantised_training::covers_matrix(&matmul.dy, &matmul.weight)
        && matmul.adapter.as_ref().is_none_or(|(low, adapter)| {
            lora::covers(adapter, matmul.dy.dtype()) && low.dtype() == DType::BF16
        })
}

impl ForwardOps for Cuda {
    fn matmul<const D: usize>(a: Tensor<Self, D>, b: Tensor<Self, D>) -> Tensor<Self, D> {
        if product::covers(&a, &b) {
            product::matmul(a, b)
        } else {
            a.matmul(b)
        }
    }

    fn append_to_cache(
        buffers: [Tensor<Self, 4>; 2],
        new: [Tensor<Self, 4>; 2],
        at: usize,
    ) -> [Tensor<Self, 4>; 2] {
        cache::append(buffers, new, at)
    }

    fn linear_add(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        if gemm::covers(&x, &weight) {
            gemm::linear(x, weight, bias, residual, None)
        } else {
            plain::linear(x, weight, bias, residual)
        }
    }

    fn linear_activated(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
        activation: Activation,
    ) -> Tensor<Self, 2> {
        if gemm::covers(&x, &weight) {
            gemm::linear(x, weight, bias, None, Some(activation))
        } else {
            activation.of(Self::linear_add(x, weight, bias, None))
        }
    }

    fn low_rank_inputs(x: Tensor<Self, 2>, adapters: &[&LowRank<Self>]) -> Vec<Tensor<Self, 2>> {
        if adapters.iter().all(|one| lora::covers(one, x.dtype())) {
            lora::low_rank_inputs(x, adapters)
        } else {
            adapters
                .iter()
                .map(|adapter| plain::low_rank_input(x.clone(), adapter))
                .collect()
        }
    }

    fn adapted_linear(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        low: Tensor<Self, 2>,
        adapter: &LowRank<Self>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        if gemm::covers(&x, &weight) && lora::covers(adapter, x.dtype()) {
            lora::adapted_linear(x, weight, low, adapter, residual)
        } else {
            plain::adapted_linear(x, weight, low, adapter, residual)
        }
    }

    fn dequantise_rows(
        weight: &QuantisedWeight<Self>,
        start: usize,
        count: usize,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        quantized::dequantise_rows(weight, start, count, dtype)
    }

    fn dequantise_for_matmul(
        weight: &QuantisedWeight<Self>,
        start: usize,
        count: usize,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        quantised_training::dequantise_for_matmul(weight, start, count, dtype)
    }

    fn linear_quantised(
        x: Tensor<Self, 2>,
        weight: &QuantisedWeight<Self>,
        bias: Option<Tensor<Self, 1>>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        quantized::linear_quantised(x, weight, bias, residual)
    }

    fn adapted_linear_quantised(
        x: Tensor<Self, 2>,
        weight: &QuantisedWeight<Self>,
        adapter: &LowRank<Self>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        quantized::adapted_linear_quantised(x, weight, adapter, residual)
    }

    fn logits_quantised(hidden: Tensor<Self, 2>, head: &QuantisedWeight<Self>) -> Tensor<Self, 2> {
        quantized::logits_quantised(hidden, head)
    }

    fn dropout_mask(like: &Tensor<Self, 2>, dropout: Dropout) -> Tensor<Self, 2> {
        lora::dropout_mask(like, dropout)
    }

    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        let covered = rows::covers(x.device().index, x.dims()[1], x.dtype());
        if covered && one_type([x.dtype(), weight.dtype()]) {
            rows::rms_norm(x, weight, epsilon)
        } else {
            plain::rms_norm(x, weight, epsilon)
        }
    }

    fn row_layer_norm(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        bias: Tensor<Self, 1>,
        epsilon: f64,
    ) -> Tensor<Self, 2> {
        let covered = rows::covers(x.device().index, x.dims()[1], x.dtype());
        if covered && one_type([x.dtype(), weight.dtype(), bias.dtype()]) {
            rows::layer_norm(x, weight, bias, epsilon)
        } else {
            plain::layer_norm(x, weight, bias, epsilon)
        }
    }

    fn rotate_heads(
        x: Tensor<Self, 3>,
        norm: Option<HeadNorm<Self>>,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> Tensor<Self, 3> {
        let weight = norm.as_ref().map_or(x.dtype(), |norm| norm.weight.dtype());
        if rotary::covers(&x, x.dims()[2]) && one_type([x.dtype(), weight]) {
            rotary::rotate(x, norm, cos, sin, None)
        } else {
            plain::rotate_heads(x, norm, cos, sin)
        }
    }

    fn split_and_rotate(
        qkv: Tensor<Self, 2>,
        heads: usize,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> [Tensor<Self, 3>; 3] {
        let [tokens, width] = qkv.dims();
        // The three parts start at multiples of what the allocator and other kernels rely on.
        let aligned = (tokens * width / 3 * qkv.dtype().size()).is_multiple_of(256);
        if aligned && rotary::covers(&qkv, width / 3 / heads) {
            rotary::split_and_rotate(qkv, heads, cos, sin)
        } else {
            plain::split_and_rotate(qkv, heads, cos, sin)
        }
    }

    fn span_attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        spans: &AttentionSpans<Self>,
    ) -> Tensor<Self, 4> {
        let covered = attention::covers(q.device().index, q.dims()[3], q.dtype());
        if covered && one_type([q.dtype(), k.dtype(), v.dtype()]) {
            attention::forward(q, k, v, spans, false).0
        } else {
            plain::attention(q, k, v, spans)
        }
    }

    fn swiglu(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        if pointwise::covers(&[&gate, &up]) {
            pointwise::swiglu(gate, up)
        } else {
            plain::swiglu(gate, up)
        }
    }

    fn gelu_tanh(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        if pointwise::covers(&[&x]) {
            pointwise::gelu(x, true)
        } else {
            plain::gelu_tanh(x)
        }
    }

    fn gelu_exact(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        if pointwise::covers(&[&x]) {
            pointwise::gelu(x, false)
        } else {
            plain::gelu_exact(x)
        }
    }

    fn logits(hidden: Tensor<Self, 2>, head: Tensor<Self, 2>) -> Tensor<Self, 2> {
        if gemm::covers(&hidden, &head) {
            gemm::logits(hidden, head)
        } else {
            plain::logits(hidden, head)
        }
    }
}

impl TrainingOps for Cuda {
    fn low_rank_backward(
        x: Tensor<Self, 2>,
        backwards: &[LowRankBackward<Self>],
    ) -> Vec<LowRankGradients<Self>> {
        let covered = backwards.iter().all(|backward| {
            lora::covers(&backward.adapter, x.dtype())
                && [&backward.low, &backward.dy]
                    .iter()
                    .all(|x| x.dtype() == DType::BF16)
        });
        if covered {
            lora::low_rank_backward(x, backwards)
        } else {
            backwards
                .iter()
                .map(|backward| plain::low_rank_backward(x.clone(), backward))
                .collect()
        }
    }

    fn input_gradient(matmuls: &[BackwardMatmul<Self>]) -> Tensor<Self, 2> {
        if matmuls.iter().all(covers_backward) {
            lora::input_gradient(matmuls)
        } else {
            plain::input_gradient(matmuls)
        }
    }

    fn input_gradient_quantised(
        dy: Tensor<Self, 2>,
        weight: &QuantisedWeight<Self>,
    ) -> Tensor<Self, 2> {
        quantised_training::input_gradient(&dy, weight)
            .unwrap_or_else(|| plain::input_gradient_quantised(dy, weight))
    }

    fn adapted_linear_for_backward(
        x: Tensor<Self, 2>,
        weight: &QuantisedWeight<Self>,
        low: Tensor<Self, 2>,
        adapter: &LowRank<Self>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        quantised_training::adapted_linear(&x, weight, &low, adapter, residual.as_ref())
            .unwrap_or_else(|| {
                plain::adapted_linear_for_backward(x, weight, low, adapter, residual)
            })
    }

    fn target_loss_quantised(
        hidden: Tensor<Self, 2>,
        head: &QuantisedWeight<Self>,
        ids: Tensor<Self, 1, Int>,
        weight: f64,
    ) -> TargetLoss<Self> {
        quantised_training::target_loss(&hidden, head, &ids, weight)
            .unwrap_or_else(|| plain::target_loss_quantised(hidden, head, ids, weight))
    }

    fn swiglu_input_gradient(
        matmul: BackwardMatmul<Self>,
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        let one_type = [&gate, &up].iter().all(|x| x.dtype() == DType::BF16);
        if covers_backward(&matmul) && one_type {
            lora::swiglu_input_gradient(matmul, gate, up)
        } else {
            Self::swiglu_backward(gate, up, Self::input_gradient(&[matmul]))
        }
    }

    fn rms_norm_backward(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        epsilon: f64,
        dy: Tensor<Self, 2>,
        residual: Tensor<Self, 2>,
    ) -> Tensor<Self, 2> {
        let dtypes = [x.dtype(), weight.dtype(), dy.dtype(), residual.dtype()];
        if rows::covers(x.device().index, x.dims()[1], x.dtype()) && one_type(dtypes) {
            rows::rms_norm_backward(x, weight, epsilon, dy, residual)
        } else {
            residual + plain::rms_norm_backward(x, weight, epsilon, dy)
        }
    }

    fn rotate_heads_backward(
        x: Tensor<Self, 3>,
        norm: Option<HeadNorm<Self>>,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
        dy: Tensor<Self, 3>,
    ) -> Tensor<Self, 3> {
        let weight = norm.as_ref().map_or(x.dtype(), |norm| norm.weight.dtype());
        if rotary::covers(&x, x.dims()[2]) && one_type([x.dtype(), weight, dy.dtype()]) {
            rotary::rotate(x, norm, cos, sin, Some(dy))
        } else {
            plain::rotate_heads_backward(x, norm, cos, sin, dy)
        }
    }

    fn span_attention_for_backward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        spans: &AttentionSpans<Self>,
    ) -> (Tensor<Self, 4>, Option<Tensor<Self, 3>>) {
        let covered = attention::covers(q.device().index, q.dims()[3], q.dtype());
        if covered && one_type([q.dtype(), k.dtype(), v.dtype()]) {
            attention::forward(q, k, v, spans, true)
        } else {
            (plain::attention(q, k, v, spans), None)
        }
    }

    fn span_attention_backward(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        y: Tensor<Self, 4>,
        statistics: Option<Tensor<Self, 3>>,
        dy: Tensor<Self, 4>,
        spans: &AttentionSpans<Self>,
    ) -> [Tensor<Self, 4>; 3] {
        match statistics {
            Some(statistics) => attention::backward([q, k, v, y, dy], statistics, spans),
            None => plain::attention_backward(q, k, v, dy, spans),
        }
    }

    fn swiglu_backward(
        gate: Tensor<Self, 2>,
        up: Tensor<Self, 2>,
        dy: Tensor<Self, 2>,
    ) -> [Tensor<Self, 2>; 2] {
        if pointwise::covers(&[&gate, &up, &dy]) {
            pointwise::swiglu_backward(gate, up, dy)
        } else {
            plain::swiglu_backward(gate, up, dy)
        }
    }

    fn target_loss(
        hidden: Tensor<Self, 2>,
        head: Tensor<Self, 2>,
        ids: Tensor<Self, 1, Int>,
        weight: f64,
    ) -> TargetLoss<Self> {
        if gemm::covers(&hidden, &head) && head.dims()[0].is_multiple_of(8) {
            loss::target_loss(hidden, head, ids, weight)
        } else {
            plain::target_loss(hidden, head, ids, weight)
        }
    }

    fn adamw(
        tensors: Vec<AdamWTensor<Self>>,
        clip: Option<Tensor<Self, 1>>,
    ) -> Vec<[Tensor<Self, 1>; 3]> {
        let all_f32 = tensors.iter().all(|one| {
            [&one.value, &one.gradient, &one.first, &one.second]
                .iter()
                .all(|tensor| tensor.dtype() == DType::F32)
        });
        if all_f32 {
            optimizer::adamw(tensors, clip)
        } else {
            plain::adamw(tensors, clip)
        }
    }

    fn clip_scale(tensors: Vec<Tensor<Self, 1>>, max_norm: f64) -> Tensor<Self, 1> {
        if tensors.iter().all(|tensor| tensor.dtype() == DType::F32) {
            optimizer::clip_scale(tensors, max_norm)
        } else {
            plain::clip_scale(tensors, max_norm)
        }
    }
}

impl DeviceOps for Cuda {
    const KIND: DeviceKind = DeviceKind::Cuda;

    fn cache_buffer(shape: [usize; 4], dtype: DType, device: &Self::Device) -> Tensor<Self, 4> {
        Tensor::empty(shape, (device, dtype))
    }

    fn contiguous<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        launch::tensor(launch::contiguous(x))
    }

    fn memory_in_use(device: &Self::Device) -> Option<DeviceMemory> {
        collective::memory_in_use(device)
    }

    fn free_memory(device: &Self::Device) -> Option<u64> {
        launch::free_memory(device)
    }

    fn in_exact_memory<R>(
        device: &Self::Device,
        sizes: Option<&[usize]>,
        work: impl FnOnce() -> R,
    ) -> R {
        memory::in_exact_memory(device, sizes, work)
    }

    fn all_reduce(
        devices: &[Self::Device],
        patience: Duration,
    ) -> Result<Option<Arc<dyn AllReduce<Self>>>, String> {
        collective::all_reduce(devices, patience)
    }

    fn to_other_device<const D: usize>(
        x: Tensor<Self, D>,
        device: &Self::Device,
    ) -> Tensor<Self, D> {
        collective::to_other_device(x, device)
    }

    fn upload<E: From<UploadError>>(
        devices: &[Self::Device],
        tensors: &[Upload],
        fill: Fill<'_, E>,
    ) -> Result<Vec<Vec<FloatTensor<Self>>>, E> {
        upload::upload(devices, tensors, fill)
    }

    const READS_ASYNC: bool = true;

    fn read_async(x: Tensor<Self, 1>) -> Reading {
        launch::read_async(x)
    }
}

impl Accelerator for Cuda {
    fn prepare(
        config: &Qwen3VlConfig,
        dtype: DType,
        device: &Self::Device,
        largest_batch: usize,
        on_progress: &mut dyn FnMut(u64, u64),
    ) {
        if plan::card(device.index).is_supported() && dtype == DType::BF16 {
            let like = launch::strided(Tensor::<Self, 1>::empty([1], (device, dtype)));
            let vocab = config.text_config.vocab_size;
            let widths = [config.vision_config.head_dim(), config.text_config.head_dim]
                .map(|width| attention::covers(device.index, width, dtype).then_some(width));
            let mut tiles = 0;
            gemm::prepare(&like, vocab, |done, all| {
                tiles = all;
                on_progress(done as u64, (all + widths.len()) as u64);
            });
            for (done, width) in widths.into_iter().enumerate() {
                if let Some(width) = width {
                    attention::prepare(width, device);
                    let _ = Self::sync(device);
                }
                let all = tiles + widths.len();
                on_progress((tiles + done + 1) as u64, all as u64);
            }
            decode::prepare(&config.text_config, device.index, largest_batch);
        }
    }

    fn vision_tower(
        tower: &VisionModel<Self>,
        images: &ImageInput,
        layout: &VisionLayout<Self>,
        run: impl Fn() -> VisionOutput<Self>,
    ) -> VisionOutput<Self> {
        if tower
            .blocks
            .iter()
            .any(|block| block.attn.qkv.weight.packed().is_some())
        {
            return run();
        }
        vision::run(tower, images, layout, run)
    }

    fn wait_for_background(model: &Qwen3Vl<Self>) {
        vision::wait_for_background(&model.model.visual);
    }

    const HAS_DECODER: bool = true;

    fn decoder(
        model: &Qwen3Vl<Self>,
        config: &Qwen3VlConfig,
        cache: &KeyValueCache<Self>,
        start: &DecodeStart,
    ) -> Option<Box<dyn Decoder>> {
        if model.quantization().is_some() {
            return cube::decode::start(model, config, cache, start);
        }
        decode::start(model, config, cache, start)
    }

    fn serving_decoder(
        model: &Qwen3Vl<Self>,
        config: &Qwen3VlConfig,
        limits: &ServingLimits,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Option<ServingDecoder<Self>>, String> {
        if model.quantization().is_some() {
            return Ok(None);
        }
        decode::serve(model, config, limits, on_progress)
    }
}

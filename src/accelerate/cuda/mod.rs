//! The operations on CUDA: this crate's own kernels where they cover the shapes, plain Burn elsewhere.
//!
//! One operation a file, Rust beside CUDA C++. The sources are compiled on the machine they run on
//! (NVRTC), include no header, and are launched on cubecl's stream over Burn's own buffers. Nothing
//! is tuned at run time: tiles are chosen from the shape.

mod attention;
mod buffer;
mod cache;
mod collective;
mod compiled;
mod decode;
mod dequantised;
mod driver;
mod fragments;
mod frozen_matrix;
mod gemm;
mod kernel;
pub(crate) mod launch;
mod lora;
mod loss;
mod matmul_f32;
mod memory;
mod module;
mod nccl;
mod operand;
mod optimizer;
mod plan;
mod pointwise;
pub(crate) mod poison;
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
        AllReduce, DeviceMemory, DeviceOps, HasKernels, Kernels, Others, Reading,
        quantised::Quantization,
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

impl HasKernels for Cuda {
    const KERNELS: Kernels<Self> = Kernels {
        linear_add: |x, weight, bias, residual| gemm::linear(x, weight, bias, residual, None),
        linear_activated: |x, weight, bias, activation| {
            gemm::linear(x, weight, bias, None, Some(activation))
        },
        dequantise_rows: |weight, start, count, dtype| match weight.is_arranged() {
            true => fragments::dequantise_rows(weight, start, count, dtype),
            false => fragments::row_floats(weight, start, count, dtype)
                .or_else(|| quantized::dequantise_rows(weight, start, count, dtype)),
        },
        dequantise_for_matmul: dequantised::for_matmul,
        select_quantised: fragments::select_rows,
        linear_quantised: |x, weight, bias, residual| {
            let few = match weight.is_arranged() {
                true => fragments::linear(x, weight, bias, residual),
                false => quantized::linear_quantised(x, weight, bias, residual),
            };
            few.or_else(|| dequantised::linear(x, weight, bias, residual))
        },
        adapted_linear_quantised: |x, weight, adapter, residual| {
            let few = match weight.is_arranged() {
                true => None,
                false => quantized::adapted_linear_quantised(x, weight, adapter, residual),
            };
            few.or_else(|| dequantised::adapted(x, weight, adapter, residual))
        },
        logits_quantised: |hidden, head| match head.is_arranged() {
            true => fragments::logits(hidden, head),
            false => quantized::logits_quantised(hidden, head),
        },
        low_rank_inputs: lora::low_rank_inputs,
        adapted_linear: lora::adapted_linear,
        dropout_mask: lora::dropout_mask,
        rms_norm: rows::rms_norm,
        row_layer_norm: rows::layer_norm,
        rotate_heads: |x, norm, cos, sin| rotary::rotate(x, norm, cos, sin, None),
        split_and_rotate: rotary::split_and_rotate,
        span_attention: |q, k, v, spans| attention::forward(q, k, v, spans, false).map(|(y, _)| y),
        swiglu: pointwise::swiglu,
        gelu_tanh: pointwise::gelu_tanh,
        gelu_exact: pointwise::gelu_exact,
        append_to_cache: cache::append,
        logits: gemm::logits,
        low_rank_backward: lora::low_rank_backward,
        input_gradient: lora::input_gradient,
        input_gradient_quantised: quantised_training::input_gradient,
        adapted_linear_for_backward: dequantised::adapted_from_low,
        swiglu_input_gradient: lora::swiglu_input_gradient,
        rms_norm_backward: rows::rms_norm_backward,
        rotate_heads_backward: |x, norm, cos, sin, dy| rotary::rotate(x, norm, cos, sin, Some(dy)),
        span_attention_for_backward: |q, k, v, spans| attention::forward(q, k, v, spans, true),
        span_attention_backward: |q, k, v, y, statistics, dy, spans| {
            attention::backward([q, k, v, y, dy], statistics, spans)
        },
        swiglu_backward: pointwise::swiglu_backward,
        target_loss: loss::target_loss,
        target_loss_quantised: quantised_training::target_loss,
        adamw: optimizer::adamw,
        clip_scale: optimizer::clip_scale,
        ..Kernels::NONE
    };

    fn matmul_kernel<const D: usize>(
        a: &Tensor<Self, D>,
        b: &Tensor<Self, D>,
    ) -> Option<Tensor<Self, D>> {
        matmul_f32::matmul(a, b)
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
        others: Option<&Others<'_>>,
        patience: Duration,
    ) -> Result<Option<Arc<dyn AllReduce<Self>>>, String> {
        collective::all_reduce(devices, others, patience)
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
    fn arrange(model: Qwen3Vl<Self>, config: &Qwen3VlConfig) -> Qwen3Vl<Self> {
        decode::arrange(model, config)
    }

    fn prepare(
        config: &Qwen3VlConfig,
        (dtype, quantization): (DType, Option<Quantization>),
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
            let text = &config.text_config;
            decode::prepare(text, quantization, device.index, largest_batch);
        }
    }

    fn vision_tower(
        tower: &VisionModel<Self>,
        images: &ImageInput,
        layout: &VisionLayout<Self>,
        run: impl Fn() -> VisionOutput<Self>,
    ) -> VisionOutput<Self> {
        // Matmuls of few rows read quantised words by kernels of cubecl, which cannot be recorded.
        let mut weights = tower.linears().map(|linear| &linear.weight);
        let merged = images.patches() / 4;
        if merged <= dequantised::FEW_ROWS && weights.any(|weight| weight.packed().is_some()) {
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
        // Quantised weights that are no whole tiles are read row by row.
        if model.quantization().is_some() && !decode::is_arranged(model) {
            return cube::decode::start(model, config, cache, start);
        }
        decode::start(model, config, cache, start)
    }

    /// A step of 32 rows takes a quarter longer than one of a single row.
    const CHEAP_ROWS: usize = 32;

    fn serving_decoder(
        model: &Qwen3Vl<Self>,
        config: &Qwen3VlConfig,
        limits: &ServingLimits,
        on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Option<ServingDecoder<Self>>, String> {
        decode::serve(model, config, limits, on_progress)
    }
}

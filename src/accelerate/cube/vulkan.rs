//! The operations on Vulkan.

use burn::{
    backend::wgpu::WgpuRuntime,
    prelude::*,
    tensor::{DType, TensorPrimitive},
};
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};

use super::{
    attention, cache, decode, dropout,
    launch::Buffer as AnyBuffer,
    matvec,
    pointwise::{self, Operation},
    quantized, recorded, rotary, rows,
};
use crate::{
    base::device_name::DeviceKind,
    ops::{DeviceMemory, DeviceOps, HasKernels, Kernels},
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, key_values::KeyValueCache},
    runtime::accelerator::{Accelerator, DecodeStart, Decoder},
};

pub(super) type Backend = burn::backend::Vulkan;
pub(super) type Buffer = AnyBuffer<WgpuRuntime>;

/// The buffer of a tensor, with any strides.
pub(super) fn strided<const D: usize>(tensor: Tensor<Backend, D>) -> Buffer {
    tensor.into_primitive().tensor()
}

/// The buffer of a tensor, copied if it is not contiguous.
pub(super) fn contiguous<const D: usize>(tensor: Tensor<Backend, D>) -> Buffer {
    burn_cubecl::kernel::into_contiguous(strided(tensor))
}

/// A tensor over a buffer.
pub(super) fn tensor<const D: usize>(buffer: Buffer) -> Tensor<Backend, D> {
    Tensor::from_primitive(TensorPrimitive::Float(buffer))
}

impl HasKernels for Backend {
    const KERNELS: Kernels<Self> = Kernels {
        linear_add: matvec::linear_add,
        dequantise_rows: quantized::dequantise_rows,
        linear_quantised: quantized::linear_quantised,
        adapted_linear_quantised: quantized::adapted_linear_quantised,
        logits_quantised: quantized::logits_quantised,
        low_rank_inputs: matvec::low_rank_inputs,
        adapted_linear: matvec::adapted_linear,
        dropout_mask: dropout::mask,
        rms_norm: |x, weight, epsilon| rows::norm(x, weight, None, epsilon),
        row_layer_norm: |x, weight, bias, epsilon| rows::norm(x, weight, Some(bias), epsilon),
        rotate_heads: rotary::rotate,
        split_and_rotate: rotary::split_and_rotate,
        span_attention: attention::span_attention,
        matmul_f32: |a, b| {
            let (a, b) = (strided(a.clone()), strided(b.clone()));
            let y = matmul(a, b, None, MatmulStrategy::default(), DType::F32);
            y.ok().map(tensor)
        },
        swiglu: |gate, up| pointwise::run(Operation::SwiGlu, gate, up),
        gelu_tanh: |x| pointwise::run(Operation::GeluTanh, x, x),
        gelu_exact: |x| pointwise::run(Operation::GeluExact, x, x),
        append_to_cache: cache::append,
        logits: matvec::logits,
        ..Kernels::NONE
    };

    fn matmul_kernel<const D: usize>(
        a: &Tensor<Self, D>,
        b: &Tensor<Self, D>,
    ) -> Option<Tensor<Self, D>> {
        matvec::matmul_transposed(a, b)
    }
}

impl DeviceOps for Backend {
    const KIND: DeviceKind = DeviceKind::Wgpu;

    fn cache_buffer(shape: [usize; 4], dtype: DType, device: &Self::Device) -> Tensor<Self, 4> {
        Tensor::empty(shape, (device, dtype))
    }

    fn memory_in_use(device: &Self::Device) -> Option<DeviceMemory> {
        let tensor = Tensor::<Self, 1>::empty([1], device);
        let usage = strided(tensor).client.memory_usage();
        usage.ok().map(|usage| DeviceMemory {
            in_use: usage.bytes_in_use,
            reserved: usage.bytes_reserved,
        })
    }

    fn contiguous<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        tensor(contiguous(x))
    }
}

impl Accelerator for Backend {
    const HAS_DECODER: bool = true;
    const DECODER_VERIFIES: bool = true;

    fn decoder(
        model: &Qwen3Vl<Self>,
        config: &Qwen3VlConfig,
        cache: &KeyValueCache<Self>,
        start: &DecodeStart,
    ) -> Option<Box<dyn Decoder>> {
        recorded::start(model, config, cache, start)
            .or_else(|| decode::start(model, config, cache, start))
    }
}

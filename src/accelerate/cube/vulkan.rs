//! The operations on Vulkan.

use burn::{
    backend::wgpu::WgpuRuntime,
    prelude::*,
    tensor::{DType, TensorPrimitive},
};
use burn_cubecl::kernel::matmul::{MatmulStrategy, matmul};

use super::{
    attention::{self, Cache},
    cache, decode, dropout,
    launch::Buffer as AnyBuffer,
    matvec, pointwise,
    pointwise::Operation,
    quantized, rotary, rows,
    tile_matmul::{self, Operand},
};
use crate::{
    base::device_name::DeviceKind,
    ops::{
        AttentionSpans, DeviceMemory, DeviceOps, Dropout, ForwardOps, HeadNorm, LowRank,
        TrainingOps, cast::to_f32, plain, quantised::QuantisedWeight,
    },
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

/// Heads with contiguous elements; tokens and heads may have any stride.
fn with_contiguous_heads(buffer: Buffer) -> Buffer {
    if buffer.meta.strides().last() == Some(&1) {
        buffer
    } else {
        burn_cubecl::kernel::into_contiguous(buffer)
    }
}

/// Whether a matmul with a matrix `[out, in]` goes in tiles.
fn tiles(x: &Buffer, weight: &Buffer) -> bool {
    tile_matmul::covers(x) && Operand::floats(weight).is_some()
}

impl ForwardOps for Backend {
    fn matmul<const D: usize>(a: Tensor<Self, D>, b: Tensor<Self, D>) -> Tensor<Self, D> {
        // A matrix `[out, in]` that is read in place, as linear layers have.
        if D == 2 {
            let weight = strided(b.clone().transpose());
            let x = strided(a.clone());
            if tiles(&x, &weight) {
                let x = burn_cubecl::kernel::into_contiguous(x);
                let dtype = x.dtype;
                return tensor(matvec::matmul(&x, None, &weight, None, None, dtype));
            }
        }
        a.matmul(b)
    }

    fn linear_add(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        bias: Option<Tensor<Self, 1>>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        let (x, weight) = (contiguous(x), strided(weight));
        let one_type = |dtype: DType| dtype == x.dtype;
        let fits = bias.as_ref().is_none_or(|bias| one_type(bias.dtype()))
            && residual
                .as_ref()
                .is_none_or(|residual| one_type(residual.dtype()));
        let covered = tiles(&x, &weight) || matvec::covers(&x, &weight);
        if !fits || !covered {
            return plain::linear(tensor(x), tensor(weight), bias, residual);
        }
        let (bias, residual) = (bias.map(contiguous), residual.map(contiguous));
        tensor(matvec::matmul(
            &x,
            None,
            &weight,
            bias.as_ref(),
            residual.as_ref(),
            x.dtype,
        ))
    }

    fn dequantise_rows(
        weight: &QuantisedWeight<Self>,
        start: usize,
        count: usize,
        dtype: DType,
    ) -> Tensor<Self, 2> {
        quantized::dequantise_rows(weight, start, count, dtype)
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

    fn low_rank_inputs(x: Tensor<Self, 2>, adapters: &[&LowRank<Self>]) -> Vec<Tensor<Self, 2>> {
        let wide = contiguous(to_f32(x.clone()));
        let low = |adapter: &&LowRank<Self>| {
            let a = contiguous(adapter.a.clone());
            if adapter.dropout.is_some() || !matvec::covers(&wide, &a) {
                return plain::low_rank_input(x.clone(), adapter);
            }
            tensor(matvec::matmul(&wide, None, &a, None, None, DType::F32))
        };
        adapters.iter().map(low).collect()
    }

    fn adapted_linear(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 2>,
        low: Tensor<Self, 2>,
        adapter: &LowRank<Self>,
        residual: Option<Tensor<Self, 2>>,
    ) -> Tensor<Self, 2> {
        let (x, weight) = (contiguous(x), strided(weight));
        let b = contiguous(adapter.b.clone());
        let scaled = contiguous(to_f32(low.clone()) * adapter.scaling);
        let one_type = residual
            .as_ref()
            .is_none_or(|residual| residual.dtype() == x.dtype);
        if !one_type || !matvec::covers(&x, &weight) || !matvec::covers(&scaled, &b) {
            return plain::adapted_linear(tensor(x), tensor(weight), low, adapter, residual);
        }
        let residual = residual.map(contiguous);
        let y = matvec::matmul(&x, None, &weight, None, residual.as_ref(), x.dtype);
        tensor(matvec::matmul(&scaled, None, &b, None, Some(&y), x.dtype))
    }

    fn dropout_mask(like: &Tensor<Self, 2>, dropout: Dropout) -> Tensor<Self, 2> {
        tensor(dropout::mask(&strided(like.clone()), dropout))
    }

    fn rms_norm(x: Tensor<Self, 2>, weight: Tensor<Self, 1>, epsilon: f64) -> Tensor<Self, 2> {
        let x = contiguous(x);
        if !rows::covers(&x) || x.dtype != weight.dtype() {
            return plain::rms_norm::<Self, 2>(tensor(x), weight, epsilon);
        }
        tensor(rows::norm(&x, &contiguous(weight), None, epsilon))
    }

    fn row_layer_norm(
        x: Tensor<Self, 2>,
        weight: Tensor<Self, 1>,
        bias: Tensor<Self, 1>,
        epsilon: f64,
    ) -> Tensor<Self, 2> {
        let x = contiguous(x);
        let one_type = [weight.dtype(), bias.dtype()] == [x.dtype; 2];
        if !rows::covers(&x) || !one_type {
            return plain::layer_norm(tensor(x), weight, bias, epsilon);
        }
        let (weight, bias) = (contiguous(weight), contiguous(bias));
        tensor(rows::norm(&x, &weight, Some(&bias), epsilon))
    }

    fn rotate_heads(
        x: Tensor<Self, 3>,
        norm: Option<HeadNorm<Self>>,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> Tensor<Self, 3> {
        let one_type = norm
            .as_ref()
            .is_none_or(|norm| norm.weight.dtype() == x.dtype());
        if !rotary::covers(x.dims()[2], x.dtype()) || !one_type {
            return plain::rotate_heads(x, norm, cos, sin);
        }
        let x = with_contiguous_heads(strided(x));
        let norm = norm.map(|norm| (contiguous(norm.weight), norm.epsilon));
        let norm = norm.as_ref().map(|(weight, epsilon)| (weight, *epsilon));
        tensor(rotary::rotate(&x, norm, &contiguous(cos), &contiguous(sin)))
    }

    fn split_and_rotate(
        qkv: Tensor<Self, 2>,
        heads: usize,
        cos: Tensor<Self, 2>,
        sin: Tensor<Self, 2>,
    ) -> [Tensor<Self, 3>; 3] {
        if !rotary::covers(qkv.dims()[1] / 3 / heads, qkv.dtype()) {
            return plain::split_and_rotate(qkv, heads, cos, sin);
        }
        let (qkv, cos, sin) = (contiguous(qkv), contiguous(cos), contiguous(sin));
        rotary::split_and_rotate(&qkv, heads, &cos, &sin).map(tensor)
    }

    fn span_attention(
        q: Tensor<Self, 4>,
        k: Tensor<Self, 4>,
        v: Tensor<Self, 4>,
        spans: &AttentionSpans<Self>,
    ) -> Tensor<Self, 4> {
        let [_, _, keys, _] = k.dims();
        let [q, k, v] = [q, k, v].map(|x| with_contiguous_heads(strided(x)));
        let cache = Cache {
            keys: &k,
            values: &v,
        };
        if !attention::covers(&q, &cache) {
            return plain::attention(tensor(q), tensor(k), tensor(v), spans);
        }
        let [first, end] = spans.ranges().clone().map(|range| range.into_primitive());
        let y = attention::attended(&q, &cache, &first, &end, keys);
        tensor::<4>(y).swap_dims(1, 2)
    }

    fn matmul_f32(a: Tensor<Self, 4>, b: Tensor<Self, 4>) -> Tensor<Self, 4> {
        let (a, b) = (strided(a), strided(b));
        let y = matmul(a, b, None, MatmulStrategy::default(), DType::F32);
        tensor(y.expect("a strategy covers every matmul"))
    }

    fn swiglu(gate: Tensor<Self, 2>, up: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let (gate, up) = (contiguous(gate), contiguous(up));
        if !pointwise::covers(&gate) || gate.dtype != up.dtype {
            return plain::swiglu(tensor(gate), tensor(up));
        }
        tensor(pointwise::run(Operation::SwiGlu, &gate, &up))
    }

    fn gelu_tanh(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let x = contiguous(x);
        if !pointwise::covers(&x) {
            return plain::gelu_tanh(tensor::<2>(x));
        }
        tensor(pointwise::run(Operation::GeluTanh, &x, &x))
    }

    fn gelu_exact(x: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let x = contiguous(x);
        if !pointwise::covers(&x) {
            return plain::gelu_exact(tensor::<2>(x));
        }
        tensor(pointwise::run(Operation::GeluExact, &x, &x))
    }

    fn append_to_cache(
        buffers: [Tensor<Self, 4>; 2],
        new: [Tensor<Self, 4>; 2],
        at: usize,
    ) -> [Tensor<Self, 4>; 2] {
        let [keys, values] = buffers.map(strided);
        let [new_keys, new_values] = new.map(|new| with_contiguous_heads(strided(new)));
        if !cache::covers(&keys, &new_keys, at) || !cache::covers(&values, &new_values, at) {
            let new = [tensor(new_keys), tensor(new_values)];
            return plain::append_to_cache([tensor(keys), tensor(values)], new, at);
        }
        cache::append(&keys, &new_keys, at);
        cache::append(&values, &new_values, at);
        [tensor(keys), tensor(values)]
    }

    fn logits(hidden: Tensor<Self, 2>, head: Tensor<Self, 2>) -> Tensor<Self, 2> {
        let (hidden, head) = (contiguous(hidden), strided(head));
        if !tiles(&hidden, &head) && !matvec::covers(&hidden, &head) {
            return plain::logits(tensor(hidden), tensor(head));
        }
        let logits = matvec::matmul(&hidden, None, &head, None, None, DType::F32);
        tensor(logits)
    }
}

impl TrainingOps for Backend {}

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

    fn decoder(
        model: &Qwen3Vl<Self>,
        config: &Qwen3VlConfig,
        cache: &KeyValueCache<Self>,
        start: &DecodeStart,
    ) -> Option<Box<dyn Decoder>> {
        decode::start(model, config, cache, start)
    }
}

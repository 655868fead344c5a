//! Every fast operation against the default it replaces, over odd shapes, in f32 and bf16.
//!
//! The reference is the default on the same inputs cast to f32. Tolerances are relative distances
//! (norm of the difference over norm of the reference): a bf16 result is rounded once, 2⁻⁹ at most
//! and 0.0017 on average; operations that round between their steps get twice that; f32 sums in
//! another order differ by some 1e-6.

mod matmuls;
mod models;

use std::collections::HashSet;

use burn::{
    module::{ModuleVisitor, Param},
    prelude::*,
    tensor::DType,
};

use super::Cuda;
use crate::{
    accelerate::draws,
    adapters::lora::{
        attach::{LinearMapper, attach},
        config::LoraConfig,
    },
    batch::{
        images::ImageInput,
        text::{Padding, TextInput},
    },
    ops::{
        Activation, AdamWStep, AdamWTensor, AttentionSpans, BackwardMatmul, DeviceOps, Dropout,
        ForwardOps, HeadNorm, LowRank, LowRankBackward, TrainingOps,
        cast::{to_dtype, to_f32},
        plain,
        plain::{gelu_exact, gelu_tanh},
        quantised::cache::CacheFormat,
    },
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        key_values::KeyValueCache,
        nn::{InitOptions, Linear},
        vision::{VisionLayout, pixel_tensor},
    },
    runtime::{
        accelerator::{Accelerator, DecodeStart},
        generate::{
            SamplingConfig,
            sampler::{Sampler, TokenChoice},
        },
        synthetic::weights::{RandomSize, draw},
        vision::encode_images,
    },
};

pub(super) use models::quantised_pair;

pub(crate) type T<const D: usize> = Tensor<Cuda, D>;

/// The first device; values are drawn anew for each test.
pub(crate) fn device() -> <Cuda as burn::tensor::backend::BackendTypes>::Device {
    let device = burn::backend::cuda::CudaDevice::new(0);
    draws::begin();
    device
}

fn normal<const D: usize>(
    shape: [usize; D],
    std: f64,
    dtype: DType,
    device: &<Cuda as burn::tensor::backend::BackendTypes>::Device,
) -> T<D> {
    draws::normal(shape, std, dtype, device)
}

/// Looks at every parameter: one is drawn when it is first looked at.
struct Look;

impl ModuleVisitor<Cuda> for Look {
    fn visit_float<const D: usize>(&mut self, param: &Param<T<D>>) {
        param.val();
    }
}

/// A module that draws its parameters from the backend, the same ones in every run.
pub(crate) fn drawn<M: Module<Cuda>>(device: &Device<Cuda>, make: impl FnOnce() -> M) -> M {
    // The backend's random state is global: seeding and drawing must not be interleaved.
    static RANDOM_STATE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    let state = RANDOM_STATE.lock();
    let _guard = state.unwrap_or_else(|lock| lock.into_inner());
    Cuda::seed(device, 7);
    let module = make();
    module.visit(&mut Look);
    module
}

/// Relative distances seen, and which were too large.
#[derive(Default)]
pub(super) struct Report(Vec<String>);

impl Report {
    pub(super) fn close<const D: usize>(
        &mut self,
        name: &str,
        got: T<D>,
        want: T<D>,
        tolerance: f64,
    ) {
        assert_eq!(got.dims(), want.dims(), "{name}");
        let (got, want) = (to_f32(got), to_f32(want));
        let norm = |x: T<D>| -> f64 {
            let sum = (x.clone() * x).sum().into_data();
            f64::from(sum.iter::<f32>().next().unwrap()).sqrt()
        };
        let reference = norm(want.clone());
        let distance = norm(got - want) / reference.max(1e-30);
        // A NaN is too far as well.
        let fine = distance <= tolerance;
        println!(
            "{} {name}: {distance:.2e}",
            if fine { "ok  " } else { "FAIL" }
        );
        if !fine {
            self.0
                .push(format!("{name}: {distance:.3e}, allowed {tolerance:.0e}"));
        }
    }

    pub(super) fn finish(self) {
        assert!(self.0.is_empty(), "{:#?}", self.0);
    }
}

/// The cases of a test; with `XRAY_CUDA_SMALL=1` only the first two, which a checker gets through.
pub(super) fn some<C>(mut cases: Vec<C>) -> Vec<C> {
    if std::env::var("XRAY_CUDA_SMALL").is_ok_and(|value| value == "1") {
        cases.truncate(2);
    }
    cases
}

const ONE_ROUNDING: f64 = 3e-3;
const SOME_ROUNDINGS: f64 = 6e-3;

fn tolerance(dtype: DType, bf16: f64) -> f64 {
    if dtype == DType::F32 { 1e-5 } else { bf16 }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn norms() {
    let device = device();
    let mut report = Report::default();
    for dtype in [DType::F32, DType::BF16] {
        for (rows, width) in some(vec![(1, 64), (3, 1152), (368, 4096), (5, 12_288), (7, 200)]) {
            let name = |what| format!("{what} {dtype:?} [{rows}, {width}]");
            let x = normal([rows, width], 1.0, dtype, &device);
            let weight = normal([width], 1.0, dtype, &device);
            let bias = normal([width], 1.0, dtype, &device);
            let dy = normal([rows, width], 1.0, dtype, &device);
            let residual = normal([rows, width], 1.0, dtype, &device);
            let (xf, wf) = (to_f32(x.clone()), to_f32(weight.clone()));
            report.close(
                &name("rms_norm"),
                Cuda::rms_norm(x.clone(), weight.clone(), 1e-6),
                plain::rms_norm(xf.clone(), wf.clone(), 1e-6),
                tolerance(dtype, SOME_ROUNDINGS),
            );
            report.close(
                &name("rms_norm_backward"),
                Cuda::rms_norm_backward(
                    x.clone(),
                    weight.clone(),
                    1e-6,
                    dy.clone(),
                    residual.clone(),
                ),
                to_f32(residual)
                    + plain::rms_norm_backward(xf.clone(), wf.clone(), 1e-6, to_f32(dy)),
                tolerance(dtype, ONE_ROUNDING),
            );
            report.close(
                &name("layer_norm"),
                Cuda::row_layer_norm(x, weight, bias.clone(), 1e-6),
                plain::layer_norm(xf, wf, to_f32(bias), 1e-6),
                tolerance(dtype, ONE_ROUNDING),
            );
        }
    }
    report.finish();
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn rotation() {
    let device = device();
    let mut report = Report::default();
    for dtype in [DType::F32, DType::BF16] {
        for (tokens, heads, head_dim) in some(vec![
            (1, 1, 16),
            (5, 3, 72),
            (368, 32, 128),
            (9, 2, 64),
            (3, 1, 6),
        ]) {
            // The queries of a fused projection: the token stride is three times as large.
            let fused = normal([tokens, 3 * heads, head_dim], 1.0, dtype, &device);
            let x = fused.clone().narrow(1, heads, heads);
            let angles = normal([tokens, head_dim / 2], 3.0, DType::F32, &device);
            let angles = Tensor::cat(vec![angles.clone(), angles], 1);
            let (cos, sin) = (angles.clone().cos(), angles.sin());
            let flat = fused.reshape([tokens, 3 * heads * head_dim]);
            let got = Cuda::split_and_rotate(flat.clone(), heads, cos.clone(), sin.clone());
            let want = plain::split_and_rotate(to_f32(flat), heads, cos.clone(), sin.clone());
            for (got, want) in got.into_iter().zip(want) {
                let name = format!("split_and_rotate {dtype:?} [{tokens}, {heads}, {head_dim}]");
                report.close(&name, got, want, tolerance(dtype, ONE_ROUNDING));
            }
            let dy = normal([tokens, heads, head_dim], 1.0, dtype, &device);
            let norm = HeadNorm {
                weight: normal([head_dim], 1.0, dtype, &device),
                epsilon: 1e-6,
            };
            let exact = HeadNorm {
                weight: to_f32(norm.weight.clone()),
                epsilon: 1e-6,
            };
            for (norm, exact) in [(None, None), (Some(norm), Some(exact))] {
                let name = |what: &str| {
                    format!(
                        "{what} {dtype:?} [{tokens}, {heads}, {head_dim}] norm {}",
                        norm.is_some()
                    )
                };
                report.close(
                    &name("rotate_heads"),
                    Cuda::rotate_heads(x.clone(), norm.clone(), cos.clone(), sin.clone()),
                    plain::rotate_heads(to_f32(x.clone()), exact.clone(), cos.clone(), sin.clone()),
                    tolerance(dtype, SOME_ROUNDINGS),
                );
                report.close(
                    &name("rotate_heads_backward"),
                    Cuda::rotate_heads_backward(
                        x.clone(),
                        norm,
                        cos.clone(),
                        sin.clone(),
                        dy.clone(),
                    ),
                    plain::rotate_heads_backward(
                        to_f32(x.clone()),
                        exact,
                        cos.clone(),
                        sin.clone(),
                        to_f32(dy.clone()),
                    ),
                    tolerance(dtype, ONE_ROUNDING),
                );
            }
        }
    }
    report.finish();
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn pointwise() {
    let device = device();
    let mut report = Report::default();
    for dtype in [DType::F32, DType::BF16] {
        for (rows, width) in some(vec![(1, 8), (3, 4304), (368, 12_288)]) {
            let name = |what| format!("{what} {dtype:?} [{rows}, {width}]");
            let [gate, up, dy] =
                [3.0, 1.0, 1.0].map(|std| normal([rows, width], std, dtype, &device));
            let [gf, uf, df] = [&gate, &up, &dy].map(|x| to_f32(x.clone()));
            let close = tolerance(dtype, ONE_ROUNDING);
            report.close(
                &name("swiglu"),
                Cuda::swiglu(gate.clone(), up.clone()),
                plain::swiglu(gf.clone(), uf.clone()),
                close,
            );
            let got = Cuda::swiglu_backward(gate.clone(), up, dy);
            let want = plain::swiglu_backward(gf.clone(), uf, df);
            for (got, want) in got.into_iter().zip(want) {
                report.close(&name("swiglu_backward"), got, want, close);
            }
            report.close(
                &name("gelu_tanh"),
                Cuda::gelu_tanh(gate.clone()),
                gelu_tanh(gf.clone()),
                close,
            );
            report.close(
                &name("gelu_exact"),
                Cuda::gelu_exact(gate),
                gelu_exact(gf),
                close,
            );
        }
    }
    report.finish();
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn attention() {
    let device = device();
    let mut report = Report::default();
    let packed = |lengths: &[usize]| -> Vec<i32> {
        lengths
            .iter()
            .enumerate()
            .flat_map(|(index, length)| std::iter::repeat_n(index as i32, *length))
            .collect()
    };
    let padded =
        |before: usize, tokens: usize| -> Vec<i32> { [vec![-1; before], vec![0; tokens]].concat() };
    let causal = |segments: &[Vec<i32>], first| AttentionSpans::causal(segments, first, &device);
    let cases = vec![
        ("causal", 1, 1, 16, causal(&[vec![0; 5]], 0)),
        (
            "padded",
            4,
            2,
            64,
            causal(&[padded(3, 61), padded(0, 64)], 0),
        ),
        (
            "packed",
            32,
            8,
            128,
            causal(&[packed(&[368, 70, 1, 129])], 0),
        ),
        ("after a cache", 8, 8, 32, causal(&[vec![0; 200]], 150)),
        (
            "images",
            16,
            16,
            72,
            AttentionSpans::blocks(&[256, 64, 132], &device),
        ),
        (
            "one image",
            16,
            16,
            72,
            AttentionSpans::blocks(&[1024], &device),
        ),
    ];
    for (case, heads, kv_heads, head_dim, spans) in some(cases) {
        let [batch, queries, keys] = spans.dims();
        let draw = |heads: usize, rows: usize| -> T<4> {
            normal([batch, rows, heads, head_dim], 1.0, DType::BF16, &device).swap_dims(1, 2)
        };
        let (q, k, v) = (
            draw(heads, queries),
            draw(kv_heads, keys),
            draw(kv_heads, keys),
        );
        let dy = draw(heads, queries);
        let exact = |x: &T<4>| to_f32(x.clone());
        // Rows that see nothing are zero here and anything finite in the default.
        let [first, end] = spans.ranges().clone();
        let sees = end
            .greater(first)
            .float()
            .cast(burn::tensor::FloatDType::F32);
        let sees = sees.reshape([batch, 1, queries, 1]);
        let (y, statistics) =
            Cuda::span_attention_for_backward(q.clone(), k.clone(), v.clone(), &spans);
        let want = plain::attention(exact(&q), exact(&k), exact(&v), &spans);
        report.close(
            &format!("attention {case}"),
            to_f32(y.clone()) * sees.clone(),
            want * sees.clone(),
            ONE_ROUNDING,
        );
        let dy = to_dtype(to_f32(dy) * sees, DType::BF16);
        let got = Cuda::span_attention_backward(
            q.clone(),
            k.clone(),
            v.clone(),
            y,
            statistics,
            dy.clone(),
            &spans,
        );
        let want = plain::attention_backward(exact(&q), exact(&k), exact(&v), exact(&dy), &spans);
        for (what, (got, want)) in ["dq", "dk", "dv"]
            .into_iter()
            .zip(got.into_iter().zip(want))
        {
            report.close(
                &format!("attention {case} {what}"),
                got,
                want,
                SOME_ROUNDINGS,
            );
        }
    }
    report.finish();
}

/// More tensors than a launch takes, of lengths that no vector divides.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn optimizer() {
    let device = device();
    let mut report = Report::default();
    let counts = some(
        (0..70)
            .map(|index| [1, 77, 512, 98_304, 4099][index % 5] + index / 5)
            .collect(),
    );
    let tensors: Vec<AdamWTensor<Cuda>> = (counts.iter().enumerate())
        .map(|(index, count)| {
            let [value, gradient, first] =
                [1.0, 0.1, 0.1].map(|std| normal([*count], std, DType::F32, &device));
            AdamWTensor {
                value,
                second: gradient.clone() * gradient.clone() * 0.3,
                gradient,
                first,
                step: AdamWStep {
                    beta1: 0.9,
                    beta2: 0.95,
                    epsilon: 1e-8,
                    step_size: 0.01 + index as f64 * 1e-4,
                    second_scale: 1.7,
                    keep: 0.999 - index as f64 * 1e-4,
                },
            }
        })
        .collect();
    let gradients: Vec<T<1>> = tensors.iter().map(|one| one.gradient.clone()).collect();
    for max_norm in [0.0, 1.0, 1e6] {
        let clip = Cuda::clip_scale(gradients.clone(), max_norm);
        let want = plain::clip_scale(gradients.clone(), max_norm);
        report.close(&format!("clip_scale {max_norm}"), clip, want.clone(), 1e-5);
        let got = Cuda::adamw(tensors.clone(), Some(want.clone()));
        let want = plain::adamw(tensors.clone(), Some(want));
        for ((got, want), count) in got.into_iter().zip(want).zip(&counts) {
            for (what, (got, want)) in ["value", "mean", "mean square"]
                .into_iter()
                .zip(got.into_iter().zip(want))
            {
                report.close(
                    &format!("adamw {what} of {count}, {max_norm}"),
                    got,
                    want,
                    1e-5,
                );
            }
        }
    }
    // Results are views of one buffer: they go into the next step, and to the host, as any tensor.
    let mut again = tensors.clone();
    for (one, [value, first, second]) in again.iter_mut().zip(Cuda::adamw(tensors.clone(), None)) {
        (one.value, one.first, one.second) = (value, first, second);
    }
    let got = Cuda::adamw(again, None);
    let mut again = tensors.clone();
    for (one, [value, first, second]) in again.iter_mut().zip(plain::adamw(tensors, None)) {
        (one.value, one.first, one.second) = (value, first, second);
    }
    let want = plain::adamw(again, None);
    for (got, want) in got.into_iter().zip(want).take(6) {
        let read = Cuda::read_async(got[0].clone());
        let host: Vec<f32> = got[0].to_data().iter().collect();
        assert_eq!(read(), host);
        report.close("second step", got[0].clone(), want[0].clone(), 1e-5);
    }
    report.finish();
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn loss() {
    let device = device();
    let mut report = Report::default();
    for (rows, width, vocab) in some(vec![(1, 64, 304), (92, 256, 4096), (300, 128, 151_936)]) {
        let hidden = normal([rows, width], 1.0, DType::BF16, &device);
        let head = normal([vocab, width], 0.05, DType::BF16, &device);
        let ids: Vec<i32> = (0..rows as i32)
            .map(|row| row * 37 % vocab as i32)
            .collect();
        let ids = Tensor::<Cuda, 1, Int>::from_ints(ids.as_slice(), &device);
        let got = Cuda::target_loss(hidden.clone(), head.clone(), ids.clone(), 0.01);
        let want = plain::target_loss(to_f32(hidden), to_f32(head), ids, 0.01);
        let name = |what| format!("{what} {rows} x {width} x {vocab}");
        report.close(&name("loss"), got.sums, want.sums, 1e-4);
        report.close(
            &name("gradient of hidden states"),
            got.hidden_gradient,
            want.hidden_gradient,
            SOME_ROUNDINGS,
        );
    }
    report.finish();
}

//! Every fast operation against the default it replaces, over odd shapes, in f32 and bf16.
//!
//! The reference is the default on the same inputs cast to f32. Tolerances are relative distances
//! (norm of the difference over norm of the reference): a bf16 result is rounded once, 2⁻⁹ at most
//! and 0.0017 on average; operations that round between their steps get twice that; f32 sums in
//! another order differ by some 1e-6.

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

/// `a b` on the host, in f64.
fn host_matmul(a: &T<3>, b: &T<3>) -> T<3> {
    let ([batches, m, k], [_, _, n]) = (a.dims(), b.dims());
    let values = |x: &T<3>| -> Vec<f64> {
        let data = x.clone().into_data();
        data.iter::<f32>().map(f64::from).collect()
    };
    let (left, right) = (values(a), values(b));
    let mut y = Vec::with_capacity(batches * m * n);
    for batch in 0..batches {
        for row in 0..m {
            for column in 0..n {
                let terms = (0..k).map(|at| {
                    left[(batch * m + row) * k + at] * right[(batch * k + at) * n + column]
                });
                y.push(terms.sum::<f64>() as f32);
            }
        }
    }
    let data = burn::tensor::TensorData::new(y, [batches, m, n]);
    Tensor::from_data(data, (&a.device(), DType::F32))
}

/// f32 is multiplied in f32, forward and backward; TF32 would be some 3e-4 away.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn products_of_f32() {
    use burn::backend::Autodiff;
    let device = device();
    let mut report = Report::default();
    for (batches, m, k, n) in some(vec![
        (1, 1, 5, 3),
        (2, 65, 33, 70),
        (3, 130, 200, 64),
        (1, 7, 4096, 129),
    ]) {
        let name = |what| format!("{what} {batches} x {m} x {k} x {n}");
        let a = normal([batches, m, k], 1.0, DType::F32, &device);
        let b = normal([batches, k, n], 1.0, DType::F32, &device);
        let dy = normal([batches, m, n], 1.0, DType::F32, &device);
        let want = host_matmul(&a, &b);
        report.close(
            &name("matmul"),
            Cuda::matmul(a.clone(), b.clone()),
            want.clone(),
            2e-6,
        );
        // The same operands, strided as transposed views are.
        let transposed = |x: &T<3>| launch_contiguous(x.clone().swap_dims(1, 2)).swap_dims(1, 2);
        report.close(
            &name("matmul of views"),
            Cuda::matmul(transposed(&a), transposed(&b)),
            want,
            2e-6,
        );
        let [left, right] =
            [&a, &b].map(|x| Tensor::<Autodiff<Cuda>, 3>::from_inner(x.clone()).require_grad());
        let y = Autodiff::<Cuda>::matmul(left.clone(), right.clone());
        let gradients = (y * Tensor::from_inner(dy.clone())).sum().backward();
        report.close(
            &name("gradient of the left"),
            left.grad(&gradients).expect("it requires a gradient"),
            host_matmul(&dy, &b.swap_dims(1, 2)),
            2e-6,
        );
        report.close(
            &name("gradient of the right"),
            right.grad(&gradients).expect("it requires a gradient"),
            host_matmul(&a.swap_dims(1, 2), &dy),
            2e-6,
        );
    }
    report.finish();
}

fn launch_contiguous<const D: usize>(x: T<D>) -> T<D> {
    super::launch::tensor(super::launch::contiguous(x))
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn products() {
    let device = device();
    let mut report = Report::default();
    let shapes = vec![
        (1, 64, 64),
        (7, 72, 136),
        (129, 1152, 4304),
        (368, 4096, 1024),
        (300, 4304, 1152),
        (640, 4096, 4096),
    ];
    for (rows, inner, out) in some(shapes) {
        let name = |what| format!("{what} {rows} x {inner} x {out}");
        let x = normal([rows, inner], 1.0, DType::BF16, &device);
        let weight = normal([out, inner], 0.02, DType::BF16, &device);
        let bias = normal([out], 1.0, DType::BF16, &device);
        let residual = normal([rows, out], 1.0, DType::BF16, &device);
        let (xf, wf) = (to_f32(x.clone()), to_f32(weight.clone()));
        for (bias, residual) in [
            (None, None),
            (Some(bias.clone()), None),
            (Some(bias.clone()), Some(residual.clone())),
        ] {
            report.close(
                &name("linear"),
                Cuda::linear_add(x.clone(), weight.clone(), bias.clone(), residual.clone()),
                plain::linear(
                    xf.clone(),
                    wf.clone(),
                    bias.map(to_f32),
                    residual.map(to_f32),
                ),
                ONE_ROUNDING,
            );
        }
        for activation in [Activation::GeluTanh, Activation::GeluExact] {
            let bias = Some(bias.clone());
            let want = plain::linear(xf.clone(), wf.clone(), bias.clone().map(to_f32), None);
            let want = match activation {
                Activation::GeluTanh => gelu_tanh(want),
                Activation::GeluExact => gelu_exact(want),
            };
            report.close(
                &name("linear_activated"),
                Cuda::linear_activated(x.clone(), weight.clone(), bias, activation),
                want,
                ONE_ROUNDING,
            );
        }
        report.close(
            &name("logits"),
            Cuda::logits(x.clone(), weight.clone()),
            xf.matmul(wf.clone().transpose()),
            1e-4,
        );
        let dy = normal([rows, out], 1.0, DType::BF16, &device);
        let more = normal([rows, 64], 1.0, DType::BF16, &device);
        let other = normal([64, inner], 0.1, DType::BF16, &device);
        let matmul = |dy: &T<2>, weight: &T<2>| BackwardMatmul {
            dy: dy.clone(),
            weight: weight.clone().into(),
            adapter: None,
        };
        let want =
            to_f32(dy.clone()).matmul(wf) + to_f32(more.clone()).matmul(to_f32(other.clone()));
        report.close(
            &name("input_gradient"),
            Cuda::input_gradient(&[matmul(&dy, &weight), matmul(&more, &other)]),
            want,
            SOME_ROUNDINGS,
        );
    }
    report.finish();
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn dropout_masks_are_the_host_s_bit_for_bit() {
    let device = device();
    for (rows, width, probability) in [(1, 1, 0.5), (5, 7, 0.25), (400, 4096, 0.05)] {
        let dropout = Dropout {
            probability,
            seed: 0x0123_4567_89ab_cdef,
        };
        let like = normal([rows, width], 1.0, DType::F32, &device);
        let mask = Cuda::dropout_mask(&like, dropout).into_data();
        let wanted = dropout.mask(rows * width);
        assert_eq!(mask.to_vec::<f32>().unwrap(), wanted, "{rows} x {width}");
    }
}

/// Adapters over one input, alone and several together, of which a launch may serve some.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn adapters() {
    let device = device();
    let mut report = Report::default();
    for (rows, inner, outs, rank) in some(vec![
        (1, 64, vec![96], 8),
        (33, 1152, vec![128, 32], 16),
        (400, 4096, vec![1024, 256, 256], 8),
        (1000, 256, vec![4096], 32),
        (65, 96, vec![160, 64], 24),
        (130, 512, vec![64, 64, 64], 64),
    ]) {
        for dropout in [None, Some(0.25)] {
            let name =
                |what: &str| format!("{what} {rows} x {inner} x {outs:?} r {rank} {dropout:?}");
            let x = normal([rows, inner], 1.0, DType::BF16, &device);
            let xf = to_f32(x.clone());
            let weights: Vec<T<2>> = (outs.iter())
                .map(|out| normal([*out, inner], 0.02, DType::BF16, &device))
                .collect();
            let adapters: Vec<LowRank<Cuda>> = (outs.iter().enumerate())
                .map(|(index, out)| LowRank {
                    a: normal([rank, inner], 0.05, DType::F32, &device),
                    b: normal([*out, rank], 0.1, DType::F32, &device),
                    scaling: 4.0,
                    dropout: dropout.map(|probability| Dropout {
                        probability,
                        seed: 11 + index as u64,
                    }),
                })
                .collect();
            // The adapters' factors are rounded to bf16 for the tensor cores.
            let close = 1e-2;
            let shared: Vec<_> = adapters.iter().collect();
            let lows = Cuda::low_rank_inputs(x.clone(), &shared);
            let (mut backwards, mut exact) = (Vec::new(), Vec::new());
            for ((adapter, weight), low) in adapters.iter().zip(&weights).zip(lows) {
                let want_low = plain::low_rank_input(xf.clone(), adapter);
                report.close(&name("low"), low.clone(), want_low.clone(), close);
                let [out, _] = weight.dims();
                let residual = normal([rows, out], 1.0, DType::BF16, &device);
                report.close(
                    &name("adapted_linear"),
                    Cuda::adapted_linear(
                        x.clone(),
                        weight.clone(),
                        low.clone(),
                        adapter,
                        Some(residual.clone()),
                    ),
                    plain::adapted_linear(
                        xf.clone(),
                        to_f32(weight.clone()),
                        want_low.clone(),
                        adapter,
                        Some(to_f32(residual)),
                    ),
                    close,
                );
                let dy = normal([rows, out], 1.0, DType::BF16, &device);
                let backward = |low, dy| LowRankBackward {
                    low,
                    dy,
                    adapter: adapter.clone(),
                };
                exact.push(backward(want_low, to_f32(dy.clone())));
                backwards.push(backward(low, dy));
            }
            let got = Cuda::low_rank_backward(x, &backwards);
            let (mut matmuls, mut exact_matmuls) = (Vec::new(), Vec::new());
            for (index, got) in got.into_iter().enumerate() {
                let want = plain::low_rank_backward(xf.clone(), &exact[index]);
                report.close(&name("gradient of A"), got.a, want.a, close);
                report.close(&name("gradient of B"), got.b, want.b, close);
                let low = &name("gradient of low");
                report.close(low, got.low.clone(), want.low.clone(), close);
                let matmul = |dy, weight: T<2>, low| BackwardMatmul {
                    dy,
                    weight: weight.into(),
                    adapter: Some((low, adapters[index].clone())),
                };
                let weight = weights[index].clone();
                matmuls.push(matmul(backwards[index].dy.clone(), weight.clone(), got.low));
                let dy = exact[index].dy.clone();
                exact_matmuls.push(matmul(dy, to_f32(weight), want.low));
            }
            report.close(
                &name("input_gradient"),
                Cuda::input_gradient(&matmuls),
                plain::input_gradient(&exact_matmuls),
                close,
            );
            let [gate, up] = [2.0, 1.0].map(|std| normal([rows, inner], std, DType::BF16, &device));
            let got = Cuda::swiglu_input_gradient(matmuls.remove(0), gate.clone(), up.clone());
            let want = plain::swiglu_backward(
                to_f32(gate),
                to_f32(up),
                plain::input_gradient(&exact_matmuls[..1]),
            );
            for (got, want) in got.into_iter().zip(want) {
                report.close(&name("swiglu_input_gradient"), got, want, close);
            }
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

/// The captured step against the same step in single operations, over several tokens and batches.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn decoding() {
    let device = device();
    let config = RandomSize::Tiny.config(None).unwrap();
    let options = InitOptions {
        dtype: DType::BF16,
        // Large enough that logits differ.
        initializer_range: 0.1,
    };
    let model = drawn(&device, || Qwen3Vl::<Cuda>::new(&config, &options, &device));
    for format in [CacheFormat::Float, CacheFormat::Int8] {
        decoding_beside_eager(&config, [&model, &model], vec![1, 2, 9], format);
    }
}

/// A quantised model in fragment order, and the same one row by row.
pub(super) fn quantised_pair(
    config: &Qwen3VlConfig,
    format: &str,
    device: &Device<Cuda>,
) -> [Qwen3Vl<Cuda>; 2] {
    struct ByRows;
    impl LinearMapper<Cuda> for ByRows {
        fn map_linear(&mut self, _path: &str, linear: Linear<Cuda>) -> Linear<Cuda> {
            Linear {
                weight: linear.weight.map_packed(|packed| packed.by_rows()),
                ..linear
            }
        }
    }
    let quantization = Some(format.parse().unwrap());
    let ours = draw::<Cuda>(config, 5, DType::BF16, quantization, device);
    let mut plain = ours.clone().map_linears(&mut ByRows);
    let table = &mut plain.model.language_model.embed_tokens;
    table.weight = table.weight.clone().map_packed(|packed| packed.by_rows());
    assert!(super::decode::is_arranged(&ours) && !super::decode::is_arranged(&plain));
    [ours, plain]
}

/// The captured step over quantised weights, the table tied to the head and not, an adapter beside them and none.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn decoding_with_quantised_weights() {
    let device = device();
    for (format, tied) in [("int8", true), ("int4", false), ("int4:32", true)] {
        let mut config = RandomSize::Tiny.config(None).unwrap();
        config.tie_word_embeddings = tied;
        let [ours, plain] = quantised_pair(&config, format, &device);
        decoding_beside_eager(
            &config,
            [&ours, &plain],
            vec![1, 2, 9, 20, 40],
            CacheFormat::Float,
        );
        let lora = LoraConfig::default();
        let adapted = [ours, plain].map(|model| attach(model, &lora, 3).unwrap().0);
        let [ours, plain] = adapted.map(|model| {
            crate::accelerate::draws::begin();
            model.map_linears(&mut super::decode::tests::FillB)
        });
        decoding_beside_eager(&config, [&ours, &plain], vec![1, 20], CacheFormat::Int8);
    }
}

/// `ours` decodes in the captured step, `plain` in single operations: the same model, perhaps in another order.
fn decoding_beside_eager(
    config: &Qwen3VlConfig,
    [ours, plain]: [&Qwen3Vl<Cuda>; 2],
    batches: Vec<usize>,
    format: CacheFormat,
) {
    let device = device();
    let mut report = Report::default();
    let vocab = config.text_config.vocab_size as u32;
    for rows in some(batches) {
        let prompts: Vec<Vec<u32>> = (0..rows as u32)
            .map(|row| {
                (0..20 + 7 * row)
                    // Below the placeholders of images.
                    .map(|at| (at * 37 + row * 11) % (vocab - 24))
                    .collect()
            })
            .collect();
        let grids = vec![vec![]; rows];
        let (input, deltas) =
            TextInput::padded(&prompts, &grids, config, Padding::Left, 0).unwrap();
        let layers = config.text_config.num_hidden_layers;
        let mut cache = KeyValueCache::with_format(layers, input.seq() + 32, format);
        ours.hidden_states(&input, None, config, Some(&mut cache), None, &device);
        // Two caches of the same prompt: one for each way.
        let mut plain_cache = KeyValueCache::with_format(layers, input.seq() + 32, format);
        plain.hidden_states(&input, None, config, Some(&mut plain_cache), None, &device);
        let mut tokens: Vec<u32> = (0..rows as u32).map(|row| 5 + row).collect();
        let start = DecodeStart {
            tokens: tokens.clone(),
            positions: prompts
                .iter()
                .zip(&deltas)
                .map(|(prompt, delta)| prompt.len() as i64 + delta)
                .collect(),
            most_steps: 8,
            sampling: SamplingConfig::default(),
            draws: Vec::new(),
            seen: Vec::new(),
        };
        let mut decoder = Cuda::decoder(ours, config, &cache, &start).expect("covered");
        for step in 0..4 {
            let got = decoder.next_logits(&tokens).unwrap();
            let mut text = TextInput {
                input_ids: tokens.iter().map(|token| vec![*token]).collect(),
                segments: vec![vec![0]; rows],
                positions: Default::default(),
                image_token_id: config.image_token_id,
            };
            for position in &start.positions {
                text.positions.push([position + step; 3]);
            }
            let hidden =
                plain.hidden_states(&text, None, config, Some(&mut plain_cache), None, &device);
            let want = plain.logits(hidden);
            let shape = [rows, vocab as usize];
            let data = burn::tensor::TensorData::new(got.concat(), shape);
            let got = T::<2>::from_data(data, (&device, DType::F32));
            // bf16 activations, rounded at other places, through four layers.
            report.close(
                &format!("logits of step {step}, {rows} rows"),
                got,
                want.clone(),
                3e-2,
            );
            let next: Vec<i32> = want.argmax(1).into_data().iter::<i32>().collect();
            tokens = next.into_iter().map(|token| token as u32).collect();
        }
        let logits = decoder.next_logits(&tokens).unwrap();
        let likeliest: Vec<Option<u32>> = logits
            .iter()
            .map(|row| {
                (0..row.len())
                    .max_by(|a, b| row[*a].total_cmp(&row[*b]).then(b.cmp(a)))
                    .map(|token| token as u32)
            })
            .collect();
        // The step that gave these logits has picked its tokens; the next one starts from them.
        let again = decoder.next_tokens().unwrap();
        assert_eq!(again.len(), rows);
        // From the keys and values that the step wrote: those of single operations round elsewhere, and neighbours
        // among the likeliest would change places.
        let written = KeyValueCache {
            segments: plain_cache.segments.clone(),
            ..cache.clone()
        };
        let mut own = Cuda::decoder(
            ours,
            config,
            &written,
            &DecodeStart {
                tokens: tokens.clone(),
                positions: start
                    .positions
                    .iter()
                    .map(|position| position + 4)
                    .collect(),
                most_steps: 4,
                ..start.clone()
            },
        )
        .expect("covered");
        assert_eq!(own.next_tokens().unwrap(), likeliest, "{rows} rows");
        assert_eq!(own.next_tokens().unwrap(), again, "{rows} rows");

        // Drawn with the host's numbers: what the host would choose from the same logits.
        let sampling = SamplingConfig {
            temperature: 1.3,
            top_k: 40,
            top_p: 0.9,
            repetition_penalty: 1.2,
            ..SamplingConfig::default()
        };
        let samplers: Vec<Sampler> = (0..rows as u64)
            .map(|seed| {
                let sampling = sampling.clone();
                Sampler::new(&SamplingConfig { seed, ..sampling }, &[])
            })
            .collect();
        let drawn = DecodeStart {
            tokens: (0..rows as u32).map(|row| 5 + row).collect(),
            draws: samplers.into_iter().map(|one| one.draws(8)).collect(),
            seen: (prompts.iter().zip(0u32..))
                .map(|(prompt, row)| [prompt, &[5 + row][..]].concat())
                .collect(),
            sampling,
            ..start.clone()
        };
        let mut device_draws = Cuda::decoder(ours, config, &cache, &drawn).expect("covered");
        let mut logits_of = Cuda::decoder(ours, config, &cache, &drawn).expect("covered");
        let mut tokens = drawn.tokens.clone();
        let mut seen = drawn.seen.clone();
        for step in 0..5 {
            let chosen = device_draws.next_tokens().unwrap();
            let logits = logits_of.next_logits(&tokens).unwrap();
            for row in 0..rows {
                let choice = TokenChoice::new(&drawn.sampling, drawn.draws[row][step]);
                let before: HashSet<u32> = seen[row].iter().copied().collect();
                let want = choice.token(&logits[row], &before);
                assert_eq!(chosen[row], Some(want), "row {row} of {rows}, step {step}");
                seen[row].push(want);
                tokens[row] = want;
            }
        }
    }
    report.finish();
}

/// The vision tower replayed as a graph gives the launched tower's bits, whatever the image.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn vision_tower_as_a_graph() {
    let device = device();
    let config = RandomSize::B8.config(Some(4)).unwrap();
    let options = InitOptions {
        dtype: DType::BF16,
        ..InitOptions::default()
    };
    let model = drawn(&device, || Qwen3Vl::<Cuda>::new(&config, &options, &device));
    let vision = &config.vision_config;
    let bits = |x: &T<2>| x.clone().into_data().bytes.to_vec();
    for (call, [height, width]) in [[8, 12], [8, 12], [8, 12], [4, 6], [8, 12], [4, 6], [4, 6]]
        .into_iter()
        .enumerate()
    {
        let count = height * width * vision.patch_dim();
        let images = ImageInput {
            pixel_values: (0..count)
                .map(|at| ((at * 31 + call * 17) % 255) as f32 / 128.0 - 1.0)
                .collect(),
            image_grid_thw: vec![[1, height, width]],
        };
        let got = encode_images(&model, &images, &config, &device);
        Cuda::wait_for_background(&model);
        let layout = VisionLayout::new(&images.image_grid_thw, vision, &device);
        let pixels = pixel_tensor(&images, vision.patch_dim(), DType::BF16, &device);
        let want = model.model.visual.forward(pixels, &layout, None);
        assert_eq!(bits(&got.merged), bits(&want.merged), "call {call}");
        for (got, want) in got.deepstack.iter().zip(&want.deepstack) {
            assert_eq!(bits(got), bits(want), "call {call}");
        }
    }
    for grid in [[1, 8, 12], [1, 4, 6]] {
        let tower = &model.model.visual;
        assert!(super::vision::is_replayed(tower, &[grid]), "{grid:?}");
    }
}

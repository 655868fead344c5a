//! Every kernel against the default it replaces, over odd shapes, in f32 and, where the adapter has it,
//! f16.
//!
//! The reference is the default on the same inputs cast to f32. Tolerances are relative distances
//! (norm of the difference over norm of the reference): an f16 result is rounded once, 2⁻¹² on average;
//! f32 sums in another order differ by some 1e-6, and a software device's root and exponential by some
//! 1e-5.

use burn::{
    prelude::*,
    tensor::{
        DType,
        backend::{Backend as _, BackendTypes},
    },
};

use super::{
    super::wgpu_setup::wgpu_setup,
    decode,
    matvec::{self, InputNorm},
    recorded,
    rotary::{self, HeadNorms, Place},
    vulkan::{Backend, contiguous, strided, tensor},
};
use crate::{
    accelerate::draws,
    batch::text::{Padding, TextInput},
    ops::{
        AttentionSpans, Dropout, ForwardOps, HeadNorm, LowRank,
        cast::{to_dtype, to_f32},
        plain,
        plain::{gelu_exact, gelu_tanh},
        quantised::cache::CacheFormat,
    },
    qwen3_vl::{config::Qwen3VlConfig, key_values::KeyValueCache},
    runtime::{
        accelerator::{DecodeStart, Decoder},
        generate::SamplingConfig,
        synthetic::weights::{RandomSize, draw},
    },
};

type T<const D: usize> = Tensor<Backend, D>;
type Device = <Backend as BackendTypes>::Device;

/// The device, opened as `--device wgpu` opens it.
pub(super) fn device() -> Device {
    draws::begin();
    let device = Device::default();
    wgpu_setup(&device).expect("the first use of the device in this process");
    device
}

/// Types of the device that are compared.
fn dtypes(device: &Device) -> Vec<DType> {
    let all = [DType::F32, DType::F16];
    all.into_iter()
        .filter(|dtype| Backend::supports_dtype(device, *dtype))
        .collect()
}

fn normal<const D: usize>(shape: [usize; D], std: f64, dtype: DType, device: &Device) -> T<D> {
    draws::normal(shape, std, dtype, device)
}

/// Relative distances seen, and which were too large.
#[derive(Default)]
struct Report(Vec<String>);

impl Report {
    fn close<const D: usize>(&mut self, name: &str, got: T<D>, want: T<D>, dtype: DType) {
        assert_eq!(got.dims(), want.dims(), "{name}");
        let values = |x: T<D>| -> Vec<f64> {
            let data = to_f32(x).into_data();
            data.iter::<f32>().map(f64::from).collect()
        };
        let (got, want) = (values(got), values(want));
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let reference = norm(&mut want.iter().copied());
        let distance = norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / reference.max(1e-30);
        let allowed = if dtype == DType::F32 { 2e-5 } else { 1e-3 };
        // A NaN is too far as well.
        let fine = distance <= allowed;
        let mark = if fine { "ok  " } else { "FAIL" };
        println!("{mark} {name} {dtype:?}: {distance:.2e}");
        if !fine {
            self.0.push(format!(
                "{name} {dtype:?}: {distance:.3e}, allowed {allowed:.0e}"
            ));
        }
    }

    fn finish(self) {
        assert!(self.0.is_empty(), "{:#?}", self.0);
    }
}

#[test]
#[ignore = "needs a Vulkan device"]
fn matmuls_of_few_rows() {
    let device = device();
    let mut report = Report::default();
    for dtype in dtypes(&device) {
        for (rows, inner, out) in [
            (1, 8, 1),
            (1, 64, 64),
            (2, 200, 37),
            (3, 1152, 130),
            (8, 4304, 33),
            (5, 2304, 96),
        ] {
            let name = |what: &str| format!("{what} {rows} x {inner} x {out}");
            let x = normal([rows, inner], 1.0, dtype, &device);
            let weight = normal([out, inner], 0.05, dtype, &device);
            let bias = normal([out], 1.0, dtype, &device);
            let residual = normal([rows, out], 1.0, dtype, &device);
            let scale = normal([inner], 1.0, dtype, &device);
            let (xf, wf) = (to_f32(x.clone()), to_f32(weight.clone()));
            for (bias, residual) in [
                (None, None),
                (Some(bias.clone()), None),
                (Some(bias.clone()), Some(residual.clone())),
            ] {
                report.close(
                    &name("linear"),
                    Backend::linear_add(x.clone(), weight.clone(), bias.clone(), residual.clone()),
                    plain::linear(
                        xf.clone(),
                        wf.clone(),
                        bias.map(to_f32),
                        residual.map(to_f32),
                    ),
                    dtype,
                );
            }
            // Logits are f32 whatever the weights are, and only summed in another order.
            report.close(
                &name("logits"),
                Backend::logits(x.clone(), weight.clone()),
                xf.clone().matmul(wf.clone().transpose()),
                DType::F32,
            );
            let norm = InputNorm {
                weight: contiguous(scale.clone()),
                epsilon: 1e-6,
            };
            let normed = plain::rms_norm(xf, to_f32(scale), 1e-6);
            let (x, matrix) = (contiguous(x), contiguous(weight));
            let got = matvec::matmul(&x, Some(&norm), &matrix, None, None, dtype);
            let want = normed.clone().matmul(wf.clone().transpose());
            report.close(
                &name("norm and matmul"),
                tensor::<2>(got),
                want.clone(),
                dtype,
            );
            let got = matvec::swiglu_matmul(&x, &norm, &matrix, &matrix);
            let want = plain::swiglu(want.clone(), want);
            report.close(&name("swiglu matmul"), tensor::<2>(got), want, dtype);
        }
        adapters(dtype, &device, &mut report);
        let weights = [12, 4, 8].map(|out| normal([out, 72], 0.1, dtype, &device));
        let (x, scale) = (
            normal([2, 72], 1.0, dtype, &device),
            normal([72], 1.0, dtype, &device),
        );
        let normed = plain::rms_norm(to_f32(x.clone()), to_f32(scale.clone()), 1e-6);
        let parts = weights
            .clone()
            .map(|w| normed.clone().matmul(to_f32(w).transpose()));
        let norm = InputNorm {
            weight: contiguous(scale),
            epsilon: 1e-6,
        };
        let matrices = weights.map(contiguous);
        let got = matvec::three_matmuls(&contiguous(x), &norm, matrices.each_ref());
        let want = Tensor::cat(parts.to_vec(), 1);
        report.close("three matmuls", tensor::<2>(got), want, dtype);
    }
    report.finish();
}

fn adapters(dtype: DType, device: &Device, report: &mut Report) {
    for (rows, inner, out, rank) in [(1, 64, 96, 8), (3, 200, 37, 4), (2, 72, 24, 6)] {
        let x = normal([rows, inner], 1.0, dtype, device);
        let weight = normal([out, inner], 0.05, dtype, device);
        let residual = normal([rows, out], 1.0, dtype, device);
        let adapter = LowRank {
            a: normal([rank, inner], 0.1, DType::F32, device),
            b: normal([out, rank], 0.1, DType::F32, device),
            scaling: 4.0,
            dropout: None,
        };
        let wide = [&x, &weight, &residual].map(|x| to_f32(x.clone()));
        let [xf, wf, rf] = wide;
        let low = Backend::low_rank_inputs(x.clone(), &[&adapter]).remove(0);
        let low_wanted = plain::low_rank_input(xf.clone(), &adapter);
        let name = format!("adapted_linear {rows} x {inner} x {out} r {rank}");
        report.close(
            &format!("{name}, low"),
            low.clone(),
            low_wanted.clone(),
            DType::F32,
        );
        let got = Backend::adapted_linear(x, weight, low, &adapter, Some(residual));
        let want = plain::adapted_linear(xf, wf, low_wanted, &adapter, Some(rf));
        report.close(&name, got, want, dtype);
    }
}

#[test]
#[ignore = "needs a Vulkan device"]
fn dropout_masks_are_the_host_s_bit_for_bit() {
    let device = device();
    for (rows, width, probability) in [(1, 1, 0.5), (5, 7, 0.25), (400, 130, 0.05)] {
        let dropout = Dropout {
            probability,
            seed: 0x0123_4567_89ab_cdef,
        };
        let like = normal([rows, width], 1.0, DType::F32, &device);
        let mask = Backend::dropout_mask(&like, dropout).into_data();
        let wanted = dropout.mask(rows * width);
        assert_eq!(mask.to_vec::<f32>().unwrap(), wanted, "{rows} x {width}");
    }
}

#[test]
#[ignore = "needs a Vulkan device"]
fn norms() {
    let device = device();
    let mut report = Report::default();
    for dtype in dtypes(&device) {
        for (rows, width) in [(1, 64), (3, 1152), (130, 72), (5, 4096), (7, 200)] {
            let name = |what: &str| format!("{what} [{rows}, {width}]");
            let x = normal([rows, width], 2.0, dtype, &device) + 3.0;
            let weight = normal([width], 1.0, dtype, &device);
            let bias = normal([width], 1.0, dtype, &device);
            let (xf, wf) = (to_f32(x.clone()), to_f32(weight.clone()));
            report.close(
                &name("rms_norm"),
                Backend::rms_norm(x.clone(), weight.clone(), 1e-6),
                plain::rms_norm(xf.clone(), wf.clone(), 1e-6),
                dtype,
            );
            report.close(
                &name("layer_norm"),
                Backend::row_layer_norm(x, weight, bias.clone(), 1e-6),
                plain::layer_norm(xf, wf, to_f32(bias), 1e-6),
                dtype,
            );
        }
    }
    report.finish();
}

#[test]
#[ignore = "needs a Vulkan device"]
fn rotation() {
    let device = device();
    let mut report = Report::default();
    for dtype in dtypes(&device) {
        for (tokens, heads, head_dim) in [(1, 1, 16), (5, 3, 72), (37, 8, 128), (3, 1, 6)] {
            let name = |what: &str| format!("{what} [{tokens}, {heads}, {head_dim}]");
            // The queries of a fused projection: the token stride is three times as large.
            let fused = normal([tokens, 3 * heads, head_dim], 1.0, dtype, &device);
            let x = fused.clone().narrow(1, heads, heads);
            let angles = normal([tokens, head_dim / 2], 3.0, DType::F32, &device);
            let angles = Tensor::cat(vec![angles.clone(), angles], 1);
            let (cos, sin) = (angles.clone().cos(), angles.sin());
            let flat = fused.reshape([tokens, 3 * heads * head_dim]);
            let got = Backend::split_and_rotate(flat.clone(), heads, cos.clone(), sin.clone());
            let want = plain::split_and_rotate(to_f32(flat), heads, cos.clone(), sin.clone());
            for (got, want) in got.into_iter().zip(want) {
                report.close(&name("split_and_rotate"), got, want, dtype);
            }
            let norm = HeadNorm {
                weight: normal([head_dim], 1.0, dtype, &device),
                epsilon: 1e-6,
            };
            let exact = HeadNorm {
                weight: to_f32(norm.weight.clone()),
                epsilon: 1e-6,
            };
            for (norm, exact) in [(None, None), (Some(norm), Some(exact))] {
                report.close(
                    &name(&format!("rotate_heads, norm {}", norm.is_some())),
                    Backend::rotate_heads(x.clone(), norm, cos.clone(), sin.clone()),
                    plain::rotate_heads(to_f32(x.clone()), exact, cos.clone(), sin.clone()),
                    dtype,
                );
            }
        }
        rotation_into_a_cache(dtype, &device, &mut report);
    }
    report.finish();
}

/// Three rows of four query heads and two key heads, appended after five tokens.
fn rotation_into_a_cache(dtype: DType, device: &Device, report: &mut Report) {
    let [rows, heads, kv, head_dim, capacity, at] = [3, 4, 2, 32, 9, 5];
    let qkv = normal([rows, (heads + 2 * kv) * head_dim], 1.0, dtype, device);
    let weights = [(); 2].map(|()| normal([head_dim], 1.0, dtype, device));
    let angles = normal([rows, head_dim / 2], 3.0, DType::F32, device);
    let angles = Tensor::cat(vec![angles.clone(), angles], 1);
    let (cos, sin) = (angles.clone().cos(), angles.sin());
    let held = [(); 2].map(|()| normal([rows, kv, capacity, head_dim], 1.0, dtype, device));
    let part = |from: usize, count: usize| -> T<3> {
        let all = to_f32(qkv.clone()).reshape([rows, heads + 2 * kv, head_dim]);
        all.narrow(1, from, count)
    };
    let rotated = |x: T<3>, weight: &T<1>| {
        let norm = HeadNorm {
            weight: to_f32(weight.clone()),
            epsilon: 1e-6,
        };
        plain::rotate_heads(x, Some(norm), cos.clone(), sin.clone())
    };
    let want_q = rotated(part(0, heads), &weights[0]).reshape([rows, heads * head_dim]);
    let range = [0..rows, 0..kv, at..at + 1, 0..head_dim];
    let put = |held: &T<4>, x: T<3>| {
        to_f32(held.clone()).slice_assign(range.clone(), x.reshape([rows, kv, 1, head_dim]))
    };
    let want_k = put(&held[0], rotated(part(heads, kv), &weights[1]));
    let want_v = put(&held[1], part(heads + kv, kv));
    let norms = HeadNorms {
        q: contiguous(weights[0].clone()),
        q_epsilon: 1e-6,
        k: contiguous(weights[1].clone()),
        k_epsilon: 1e-6,
    };
    let [keys, values] = held.map(contiguous);
    let tables = contiguous(Tensor::cat(vec![cos, sin], 0));
    let q = rotary::rotate_into_cache(
        &strided(qkv),
        &norms,
        &tables,
        &Place::Known { at, cosines: 0 },
        [&keys, &values],
        false,
    );
    report.close("queries", tensor(q), want_q, dtype);
    report.close("keys in the cache", tensor(keys), want_k, dtype);
    report.close("values in the cache", tensor(values), want_v, dtype);
}

#[test]
#[ignore = "needs a Vulkan device"]
fn pointwise() {
    let device = device();
    let mut report = Report::default();
    for dtype in dtypes(&device) {
        for (rows, width) in [(1, 8), (3, 4304), (37, 136)] {
            let name = |what: &str| format!("{what} [{rows}, {width}]");
            let gate = normal([rows, width], 3.0, dtype, &device);
            let up = normal([rows, width], 1.0, dtype, &device);
            let (gf, uf) = (to_f32(gate.clone()), to_f32(up.clone()));
            report.close(
                &name("swiglu"),
                Backend::swiglu(gate.clone(), up),
                plain::swiglu(gf.clone(), uf),
                dtype,
            );
            report.close(
                &name("gelu_tanh"),
                Backend::gelu_tanh(gate.clone()),
                gelu_tanh(gf.clone()),
                dtype,
            );
            report.close(
                &name("gelu_exact"),
                Backend::gelu_exact(gate),
                gelu_exact(gf),
                dtype,
            );
        }
    }
    report.finish();
}

#[test]
#[ignore = "needs a Vulkan device"]
fn a_cache_takes_new_tokens() {
    let device = device();
    let mut report = Report::default();
    for dtype in dtypes(&device) {
        for (batch, heads, new, at) in [(1, 8, 1, 0), (2, 3, 5, 7), (1, 2, 20, 12)] {
            let shape = [batch, heads, 32, 24];
            let held = [(); 2].map(|()| normal(shape, 1.0, dtype, &device));
            // As the model has them: tokens first.
            let draw = |()| normal([batch, new, heads, 24], 1.0, dtype, &device).swap_dims(1, 2);
            let fresh: [T<4>; 2] = [(); 2].map(draw);
            let exact = |x: &[T<4>; 2]| x.clone().map(|x| to_f32(x.mul_scalar(1.0)));
            let want = plain::append_to_cache(exact(&held), exact(&fresh), at);
            let got = Backend::append_to_cache(held, fresh, at);
            for (got, want) in got.into_iter().zip(want) {
                let name = format!("append [{batch}, {heads}, {new}] at {at}");
                report.close(&name, got, want, dtype);
            }
        }
    }
    report.finish();
}

#[test]
#[ignore = "needs a Vulkan device"]
fn attention() {
    let device = device();
    let mut report = Report::default();
    let padded =
        |before: usize, tokens: usize| -> Vec<i32> { [vec![-1; before], vec![0; tokens]].concat() };
    for dtype in dtypes(&device) {
        for (heads, kv_heads, head_dim, segments) in [
            (1, 1, 16, vec![padded(0, 1)]),
            (4, 2, 72, vec![padded(3, 300), padded(0, 303)]),
            (8, 1, 128, vec![padded(0, 40)]),
            (4, 4, 64, vec![padded(0, 1700), padded(900, 800)]),
        ] {
            let keys = segments[0].len();
            let batch = segments.len();
            let spans = AttentionSpans::causal(&segments, keys - 1, &device);
            let q = normal([batch, 1, heads, head_dim], 2.0, dtype, &device).swap_dims(1, 2);
            // A cache with more room than tokens.
            let draw = || -> T<4> {
                let held = normal([batch, kv_heads, keys + 9, head_dim], 1.0, dtype, &device);
                held.narrow(2, 0, keys)
            };
            let (k, v) = (draw(), draw());
            let name = format!("attention {heads}/{kv_heads} x {head_dim} over {keys}");
            report.close(
                &name,
                Backend::span_attention(q.clone(), k.clone(), v.clone(), &spans),
                plain::attention(to_f32(q), to_f32(k), to_f32(v), &spans),
                dtype,
            );
        }
    }
    report.finish();
}

#[test]
#[ignore = "needs a Vulkan device"]
fn attention_of_many_queries() {
    let device = device();
    let mut report = Report::default();
    let causal = |segments: &[Vec<i32>], first| AttentionSpans::causal(segments, first, &device);
    let packed = [vec![0; 21], vec![1; 1], vec![2; 13]].concat();
    let padded = |before: usize, tokens: usize| [vec![-1; before], vec![0; tokens]].concat();
    for dtype in dtypes(&device) {
        for (name, heads, kv_heads, head_dim, spans) in [
            ("packed", 4, 1, 32, causal(std::slice::from_ref(&packed), 0)),
            (
                "padded",
                4,
                2,
                64,
                causal(&[padded(3, 30), padded(0, 33)], 0),
            ),
            ("after a cache", 8, 8, 32, causal(&[vec![0; 300]], 290)),
            (
                "images",
                3,
                3,
                72,
                AttentionSpans::blocks(&[25, 8, 12], &device),
            ),
        ] {
            let [batch, queries, keys] = spans.dims();
            let draw = |heads: usize, rows: usize| -> T<4> {
                normal([batch, rows, heads, head_dim], 1.0, dtype, &device).swap_dims(1, 2)
            };
            let (q, k, v) = (
                draw(heads, queries),
                draw(kv_heads, keys),
                draw(kv_heads, keys),
            );
            let got = Backend::span_attention(q.clone(), k.clone(), v.clone(), &spans);
            let want = plain::attention(to_f32(q), to_f32(k), to_f32(v), &spans);
            // The output of padding rows is not compared.
            let seen: Vec<f32> = match name {
                "padded" => [vec![0.0; 3], vec![1.0; 63]].concat(),
                _ => vec![1.0; batch * queries],
            };
            let seen =
                T::<1>::from_floats(seen.as_slice(), &device).reshape([batch, 1, queries, 1]);
            report.close(name, to_f32(got) * seen.clone(), want * seen, dtype);
        }
    }
    report.finish();
}

/// Activations of the published vision tower reach five digits: no intermediate value may become infinite.
#[test]
#[ignore = "needs a Vulkan device"]
fn large_activations_stay_finite() {
    let device = device();
    if !Backend::supports_dtype(&device, DType::F16) {
        println!("SKIPPED: the adapter has no f16");
        return;
    }
    let mut report = Report::default();
    let values: Vec<f32> = (0..64)
        .map(|i| (1e4 + 800.0 * i as f32) * if i % 3 == 0 { -1.0 } else { 1.0 })
        .collect();
    let large = T::<1>::from_floats(values.as_slice(), &device).reshape([4, 16]);
    let x = to_dtype(large.clone(), DType::F16);
    let large = to_f32(x.clone());
    let ones = T::<1>::ones([16], (&device, DType::F16));
    for (name, got, want) in [
        (
            "gelu_tanh",
            Backend::gelu_tanh(x.clone()),
            gelu_tanh(large.clone()),
        ),
        (
            "gelu_exact",
            Backend::gelu_exact(x.clone()),
            gelu_exact(large.clone()),
        ),
        (
            "rms_norm",
            Backend::rms_norm(x.clone(), ones.clone(), 1e-6),
            plain::rms_norm(large.clone(), to_f32(ones.clone()), 1e-6),
        ),
        (
            "layer_norm",
            Backend::row_layer_norm(x.clone(), ones.clone(), ones.clone(), 1e-6),
            plain::layer_norm(large.clone(), to_f32(ones.clone()), to_f32(ones), 1e-6),
        ),
        // Beyond the largest f16 the result is clamped: an infinity would be a NaN in the next norm.
        (
            "swiglu",
            Backend::swiglu(x.clone(), x.clone()),
            plain::swiglu(large.clone(), large.clone()).clamp(-65504.0, 65504.0),
        ),
        (
            "linear",
            Backend::linear_add(x.clone(), x, None, None),
            plain::linear(large.clone(), large, None, None).clamp(-65504.0, 65504.0),
        ),
    ] {
        report.close(name, got, want, DType::F16);
    }
    report.finish();
}

/// The same kernels in the same order: not a bit differs, of tokens and of logits.
#[test]
#[ignore = "needs a Vulkan device"]
fn a_recorded_step_is_a_launched_one() {
    let device = device();
    let config: Qwen3VlConfig = RandomSize::Tiny.config(None).unwrap();
    let vocab = config.text_config.vocab_size as u32;
    let layers = config.text_config.num_hidden_layers;
    let forms = [None, Some("int8"), Some("int4")];
    let mut seen = std::collections::BTreeSet::new();
    for dtype in dtypes(&device) {
        for form in forms {
            let quantization = form.map(|form| form.parse().unwrap());
            let model = draw::<Backend>(&config, 3, dtype, quantization, &device);
            // The last has its keys in two ranges.
            for (rows, longest) in [(1, 20), (3, 34), (1, 1100)] {
                let name = format!("{form:?} {dtype:?}, {rows} rows of {longest}");
                let prompts: Vec<Vec<u32>> = (0..rows as u32)
                    .map(|row| {
                        let tokens = 0..longest - 7 * row;
                        tokens
                            .map(|at| (at * 37 + row * 11) % (vocab - 24))
                            .collect()
                    })
                    .collect();
                let grids = vec![vec![]; rows];
                let (input, deltas) =
                    TextInput::padded(&prompts, &grids, &config, Padding::Left, 0).unwrap();
                let start = DecodeStart {
                    tokens: (0..rows as u32).map(|row| 5 + row).collect(),
                    positions: (prompts.iter().zip(&deltas))
                        .map(|(prompt, delta)| prompt.len() as i64 + delta)
                        .collect(),
                    most_steps: 12,
                    sampling: SamplingConfig::default(),
                    draws: Vec::new(),
                    seen: Vec::new(),
                };
                let cache = || {
                    let format = CacheFormat::Float;
                    let mut cache = KeyValueCache::with_format(layers, input.seq() + 32, format);
                    model.hidden_states(&input, None, &config, Some(&mut cache), None, &device);
                    cache
                };
                let caches = [cache(), cache()];
                let both = || -> [Box<dyn Decoder>; 2] {
                    let [one, other] = &caches;
                    let recorded = recorded::start(&model, &config, one, &start);
                    let launched = decode::start(&model, &config, other, &start);
                    [recorded.expect(&name), launched.expect(&name)]
                };
                let [mut recorded, mut launched] = both();
                for step in 0..12 {
                    let tokens = recorded.next_tokens().unwrap();
                    assert_eq!(
                        tokens,
                        launched.next_tokens().unwrap(),
                        "{name}, step {step}"
                    );
                    seen.extend(tokens);
                }
                drop((recorded, launched));
                // Over the same places of the caches, with tokens from outside.
                let [mut recorded, mut launched] = both();
                for step in 0..3u32 {
                    let tokens: Vec<u32> =
                        (0..rows as u32).map(|row| 40 + 9 * row + step).collect();
                    let logits = recorded.next_logits(&tokens).unwrap();
                    let want = launched.next_logits(&tokens).unwrap();
                    assert_eq!(logits, want, "{name}, logits of step {step}");
                }
            }
        }
    }
    assert!(seen.len() > 2, "always the same tokens: {seen:?}");
}

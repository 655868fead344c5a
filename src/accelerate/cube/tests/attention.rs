//! Rotation, the cache and attention.

use burn::{prelude::*, tensor::DType};

use super::{Device, Report, T, device, dtypes, normal};
use crate::{
    accelerate::cube::{
        rotary::{self, HeadNorms, Place},
        vulkan::{Backend, contiguous, strided, tensor},
    },
    ops::{AttentionSpans, ForwardOps, HeadNorm, cast::to_f32, plain},
};

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

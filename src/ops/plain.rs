//! The operations in plain Burn: what every backend has, and what faster ways are compared with.
//!
//! Shapes are those of the trait methods of the same names ([`ForwardOps`],
//! [`TrainingOps`]).

use burn::{
    prelude::*,
    tensor::{
        DType, TensorData,
        activation::{log_softmax, sigmoid, softmax},
    },
};

use super::{
    AdamWTensor, AttentionSpans, BackwardMatmul, Dropout, HeadNorm, LowRank, LowRankBackward,
    LowRankGradients, Matrix, TargetLoss, TrainingOps,
};

use crate::ops::{
    ForwardOps,
    cast::{to_dtype, to_f32},
};

pub(crate) use super::quantised::{
    matmul::adapted_from_low as adapted_linear_for_backward,
    training::{input_gradient as input_gradient_quantised, target_loss as target_loss_quantised},
};

/// Query rows worked on at once: bounds the score matrix of a large image to some 100 MB.
const QUERY_ROWS: usize = 1024;

/// Rows of a half-type head that are cast to f32 at once.
const HEAD_ROWS: usize = 16_384;

pub(crate) fn linear<B: ForwardOps>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    bias: Option<Tensor<B, 1>>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let y = B::matmul(x, weight.transpose());
    let y = match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    };
    match residual {
        Some(residual) => residual + y,
        None => y,
    }
}

pub(crate) fn dropout_mask<B: Backend>(like: &Tensor<B, 2>, dropout: Dropout) -> Tensor<B, 2> {
    let [rows, width] = like.dims();
    let mask = TensorData::new(dropout.mask(rows * width), [rows, width]);
    Tensor::from_data(mask, (&like.device(), DType::F32))
}

/// An adapter's input in f32, some of it dropped.
fn dropped<B: ForwardOps>(x: Tensor<B, 2>, adapter: &LowRank<B>) -> Tensor<B, 2> {
    let input = to_f32(x);
    match adapter.dropout {
        Some(dropout) => input.clone() * B::dropout_mask(&input, dropout),
        None => input,
    }
}

pub(crate) fn low_rank_input<B: ForwardOps>(x: Tensor<B, 2>, adapter: &LowRank<B>) -> Tensor<B, 2> {
    B::matmul(dropped(x, adapter), adapter.a.clone().transpose())
}

pub(crate) fn low_rank_inputs<B: ForwardOps>(
    x: Tensor<B, 2>,
    adapters: &[&LowRank<B>],
) -> Vec<Tensor<B, 2>> {
    (adapters.iter())
        .map(|adapter| low_rank_input(x.clone(), adapter))
        .collect()
}

pub(crate) fn adapted_linear<B: ForwardOps>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 2>,
    low: Tensor<B, 2>,
    adapter: &LowRank<B>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let up = B::matmul(to_f32(low), adapter.b.clone().transpose()) * adapter.scaling;
    let y = to_dtype(to_f32(B::matmul(x, weight.transpose())) + up, dtype);
    match residual {
        Some(residual) => residual + y,
        None => y,
    }
}

pub(crate) fn low_rank_backward<B: ForwardOps>(
    x: Tensor<B, 2>,
    backward: &LowRankBackward<B>,
) -> LowRankGradients<B> {
    let LowRankBackward { low, dy, adapter } = backward.clone();
    let input = dropped(x, &adapter);
    let dy = to_f32(dy) * adapter.scaling;
    let dlow = B::matmul(dy.clone(), adapter.b);
    LowRankGradients {
        a: B::matmul(dlow.clone().transpose(), input),
        b: B::matmul(dy.transpose(), to_f32(low)),
        low: dlow,
    }
}

pub(crate) fn input_gradient<B: TrainingOps>(matmuls: &[BackwardMatmul<B>]) -> Tensor<B, 2> {
    let parts = matmuls.iter().map(|matmul| {
        let dtype = matmul.dy.dtype();
        let dx = match &matmul.weight {
            Matrix::Dense(weight) => B::matmul(matmul.dy.clone(), weight.clone()),
            Matrix::Quantised(weight) => B::input_gradient_quantised(matmul.dy.clone(), weight),
        };
        let Some((dlow, adapter)) = &matmul.adapter else {
            return dx;
        };
        let share = B::matmul(to_f32(dlow.clone()), adapter.a.clone());
        let share = match adapter.dropout {
            Some(dropout) => share.clone() * B::dropout_mask(&share, dropout),
            None => share,
        };
        to_dtype(to_f32(dx) + share, dtype)
    });
    parts
        .reduce(|sum, part| sum + part)
        .expect("at least one matmul has an output gradient")
}

pub(crate) fn rms_norm<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    weight: Tensor<B, 1>,
    epsilon: f64,
) -> Tensor<B, D> {
    let dtype = x.dtype();
    let x = to_f32(x);
    let mean_square = (x.clone() * x.clone()).mean_dim(D - 1);
    let x = x / (mean_square + epsilon).sqrt();
    to_dtype(x, dtype) * weight.unsqueeze()
}

/// With `n = x / rms(x)` and `g = dy · weight`: `dx = (g - n · mean(g · n)) / rms(x)`.
pub(crate) fn rms_norm_backward<B: Backend, const D: usize>(
    x: Tensor<B, D>,
    weight: Tensor<B, 1>,
    epsilon: f64,
    dy: Tensor<B, D>,
) -> Tensor<B, D> {
    let dtype = x.dtype();
    let x = to_f32(x);
    let rms = ((x.clone() * x.clone()).mean_dim(D - 1) + epsilon).sqrt();
    let normed = x / rms.clone();
    let g = to_f32(dy) * to_f32(weight).unsqueeze();
    let along = (g.clone() * normed.clone()).mean_dim(D - 1);
    to_dtype((g - normed * along) / rms, dtype)
}

pub(crate) fn layer_norm<B: Backend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    bias: Tensor<B, 1>,
    epsilon: f64,
) -> Tensor<B, 2> {
    let dtype = x.dtype();
    let x = to_f32(x);
    let x = x.clone() - x.mean_dim(1);
    let variance = (x.clone() * x.clone()).mean_dim(1);
    let x = x / (variance + epsilon).sqrt();
    let x = x * to_f32(weight).unsqueeze() + to_f32(bias).unsqueeze();
    to_dtype(x, dtype)
}

/// `x * cos + rotate_half(x) * sin`, in f32.
fn rotate<B: Backend>(x: Tensor<B, 3>, cos: Tensor<B, 2>, sin: Tensor<B, 2>) -> Tensor<B, 3> {
    let dtype = x.dtype();
    let x = to_f32(x);
    let [_, _, head_dim] = x.dims();
    let half = head_dim / 2;
    let first = x.clone().narrow(2, 0, half);
    let second = x.clone().narrow(2, half, half);
    let rotated_half = Tensor::cat(vec![second.neg(), first], 2);
    to_dtype(
        x * cos.unsqueeze_dim(1) + rotated_half * sin.unsqueeze_dim(1),
        dtype,
    )
}

pub(crate) fn rotate_heads<B: Backend>(
    x: Tensor<B, 3>,
    norm: Option<HeadNorm<B>>,
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
) -> Tensor<B, 3> {
    let x = match norm {
        Some(norm) => rms_norm(x, norm.weight, norm.epsilon),
        None => x,
    };
    rotate(x, cos, sin)
}

pub(crate) fn split_and_rotate<B: Backend>(
    qkv: Tensor<B, 2>,
    heads: usize,
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
) -> [Tensor<B, 3>; 3] {
    let [tokens, width] = qkv.dims();
    let qkv = qkv.reshape([tokens, 3, heads, width / 3 / heads]);
    let part = |index| -> Tensor<B, 3> { qkv.clone().narrow(1, index, 1).squeeze_dim(1) };
    [
        rotate(part(0), cos.clone(), sin.clone()),
        rotate(part(1), cos, sin),
        part(2),
    ]
}

pub(crate) fn rotate_heads_backward<B: Backend>(
    x: Tensor<B, 3>,
    norm: Option<HeadNorm<B>>,
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
    dy: Tensor<B, 3>,
) -> Tensor<B, 3> {
    // Both halves of a head share their angles, so the inverse rotation is that by the negative angle.
    let dx = rotate(dy, cos, sin.neg());
    match norm {
        Some(norm) => rms_norm_backward(x, norm.weight, norm.epsilon, dx),
        None => dx,
    }
}

pub(crate) fn attention<B: ForwardOps>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    spans: &AttentionSpans<B>,
) -> Tensor<B, 4> {
    if let Some(blocks) = spans.block_lengths().filter(|blocks| blocks.len() > 1) {
        let mut start = 0;
        let parts = blocks.iter().map(|length| {
            let cut = |x: &Tensor<B, 4>| x.clone().narrow(2, start, *length);
            let part = attend_in_pieces(cut(&q), cut(&k), cut(&v), None);
            start += length;
            part
        });
        return Tensor::cat(parts.collect(), 2);
    }
    attend_in_pieces(q, k, v, spans.bias())
}

fn attend_in_pieces<B: ForwardOps>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    bias: Option<Tensor<B, 4>>,
) -> Tensor<B, 4> {
    let [_, _, queries, _] = q.dims();
    if queries <= QUERY_ROWS {
        return attend(q, k, v, bias);
    }
    let parts = (0..queries)
        .step_by(QUERY_ROWS)
        .map(|start| {
            let rows = QUERY_ROWS.min(queries - start);
            attend(
                q.clone().narrow(2, start, rows),
                k.clone(),
                v.clone(),
                bias.clone().map(|bias| bias.narrow(2, start, rows)),
            )
        })
        .collect();
    Tensor::cat(parts, 2)
}

/// Probabilities `[batch, key_value_heads, rows, keys]`, f32, and the scaled queries in that form.
fn probabilities<B: ForwardOps>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    bias: Option<Tensor<B, 4>>,
) -> (Tensor<B, 4>, Tensor<B, 4>) {
    let [batch, heads, queries, head_dim] = q.dims();
    let [_, key_value_heads, keys, _] = k.dims();
    // Query heads that share a key head become more rows of one matmul.
    let rows = heads / key_value_heads * queries;
    let q = (q * scale(head_dim)).reshape([batch, key_value_heads, rows, head_dim]);
    let scores = B::matmul_f32(q.clone(), k.swap_dims(2, 3)).reshape([batch, heads, queries, keys]);
    let scores = match bias {
        Some(bias) => scores + bias,
        None => scores,
    };
    let weights = softmax(scores, 3).reshape([batch, key_value_heads, rows, keys]);
    (weights, q)
}

fn scale(head_dim: usize) -> f64 {
    (head_dim as f64).powf(-0.5)
}

fn attend<B: ForwardOps>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    bias: Option<Tensor<B, 4>>,
) -> Tensor<B, 4> {
    let shape = q.dims();
    let dtype = v.dtype();
    let (weights, _) = probabilities(q, k, bias);
    B::matmul(to_dtype(weights, dtype), v).reshape(shape)
}

pub(crate) fn attention_backward<B: ForwardOps>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    dy: Tensor<B, 4>,
    spans: &AttentionSpans<B>,
) -> [Tensor<B, 4>; 3] {
    let [_, _, queries, head_dim] = q.dims();
    let bias = spans.bias();
    let mut dq = Vec::new();
    let mut dkv: Option<(Tensor<B, 4>, Tensor<B, 4>)> = None;
    for start in (0..queries).step_by(QUERY_ROWS) {
        let count = QUERY_ROWS.min(queries - start);
        let q = q.clone().narrow(2, start, count);
        let shape = q.dims();
        let dtype = q.dtype();
        let bias = bias.clone().map(|bias| bias.narrow(2, start, count));
        let (weights, q) = probabilities(q, k.clone(), bias);
        let dy = dy.clone().narrow(2, start, count).reshape(q.dims());
        let dv = B::matmul(to_dtype(weights.clone(), dtype).swap_dims(2, 3), dy.clone());
        let dweights = B::matmul_f32(dy, v.clone().swap_dims(2, 3));
        let mean = (dweights.clone() * weights.clone()).sum_dim(3);
        let dscores = to_dtype(weights * (dweights - mean), dtype);
        dq.push((B::matmul(dscores.clone(), k.clone()) * scale(head_dim)).reshape(shape));
        let dk = B::matmul(dscores.swap_dims(2, 3), q);
        dkv = Some(match dkv {
            Some((old_k, old_v)) => (old_k + dk, old_v + dv),
            None => (dk, dv),
        });
    }
    let (dk, dv) = dkv.expect("there is at least one query");
    [Tensor::cat(dq, 2), dk, dv]
}

pub(crate) fn swiglu<B: Backend>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    gate.clone() * sigmoid(gate) * up
}

pub(crate) fn swiglu_backward<B: Backend>(
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
    dy: Tensor<B, 2>,
) -> [Tensor<B, 2>; 2] {
    let dtype = gate.dtype();
    let (gate, up, dy) = (to_f32(gate), to_f32(up), to_f32(dy));
    let s = sigmoid(gate.clone());
    let silu = gate.clone() * s.clone();
    let slope = s.clone() * (gate * (s.neg() + 1.0) + 1.0);
    [
        to_dtype(dy.clone() * up * slope, dtype),
        to_dtype(dy * silu, dtype),
    ]
}

pub(crate) fn logits<B: ForwardOps>(hidden: Tensor<B, 2>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
    let hidden = to_f32(hidden);
    if weight.dtype() == DType::F32 {
        return B::matmul(hidden, weight.transpose());
    }
    let [vocab, _] = weight.dims();
    let parts = (0..vocab)
        .step_by(HEAD_ROWS)
        .map(|start| {
            let rows = weight
                .clone()
                .narrow(0, start, HEAD_ROWS.min(vocab - start));
            B::matmul(hidden.clone(), to_f32(rows).transpose())
        })
        .collect();
    Tensor::cat(parts, 1)
}

/// Of each target its log-probability, the entropy of its distribution, both in nats, and whether it is the
/// likeliest token (1 or 0).
///
/// # Shapes
/// - `logits`: `[targets, vocab]`, `ids`: `[targets]`
/// - returns: `[3, targets]`
pub fn target_scores<B: Backend>(logits: Tensor<B, 2>, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
    let best = logits.clone().argmax(1).squeeze_dim::<1>(1);
    let all = log_softmax(logits, 1);
    let picked = all.clone().gather(1, ids.clone().unsqueeze_dim(1));
    let entropy = (all.clone().exp() * all).sum_dim(1).neg();
    let rows = [
        picked.squeeze_dim::<1>(1),
        entropy.squeeze_dim::<1>(1),
        best.equal(ids).float(),
    ];
    Tensor::stack(rows.to_vec(), 0)
}

/// Negative log likelihoods and right predictions of the targets, summed.
///
/// # Shapes
/// - `logits`: `[targets, vocab]`, `ids`: `[targets]`
/// - returns: `[1]` each
pub fn target_sums<B: Backend>(
    logits: &Tensor<B, 2>,
    ids: Tensor<B, 1, Int>,
) -> (Tensor<B, 1>, Tensor<B, 1>) {
    let picked = log_softmax(logits.clone(), 1).gather(1, ids.clone().unsqueeze_dim(1));
    let best = logits.clone().argmax(1).squeeze_dim::<1>(1);
    // Along an axis: backends may sum a whole tensor with atomics, in no fixed order.
    let nll = picked.sum_dim(0).reshape([1]).neg();
    (nll, best.equal(ids).float().sum_dim(0))
}

pub(crate) fn target_loss<B: ForwardOps>(
    hidden: Tensor<B, 2>,
    head: Tensor<B, 2>,
    ids: Tensor<B, 1, Int>,
    weight: f64,
) -> TargetLoss<B> {
    let dtype = hidden.dtype();
    let logits = B::logits(hidden, head.clone());
    let (sums, dlogits) = loss_and_logit_gradient(logits, ids, weight);
    let hidden_gradient = B::matmul(to_dtype(dlogits, head.dtype()), head);
    TargetLoss {
        sums,
        hidden_gradient: to_dtype(hidden_gradient, dtype),
    }
}

/// Sums of a [`TargetLoss`], and the gradient of `weight` times the loss for the logits; `[targets, vocab]`
/// both, f32.
pub(super) fn loss_and_logit_gradient<B: Backend>(
    logits: Tensor<B, 2>,
    ids: Tensor<B, 1, Int>,
    weight: f64,
) -> (Tensor<B, 1>, Tensor<B, 2>) {
    let (nll, correct) = target_sums(&logits, ids.clone());
    let [rows, _] = logits.dims();
    let dlogits = softmax(logits, 1).scatter(
        1,
        ids.unsqueeze_dim(1),
        Tensor::full([rows, 1], -1.0, (&nll.device(), DType::F32)),
        burn::tensor::IndexingUpdateOp::Add,
    ) * weight;
    (Tensor::cat(vec![nll, correct], 0), dlogits)
}

pub(crate) fn adamw<B: Backend>(
    tensors: Vec<AdamWTensor<B>>,
    clip: Option<Tensor<B, 1>>,
) -> Vec<[Tensor<B, 1>; 3]> {
    let scale = clip.map(|clip| clip.narrow(0, 1, 1));
    tensors
        .into_iter()
        .map(|one| {
            let AdamWTensor {
                value,
                gradient,
                first,
                second,
                step,
            } = one;
            let gradient = match &scale {
                Some(scale) => gradient * scale.clone(),
                None => gradient,
            };
            let first = first * step.beta1 + gradient.clone() * (1.0 - step.beta1);
            let second = second * step.beta2 + gradient.clone() * gradient * (1.0 - step.beta2);
            let root = (second.clone() * step.second_scale).sqrt() + step.epsilon;
            let value = value * step.keep - first.clone() / root * step.step_size;
            [value, first, second]
        })
        .collect()
}

pub(crate) fn clip_scale<B: Backend>(tensors: Vec<Tensor<B, 1>>, max_norm: f64) -> Tensor<B, 1> {
    let sums = tensors
        .into_iter()
        .map(|tensor| {
            let tensor = to_f32(tensor);
            (tensor.clone() * tensor).sum()
        })
        .collect();
    let norm = Tensor::cat(sums, 0).sum().sqrt();
    let scale = if max_norm > 0.0 {
        ((norm.clone() + 1e-6).recip() * max_norm).clamp_max(1.0)
    } else {
        norm.ones_like()
    };
    Tensor::cat(vec![norm, scale], 0)
}

pub(crate) fn append_to_cache<B: Backend>(
    [keys, values]: [Tensor<B, 4>; 2],
    [new_keys, new_values]: [Tensor<B, 4>; 2],
    at: usize,
) -> [Tensor<B, 4>; 2] {
    let [batch, heads, new, head_dim] = new_keys.dims();
    let range = [0..batch, 0..heads, at..at + new, 0..head_dim];
    [
        keys.slice_assign(range.clone(), new_keys),
        values.slice_assign(range, new_values),
    ]
}

/// GELU with the error function.
///
/// Composed from `erf`: the gradient of Burn's own `gelu` is that of the tanh form.
pub fn gelu_exact<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let dtype = x.dtype();
    let x = to_f32(x);
    let y = ((x.clone() * std::f64::consts::FRAC_1_SQRT_2).erf() + 1.0) * x * 0.5;
    to_dtype(y, dtype)
}

/// GELU in the tanh form, `gelu_pytorch_tanh`.
///
/// In f32: the cube overflows f16 at the activations of the published vision tower.
pub fn gelu_tanh<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    const SQRT_2_OVER_PI: f64 = std::f64::consts::FRAC_2_SQRT_PI * std::f64::consts::FRAC_1_SQRT_2;
    let dtype = x.dtype();
    let x = to_f32(x);
    let inner = (x.clone() * x.clone() * 0.044715 + 1.0) * x.clone() * SQRT_2_OVER_PI;
    let y = (inner.tanh() + 1.0) * x * 0.5;
    to_dtype(y, dtype)
}

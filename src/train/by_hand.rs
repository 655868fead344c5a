//! The backward pass of the language model where only adapters are trained, written out.
//!
//! No graph is recorded: a layer's forward pass keeps what its backward pass needs, a frozen weight
//! never gets a gradient, and one product serves all that flows back into one input. Everything is
//! expressed in the operations of [`Accelerator`], so the same code runs on every backend.

use burn::{
    module::ParamId,
    optim::GradientsParams,
    prelude::*,
    tensor::{DType, IndexingUpdateOp, backend::AutodiffBackend},
};

use super::gradients::{LOSS_ROWS, LossSums, is_trained};
use crate::{
    batch::micro_batch::MicroBatch,
    ops::{BackwardProduct, LowRank, LowRankFlow, cast::to_dtype},
    qwen3_vl::{
        ImagePlacement, Qwen3Vl,
        nn::Linear,
        text::{DecoderLayer, TextContext, heads_first},
    },
    runtime::accelerator::Accelerator,
};

/// Whether this way of differentiating covers everything the language model trains.
pub(super) fn covers<B: AutodiffBackend>(model: &Qwen3Vl<B>) -> bool {
    let text = &model.model.language_model;
    let frozen_ends = !is_trained(&text.embed_tokens)
        && !is_trained(&text.norm)
        && model.lm_head.as_ref().is_none_or(|head| !is_trained(head));
    frozen_ends
        && text.layers.iter().all(|layer| {
            let norms = [
                &layer.input_layernorm,
                &layer.post_attention_layernorm,
                &layer.self_attn.q_norm,
                &layer.self_attn.k_norm,
            ];
            norms.into_iter().all(|norm| !is_trained(norm))
                && linears(layer).into_iter().all(trains_adapter_only)
        })
}

fn linears<B: Backend>(layer: &DecoderLayer<B>) -> [&Linear<B>; 7] {
    let (attn, mlp) = (&layer.self_attn, &layer.mlp);
    [
        &attn.q_proj,
        &attn.k_proj,
        &attn.v_proj,
        &attn.o_proj,
        &mlp.gate_proj,
        &mlp.up_proj,
        &mlp.down_proj,
    ]
}

fn trains_adapter_only<B: AutodiffBackend>(linear: &Linear<B>) -> bool {
    let bias_trained = linear
        .bias
        .as_ref()
        .is_some_and(|bias| bias.is_require_grad());
    let rescaled = linear
        .lora
        .as_ref()
        .is_some_and(|lora| lora.lora_magnitude_vector.is_some());
    !linear.weight.is_require_grad() && !bias_trained && !rescaled
}

/// The low-rank parts of some linear layers over one input, where they have adapters.
fn low_parts<B: Accelerator, const N: usize>(
    linears: [&Linear<B>; N],
    x: &Tensor<B, 2>,
    seed: Option<u64>,
) -> [Option<Tensor<B, 2>>; N] {
    let adapters = linears.map(|linear| adapter(linear, seed));
    let present: Vec<_> = adapters.iter().flatten().collect();
    let mut lows = if present.is_empty() {
        Vec::new()
    } else {
        B::low_rank_inputs(x.clone(), &present)
    }
    .into_iter();
    adapters.map(|adapter| adapter.and_then(|_| lows.next()))
}

fn adapter<B: Accelerator>(linear: &Linear<B>, seed: Option<u64>) -> Option<LowRank<B>> {
    linear.lora.as_ref().map(|lora| lora.low_rank(seed))
}

/// A linear layer's result; `low` is its part of [`low_parts`].
fn product<B: Accelerator>(
    linear: &Linear<B>,
    x: Tensor<B, 2>,
    low: Option<&Tensor<B, 2>>,
    residual: Option<Tensor<B, 2>>,
) -> Tensor<B, 2> {
    let weight = linear.weight.val();
    let bias = linear.bias.as_ref().map(|bias| bias.val());
    let (Some(low), Some(adapter)) = (low, adapter(linear, None)) else {
        return B::dense(x, weight, bias, residual);
    };
    let y = B::adapted_product(x, weight, low.clone(), &adapter, residual);
    match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// Registers the gradients of the adapters of some linear layers over one input; what is left to do
/// flows into that input.
fn flow_back<B: Accelerator, const N: usize>(
    linears: [&Linear<B>; N],
    x: &Tensor<B, 2>,
    lows: [Option<Tensor<B, 2>>; N],
    dys: [Tensor<B, 2>; N],
    seed: Option<u64>,
    grads: &mut AdapterGradients<B>,
) -> Vec<BackwardProduct<B>> {
    let flows: Vec<LowRankFlow<B>> = (linears.iter().zip(lows).zip(&dys))
        .filter_map(|((linear, low), dy)| {
            Some(LowRankFlow {
                low: low?,
                dy: dy.clone(),
                adapter: adapter(linear, seed)?,
            })
        })
        .collect();
    let mut gradients = if flows.is_empty() {
        Vec::new()
    } else {
        B::low_rank_backward(x.clone(), &flows)
    }
    .into_iter()
    .zip(flows);
    (linears.iter().zip(dys))
        .map(|(linear, dy)| {
            let weight = linear.weight.val();
            let flowed = linear.lora.as_ref().and_then(|lora| {
                let (gradients, flow) = gradients.next()?;
                grads.0.push((lora.lora_a.id, gradients.a));
                grads.0.push((lora.lora_b.id, gradients.b));
                Some((gradients.low, flow.adapter))
            });
            BackwardProduct {
                dy,
                weight,
                adapter: flowed,
            }
        })
        .collect()
}

/// Gradients of the adapters' weights met so far.
struct AdapterGradients<B: Backend>(Vec<(ParamId, Tensor<B, 2>)>);

/// What the backward pass of one layer needs of its forward pass; all `[n, …]`.
struct LayerTape<B: Backend> {
    /// Into the layer.
    x: Tensor<B, 2>,
    /// Projected heads before their norm, `[n, heads, head_dim]`.
    raw_q: Tensor<B, 3>,
    raw_k: Tensor<B, 3>,
    /// `[b, heads, s, head_dim]`.
    v: Tensor<B, 4>,
    attended: Tensor<B, 4>,
    statistics: Option<Tensor<B, 3>>,
    /// Into the feed-forward half.
    middle: Tensor<B, 2>,
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
    /// Low-rank parts, in the order of [`linears`].
    low: [Option<Tensor<B, 2>>; 7],
    /// What is cheap to work out again; `None` where it is.
    cheap: Option<Cheap<B>>,
}

/// Results of pointwise operations over a [`LayerTape`]: two fifths of all that could be kept.
struct Cheap<B: Backend> {
    /// Behind the first and the second norm.
    normed: Tensor<B, 2>,
    middle_normed: Tensor<B, 2>,
    /// Rotated, `[b, heads, s, head_dim]`.
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    gated: Tensor<B, 2>,
}

impl<B: Accelerator> LayerTape<B> {
    fn take_cheap(&mut self, layer: &DecoderLayer<B>, context: &TextContext<B>) -> Cheap<B> {
        self.cheap.take().unwrap_or_else(|| {
            let [q, k] = turned_heads(layer, &self.raw_q, &self.raw_k, context);
            Cheap {
                normed: layer.input_layernorm.forward(self.x.clone()),
                middle_normed: layer.post_attention_layernorm.forward(self.middle.clone()),
                q,
                k,
                gated: B::gated(self.gate.clone(), self.up.clone()),
            }
        })
    }
}

/// Queries and keys, normalised and rotated: `[b, heads, s, head_dim]`.
fn turned_heads<B: Accelerator>(
    layer: &DecoderLayer<B>,
    raw_q: &Tensor<B, 3>,
    raw_k: &Tensor<B, 3>,
    context: &TextContext<B>,
) -> [Tensor<B, 4>; 2] {
    let attn = &layer.self_attn;
    [(raw_q, &attn.q_norm), (raw_k, &attn.k_norm)].map(|(raw, norm)| {
        let turned = context.rope.rotate(raw.clone(), Some(norm.of_heads()));
        heads_first(turned, context.batch)
    })
}

/// A layer's forward pass up to its last product, whose result no backward pass needs.
fn layer_tape<B: Accelerator>(
    layer: &DecoderLayer<B>,
    x: Tensor<B, 2>,
    context: &TextContext<B>,
) -> LayerTape<B> {
    let attn = &layer.self_attn;
    let seed = context.dropout_seed;
    let normed = layer.input_layernorm.forward(x.clone());
    let inputs = [&attn.q_proj, &attn.k_proj, &attn.v_proj];
    let [low_q, low_k, low_v] = low_parts(inputs, &normed, seed);
    let heads = |linear, low: &Option<_>| {
        attn.split_heads(product(linear, normed.clone(), low.as_ref(), None))
    };
    let raw_q = heads(&attn.q_proj, &low_q);
    let raw_k = heads(&attn.k_proj, &low_k);
    let v = heads_first(heads(&attn.v_proj, &low_v), context.batch);
    let [q, k] = turned_heads(layer, &raw_q, &raw_k, context);
    let (attended, statistics) =
        B::span_attention_for_backward(q.clone(), k.clone(), v.clone(), &context.spans);
    let y = tokens_first(attended.clone());
    let [low_o] = low_parts([&attn.o_proj], &y, seed);
    let middle = product(&attn.o_proj, y, low_o.as_ref(), Some(x.clone()));

    let mlp = &layer.mlp;
    let middle_normed = layer.post_attention_layernorm.forward(middle.clone());
    let [low_gate, low_up] = low_parts([&mlp.gate_proj, &mlp.up_proj], &middle_normed, seed);
    let wide = |linear, low: &Option<_>| product(linear, middle_normed.clone(), low.as_ref(), None);
    let gate = wide(&mlp.gate_proj, &low_gate);
    let up = wide(&mlp.up_proj, &low_up);
    let gated = B::gated(gate.clone(), up.clone());
    let [low_down] = low_parts([&mlp.down_proj], &gated, seed);
    LayerTape {
        x,
        raw_q,
        raw_k,
        v,
        attended,
        statistics,
        middle,
        gate,
        up,
        low: [low_q, low_k, low_v, low_o, low_gate, low_up, low_down],
        cheap: Some(Cheap {
            normed,
            middle_normed,
            q,
            k,
            gated,
        }),
    }
}

/// A layer's result, `[n, hidden]`.
fn layer_output<B: Accelerator>(
    layer: &DecoderLayer<B>,
    tape: &mut LayerTape<B>,
    context: &TextContext<B>,
) -> Tensor<B, 2> {
    let cheap = tape.take_cheap(layer, context);
    let y = product(
        &layer.mlp.down_proj,
        cheap.gated.clone(),
        tape.low[6].as_ref(),
        Some(tape.middle.clone()),
    );
    tape.cheap = Some(cheap);
    y
}

/// `[b, heads, s, head_dim]` → `[n, heads × head_dim]`.
fn tokens_first<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 2> {
    let [batch, heads, seq, head_dim] = x.dims();
    x.swap_dims(1, 2).reshape([batch * seq, heads * head_dim])
}

fn layer_backward<B: Accelerator>(
    layer: &DecoderLayer<B>,
    mut tape: LayerTape<B>,
    context: &TextContext<B>,
    dy: Tensor<B, 2>,
    grads: &mut AdapterGradients<B>,
) -> Tensor<B, 2> {
    let (attn, mlp) = (&layer.self_attn, &layer.mlp);
    let seed = context.dropout_seed;
    let cheap = tape.take_cheap(layer, context);
    let [low_q, low_k, low_v, low_o, low_gate, low_up, low_down] = tape.low;

    let down = [&mlp.down_proj];
    let mut flowing = flow_back(down, &cheap.gated, [low_down], [dy.clone()], seed, grads);
    let [dgate, dup] = B::gated_input_gradient(flowing.remove(0), tape.gate, tape.up);
    let flowing = flow_back(
        [&mlp.gate_proj, &mlp.up_proj],
        &cheap.middle_normed,
        [low_gate, low_up],
        [dgate, dup],
        seed,
        grads,
    );
    let norm = &layer.post_attention_layernorm;
    let dmiddle = B::rms_norm_backward(
        tape.middle,
        norm.weight.val(),
        norm.epsilon(),
        B::input_gradient(&flowing),
        dy,
    );

    let y = tokens_first(tape.attended.clone());
    let out = [&attn.o_proj];
    let flowing = flow_back(out, &y, [low_o], [dmiddle.clone()], seed, grads);
    let dattended = attn.split_heads(B::input_gradient(&flowing));
    let [dq, dk, dv] = B::span_attention_backward(
        cheap.q,
        cheap.k,
        tape.v,
        tape.attended,
        tape.statistics,
        heads_first(dattended, context.batch),
        &context.spans,
    );
    let turn_back = |raw: Tensor<B, 3>, norm, gradient: Tensor<B, 4>| {
        let gradient = gradient.swap_dims(1, 2).reshape(raw.dims());
        let (cos, sin) = (context.rope.cos.clone(), context.rope.sin.clone());
        let [tokens, heads, head_dim] = raw.dims();
        B::rotate_heads_backward(raw, Some(norm), cos, sin, gradient)
            .reshape([tokens, heads * head_dim])
    };
    let dq = turn_back(tape.raw_q, attn.q_norm.of_heads(), dq);
    let dk = turn_back(tape.raw_k, attn.k_norm.of_heads(), dk);
    let dv = tokens_first(dv);
    let flowing = flow_back(
        [&attn.q_proj, &attn.k_proj, &attn.v_proj],
        &cheap.normed,
        [low_q, low_k, low_v],
        [dq, dk, dv],
        seed,
        grads,
    );
    let norm = &layer.input_layernorm;
    B::rms_norm_backward(
        tape.x,
        norm.weight.val(),
        norm.epsilon(),
        B::input_gradient(&flowing),
        dmiddle,
    )
}

/// What the language model's pass gives.
pub(super) struct TextPass<B: Backend> {
    /// Of the adapters of all layers.
    pub grads: GradientsParams,
    /// Loss over the targets.
    pub sums: LossSums<B>,
    /// What flows back into the image features: merged first, then DeepStack's.
    pub feature_gradients: Vec<Tensor<B, 2>>,
}

/// What a layer keeps until its backward pass.
enum Kept<B: Backend> {
    /// Its input: the layer is run again.
    Input(Tensor<B, 2>),
    /// All that is needed.
    Tape(Box<LayerTape<B>>),
}

/// What is kept for the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keep {
    /// Inputs of the layers: each is run again.
    Inputs,
    /// All but what pointwise operations give from the rest.
    Products,
    /// All.
    Everything,
}

/// Runs the language model forward and backward.
///
/// `features` are the merged and the DeepStack features of the batch's images.
pub(super) fn text_pass<B: Accelerator>(
    model: &Qwen3Vl<B>,
    batch: &MicroBatch,
    features: &[Tensor<B, 2>],
    context: &TextContext<B>,
    weight: f64,
    keep: Keep,
    device: &B::Device,
) -> TextPass<B> {
    let text = &model.model.language_model;
    let placement = (!features.is_empty()).then(|| ImagePlacement::new(&batch.text, device));
    let mut x = model.embed(&batch.text, device);
    if let (Some(placement), Some(merged)) = (&placement, features.first()) {
        x = placement.replace(x, merged.clone());
    }
    let mut kept = Vec::with_capacity(text.layers.len());
    for (index, layer) in text.layers.iter().enumerate() {
        // The last layer's backward pass comes next.
        let last = index + 1 == text.layers.len();
        if keep == Keep::Inputs && !last {
            kept.push(Kept::Input(x.clone()));
            x = layer.forward(x, context, None);
        } else {
            let mut tape = layer_tape(layer, x, context);
            x = layer_output(layer, &mut tape, context);
            if keep == Keep::Products && !last {
                tape.cheap = None;
            }
            kept.push(Kept::Tape(Box::new(tape)));
        }
        if let (Some(placement), Some(features)) = (&placement, features.get(index + 1)) {
            x = x + placement.spread(features.clone());
        }
    }

    let (mut gradient, sums) = head_pass(model, batch, x, weight, device);
    let mut grads = AdapterGradients(Vec::new());
    let mut feature_gradients = Vec::new();
    for (index, (layer, kept)) in text.layers.iter().zip(kept).enumerate().rev() {
        if let (Some(placement), true) = (&placement, index + 1 < features.len()) {
            feature_gradients.push(placement.gather(gradient.clone()));
        }
        let tape = match kept {
            Kept::Tape(tape) => *tape,
            Kept::Input(x) => layer_tape(layer, x, context),
        };
        gradient = layer_backward(layer, tape, context, gradient, &mut grads);
    }
    if let Some(placement) = &placement {
        feature_gradients.push(placement.gather(gradient));
    }
    feature_gradients.reverse();

    let mut registered = GradientsParams::new();
    for (id, gradient) in grads.0 {
        registered.register(id, gradient);
    }
    TextPass {
        grads: registered,
        sums,
        feature_gradients,
    }
}

/// Norm, head and loss over the target rows only: what flows back into the last layer's output.
fn head_pass<B: Accelerator>(
    model: &Qwen3Vl<B>,
    batch: &MicroBatch,
    output: Tensor<B, 2>,
    weight: f64,
    device: &B::Device,
) -> (Tensor<B, 2>, LossSums<B>) {
    let norm = &model.model.language_model.norm;
    let head = model.head_weight();
    let targets = batch.targets_with_rows();
    let mut gradient = output.zeros_like();
    let mut sums = Tensor::zeros([2], (device, DType::F32));
    for piece in targets.chunks(LOSS_ROWS) {
        let rows: Vec<i32> = piece.iter().map(|(row, _)| *row).collect();
        let ids: Vec<i32> = piece.iter().map(|(_, id)| *id).collect();
        let rows = Tensor::<B, 1, Int>::from_ints(rows.as_slice(), device);
        let ids = Tensor::<B, 1, Int>::from_ints(ids.as_slice(), device);
        let x = output.clone().select(0, rows.clone());
        let loss = B::target_loss(norm.forward(x.clone()), head.clone(), ids, weight);
        sums = sums + loss.sums;
        let nothing = x.zeros_like();
        let dx = B::rms_norm_backward(
            x,
            norm.weight.val(),
            norm.epsilon(),
            loss.hidden_gradient,
            nothing,
        );
        let dx = to_dtype(dx, gradient.dtype());
        gradient = gradient.select_assign(0, rows, dx, IndexingUpdateOp::Add);
    }
    (gradient, LossSums::new(sums, targets.len()))
}

//! The backward pass of the language model where only adapters are trained, written out.
//!
//! No graph is recorded: a layer's forward pass keeps what its backward pass needs, a frozen weight
//! never gets a gradient, and one product serves all that flows back into one input. Everything is
//! expressed in the operations of [`Kernels`], so the same code runs on every backend.

use burn::{
    module::ParamId,
    optim::GradientsParams,
    prelude::*,
    tensor::{DType, IndexingUpdateOp, backend::AutodiffBackend},
};

use crate::{
    kernels::{BackwardProduct, Kernels},
    qwen3_vl::{
        ImagePlacement, Qwen3Vl,
        nn::{Linear, to_dtype},
        text::{DecoderLayer, TextContext, heads_first},
    },
};

use super::gradients::{LOSS_ROWS, LossSums, MicroBatch, is_trained};

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

/// A linear layer's forward pass with what its backward pass needs besides the input.
fn project<B: Kernels>(
    linear: &Linear<B>,
    x: Tensor<B, 2>,
    residual: Option<Tensor<B, 2>>,
    seed: Option<u64>,
) -> (Tensor<B, 2>, Option<Tensor<B, 2>>) {
    let weight = linear.weight.val();
    let bias = linear.bias.as_ref().map(|bias| bias.val());
    let Some(lora) = &linear.lora else {
        return (B::dense(x, weight, bias, residual), None);
    };
    let (y, low) = B::adapted_linear(x, weight, &lora.low_rank(seed), residual);
    let y = match bias {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    };
    (y, Some(low))
}

/// Registers the gradients of a layer's adapter; what is left to do flows into its input.
fn project_backward<B: Kernels>(
    linear: &Linear<B>,
    x: &Tensor<B, 2>,
    low: Option<Tensor<B, 2>>,
    dy: Tensor<B, 2>,
    seed: Option<u64>,
    grads: &mut AdapterGradients<B>,
) -> BackwardProduct<B> {
    let weight = linear.weight.val();
    let (Some(lora), Some(low)) = (&linear.lora, low) else {
        return BackwardProduct {
            dy,
            weight,
            adapter: None,
        };
    };
    let adapter = lora.low_rank(seed);
    let gradients = B::adapted_linear_backward(x.clone(), low, &adapter, dy.clone());
    grads.0.push((lora.lora_a.id, gradients.a));
    grads.0.push((lora.lora_b.id, gradients.b));
    BackwardProduct {
        dy,
        weight,
        adapter: Some((gradients.low, adapter)),
    }
}

/// Gradients of the adapters' weights met so far.
struct AdapterGradients<B: Backend>(Vec<(ParamId, Tensor<B, 2>)>);

/// What the backward pass of one layer needs of its forward pass; all `[n, …]`.
struct LayerTape<B: Backend> {
    /// Into the layer, and behind the first norm.
    x: Tensor<B, 2>,
    normed: Tensor<B, 2>,
    /// Projected heads before their norm, `[n, heads, head_dim]`.
    raw_q: Tensor<B, 3>,
    raw_k: Tensor<B, 3>,
    /// Rotated, `[b, heads, s, head_dim]`.
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    attended: Tensor<B, 4>,
    statistics: Option<Tensor<B, 3>>,
    /// Into the feed-forward half, and behind its norm.
    middle: Tensor<B, 2>,
    middle_normed: Tensor<B, 2>,
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
    gated: Tensor<B, 2>,
    /// Low-rank parts, in the order of [`linears`].
    low: [Option<Tensor<B, 2>>; 7],
}

fn layer_forward<B: Kernels>(
    layer: &DecoderLayer<B>,
    x: Tensor<B, 2>,
    context: &TextContext<B>,
) -> (Tensor<B, 2>, LayerTape<B>) {
    let attn = &layer.self_attn;
    let seed = context.dropout_seed;
    let normed = layer.input_layernorm.forward(x.clone());
    let (q, low_q) = project(&attn.q_proj, normed.clone(), None, seed);
    let (k, low_k) = project(&attn.k_proj, normed.clone(), None, seed);
    let (v, low_v) = project(&attn.v_proj, normed.clone(), None, seed);
    let (raw_q, raw_k) = (attn.split_heads(q), attn.split_heads(k));
    let q = context
        .rope
        .rotate(raw_q.clone(), Some(attn.q_norm.of_heads()));
    let k = context
        .rope
        .rotate(raw_k.clone(), Some(attn.k_norm.of_heads()));
    let [q, k, v] = [q, k, attn.split_heads(v)].map(|x| heads_first(x, context.batch));
    let (attended, statistics) =
        B::span_attention_for_backward(q.clone(), k.clone(), v.clone(), &context.spans);
    let y = tokens_first(attended.clone());
    let (middle, low_o) = project(&attn.o_proj, y, Some(x.clone()), seed);

    let mlp = &layer.mlp;
    let middle_normed = layer.post_attention_layernorm.forward(middle.clone());
    let (gate, low_gate) = project(&mlp.gate_proj, middle_normed.clone(), None, seed);
    let (up, low_up) = project(&mlp.up_proj, middle_normed.clone(), None, seed);
    let gated = B::gated(gate.clone(), up.clone());
    let (y, low_down) = project(&mlp.down_proj, gated.clone(), Some(middle.clone()), seed);
    let tape = LayerTape {
        x,
        normed,
        raw_q,
        raw_k,
        q,
        k,
        v,
        attended,
        statistics,
        middle,
        middle_normed,
        gate,
        up,
        gated,
        low: [low_q, low_k, low_v, low_o, low_gate, low_up, low_down],
    };
    (y, tape)
}

/// `[b, heads, s, head_dim]` → `[n, heads × head_dim]`.
fn tokens_first<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 2> {
    let [batch, heads, seq, head_dim] = x.dims();
    x.swap_dims(1, 2).reshape([batch * seq, heads * head_dim])
}

fn layer_backward<B: Kernels>(
    layer: &DecoderLayer<B>,
    tape: LayerTape<B>,
    context: &TextContext<B>,
    dy: Tensor<B, 2>,
    grads: &mut AdapterGradients<B>,
) -> Tensor<B, 2> {
    let (attn, mlp) = (&layer.self_attn, &layer.mlp);
    let seed = context.dropout_seed;
    let [low_q, low_k, low_v, low_o, low_gate, low_up, low_down] = tape.low;

    let flowing = project_backward(
        &mlp.down_proj,
        &tape.gated,
        low_down,
        dy.clone(),
        seed,
        grads,
    );
    let dgated = B::input_gradient(&[flowing]);
    let [dgate, dup] = B::gated_backward(tape.gate, tape.up, dgated);
    let x = &tape.middle_normed;
    let flowing = [
        project_backward(&mlp.gate_proj, x, low_gate, dgate, seed, grads),
        project_backward(&mlp.up_proj, x, low_up, dup, seed, grads),
    ];
    let norm = &layer.post_attention_layernorm;
    let dmiddle = B::rms_norm_backward(
        tape.middle,
        norm.weight.val(),
        norm.epsilon(),
        B::input_gradient(&flowing),
        dy,
    );

    let y = tokens_first(tape.attended.clone());
    let flowing = project_backward(&attn.o_proj, &y, low_o, dmiddle.clone(), seed, grads);
    let dattended = attn.split_heads(B::input_gradient(&[flowing]));
    let [dq, dk, dv] = B::span_attention_backward(
        tape.q,
        tape.k,
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
    let x = &tape.normed;
    let flowing = [
        project_backward(&attn.q_proj, x, low_q, dq, seed, grads),
        project_backward(&attn.k_proj, x, low_k, dk, seed, grads),
        project_backward(&attn.v_proj, x, low_v, dv, seed, grads),
    ];
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

/// Runs the language model forward and backward.
///
/// `features` are the merged and the DeepStack features of the batch's images; layers before
/// `first_kept` keep their input only.
pub(super) fn text_pass<B: Kernels>(
    model: &Qwen3Vl<B>,
    batch: &MicroBatch,
    features: &[Tensor<B, 2>],
    context: &TextContext<B>,
    weight: f64,
    first_kept: usize,
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
        if index < first_kept {
            kept.push(Kept::Input(x.clone()));
            x = layer.forward(x, context, None);
        } else {
            let (y, tape) = layer_forward(layer, x, context);
            kept.push(Kept::Tape(Box::new(tape)));
            x = y;
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
            Kept::Input(x) => layer_forward(layer, x, context).1,
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
fn head_pass<B: Kernels>(
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

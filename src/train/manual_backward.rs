//! The manual backward pass of the language model, where only adapters are trained.
//!
//! No graph is recorded: a layer's forward pass keeps what its backward pass needs (see
//! [`tape`](super::tape)), a frozen weight never gets a gradient, and one matmul serves all gradients that
//! meet in one input. Everything is expressed in the operations of [`Ops`], so the same code runs on every
//! backend; tests compare it with autodiff.

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    prelude::*,
    tensor::{DType, IndexingUpdateOp, backend::AutodiffBackend},
};

use super::{
    loss::{LOSS_ROWS, LossSums},
    scores::{TargetWeights, divided, score_targets},
    tape::{LayerRecord, LayerTape, Recorded, Tape, adapter, only_group},
};
use crate::{
    batch::micro_batch::MicroBatch,
    ops::{
        BackwardMatmul, LowRankBackward, Matrix, Ops,
        cast::{to_dtype, to_f32},
    },
    qwen3_vl::{
        ImageFeatures, Qwen3Vl,
        heads::{heads_first, split_heads, tokens_first},
        layer::{DecoderLayer, TextContext, decoder_layers},
        nn::Linear,
        vision::VisionOutput,
    },
    runtime::accelerator::Accelerator,
};

/// Whether the manual backward pass covers everything the language model trains.
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
                && layer.projections().into_iter().all(trains_adapter_only)
        })
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

/// Backward pass of the adapters of some linear layers over one input: records their gradients and
/// returns the matmuls whose sum is the gradient of that input.
///
/// # Shapes
/// - `x`: `[n, in]`, `lows`: `[n, r]` each, `dys`: `[n, out]` each
fn linear_backward<B: Ops, const N: usize>(
    linears: [&Linear<B>; N],
    x: &Tensor<B, 2>,
    lows: [Option<Tensor<B, 2>>; N],
    dys: [Tensor<B, 2>; N],
    seed: Option<u64>,
    grads: &mut AdapterGradients<B>,
) -> Vec<BackwardMatmul<B>> {
    let adapters: Vec<LowRankBackward<B>> = (linears.iter().zip(lows).zip(&dys))
        .filter_map(|((linear, low), dy)| {
            Some(LowRankBackward {
                low: low?,
                dy: dy.clone(),
                adapter: adapter(linear, seed)?,
            })
        })
        .collect();
    let mut gradients = if adapters.is_empty() {
        Vec::new()
    } else {
        B::low_rank_backward(x.clone(), &adapters)
    }
    .into_iter()
    .zip(adapters);
    (linears.iter().zip(dys))
        .map(|(linear, dy)| {
            let weight = linear.weight.operand();
            let low_rank = linear.lora.as_ref().and_then(|lora| {
                let (gradients, backward) = gradients.next()?;
                grads.0.push((lora.lora_a.id, gradients.a));
                grads.0.push((lora.lora_b.id, gradients.b));
                Some((gradients.low, backward.adapter))
            });
            BackwardMatmul {
                dy,
                weight,
                adapter: low_rank,
            }
        })
        .collect()
}

/// Gradients of the adapters' weights computed so far.
struct AdapterGradients<B: Backend>(Vec<(ParamId, Tensor<B, 2>)>);

/// The backward pass of [`decoder_layer`](crate::qwen3_vl::layer::decoder_layer), in reverse order: takes
/// the gradient of the layer's output, returns that of its input, `[n, hidden]` both.
fn layer_backward<B: Ops>(
    layer: &DecoderLayer<B>,
    mut tape: LayerTape<B>,
    context: &TextContext<B>,
    dy: Tensor<B, 2>,
    grads: &mut AdapterGradients<B>,
) -> Tensor<B, 2> {
    let (attn, mlp) = (&layer.self_attn, &layer.mlp);
    let (group, seed) = (only_group(context), context.dropout_seed);
    let pointwise = tape.take_pointwise(layer, context);
    let [low_q, low_k, low_v, low_o, low_gate, low_up, low_down] = tape.low;

    let down = [&mlp.down_proj];
    let mut matmuls = linear_backward(
        down,
        &pointwise.activated,
        [low_down],
        [dy.clone()],
        seed,
        grads,
    );
    let [dgate, dup] = B::swiglu_input_gradient(matmuls.remove(0), tape.gate, tape.up);
    let matmuls = linear_backward(
        [&mlp.gate_proj, &mlp.up_proj],
        &pointwise.middle_normed,
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
        B::input_gradient(&matmuls),
        dy,
    );

    let y = tokens_first(tape.attended.clone());
    let out = [&attn.o_proj];
    let matmuls = linear_backward(out, &y, [low_o], [dmiddle.clone()], seed, grads);
    let dattended = split_heads(B::input_gradient(&matmuls), context.rope.head_dim());
    let [dq, dk, dv] = B::span_attention_backward(
        pointwise.q,
        pointwise.k,
        tape.v,
        tape.attended,
        tape.statistics,
        heads_first(dattended, group.batch),
        &group.spans,
    );
    let rotate_back = |raw: Tensor<B, 3>, norm, gradient: Tensor<B, 4>| {
        let gradient = gradient.swap_dims(1, 2).reshape(raw.dims());
        let (cos, sin) = (context.rope.cos.clone(), context.rope.sin.clone());
        let [tokens, heads, head_dim] = raw.dims();
        B::rotate_heads_backward(raw, Some(norm), cos, sin, gradient)
            .reshape([tokens, heads * head_dim])
    };
    let dq = rotate_back(tape.raw_q, attn.q_norm.of_heads(), dq);
    let dk = rotate_back(tape.raw_k, attn.k_norm.of_heads(), dk);
    let dv = tokens_first(dv);
    let matmuls = linear_backward(
        [&attn.q_proj, &attn.k_proj, &attn.v_proj],
        &pointwise.normed,
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
        B::input_gradient(&matmuls),
        dmiddle,
    )
}

/// Results of the language model's forward and backward pass.
pub(super) struct TextPass<B: Backend> {
    /// Of the adapters of all layers.
    pub grads: GradientsParams,
    /// Loss over the targets.
    pub sums: LossSums<B>,
    /// Gradients of the image features, `[m, hidden]` each: merged first, then DeepStack's.
    pub feature_gradients: Vec<Tensor<B, 2>>,
}

/// Runs the language model forward and backward.
///
/// `vision` holds the features of the batch's images, `[m, hidden]` each.
pub(super) fn text_pass<B: Accelerator>(
    model: &Qwen3Vl<B>,
    batch: &MicroBatch,
    vision: Option<VisionOutput<B>>,
    context: &TextContext<B>,
    weights: TargetWeights<'_>,
    recorded: Recorded,
    device: &B::Device,
) -> TextPass<B> {
    let layers = &model.model.language_model.layers;
    let images = vision.map(|vision| ImageFeatures::new(&batch.text, vision, device));
    let x = model.embed(&batch.text, images.as_ref(), device);
    let mut run = Tape::new(layers, context, images.as_ref(), recorded);
    let output = decoder_layers(&mut run, 0..layers.len(), x);
    let records = run.into_records();

    let (mut gradient, sums) = head_pass(model, batch, output, weights, device);
    let mut grads = AdapterGradients(Vec::new());
    let mut feature_gradients = Vec::new();
    for (index, record) in records.into_iter().enumerate().rev() {
        if let Some(images) = &images
            && index < images.deepstack_layers()
        {
            feature_gradients.push(images.gather(gradient.clone()));
        }
        let tape = match record {
            LayerRecord::Tape(tape) => *tape,
            LayerRecord::Input(x) => Tape::again(layers, context, index, x),
        };
        gradient = layer_backward(&layers[index], tape, context, gradient, &mut grads);
    }
    if let Some(images) = &images {
        feature_gradients.push(images.gather(gradient));
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

/// Norm, head and loss over the target rows only: the gradient of the last layer's output, and the sums.
///
/// # Shapes
/// - `output`: `[n, hidden]`, and so is the gradient
///
/// A loss with one weight a target takes two passes through the head: the log-probabilities decide the weights. Each
/// row of the gradient is linear in its target's weight, so the same kernels serve it.
fn head_pass<B: Accelerator>(
    model: &Qwen3Vl<B>,
    batch: &MicroBatch,
    output: Tensor<B, 2>,
    weights: TargetWeights<'_>,
    device: &B::Device,
) -> (Tensor<B, 2>, LossSums<B>) {
    let norm = &model.model.language_model.norm;
    let head = model.head().operand();
    let targets = batch.targets_with_rows();
    let mut gradient = output.zeros_like();
    let mut sums = Tensor::zeros([2], (device, DType::F32));
    let (weight, temperature, each) = match weights {
        TargetWeights::Same(weight) => (weight, 1.0, None),
        TargetWeights::Each {
            temperature,
            derivative,
        } => {
            let rows = |rows| norm.forward(output.clone().select(0, rows));
            let scores = score_targets(model, &targets, temperature, rows, device);
            let nll: f32 = scores.log_probabilities.iter().map(|log| -log).sum();
            sums = Tensor::from_floats([nll, scores.correct as f32], device);
            (1.0, temperature, Some(derivative(&scores)))
        }
    };
    for (index, piece) in targets.chunks(LOSS_ROWS).enumerate() {
        let rows: Vec<i32> = piece.iter().map(|(row, _)| *row).collect();
        let ids: Vec<i32> = piece.iter().map(|(_, id)| *id).collect();
        let rows = Tensor::<B, 1, Int>::from_ints(rows.as_slice(), device);
        let ids = Tensor::<B, 1, Int>::from_ints(ids.as_slice(), device);
        let x = output.clone().select(0, rows.clone());
        let hidden = divided(norm.forward(x.clone()), temperature);
        let mut loss = match &head {
            Matrix::Dense(head) => B::target_loss(hidden, head.clone(), ids, weight),
            Matrix::Quantised(head) => B::target_loss_quantised(hidden, head, ids, weight),
        };
        match &each {
            None => sums = sums + loss.sums,
            Some(derivatives) => {
                // The kernel's gradient is that of the negative log likelihood, of logits that are divided.
                let own = derivatives[index * LOSS_ROWS..][..piece.len()].iter();
                let own: Vec<f32> = own.map(|one| -one / temperature as f32).collect();
                let own = Tensor::<B, 1>::from_floats(own.as_slice(), device).unsqueeze_dim(1);
                let dtype = loss.hidden_gradient.dtype();
                loss.hidden_gradient = to_dtype(to_f32(loss.hidden_gradient) * own, dtype);
            }
        }
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

/// Whether any parameter of a module is trained.
pub(super) fn is_trained<B: Backend, M: Module<B>>(module: &M) -> bool {
    struct Trained(bool);
    impl<B: Backend> ModuleVisitor<B> for Trained {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.0 |= param.is_require_grad();
        }
    }
    let mut visitor = Trained(false);
    module.visit(&mut visitor);
    visitor.0
}

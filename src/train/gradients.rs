//! Loss and gradients of one micro-batch, with gradient checkpointing as configured.
//!
//! The model is cut into segments of layers. All but the last run first without autodiff, keeping
//! only their inputs; the last runs with autodiff and ends in the loss; then each segment is run
//! again with autodiff, from the back, and seeded with the gradient of what follows. One segment is
//! plain backpropagation, one segment a layer is gradient checkpointing per block. The same is done
//! for the vision tower where it is trained. Where it is frozen, it never sees autodiff.

use std::ops::Range;

use burn::{
    module::{AutodiffModule, ModuleVisitor, Param, ParamId},
    optim::GradientsParams,
    prelude::*,
    tensor::{DType, activation::log_softmax, backend::AutodiffBackend},
};

use super::{
    loss::{LOSS_ROWS, LossSums},
    manual_backward::{self, is_trained},
    scores::{TargetWeights, divided, score_targets},
    tape::Recorded,
};
use crate::{
    batch::{images::ImageInput, micro_batch::MicroBatch},
    ops::{cast::to_dtype, plain::target_sums},
    qwen3_vl::{
        ImageFeatures, Qwen3Vl,
        config::Qwen3VlConfig,
        key_values::KeyValueCache,
        layer::{Eager, TextContext, decoder_layers},
        vision::{VisionLayout, VisionModel, VisionOutput, pixel_tensor},
    },
    runtime::{
        accelerator::{Accelerator, TrainAccelerator},
        vision::encode_images,
    },
};

/// What is recomputed in the backward pass, and what decides the dropout masks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradientOptions {
    /// Recompute each layer of the language model.
    pub checkpoint_text: bool,
    /// Where layers are not recomputed: recompute the results of pointwise operations (norms, rotated
    /// heads, SwiGLU), two fifths of what would be kept.
    pub recompute_pointwise: bool,
    /// Recompute each block of the vision tower, where it is trained.
    pub checkpoint_vision: bool,
    /// Enables dropout and decides its masks.
    pub dropout_seed: Option<u64>,
    /// Where only adapters of the language model's layers are trained: use the manual backward pass, which
    /// records no graph.
    pub manual_backward: bool,
}

impl Default for GradientOptions {
    fn default() -> Self {
        Self {
            checkpoint_text: false,
            recompute_pointwise: false,
            checkpoint_vision: false,
            dropout_seed: None,
            manual_backward: true,
        }
    }
}

/// Adds the gradients of a module's parameters to `into`.
pub fn add_gradients<B: TrainAccelerator, M: AutodiffModule<B>>(
    module: &M,
    mut from: GradientsParams,
    into: &mut GradientsParams,
) {
    struct Adder<'a> {
        from: &'a mut GradientsParams,
        into: &'a mut GradientsParams,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Adder<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let id: ParamId = param.id;
            if let Some(new) = self.from.remove::<B::InnerBackend, D>(id) {
                let sum = match self.into.remove::<B::InnerBackend, D>(id) {
                    Some(old) => old + new,
                    None => new,
                };
                self.into.register(id, sum);
            }
        }
    }
    module.visit(&mut Adder {
        from: &mut from,
        into,
    });
}

/// How many elements of a module's gradients differ between two computations, missing ones included.
pub fn differing_elements<B: TrainAccelerator, M: AutodiffModule<B>>(
    module: &M,
    [first, second]: [&GradientsParams; 2],
) -> u64 {
    struct Compare<'a, B: Backend> {
        pair: [&'a GradientsParams; 2],
        missing: u64,
        differing: Vec<Tensor<B, 1, Int>>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Compare<'_, B::InnerBackend> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            match (self.pair).map(|grads| grads.get::<B::InnerBackend, D>(param.id)) {
                [Some(first), Some(second)] => {
                    self.differing.push(first.not_equal(second).int().sum());
                }
                [None, None] => {}
                _ => self.missing += param.shape().num_elements() as u64,
            }
        }
    }
    let mut compare = Compare::<B::InnerBackend> {
        pair: [first, second],
        missing: 0,
        differing: Vec::new(),
    };
    module.visit(&mut compare);
    let counts = compare.differing;
    let differing: i64 = if counts.is_empty() {
        0
    } else {
        Tensor::cat(counts, 0).into_data().iter::<i64>().sum()
    };
    compare.missing + differing as u64
}

/// Loss and gradients of one micro-batch.
///
/// The loss is the sum of the targets' negative log likelihoods times `weight`; with `weight` one
/// over the targets of the whole accumulation window, the gradients of the micro-batches add up to
/// those of the window's token mean. `inner` is the same model without autodiff.
pub fn gradients<B: TrainAccelerator>(
    model: &Qwen3Vl<B>,
    inner: &Qwen3Vl<B::InnerBackend>,
    config: &Qwen3VlConfig,
    batch: &MicroBatch,
    weight: f64,
    options: &GradientOptions,
    device: &B::Device,
) -> (GradientsParams, LossSums<B::InnerBackend>) {
    let weights = TargetWeights::Same(weight);
    gradients_of(model, inner, config, batch, weights, options, device)
}

/// [`gradients`] of any loss over the log-probabilities of the targets.
pub fn gradients_of<B: TrainAccelerator>(
    model: &Qwen3Vl<B>,
    inner: &Qwen3Vl<B::InnerBackend>,
    config: &Qwen3VlConfig,
    batch: &MicroBatch,
    weights: TargetWeights<'_>,
    options: &GradientOptions,
    device: &B::Device,
) -> (GradientsParams, LossSums<B::InnerBackend>) {
    let mut total = GradientsParams::new();
    let vision = (!batch.images.image_grid_thw.is_empty())
        .then(|| VisionPass::forward(model, inner, config, &batch.images, options, device));

    if options.manual_backward && manual_backward::covers(model) {
        let features = vision.as_ref().map(VisionPass::output);
        let seed = options.dropout_seed;
        let context = TextContext::<B::InnerBackend>::new(&batch.text, config, seed, device);
        let recorded = Recorded::from_flags(options.checkpoint_text, options.recompute_pointwise);
        let pass =
            manual_backward::text_pass(inner, batch, features, &context, weights, recorded, device);
        total = pass.grads;
        if let Some(vision) = vision.filter(VisionPass::is_trained) {
            let gradients = pass.feature_gradients.into_iter().map(Some).collect();
            vision.backward(model, gradients, &mut total);
        }
        return (total, pass.sums);
    }

    // Features enter the language model as leaves, so that the two towers' backward passes can be
    // run one after the other.
    let trains_vision = vision.as_ref().is_some_and(|vision| vision.is_trained());
    let trains_embedding = is_trained(&model.model.language_model.embed_tokens);
    let leaves = vision.as_ref().map(|vision| {
        let leaf = |features: &Tensor<B::InnerBackend, 2>| {
            let features = Tensor::<B, 2>::from_inner(features.clone());
            if trains_vision {
                features.require_grad()
            } else {
                features
            }
        };
        let VisionOutput { merged, deepstack } = &vision.features;
        VisionOutput {
            merged: leaf(merged),
            deepstack: deepstack.iter().map(leaf).collect(),
        }
    });
    let features: Vec<Tensor<B, 2>> = leaves
        .iter()
        .flat_map(|leaves| std::iter::once(&leaves.merged).chain(&leaves.deepstack))
        .cloned()
        .collect();
    let images = leaves.map(|leaves| ImageFeatures::new(&batch.text, leaves, device));
    let needs_input_gradient = trains_vision || trains_embedding;
    let seed = options.dropout_seed;
    let context = TextContext::<B>::new(&batch.text, config, seed, device);
    let layers = &model.model.language_model.layers;
    let segments: Vec<Range<usize>> = if options.checkpoint_text {
        (0..layers.len()).map(|layer| layer..layer + 1).collect()
    } else {
        std::iter::once(0..layers.len()).collect()
    };

    // Forward without autodiff up to the last segment.
    let embedded = model.embed(&batch.text, images.as_ref(), device);
    let mut inputs = vec![embedded.clone().inner()];
    if segments.len() > 1 {
        let context = TextContext::<B::InnerBackend>::new(&batch.text, config, seed, device);
        let features = vision.as_ref().map(VisionPass::output);
        let images = features.map(|features| ImageFeatures::new(&batch.text, features, device));
        let layers = &inner.model.language_model.layers;
        let mut run = Eager::new(
            layers,
            &context,
            images.as_ref(),
            None::<&mut KeyValueCache<_>>,
        );
        for segment in &segments[..segments.len() - 1] {
            let x = inputs[inputs.len() - 1].clone();
            inputs.push(decoder_layers(&mut run, segment.clone(), x));
        }
    }

    // The last segment ends in the loss.
    let mut feature_gradients: Vec<Option<Tensor<B::InnerBackend, 2>>> = vec![None; features.len()];
    let mut collect = |mut tape: B::Gradients, total: &mut GradientsParams| {
        for (feature, gradient) in features.iter().zip(&mut feature_gradients) {
            if let Some(new) = feature.grad_remove(&mut tape) {
                *gradient = Some(match gradient.take() {
                    Some(old) => old + new,
                    None => new,
                });
            }
        }
        add_gradients(model, GradientsParams::from_grads(tape, model), total);
    };
    let mut gradient: Option<Tensor<B::InnerBackend, 2>> = None;
    let mut sums = None;
    for (index, segment) in segments.iter().enumerate().rev() {
        let input = Tensor::<B, 2>::from_inner(inputs[index].clone());
        let input = if index > 0 || needs_input_gradient {
            input.require_grad()
        } else {
            input
        };
        let mut run = Eager::new(
            layers,
            &context,
            images.as_ref(),
            None::<&mut KeyValueCache<_>>,
        );
        let output = decoder_layers(&mut run, segment.clone(), input.clone());
        let objective = match gradient.take() {
            Some(gradient) => (output * Tensor::from_inner(gradient)).sum(),
            None => {
                let hidden = model.norm(output);
                let (objective, loss_sums) =
                    loss_objective(model, inner, batch, hidden, weights, &mut total, device);
                sums = Some(loss_sums);
                objective
            }
        };
        let mut tape = objective.backward();
        gradient = input.grad_remove(&mut tape);
        collect(tape, &mut total);
        inputs.truncate(index);
    }

    // Gradients of the embedding and of the images.
    if let Some(gradient) = gradient.filter(|_| needs_input_gradient) {
        let objective = (embedded * Tensor::from_inner(gradient)).sum();
        collect(objective.backward(), &mut total);
    }
    if let Some(vision) = vision.filter(|_| trains_vision) {
        vision.backward(model, feature_gradients, &mut total);
    }
    let sums = sums.unwrap_or_else(|| LossSums {
        sums: Tensor::zeros([2], (device, DType::F32)),
        targets: 0,
    });
    (total, sums)
}

/// A scalar whose gradient with respect to `hidden` `[n, hidden]` is that of the weighted loss.
///
/// Logits exist for the targets only and some rows at a time: each piece of the loss is
/// backpropagated to the hidden states at once and dropped.
fn loss_objective<B: TrainAccelerator>(
    model: &Qwen3Vl<B>,
    inner: &Qwen3Vl<B::InnerBackend>,
    batch: &MicroBatch,
    hidden: Tensor<B, 2>,
    weights: TargetWeights<'_>,
    total: &mut GradientsParams,
    device: &B::Device,
) -> (Tensor<B, 1>, LossSums<B::InnerBackend>) {
    let targets = batch.targets_with_rows();
    if targets.is_empty() {
        let sums = Tensor::zeros([2], (device, DType::F32));
        return (hidden.sum() * 0.0, LossSums { sums, targets: 0 });
    }
    let rows: Vec<i32> = targets.iter().map(|(row, _)| *row).collect();
    let selected = hidden
        .clone()
        .select(0, Tensor::from_ints(rows.as_slice(), device));
    let mut pieces = Vec::new();
    let mut sums: Option<Tensor<B::InnerBackend, 1>> = None;
    let each = match weights {
        TargetWeights::Same(_) => None,
        TargetWeights::Each {
            temperature,
            derivative,
        } => {
            let plain = hidden.inner();
            let rows = |rows| plain.clone().select(0, rows);
            let scores = score_targets(inner, &targets, temperature, rows, device);
            let nll: f32 = scores.log_probabilities.iter().map(|log| -log).sum();
            let known = [nll, scores.correct as f32];
            sums = Some(Tensor::from_floats(known, device));
            Some((temperature, derivative(&scores)))
        }
    };
    for (index, piece) in targets.chunks(LOSS_ROWS).enumerate() {
        let ids: Vec<i32> = piece.iter().map(|(_, id)| *id).collect();
        let ids = Tensor::<B, 1, Int>::from_ints(ids.as_slice(), device);
        let leaf = selected
            .clone()
            .inner()
            .narrow(0, index * LOSS_ROWS, piece.len());
        let leaf = Tensor::<B, 2>::from_inner(leaf).require_grad();
        if let Some((temperature, derivatives)) = &each {
            let own = &derivatives[index * LOSS_ROWS..][..piece.len()];
            let own = Tensor::<B, 1>::from_floats(own, device);
            let logits = model.logits(divided(leaf.clone(), *temperature));
            let logs = log_softmax(logits, 1).gather(1, ids.unsqueeze_dim(1));
            let mut tape = (logs.squeeze_dim::<1>(1) * own).sum().backward();
            if let Some(gradient) = leaf.grad_remove(&mut tape) {
                pieces.push(gradient);
            }
            add_gradients(model, GradientsParams::from_grads(tape, model), total);
            continue;
        }
        let TargetWeights::Same(weight) = weights else {
            unreachable!("every other loss has derivatives");
        };
        let logits = model.logits(leaf.clone());
        let (nll, correct) = target_sums(&logits, ids);
        let both = Tensor::cat(vec![nll.clone().inner(), correct.inner()], 0);
        sums = Some(match sums {
            Some(sums) => sums + both,
            None => both,
        });
        let mut tape = (nll * weight).backward();
        if let Some(gradient) = leaf.grad_remove(&mut tape) {
            pieces.push(gradient);
        }
        add_gradients(model, GradientsParams::from_grads(tape, model), total);
    }
    let gradient = Tensor::from_inner(Tensor::cat(pieces, 0));
    let sums = LossSums {
        sums: sums.unwrap_or_else(|| Tensor::zeros([2], (device, DType::F32))),
        targets: targets.len(),
    };
    ((selected * gradient).sum(), sums)
}

/// Loss sums of a batch without gradients: for validation.
pub fn evaluate<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    batch: &MicroBatch,
    device: &B::Device,
) -> LossSums<B> {
    let targets = batch.targets_with_rows();
    if targets.is_empty() {
        let sums = Tensor::zeros([2], (device, DType::F32));
        return LossSums { sums, targets: 0 };
    }
    let vision = (!batch.images.image_grid_thw.is_empty())
        .then(|| encode_images(model, &batch.images, config, device));
    let hidden = model.hidden_states(&batch.text, vision.as_ref(), config, None, None, device);
    let mut sums = Tensor::zeros([2], (device, DType::F32));
    for piece in targets.chunks(LOSS_ROWS) {
        let rows: Vec<i32> = piece.iter().map(|(row, _)| *row).collect();
        let ids: Vec<i32> = piece.iter().map(|(_, id)| *id).collect();
        let rows = hidden
            .clone()
            .select(0, Tensor::from_ints(rows.as_slice(), device));
        let (nll, correct) = target_sums(
            &model.logits(rows),
            Tensor::from_ints(ids.as_slice(), device),
        );
        sums = sums + Tensor::cat(vec![nll, correct], 0);
    }
    LossSums {
        sums,
        targets: targets.len(),
    }
}

/// How far the vision tower's backward pass has been prepared.
enum VisionTape<B: AutodiffBackend> {
    /// Frozen: nothing to do.
    Frozen,
    /// The outputs carry their whole graph.
    Graph(Vec<Tensor<B, 2>>),
    /// Inputs of all blocks and of the merger; each block is run again.
    Blocks {
        layout: VisionLayout<B>,
        pixels: Tensor<B, 2>,
        inputs: Vec<Tensor<B::InnerBackend, 2>>,
    },
}

/// The vision tower's forward pass with what its backward pass needs.
struct VisionPass<B: AutodiffBackend> {
    features: VisionOutput<B::InnerBackend>,
    tape: VisionTape<B>,
    dropout_seed: Option<u64>,
}

impl<B: TrainAccelerator> VisionPass<B> {
    fn forward(
        model: &Qwen3Vl<B>,
        inner: &Qwen3Vl<B::InnerBackend>,
        config: &Qwen3VlConfig,
        images: &ImageInput,
        options: &GradientOptions,
        device: &B::Device,
    ) -> Self {
        let vision = &config.vision_config;
        let dropout_seed = options.dropout_seed;
        if !is_trained(&model.model.visual) {
            return Self {
                features: encode_images(inner, images, config, device),
                tape: VisionTape::Frozen,
                dropout_seed,
            };
        }
        let layout = VisionLayout::<B>::new(&images.image_grid_thw, vision, device);
        let pixels = pixel_tensor::<B>(
            images,
            vision.patch_dim(),
            model.model.visual.dtype(),
            device,
        );
        if !options.checkpoint_vision {
            let output = model.model.visual.forward(pixels, &layout, dropout_seed);
            let outputs: Vec<Tensor<B, 2>> = std::iter::once(output.merged)
                .chain(output.deepstack)
                .collect();
            let mut features = outputs.iter().cloned().map(Tensor::inner);
            return Self {
                features: VisionOutput {
                    merged: features
                        .next()
                        .expect("the main merger's output comes first"),
                    deepstack: features.collect(),
                },
                tape: VisionTape::Graph(outputs),
                dropout_seed,
            };
        }
        let inner_layout =
            VisionLayout::<B::InnerBackend>::new(&images.image_grid_thw, vision, device);
        let visual = &inner.model.visual;
        let x = visual.embed(pixels.clone().inner(), &inner_layout);
        let mut inputs = Vec::with_capacity(visual.blocks.len() + 1);
        let keep = |x: &Tensor<_, 2>| inputs.push(x.clone());
        let features = visual.run_blocks(x, &inner_layout, dropout_seed, keep);
        Self {
            features,
            tape: VisionTape::Blocks {
                layout,
                pixels,
                inputs,
            },
            dropout_seed,
        }
    }

    /// Image features for the language model.
    fn output(&self) -> VisionOutput<B::InnerBackend> {
        self.features.clone()
    }

    fn is_trained(&self) -> bool {
        !matches!(self.tape, VisionTape::Frozen)
    }

    fn backward(
        self,
        model: &Qwen3Vl<B>,
        gradients: Vec<Option<Tensor<B::InnerBackend, 2>>>,
        total: &mut GradientsParams,
    ) {
        match self.tape {
            VisionTape::Frozen => {}
            VisionTape::Graph(outputs) => {
                let parts = outputs
                    .into_iter()
                    .zip(gradients)
                    .filter_map(|(output, gradient)| {
                        Some((output * Tensor::from_inner(gradient?)).sum())
                    });
                if let Some(objective) = parts.reduce(|sum, part| sum + part) {
                    let tape = objective.backward();
                    add_gradients(model, GradientsParams::from_grads(tape, model), total);
                }
            }
            VisionTape::Blocks {
                layout,
                pixels,
                inputs,
            } => backward_by_blocks(
                &model.model.visual,
                &layout,
                pixels,
                inputs,
                gradients,
                self.dropout_seed,
                total,
            ),
        }
    }
}

fn backward_by_blocks<B: TrainAccelerator>(
    visual: &VisionModel<B>,
    layout: &VisionLayout<B>,
    pixels: Tensor<B, 2>,
    mut inputs: Vec<Tensor<B::InnerBackend, 2>>,
    mut gradients: Vec<Option<Tensor<B::InnerBackend, 2>>>,
    dropout_seed: Option<u64>,
    total: &mut GradientsParams,
) {
    let seeded = |output: Tensor<B, 2>, gradient: Tensor<B::InnerBackend, 2>| {
        let dtype = output.dtype();
        (output * to_dtype(Tensor::from_inner(gradient), dtype)).sum()
    };
    let (Some(last), Some(Some(merged))) = (inputs.pop(), gradients.first_mut().map(Option::take))
    else {
        return;
    };
    let leaf = Tensor::<B, 2>::from_inner(last).require_grad();
    let mut tape = seeded(visual.merger.forward(leaf.clone(), dropout_seed), merged).backward();
    let mut gradient = leaf.grad_remove(&mut tape);
    add_gradients(visual, GradientsParams::from_grads(tape, visual), total);

    // DeepStack features were collected from front to back; they are taken from the back.
    let mut next_deepstack = gradients.len();
    for (index, block) in visual.blocks.iter().enumerate().rev() {
        let (Some(input), Some(dy)) = (inputs.pop(), gradient.take()) else {
            return;
        };
        let leaf = Tensor::<B, 2>::from_inner(input).require_grad();
        let y = block.forward(leaf.clone(), layout, dropout_seed);
        let mut objective = seeded(y.clone(), dy);
        if let Some(merger) = visual.deepstack_after(index) {
            next_deepstack -= 1;
            if let Some(own) = gradients.get_mut(next_deepstack).and_then(Option::take) {
                objective = objective + seeded(merger.forward(y, dropout_seed), own);
            }
        }
        let mut tape = objective.backward();
        gradient = leaf.grad_remove(&mut tape);
        add_gradients(visual, GradientsParams::from_grads(tape, visual), total);
    }
    if let Some(dy) = gradient {
        let tape = seeded(visual.embed(pixels, layout), dy).backward();
        add_gradients(visual, GradientsParams::from_grads(tape, visual), total);
    }
}

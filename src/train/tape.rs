//! The tape: what the forward pass of decoder layers keeps for the manual backward pass.
//!
//! `Tape` runs the operations of a layer (see [`Executor`]) and records what its backward pass
//! needs. Shape letters: `n` tokens of all sequences.

use burn::prelude::*;

use crate::{
    ops::{LowRank, Ops},
    qwen3_vl::{
        ImageFeatures,
        config::TextConfig,
        heads::{heads_first, split_heads, tokens_first},
        layer::{
            DecoderLayer, Executor, Projection, SequenceGroup, StreamNorm, TextContext,
            decoder_layer,
        },
        nn::{Linear, RmsNorm},
    },
};

/// What the forward pass of a layer keeps for its backward pass; the rest is recomputed there (gradient
/// checkpointing).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// All that is needed.
    Everything,
    /// All but what pointwise operations (norms, rotation, SwiGLU) give from the rest: three fifths.
    Matmuls,
    /// The layer's input: the layer is run again.
    Inputs,
}

impl Recorded {
    /// What two keys of a config ask for: gradient checkpointing of whole layers, or recomputation of
    /// pointwise operations only.
    pub fn from_flags(gradient_checkpointing: bool, recompute_pointwise: bool) -> Self {
        match (gradient_checkpointing, recompute_pointwise) {
            (true, _) => Self::Inputs,
            (false, true) => Self::Matmuls,
            (false, false) => Self::Everything,
        }
    }

    /// Elements a token and layer, low-rank parts and attention's statistics left out: a hundredth.
    pub fn elements_per_token(self, text: &TextConfig) -> usize {
        let (hidden, wide) = (text.hidden_size, text.intermediate_size);
        let queries = text.num_attention_heads * text.head_dim;
        let keys = text.num_key_value_heads * text.head_dim;
        // Layer input and middle, raw queries and attended values, raw keys and values, gate and up.
        let matmuls = 2 * hidden + 2 * queries + 2 * keys + 2 * wide;
        // After both norms, rotated heads, SwiGLU.
        let pointwise = 2 * hidden + queries + keys + wide;
        match self {
            Self::Everything => matmuls + pointwise,
            Self::Matmuls => matmuls,
            Self::Inputs => hidden,
        }
    }
}

/// What the backward pass of one layer needs of its forward pass.
pub(super) struct LayerTape<B: Backend> {
    /// Into the layer, `[n, hidden]`.
    pub x: Tensor<B, 2>,
    /// Projected queries and keys before their norm, `[n, heads, head_dim]`.
    pub raw_q: Tensor<B, 3>,
    pub raw_k: Tensor<B, 3>,
    /// `[b, heads, s, head_dim]`.
    pub v: Tensor<B, 4>,
    pub attended: Tensor<B, 4>,
    pub statistics: Option<Tensor<B, 3>>,
    /// Into the feed-forward block, `[n, hidden]`.
    pub middle: Tensor<B, 2>,
    /// `[n, intermediate]`.
    pub gate: Tensor<B, 2>,
    pub up: Tensor<B, 2>,
    /// `drop(x) Aᵀ` of each projection that has an adapter, in the order of [`Projection::ALL`].
    pub low: [Option<Tensor<B, 2>>; 7],
    /// What is cheap to recompute; `None` where it was dropped.
    pub pointwise: Option<Pointwise<B>>,
}

/// Results of pointwise operations over a [`LayerTape`].
pub(super) struct Pointwise<B: Backend> {
    /// After the first and the second norm, `[n, hidden]`.
    pub normed: Tensor<B, 2>,
    pub middle_normed: Tensor<B, 2>,
    /// Normalised and rotated, `[b, heads, s, head_dim]`.
    pub q: Tensor<B, 4>,
    pub k: Tensor<B, 4>,
    /// `[n, intermediate]`.
    pub activated: Tensor<B, 2>,
}

impl<B: Ops> LayerTape<B> {
    /// The results of pointwise operations, recomputed where they were dropped.
    pub(super) fn take_pointwise(
        &mut self,
        layer: &DecoderLayer<B>,
        context: &TextContext<B>,
    ) -> Pointwise<B> {
        self.pointwise.take().unwrap_or_else(|| {
            let [q, k] = rotated(layer, context, [&self.raw_q, &self.raw_k]);
            Pointwise {
                normed: layer.input_layernorm.forward(self.x.clone()),
                middle_normed: layer.post_attention_layernorm.forward(self.middle.clone()),
                q,
                k,
                activated: B::swiglu(self.gate.clone(), self.up.clone()),
            }
        })
    }
}

/// Queries and keys, normalised and rotated: `[n, heads, head_dim]` → `[b, heads, s, head_dim]`.
fn rotated<B: Ops>(
    layer: &DecoderLayer<B>,
    context: &TextContext<B>,
    [q, k]: [&Tensor<B, 3>; 2],
) -> [Tensor<B, 4>; 2] {
    let attn = &layer.self_attn;
    let batch = only_group(context).batch;
    let rotate = |x: &Tensor<B, 3>, norm: &RmsNorm<B>| {
        let x = context.rope.rotate(x.clone(), Some(norm.of_heads()));
        heads_first(x, batch)
    };
    [rotate(q, &attn.q_norm), rotate(k, &attn.k_norm)]
}

/// The one batch that training computes at once.
pub(super) fn only_group<B: Backend>(context: &TextContext<B>) -> &SequenceGroup<B> {
    assert_eq!(
        context.groups.len(),
        1,
        "training has one group of sequences"
    );
    &context.groups[0]
}

pub(super) fn adapter<B: Ops>(linear: &Linear<B>, seed: Option<u64>) -> Option<LowRank<B>> {
    linear.lora.as_ref().map(|lora| lora.low_rank(seed))
}

/// Runs decoder layers and records them.
pub(super) struct Tape<'a, B: Backend> {
    layers: &'a [DecoderLayer<B>],
    context: &'a TextContext<B>,
    images: Option<&'a ImageFeatures<B>>,
    recorded: Recorded,
    layer: usize,
    /// Whether the layer's last matmul is wanted: no backward pass needs its result.
    wants_output: bool,
    attention: Option<AttentionTape<B>>,
    /// What was recorded of each layer, in order.
    records: Vec<LayerRecord<B>>,
}

/// What is kept of a layer until its backward pass.
pub(super) enum LayerRecord<B: Backend> {
    /// Its input.
    Input(Tensor<B, 2>),
    /// Its tape.
    Tape(Box<LayerTape<B>>),
}

impl<'a, B: Ops> Tape<'a, B> {
    pub(super) fn new(
        layers: &'a [DecoderLayer<B>],
        context: &'a TextContext<B>,
        images: Option<&'a ImageFeatures<B>>,
        recorded: Recorded,
    ) -> Self {
        Self {
            layers,
            context,
            images,
            recorded,
            layer: 0,
            wants_output: true,
            attention: None,
            records: Vec::with_capacity(layers.len()),
        }
    }

    /// What was recorded, one entry a layer.
    pub(super) fn into_records(self) -> Vec<LayerRecord<B>> {
        self.records
    }

    /// The tape of a layer of which its input `x` was kept.
    pub(super) fn again(
        layers: &'a [DecoderLayer<B>],
        context: &'a TextContext<B>,
        layer: usize,
        x: Tensor<B, 2>,
    ) -> LayerTape<B> {
        let mut run = Self::new(layers, context, None, Recorded::Everything);
        run.wants_output = false;
        run.enter(layer);
        decoder_layer(&mut run, x);
        match run.records.pop() {
            Some(LayerRecord::Tape(tape)) => *tape,
            _ => unreachable!("everything is recorded of a layer that is run again"),
        }
    }

    fn weights(&self) -> &'a DecoderLayer<B> {
        &self.layers[self.layer]
    }

    /// `drop(x) Aᵀ` `[n, r]` of some projections over one input `[n, in]`, where they have adapters.
    fn low_rank<const N: usize>(
        &self,
        projections: [Projection; N],
        x: &Tensor<B, 2>,
    ) -> [Option<Tensor<B, 2>>; N] {
        let seed = self.context.dropout_seed;
        let adapters =
            projections.map(|projection| adapter(self.weights().projection(projection), seed));
        let present: Vec<_> = adapters.iter().flatten().collect();
        let mut lows = if present.is_empty() {
            Vec::new()
        } else {
            B::low_rank_inputs(x.clone(), &present)
        }
        .into_iter();
        adapters.map(|adapter| adapter.and_then(|_| lows.next()))
    }

    /// A projection's result: `[n, in]` → `[n, out]`; `low` is its part of [`Self::low_rank`].
    fn project(
        &self,
        projection: Projection,
        x: Tensor<B, 2>,
        low: Option<&Tensor<B, 2>>,
        residual: Option<Tensor<B, 2>>,
    ) -> Tensor<B, 2> {
        let linear = self.weights().projection(projection);
        let weight = &linear.weight;
        let bias = linear.bias.as_ref().map(|bias| bias.val());
        let (Some(low), Some(adapter)) = (low, adapter(linear, None)) else {
            return weight.linear(x, bias, residual);
        };
        let y = weight.adapted_linear_for_backward(x, low.clone(), &adapter, residual);
        match bias {
            Some(bias) => y + bias.unsqueeze(),
            None => y,
        }
    }
}

/// A norm's input and output.
pub(super) struct Normed<B: Backend> {
    x: Tensor<B, 2>,
    normed: Tensor<B, 2>,
}

pub(super) struct Projected<B: Backend> {
    input: Normed<B>,
    raw_q: Tensor<B, 3>,
    raw_k: Tensor<B, 3>,
    v: Tensor<B, 4>,
    low: [Option<Tensor<B, 2>>; 3],
}

pub(super) struct Rotated<B: Backend> {
    projected: Projected<B>,
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
}

pub(super) struct Attended<B: Backend> {
    rotated: Rotated<B>,
    attended: Tensor<B, 4>,
    statistics: Option<Tensor<B, 3>>,
}

/// All of the attention block.
struct AttentionTape<B: Backend> {
    attended: Attended<B>,
    low_output: Option<Tensor<B, 2>>,
}

pub(super) struct Activated<B: Backend> {
    input: Normed<B>,
    gate: Tensor<B, 2>,
    up: Tensor<B, 2>,
    activated: Tensor<B, 2>,
    low: [Option<Tensor<B, 2>>; 2],
}

impl<B: Ops> Executor for Tape<'_, B> {
    type Hidden = Tensor<B, 2>;
    type Normed = Normed<B>;
    type Projected = Projected<B>;
    type Rotated = Rotated<B>;
    type Attended = Attended<B>;
    type Activated = Activated<B>;

    fn enter(&mut self, layer: usize) {
        self.layer = layer;
    }

    fn norm(&mut self, norm: StreamNorm, x: &Tensor<B, 2>) -> Normed<B> {
        Normed {
            x: x.clone(),
            normed: self.weights().norm(norm).forward(x.clone()),
        }
    }

    fn project_heads(&mut self, input: Normed<B>) -> Projected<B> {
        let (context, x) = (self.context, &input.normed);
        let low = self.low_rank([Projection::Query, Projection::Key, Projection::Value], x);
        let heads = |projection, low: &Option<_>| {
            let y = self.project(projection, x.clone(), low.as_ref(), None);
            split_heads(y, context.rope.head_dim())
        };
        let raw_q = heads(Projection::Query, &low[0]);
        let raw_k = heads(Projection::Key, &low[1]);
        let v = heads(Projection::Value, &low[2]);
        Projected {
            raw_q,
            raw_k,
            v: heads_first(v, only_group(context).batch),
            low,
            input,
        }
    }

    fn rotate(&mut self, projected: Projected<B>) -> Rotated<B> {
        let raw = [&projected.raw_q, &projected.raw_k];
        let [q, k] = rotated(self.weights(), self.context, raw);
        Rotated { projected, q, k }
    }

    fn attend(&mut self, rotated: Rotated<B>) -> Attended<B> {
        let (q, k, v) = (&rotated.q, &rotated.k, &rotated.projected.v);
        let spans = &only_group(self.context).spans;
        let (attended, statistics) =
            B::span_attention_for_backward(q.clone(), k.clone(), v.clone(), spans);
        Attended {
            rotated,
            attended,
            statistics,
        }
    }

    fn project_attended(&mut self, attended: Attended<B>, residual: Tensor<B, 2>) -> Tensor<B, 2> {
        let y = tokens_first(attended.attended.clone());
        let [low_output] = self.low_rank([Projection::Output], &y);
        let middle = self.project(Projection::Output, y, low_output.as_ref(), Some(residual));
        self.attention = Some(AttentionTape {
            attended,
            low_output,
        });
        middle
    }

    fn swiglu(&mut self, input: Normed<B>) -> Activated<B> {
        let x = &input.normed;
        let low = self.low_rank([Projection::Gate, Projection::Up], x);
        let gate = self.project(Projection::Gate, x.clone(), low[0].as_ref(), None);
        let up = self.project(Projection::Up, x.clone(), low[1].as_ref(), None);
        Activated {
            activated: B::swiglu(gate.clone(), up.clone()),
            gate,
            up,
            low,
            input,
        }
    }

    fn project_down(&mut self, block: Activated<B>, residual: Tensor<B, 2>) -> Tensor<B, 2> {
        let [low_down] = self.low_rank([Projection::Down], &block.activated);
        let output = if self.wants_output {
            let (y, low) = (block.activated.clone(), low_down.as_ref());
            self.project(Projection::Down, y, low, Some(residual))
        } else {
            residual
        };
        let attention = self.attention.take();
        let attention = attention.expect("attention comes before the feed-forward block");
        let Attended {
            rotated,
            attended,
            statistics,
        } = attention.attended;
        let Projected {
            input,
            raw_q,
            raw_k,
            v,
            low: [low_q, low_k, low_v],
        } = rotated.projected;
        // The last layer's backward pass comes next.
        let last = self.layer + 1 == self.layers.len();
        self.records.push(match self.recorded {
            Recorded::Inputs if !last => LayerRecord::Input(input.x),
            recorded => {
                let [low_gate, low_up] = block.low;
                let low_output = attention.low_output;
                let pointwise = Pointwise {
                    normed: input.normed,
                    middle_normed: block.input.normed,
                    q: rotated.q,
                    k: rotated.k,
                    activated: block.activated,
                };
                LayerRecord::Tape(Box::new(LayerTape {
                    x: input.x,
                    raw_q,
                    raw_k,
                    v,
                    attended,
                    statistics,
                    middle: block.input.x,
                    gate: block.gate,
                    up: block.up,
                    low: [low_q, low_k, low_v, low_output, low_gate, low_up, low_down],
                    pointwise: (recorded != Recorded::Matmuls || last).then_some(pointwise),
                }))
            }
        });
        output
    }

    fn add_deepstack(&mut self, layer: usize, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.images {
            Some(images) => images.add_deepstack(layer, x),
            None => x,
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::{
        batch::text::{Padding, TextInput},
        qwen3_vl::{Qwen3Vl, layer::decoder_layers, nn::InitOptions},
        runtime::synthetic::weights::RandomSize,
    };
    use burn_flex::Flex;

    /// The memory planner counts the elements that a tape holds.
    #[test]
    fn a_tape_holds_the_elements_that_are_planned() {
        let config = RandomSize::Tiny.config(Some(2)).unwrap();
        let device = Default::default();
        let model = Qwen3Vl::<Flex>::new(&config, &InitOptions::default(), &device);
        let rows = vec![vec![1, 2, 3, 4, 5], vec![6, 7, 8]];
        let grids = vec![vec![], vec![]];
        let (input, _) = TextInput::padded(&rows, &grids, &config, Padding::Right, 0).unwrap();
        let context = TextContext::new(&input, &config, None, &device);
        let layers = &model.model.language_model.layers;
        for recorded in [Recorded::Everything, Recorded::Matmuls, Recorded::Inputs] {
            let mut run = Tape::new(layers, &context, None, recorded);
            let x = model.embed(&input, None, &device);
            decoder_layers(&mut run, 0..layers.len(), x);
            let first = run.into_records().remove(0);
            let elements = match first {
                LayerRecord::Input(x) => x.shape().num_elements(),
                LayerRecord::Tape(tape) => {
                    let count = |shapes: &[burn::tensor::Shape]| -> usize {
                        shapes.iter().map(|shape| shape.num_elements()).sum()
                    };
                    let matmuls = count(&[
                        tape.x.shape(),
                        tape.raw_q.shape(),
                        tape.raw_k.shape(),
                        tape.v.shape(),
                        tape.attended.shape(),
                        tape.middle.shape(),
                        tape.gate.shape(),
                        tape.up.shape(),
                    ]);
                    let pointwise = tape.pointwise.as_ref().map_or(0, |one| {
                        count(&[
                            one.normed.shape(),
                            one.middle_normed.shape(),
                            one.q.shape(),
                            one.k.shape(),
                            one.activated.shape(),
                        ])
                    });
                    matmuls + pointwise
                }
            };
            let tokens = input.batch() * input.seq();
            let planned = recorded.elements_per_token(&config.text_config) * tokens;
            assert_eq!(elements, planned, "{recorded:?}");
        }
    }
}

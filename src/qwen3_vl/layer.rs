//! A decoder layer: its weights, and the only description of what happens in which order.
//!
//! [`decoder_layer`] gives the order. An [`Executor`] runs it: [`Eager`] with operations of the
//! backend, the training tape with a record for the backward pass, the decoders of CUDA and cubecl with
//! fused kernels. Shape letters: `n` tokens of all sequences.

use std::ops::Range;

use burn::prelude::*;

use super::{
    config::{Qwen3VlConfig, TextConfig},
    heads::{heads_first, split_heads, tokens_first},
    image_features::ImageFeatures,
    key_values::KeyValues,
    nn::{InitOptions, Linear, RmsNorm},
    rope::RopeTables,
};
use crate::{
    batch::text::TextInput,
    ops::{AttentionSpans, Ops},
};

/// Runs the operations of decoder layers, one layer after another.
///
/// The associated types are what an operation passes to the next: tensors where everything is computed
/// at once, less where an executor fuses operations.
pub trait Executor {
    /// The residual stream, `[n, hidden]`.
    type Hidden;
    /// The stream after a norm, `[n, hidden]`.
    type Normed;
    /// Projected queries, keys and values, `[n, heads, head_dim]` each.
    type Projected;
    /// The same with queries and keys normalised and rotated.
    type Rotated;
    /// Output of attention, `[n, heads × head_dim]`.
    type Attended;
    /// Inside the feed-forward block, `[n, intermediate]`.
    type Activated;

    /// Enters the layer of this index: what follows uses its weights.
    fn enter(&mut self, layer: usize);

    /// RMS norm of the residual stream.
    fn norm(&mut self, norm: StreamNorm, x: &Self::Hidden) -> Self::Normed;

    /// `q_proj`, `k_proj` and `v_proj`.
    fn project_heads(&mut self, x: Self::Normed) -> Self::Projected;

    /// `q_norm` and `k_norm` of each head, then rotation: the checkpoint was trained in this order.
    fn rotate(&mut self, heads: Self::Projected) -> Self::Rotated;

    /// Attention over these keys and values and the cached ones before them.
    fn attend(&mut self, heads: Self::Rotated) -> Self::Attended;

    /// `o_proj`, plus the residual.
    fn project_attended(&mut self, y: Self::Attended, residual: Self::Hidden) -> Self::Hidden;

    /// SwiGLU: `silu(gate_proj(x)) · up_proj(x)`.
    fn swiglu(&mut self, x: Self::Normed) -> Self::Activated;

    /// `down_proj`, plus the residual.
    fn project_down(&mut self, y: Self::Activated, residual: Self::Hidden) -> Self::Hidden;

    /// Adds the image features that belong after this layer, where there are any.
    fn add_deepstack(&mut self, _layer: usize, x: Self::Hidden) -> Self::Hidden {
        x
    }
}

/// The norms of a layer over the whole stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamNorm {
    /// `input_layernorm`, before attention.
    Input,
    /// `post_attention_layernorm`, before the feed-forward block.
    PostAttention,
}

/// One layer: pre-norm attention and pre-norm SwiGLU, both with a residual.
///
/// Source: `Qwen3VLTextDecoderLayer`, transformers, `modeling_qwen3_vl.py`.
pub fn decoder_layer<E: Executor>(run: &mut E, x: E::Hidden) -> E::Hidden {
    let h = run.norm(StreamNorm::Input, &x);
    let heads = run.project_heads(h);
    let heads = run.rotate(heads);
    let y = run.attend(heads);
    let x = run.project_attended(y, x);

    let h = run.norm(StreamNorm::PostAttention, &x);
    let y = run.swiglu(h);
    run.project_down(y, x)
}

/// Consecutive layers with the image features (DeepStack) that belong after them.
pub fn decoder_layers<E: Executor>(
    run: &mut E,
    layers: Range<usize>,
    mut x: E::Hidden,
) -> E::Hidden {
    for layer in layers {
        run.enter(layer);
        x = decoder_layer(run, x);
        x = run.add_deepstack(layer, x);
    }
    x
}

/// The linear layers of a decoder layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Projection {
    /// Queries.
    Query,
    /// Keys.
    Key,
    /// Values.
    Value,
    /// Attention's output.
    Output,
    /// `gate_proj`: the input of SiLU.
    Gate,
    /// `up_proj`: what the activated gate is multiplied with.
    Up,
    /// `down_proj`: back to the residual stream.
    Down,
}

impl Projection {
    /// All, in the order in which a step uses them; adapters are numbered so.
    pub const ALL: [Self; 7] = [
        Self::Query,
        Self::Key,
        Self::Value,
        Self::Output,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// Path in the layer, as in the checkpoint.
    pub fn path(self) -> &'static str {
        match self {
            Self::Query => "self_attn.q_proj",
            Self::Key => "self_attn.k_proj",
            Self::Value => "self_attn.v_proj",
            Self::Output => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Name without the module it is in.
    pub fn name(self) -> &'static str {
        let path = self.path();
        path.rsplit_once('.').map_or(path, |(_, name)| name)
    }

    /// `[out, in]`.
    pub fn shape(self, text: &TextConfig) -> [usize; 2] {
        let (hidden, wide) = (text.hidden_size, text.intermediate_size);
        let queries = text.num_attention_heads * text.head_dim;
        let keys = text.num_key_value_heads * text.head_dim;
        match self {
            Self::Query => [queries, hidden],
            Self::Key | Self::Value => [keys, hidden],
            Self::Output => [hidden, queries],
            Self::Gate | Self::Up => [wide, hidden],
            Self::Down => [hidden, wide],
        }
    }
}

/// Weights of grouped-query self-attention with normalised, rotated heads.
///
/// Source: `Qwen3VLTextAttention`, transformers, `modeling_qwen3_vl.py`.
#[derive(Module, Debug)]
pub struct TextAttention<B: Backend> {
    /// Queries.
    pub q_proj: Linear<B>,
    /// Keys.
    pub k_proj: Linear<B>,
    /// Values.
    pub v_proj: Linear<B>,
    /// Output.
    pub o_proj: Linear<B>,
    /// Norm of each query head.
    pub q_norm: RmsNorm<B>,
    /// Norm of each key head.
    pub k_norm: RmsNorm<B>,
}

/// Weights of the feed-forward block.
///
/// Source: `Qwen3VLTextMLP`, transformers, `modeling_qwen3_vl.py`.
#[derive(Module, Debug)]
pub struct TextMlp<B: Backend> {
    /// `gate_proj`: the input of SiLU.
    pub gate_proj: Linear<B>,
    /// `up_proj`: what the activated gate is multiplied with.
    pub up_proj: Linear<B>,
    /// `down_proj`: back to the residual stream.
    pub down_proj: Linear<B>,
}

/// Weights of one layer.
#[derive(Module, Debug)]
pub struct DecoderLayer<B: Backend> {
    /// Attention.
    pub self_attn: TextAttention<B>,
    /// Feed-forward block.
    pub mlp: TextMlp<B>,
    /// Before attention.
    pub input_layernorm: RmsNorm<B>,
    /// Before the feed-forward block.
    pub post_attention_layernorm: RmsNorm<B>,
}

impl<B: Ops> DecoderLayer<B> {
    pub(super) fn new(config: &TextConfig, options: &InitOptions, device: &B::Device) -> Self {
        let linear = |projection: Projection, bias| {
            let [d_output, d_input] = projection.shape(config);
            Linear::new(d_input, d_output, bias, options, device)
        };
        let norm = |width| RmsNorm::new(width, config.rms_norm_eps, options, device);
        let bias = config.attention_bias;
        Self {
            self_attn: TextAttention {
                q_proj: linear(Projection::Query, bias),
                k_proj: linear(Projection::Key, bias),
                v_proj: linear(Projection::Value, bias),
                o_proj: linear(Projection::Output, bias),
                q_norm: norm(config.head_dim),
                k_norm: norm(config.head_dim),
            },
            mlp: TextMlp {
                gate_proj: linear(Projection::Gate, false),
                up_proj: linear(Projection::Up, false),
                down_proj: linear(Projection::Down, false),
            },
            input_layernorm: norm(config.hidden_size),
            post_attention_layernorm: norm(config.hidden_size),
        }
    }
}

impl<B: Backend> DecoderLayer<B> {
    /// A linear layer.
    pub fn projection(&self, projection: Projection) -> &Linear<B> {
        let (attn, mlp) = (&self.self_attn, &self.mlp);
        match projection {
            Projection::Query => &attn.q_proj,
            Projection::Key => &attn.k_proj,
            Projection::Value => &attn.v_proj,
            Projection::Output => &attn.o_proj,
            Projection::Gate => &mlp.gate_proj,
            Projection::Up => &mlp.up_proj,
            Projection::Down => &mlp.down_proj,
        }
    }

    /// All linear layers to be replaced, in the order of [`Projection::ALL`].
    pub fn projections_mut(&mut self) -> [&mut Linear<B>; 7] {
        let (attn, mlp) = (&mut self.self_attn, &mut self.mlp);
        [
            &mut attn.q_proj,
            &mut attn.k_proj,
            &mut attn.v_proj,
            &mut attn.o_proj,
            &mut mlp.gate_proj,
            &mut mlp.up_proj,
            &mut mlp.down_proj,
        ]
    }

    /// All linear layers, in the order of [`Projection::ALL`].
    pub fn projections(&self) -> [&Linear<B>; 7] {
        Projection::ALL.map(|projection| self.projection(projection))
    }

    /// The layer with every linear layer replaced.
    pub fn map_projections(self, mut replace: impl FnMut(Linear<B>) -> Linear<B>) -> Self {
        let (attn, mlp) = (self.self_attn, self.mlp);
        Self {
            self_attn: TextAttention {
                q_proj: replace(attn.q_proj),
                k_proj: replace(attn.k_proj),
                v_proj: replace(attn.v_proj),
                o_proj: replace(attn.o_proj),
                ..attn
            },
            mlp: TextMlp {
                gate_proj: replace(mlp.gate_proj),
                up_proj: replace(mlp.up_proj),
                down_proj: replace(mlp.down_proj),
            },
            ..self
        }
    }

    /// A norm of the whole stream.
    pub fn norm(&self, norm: StreamNorm) -> &RmsNorm<B> {
        match norm {
            StreamNorm::Input => &self.input_layernorm,
            StreamNorm::PostAttention => &self.post_attention_layernorm,
        }
    }
}

/// Sequences of one length whose attention is computed together.
#[derive(Debug, Clone)]
pub struct SequenceGroup<B: Backend> {
    /// Number of sequences.
    pub batch: usize,
    /// Their tokens among all, sequence after sequence.
    pub tokens: Range<usize>,
    /// Which keys each query sees.
    pub spans: AttentionSpans<B>,
}

impl<B: Backend> SequenceGroup<B> {
    /// The group's tokens, sequence by sequence.
    ///
    /// # Shapes
    /// - `x`: `[n, heads, head_dim]`
    /// - returns: `[batch, heads, seq, head_dim]`
    pub fn heads_first(&self, x: &Tensor<B, 3>) -> Tensor<B, 4> {
        let [tokens, ..] = x.dims();
        let x = x.clone();
        let own = if self.tokens == (0..tokens) {
            x
        } else {
            x.narrow(0, self.tokens.start, self.tokens.len())
        };
        heads_first(own, self.batch)
    }
}

/// What every layer needs besides the hidden states: rotary tables, masks, dropout seed.
#[derive(Debug, Clone)]
pub struct TextContext<B: Backend> {
    /// Rotary tables, `[n, head_dim]`.
    pub rope: RopeTables<B>,
    /// Groups of sequences that cover all tokens.
    pub groups: Vec<SequenceGroup<B>>,
    /// Enables the adapters' dropout and decides its masks.
    pub dropout_seed: Option<u64>,
}

impl<B: Ops> TextContext<B> {
    /// For one batch without a KV cache.
    pub fn new(
        input: &TextInput,
        config: &Qwen3VlConfig,
        dropout_seed: Option<u64>,
        device: &B::Device,
    ) -> Self {
        let spans = AttentionSpans::causal(&input.segments, 0, device);
        Self::with_spans(input, spans, config, dropout_seed, device)
    }

    /// For one batch; `spans` says which cached and which new keys are seen.
    pub fn with_spans(
        input: &TextInput,
        spans: AttentionSpans<B>,
        config: &Qwen3VlConfig,
        dropout_seed: Option<u64>,
        device: &B::Device,
    ) -> Self {
        Self {
            rope: RopeTables::text(&input.positions, &config.text_config, device),
            groups: vec![SequenceGroup {
                batch: input.batch(),
                tokens: 0..input.batch() * input.seq(),
                spans,
            }],
            dropout_seed,
        }
    }
}

/// Computes each operation at once, on any backend, under autodiff as well.
#[derive(Debug)]
pub struct Eager<'a, B: Backend, K> {
    layers: &'a [DecoderLayer<B>],
    head_dim: usize,
    context: &'a TextContext<B>,
    images: Option<&'a ImageFeatures<B>>,
    key_values: K,
    layer: usize,
}

impl<'a, B: Ops, K: KeyValues<B>> Eager<'a, B, K> {
    /// Runs some layers; `images` are added after the layers they belong to.
    pub fn new(
        layers: &'a [DecoderLayer<B>],
        context: &'a TextContext<B>,
        images: Option<&'a ImageFeatures<B>>,
        key_values: K,
    ) -> Self {
        let head_dim = context.rope.head_dim();
        Self {
            layers,
            head_dim,
            context,
            images,
            key_values,
            layer: 0,
        }
    }

    fn weights(&self) -> &'a DecoderLayer<B> {
        &self.layers[self.layer]
    }

    fn project(&self, projection: Projection, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let linear = self.weights().projection(projection);
        linear.forward(x, self.context.dropout_seed)
    }

    fn project_add(
        &self,
        projection: Projection,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
    ) -> Tensor<B, 2> {
        let linear = self.weights().projection(projection);
        linear.forward_add(x, residual, self.context.dropout_seed)
    }
}

impl<B: Ops, K: KeyValues<B>> Executor for Eager<'_, B, K> {
    type Hidden = Tensor<B, 2>;
    type Normed = Tensor<B, 2>;
    type Projected = [Tensor<B, 3>; 3];
    type Rotated = [Tensor<B, 3>; 3];
    type Attended = Tensor<B, 2>;
    type Activated = Tensor<B, 2>;

    fn enter(&mut self, layer: usize) {
        self.layer = layer;
    }

    fn norm(&mut self, norm: StreamNorm, x: &Tensor<B, 2>) -> Tensor<B, 2> {
        self.weights().norm(norm).forward(x.clone())
    }

    fn project_heads(&mut self, x: Tensor<B, 2>) -> [Tensor<B, 3>; 3] {
        [Projection::Query, Projection::Key, Projection::Value]
            .map(|projection| split_heads(self.project(projection, x.clone()), self.head_dim))
    }

    fn rotate(&mut self, [q, k, v]: [Tensor<B, 3>; 3]) -> [Tensor<B, 3>; 3] {
        let attn = &self.weights().self_attn;
        let rotate = |x, norm: &RmsNorm<B>| self.context.rope.rotate(x, Some(norm.of_heads()));
        [rotate(q, &attn.q_norm), rotate(k, &attn.k_norm), v]
    }

    fn attend(&mut self, heads: [Tensor<B, 3>; 3]) -> Tensor<B, 2> {
        let groups = &self.context.groups;
        let mut parts = Vec::with_capacity(groups.len());
        for (index, group) in groups.iter().enumerate() {
            let [q, k, v] = heads.each_ref().map(|x| group.heads_first(x));
            let (k, v) = self.key_values.append(index, self.layer, k, v);
            parts.push(tokens_first(B::span_attention(q, k, v, &group.spans)));
        }
        if parts.len() == 1 {
            parts.remove(0)
        } else {
            Tensor::cat(parts, 0)
        }
    }

    fn project_attended(&mut self, y: Tensor<B, 2>, residual: Tensor<B, 2>) -> Tensor<B, 2> {
        self.project_add(Projection::Output, y, residual)
    }

    fn swiglu(&mut self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let gate = self.project(Projection::Gate, x.clone());
        let up = self.project(Projection::Up, x);
        B::swiglu(gate, up)
    }

    fn project_down(&mut self, y: Tensor<B, 2>, residual: Tensor<B, 2>) -> Tensor<B, 2> {
        self.project_add(Projection::Down, y, residual)
    }

    fn add_deepstack(&mut self, layer: usize, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.images {
            Some(images) => images.add_deepstack(layer, x),
            None => x,
        }
    }
}

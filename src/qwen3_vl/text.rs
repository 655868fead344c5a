//! The language model without its head: token vectors in, hidden states out.
//!
//! Shape letters: `b` sequences of `s` tokens, flattened to `n = b × s` rows.

use crate::{
    batch::text::TextInput,
    ops::{AttentionSpans, Ops},
};
use burn::prelude::*;

use super::{
    cache::LayerCache,
    config::{Qwen3VlConfig, TextConfig},
    nn::{Embedding, InitOptions, Linear, RmsNorm},
    rope::RopeTables,
};

/// What every layer needs to know about the tokens at hand.
#[derive(Debug, Clone)]
pub struct TextContext<B: Backend> {
    /// Number of sequences.
    pub batch: usize,
    /// Rotary tables, `[n, head_dim]`.
    pub rope: RopeTables<B>,
    /// Which keys each query sees.
    pub spans: AttentionSpans<B>,
    /// Turns the adapters' dropout on and decides its masks.
    pub dropout_seed: Option<u64>,
}

impl<B: Ops> TextContext<B> {
    /// What the layers need when nothing is cached.
    pub fn new(
        input: &TextInput,
        config: &Qwen3VlConfig,
        dropout_seed: Option<u64>,
        device: &B::Device,
    ) -> Self {
        Self {
            batch: input.batch(),
            rope: RopeTables::text(&input.positions, &config.text_config, device),
            spans: AttentionSpans::causal(&input.segments, 0, device),
            dropout_seed,
        }
    }
}

/// Grouped-query self-attention with normalised, rotated heads.
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
    head_dim: usize,
}

impl<B: Ops> TextAttention<B> {
    fn new(config: &TextConfig, options: &InitOptions, device: &B::Device) -> Self {
        let heads = |heads: usize| heads * config.head_dim;
        let linear = |from, to| Linear::new(from, to, config.attention_bias, options, device);
        let norm = || RmsNorm::new(config.head_dim, config.rms_norm_eps, options, device);
        Self {
            q_proj: linear(config.hidden_size, heads(config.num_attention_heads)),
            k_proj: linear(config.hidden_size, heads(config.num_key_value_heads)),
            v_proj: linear(config.hidden_size, heads(config.num_key_value_heads)),
            o_proj: linear(heads(config.num_attention_heads), config.hidden_size),
            q_norm: norm(),
            k_norm: norm(),
            head_dim: config.head_dim,
        }
    }

    /// `[n, hidden]` → `[n, hidden]`, plus `residual`; with a cache the keys seen are the cached
    /// ones and these.
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
        context: &TextContext<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Tensor<B, 2> {
        let [tokens, _] = x.dims();
        let seed = context.dropout_seed;
        // Normalised per head and before rotation: the checkpoint was trained in this order.
        let q = self.q_proj.forward(x.clone(), seed);
        let q = context
            .rope
            .rotate(self.split_heads(q), Some(self.q_norm.of_heads()));
        let k = self.k_proj.forward(x.clone(), seed);
        let k = context
            .rope
            .rotate(self.split_heads(k), Some(self.k_norm.of_heads()));
        let v = self.split_heads(self.v_proj.forward(x, seed));
        let [q, k, v] = [q, k, v].map(|x| heads_first(x, context.batch));
        let (k, v) = match cache {
            Some(cache) => cache.append(k, v),
            None => (k, v),
        };
        let y = B::span_attention(q, k, v, &context.spans);
        let y = y.swap_dims(1, 2).reshape([tokens as i32, -1]);
        self.o_proj.forward_add(y, residual, seed)
    }

    /// `[n, heads × head_dim]` → `[n, heads, head_dim]`.
    pub fn split_heads(&self, x: Tensor<B, 2>) -> Tensor<B, 3> {
        let [tokens, width] = x.dims();
        x.reshape([tokens, width / self.head_dim, self.head_dim])
    }
}

/// `[batch × seq, heads, head_dim]` → `[batch, heads, seq, head_dim]`.
pub fn heads_first<B: Backend>(x: Tensor<B, 3>, batch: usize) -> Tensor<B, 4> {
    let [tokens, heads, head_dim] = x.dims();
    x.reshape([batch, tokens / batch, heads, head_dim])
        .swap_dims(1, 2)
}

/// Gated feed-forward block: `down(silu(gate(x)) * up(x))`.
///
/// Source: `Qwen3VLTextMLP`, transformers, `modeling_qwen3_vl.py`.
#[derive(Module, Debug)]
pub struct TextMlp<B: Backend> {
    /// Gate.
    pub gate_proj: Linear<B>,
    /// What is gated.
    pub up_proj: Linear<B>,
    /// Back to the residual stream.
    pub down_proj: Linear<B>,
}

impl<B: Ops> TextMlp<B> {
    /// `[n, hidden]` → `[n, hidden]`, plus `residual`.
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
        dropout_seed: Option<u64>,
    ) -> Tensor<B, 2> {
        let gate = self.gate_proj.forward(x.clone(), dropout_seed);
        let up = self.up_proj.forward(x, dropout_seed);
        self.down_proj
            .forward_add(B::gated(gate, up), residual, dropout_seed)
    }
}

/// One layer: pre-norm attention and feed-forward, both with a residual.
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
    fn new(config: &TextConfig, options: &InitOptions, device: &B::Device) -> Self {
        let linear = |from, to| Linear::new(from, to, false, options, device);
        let norm = || RmsNorm::new(config.hidden_size, config.rms_norm_eps, options, device);
        Self {
            self_attn: TextAttention::new(config, options, device),
            mlp: TextMlp {
                gate_proj: linear(config.hidden_size, config.intermediate_size),
                up_proj: linear(config.hidden_size, config.intermediate_size),
                down_proj: linear(config.intermediate_size, config.hidden_size),
            },
            input_layernorm: norm(),
            post_attention_layernorm: norm(),
        }
    }

    /// `[n, hidden]` → `[n, hidden]`.
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        context: &TextContext<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Tensor<B, 2> {
        let attn = self.input_layernorm.forward(x.clone());
        let x = self.self_attn.forward(attn, x, context, cache);
        let mlp = self.post_attention_layernorm.forward(x.clone());
        self.mlp.forward(mlp, x, context.dropout_seed)
    }
}

/// The language model without its head.
///
/// Source: `Qwen3VLTextModel`, transformers, `modeling_qwen3_vl.py`.
#[derive(Module, Debug)]
pub struct TextModel<B: Backend> {
    /// Token vectors.
    pub embed_tokens: Embedding<B>,
    /// Decoder layers.
    pub layers: Vec<DecoderLayer<B>>,
    /// Norm before the head.
    pub norm: RmsNorm<B>,
}

impl<B: Ops> TextModel<B> {
    /// A model whose parameters are drawn at first use.
    pub fn new(config: &TextConfig, options: &InitOptions, device: &B::Device) -> Self {
        Self {
            embed_tokens: Embedding::new(config.vocab_size, config.hidden_size, options, device),
            layers: (0..config.num_hidden_layers)
                .map(|_| DecoderLayer::new(config, options, device))
                .collect(),
            norm: RmsNorm::new(config.hidden_size, config.rms_norm_eps, options, device),
        }
    }
}

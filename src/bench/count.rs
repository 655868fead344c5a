//! Floating-point operations and bytes of the model's work, counted from its sizes alone.
//!
//! A matmul of `[m, k]` and `[k, n]` counts `2·m·k·n` operations. Counted are the matmuls of both
//! towers, attention and the head; norms, activations, rotations, softmax and the choice of a token are
//! left out (under one percent at the published sizes). What an implementation does besides, such as
//! padding, composed masks or recomputed layers, is not the model's work and is not counted.

use crate::{
    adapters::lora::config::LoraConfig,
    qwen3_vl::config::{Qwen3VlConfig, TextConfig, VisionConfig},
    train::parameters::base_parameters,
};

/// Operations and bytes of some work.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Work {
    /// Floating-point operations.
    pub flop: f64,
    /// Bytes that must cross the device's memory at least once.
    pub bytes: f64,
}

impl Work {
    /// Both works one after the other.
    #[must_use]
    pub fn plus(self, other: Self) -> Self {
        Self {
            flop: self.flop + other.flop,
            bytes: self.bytes + other.bytes,
        }
    }
}

/// Elements of the seven projections of one decoder layer:
/// `hidden·(2·q + 2·kv) + 3·hidden·intermediate`, `q` and `kv` being heads times `head_dim`.
fn layer_elements(text: &TextConfig) -> f64 {
    let (hidden, inter) = (text.hidden_size as f64, text.intermediate_size as f64);
    let q = (text.num_attention_heads * text.head_dim) as f64;
    let kv = (text.num_key_value_heads * text.head_dim) as f64;
    hidden * (2.0 * q + 2.0 * kv) + 3.0 * hidden * inter
}

/// Elements of all decoder layers' projections.
fn text_elements(text: &TextConfig) -> f64 {
    text.num_hidden_layers as f64 * layer_elements(text)
}

/// Elements of the head.
fn head_elements(text: &TextConfig) -> f64 {
    (text.hidden_size * text.vocab_size) as f64
}

/// Operations of causal attention over `new` tokens after `cached` ones, all layers: scores and
/// values, `4·q` for each pair of a token and one it sees; token `i` sees `cached + i + 1`.
fn causal_attention_flop(text: &TextConfig, cached: usize, new: usize) -> f64 {
    let q = (text.num_attention_heads * text.head_dim) as f64;
    let (cached, new) = (cached as f64, new as f64);
    let pairs = new * cached + new * (new + 1.0) / 2.0;
    text.num_hidden_layers as f64 * 4.0 * q * pairs
}

/// Bytes of the keys and values of one token, all layers.
fn cache_bytes(text: &TextConfig, element: usize) -> f64 {
    (2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * element) as f64
}

/// Elements of the vision tower's matmuls: patch embedding, blocks, merger and DeepStack mergers,
/// the first two used once a patch, the mergers once a merged token.
fn vision_elements(vision: &VisionConfig) -> (f64, f64) {
    let hidden = vision.hidden_size as f64;
    let inter = vision.intermediate_size as f64;
    let joined = hidden * (vision.spatial_merge_size as f64).powi(2);
    let patch = vision.patch_dim() as f64 * hidden
        + vision.depth as f64 * (4.0 * hidden * hidden + 2.0 * hidden * inter);
    let mergers = 1.0 + vision.deepstack_visual_indexes.len() as f64;
    let merged = mergers * (joined * joined + joined * vision.out_hidden_size as f64);
    (patch, merged)
}

/// Bytes of all weights in a type of `element` bytes.
pub fn weight_bytes(config: &Qwen3VlConfig, element: usize) -> f64 {
    base_parameters(config) as f64 * element as f64
}

/// The vision tower over images of `patches` patches each.
///
/// `2·elements` for each patch or merged token, and `4·hidden·n²` for each block's full attention over
/// the `n` patches of an image. Bytes: weights once, pixels in, features out.
pub fn vision(config: &Qwen3VlConfig, patches: &[usize], element: usize) -> Work {
    let vision = &config.vision_config;
    let (patch, merged) = vision_elements(vision);
    let merge = vision.spatial_merge_size.pow(2) as f64;
    let mut work = Work {
        flop: 0.0,
        bytes: (patch + merged) * element as f64,
    };
    let outputs = 1.0 + vision.deepstack_visual_indexes.len() as f64;
    for n in patches.iter().map(|n| *n as f64) {
        work.flop += 2.0 * patch * n + 2.0 * merged * n / merge;
        work.flop += vision.depth as f64 * 4.0 * vision.hidden_size as f64 * n * n;
        let in_and_out =
            vision.patch_dim() as f64 + outputs * vision.out_hidden_size as f64 / merge;
        work.bytes += n * in_and_out * element as f64;
    }
    work
}

/// The language model over whole prompts of these lengths, with logits for the last token of each.
///
/// Bytes: layers and head once, one embedding row a token, the cache written.
pub fn text_prefill(config: &Qwen3VlConfig, lengths: &[usize], element: usize) -> Work {
    let text = &config.text_config;
    let mut work = Work {
        flop: 0.0,
        bytes: (text_elements(text) + head_elements(text)) * element as f64,
    };
    for length in lengths {
        work.flop += 2.0 * text_elements(text) * *length as f64;
        work.flop += causal_attention_flop(text, 0, *length) + 2.0 * head_elements(text);
        let token = (text.hidden_size * element) as f64 + cache_bytes(text, element);
        work.bytes += *length as f64 * token;
    }
    work
}

/// `steps` cached decode steps of one token a row, after prompts of these lengths.
///
/// Every step reads layers and head once for all rows, and each row's whole cache; it writes one token
/// of cache a row.
pub fn decode(config: &Qwen3VlConfig, lengths: &[usize], steps: usize, element: usize) -> Work {
    let text = &config.text_config;
    let elements = text_elements(text) + head_elements(text);
    let rows = lengths.len() as f64;
    let mut work = Work {
        flop: steps as f64 * rows * 2.0 * elements,
        bytes: steps as f64 * (elements + rows * text.hidden_size as f64) * element as f64,
    };
    for length in lengths {
        work.flop += causal_attention_flop(text, *length, steps);
        // Step `i` reads the cache of `length + i` tokens and adds one.
        let tokens = (steps * length + steps * (steps + 1) / 2) as f64;
        work.bytes += tokens * cache_bytes(text, element);
    }
    work
}

/// One sample of training, and what recomputing every layer adds to it.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct TrainWork {
    /// Forward and backward.
    pub model_flop: f64,
    /// The second forward pass of all layers but the last.
    pub recompute_flop: f64,
}

/// Forward and backward of one sample under LoRA on the seven projections, everything else frozen.
///
/// A frozen weight costs its forward matmul and the matmul for its input's gradient, 4 operations
/// an element and token in all; attention's backward pass is twice its forward; an adapter of rank `r`
/// on `[in, out]` costs `6·r·(in + out)` a token; the head counts at the targets, forward and for the
/// hidden state's gradient; the vision tower runs forward only. The few gradients that reach nothing
/// trained (the first layer's q, k and v) are counted all the same.
pub fn train_sample(
    config: &Qwen3VlConfig,
    lora: &LoraConfig,
    patches: usize,
    tokens: usize,
    targets: usize,
) -> TrainWork {
    let text = &config.text_config;
    let (hidden, inter) = (text.hidden_size as f64, text.intermediate_size as f64);
    let q = (text.num_attention_heads * text.head_dim) as f64;
    let kv = (text.num_key_value_heads * text.head_dim) as f64;
    let widths = 2.0 * (hidden + q) + 2.0 * (hidden + kv) + 3.0 * (hidden + inter);
    let layers = text.num_hidden_layers as f64;
    let adapter = layers * 2.0 * lora.r as f64 * widths * tokens as f64;
    let linear = 2.0 * text_elements(text) * tokens as f64;
    let attention = causal_attention_flop(text, 0, tokens);
    let head = 2.0 * head_elements(text) * targets as f64;
    TrainWork {
        model_flop: 2.0 * linear
            + 3.0 * (attention + adapter)
            + 2.0 * head
            + vision(config, &[patches], 1).flop,
        recompute_flop: (linear + attention + adapter) * (layers - 1.0) / layers,
    }
}

/// Bytes of the weights that `passes` passes over the language model and one over the vision tower
/// read; activations, moments and gradients come on top and depend on the implementation.
pub fn train_weight_bytes(config: &Qwen3VlConfig, passes: usize, element: usize) -> f64 {
    let text = &config.text_config;
    let (patch, merged) = vision_elements(&config.vision_config);
    let language = passes as f64 * text_elements(text) + 2.0 * head_elements(text);
    (language + patch + merged) * element as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(value: f64, expected: f64) -> bool {
        (value / expected - 1.0).abs() < 0.02
    }

    /// Computed separately for the published 8B: a 512×512 image (1,024 patches, 256 tokens), 368
    /// tokens in all, 92 targets.
    #[test]
    fn counts_of_the_published_8b() {
        let config = Qwen3VlConfig::published("8b").unwrap();
        let tower = vision(&config, &[1024], 2);
        let prompt = text_prefill(&config, &[368], 2);
        assert!(
            near(tower.flop + prompt.flop, 6.2e12),
            "{tower:?} {prompt:?}"
        );
        let step = decode(&config, &[368], 1, 2);
        assert!(near(step.bytes, 15.15e9 + 369.0 * 147_456.0), "{step:?}");
        let lora = LoraConfig {
            r: 8,
            ..LoraConfig::default()
        };
        let train = train_sample(&config, &lora, 1024, 368, 92);
        assert!(near(train.model_flop, 11.8e12), "{train:?}");
    }

    #[test]
    fn steps_add_up_to_the_attention_of_one_longer_prompt() {
        let text = Qwen3VlConfig::published("2b").unwrap().text_config;
        let whole = causal_attention_flop(&text, 0, 50);
        let parts = causal_attention_flop(&text, 0, 40)
            + (40..50)
                .map(|cached| causal_attention_flop(&text, cached, 1))
                .sum::<f64>();
        assert!((whole - parts).abs() < 1e-6 * whole);
    }
}

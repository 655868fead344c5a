//! Decoding: a whole step as one captured graph.
//!
//! A layer is eight launches: norm; fused QKV; head norms + RoPE + KV cache; attention; output + residual;
//! norm; gate/up + SwiGLU; down + residual. For one row the norms are part of the matmuls: six launches. Tokens, positions, lengths and sampling
//! parameters are on the device (`control.cuh`) and the token is sampled there, so that only tokens are
//! read back and the graph is never captured again as sequences start, grow and end.
//!
//! [`batch`] decodes one batch after a prefilled cache and runs ahead of the host; [`serve`] decodes
//! sequences that start and end at any time (continuous batching), with keys and values in pages of one pool.

mod adapters;
mod batch;
mod pages;
mod plan;
mod serve;
#[cfg(test)]
mod tests;
mod weights;

use burn::tensor::DType;

use super::{launch::Backend, module, stream};
use crate::qwen3_vl::{
    Qwen3Vl,
    config::{Qwen3VlConfig, TextConfig},
    nn::Linear,
};

pub(super) use batch::start;
pub(super) use serve::start as serve;

/// Most sequences of one step.
const LARGEST_BATCH: usize = plan::CONTROL_ROWS;

/// Whether the model's text layers are plain bf16 matrices of shapes the kernels cover; `alone` for
/// one sequence (matrix-vector kernels), which has fewer conditions.
fn covers(model: &Qwen3Vl<Backend>, config: &Qwen3VlConfig, alone: bool) -> bool {
    // Quantised weights are checked first: `val` would dequantise them.
    let plain = |linear: &Linear<Backend>| {
        linear.lora.is_none()
            && linear.bias.is_none()
            && linear.weight.packed().is_none()
            && linear.weight.val().dtype() == DType::BF16
    };
    covers_sizes(
        &config.text_config,
        weights::like(model).device.index,
        alone,
    ) && model.lm_head.as_ref().is_none_or(plain)
        && model
            .model
            .language_model
            .embed_tokens
            .weight
            .packed()
            .is_none()
        && (model.model.language_model.layers.iter())
            .all(|layer| layer.projections().into_iter().all(plain))
}

/// Whether the kernels cover matrices of these shapes.
fn covers_sizes(text: &TextConfig, device: usize, alone: bool) -> bool {
    let widths = [
        text.hidden_size,
        text.intermediate_size,
        text.vocab_size,
        text.head_dim * text.num_attention_heads,
        text.head_dim * text.num_key_value_heads,
    ];
    // Vectors of eight and four rows for one sequence, tiles of 16 rows and 32 columns for several.
    let unit = if alone { 8 } else { 32 };
    let group = text.num_attention_heads / text.num_key_value_heads;
    super::plan::card(device).is_supported()
        && widths.iter().all(|width| {
            width.is_multiple_of(unit) || (*width == text.vocab_size && width.is_multiple_of(16))
        })
        && text.head_dim.is_multiple_of(8)
        && (16..=128).contains(&text.head_dim)
        && (1..=8).contains(&group)
        && super::rows::covers(device, text.hidden_size, DType::BF16)
}

/// Compiles in the background what batches of up to `largest` rows are decoded with.
pub(super) fn prepare(text: &TextConfig, device: usize, largest: usize) {
    let eights = (1..=largest.min(LARGEST_BATCH).div_ceil(8)).map(|eights| eights * 8);
    let kernels: Vec<_> = std::iter::once(1)
        .chain(eights)
        .take(largest)
        .filter(|rows| covers_sizes(text, device, *rows == 1))
        .flat_map(|rows| plan::kernels(text, device, rows))
        .collect();
    module::load_in_background(kernels, device);
}

/// Bit `id % 32` of word `id / 32` for each of these tokens.
fn mask_of(tokens: &[u32], vocab: usize) -> Vec<u32> {
    let mut mask = vec![0u32; plan::mask_words(vocab)];
    for token in tokens {
        if let Some(word) = mask.get_mut(*token as usize / 32) {
            *word |= 1 << (token % 32);
        }
    }
    mask
}

/// Control words of all rows, as the device reads them.
struct Control(Vec<u32>);

impl Control {
    /// Unused rows: one token of table 0, greedy sampling.
    fn idle() -> Self {
        let mut control = Self(vec![0; plan::CONTROL_WORDS]);
        for row in 0..plan::CONTROL_ROWS {
            control.set(plan::Field::End, row, 1);
            control.set(plan::Field::Adapter, row, u32::MAX);
            control.set_choice(row, &Default::default());
        }
        control
    }

    fn set(&mut self, field: plan::Field, row: usize, word: u32) {
        self.0[field as usize * plan::CONTROL_ROWS + row] = word;
    }

    fn set_choice(&mut self, row: usize, choice: &crate::runtime::generate::sampler::TokenChoice) {
        use plan::Field;
        self.set(Field::TopK, row, choice.top_k as u32);
        for (field, value) in [
            (Field::Temperature, choice.temperature),
            (Field::TopP, choice.top_p),
            (Field::MinP, choice.min_p),
            (Field::Penalty, choice.repetition_penalty),
            (Field::Uniform, choice.uniform),
        ] {
            self.set(field, row, value.to_bits());
        }
    }
}

//! Decoding: a whole step as one captured graph.
//!
//! A layer is eight launches: norm; fused QKV; head norms + RoPE + KV cache; attention; output + residual;
//! norm; gate/up + SwiGLU; down + residual. For one row, and with quantised weights, the norms are part of the
//! matmuls: six launches. Tokens, positions, lengths and sampling
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
mod step_io;
#[cfg(test)]
pub(super) mod tests;
mod weights;

use burn::tensor::DType;

use super::{fragments, launch::Backend, module, stream};
use crate::{
    ops::quantised::{Format, Quantization},
    qwen3_vl::{
        Qwen3Vl, Qwen3VlModel, TextModel,
        config::{Qwen3VlConfig, TextConfig},
        layer::Projection,
        nn::{Embedding, Linear},
    },
    weights::Weight,
};

pub(super) use batch::start;
pub(super) use serve::start as serve;

/// Most sequences of one step.
const LARGEST_BATCH: usize = step_io::CONTROL_ROWS;

/// Whether the kernels cover the model: its text layers are bf16 matrices, or all quantised in fragment order; `alone` for
/// one sequence (matrix-vector kernels), which has fewer conditions.
fn covers(model: &Qwen3Vl<Backend>, config: &Qwen3VlConfig, alone: bool) -> bool {
    let text = &config.text_config;
    covers_sizes(text, weights::like(model).device.index, alone)
        && (linears(model).all(|linear| linear.bias.is_none()))
        && (all_floats(model) || all_fragments(model))
}

/// The linear layers that a step multiplies by, the head among them where it has its own.
fn linears(model: &Qwen3Vl<Backend>) -> impl Iterator<Item = &Linear<Backend>> {
    let layers = &model.model.language_model.layers;
    layers
        .iter()
        .flat_map(|layer| layer.projections())
        .chain(&model.lm_head)
}

/// Whether all matrices of a step are bf16, without adapters beside them.
fn all_floats(model: &Qwen3Vl<Backend>) -> bool {
    // Quantised weights are checked first: `val` would dequantise them.
    let plain =
        |weight: &Weight<Backend>| weight.packed().is_none() && weight.val().dtype() == DType::BF16;
    linears(model).all(|linear| linear.lora.is_none() && plain(&linear.weight))
        && plain(&model.model.language_model.embed_tokens.weight)
}

/// Whether all matrices of a step are quantised and in fragment order, those of one input alike, and the table of 8
/// bits; adapters may be beside them.
fn all_fragments(model: &Qwen3Vl<Backend>) -> bool {
    let language = &model.model.language_model;
    let format = |weight: &Weight<Backend>| {
        let packed = weight.packed()?;
        (packed.is_arranged() && packed.dtype() == DType::BF16).then(|| packed.format())
    };
    let alike = |of: &[&Linear<Backend>]| {
        let first = format(&of[0].weight);
        first.is_some() && of.iter().all(|linear| format(&linear.weight) == first)
    };
    let table = language.embed_tokens.weight.packed();
    let table = table.is_some_and(|table| table.format() == Format::Int8);
    let in_layers = language.layers.iter().all(|layer| {
        let [q, k, v, output, gate, up, down] = layer.projections();
        alike(&[q, k, v]) && alike(&[output]) && alike(&[gate, up]) && alike(&[down])
    });
    in_layers && format(model.head()).is_some() && table
}

/// Whether some matrix is in fragment order: then kernels that read rows cannot take the model.
pub(super) fn is_arranged(model: &Qwen3Vl<Backend>) -> bool {
    let head = std::iter::once(model.head());
    let mut weights = linears(model).map(|linear| &linear.weight).chain(head);
    weights.any(|weight| weight.packed().is_some_and(|packed| packed.is_arranged()))
}

/// Whether all matrices of a step can be arranged, and the step covers the model.
fn can_arrange(model: &Qwen3Vl<Backend>, text: &TextConfig) -> bool {
    let can = |weight: &Weight<Backend>| weight.packed().is_some_and(fragments::can_arrange);
    let head = std::iter::once(model.head());
    let mut weights = linears(model).map(|linear| &linear.weight).chain(head);
    weights.all(can) && covers_sizes(text, weights::like(model).device.index, false)
}

/// A quantised model with all that a step multiplies by in fragment order, or unchanged where the step does not
/// cover it. A table that is not the head is only read row by row, and stays.
pub(super) fn arrange(model: Qwen3Vl<Backend>, config: &Qwen3VlConfig) -> Qwen3Vl<Backend> {
    if !can_arrange(&model, &config.text_config) {
        return model;
    }
    let arranged = |linear: Linear<Backend>| Linear {
        weight: linear.weight.map_packed(fragments::arranged),
        ..linear
    };
    let Qwen3Vl { model, lm_head } = model;
    let language = model.language_model;
    let layers = language.layers.into_iter();
    let layers = layers
        .map(|layer| layer.map_projections(arranged))
        .collect();
    let table = language.embed_tokens.weight;
    let embed_tokens = Embedding {
        weight: match &lm_head {
            Some(_) => table,
            None => table.map_packed(fragments::arranged),
        },
    };
    Qwen3Vl {
        model: Qwen3VlModel {
            language_model: TextModel {
                layers,
                embed_tokens,
                ..language
            },
            ..model
        },
        lm_head: lm_head.map(arranged),
    }
}

/// Whether matrices of these shapes can be arranged in this format.
fn covers_format(text: &TextConfig, format: Format) -> bool {
    let mut shapes = Projection::ALL.iter().map(|one| one.shape(text));
    shapes.all(|shape| fragments::covers(format, shape))
        && fragments::covers(Format::Int8, [text.vocab_size, text.hidden_size])
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
pub(super) fn prepare(
    text: &TextConfig,
    quantization: Option<Quantization>,
    device: usize,
    largest: usize,
) {
    if quantization.is_some_and(|quantization| !covers_format(text, quantization.layers)) {
        return;
    }
    let eights = (1..=largest.min(LARGEST_BATCH).div_ceil(8)).map(|eights| eights * 8);
    let kernels: Vec<_> = std::iter::once(1)
        .chain(eights)
        .take(largest)
        .filter(|rows| covers_sizes(text, device, *rows == 1))
        .flat_map(|rows| plan::kernels(text, quantization, device, rows))
        .collect();
    module::load_in_background(kernels, device);
}

/// Bit `id % 32` of word `id / 32` for each of these tokens.
fn mask_of(tokens: &[u32], vocab: usize) -> Vec<u32> {
    let mut mask = vec![0u32; step_io::mask_words(vocab)];
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
        let mut control = Self(vec![0; step_io::CONTROL_WORDS]);
        for row in 0..step_io::CONTROL_ROWS {
            control.set(step_io::Field::End, row, 1);
            control.set(step_io::Field::Adapter, row, u32::MAX);
            control.set_choice(row, &Default::default());
        }
        control
    }

    fn set(&mut self, field: step_io::Field, row: usize, word: u32) {
        self.0[field as usize * step_io::CONTROL_ROWS + row] = word;
    }

    fn set_choice(&mut self, row: usize, choice: &crate::runtime::generate::sampler::TokenChoice) {
        use step_io::Field;
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

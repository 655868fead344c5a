//! Low-rank matrices and rows of the tables and of the convolution, which are no linear layers.

use burn::{
    module::{Param, ParamId},
    prelude::*,
    tensor::{DType, IndexingUpdateOp, TensorData},
};

use super::{Changes, indices};
use crate::{
    adapters::lora::{
        config::AdapterError,
        keys::{Keys, PREFIX, Part},
        source::Source,
        targets::{EMBED_TOKENS, LM_HEAD, PATCH_EMBED, POS_EMBED},
    },
    ops::{
        Ops,
        cast::{to_dtype, to_f32},
    },
    qwen3_vl::{Qwen3Vl, nn::Embedding},
    weights::Weight,
};

/// Rows of an embedding whose low-rank share is computed at once: what is between is small.
const ROWS_AT_ONCE: usize = 8192;

/// The low-rank matrices of a module that is no linear layer: `[r, in]`, `[out, r]`, the magnitudes' name.
type Pair<B> = (Tensor<B, 2>, Tensor<B, 2>, Option<String>);

fn pair<B: Ops>(
    source: &Source<'_>,
    keys: &mut Keys,
    module: &str,
    [a, b]: [Part; 2],
    [out, d_input]: [usize; 2],
    device: &B::Device,
) -> Result<Option<Pair<B>>, AdapterError> {
    let (a, b) = match (keys.take(module, a), keys.take(module, b)) {
        (None, None) => return Ok(None),
        (Some(a), Some(b)) => (a, b),
        (Some(one), None) | (None, Some(one)) => {
            return Err(source.mismatch(format!("tensor `{one}` is there without its counterpart")));
        }
    };
    if source.config.initial.is_some() {
        return Err(source.contradiction(format!(
            "`{a}` is of a layer that is no linear one, and `init_lora_weights` changed the base; write the adapter with `path_initial_model_for_weight_conversion`"
        )));
    }
    let rank = source.config.rank_of(module)?;
    let a = source.read::<B, 2>(&a, [rank, d_input], device)?;
    let b = source.read::<B, 2>(&b, [out, rank], device)?;
    let magnitude = keys.take(module, Part::Magnitude);
    if magnitude.is_some() != source.config.use_dora {
        return Err(source.contradiction(format!(
            "`use_dora` is {} and the magnitudes of `{module}` are {}",
            source.config.use_dora,
            if magnitude.is_some() {
                "there"
            } else {
                "missing"
            }
        )));
    }
    Ok(Some((a, b, magnitude)))
}

/// Low-rank matrices of the convolution over patches.
///
/// Source: `_ConvNd.get_delta_weight`, `_DoraConvNdLayer`, PEFT, `tuners/lora`.
pub(super) fn patches<B: Ops>(
    mut model: Qwen3Vl<B>,
    source: &Source<'_>,
    keys: &mut Keys,
    changes: &mut Changes,
) -> Result<Qwen3Vl<B>, AdapterError> {
    let proj = &mut model.model.visual.patch_embed.proj;
    let weight = proj.weight.val();
    let (shape, dtype, device) = (weight.dims(), weight.dtype(), weight.device());
    let [out, d_input] = [shape[0], shape[1..].iter().product()];
    let parts = [Part::A, Part::B];
    let Some((a, b, magnitude)) =
        pair::<B>(source, keys, PATCH_EMBED, parts, [out, d_input], &device)?
    else {
        return Ok(model);
    };
    let delta = B::matmul(b, a) * source.config.scaling_of(PATCH_EMBED)?;
    let mut matrix = to_f32(weight).reshape([out, d_input]) + delta;
    if let Some(name) = magnitude {
        let magnitude = source.read::<B, 1>(&name, [out], &device)?;
        let norms: Tensor<B, 1> = (matrix.clone() * matrix.clone())
            .sum_dim(1)
            .sqrt()
            .squeeze_dim(1);
        matrix = matrix * (magnitude / norms).unsqueeze_dim(1);
    }
    proj.weight = Param::initialized(proj.weight.id, to_dtype(matrix.reshape(shape), dtype));
    changes.add(&format!("{PATCH_EMBED}.weight"), "target_modules");
    Ok(model)
}

/// Low-rank matrices of embeddings.
///
/// Source: `Embedding.get_delta_weight`, `DoraEmbeddingLayer`, PEFT, `tuners/lora`.
pub(super) fn embeddings<B: Ops>(
    mut model: Qwen3Vl<B>,
    source: &Source<'_>,
    keys: &mut Keys,
    changes: &mut Changes,
) -> Result<Qwen3Vl<B>, AdapterError> {
    for path in [EMBED_TOKENS, POS_EMBED] {
        let table: &mut Embedding<B> = match path {
            EMBED_TOKENS => &mut model.model.language_model.embed_tokens,
            _ => &mut model.model.visual.pos_embed,
        };
        let [rows, width] = table.weight.lazy_shape().dims();
        let device = table.weight.lazy_device();
        let parts = [Part::EmbeddingA, Part::EmbeddingB];
        let Some((a, b, magnitude)) = pair::<B>(source, keys, path, parts, [width, rows], &device)?
        else {
            continue;
        };
        let weight = table.weight.val();
        let dtype = weight.dtype();
        let b = b.transpose() * source.config.scaling_of(path)?;
        let composed = |first: usize| {
            let count = ROWS_AT_ONCE.min(rows - first);
            let a = a.clone().narrow(1, first, count).transpose();
            to_f32(weight.clone().narrow(0, first, count)) + B::matmul(a, b.clone())
        };
        let starts = || (0..rows).step_by(ROWS_AT_ONCE);
        let scale = match magnitude {
            None => None,
            Some(name) => {
                // One magnitude for each column, over all rows.
                let squares = starts().map(|first| {
                    let part = composed(first);
                    (part.clone() * part).sum_dim(0)
                });
                let squares = squares.reduce(|sum, part| sum + part);
                let magnitude = source.read::<B, 2>(&name, [1, width], &device)?;
                squares.map(|squares| magnitude / squares.sqrt())
            }
        };
        let parts = starts().map(|first| {
            let part = composed(first);
            let part = match &scale {
                Some(scale) => part * scale.clone(),
                None => part,
            };
            to_dtype(part, dtype)
        });
        let new = Tensor::cat(parts.collect(), 0);
        table.weight = Weight::Dense(Param::initialized(ParamId::new(), new));
        changes.add(&format!("{path}.weight"), "target_modules");
    }
    Ok(model)
}

/// Rows of tokens.
///
/// Source: `TrainableTokensLayer.get_merged_weights`, `set_additional_trainable_modules`, PEFT.
pub(super) fn tokens<B: Ops>(
    mut model: Qwen3Vl<B>,
    source: &Source<'_>,
    keys: &mut Keys,
    changes: &mut Changes,
    tied: bool,
) -> Result<Qwen3Vl<B>, AdapterError> {
    let config = source.config;
    let mut of_embedding = None;
    for path in [EMBED_TOKENS, LM_HEAD] {
        let name = keys.take(path, Part::Tokens);
        let (name, tokens) = match (name, indices(config, path)) {
            // The head of a tied base has the embedding's rows, unless it was given others.
            (None, own)
                if tied
                    && path == LM_HEAD
                    && own.is_none_or(|own| Some(own) == indices(config, EMBED_TOKENS)) =>
            {
                match (&of_embedding, &model.lm_head) {
                    (Some((name, tokens)), Some(_)) => (String::clone(name), *tokens),
                    _ => continue,
                }
            }
            (None, None) => continue,
            (Some(name), Some(tokens)) => (name, tokens),
            (Some(name), None) => {
                return Err(source.contradiction(format!(
                    "it holds `{name}`, and `trainable_token_indices` does not say which tokens these are"
                )));
            }
            (None, Some(_)) => {
                return Err(source.mismatch(format!(
                    "tensor `{}{path}.token_adapter.trainable_tokens_delta` is missing, which `trainable_token_indices` asks for",
                    PREFIX
                )));
            }
        };
        let weight = match (path, &mut model.lm_head) {
            (LM_HEAD, Some(head)) => &mut head.weight,
            _ => &mut model.model.language_model.embed_tokens.weight,
        };
        *weight = with_rows(weight, source, &name, tokens)?;
        changes.add(&format!("{path}.weight"), "trainable_token_indices");
        if path == EMBED_TOKENS {
            of_embedding = Some((name, tokens));
        }
    }
    Ok(model)
}

/// The table with other rows for some tokens.
fn with_rows<B: Ops>(
    weight: &Weight<B>,
    source: &Source<'_>,
    name: &str,
    tokens: &[usize],
) -> Result<Weight<B>, AdapterError> {
    let [rows, width] = weight.lazy_shape().dims();
    let mut sorted = tokens.to_vec();
    sorted.sort_unstable();
    let twice = sorted.windows(2).find(|pair| pair[0] == pair[1]);
    if let Some(token) = sorted.last().filter(|token| **token >= rows) {
        return Err(source.mismatch(format!(
            "`trainable_token_indices` names token {token}, the model has {rows}"
        )));
    }
    if let Some(pair) = twice {
        return Err(source.contradiction(format!(
            "`trainable_token_indices` names token {} twice",
            pair[0]
        )));
    }
    let device = weight.lazy_device();
    let new = source.read::<B, 2>(name, [tokens.len(), width], &device)?;
    let old = weight.val();
    let dtype = old.dtype();
    let places: Vec<i32> = tokens.iter().map(|token| *token as i32).collect();
    let places = Tensor::<B, 1, Int>::from_ints(places.as_slice(), &device);
    // Zeros where rows go, to which they are added: exact, for adding is what the operation does.
    let mut kept = vec![1f32; rows];
    tokens.iter().for_each(|token| kept[*token] = 0.0);
    let kept = Tensor::<B, 2>::from_data(TensorData::new(kept, [rows, 1]), (&device, DType::F32));
    let table = (old * to_dtype(kept, dtype)).select_assign(
        0,
        places,
        to_dtype(new, dtype),
        IndexingUpdateOp::Add,
    );
    Ok(Weight::Dense(Param::initialized(ParamId::new(), table)))
}

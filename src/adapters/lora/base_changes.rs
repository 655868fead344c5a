//! What an adapter puts in place of the base's own weights, besides low-rank matrices beside linear layers.
//!
//! PEFT stores modules whole (`modules_to_save`), biases (`bias`, `lora_bias`), rows of tokens
//! (`trainable_token_indices`), copies of the base's tables (`save_embedding_layers`), and low-rank matrices of
//! embeddings and of the convolution over patches. All of them have one result for a model that is not
//! trained on: another weight in the place of one. It is computed in f32 and stored in the base's type.

mod parameters;
mod tables;

use std::collections::BTreeMap;

use super::{
    attach::untie,
    config::{AdapterError, Bias, LoraConfig},
    keys::{Keys, PREFIX, Part},
    source::Source,
    targets::{EMBED_TOKENS, LM_HEAD},
};
use crate::{
    ops::{Kept, Ops},
    qwen3_vl::{Qwen3Vl, weights::parameter_shapes},
};
use parameters::{biases, parameters};
use tables::{embeddings, patches, tokens};

/// A weight of the base that an adapter brings another for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Path of the weight.
    pub path: String,
    /// Key of `adapter_config.json` that asks for it.
    pub key: &'static str,
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` by `{}`", self.path, self.key)
    }
}

/// The key of modules that are stored whole.
pub(super) const MODULES_TO_SAVE: &str = "modules_to_save";

/// What was changed, and what a person should know about it.
#[derive(Debug, Default)]
pub(super) struct Changes {
    /// Each weight.
    pub(super) weights: Vec<Change>,
    /// Whether one of them belongs to the language model or its head.
    pub(super) text: bool,
    /// Sentences.
    pub(super) notes: Vec<String>,
}

impl Changes {
    fn add(&mut self, path: &str, key: &'static str) {
        self.text |= !path.starts_with("model.visual.");
        let path = path.to_owned();
        self.weights.push(Change { path, key });
    }
}

/// Makes all changes; takes their names out of `keys`.
///
/// # Errors
/// [`AdapterError`] names the tensor or the key.
pub(super) fn change_base<B: Ops>(
    mut model: Qwen3Vl<B>,
    source: &Source<'_>,
    keys: &mut Keys,
) -> Result<(Qwen3Vl<B>, Changes), AdapterError> {
    let mut changes = Changes::default();
    expect_saved(&model, source, keys, &mut changes)?;
    let tied = model.lm_head.is_none();
    // With DoRA the head has magnitudes of its own, and with them a layer of its own.
    if source.config.ensure_weight_tying
        && tied
        && !source.config.use_dora
        && keys.get(EMBED_TOKENS, Part::EmbeddingA).is_some()
    {
        // Views of the embedding's matrices, which change the one table of both.
        keys.take(LM_HEAD, Part::A);
        keys.take(LM_HEAD, Part::B);
    }
    if tied && head_leaves(source.config, keys) {
        untie(&mut model);
        changes.notes.push(
            "the adapter changes the embedding or the head alone, which the base has in one table; they are two from here on, as in PEFT"
                .to_owned(),
        );
    }
    let model = parameters(model, source, keys, &mut changes)?;
    let model = biases(model, source, keys, &mut changes)?;
    let model = patches(model, source, keys, &mut changes)?;
    let model = embeddings(model, source, keys, &mut changes)?;
    let mut model = tokens(model, source, keys, &mut changes, tied)?;
    if !changes.weights.is_empty() {
        // What was cached came from the weights before.
        model.model.visual.kept = Kept::default();
    }
    Ok((model, changes))
}

/// Whether a tied head becomes one of its own: what is changed is changed in one of the two only.
fn head_leaves(config: &LoraConfig, keys: &Keys) -> bool {
    let weight = || Part::Parameter("weight".to_owned());
    // With `ensure_weight_tying` PEFT writes one table under both names.
    let is_one = config.ensure_weight_tying && config.saves(EMBED_TOKENS);
    let of_head = keys.get(LM_HEAD, Part::A).is_some()
        || !is_one
            && keys
                .get(LM_HEAD, weight())
                .is_some_and(|name| !name.contains(".base_layer."));
    let of_embedding = !config.ensure_weight_tying
        && (keys.get(EMBED_TOKENS, Part::EmbeddingA).is_some()
            || (keys.get(EMBED_TOKENS, weight()).is_some() && config.saves(EMBED_TOKENS)));
    let tokens = |table| indices(config, table);
    let apart = match (tokens(EMBED_TOKENS), tokens(LM_HEAD)) {
        (None, Some(_)) => true,
        (Some(embedding), Some(head)) => embedding != head,
        _ => false,
    };
    of_head || of_embedding || apart
}

/// The token indices that `trainable_token_indices` has for a table.
fn indices<'a>(config: &'a LoraConfig, table: &str) -> Option<&'a Vec<usize>> {
    let mut named = config.trainable_token_indices.iter();
    named
        .find(|(name, _)| table.ends_with(name.as_str()))
        .map(|(_, tokens)| tokens)
}

/// Shapes of all parameters, quantised matrices included.
pub(super) fn all_shapes<B: Ops>(model: &Qwen3Vl<B>) -> BTreeMap<String, Vec<usize>> {
    let mut shapes = parameter_shapes(model);
    for (path, linear) in model.linears() {
        let shape = linear.weight.lazy_shape().to_vec();
        shapes.insert(format!("{path}.weight"), shape);
    }
    let table = &model.model.language_model.embed_tokens.weight;
    shapes.insert(
        format!("{EMBED_TOKENS}.weight"),
        table.lazy_shape().to_vec(),
    );
    shapes
}

/// Checks that the file holds what `modules_to_save`, `bias` and `trainable_token_indices` ask for.
fn expect_saved<B: Ops>(
    model: &Qwen3Vl<B>,
    source: &Source<'_>,
    keys: &Keys,
    changes: &mut Changes,
) -> Result<(), AdapterError> {
    let config = source.config;
    let mut shapes = all_shapes(model);
    // A tied head is a module all the same.
    shapes.entry(format!("{LM_HEAD}.weight")).or_default();
    for name in &config.modules_to_save {
        let mut found = false;
        for path in shapes.keys() {
            let around = path.match_indices('.').map(|(at, _)| &path[..at]);
            if !around
                .into_iter()
                .any(|module| module.ends_with(name.as_str()))
            {
                continue;
            }
            found = true;
            let (module, leaf) = path.rsplit_once('.').unwrap_or((path, "weight"));
            if keys.get(module, Part::Parameter(leaf.to_owned())).is_none() {
                return Err(source.mismatch(format!(
                    "tensor `{PREFIX}{path}` is missing, which `modules_to_save` {:?} asks for",
                    config.modules_to_save,
                )));
            }
        }
        if !found {
            changes.notes.push(format!(
                "`modules_to_save` names `{name}`, which is no module of this model"
            ));
        }
    }
    for name in config.trainable_token_indices.keys() {
        let tables = [EMBED_TOKENS, LM_HEAD];
        if !tables.iter().any(|table| table.ends_with(name.as_str())) {
            return Err(source.contradiction(format!(
                "`trainable_token_indices` names `{name}`, expected `embed_tokens` or `lm_head`"
            )));
        }
    }
    let has_bias = (keys.names.keys()).any(|(_, part)| *part == Part::Parameter("bias".into()));
    if config.bias != Bias::None && !has_bias {
        changes.notes.push(format!(
            "`bias` is `{}` and the file holds none; the base's are used, as in PEFT",
            config.bias.name()
        ));
    }
    Ok(())
}

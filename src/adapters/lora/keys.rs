//! Names of the tensors in an adapter's file: which module and which part of its adapter each belongs to.
//!
//! PEFT's own names are `base_model.model.` + the module's path + `.lora_A.weight` and the like. A state dict that
//! PEFT did not write itself keeps the adapter's name before the last part, and older versions of
//! transformers call the towers otherwise; both are read.

use std::{collections::BTreeMap, path::Path};

use super::error::AdapterError;

/// Part of a module's adapter.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// `lora_A.weight`, `[r, in]`.
    A,
    /// `lora_B.weight`, `[out, r]`.
    B,
    /// `lora_B.bias`, `[out]`.
    Bias,
    /// `lora_magnitude_vector`, DoRA's.
    Magnitude,
    /// `lora_embedding_A`, `[r, rows]`.
    EmbeddingA,
    /// `lora_embedding_B`, `[width, r]`.
    EmbeddingB,
    /// `token_adapter.trainable_tokens_delta`, `[tokens, width]`: the rows themselves, not differences.
    Tokens,
    /// A parameter of the base, of this name in the module: another one in its place, or a copy.
    Parameter(String),
}

/// What the names of a file say.
#[derive(Debug, Default)]
pub(super) struct Keys {
    /// The tensor's name by module and part.
    pub(super) names: BTreeMap<(String, Part), String>,
    /// How names of another layout were read, with an example; `None` where all are this model's.
    pub(super) mapped: Option<String>,
}

impl Keys {
    /// Reads the names of the file at `path`.
    ///
    /// # Errors
    /// [`AdapterError::Contradiction`] for two names of one tensor, [`AdapterError::Mismatch`] for a name of no
    /// known form.
    pub(super) fn of<'a>(
        names: impl Iterator<Item = &'a String>,
        path: &Path,
    ) -> Result<Self, AdapterError> {
        let mut keys = Self::default();
        for name in names {
            // The module as it was before training, of a state dict that PEFT did not write itself.
            if name.contains(".original_module.") {
                continue;
            }
            let Some((module, part)) = parse(name) else {
                return Err(AdapterError::Mismatch {
                    path: path.to_path_buf(),
                    reason: format!(
                        "tensor `{name}` has the name of no part of a LoRA adapter, expected one like `base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight`"
                    ),
                });
            };
            let here = here(&module);
            if keys.mapped.is_none() && (here != module || !name.starts_with(PREFIX)) {
                keys.mapped = Some(format!("`{name}` as that of `{here}`"));
            }
            if let Some(other) = keys.names.insert((here, part), name.clone()) {
                return Err(AdapterError::Contradiction {
                    path: path.to_path_buf(),
                    reason: format!(
                        "tensors `{other}` and `{name}` are the same part of one layer; expected a file of one adapter"
                    ),
                });
            }
        }
        Ok(keys)
    }

    /// The name of a part's tensor.
    pub(super) fn get(&self, module: &str, part: Part) -> Option<&String> {
        self.names.get(&(module.to_owned(), part))
    }

    /// Takes a part out.
    pub(super) fn take(&mut self, module: &str, part: Part) -> Option<String> {
        self.names.remove(&(module.to_owned(), part))
    }

    /// Modules that have this part, in order.
    pub(super) fn modules(&self, part: &Part) -> Vec<String> {
        let of_part = self.names.keys().filter(|(_, own)| own == part);
        of_part.map(|(module, _)| module.clone()).collect()
    }
}

/// What PEFT puts before the paths of the model it wraps.
pub(super) const PREFIX: &str = "base_model.model.";

/// Where the path of a module ends, and what the rest is.
const MARKS: &[(&str, Part)] = &[
    (".lora_A", Part::A),
    (".lora_B", Part::B),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_embedding_A", Part::EmbeddingA),
    (".lora_embedding_B", Part::EmbeddingB),
    (".token_adapter.trainable_tokens_delta", Part::Tokens),
];

/// The module and the part that a tensor's name says, the module as the file calls it.
fn parse(name: &str) -> Option<(String, Part)> {
    let name = name.replace("_orig_mod.", "");
    let name = name.strip_prefix(PREFIX).unwrap_or(&name);
    for (mark, part) in MARKS {
        let Some((module, rest)) = name.split_once(mark) else {
            continue;
        };
        // `.weight`, nothing, or one of the two after the adapter's name.
        let rest: Vec<&str> = rest.split('.').collect();
        let leaf = match rest.as_slice() {
            [""] | ["", _] | ["", _, "weight" | "bias"] => rest.last().copied(),
            _ => return None,
        };
        let part = match (part, leaf) {
            (Part::B, Some("bias")) => Part::Bias,
            (part, _) => part.clone(),
        };
        return Some((module.to_owned(), part));
    }
    // A module that was stored whole, with the adapter's name where PEFT did not write the file.
    let mut parts: Vec<&str> = name.split('.').collect();
    if let Some(at) = parts.iter().position(|part| *part == "modules_to_save") {
        parts.drain(at..(at + 2).min(parts.len()));
    }
    parts.retain(|part| *part != "base_layer");
    let leaf = parts.pop()?;
    let is_parameter = matches!(leaf, "weight" | "bias") && !parts.is_empty();
    is_parameter.then(|| (parts.join("."), Part::Parameter(leaf.to_owned())))
}

/// Beginnings of paths in other layouts, and what they are here.
///
/// Source: `_checkpoint_conversion_mapping` of Qwen2-VL's models in transformers 4.52 to 4.57, which had the same
/// towers under these names.
const LAYOUTS: &[(&str, &str)] = &[
    ("model.language_model.", "model.language_model."),
    ("model.visual.", "model.visual."),
    ("lm_head", "lm_head"),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
    ("language_model.", "model.language_model."),
    ("visual.", "model.visual."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens", "model.language_model.embed_tokens"),
    ("model.norm", "model.language_model.norm"),
    ("layers.", "model.language_model.layers."),
    ("embed_tokens", "model.language_model.embed_tokens"),
    ("norm", "model.language_model.norm"),
];

/// The path of a module in this model.
fn here(module: &str) -> String {
    let found = LAYOUTS
        .iter()
        .find_map(|(there, here)| Some((module.strip_prefix(there)?, here)));
    match found {
        Some((rest, here)) => format!("{here}{rest}"),
        None => module.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(name: &str) -> (String, Part, bool) {
        let keys = Keys::of([name.to_owned()].iter(), Path::new("x")).unwrap();
        let ((module, part), _) = keys.names.into_iter().next().unwrap();
        (module, part, keys.mapped.is_some())
    }

    #[test]
    fn every_layout_leads_to_the_same_module() {
        let q = "model.language_model.layers.0.self_attn.q_proj";
        for (prefix, mapped) in [
            ("base_model.model.model.language_model.", false),
            ("model.language_model.", true),
            ("base_model.model.language_model.model.", true),
            ("base_model.model.model.", true),
            ("base_model.model.", true),
            ("base_model.model._orig_mod.model.language_model.", false),
        ] {
            let name = format!("{prefix}layers.0.self_attn.q_proj.lora_A.weight");
            assert_eq!(one(&name), (q.to_owned(), Part::A, mapped), "{name}");
        }
        let proj = "model.visual.blocks.1.attn.proj";
        assert_eq!(
            one("base_model.model.visual.blocks.1.attn.proj.lora_B.weight"),
            (proj.to_owned(), Part::B, true)
        );
    }

    #[test]
    fn every_part_is_known_with_and_without_the_adapters_name() {
        let embedding = "base_model.model.model.language_model.embed_tokens";
        for (end, part) in [
            ("lora_embedding_A", Part::EmbeddingA),
            ("lora_embedding_A.default", Part::EmbeddingA),
            ("lora_B.xray.weight", Part::B),
            ("lora_B.bias", Part::Bias),
            ("lora_B.default.bias", Part::Bias),
            ("lora_magnitude_vector", Part::Magnitude),
            ("lora_magnitude_vector.default.weight", Part::Magnitude),
            ("token_adapter.trainable_tokens_delta", Part::Tokens),
            ("weight", Part::Parameter("weight".into())),
            ("base_layer.weight", Part::Parameter("weight".into())),
            (
                "modules_to_save.default.weight",
                Part::Parameter("weight".into()),
            ),
        ] {
            let (module, found, _) = one(&format!("{embedding}.{end}"));
            assert_eq!(found, part, "{end}");
            assert_eq!(module, "model.language_model.embed_tokens", "{end}");
        }
        let (module, part, _) =
            one("base_model.model.model.visual.merger.modules_to_save.default.norm.bias");
        assert_eq!(module, "model.visual.merger.norm");
        assert_eq!(part, Part::Parameter("bias".into()));
    }

    #[test]
    fn two_adapters_in_a_file_and_other_names_are_refused() {
        let of = |names: &[&str]| {
            let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
            Keys::of(names.iter(), Path::new("x")).map(|_| ())
        };
        let q = "base_model.model.lm_head.lora_A";
        let both = [format!("{q}.a.weight"), format!("{q}.b.weight")];
        let error = of(&[&both[0], &both[1]]).unwrap_err().to_string();
        assert!(error.contains("file of one adapter"), "{error}");
        for bad in ["lm_head", "x.lora_A.a.b.weight", "prompt_embeddings", ""] {
            let error = of(&[bad]).unwrap_err().to_string();
            assert!(
                error.contains("no part of a LoRA adapter"),
                "{bad}: {error}"
            );
        }
    }
}

//! Older names of the checkpoint's keys.

use std::borrow::Cow;

/// Prefixes in checkpoints, and what transformers 5 calls the same part of the model. The first that fits
/// counts.
///
/// `model.layers` and `visual` without `model.` are those of releases before the towers became parts of one
/// base model; keys without `model.` were saved from that base model alone; `language_model.model` is written
/// by tools that keep the language model as a causal model of its own.
///
/// Source: `conversion_mapping.py` and the `base_model_prefix` of `Qwen3VLForConditionalGeneration`.
const RENAMED: &[(&str, &str)] = &[
    ("model.language_model.", "model.language_model."),
    ("model.visual.", "model.visual."),
    ("lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model.language_model."),
    ("visual.", "model.visual."),
    ("model.layers.", "model.language_model.layers."),
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.norm.", "model.language_model.norm."),
    ("layers.", "model.language_model.layers."),
    ("embed_tokens.", "model.language_model.embed_tokens."),
    ("norm.", "model.language_model.norm."),
];

/// The key as the module tree names it; one that is not known stays as it is.
pub(super) fn canonical(key: &str) -> Cow<'_, str> {
    let fits = |(old, new): &(&str, &'static str)| Some((key.strip_prefix(old)?, *new));
    match RENAMED.iter().find_map(fits) {
        Some((rest, new)) if !key.starts_with(new) => Cow::Owned(format!("{new}{rest}")),
        _ => Cow::Borrowed(key),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn older_names_lead_to_the_module_tree() {
        for (old, new) in [
            (
                "model.visual.pos_embed.weight",
                "model.visual.pos_embed.weight",
            ),
            ("visual.pos_embed.weight", "model.visual.pos_embed.weight"),
            (
                "model.layers.3.mlp.up_proj.weight",
                "model.language_model.layers.3.mlp.up_proj.weight",
            ),
            (
                "language_model.model.norm.weight",
                "model.language_model.norm.weight",
            ),
            (
                "language_model.layers.0.input_layernorm.weight",
                "model.language_model.layers.0.input_layernorm.weight",
            ),
            (
                "embed_tokens.weight",
                "model.language_model.embed_tokens.weight",
            ),
            ("language_model.lm_head.weight", "lm_head.weight"),
            ("lm_head.weight", "lm_head.weight"),
            ("something.else", "something.else"),
        ] {
            assert_eq!(canonical(old), new);
        }
    }
}

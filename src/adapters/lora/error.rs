//! What can be wrong with an adapter's files.

use std::path::PathBuf;

use crate::base::files::hint::file_hint;

/// What can be wrong with an adapter.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The config cannot be read.
    #[error("cannot read `{}`: {cause}; expected a PEFT adapter folder with `adapter_config.json` and `adapter_model.safetensors` or `adapter_model.bin`{}", .path.display(), file_hint(.path))]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The config is not JSON or a key has another type.
    #[error("`{}`: {cause}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why, with the key.
        cause: serde_json::Error,
    },
    /// A key has a value that is not supported.
    #[error("`{}`: key `{key}` is {found}, which is not supported; expected {expected}", .path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The key.
        key: String,
        /// Its value.
        found: String,
        /// What would be accepted.
        expected: String,
    },
    /// An adapter of another method than LoRA.
    #[error("`{}`: key `peft_type` is {found}, expected `LORA`; {cure}", .path.display())]
    Method {
        /// The file.
        path: PathBuf,
        /// The method, as in the file.
        found: String,
        /// How to use it all the same.
        cure: String,
    },
    /// The folder holds no adapter, but something that says where one is.
    #[error("`{}` is not the folder of an adapter: {hint}", .dir.display())]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// What is there, and what to name in its place.
        hint: String,
    },
    /// `target_modules` is no regular expression.
    #[error("target_modules `{pattern}` is not a regular expression: {reason}")]
    Pattern {
        /// As given.
        pattern: String,
        /// Why.
        reason: String,
    },
    /// No layer of the model is adapted.
    #[error(
        "target_modules {targets} match no linear layer of the model; layers are named like `model.language_model.layers.0.self_attn.q_proj`"
    )]
    NoTarget {
        /// As given.
        targets: String,
    },
    /// A targeted layer that is no linear one: its adapters are read, but not trained.
    #[error(
        "target_modules {targets} name `{layer}`, {kind}, whose adapter is not trained here; name linear layers only (`attn.proj` in place of `proj`, say), or train it in PEFT: such adapters are read and merged"
    )]
    NotTrained {
        /// As given.
        targets: String,
        /// Path of the layer.
        layer: String,
        /// What it is.
        kind: &'static str,
    },
    /// `modules_to_save` names no module.
    #[error(
        "`modules_to_save` names `{name}`, which is no module of this model{}; expected the end of a module's path, such as `lm_head`, `embed_tokens` or `visual.merger`",
        .nearest.as_ref().map_or(String::new(), |nearest| format!("; did you mean `{nearest}`?"))
    )]
    NoModule {
        /// As given.
        name: String,
        /// The most similar one.
        nearest: Option<String>,
    },
    /// A layer is trained whole and has a low-rank adapter.
    #[error(
        "`modules_to_save` names layer `{layer}`, which has a low-rank adapter as well; a layer is trained in one way: leave it out of `modules_to_save` or of `target_modules`"
    )]
    Both {
        /// Path of the layer.
        layer: String,
    },
    /// A layer has an adapter already.
    #[error(
        "layer `{layer}` has an adapter already; on quantised weights adapters stay apart, and a layer takes one: leave out --adapter, or merge it before quantising"
    )]
    Attached {
        /// Path of the layer.
        layer: String,
    },
    /// An adapter tensor has no place in this model, or another shape.
    #[error("`{}`: {reason}; is the adapter for another base model?", .path.display())]
    Mismatch {
        /// The file.
        path: PathBuf,
        /// The tensor, what was expected and what was found.
        reason: String,
    },
    /// A tensor or key that the rest of the adapter contradicts.
    #[error("`{}`: {reason}", .path.display())]
    Contradiction {
        /// The file.
        path: PathBuf,
        /// What contradicts what.
        reason: String,
    },
    /// The adapter puts weights in place of the base's, which this use cannot do.
    #[error(
        "`{}` changes {} of the base itself ({}), and {reason}; run `merge --adapter {}` once and name its output with --model", 
        .dir.display(), counted(.changed.len()), shown(.changed), .dir.display()
    )]
    ChangesBase {
        /// The adapter's folder.
        dir: PathBuf,
        /// What is changed, with the key that asks for it.
        changed: Vec<String>,
        /// Why that is not possible here.
        reason: &'static str,
    },
    /// The tensors cannot be read or written.
    #[error(transparent)]
    Weights(#[from] crate::qwen3_vl::weights::WeightsError),
    /// A file cannot be written.
    #[error(transparent)]
    File(#[from] crate::base::files::FileError),
}

fn counted(count: usize) -> String {
    match count {
        1 => "a weight".to_owned(),
        count => format!("{count} weights"),
    }
}

/// The first of a list, the rest counted.
fn shown(changed: &[String]) -> String {
    match changed {
        [] => String::new(),
        [only] => only.clone(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    }
}

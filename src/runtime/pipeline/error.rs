//! Why a model cannot be loaded or run.

use std::path::PathBuf;

use burn::tensor::DType;

use crate::{
    adapters::lora::config::AdapterError,
    base::{device_name::dtype_text, files::hint::folder_hint},
    processor::{chat::ChatError, image::ImageError, tokenizer::TokenizerError},
    qwen3_vl::{config::ConfigError, weights::WeightsError},
    runtime::{fit::TooSmall, generate::GenerateError},
};

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "each variant is the error of the part it names"
)]
pub enum PipelineError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error("`{}` is not the folder of a checkpoint; expected `config.json`, `tokenizer.json` and `model.safetensors` (or shards with their index) in it; `model/README.md` says how to download one{}", .0.display(), folder_hint(.0, "config.json"))]
    NoModel(PathBuf),
    #[error("`{}` holds no whole tokenizer; name the folder of the original checkpoint with --tokenizer, or put its `tokenizer.json` beside the file", .0.display())]
    GgufTokenizer(PathBuf),
    #[error("`{}`: `{key}` is {found} for the image processor and {expected} in the vision_config of config.json; the two must agree", .path.display())]
    Patches {
        path: PathBuf,
        key: &'static str,
        found: usize,
        expected: usize,
    },
    #[error("`{}`: {reason}; copy the file of the published checkpoint, or remove it: then `config.json` and the tokenizer say what ends an answer", .path.display())]
    GenerationConfig { path: PathBuf, reason: String },
    #[error(
        "the tokenizer in `{}` has {found} tokens, the model only {expected}; do they belong together?",
        .path.display()
    )]
    VocabSize {
        path: PathBuf,
        found: usize,
        expected: usize,
    },
    #[error(transparent)]
    TooSmall(#[from] TooSmall),
    #[error("--memory: {0}")]
    Budget(String),
    #[error(
        "the model needs about {need:.1} GiB of memory as {}, {free:.1} GiB are free; try `--dtype bf16` or `--quantize int8`, a smaller model, or close other programs",
        dtype_text(*.dtype)
    )]
    Memory { need: f64, free: f64, dtype: DType },
}

//! What to load and how.

use std::path::PathBuf;

use burn::tensor::DType;

use crate::{
    ops::{
        memory::Budget,
        quantised::{Packing, cache::CacheFormat},
    },
    qwen3_vl::weights::gguf::GgufParts,
};

/// What to load and how.
#[derive(Debug, Clone)]
pub struct PipelineOptions {
    /// Checkpoint folder.
    pub model: PathBuf,
    /// PEFT adapter folder, merged into the weights; on quantised weights it stays separate.
    pub adapter: Option<PathBuf>,
    /// Type of the weights on the device.
    pub dtype: DType,
    /// Quantise the weights of a 16-bit checkpoint while they are loaded; one that is quantised on the disk
    /// stays as it is.
    pub quantize: Option<Packing>,
    /// Smallest image the model is shown, in pixels; when absent, see [`LimitsFrom`].
    pub min_pixels: Option<usize>,
    /// Largest image the model is shown, in pixels; when absent, see [`LimitsFrom`].
    pub max_pixels: Option<usize>,
    /// Files that go with a model in GGUF, where they are named.
    pub gguf: GgufParts,
    /// Memory to stay within: `quantize` is chosen where it is absent, and how many tokens can be kept.
    pub memory: Option<MemoryLimit>,
}

impl PipelineOptions {
    /// A checkpoint as it is on the disk, its values as `dtype`.
    pub fn new(model: PathBuf, dtype: DType) -> Self {
        Self {
            model,
            adapter: None,
            dtype,
            quantize: None,
            min_pixels: None,
            max_pixels: None,
            gguf: GgufParts::default(),
            memory: None,
        }
    }
}

/// Memory of a device that a model and its work may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryLimit {
    /// How much.
    pub budget: Budget,
    /// What is wanted beside the weights.
    pub room: Room,
    /// Format of keys and values, where it is fixed.
    pub kv_cache: Option<CacheFormat>,
}

/// Room for keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// For answers that are computed together.
    Answers {
        /// How many.
        rows: usize,
        /// Images of each, of the largest size.
        images: usize,
        /// Tokens of each beside its images.
        text: usize,
    },
    /// For a cache that requests share.
    Shared {
        /// Tokens that are wanted.
        tokens: usize,
        /// Fewest tokens that are of use.
        least: usize,
        /// Tokens of a prompt that go through the layers at once.
        at_once: usize,
    },
}

/// Who says between how many pixels an image is scaled, the first that does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitsFrom {
    /// The caller, one limit or both.
    Options,
    /// The training run of the adapter.
    Adapter,
    /// The checkpoint's `processor_config.json` or `preprocessor_config.json`.
    Checkpoint,
    /// Nobody: the training recipe's are taken.
    Recipe,
}

impl std::fmt::Display for LimitsFrom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Options => "as given",
            Self::Adapter => "as in the training of the adapter",
            Self::Checkpoint => "as the checkpoint's processor files say",
            Self::Recipe => "the recipe's, since the checkpoint has no processor file",
        })
    }
}

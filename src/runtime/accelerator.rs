//! The trait of an accelerator: faster ways through whole models, where a backend has them.

use burn::{
    backend::{Autodiff, autodiff::checkpoint::strategy::CheckpointStrategy},
    tensor::{DType, backend::AutodiffBackend},
};

use super::generate::{
    SamplingConfig,
    backend::{ServingDecoder, ServingLimits},
};
use crate::{
    batch::images::ImageInput,
    ops::{Ops, quantised::Quantization},
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        key_values::KeyValueCache,
        vision::{VisionLayout, VisionModel, VisionOutput},
    },
};

/// Where decoding after a prefill starts.
#[derive(Debug, Clone, PartialEq)]
pub struct DecodeStart {
    /// The first new token of each row.
    pub tokens: Vec<u32>,
    /// Its position.
    pub positions: Vec<i64>,
    /// Steps that may follow.
    pub most_steps: usize,
    /// How tokens are chosen.
    pub sampling: SamplingConfig,
    /// Uniform numbers of the draws to come, a list for each row; empty when none are drawn.
    pub draws: Vec<Vec<f32>>,
    /// All tokens before the first new one, a list for each row; empty without a repetition penalty.
    pub seen: Vec<Vec<u32>>,
}

/// Decodes a batch after a prefill, one token a row and step; each step takes the tokens of the last.
pub trait Decoder {
    /// The token chosen after the last one of each row; `None` where the logits are NaN. The next
    /// step takes these tokens.
    ///
    /// # Errors
    /// What the driver says.
    fn next_tokens(&mut self) -> Result<Vec<Option<u32>>, String>;

    /// Logits after the given tokens, one a row: `[batch][vocab]`.
    ///
    /// # Errors
    /// What the driver says.
    fn next_logits(&mut self, tokens: &[u32]) -> Result<Vec<Vec<f32>>, String>;

    /// Tokens of one sequence that a step can verify at most, where the batch is one row; 0 where it cannot.
    fn most_verified(&self) -> usize {
        0
    }

    /// The likeliest tokens after the given ones, the newest of the sequence and tokens drafted after it; `None` where logits are
    /// NaN. Which of them stay, [`Decoder::keep`] says. Not together with the other steps.
    ///
    /// # Errors
    /// What the driver says.
    fn verify(&mut self, _tokens: &[u32]) -> Result<Vec<Option<u32>>, String> {
        Err("this decoder verifies nothing".into())
    }

    /// Keeps the first `tokens` of those that were verified last.
    fn keep(&mut self, _tokens: usize) {}
}

/// A backend with the operations of the model, and perhaps faster ways through whole models.
pub trait Accelerator: Ops {
    /// Puts the weights of a model that has been loaded for inference into the order that this backend's kernels read.
    fn arrange(model: Qwen3Vl<Self>, _config: &Qwen3VlConfig) -> Qwen3Vl<Self> {
        model
    }

    /// Compiles what a request of any length may need, so that none has to wait for it; what decoding
    /// batches of up to `largest_batch` takes, in the background, for weights in this form. `on_progress` gets
    /// kernels done and in all.
    fn prepare(
        _config: &Qwen3VlConfig,
        _weights: (DType, Option<Quantization>),
        _device: &Self::Device,
        _largest_batch: usize,
        _on_progress: &mut dyn FnMut(u64, u64),
    ) {
    }

    /// The vision tower over some images, for inference; `run` is the tower in plain operations.
    fn vision_tower(
        _tower: &VisionModel<Self>,
        _images: &ImageInput,
        _layout: &VisionLayout<Self>,
        run: impl Fn() -> VisionOutput<Self>,
    ) -> VisionOutput<Self> {
        run()
    }

    /// Waits until background preparation for a model has finished: before something is timed.
    fn wait_for_background(_model: &Qwen3Vl<Self>) {}

    /// Whether [`Accelerator::decoder`] may take over: caches then hold all tokens of a request from the
    /// start, and what no token has been written to is never read.
    const HAS_DECODER: bool = false;

    /// Whether a decoder may verify drafted tokens of a single row: it is then faster than a step of
    /// [`DecodeBackend`](super::generate::backend::DecodeBackend).
    const DECODER_VERIFIES: bool = false;

    /// A faster decoder after a prefill, where there is one for the model.
    fn decoder(
        _model: &Qwen3Vl<Self>,
        _config: &Qwen3VlConfig,
        _cache: &KeyValueCache<Self>,
        _start: &DecodeStart,
    ) -> Option<Box<dyn Decoder>> {
        None
    }

    /// Rows up to which a step of a [`DecodeBackend`](super::generate::backend::DecodeBackend) takes little longer than one of
    /// one row: weights are read once for all.
    const CHEAP_ROWS: usize = 8;

    /// An engine for serving that is faster than plain operations, where there is one for the model;
    /// `on_progress` gets parts done and all parts of what is made ready beforehand.
    ///
    /// # Errors
    /// What the device has no room for, and what to lower.
    fn serving_decoder(
        _model: &Qwen3Vl<Self>,
        _config: &Qwen3VlConfig,
        _limits: &ServingLimits,
        _on_progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Option<ServingDecoder<Self>>, String> {
        Ok(None)
    }
}

/// A backend that trains, and infers with all it has.
pub trait TrainAccelerator: AutodiffBackend<InnerBackend: Accelerator> + Accelerator {}

impl<B: AutodiffBackend<InnerBackend: Accelerator> + Accelerator> TrainAccelerator for B {}

impl<B: Accelerator, C: CheckpointStrategy> Accelerator for Autodiff<B, C> {}

#[cfg(feature = "flex")]
impl Accelerator for burn_flex::Flex {}

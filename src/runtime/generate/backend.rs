//! What the serving engine needs of a device: sequences in slots of the KV cache, fed piece by piece.
//!
//! The engine (`serve::engine`) decides who runs; a [`DecodeBackend`] computes. One implementation
//! works on every Burn backend ([`super::slots::PlainDecoder`]); a device with a faster way to decode
//! brings its own.

use std::{ops::Range, path::Path};

use super::sampler::TokenChoice;
use crate::{
    adapters::lora::config::AdapterError,
    batch::{images::ImageInput, positions::Positions},
    ops::quantised::cache::CacheFormat,
    qwen3_vl::vision::VisionOutput,
};

/// A sequence's place in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SlotId(pub u64);

/// The base model or one of its adapters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AdapterId(pub u64);

impl AdapterId {
    /// The base model as loaded.
    pub const BASE: Self = Self(0);
}

/// An adapter that was loaded beside the base.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadedAdapter {
    /// What slots name it by.
    pub id: AdapterId,
    /// What a reader of its answers should know about how its files were read.
    pub notes: Vec<String>,
}

/// Part of a prompt, to be appended to its slot.
#[derive(Debug, Clone)]
pub struct Chunk<'a, F> {
    /// Token ids, image placeholders expanded; not empty.
    pub input_ids: &'a [u32],
    /// Positions of these tokens.
    pub positions: Positions,
    /// Features of the image tokens among `input_ids`, in order: an image's features and which of
    /// them.
    pub features: Vec<(F, Range<usize>)>,
    /// Whether the logits after the last token are wanted.
    pub wants_logits: bool,
}

/// What is wanted of a row after its newest token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pick {
    /// The logits: the caller changes or reports them before a token is chosen.
    Logits,
    /// The next token, chosen so.
    Token(TokenChoice),
}

/// Result of a step for a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Stepped {
    /// The logits: wanted, or from a device that leaves the choice to its caller.
    Logits(Vec<f32>),
    /// The token; `None` where the logits are NaN.
    Token(Option<u32>),
}

/// One token more for a sequence. Rows of one slot are adjacent in a step: its newest token and then tokens drafted after
/// it, each of which sees those before it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepRow {
    /// The sequence.
    pub slot: SlotId,
    /// Its newest token, or a drafted one.
    pub token: u32,
    /// The token's position, the same on all axes.
    pub position: i64,
    /// What is wanted. The tokens seen, for a penalty, are all that the slot was fed.
    pub pick: Pick,
}

/// Sizes that a backend's own engine must have memory for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServingLimits {
    /// Rows of a step: sequences, and tokens drafted for them.
    pub rows: usize,
    /// Tokens of all slots, each slot rounded up to 256.
    pub cache_tokens: usize,
    /// Tokens of a prompt that come at once.
    pub prefill_chunk: usize,
    /// Whether adapters will be loaded.
    pub adapters: bool,
    /// How keys and values are stored.
    pub kv_cache: CacheFormat,
    /// Whether all that requests may need is compiled and captured beforehand, so that none waits for it.
    pub warm_up: bool,
}

/// An engine made for one backend.
pub type ServingDecoder<B> = Box<dyn DecodeBackend<Features = VisionOutput<B>> + Send>;

/// Computes sequences that come and go independently.
///
/// Logits are f32 rows of the whole vocabulary on the host. A row must not depend on the other rows
/// of its step beyond rounding. A method may panic (a driver does); slots it was working on must then
/// either still hold what they held before, or panic again when used.
pub trait DecodeBackend {
    /// Features of one image, cheap to clone.
    type Features: Clone;

    /// Runs the vision tower over one image with the weights of `adapter`.
    fn encode_image(&mut self, adapter: AdapterId, image: &ImageInput) -> Self::Features;

    /// An empty slot for a sequence of at most `capacity` tokens.
    fn start(&mut self, adapter: AdapterId, capacity: usize) -> SlotId;

    /// A slot that starts with the first `tokens` tokens of `source`, which stays as it is.
    fn fork(&mut self, source: SlotId, tokens: usize, capacity: usize) -> SlotId;

    /// Appends part of a prompt; returns the logits after its last token where they are wanted.
    fn prefill(&mut self, slot: SlotId, chunk: &Chunk<'_, Self::Features>) -> Option<Vec<f32>>;

    /// Starts the next step, where the device works asynchronously:
    /// prompts of other slots may go through before [`DecodeBackend::step`] wants the same rows' results.
    fn begin_step(&mut self, _rows: &[StepRow]) {}

    /// Appends tokens to several slots and returns what is wanted after each.
    fn step(&mut self, rows: &[StepRow]) -> Vec<Stepped>;

    /// Takes the last tokens of a slot back until it holds `tokens`.
    fn truncate(&mut self, slot: SlotId, tokens: usize);

    /// Rows up to which a step takes little longer than one of one row, so that it is worth drafting that many.
    fn cheap_rows(&self) -> usize;

    /// Frees a slot.
    fn free(&mut self, slot: SlotId);

    /// Loads a PEFT adapter beside the base.
    ///
    /// # Errors
    /// [`AdapterError`].
    fn load_adapter(&mut self, dir: &Path) -> Result<LoadedAdapter, AdapterError>;

    /// Drops an adapter; no slot uses it any more.
    fn unload_adapter(&mut self, adapter: AdapterId);
}

impl<T: DecodeBackend + ?Sized> DecodeBackend for Box<T> {
    type Features = T::Features;

    fn encode_image(&mut self, adapter: AdapterId, image: &ImageInput) -> Self::Features {
        (**self).encode_image(adapter, image)
    }

    fn start(&mut self, adapter: AdapterId, capacity: usize) -> SlotId {
        (**self).start(adapter, capacity)
    }

    fn fork(&mut self, source: SlotId, tokens: usize, capacity: usize) -> SlotId {
        (**self).fork(source, tokens, capacity)
    }

    fn prefill(&mut self, slot: SlotId, chunk: &Chunk<'_, Self::Features>) -> Option<Vec<f32>> {
        (**self).prefill(slot, chunk)
    }

    fn begin_step(&mut self, rows: &[StepRow]) {
        (**self).begin_step(rows);
    }

    fn step(&mut self, rows: &[StepRow]) -> Vec<Stepped> {
        (**self).step(rows)
    }

    fn truncate(&mut self, slot: SlotId, tokens: usize) {
        (**self).truncate(slot, tokens);
    }

    fn cheap_rows(&self) -> usize {
        (**self).cheap_rows()
    }

    fn free(&mut self, slot: SlotId) {
        (**self).free(slot);
    }

    fn load_adapter(&mut self, dir: &Path) -> Result<LoadedAdapter, AdapterError> {
        (**self).load_adapter(dir)
    }

    fn unload_adapter(&mut self, adapter: AdapterId) {
        (**self).unload_adapter(adapter);
    }
}

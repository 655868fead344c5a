//! What the serving engine asks of a device: sequences in places of their own, fed piece by piece.
//!
//! The engine (`serve::engine`) decides who runs; a [`DecodeBackend`] computes. One implementation
//! works on every Burn backend ([`super::slots::PlainDecoder`]); a device with a faster way to decode
//! brings its own.

use std::{ops::Range, path::Path};

use crate::{
    lora::config::AdapterError,
    qwen3_vl::{ImageInput, rope::Positions},
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

/// Part of a prompt, to be put behind what its slot holds.
#[derive(Debug, Clone)]
pub struct Chunk<'a, F> {
    /// Token ids, image placeholders expanded; not empty.
    pub input_ids: &'a [u32],
    /// Positions of these tokens.
    pub positions: Positions,
    /// Features of the image tokens among `input_ids`, in order: an image's features and which of
    /// them.
    pub features: Vec<(F, Range<usize>)>,
    /// Whether the logits behind the last token are wanted.
    pub wants_logits: bool,
}

/// One token more for a sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRow {
    /// The sequence.
    pub slot: SlotId,
    /// Its newest token.
    pub token: u32,
    /// The token's position, the same on all axes.
    pub position: i64,
}

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

    /// Appends part of a prompt; gives the logits behind its last token where they are wanted.
    fn prefill(&mut self, slot: SlotId, chunk: &Chunk<'_, Self::Features>) -> Option<Vec<f32>>;

    /// Appends one token to each of several slots and gives the logits behind each.
    fn step(&mut self, rows: &[StepRow]) -> Vec<Vec<f32>>;

    /// Gives a slot back.
    fn free(&mut self, slot: SlotId);

    /// Loads a PEFT adapter beside the base.
    ///
    /// # Errors
    /// [`AdapterError`].
    fn load_adapter(&mut self, dir: &Path) -> Result<AdapterId, AdapterError>;

    /// Drops an adapter; no slot uses it any more.
    fn unload_adapter(&mut self, adapter: AdapterId);
}

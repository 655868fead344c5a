//! Continuous batching on any Burn backend: sequences of different lengths side by side, without padding.
//!
//! Linear layers see the tokens of all rows as one matrix; attention is computed row by row, each
//! over its own keys. So a row costs what it costs alone, and no row sees another.
//!
//! Shape letters: `n` tokens of all rows together, `m` image features among them.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
};

use burn::{prelude::*, tensor::DType};

use super::backend::{AdapterId, Chunk, DecodeBackend, LoadedAdapter, SlotId, StepRow, Stepped};
use crate::{
    adapters::lora::{config::AdapterError, files::attach_adapter},
    batch::{images::ImageInput, positions::Positions, text::TextInput},
    ops::{AttentionSpans, Ops, quantised::cache::CacheFormat},
    qwen3_vl::{
        ImageFeatures, Qwen3Vl,
        config::Qwen3VlConfig,
        key_values::{KeyValues, LayerKeyValues},
        layer::{SequenceGroup, TextContext},
        rope::RopeTables,
        vision::VisionOutput,
    },
    runtime::{accelerator::Accelerator, vision::encode_images},
};

/// One sequence.
#[derive(Debug, Clone)]
struct Slot<B: Backend> {
    adapter: AdapterId,
    layers: Vec<LayerKeyValues<B>>,
    /// Tokens held; a pass that was interrupted by a panic is not among them.
    len: usize,
}

/// The slots of a pass, one a group.
struct SlotRows<'a, B: Backend> {
    slots: &'a mut HashMap<SlotId, Slot<B>>,
    rows: Vec<SlotId>,
}

impl<B: Ops> KeyValues<B> for SlotRows<'_, B> {
    fn append(
        &mut self,
        group: usize,
        layer: usize,
        k: Tensor<B, 4>,
        v: Tensor<B, 4>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let slot = self.slots.get_mut(&self.rows[group]);
        let slot = slot.expect("the slot is in use");
        slot.layers[layer].append(slot.len, k, v)
    }
}

/// The engine of every backend, in plain Burn operations.
#[derive(Debug)]
pub struct PlainDecoder<B: Backend> {
    config: Qwen3VlConfig,
    device: B::Device,
    /// The base and its adapters; they share the base's weights.
    models: BTreeMap<AdapterId, Qwen3Vl<B>>,
    slots: HashMap<SlotId, Slot<B>>,
    next: u64,
    kv_cache: CacheFormat,
}

impl<B: Accelerator> PlainDecoder<B> {
    /// An engine around a loaded model.
    pub fn new(model: Qwen3Vl<B>, config: Qwen3VlConfig, device: B::Device) -> Self {
        Self {
            config,
            device,
            models: BTreeMap::from([(AdapterId::BASE, model)]),
            slots: HashMap::new(),
            next: 1,
            kv_cache: CacheFormat::default(),
        }
    }

    /// Keeps keys and values of sequences that start from now on in another format.
    #[must_use]
    pub fn with_cache(self, kv_cache: CacheFormat) -> Self {
        Self { kv_cache, ..self }
    }

    /// Slots in use.
    pub fn slots(&self) -> usize {
        self.slots.len()
    }

    fn fresh(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// [`pass`] over slots of one adapter; the logits come to the host.
    fn pass(
        &mut self,
        adapter: AdapterId,
        rows: &[(SlotId, &[u32])],
        positions: &Positions,
        vision: Option<VisionOutput<B>>,
        wanted: &[usize],
    ) -> Vec<Vec<f32>> {
        let new: Vec<NewTokens<'_>> = rows
            .iter()
            .map(|(slot, input_ids)| NewTokens {
                held: self.slots[slot].len,
                input_ids,
            })
            .collect();
        let key_values = SlotRows {
            slots: &mut self.slots,
            rows: rows.iter().map(|(slot, _)| *slot).collect(),
        };
        let logits = pass(
            &self.models[&adapter],
            &self.config,
            &self.device,
            key_values,
            &new,
            positions,
            vision,
            wanted,
        );
        let Some(logits) = logits else {
            return Vec::new();
        };
        let vocab = logits.dims()[1];
        let values: Vec<f32> = logits.into_data().iter::<f32>().collect();
        values.chunks(vocab).map(<[f32]>::to_vec).collect()
    }

    /// Counts the tokens of a pass, once all of it has succeeded.
    fn commit(&mut self, slot: SlotId, tokens: usize) {
        if let Some(slot) = self.slots.get_mut(&slot) {
            slot.len += tokens;
        }
    }
}

/// New tokens of one sequence.
pub(crate) struct NewTokens<'a> {
    /// Tokens held of the sequence before these.
    pub(crate) held: usize,
    /// The new ones.
    pub(crate) input_ids: &'a [u32],
}

/// Runs new tokens of some sequences through a model and returns the logits of the tokens in `wanted`,
/// counted over all rows: `[wanted, vocab]`, f32; `None` when none are wanted. `key_values` has a group
/// for each row; the caller counts the tokens as held when all has succeeded.
///
/// # Panics
/// If a slot is unknown, or if image tokens and features disagree.
#[allow(
    clippy::too_many_arguments,
    reason = "one pass has these operands and no others"
)]
pub(crate) fn pass<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    device: &B::Device,
    key_values: impl KeyValues<B>,
    rows: &[NewTokens<'_>],
    positions: &Positions,
    vision: Option<VisionOutput<B>>,
    wanted: &[usize],
) -> Option<Tensor<B, 2>> {
    let tokens: Vec<u32> = rows.iter().flat_map(|row| row.input_ids).copied().collect();
    let input = TextInput {
        segments: vec![vec![0; tokens.len()]],
        input_ids: vec![tokens],
        positions: positions.clone(),
        image_token_id: config.image_token_id,
    };
    let context = context(rows, positions, config, device);
    let images = vision.map(|vision| ImageFeatures::new(&input, vision, device));
    let x = model.run_layers(&input, images.as_ref(), &context, key_values, device);
    if wanted.is_empty() {
        return None;
    }
    let wanted: Vec<i32> = wanted.iter().map(|row| *row as i32).collect();
    let last = x.select(0, Tensor::from_ints(wanted.as_slice(), device));
    let logits = model.logits(model.norm(last));
    debug_assert_eq!(logits.dtype(), DType::F32);
    Some(logits)
}

/// Each row a group of its own, over its own keys.
fn context<B: Ops>(
    rows: &[NewTokens<'_>],
    positions: &Positions,
    config: &Qwen3VlConfig,
    device: &B::Device,
) -> TextContext<B> {
    let mut start = 0;
    let group = |row: &NewTokens<'_>| {
        let (held, count) = (row.held, row.input_ids.len());
        let tokens = start..start + count;
        start += count;
        SequenceGroup {
            batch: 1,
            tokens,
            spans: AttentionSpans::causal(&[vec![0; held + count]], held, device),
        }
    };
    TextContext {
        groups: rows.iter().map(group).collect(),
        rope: RopeTables::text(positions, &config.text_config, device),
        dropout_seed: None,
    }
}

impl<B: Accelerator> DecodeBackend for PlainDecoder<B> {
    type Features = VisionOutput<B>;

    fn encode_image(&mut self, adapter: AdapterId, image: &ImageInput) -> Self::Features {
        encode_images(&self.models[&adapter], image, &self.config, &self.device)
    }

    fn start(&mut self, adapter: AdapterId, _capacity: usize) -> SlotId {
        let id = SlotId(self.fresh());
        let layers = self.config.text_config.num_hidden_layers;
        let slot = Slot {
            adapter,
            layers: (0..layers)
                .map(|_| LayerKeyValues::forking(self.kv_cache))
                .collect(),
            len: 0,
        };
        self.slots.insert(id, slot);
        id
    }

    fn fork(&mut self, source: SlotId, tokens: usize, _capacity: usize) -> SlotId {
        let id = SlotId(self.fresh());
        // Handles: the buffers are copied when one of the two writes.
        let mut slot = self.slots[&source].clone();
        assert!(tokens <= slot.len, "the source holds fewer tokens");
        slot.len = tokens;
        self.slots.insert(id, slot);
        id
    }

    fn prefill(&mut self, slot: SlotId, chunk: &Chunk<'_, Self::Features>) -> Option<Vec<f32>> {
        let adapter = self.slots[&slot].adapter;
        let vision = join_features(&chunk.features);
        let wanted = [chunk.input_ids.len() - 1];
        let wanted: &[usize] = if chunk.wants_logits { &wanted } else { &[] };
        let rows = [(slot, chunk.input_ids)];
        let logits = self.pass(adapter, &rows, &chunk.positions, vision, wanted);
        self.commit(slot, chunk.input_ids.len());
        logits.into_iter().next()
    }

    /// Always logits: choosing a token costs the host less than a plain device a kernel.
    fn step(&mut self, rows: &[StepRow]) -> Vec<Stepped> {
        // Rows of one adapter go together; the results go back to the places they came from.
        let mut groups: BTreeMap<AdapterId, Vec<usize>> = BTreeMap::new();
        for (place, row) in rows.iter().enumerate() {
            groups
                .entry(self.slots[&row.slot].adapter)
                .or_default()
                .push(place);
        }
        let mut logits = vec![Vec::new(); rows.len()];
        for (adapter, places) in groups {
            let tokens: Vec<u32> = places.iter().map(|place| rows[*place].token).collect();
            let mut positions = Positions::default();
            for place in &places {
                positions.push([rows[*place].position; 3]);
            }
            // The tokens of a slot go through as those of a prompt do.
            let mut group: Vec<(SlotId, &[u32])> = Vec::with_capacity(places.len());
            let mut rest = &tokens[..];
            for of_slot in places.chunk_by(|a, b| rows[*a].slot == rows[*b].slot) {
                let (own, others) = rest.split_at(of_slot.len());
                group.push((rows[of_slot[0]].slot, own));
                rest = others;
            }
            let wanted: Vec<usize> = (0..places.len()).collect();
            let of_group = self.pass(adapter, &group, &positions, None, &wanted);
            for (place, row) in places.into_iter().zip(of_group) {
                logits[place] = row;
            }
        }
        for row in rows {
            self.commit(row.slot, 1);
        }
        logits.into_iter().map(Stepped::Logits).collect()
    }

    fn truncate(&mut self, slot: SlotId, tokens: usize) {
        let slot = self.slots.get_mut(&slot).expect("the slot is in use");
        assert!(tokens <= slot.len, "the slot holds fewer tokens");
        // What comes next is written over the others.
        slot.len = tokens;
    }

    fn cheap_rows(&self) -> usize {
        B::CHEAP_ROWS
    }

    fn free(&mut self, slot: SlotId) {
        self.slots.remove(&slot);
    }

    fn load_adapter(&mut self, dir: &Path) -> Result<LoadedAdapter, AdapterError> {
        let base = self.models[&AdapterId::BASE].clone();
        let adapted = attach_adapter(base, dir)?;
        for note in &adapted.notes {
            log::info!("adapter `{}`: {note}", dir.display());
        }
        let id = AdapterId(self.fresh());
        self.models.insert(id, adapted.model);
        Ok(LoadedAdapter {
            id,
            notes: adapted.notes,
        })
    }

    fn unload_adapter(&mut self, adapter: AdapterId) {
        if adapter != AdapterId::BASE {
            self.models.remove(&adapter);
        }
    }
}

/// The named features of several images one after another; `None` without any.
pub(crate) fn join_features<B: Accelerator>(
    features: &[(VisionOutput<B>, std::ops::Range<usize>)],
) -> Option<VisionOutput<B>> {
    let cut = |tensor: &Tensor<B, 2>, range: &std::ops::Range<usize>| {
        tensor.clone().narrow(0, range.start, range.len())
    };
    let (first, _) = features.first()?;
    let joined = |of: &dyn Fn(&VisionOutput<B>) -> Tensor<B, 2>| {
        let parts = features
            .iter()
            .map(|(output, range)| cut(&of(output), range))
            .collect();
        Tensor::cat(parts, 0)
    };
    Some(VisionOutput {
        merged: joined(&|output| output.merged.clone()),
        deepstack: (0..first.deepstack.len())
            .map(|level| joined(&|output| output.deepstack[level].clone()))
            .collect(),
    })
}

#[cfg(all(test, feature = "flex"))]
#[path = "slots_tests.rs"]
mod tests;

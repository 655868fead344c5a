//! Decoding on any Burn backend: sequences of different lengths side by side, without padding.
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

use super::backend::{AdapterId, Chunk, DecodeBackend, SlotId, StepRow, Stepped};
use crate::{
    adapters::lora::{config::AdapterError, files::load_adapter},
    batch::{images::ImageInput, positions::Positions, text::TextInput},
    ops::{
        AttentionSpans,
        quantised::cache::{CacheFormat, PackedCache},
    },
    qwen3_vl::{
        ImagePlacement, Qwen3Vl,
        config::Qwen3VlConfig,
        nn::RmsNorm,
        rope::RopeTables,
        text::{DecoderLayer, TextAttention},
        vision::VisionOutput,
    },
    runtime::{accelerator::Accelerator, vision::encode_images},
};

/// Tokens by which the buffers of a slot grow.
const GROWTH: usize = 256;

/// Keys and values of one layer of one sequence.
#[derive(Debug, Clone, Default)]
struct SlotLayer<B: Backend> {
    /// `[1, key_value_heads, capacity, head_dim]` each.
    buffers: Option<(Tensor<B, 4>, Tensor<B, 4>)>,
    /// In place of these in a packed cache.
    packed: Option<PackedCache<B>>,
    format: CacheFormat,
}

impl<B: Backend> SlotLayer<B> {
    fn new(format: CacheFormat) -> Self {
        Self {
            buffers: None,
            packed: None,
            format,
        }
    }

    /// Writes new tokens behind the first `len` and gives all keys and values.
    ///
    /// # Panics
    /// If an earlier write was interrupted by a panic and took the buffers with it.
    fn append(
        &mut self,
        len: usize,
        k: Tensor<B, 4>,
        v: Tensor<B, 4>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let [_, heads, new, head_dim] = k.dims();
        let end = len + new;
        if self.format == CacheFormat::Int8 {
            let held = self.packed.take();
            assert!(len == 0 || held.is_some(), "the sequence's cache is lost");
            let capacity = end.next_multiple_of(GROWTH);
            let (packed, seen) = PackedCache::append(held, len, [k, v], capacity);
            self.packed = Some(packed);
            return seen;
        }
        let old = self.buffers.take();
        assert!(len == 0 || old.is_some(), "the sequence's cache is lost");
        let (keys, values) = match old {
            Some((keys, values)) if end <= keys.dims()[2] => (keys, values),
            old => {
                let capacity = end.next_multiple_of(GROWTH);
                let grown = |old: Option<Tensor<B, 4>>, like: &Tensor<B, 4>| {
                    let empty = Tensor::zeros(
                        [1, heads, capacity, head_dim],
                        (&like.device(), like.dtype()),
                    );
                    match old {
                        Some(old) => {
                            let held = [0..1, 0..heads, 0..len, 0..head_dim];
                            empty.slice_assign(held.clone(), old.slice(held))
                        }
                        None => empty,
                    }
                };
                let (old_keys, old_values) = old.unzip();
                (grown(old_keys, &k), grown(old_values, &v))
            }
        };
        let range = [0..1, 0..heads, len..end, 0..head_dim];
        let keys = keys.slice_assign(range.clone(), k);
        let values = values.slice_assign(range, v);
        let seen = (
            keys.clone().narrow(2, 0, end),
            values.clone().narrow(2, 0, end),
        );
        self.buffers = Some((keys, values));
        seen
    }
}

/// One sequence.
#[derive(Debug, Clone)]
struct Slot<B: Backend> {
    adapter: AdapterId,
    layers: Vec<SlotLayer<B>>,
    /// Tokens held; a pass that was interrupted by a panic is not among them.
    len: usize,
}

/// One row of a pass.
struct Row<B: Backend> {
    slot: SlotId,
    /// Place of the row's first token among all tokens.
    at: usize,
    /// Its number of tokens.
    count: usize,
    /// What its queries see of the row's own keys.
    spans: AttentionSpans<B>,
}

/// The rows of one pass, and where their tokens stand.
struct Layout<B: Backend> {
    rows: Vec<Row<B>>,
    rope: RopeTables<B>,
}

/// Where a pass puts new keys and values, and finds those before them.
pub(crate) trait SlotCache<B: Backend> {
    /// Tokens that a slot holds; those of the pass are not among them.
    fn held(&self, slot: SlotId) -> usize;

    /// Puts new keys and values of a layer, `[1, key_value_heads, new, head_dim]` each, behind the
    /// tokens held, and gives those of all tokens.
    fn append(
        &mut self,
        slot: SlotId,
        layer: usize,
        k: Tensor<B, 4>,
        v: Tensor<B, 4>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>);
}

impl<B: Backend> SlotCache<B> for HashMap<SlotId, Slot<B>> {
    fn held(&self, slot: SlotId) -> usize {
        self[&slot].len
    }

    fn append(
        &mut self,
        slot: SlotId,
        layer: usize,
        k: Tensor<B, 4>,
        v: Tensor<B, 4>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let slot = self.get_mut(&slot).expect("the slot is in use");
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
        let logits = pass(
            &self.models[&adapter],
            &self.config,
            &self.device,
            &mut self.slots,
            rows,
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

    /// Counts the tokens of a pass, once all that belongs to it has gone well.
    fn commit(&mut self, slot: SlotId, tokens: usize) {
        if let Some(slot) = self.slots.get_mut(&slot) {
            slot.len += tokens;
        }
    }
}

/// Puts `rows` (a slot and its new tokens each) through a model and gives the logits of the tokens in
/// `wanted`, counted over all rows: `[wanted, vocab]`, f32; `None` when none are wanted. The caller
/// counts the tokens as held when all has gone well.
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
    cache: &mut impl SlotCache<B>,
    rows: &[(SlotId, &[u32])],
    positions: &Positions,
    vision: Option<VisionOutput<B>>,
    wanted: &[usize],
) -> Option<Tensor<B, 2>> {
    let layout = layout(rows, cache, positions, config, device);
    let tokens: Vec<u32> = rows.iter().flat_map(|(_, ids)| *ids).copied().collect();
    let input = TextInput {
        segments: vec![vec![0; tokens.len()]],
        input_ids: vec![tokens],
        positions: positions.clone(),
        image_token_id: config.image_token_id,
    };
    let mut x = model.embed(&input, device);
    let placement = vision.as_ref().map(|vision| {
        let found = input.input_ids[0]
            .iter()
            .filter(|id| **id == input.image_token_id)
            .count();
        assert_eq!(
            found,
            vision.merged.dims()[0],
            "image tokens and features disagree"
        );
        ImagePlacement::new(&input, device)
    });
    if let (Some(vision), Some(placement)) = (&vision, &placement) {
        x = placement.replace(x, vision.merged.clone());
    }
    for (index, layer) in model.model.language_model.layers.iter().enumerate() {
        x = layer_forward(layer, x, &layout, cache, index);
        if let (Some(vision), Some(placement)) = (&vision, &placement)
            && let Some(features) = vision.deepstack.get(index)
        {
            x = x + placement.spread(features.clone());
        }
    }
    if wanted.is_empty() {
        return None;
    }
    let wanted: Vec<i32> = wanted.iter().map(|row| *row as i32).collect();
    let last = x.select(0, Tensor::from_ints(wanted.as_slice(), device));
    let logits = model.logits(model.model.language_model.norm.forward(last));
    debug_assert_eq!(logits.dtype(), DType::F32);
    Some(logits)
}

fn layout<B: Accelerator>(
    rows: &[(SlotId, &[u32])],
    cache: &impl SlotCache<B>,
    positions: &Positions,
    config: &Qwen3VlConfig,
    device: &B::Device,
) -> Layout<B> {
    let mut at = 0;
    let mut layout = Layout {
        rows: Vec::with_capacity(rows.len()),
        rope: RopeTables::text(positions, &config.text_config, device),
    };
    for (slot, ids) in rows {
        let (held, count) = (cache.held(*slot), ids.len());
        let spans = AttentionSpans::causal(&[vec![0; held + count]], held, device);
        layout.rows.push(Row {
            slot: *slot,
            at,
            count,
            spans,
        });
        at += count;
    }
    layout
}

/// `[n, hidden]` → `[n, hidden]`.
fn layer_forward<B: Accelerator>(
    layer: &DecoderLayer<B>,
    x: Tensor<B, 2>,
    layout: &Layout<B>,
    cache: &mut impl SlotCache<B>,
    index: usize,
) -> Tensor<B, 2> {
    let normed = layer.input_layernorm.forward(x.clone());
    let x = attend(&layer.self_attn, normed, x, layout, cache, index);
    let normed = layer.post_attention_layernorm.forward(x.clone());
    layer.mlp.forward(normed, x, None)
}

/// `[n, hidden]` → `[n, hidden]`, plus `residual`: products over all rows together, scores row by
/// row.
fn attend<B: Accelerator>(
    attn: &TextAttention<B>,
    x: Tensor<B, 2>,
    residual: Tensor<B, 2>,
    layout: &Layout<B>,
    cache: &mut impl SlotCache<B>,
    index: usize,
) -> Tensor<B, 2> {
    let rotated = |x: Tensor<B, 2>, norm: &RmsNorm<B>| {
        let heads = attn.split_heads(x);
        layout.rope.rotate(heads, Some(norm.of_heads()))
    };
    let q = rotated(attn.q_proj.forward(x.clone(), None), &attn.q_norm);
    let k = rotated(attn.k_proj.forward(x.clone(), None), &attn.k_norm);
    let v = attn.split_heads(attn.v_proj.forward(x, None));
    let mut parts = Vec::with_capacity(layout.rows.len());
    for row in &layout.rows {
        // [1, heads, count, head_dim]
        let of_row = |x: &Tensor<B, 3>| -> Tensor<B, 4> {
            x.clone()
                .narrow(0, row.at, row.count)
                .unsqueeze_dim::<4>(0)
                .swap_dims(1, 2)
        };
        let (keys, values) = cache.append(row.slot, index, of_row(&k), of_row(&v));
        let y = B::span_attention(of_row(&q), keys, values, &row.spans);
        parts.push(y.swap_dims(1, 2).reshape([row.count as i32, -1]));
    }
    attn.o_proj
        .forward_add(Tensor::cat(parts, 0), residual, None)
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
            layers: (0..layers).map(|_| SlotLayer::new(self.kv_cache)).collect(),
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
            let tokens: Vec<[u32; 1]> = places.iter().map(|place| [rows[*place].token]).collect();
            let mut positions = Positions::default();
            let mut group: Vec<(SlotId, &[u32])> = Vec::with_capacity(places.len());
            for (place, token) in places.iter().zip(&tokens) {
                positions.push([rows[*place].position; 3]);
                group.push((rows[*place].slot, token));
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

    fn free(&mut self, slot: SlotId) {
        self.slots.remove(&slot);
    }

    fn load_adapter(&mut self, dir: &Path) -> Result<AdapterId, AdapterError> {
        let base = self.models[&AdapterId::BASE].clone();
        let (model, _) = load_adapter(base, dir)?;
        let id = AdapterId(self.fresh());
        self.models.insert(id, model);
        Ok(id)
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

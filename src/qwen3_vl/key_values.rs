//! The KV cache: keys and values of earlier tokens, for attention.

use burn::prelude::*;

use crate::ops::{
    Ops, plain,
    quantised::cache::{CacheFormat, QuantisedCache},
};

/// Tokens by which the buffers grow.
const GROWTH: usize = 256;

/// A KV cache: attention appends new keys and values and reads those before them.
pub trait KeyValues<B: Backend> {
    /// Appends those of a group of sequences (an index into the context's groups) in a layer, and
    /// returns all so far.
    ///
    /// # Shapes
    /// - `k`, `v`: `[batch, key_value_heads, new, head_dim]`
    /// - returns: `[batch, key_value_heads, all, head_dim]` each
    fn append(
        &mut self,
        group: usize,
        layer: usize,
        k: Tensor<B, 4>,
        v: Tensor<B, 4>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>);
}

/// `None` keeps nothing: the new keys and values are all there are.
impl<B: Backend, K: KeyValues<B>> KeyValues<B> for Option<K> {
    fn append(
        &mut self,
        group: usize,
        layer: usize,
        k: Tensor<B, 4>,
        v: Tensor<B, 4>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        match self {
            Some(cache) => cache.append(group, layer, k, v),
            None => (k, v),
        }
    }
}

/// Keys and values of one layer, in buffers that grow in steps.
#[derive(Debug, Clone)]
pub struct LayerKeyValues<B: Backend> {
    /// Keys and values, `[batch, key_value_heads, capacity, head_dim]` each.
    buffers: Option<(Tensor<B, 4>, Tensor<B, 4>)>,
    /// In place of these in a quantised cache.
    packed: Option<QuantisedCache<B>>,
    format: CacheFormat,
    /// Tokens the buffers hold at least.
    reserved: usize,
    /// Whether clones keep what they hold when this one is written to.
    forks: bool,
}

impl<B: Ops> LayerKeyValues<B> {
    /// Nothing yet; the first buffers hold at least `reserved` tokens. A clone must not be written to.
    pub fn new(reserved: usize, format: CacheFormat) -> Self {
        Self {
            buffers: None,
            packed: None,
            format,
            reserved,
            forks: false,
        }
    }

    /// Nothing yet, of a sequence whose clones are continued separately.
    pub fn forking(format: CacheFormat) -> Self {
        Self {
            forks: true,
            ..Self::new(0, format)
        }
    }

    /// The buffers of keys and values, `[batch, key_value_heads, capacity, head_dim]` each; none of a
    /// quantised cache.
    pub fn buffers(&self) -> Option<(&Tensor<B, 4>, &Tensor<B, 4>)> {
        self.buffers.as_ref().map(|(keys, values)| (keys, values))
    }

    /// What a quantised cache holds.
    pub fn packed(&self) -> Option<&QuantisedCache<B>> {
        self.packed.as_ref()
    }

    /// Writes new tokens after the first `held` and returns all keys and values.
    ///
    /// # Shapes
    /// - `k`, `v`: `[batch, key_value_heads, new, head_dim]`
    /// - returns: `[batch, key_value_heads, held + new, head_dim]` each
    ///
    /// # Panics
    /// If an earlier write was interrupted by a panic and took the buffers with it.
    pub fn append(
        &mut self,
        held: usize,
        k: Tensor<B, 4>,
        v: Tensor<B, 4>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let [batch, heads, new, head_dim] = k.dims();
        let end = held + new;
        let room = end.max(self.reserved).next_multiple_of(GROWTH);
        if self.format == CacheFormat::Int8 {
            let packed = self.packed.take();
            assert!(held == 0 || packed.is_some(), "the cache is lost");
            let (packed, seen) = QuantisedCache::append(packed, held, [k, v], room);
            self.packed = Some(packed);
            return seen;
        }
        let old = self.buffers.take();
        assert!(held == 0 || old.is_some(), "the cache is lost");
        let (keys, values) = match old {
            Some((keys, values)) if end <= keys.dims()[2] => (keys, values),
            old => {
                let shape = [batch, heads, room, head_dim];
                let grown = |old: Option<Tensor<B, 4>>, like: &Tensor<B, 4>| {
                    let buffer = B::cache_buffer(shape, like.dtype(), &like.device());
                    match old {
                        Some(old) => {
                            let range = [0..batch, 0..heads, 0..held, 0..head_dim];
                            buffer.slice_assign(range.clone(), old.slice(range))
                        }
                        None => buffer,
                    }
                };
                let (old_keys, old_values) = old.unzip();
                (grown(old_keys, &k), grown(old_values, &v))
            }
        };
        // The backend's own way may write into buffers that a clone shares.
        let [keys, values] = if self.forks {
            plain::append_to_cache([keys, values], [k, v], held)
        } else {
            B::append_to_cache([keys, values], [k, v], held)
        };
        let seen = (
            keys.clone().narrow(2, 0, end),
            values.clone().narrow(2, 0, end),
        );
        self.buffers = Some((keys, values));
        seen
    }

    fn select_rows(&mut self, rows: Tensor<B, 1, Int>) {
        if let Some((keys, values)) = self.buffers.take() {
            self.buffers = Some((keys.select(0, rows.clone()), values.select(0, rows.clone())));
        }
        self.packed = self.packed.take().map(|packed| packed.select(rows));
    }
}

/// Keys and values of a batch in all layers, and which token of each row is padding.
#[derive(Debug, Clone)]
pub struct KeyValueCache<B: Backend> {
    /// Those of each layer.
    pub layers: Vec<LayerKeyValues<B>>,
    /// `segments[row][token]`: 0 for a token, negative for padding; those of the current pass
    /// are among them.
    pub segments: Vec<Vec<i32>>,
}

impl<B: Ops> KeyValueCache<B> {
    /// An empty cache for `layers` layers.
    pub fn new(layers: usize) -> Self {
        Self::with_capacity(layers, 0)
    }

    /// An empty cache whose buffers hold at least `tokens` a row from the start.
    pub fn with_capacity(layers: usize, tokens: usize) -> Self {
        Self::with_format(layers, tokens, CacheFormat::Float)
    }

    /// [`KeyValueCache::with_capacity`] in another format.
    pub fn with_format(layers: usize, tokens: usize, format: CacheFormat) -> Self {
        Self {
            layers: (0..layers)
                .map(|_| LayerKeyValues::new(tokens, format))
                .collect(),
            segments: Vec::new(),
        }
    }

    /// Tokens a row the buffers have room for, once something is held.
    pub fn capacity(&self) -> Option<usize> {
        let layer = self.layers.first()?;
        let packed = layer.packed().map(QuantisedCache::capacity);
        packed.or_else(|| layer.buffers().map(|(keys, _)| keys.dims()[2]))
    }

    /// Tokens held for each row, padding included.
    pub fn len(&self) -> usize {
        self.segments.first().map_or(0, Vec::len)
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Counts the tokens of a pass, whose keys and values are yet to come.
    pub(super) fn announce(&mut self, segments: &[Vec<i32>]) {
        if self.segments.is_empty() {
            self.segments = vec![Vec::new(); segments.len()];
        }
        for (all, new) in self.segments.iter_mut().zip(segments) {
            all.extend_from_slice(new);
        }
    }

    /// Forgets all but the first `tokens` of each row; what comes next is written over the others.
    pub fn truncate(&mut self, tokens: usize) {
        for row in &mut self.segments {
            row.truncate(tokens);
        }
    }

    /// Keeps the named rows of the batch only, in the given order.
    pub fn select_rows(&mut self, rows: &[usize], device: &B::Device) {
        let indices: Vec<i32> = rows.iter().map(|row| *row as i32).collect();
        let indices = Tensor::<B, 1, Int>::from_ints(indices.as_slice(), device);
        for layer in &mut self.layers {
            layer.select_rows(indices.clone());
        }
        self.segments = rows.iter().map(|row| self.segments[*row].clone()).collect();
    }
}

impl<B: Ops> KeyValues<B> for &mut KeyValueCache<B> {
    fn append(
        &mut self,
        _group: usize,
        layer: usize,
        k: Tensor<B, 4>,
        v: Tensor<B, 4>,
    ) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let held = self.len() - k.dims()[2];
        self.layers[layer].append(held, k, v)
    }
}

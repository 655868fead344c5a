//! The key/value cache of the language model.

use crate::ops::{
    Ops,
    quantised::cache::{CacheFormat, PackedCache},
};
use burn::prelude::*;

/// Tokens by which the buffers grow.
const GROWTH: usize = 256;

/// Keys and values of one layer, in buffers that grow in steps.
#[derive(Debug, Clone)]
pub struct LayerCache<B: Backend> {
    /// Keys and values, `[batch, key_value_heads, capacity, head_dim]` each.
    buffers: Option<(Tensor<B, 4>, Tensor<B, 4>)>,
    /// In place of these in a packed cache.
    packed: Option<PackedCache<B>>,
    format: CacheFormat,
    len: usize,
    /// Tokens the buffers hold at least.
    reserved: usize,
}

impl<B: Ops> LayerCache<B> {
    fn new(reserved: usize, format: CacheFormat) -> Self {
        Self {
            buffers: None,
            packed: None,
            format,
            len: 0,
            reserved,
        }
    }

    /// The buffers of keys and values, `[batch, key_value_heads, capacity, head_dim]` each; none of a
    /// packed cache.
    pub fn buffers(&self) -> Option<(&Tensor<B, 4>, &Tensor<B, 4>)> {
        self.buffers.as_ref().map(|(keys, values)| (keys, values))
    }

    /// Appends new tokens and gives all keys and values so far.
    ///
    /// # Shapes
    /// - `k`, `v`: `[batch, key_value_heads, new, head_dim]`
    /// - returns: `[batch, key_value_heads, len, head_dim]` each
    pub fn append(&mut self, k: Tensor<B, 4>, v: Tensor<B, 4>) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let [batch, heads, new, head_dim] = k.dims();
        let end = self.len + new;
        if self.format == CacheFormat::Int8 {
            let capacity = end.max(self.reserved).next_multiple_of(GROWTH);
            let held = self.packed.take();
            let (packed, seen) = PackedCache::append(held, self.len, [k, v], capacity);
            self.packed = Some(packed);
            self.len = end;
            return seen;
        }
        let capacity = self.buffers.as_ref().map_or(0, |(keys, _)| keys.dims()[2]);
        let (keys, values) = match self.buffers.take() {
            Some(buffers) if end <= capacity => buffers,
            old => {
                let capacity = end.max(self.reserved).next_multiple_of(GROWTH);
                let shape = [batch, heads, capacity, head_dim];
                let empty =
                    |like: &Tensor<B, 4>| B::cache_buffer(shape, like.dtype(), &like.device());
                let (mut keys, mut values) = (empty(&k), empty(&v));
                if let Some((old_keys, old_values)) = old {
                    let range = [0..batch, 0..heads, 0..self.len, 0..head_dim];
                    keys = keys.slice_assign(range.clone(), old_keys.slice(range.clone()));
                    values = values.slice_assign(range.clone(), old_values.slice(range));
                }
                (keys, values)
            }
        };
        let [keys, values] = B::append_to_cache([keys, values], [k, v], self.len);
        self.len = end;
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

/// The caches of all layers, and which token of each row is padding.
#[derive(Debug, Clone)]
pub struct KeyValueCache<B: Backend> {
    /// One cache a layer.
    pub layers: Vec<LayerCache<B>>,
    /// `segments[row][token]`: 0 for a token, negative for padding.
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
                .map(|_| LayerCache::new(tokens, format))
                .collect(),
            segments: Vec::new(),
        }
    }

    /// Tokens a row the buffers have room for, once something is held.
    pub fn capacity(&self) -> Option<usize> {
        let (keys, _) = self.layers.first()?.buffers()?;
        Some(keys.dims()[2])
    }

    /// Tokens held for each row, padding included.
    pub fn len(&self) -> usize {
        self.segments.first().map_or(0, Vec::len)
    }

    /// Whether nothing is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
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

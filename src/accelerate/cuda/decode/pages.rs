//! Keys and values of all sequences in pages of one pool, and a reference count for each page: `pages.cu`.

use std::{
    ops::Deref,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use burn::{prelude::*, tensor::DType};

use super::{
    module::DriverError,
    step_io::LayerCache,
    stream::{Context, DeviceMemory, Stream},
};
use crate::{
    accelerate::cuda::{
        attention::with_contiguous_heads,
        launch::{Backend, Kernel, empty, launch, tensor},
        operand::Operand,
    },
    ops::quantised::cache::CacheFormat,
    qwen3_vl::config::TextConfig,
};

const SOURCES: &[&str] = &[include_str!("../scalar.cuh"), include_str!("pages.cu")];

/// Tokens of a page.
pub(super) const PAGE: usize = 64;

/// The pool. No sequence owns page 0: unused rows of a step write there.
pub(super) struct PagePool {
    memory: DeviceMemory,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    pages: usize,
    format: CacheFormat,
    ledger: Arc<Mutex<Ledger>>,
}

/// Reference counts of the pages.
#[derive(Debug)]
struct Ledger {
    free: Vec<u32>,
    /// Sequences that hold each page.
    holders: Vec<u32>,
}

/// The pages of a sequence, returned to their pool on drop.
#[derive(Debug)]
pub(super) struct HeldPages {
    pages: Vec<u32>,
    ledger: Arc<Mutex<Ledger>>,
}

impl Deref for HeldPages {
    type Target = [u32];

    fn deref(&self) -> &[u32] {
        &self.pages
    }
}

impl HeldPages {
    /// Pages for the sequence until it holds `tokens` tokens.
    ///
    /// # Panics
    /// When no page is free: the engine's budget is the pool's size.
    pub(super) fn grow(&mut self, tokens: usize) {
        let mut ledger = locked(&self.ledger);
        while self.pages.len() * PAGE < tokens {
            let page = ledger.free.pop();
            let page = page.expect("the key/value cache is full; raise `--cache-tokens`");
            ledger.holders[page as usize] = 1;
            self.pages.push(page);
        }
    }

    /// The first pages, shared with another sequence.
    fn shared(&self, pages: usize) -> Self {
        let mut ledger = locked(&self.ledger);
        let pages = self.pages[..pages].to_vec();
        for page in &pages {
            ledger.holders[*page as usize] += 1;
        }
        Self {
            pages,
            ledger: self.ledger.clone(),
        }
    }
}

impl Drop for HeldPages {
    fn drop(&mut self) {
        let ledger = &mut *locked(&self.ledger);
        for page in &self.pages {
            let holders = &mut ledger.holders[*page as usize];
            *holders -= 1;
            if *holders == 0 {
                ledger.free.push(*page);
            }
        }
    }
}

/// A panic while the lock is held leaves a consistent ledger, so a poisoned lock is used.
fn locked(ledger: &Mutex<Ledger>) -> MutexGuard<'_, Ledger> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

impl PagePool {
    /// Room for so many tokens.
    pub(super) fn new(
        text: &TextConfig,
        tokens: usize,
        format: CacheFormat,
        context: Context,
    ) -> Result<Self, DriverError> {
        let pages = tokens.div_ceil(PAGE) + 1;
        let (layers, kv_heads, head_dim) = (
            text.num_hidden_layers,
            text.num_key_value_heads,
            text.head_dim,
        );
        let row = match format {
            CacheFormat::Float => head_dim * DType::BF16.size(),
            CacheFormat::Int8 => head_dim + size_of::<f32>(),
        };
        let bytes = 2 * layers * pages * kv_heads * PAGE * row;
        Ok(Self {
            memory: DeviceMemory::fresh(context, bytes)?,
            layers,
            kv_heads,
            head_dim,
            pages,
            format,
            ledger: Arc::new(Mutex::new(Ledger {
                free: (1..pages as u32).rev().collect(),
                holders: vec![0; pages],
            })),
        })
    }

    /// Bytes of a page: keys, or values, of one layer.
    fn page_bytes(&self) -> usize {
        let element = match self.format {
            CacheFormat::Float => DType::BF16.size(),
            CacheFormat::Int8 => 1,
        };
        self.kv_heads * PAGE * self.head_dim * element
    }

    /// Bytes of a page's scales: of keys, or values, of one layer.
    fn scale_bytes(&self) -> usize {
        match self.format {
            CacheFormat::Float => 0,
            CacheFormat::Int8 => self.kv_heads * PAGE * size_of::<f32>(),
        }
    }

    /// Start addresses of a layer's keys and values.
    fn layer(&self, index: usize) -> [u64; 2] {
        let bytes = self.pages * self.page_bytes();
        [2 * index, 2 * index + 1].map(|part| self.memory.address + (part * bytes) as u64)
    }

    /// Start addresses of the scales of a layer's keys and values, where the pool is quantised: after all
    /// keys and values.
    fn scales(&self, index: usize) -> Option<[u64; 2]> {
        let all = 2 * self.layers * self.pages * self.page_bytes();
        let bytes = self.pages * self.scale_bytes();
        let at = |part: usize| self.memory.address + (all + part * bytes) as u64;
        (self.format == CacheFormat::Int8).then(|| [at(2 * index), at(2 * index + 1)])
    }

    /// All layers, as a step reads them.
    pub(super) fn caches(&self) -> Vec<LayerCache> {
        let row = self.head_dim as u64;
        let head = PAGE as u64 * row;
        let strides = [self.kv_heads as u64 * head, head, row];
        (0..self.layers)
            .map(|layer| {
                let [keys, values] = self.layer(layer);
                LayerCache {
                    keys,
                    values,
                    key_strides: strides,
                    value_strides: strides,
                    scales: self.scales(layer),
                    capacity: self.pages * PAGE,
                }
            })
            .collect()
    }

    /// A sequence without pages.
    pub(super) fn hold(&self) -> HeldPages {
        HeldPages {
            pages: Vec::new(),
            ledger: self.ledger.clone(),
        }
    }

    /// Pages of a new sequence that begins with the first `tokens` tokens of another: whole pages are
    /// shared, the rest is copied.
    pub(super) fn fork(
        &self,
        source: &HeldPages,
        tokens: usize,
        stream: &Stream,
    ) -> Result<HeldPages, DriverError> {
        let whole = tokens / PAGE;
        let mut held = source.shared(whole);
        held.grow(tokens);
        if let (Some(to), Some(from)) = (held.get(whole), source.get(whole)) {
            let layers = 0..self.layers;
            let (page, scales) = (self.page_bytes(), self.scale_bytes());
            let of_scales = layers.clone().filter_map(|layer| self.scales(layer));
            let all = layers
                .flat_map(|layer| self.layer(layer))
                .map(|base| (base, page))
                .chain(of_scales.flatten().map(|base| (base, scales)));
            for (base, bytes) in all {
                let offset = |page: u32| (page as usize * bytes) as u64;
                // SAFETY: both pages are in the pool and differ.
                #[allow(unsafe_code)]
                unsafe {
                    stream.copy(base + offset(*to), base + offset(*from), bytes)?;
                }
            }
            stream.wait()?;
        }
        Ok(held)
    }

    /// Writes new keys and values `[1, key_value_heads, new, head_dim]` of a layer after the first
    /// `past` tokens of the sequence with the pages `table`; returns those of all tokens, as the pool holds them.
    pub(super) fn append(
        &self,
        layer: usize,
        table: &Tensor<Backend, 1, Int>,
        past: usize,
        [k, v]: [Tensor<Backend, 4>; 2],
    ) -> (Tensor<Backend, 4>, Tensor<Backend, 4>) {
        let [_, heads, new, head_dim] = k.dims();
        assert_eq!(k.dtype(), DType::BF16, "the pool holds bf16");
        let (keys, values) = (
            with_contiguous_heads(k.clone()),
            with_contiguous_heads(v.clone()),
        );
        let table = table.clone().into_primitive();
        let tokens = past + new;
        let defines = vec![
            ("SCALAR_BF16", 1),
            ("HEAD_DIM", head_dim as i64),
            ("PAGE", PAGE as i64),
            ("CACHE_INT8", i64::from(self.format == CacheFormat::Int8)),
        ];
        let kernel = Kernel::new("pages", SOURCES, defines, 256);
        let mut parameters: Vec<u64> = [heads, new, past].map(|size| size as u64).to_vec();
        for buffer in [&keys, &values] {
            parameters.extend([1, 2].map(|axis| buffer.meta.strides()[axis] as u64));
        }
        parameters.extend(self.layer(layer));
        parameters.extend(self.scales(layer).into_iter().flatten());
        let grid = [(2 * heads * tokens).div_ceil(8), 1, 1];
        let client = keys.client.clone();
        let fresh = |x| Operand::contiguous_rows(x, DType::BF16, [1, heads, new, head_dim]);
        let pages = table.meta.shape().num_elements();
        assert!(
            pages * PAGE >= tokens && (heads, head_dim) == (self.kv_heads, self.head_dim),
            "{tokens} tokens of {heads} heads in {pages} pages"
        );
        let of_sequence = Operand::contiguous(&table, DType::I32, [pages]);
        if past == 0 && self.format == CacheFormat::Float {
            let unused = Operand::unused(&keys);
            let all = [fresh(&keys), fresh(&values), of_sequence, unused, unused];
            launch(&client, kernel, grid, &all, parameters);
            return (k, v);
        }
        let shape = [1, heads, tokens, head_dim];
        let (all_keys, all_values) = (
            empty(&keys, shape, DType::BF16),
            empty(&keys, shape, DType::BF16),
        );
        let joined = |x| Operand::contiguous(x, DType::BF16, shape);
        let all = [
            fresh(&keys),
            fresh(&values),
            of_sequence,
            joined(&all_keys),
            joined(&all_values),
        ];
        launch(&client, kernel, grid, &all, parameters);
        (tensor(all_keys), tensor(all_values))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(pages: u32) -> Arc<Mutex<Ledger>> {
        Arc::new(Mutex::new(Ledger {
            free: (1..pages).rev().collect(),
            holders: vec![0; pages as usize],
        }))
    }

    /// Pages are freed with the last sequence that holds them, however it ends.
    #[test]
    fn pages_go_back_with_their_owner() {
        let ledger = ledger(8);
        let free = || {
            let mut free = locked(&ledger).free.clone();
            free.sort();
            free
        };
        let mut first = HeldPages {
            pages: Vec::new(),
            ledger: ledger.clone(),
        };
        first.grow(3 * PAGE - 1);
        assert_eq!((&first[..], free()), (&[1, 2, 3][..], vec![4, 5, 6, 7]));
        let mut second = first.shared(2);
        second.grow(2 * PAGE + 1);
        assert_eq!(&second[..], [1, 2, 4]);
        drop(first);
        assert_eq!(free(), [3, 5, 6, 7]);
        // A step that panics frees its pages as well.
        let lost = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let _held = second;
            std::panic::resume_unwind(Box::new(()));
        }));
        assert!(lost.is_err());
        assert_eq!(free(), [1, 2, 3, 4, 5, 6, 7]);
    }
}

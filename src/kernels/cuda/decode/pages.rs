//! Keys and values of all sequences in pages of one pool, and who holds which page: `pages.cu`.

use burn::{prelude::*, tensor::DType};

use super::{
    module::DriverError,
    plan::LayerCache,
    stream::{Context, DeviceMemory, Stream},
};
use crate::{
    kernels::cuda::{
        attention::with_dense_heads,
        launch::{Backend, Kernel, empty, launch, tensor},
        operand::Operand,
    },
    qwen3_vl::config::TextConfig,
};

const SOURCES: &[&str] = &[include_str!("../scalar.cuh"), include_str!("pages.cu")];

/// Tokens of a page.
pub(super) const PAGE: usize = 64;

/// The pool. Page 0 belongs to nobody: rows of a step that are not in use write there.
pub(super) struct PagePool {
    memory: DeviceMemory,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    pages: usize,
    free: Vec<u32>,
    /// Sequences that hold each page.
    holders: Vec<u32>,
}

impl PagePool {
    /// Room for so many tokens.
    pub(super) fn new(
        text: &TextConfig,
        tokens: usize,
        context: Context,
    ) -> Result<Self, DriverError> {
        let pages = tokens.div_ceil(PAGE) + 1;
        let (layers, kv_heads, head_dim) = (
            text.num_hidden_layers,
            text.num_key_value_heads,
            text.head_dim,
        );
        let bytes = 2 * layers * pages * kv_heads * PAGE * head_dim * DType::BF16.size();
        Ok(Self {
            memory: DeviceMemory::fresh(context, bytes)?,
            layers,
            kv_heads,
            head_dim,
            pages,
            free: (1..pages as u32).rev().collect(),
            holders: vec![0; pages],
        })
    }

    /// Bytes of a page: keys, or values, of one layer.
    fn page_bytes(&self) -> usize {
        self.kv_heads * PAGE * self.head_dim * DType::BF16.size()
    }

    /// Where the keys and the values of a layer begin.
    fn layer(&self, index: usize) -> [u64; 2] {
        let bytes = self.pages * self.page_bytes();
        [2 * index, 2 * index + 1].map(|part| self.memory.address + (part * bytes) as u64)
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
                    capacity: self.pages * PAGE,
                }
            })
            .collect()
    }

    /// Pages for a sequence until it holds `tokens` tokens.
    ///
    /// # Panics
    /// When there are no more: the engine's budget is the pool's size.
    pub(super) fn grow(&mut self, held: &mut Vec<u32>, tokens: usize) {
        while held.len() * PAGE < tokens {
            let page = self.free.pop();
            let page = page.expect("the key/value cache is full; raise `--cache-tokens`");
            self.holders[page as usize] = 1;
            held.push(page);
        }
    }

    /// Lets go of pages.
    pub(super) fn release(&mut self, held: &[u32]) {
        for page in held {
            let holders = &mut self.holders[*page as usize];
            *holders -= 1;
            if *holders == 0 {
                self.free.push(*page);
            }
        }
    }

    /// Pages of a new sequence that begins with the first `tokens` tokens of another: whole pages are
    /// shared, the rest is copied.
    pub(super) fn fork(
        &mut self,
        source: &[u32],
        tokens: usize,
        stream: &Stream,
    ) -> Result<Vec<u32>, DriverError> {
        let whole = tokens / PAGE;
        let mut held = source[..whole].to_vec();
        for page in &held {
            self.holders[*page as usize] += 1;
        }
        self.grow(&mut held, tokens);
        if let (Some(to), Some(from)) = (held.get(whole), source.get(whole)) {
            let bytes = self.page_bytes();
            let offset = |page: u32| (page as usize * bytes) as u64;
            for base in (0..self.layers).flat_map(|layer| self.layer(layer)) {
                // SAFETY: both pages lie in the pool and are different.
                #[allow(unsafe_code)]
                unsafe {
                    stream.copy(base + offset(*to), base + offset(*from), bytes)?;
                }
            }
            stream.wait()?;
        }
        Ok(held)
    }

    /// Puts new keys and values `[1, key_value_heads, new, head_dim]` of a layer behind the first
    /// `past` tokens of the sequence with the pages `table`; gives those of all tokens.
    pub(super) fn append(
        &self,
        layer: usize,
        table: &Tensor<Backend, 1, Int>,
        past: usize,
        [k, v]: [Tensor<Backend, 4>; 2],
    ) -> (Tensor<Backend, 4>, Tensor<Backend, 4>) {
        let [_, heads, new, head_dim] = k.dims();
        assert_eq!(k.dtype(), DType::BF16, "the pool holds bf16");
        let (keys, values) = (with_dense_heads(k.clone()), with_dense_heads(v.clone()));
        let table = table.clone().into_primitive();
        let tokens = past + new;
        let defines = vec![
            ("SCALAR_BF16", 1),
            ("HEAD_DIM", head_dim as i64),
            ("PAGE", PAGE as i64),
        ];
        let kernel = Kernel::new("pages", SOURCES, defines, 256);
        let mut parameters: Vec<u64> = [heads, new, past].map(|size| size as u64).to_vec();
        for buffer in [&keys, &values] {
            parameters.extend([1, 2].map(|axis| buffer.meta.strides()[axis] as u64));
        }
        parameters.extend(self.layer(layer));
        let grid = [(2 * heads * tokens).div_ceil(8), 1, 1];
        let client = keys.client.clone();
        let fresh = |x| Operand::dense_rows(x, DType::BF16, [1, heads, new, head_dim]);
        let pages = table.meta.shape().num_elements();
        assert!(
            pages * PAGE >= tokens && (heads, head_dim) == (self.kv_heads, self.head_dim),
            "{tokens} tokens of {heads} heads in {pages} pages"
        );
        let of_sequence = Operand::dense(&table, DType::I32, [pages]);
        if past == 0 {
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
        let joined = |x| Operand::dense(x, DType::BF16, shape);
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

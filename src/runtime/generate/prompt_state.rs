//! A prompt after its prefill, for continuations besides its answer.

use burn::prelude::*;

use crate::{qwen3_vl::key_values::KeyValueCache, runtime::accelerator::Accelerator};

/// A prompt that went through the model: what its continuations need of it.
#[derive(Debug)]
pub struct PromptState<B: Backend> {
    pub(in crate::runtime) cache: KeyValueCache<B>,
    /// Last hidden state of the prompt, `[1, hidden]`.
    pub(in crate::runtime) last: Tensor<B, 2>,
    /// Tokens in the cache, padding on the left included.
    pub(in crate::runtime) held: usize,
    /// The position after the prompt less the tokens held.
    pub(in crate::runtime) delta: i64,
    /// Tokens of the prompt.
    pub(in crate::runtime) tokens: usize,
}

impl<B: Accelerator> PromptState<B> {
    /// Row `row` of a batch that is padded on the left to `held` tokens, after its prefill. `last` are the hidden states
    /// after it, `[batch, hidden]`; the row's prompt has `tokens` tokens, and `delta` is the position after it less
    /// these.
    pub(in crate::runtime) fn of_row(
        cache: &KeyValueCache<B>,
        last: &Tensor<B, 2>,
        held: usize,
        (row, tokens, delta): (usize, usize, i64),
        device: &B::Device,
    ) -> Self {
        let mut cache = cache.clone();
        cache.truncate(held);
        // New buffers: those of the batch are written to by its answers.
        cache.select_rows(&[row], device);
        Self {
            cache,
            last: last.clone().narrow(0, row, 1),
            held,
            delta: delta + tokens as i64 - held as i64,
            tokens,
        }
    }
}

//! What is generated, how it ends and why it cannot be.

use super::{
    drafts::{DraftCounts, Drafts},
    sampler::SamplingConfig,
};
use crate::{
    batch::{images::ImageInput, positions::PositionError},
    ops::quantised::cache::CacheFormat,
    qwen3_vl::Qwen3Vl,
    runtime::accelerator::Accelerator,
};

/// When generation ends and how tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// Most tokens to add to a prompt; at least one is added.
    pub max_new_tokens: usize,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Ends an answer that repeats itself, where the reference goes on: see [`REPEATS`]. To be switched
    /// off where a grammar forces the answer.
    pub stop_on_repetition: bool,
    /// How tokens are chosen.
    pub sampling: SamplingConfig,
    /// Answers to each prompt, at least 1, whose keys and values are computed once; answers to one prompt follow each
    /// other.
    pub num_return_sequences: usize,
    /// A seed for each answer; empty where the first answer to a prompt has the one in `sampling`, and each later one
    /// the next.
    pub seeds: Vec<u64>,
    /// How keys and values are stored.
    pub kv_cache: CacheFormat,
    /// What tokens are drafted from, where they are; it changes the speed alone.
    pub drafts: Option<Drafts>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 512,
            eos_token_ids: Vec::new(),
            stop_on_repetition: true,
            sampling: SamplingConfig::default(),
            num_return_sequences: 1,
            seeds: Vec::new(),
            kv_cache: CacheFormat::default(),
            drafts: None,
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_new_tokens`.
    Length,
    /// The same tokens repeatedly; [`GenerationConfig::stop_on_repetition`].
    Repetition,
    /// The caller wanted no more.
    Cancelled,
}

/// One prompt with its images.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prompt {
    /// Token ids, image placeholders expanded.
    pub input_ids: Vec<u32>,
    /// Images in the order of their placeholders.
    pub images: ImageInput,
}

/// Result of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// New tokens, the end token included.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Why generation cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Prompt and answer do not fit the positions the model was trained for.
    #[error(
        "the prompt has {prompt} tokens ({image} of them image tokens) and may grow by {new}; the model's context is {context}. Shorten the prompt, lower `--max-new-tokens` or `--max-pixels`"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Image tokens among them.
        image: usize,
        /// `max_new_tokens`.
        new: usize,
        /// Longest sequence.
        context: usize,
    },
    /// A prompt without a token.
    #[error("the prompt is empty")]
    Empty,
    /// A token the model does not have.
    #[error(
        "the prompt holds token {id}, the model has {vocab_size} tokens; does the tokenizer belong to the model?"
    )]
    UnknownToken {
        /// The token.
        id: u32,
        /// Tokens of the model.
        vocab_size: usize,
    },
    /// Image tokens and images do not agree.
    #[error(transparent)]
    Positions(#[from] PositionError),
    /// The model answers with NaN.
    #[error(
        "the model's output is not a number; weights and dtype do not go together, try `--dtype f32` or `--dtype bf16`"
    )]
    NotFinite,
    /// The device refuses to go on.
    #[error(
        "the device failed while decoding: {0}; a smaller batch (`--batch-size`) needs less memory"
    )]
    Device(String),
    /// A sampling setting out of range.
    #[error("{0}")]
    Sampling(String),
}

/// Seconds spent in the parts of one call.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timing {
    /// Vision tower.
    pub vision_seconds: f64,
    /// Language model over the prompt, up to the first token.
    pub prefill_seconds: f64,
    /// All steps after the first token.
    pub decode_seconds: f64,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Tokens generated after the first of each row.
    pub decoded_tokens: usize,
    /// What was drafted.
    pub drafts: DraftCounts,
}

/// Whether an answer is over with its last token, which `on_token` gets unless it is an end token.
pub(super) fn end_of(
    row: usize,
    tokens: &[u32],
    settings: &GenerationConfig,
    on_token: &mut dyn FnMut(usize, u32) -> Option<FinishReason>,
) -> Option<FinishReason> {
    let token = *tokens.last()?;
    if settings.eos_token_ids.contains(&token) {
        Some(FinishReason::Stop)
    } else if let Some(reason) = on_token(row, token) {
        Some(reason)
    } else if tokens.len() >= settings.max_new_tokens {
        Some(FinishReason::Length)
    } else if settings.stop_on_repetition && goes_round(tokens) {
        Some(FinishReason::Repetition)
    } else {
        None
    }
}

/// Tokens of all prompts that go through the layers at once: a long context takes no more activations than
/// that, and a batch of usual prompts still goes in one pass.
pub const PREFILL_TOKENS: usize = 8192;

/// The same with quantised weights: who quantises is short of memory.
const PACKED_PREFILL_TOKENS: usize = 512;

/// Tokens of prompts that go through the layers of a model at once.
pub(super) fn prefilled_at_once<B: Accelerator>(model: &Qwen3Vl<B>) -> usize {
    match model.quantization() {
        Some(_) => PACKED_PREFILL_TOKENS,
        None => PREFILL_TOKENS,
    }
}

/// Longest piece whose repeats are looked for, in tokens.
pub const LONGEST_CYCLE: usize = 96;

/// How often a piece is repeated at least until an answer is ended for it, the repeats being
/// [`LEAST_REPEATED`] tokens or more.
pub const REPEATS: usize = 4;

/// Tokens that the repeats of a piece have at least until an answer is ended for them.
pub const LEAST_REPEATED: usize = 32;

/// Whether the answer ends in repeats of one piece of up to [`LONGEST_CYCLE`] tokens.
///
/// Transformers has no such rule: its answers go on to the end token or the token limit.
pub(crate) fn goes_round(tokens: &[u32]) -> bool {
    (1..=LONGEST_CYCLE).any(|cycle| {
        let need = (REPEATS * cycle).max(LEAST_REPEATED);
        tokens.len() >= need && {
            let tail = &tokens[tokens.len() - need..];
            tail[cycle..] == tail[..need - cycle]
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cycle_is_distinguished_from_a_repeated_phrase() {
        assert!(goes_round(&[5; 32]));
        assert!(!goes_round(&[5; 31]));
        let cycle: Vec<u32> = (0..20).collect();
        assert!(goes_round(&cycle.repeat(4)));
        assert!(!goes_round(&cycle.repeat(3)));
        let mut broken = cycle.repeat(4);
        broken[70] = 99;
        assert!(!goes_round(&broken));
        assert!(!goes_round(&(0..400).collect::<Vec<u32>>()));
    }
}

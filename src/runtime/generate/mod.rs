//! Generation: logits to tokens to text.
//!
//! Knows the model and ids; text comes in only in [`text`], through the tokenizer.

pub mod backend;
pub mod decode;
mod drafted;
pub mod drafts;
mod prompt_state;
pub mod sampler;
pub mod slots;
pub mod text;

pub(in crate::runtime) use decode::check_prompts;
pub use decode::{
    FinishReason, GenerateError, Generation, GenerationConfig, PREFILL_TOKENS, Prompt, Timing,
    generate, generate_and_keep, is_drafted,
};
pub use prompt_state::PromptState;
pub use sampler::SamplingConfig;

//! Generation: logits to tokens to text.
//!
//! Knows the model and ids; text comes in only in [`text`], through the tokenizer.

pub mod answer;
pub mod backend;
pub mod decode;
mod drafted;
pub mod drafts;
mod prompt_state;
pub mod sampler;
pub mod slots;
pub mod text;

pub(crate) use answer::goes_round;
pub use answer::{
    FinishReason, GenerateError, Generation, GenerationConfig, PREFILL_TOKENS, Prompt, Timing,
};
pub(in crate::runtime) use decode::check_prompts;
pub use decode::{generate, generate_and_keep, is_drafted};
pub use prompt_state::PromptState;
pub use sampler::SamplingConfig;

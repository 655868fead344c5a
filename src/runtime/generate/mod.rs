//! Generation: logits to tokens to text.
//!
//! Knows the model and ids; text comes in only in [`text`], through the tokenizer.

pub mod backend;
pub mod decode;
pub mod sampler;
pub mod slots;
pub mod text;

pub(in crate::runtime) use decode::check_prompts;
pub use decode::{
    FinishReason, GenerateError, Generation, GenerationConfig, PREFILL_TOKENS, Prompt, Timing,
    generate,
};
pub use sampler::SamplingConfig;

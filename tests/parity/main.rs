//! Ours against the reference, part by part, at tiny size and through the true loader.
//!
//! Sizes, names and prompts are read from the fixture folder (`PARITY_FIXTURES`, by default the one
//! in the repository), so another folder of the same form must pass as well. The backend is the CPU's
//! unless the binary is built with `wgpu` or `cuda`.
#![recursion_limit = "512"]

mod adapters;
mod adapters_of_peft;
mod backend;
mod calibrated;
mod checkpoint_damage;
mod checkpoints;
mod support;

mod generate;
mod gguf;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod half;
mod model;
mod objectives;
mod preprocess;
mod pytorch;
mod quantized;
mod schedule;
mod text_metrics;
mod text_processing;
mod training;
mod training_quantised;
mod training_saved;
mod wide;

//! Running a loaded model: loading, prefill, decoding, and the faster ways a backend has for them.

pub mod accelerator;
pub mod continuations;
pub mod fit;
pub mod generate;
pub mod pipeline;
pub mod spread;
pub mod synthetic;
pub mod vision;

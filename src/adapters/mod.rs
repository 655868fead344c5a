//! Adapters and quantised weights: their files, how they are put beside a model's weights, merging.

pub mod lora;
pub mod quantised;

//! Qwen3-VL: token ids and patches in, hidden states and logits out.
//!
//! This module opens no file but a checkpoint's ([`weights`]) and knows neither text nor pixels: what
//! it gets are ids, positions and normalised patches. Fields carry the published checkpoints' own names, so
//! a parameter's path in the module tree is its key in their files.

pub mod config;
pub mod heads;
mod image_features;
pub mod key_values;
pub mod layer;
mod model;
pub mod nn;
pub mod patch_positions;
pub mod rope;
pub mod vision;
pub mod weights;

pub use image_features::ImageFeatures;
pub use model::{Qwen3Vl, Qwen3VlModel, TextModel};

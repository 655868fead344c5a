//! Low-rank adapters: which layers are adapted, PEFT's files, merging. What an adapter brings besides low-rank
//! matrices of linear layers takes the place of the base's weights when it is loaded (`base_changes`).
//!
//! Names and conventions are PEFT's: `A` is `[r, in]`, `B` is `[out, r]`, the matmul is scaled by
//! `alpha / r` (`alpha / √r` with rank stabilisation). The base weight is never composed with the
//! adapter during training; [`merge`] does so once, for inference.

pub mod attach;
pub mod base;
mod base_changes;
pub mod config;
mod error;
pub mod files;
pub mod folder;
mod keys;
pub mod merge;
pub mod saved_modules;
mod source;
mod targets;

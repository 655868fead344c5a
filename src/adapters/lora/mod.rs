//! Low-rank adapters: which layers are adapted, PEFT's files, merging.
//!
//! Names and conventions are PEFT's: `A` is `[r, in]`, `B` is `[out, r]`, the matmul is scaled by
//! `alpha / r` (`alpha / √r` with rank stabilisation). The base weight is never composed with the
//! adapter during training; [`merge`] does so once, for inference.

pub mod attach;
pub mod base;
pub mod config;
pub mod files;
pub mod merge;

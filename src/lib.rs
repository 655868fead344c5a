//! Fine-tunes Qwen3-VL on chest X-rays and writes Chinese radiology reports, on Burn.
//!
//! The modules are listed by layer, lowest first. A module imports those of its own line and of the
//! lines above it, and none below; `tests/app/layers.rs` holds that. What only commands use is `pub(crate)`, so that the compiler
//! reports what nobody calls.
#![recursion_limit = "512"]
#![warn(missing_docs, unsafe_code)]

pub mod base;

pub mod cluster;

pub mod ops;

pub mod batch;

pub mod study;

pub mod processor;

pub mod schedule;

pub mod weights;

pub mod qwen3_vl;

pub mod adapters;

pub mod runtime;

pub(crate) mod phantom;

pub mod dataset;

pub(crate) mod accelerate;

pub mod eval;

pub mod train;

pub(crate) mod store;

pub(crate) mod exchange;

pub(crate) mod serve;

pub mod bench;

pub mod cli;
pub mod commands;

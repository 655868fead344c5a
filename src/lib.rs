//! Fine-tunes Qwen3-VL on chest X-rays and writes Chinese radiology reports, on Burn.
//!
//! The modules are listed by layer, lowest first. A module imports those of its own line and of the
//! lines above it, and none below; `tests/app/layers.rs` holds that.
#![recursion_limit = "512"]
#![warn(missing_docs, unreachable_pub, unsafe_code)]

pub mod base;

pub mod plot;

pub mod ops;

pub mod batch;

pub mod study;

pub mod processor;

pub mod schedule;

pub mod weights;

pub mod qwen3_vl;

pub mod adapters;

pub mod runtime;

pub mod phantom;

pub mod dataset;

pub mod accelerate;

pub mod train;

pub mod clean;
pub mod evaluate;
pub mod evaluation;
pub mod findings;
pub mod serve;

pub mod bench;

pub mod cli;
pub mod commands;
pub mod doctor;

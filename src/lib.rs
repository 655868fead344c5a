//! Fine-tunes Qwen3-VL on chest X-rays and writes Chinese radiology reports, on Burn.
//!
//! Bytes and text become patches and tokens ([`processor`]), these become logits ([`qwen3_vl`]),
//! these become text ([`generate`]); [`lora`] adapts the model.
#![recursion_limit = "512"]
#![warn(missing_docs, unreachable_pub, unsafe_code)]

pub mod backend;
pub mod base;
pub mod bench;
pub mod cli;
pub mod commands;
pub mod dataset;
pub mod eval;
pub mod files;
pub mod generate;
pub mod kernels;
pub mod lora;
pub mod out_of_memory;
pub mod phantom;
pub mod pipeline;
pub mod processor;
pub mod quant;
pub mod qwen3_vl;
pub mod serve;
pub mod spread;
pub mod study;
pub mod system;
pub mod train;

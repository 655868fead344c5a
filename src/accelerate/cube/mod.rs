//! Kernels in cubecl's language: the same source on every runtime that has one.
//!
//! One operation a file. Nothing is autotuned at run time: a kernel is compiled for the shapes and types it
//! meets, and what it does not cover runs the plain default. Operands are read sixteen bytes at a time
//! (`words`), sums are f32, and f16 results are clamped to the largest finite value.

// CUDA has its own kernels for most of these; it uses only the decoder of this module and its parts.
#![cfg_attr(not(feature = "wgpu"), allow(dead_code))]

mod attention;
#[cfg(feature = "wgpu")]
mod cache;
pub(super) mod decode;
#[cfg(all(test, feature = "wgpu"))]
mod draft_tests;
#[cfg(feature = "wgpu")]
mod dropout;
#[cfg(feature = "wgpu")]
mod embed;
mod launch;
mod likeliest;
mod matmul_config;
mod matrix;
mod matvec;
#[cfg(feature = "wgpu")]
mod pointwise;
pub(super) mod quantized;
#[cfg(test)]
mod quantized_tests;
#[cfg(feature = "wgpu")]
mod recorded;
#[cfg(feature = "wgpu")]
mod recording;
mod rotary;
mod row_kernels;
mod row_matmul;
mod rows;
mod sums;
#[cfg(all(test, feature = "wgpu"))]
mod tests;
mod tile_attention;
#[cfg(all(test, feature = "wgpu"))]
mod tile_attention_tests;
mod tile_config;
mod tile_matmul;
mod tile_stage;
#[cfg(all(test, feature = "wgpu"))]
mod tile_tests;
mod tiles;
mod unpack;
#[cfg(feature = "wgpu")]
mod vulkan;
mod words;

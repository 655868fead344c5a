//! Kernels in cubecl's language: the same source on every runtime that has one.
//!
//! One operation a file. Nothing is tuned at run time: a kernel is compiled for the shapes and types it
//! meets, and what it does not cover goes to the plain default. Operands are read sixteen bytes at a time
//! (`words`), sums are f32, and f16 results end at its largest finite value.

#[cfg(feature = "wgpu")]
mod attention;
#[cfg(feature = "wgpu")]
mod cache;
#[cfg(feature = "wgpu")]
mod decode;
#[cfg(feature = "wgpu")]
mod launch;
#[cfg(feature = "wgpu")]
mod likeliest;
#[cfg(feature = "wgpu")]
mod matvec;
#[cfg(feature = "wgpu")]
mod pointwise;
pub(super) mod quantized;
mod quantized_kernels;
#[cfg(test)]
mod quantized_tests;
#[cfg(feature = "wgpu")]
mod rotary;
#[cfg(feature = "wgpu")]
mod rows;
#[cfg(feature = "wgpu")]
mod sums;
#[cfg(all(test, feature = "wgpu"))]
mod tests;
#[cfg(feature = "wgpu")]
mod vulkan;
#[cfg(feature = "wgpu")]
mod words;

//! Kernels in CubeCL's own language: one source for CUDA and Vulkan.

pub(super) mod quantized;
mod quantized_kernels;
#[cfg(test)]
mod quantized_tests;

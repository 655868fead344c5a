//! The backend under test: Vulkan or CUDA where the binary is built with it, else the CPU.

#[cfg(feature = "wgpu")]
pub type TestBackend = burn::backend::Vulkan;

#[cfg(all(feature = "cuda", not(feature = "wgpu")))]
pub type TestBackend = burn::backend::Cuda;

#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
pub type TestBackend = burn_flex::Flex;

pub fn device() -> burn::tensor::Device<TestBackend> {
    Default::default()
}

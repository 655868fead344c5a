//! The backend under test: CUDA or Vulkan where the binary is built with it, else the CPU.

#[cfg(feature = "cuda")]
pub type TestBackend = burn::backend::Cuda;

#[cfg(all(feature = "wgpu", not(feature = "cuda")))]
pub type TestBackend = burn::backend::Vulkan;

#[cfg(not(any(feature = "wgpu", feature = "cuda")))]
pub type TestBackend = burn_flex::Flex;

pub fn device() -> burn::tensor::Device<TestBackend> {
    Default::default()
}

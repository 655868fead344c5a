//! Backends: the list of them, and this crate's own kernels for CUDA and for cubecl's other runtimes.

pub mod devices;
#[cfg(all(test, any(feature = "cuda", feature = "wgpu")))]
mod draws;
pub mod list;

#[cfg(feature = "wgpu")]
mod wgpu_setup;

#[cfg(any(feature = "cuda", feature = "wgpu"))]
pub mod cube;
#[cfg(feature = "cuda")]
pub mod cuda;

//! What the model is computed with: one trait of operations, plain Burn by default.
//!
//! Every backend works with the defaults. A backend with faster ways overrides methods; each of its
//! operations is compared with the default it replaces.

use burn::{prelude::*, tensor::backend::AutodiffBackend};

/// A backend with the operations of the model.
pub trait Kernels: Backend {}

/// A backend that trains with the operations of the model.
pub trait TrainKernels: AutodiffBackend<InnerBackend: Kernels> + Kernels {}

impl<B: AutodiffBackend<InnerBackend: Kernels> + Kernels> TrainKernels for B {}

impl<B: Kernels, C: burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy> Kernels
    for burn::backend::Autodiff<B, C>
{
}

#[cfg(feature = "flex")]
impl Kernels for burn_flex::Flex {}

#[cfg(feature = "wgpu")]
impl Kernels for burn::backend::Vulkan {}

#[cfg(feature = "cuda")]
impl Kernels for burn::backend::Cuda {}

//! What the model is computed with: three small traits of operations, plain Burn by default.
//!
//! Every backend works with the defaults ([`plain`]). A backend with faster ways lists them in its
//! [`Kernels`]; each is compared with the default it replaces, forward and backward.

mod autodiff;
pub mod cast;
mod device;
pub mod dropout;
mod forward;
mod kept;
mod kernels;
pub mod memory;
mod operands;
pub mod plain;
pub mod quantised;
pub mod queue;
mod spans;
mod training;
pub mod upload;

use burn::{
    module::{ModuleMapper, Param},
    prelude::*,
    tensor::backend::AutodiffBackend,
};

pub use device::{AllReduce, DeviceMemory, DeviceOps, Others, Reading};
pub use dropout::Dropout;
pub use forward::ForwardOps;
pub use kept::Kept;
pub use kernels::{HasKernels, Kernels, KeysAndValues};
pub use operands::{
    Activation, AdamWStep, AdamWTensor, BackwardMatmul, HeadNorm, LowRank, LowRankBackward,
    LowRankGradients, Matrix, TargetLoss,
};
pub use spans::AttentionSpans;
pub use training::TrainingOps;

/// A backend with all operations of the model.
pub trait Ops: ForwardOps + TrainingOps + DeviceOps {}

impl<B: ForwardOps + TrainingOps + DeviceOps> Ops for B {}

/// A backend that trains with the operations of the model.
pub trait TrainOps: AutodiffBackend<InnerBackend: Ops> + Ops {}

impl<B: AutodiffBackend<InnerBackend: Ops> + Ops> TrainOps for B {}

/// The parameters of a module on another device, through [`DeviceOps::to_other_device`]; quantised matrices are
/// none, and stay where they are.
pub fn module_to_device<B: Ops, M: Module<B>>(module: M, device: &B::Device) -> M {
    struct Send<'a, B: Backend>(&'a B::Device);
    impl<B: Ops> ModuleMapper<B> for Send<'_, B> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            let trained = param.is_require_grad();
            let sent = B::to_other_device(param.val().detach(), self.0);
            Param::initialized(param.id, sent.set_require_grad(trained))
        }
    }
    module.map(&mut Send::<B>(device))
}

/// [`DeviceOps::contiguous`] for all parameters of a module.
pub fn compact<B: Ops, M: Module<B>>(module: M) -> M {
    struct Contiguous;
    impl<B: Ops> ModuleMapper<B> for Contiguous {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            param.map(B::contiguous)
        }
    }
    module.map(&mut Contiguous)
}

#[cfg(feature = "flex")]
mod flex {
    use super::{DeviceOps, HasKernels};
    use crate::base::device_name::DeviceKind;
    use burn_flex::Flex;

    impl HasKernels for Flex {}
    impl DeviceOps for Flex {
        const KIND: DeviceKind = DeviceKind::Cpu;
    }
}

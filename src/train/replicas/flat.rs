//! The trained parameters' gradients as flat tensors in the order of the module tree, and hashes of their weights.

use std::hash::{DefaultHasher, Hasher};

use burn::{
    module::{Module, ModuleVisitor, Param},
    optim::GradientsParams,
    prelude::*,
    tensor::{DType, backend::AutodiffBackend},
};

use crate::{
    cluster::chain::Part, ops::cast::to_f32, runtime::accelerator::TrainAccelerator,
    train::learner::Trainee,
};

/// A tensor in one row.
pub(super) type Flat<B> = Tensor<<B as AutodiffBackend>::InnerBackend, 1>;

/// For each trained parameter, in the order of the module tree, a number that its bits decide.
pub(super) fn digests<B: TrainAccelerator>(model: &Trainee<B>) -> Vec<u64> {
    struct Read(Vec<u64>);
    impl<B: AutodiffBackend> ModuleVisitor<B> for Read {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                let mut hasher = DefaultHasher::new();
                hasher.write(&param.val().into_data().bytes);
                self.0.push(hasher.finish());
            }
        }
    }
    let mut read = Read(Vec::new());
    model.visit(&mut read);
    read.0
}

/// For each trained parameter, in the order of the module tree, whether it has a gradient.
pub(super) fn presence<B: TrainAccelerator>(
    model: &Trainee<B>,
    grads: &GradientsParams,
) -> Vec<bool> {
    struct Look<'a>(&'a GradientsParams, Vec<bool>);
    impl<B: AutodiffBackend> ModuleVisitor<B> for Look<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                let found = self.0.get::<B::InnerBackend, D>(param.id).is_some();
                self.1.push(found);
            }
        }
    }
    let mut look = Look(grads, Vec::new());
    model.visit(&mut look);
    look.1
}

/// Number of elements of each trained parameter, in the order of the module tree.
pub(super) fn lengths<B: TrainAccelerator>(model: &Trainee<B>) -> Vec<usize> {
    struct Count(Vec<usize>);
    impl<B: AutodiffBackend> ModuleVisitor<B> for Count {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                self.0.push(param.lazy_shape().num_elements());
            }
        }
    }
    let mut count = Count(Vec::new());
    model.visit(&mut count);
    count.0
}

/// The gradient of each trained parameter on the host, f32, where it has one.
pub(super) fn on_host<B: TrainAccelerator>(model: &Trainee<B>, grads: GradientsParams) -> Part {
    struct Read(GradientsParams, Part);
    impl<B: AutodiffBackend> ModuleVisitor<B> for Read {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                let gradient = self.0.remove::<B::InnerBackend, D>(param.id);
                self.1.push(gradient.map(|gradient| {
                    let values = to_f32(gradient).into_data().into_vec::<f32>();
                    values.unwrap_or_else(|error| panic!("gradients in f32: {error:?}"))
                }));
            }
        }
    }
    let mut read = Read(grads, Vec::new());
    model.visit(&mut read);
    read.1
}

/// The gradients of the parameters that are `present` somewhere, f32, each in one row; zeros where this
/// rank has none.
pub(super) fn gather<B: TrainAccelerator>(
    model: &Trainee<B>,
    grads: GradientsParams,
    present: &[bool],
    device: &B::Device,
) -> Vec<Flat<B>> {
    struct Gather<'a, B: AutodiffBackend> {
        grads: GradientsParams,
        present: std::slice::Iter<'a, bool>,
        device: &'a B::Device,
        all: Vec<Flat<B>>,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Gather<'_, B> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if !param.is_require_grad() || self.present.next() != Some(&true) {
                return;
            }
            let count = param.lazy_shape().num_elements();
            self.all
                .push(match self.grads.remove::<B::InnerBackend, D>(param.id) {
                    Some(grad) => to_f32(grad).reshape([count]),
                    None => Tensor::zeros([count], (self.device, DType::F32)),
                });
        }
    }
    let mut gather = Gather::<B> {
        grads,
        present: present.iter(),
        device,
        all: Vec::new(),
    };
    model.visit(&mut gather);
    gather.all
}

/// The inverse of [`gather`].
pub(super) fn scatter<B: TrainAccelerator>(
    model: &Trainee<B>,
    gradients: Vec<Flat<B>>,
    present: &[bool],
) -> GradientsParams {
    struct Scatter<'a, B: AutodiffBackend> {
        gradients: std::vec::IntoIter<Flat<B>>,
        present: std::slice::Iter<'a, bool>,
        grads: GradientsParams,
    }
    impl<B: AutodiffBackend> ModuleVisitor<B> for Scatter<'_, B> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if !param.is_require_grad() || self.present.next() != Some(&true) {
                return;
            }
            if let Some(gradient) = self.gradients.next() {
                let shape: [usize; D] = param.lazy_shape().dims();
                let gradient: Tensor<B::InnerBackend, D> = gradient.reshape(shape);
                self.grads.register(param.id, gradient);
            }
        }
    }
    let mut scatter = Scatter::<B> {
        gradients: gradients.into_iter(),
        present: present.iter(),
        grads: GradientsParams::new(),
    };
    model.visit(&mut scatter);
    scatter.grads
}

//! The operations under autodiff: the defaults are recorded, but for those that autodiff must not take
//! apart, which have a backward pass of their own.

use burn::{
    backend::{
        Autodiff,
        autodiff::{
            checkpoint::{base::Checkpointer, strategy::CheckpointStrategy},
            grads::Gradients,
            ops::{Backward, Ops as Recording, OpsKind},
        },
    },
    prelude::*,
    tensor::{TensorPrimitive, backend::AutodiffBackend, ops::FloatTensor},
};

use crate::base::device_name::DeviceKind;

use super::{
    DeviceOps, HasKernels, Kernels, Ops,
    upload::{Fill, Upload, UploadError},
};

impl<B: Ops, C: CheckpointStrategy> HasKernels for Autodiff<B, C> {
    const KERNELS: Kernels<Self> = Kernels {
        // The inner backend's: a pass without autodiff and one with it drop the same inputs.
        dropout_mask: |like, dropout| {
            let mask = B::dropout_mask(&like.clone().inner(), dropout);
            Some(Tensor::from_inner(mask))
        },
        ..Kernels::NONE
    };

    fn matmul_kernel<const D: usize>(
        a: &Tensor<Self, D>,
        b: &Tensor<Self, D>,
    ) -> Option<Tensor<Self, D>> {
        Some(recorded_matmul(a.clone(), b.clone()))
    }
}

impl<B: Ops, C: CheckpointStrategy> DeviceOps for Autodiff<B, C> {
    const KIND: DeviceKind = B::KIND;

    fn contiguous<const D: usize>(x: Tensor<Self, D>) -> Tensor<Self, D> {
        let trained = x.is_require_grad();
        let contiguous = Tensor::from_inner(B::contiguous(x.inner()));
        if trained {
            contiguous.require_grad()
        } else {
            contiguous
        }
    }

    fn in_exact_memory<R>(
        device: &Self::Device,
        sizes: Option<&[usize]>,
        work: impl FnOnce() -> R,
    ) -> R {
        B::in_exact_memory(device, sizes, work)
    }

    fn to_other_device<const D: usize>(
        x: Tensor<Self, D>,
        device: &Self::Device,
    ) -> Tensor<Self, D> {
        let trained = x.is_require_grad();
        let sent = Tensor::from_inner(B::to_other_device(x.inner(), device));
        if trained { sent.require_grad() } else { sent }
    }

    fn upload<E: From<UploadError>>(
        devices: &[Self::Device],
        tensors: &[Upload],
        fill: Fill<'_, E>,
    ) -> Result<Vec<Vec<FloatTensor<Self>>>, E> {
        let sent = B::upload(devices, tensors, fill)?;
        let wrap = |tensors: Vec<_>| tensors.into_iter().map(Self::from_inner).collect();
        Ok(sent.into_iter().map(wrap).collect())
    }
}

fn wrap<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn unwrap<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}

#[derive(Debug)]
struct Matmul<const D: usize>;

impl<B: Ops, const D: usize> Backward<B, 2> for Matmul<D> {
    /// The other operand of each operand that wants a gradient.
    type State = [Option<FloatTensor<B>>; 2];

    fn backward(
        self,
        ops: Recording<Self::State, 2>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let [right, left] = ops.state;
        let [left_node, right_node] = ops.parents;
        let dy: Tensor<B, D> = wrap(gradients.consume::<B>(&ops.node));
        let transposed = |x: FloatTensor<B>| wrap::<B, D>(x).swap_dims(D - 2, D - 1);
        if let (Some(node), Some(right)) = (left_node, right) {
            let gradient = B::matmul(dy.clone(), transposed(right));
            gradients.register::<B>(node.id, unwrap(gradient));
        }
        if let (Some(node), Some(left)) = (right_node, left) {
            let gradient = B::matmul(transposed(left), dy);
            gradients.register::<B>(node.id, unwrap(gradient));
        }
    }
}

/// [`ForwardOps::matmul`] of the inner backend, recorded.
pub(super) fn recorded_matmul<B: Ops, C: CheckpointStrategy, const D: usize>(
    left: Tensor<Autodiff<B, C>, D>,
    right: Tensor<Autodiff<B, C>, D>,
) -> Tensor<Autodiff<B, C>, D> {
    let (left, right) = (unwrap(left), unwrap(right));
    let multiply = |left, right| unwrap::<B, D>(B::matmul(wrap(left), wrap(right)));
    let prepared = Matmul::<D>
        .prepare::<C>([left.node.clone(), right.node.clone()])
        .compute_bound()
        .stateful();
    let result = match prepared {
        OpsKind::Tracked(prepared) => {
            let state = [
                left.is_tracked().then(|| right.primitive.clone()),
                right.is_tracked().then(|| left.primitive.clone()),
            ];
            prepared.finish(state, multiply(left.primitive, right.primitive))
        }
        OpsKind::UnTracked(prepared) => prepared.finish(multiply(left.primitive, right.primitive)),
    };
    wrap(result)
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use crate::ops::ForwardOps;
    use burn::tensor::Distribution;
    use burn_flex::Flex;

    type B = Autodiff<Flex>;

    #[test]
    fn gradients_are_those_of_burns_own_matmul() {
        let device = Default::default();
        let random = |shape| Tensor::<B, 3>::random(shape, Distribution::Default, &device);
        let (a, b) = (
            random([2, 3, 4]).require_grad(),
            random([2, 4, 5]).require_grad(),
        );
        let dy = random([2, 3, 5]);
        let gradients = |y: Tensor<B, 3>| {
            let gradients = (y * dy.clone()).sum().backward();
            [&a, &b].map(|x| {
                x.grad(&gradients)
                    .expect("the operand requires a gradient")
                    .into_data()
            })
        };
        let ours = gradients(B::matmul(a.clone(), b.clone()));
        let burns = gradients(a.clone().matmul(b.clone()));
        for (ours, burns) in ours.iter().zip(&burns) {
            ours.assert_approx_eq::<f32>(burns, burn::tensor::Tolerance::absolute(1e-6));
        }
    }

    #[test]
    fn an_operand_without_gradient_gets_none_and_one_used_twice_gets_both() {
        let device = Default::default();
        let a = Tensor::<B, 2>::from_floats([[1.0, 2.0], [3.0, 4.0]], &device);
        let trained = Tensor::<B, 2>::from_floats([[2.0, 0.0], [1.0, 1.0]], &device).require_grad();
        let gradients = B::matmul(a.clone(), trained.clone()).sum().backward();
        assert!(a.grad(&gradients).is_none());
        let of = |gradients| {
            trained
                .grad(gradients)
                .unwrap()
                .into_data()
                .to_vec::<f32>()
                .unwrap()
        };
        assert_eq!(of(&gradients), [4.0, 4.0, 6.0, 6.0]);
        // d sum(t t) / dt = J tᵀ + tᵀ J, J all ones.
        let gradients = B::matmul(trained.clone(), trained.clone()).sum().backward();
        assert_eq!(of(&gradients), [5.0, 5.0, 3.0, 3.0]);
    }
}

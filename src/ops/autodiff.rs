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
    tensor::{DType, TensorPrimitive, backend::AutodiffBackend, ops::FloatTensor},
};

use crate::base::device_name::DeviceKind;

use super::{
    DeviceOps, ForwardOps, HasKernels, Kernels, LowRank, Ops,
    cast::{to_dtype, to_f32},
    quantised::QuantisedWeight,
    upload::{Fill, Upload, UploadError},
};

impl<B: Ops, C: CheckpointStrategy> HasKernels for Autodiff<B, C> {
    const KERNELS: Kernels<Self> = Kernels {
        // The inner backend's: a pass without autodiff and one with it drop the same inputs.
        dropout_mask: |like, dropout| {
            let mask = B::dropout_mask(&like.clone().inner(), dropout);
            Some(Tensor::from_inner(mask))
        },
        dequantise_rows: |weight, start, count, dtype| {
            let rows = B::dequantise_rows(&weight.inner(), start, count, dtype);
            Some(Tensor::from_inner(rows))
        },
        dequantise_for_matmul: |weight, start, count, dtype| {
            let rows = B::dequantise_for_matmul(&weight.inner(), start, count, dtype);
            Some(Tensor::from_inner(rows))
        },
        linear_quantised: |x, weight, bias, residual| {
            Some(linear_quantised(x, weight, bias, residual))
        },
        adapted_linear_quantised: |x, weight, adapter, residual| {
            Some(adapted_linear_quantised(x, weight, adapter, residual))
        },
        logits_quantised: |hidden, head| {
            Some(recorded_quantised(hidden, head, B::logits_quantised))
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

#[derive(Debug)]
struct QuantisedMatmul;

impl<B: Ops> Backward<B, 1> for QuantisedMatmul {
    /// The matrix, and the type of the input.
    type State = (QuantisedWeight<B>, DType);

    fn backward(
        self,
        ops: Recording<Self::State, 1>,
        gradients: &mut Gradients,
        _checkpointer: &mut Checkpointer,
    ) {
        let (weight, dtype) = ops.state;
        let [node] = ops.parents;
        let dy: Tensor<B, 2> = wrap(gradients.consume::<B>(&ops.node));
        if let Some(node) = node {
            let dx = to_dtype(B::input_gradient_quantised(dy, &weight), dtype);
            gradients.register::<B>(node.id, unwrap(dx));
        }
    }
}

/// [`ForwardOps::linear_quantised`]. The graph holds the quantised matrix: floats of a whole model would be
/// what quantising saves.
fn linear_quantised<B: Ops, C: CheckpointStrategy>(
    x: &Tensor<Autodiff<B, C>, 2>,
    weight: &QuantisedWeight<Autodiff<B, C>>,
    bias: Option<&Tensor<Autodiff<B, C>, 1>>,
    residual: Option<&Tensor<Autodiff<B, C>, 2>>,
) -> Tensor<Autodiff<B, C>, 2> {
    let y = recorded_quantised(x, weight, |x, weight| {
        B::linear_quantised(x, weight, None, None)
    });
    let y = match bias {
        Some(bias) => y + bias.clone().unsqueeze(),
        None => y,
    };
    match residual {
        Some(residual) => residual.clone() + y,
        None => y,
    }
}

/// [`ForwardOps::adapted_linear_quantised`]: base and adapter are added in f32, as
/// [`ForwardOps::adapted_linear`] does.
fn adapted_linear_quantised<B: Ops, C: CheckpointStrategy>(
    x: &Tensor<Autodiff<B, C>, 2>,
    weight: &QuantisedWeight<Autodiff<B, C>>,
    adapter: &LowRank<Autodiff<B, C>>,
    residual: Option<&Tensor<Autodiff<B, C>, 2>>,
) -> Tensor<Autodiff<B, C>, 2> {
    type This<B, C> = Autodiff<B, C>;
    let dtype = x.dtype();
    let low = This::<B, C>::low_rank_inputs(x.clone(), &[adapter]).remove(0);
    let up = This::<B, C>::matmul(to_f32(low), adapter.b.clone().transpose()) * adapter.scaling;
    let base = linear_quantised(x, weight, None, None);
    let y = to_dtype(to_f32(base) + up, dtype);
    match residual {
        Some(residual) => residual.clone() + y,
        None => y,
    }
}

/// A matmul of the inner backend with a quantised matrix, recorded: `x` `[n, in]` → `[n, out]`.
fn recorded_quantised<B: Ops, C: CheckpointStrategy>(
    x: &Tensor<Autodiff<B, C>, 2>,
    weight: &QuantisedWeight<Autodiff<B, C>>,
    multiply: impl Fn(Tensor<B, 2>, &QuantisedWeight<B>) -> Tensor<B, 2>,
) -> Tensor<Autodiff<B, C>, 2> {
    let weight = weight.inner();
    let dtype = x.dtype();
    let x = unwrap(x.clone());
    let prepared = QuantisedMatmul
        .prepare::<C>([x.node.clone()])
        .compute_bound()
        .stateful();
    let y = unwrap(multiply(wrap(x.primitive), &weight));
    wrap(match prepared {
        OpsKind::Tracked(prepared) => prepared.finish((weight, dtype), y),
        OpsKind::UnTracked(prepared) => prepared.finish(y),
    })
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

//! Pointwise operations: `pointwise.cu`.

use burn::prelude::*;

use super::{
    launch::{Backend, Buffer, Kernel, contiguous, empty, launch, tensor},
    operand::Operand,
    plan::device,
    scalar_of,
};

const SOURCES: &[&str] = &[
    include_str!("scalar.cuh"),
    include_str!("gated.cuh"),
    include_str!("pointwise.cu"),
];

const THREADS: u32 = 256;

/// Blocks a processor gets in a grid-stride loop.
const MOST_BLOCKS: usize = 16;

/// Whether the kernels cover these tensors of one shape.
pub(super) fn covers(tensors: &[&Tensor<Backend, 2>]) -> bool {
    let first = tensors[0];
    let elements = first.shape().num_elements();
    super::supported(first)
        && tensors.iter().all(|other| other.dtype() == first.dtype())
        && scalar_of(first.dtype()).is_some_and(|(_, vector)| elements.is_multiple_of(vector))
        && elements > 0
}

fn run<const OUT: usize>(
    name: &'static str,
    variant: &'static str,
    inputs: &[&Buffer],
) -> [Tensor<Backend, 2>; OUT] {
    let like = inputs[0];
    let [rows, width] = like.meta.shape().dims();
    let (bf16, vector) = scalar_of(like.dtype).expect("`covers` accepted the type");
    let mut defines = vec![("SCALAR_BF16", bf16), (variant, 1)];
    for other in ["GATED", "GATED_BACKWARD", "GELU_TANH", "GELU_EXACT"] {
        if other != variant {
            defines.push((other, 0));
        }
    }
    let kernel = Kernel::new(name, SOURCES, defines, THREADS);
    let outputs = [(); OUT].map(|()| empty(like, [rows, width], like.dtype));
    let operands: Vec<_> = (inputs.iter().copied())
        .chain(&outputs)
        .map(|x| Operand::contiguous(x, like.dtype, [rows, width]))
        .collect();
    let vectors = rows * width / vector;
    let blocks = vectors
        .div_ceil(THREADS as usize)
        .min(MOST_BLOCKS * device(like).processors);
    launch(
        &like.client,
        kernel,
        [blocks, 1, 1],
        &operands,
        vec![vectors as u64],
    );
    outputs.map(tensor)
}

pub(super) fn swiglu(gate: Tensor<Backend, 2>, up: Tensor<Backend, 2>) -> Tensor<Backend, 2> {
    let [y] = run("gated", "GATED", &[&contiguous(gate), &contiguous(up)]);
    y
}

pub(super) fn swiglu_backward(
    gate: Tensor<Backend, 2>,
    up: Tensor<Backend, 2>,
    dy: Tensor<Backend, 2>,
) -> [Tensor<Backend, 2>; 2] {
    let (gate, up, dy) = (contiguous(gate), contiguous(up), contiguous(dy));
    run("swiglu_backward", "GATED_BACKWARD", &[&gate, &up, &dy])
}

pub(super) fn gelu(x: Tensor<Backend, 2>, tanh: bool) -> Tensor<Backend, 2> {
    let (name, variant) = if tanh {
        ("gelu_tanh", "GELU_TANH")
    } else {
        ("gelu_exact", "GELU_EXACT")
    };
    let [y] = run(name, variant, &[&contiguous(x)]);
    y
}

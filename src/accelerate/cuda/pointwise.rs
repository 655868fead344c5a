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
    include_str!("swiglu.cuh"),
    include_str!("pointwise.cu"),
];

const THREADS: u32 = 256;

/// Blocks a processor gets in a grid-stride loop.
const MOST_BLOCKS: usize = 16;

/// An operation on tensors of one shape and type.
fn run<const OUT: usize>(
    name: &'static str,
    variant: &'static str,
    inputs: &[&Tensor<Backend, 2>],
) -> Option<[Tensor<Backend, 2>; OUT]> {
    let first = inputs[0];
    let [rows, width] = first.dims();
    let (bf16, vector) = scalar_of(first.dtype())?;
    let covered = super::supported(first)
        && inputs.iter().all(|other| other.dtype() == first.dtype())
        && (rows * width).is_multiple_of(vector)
        && rows * width > 0;
    if !covered {
        return None;
    }
    let inputs: Vec<Buffer> = inputs.iter().map(|x| contiguous((*x).clone())).collect();
    let like = &inputs[0];
    let mut defines = vec![("SCALAR_BF16", bf16), (variant, 1)];
    for other in ["SWIGLU", "SWIGLU_BACKWARD", "GELU_TANH", "GELU_EXACT"] {
        if other != variant {
            defines.push((other, 0));
        }
    }
    let kernel = Kernel::new(name, SOURCES, defines, THREADS);
    let outputs = [(); OUT].map(|()| empty(like, [rows, width], like.dtype));
    let operands: Vec<_> = (inputs.iter())
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
    Some(outputs.map(tensor))
}

pub(super) fn swiglu(
    gate: &Tensor<Backend, 2>,
    up: &Tensor<Backend, 2>,
) -> Option<Tensor<Backend, 2>> {
    run("swiglu", "SWIGLU", &[gate, up]).map(|[y]| y)
}

pub(super) fn swiglu_backward(
    gate: &Tensor<Backend, 2>,
    up: &Tensor<Backend, 2>,
    dy: &Tensor<Backend, 2>,
) -> Option<[Tensor<Backend, 2>; 2]> {
    run("swiglu_backward", "SWIGLU_BACKWARD", &[gate, up, dy])
}

pub(super) fn gelu_tanh(x: &Tensor<Backend, 2>) -> Option<Tensor<Backend, 2>> {
    run("gelu_tanh", "GELU_TANH", &[x]).map(|[y]| y)
}

pub(super) fn gelu_exact(x: &Tensor<Backend, 2>) -> Option<Tensor<Backend, 2>> {
    run("gelu_exact", "GELU_EXACT", &[x]).map(|[y]| y)
}

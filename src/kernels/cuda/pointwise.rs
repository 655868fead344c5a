//! Pointwise operations: `pointwise.cu`.

use burn::{prelude::*, tensor::DType};

use super::{
    launch::{Backend, Buffer, Kernel, contiguous, empty, launch, tensor},
    scalar_of,
};

const SOURCES: &[&str] = &[
    include_str!("scalar.cuh"),
    include_str!("gated.cuh"),
    include_str!("pointwise.cu"),
];

const THREADS: u32 = 256;

/// Blocks of a grid that walks the rest.
const MOST_BLOCKS: usize = 132 * 16;

/// Whether a tensor of this many elements can be worked on.
pub(super) fn covers(elements: usize, dtype: DType) -> bool {
    scalar_of(dtype).is_some_and(|(_, vector)| elements.is_multiple_of(vector)) && elements > 0
}

fn run<const OUT: usize>(
    name: &'static str,
    form: &'static str,
    inputs: &[&Buffer],
) -> [Tensor<Backend, 2>; OUT] {
    let like = inputs[0];
    let [rows, width] = like.meta.shape().dims();
    let (bf16, vector) = scalar_of(like.dtype).expect("`covers` was asked");
    let mut defines = vec![("SCALAR_BF16", bf16), (form, 1)];
    for other in ["GATED", "GATED_BACKWARD", "GELU_TANH", "GELU_EXACT"] {
        if other != form {
            defines.push((other, 0));
        }
    }
    let kernel = Kernel::new(name, SOURCES, defines, THREADS);
    let outputs = [(); OUT].map(|()| empty(like, [rows, width], like.dtype));
    let mut buffers = inputs.to_vec();
    buffers.extend(&outputs);
    let vectors = rows * width / vector;
    let blocks = vectors.div_ceil(THREADS as usize).min(MOST_BLOCKS);
    launch(
        &like.client,
        kernel,
        [blocks, 1, 1],
        &buffers,
        vec![vectors as u64],
    );
    outputs.map(tensor)
}

pub(super) fn gated(gate: Tensor<Backend, 2>, up: Tensor<Backend, 2>) -> Tensor<Backend, 2> {
    let [y] = run("gated", "GATED", &[&contiguous(gate), &contiguous(up)]);
    y
}

pub(super) fn gated_backward(
    gate: Tensor<Backend, 2>,
    up: Tensor<Backend, 2>,
    dy: Tensor<Backend, 2>,
) -> [Tensor<Backend, 2>; 2] {
    let (gate, up, dy) = (contiguous(gate), contiguous(up), contiguous(dy));
    run("gated_backward", "GATED_BACKWARD", &[&gate, &up, &dy])
}

pub(super) fn gelu(x: Tensor<Backend, 2>, tanh: bool) -> Tensor<Backend, 2> {
    let (name, form) = if tanh {
        ("gelu_tanh", "GELU_TANH")
    } else {
        ("gelu_exact", "GELU_EXACT")
    };
    let [y] = run(name, form, &[&contiguous(x)]);
    y
}

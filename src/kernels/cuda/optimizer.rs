//! AdamW and the norm of all gradients in a launch a tensor: `optimizer.cu`.

use burn::{prelude::*, tensor::DType};

use super::launch::{Backend, Buffer, Kernel, contiguous, empty, float_bits, launch, tensor};
use crate::kernels::AdamWStep;

const SOURCES: &[&str] = &[include_str!("scalar.cuh"), include_str!("optimizer.cu")];

/// Blocks of a tensor: each leaves one sum.
const BLOCKS: usize = 16;

fn kernel(name: &'static str) -> Kernel {
    Kernel::new(name, SOURCES, vec![("SCALAR_BF16", 0), (name, 1)], 256)
}

fn count(buffer: &Buffer) -> usize {
    buffer.meta.shape().num_elements()
}

pub(super) fn adamw(
    value: Tensor<Backend, 1>,
    gradient: Tensor<Backend, 1>,
    moments: [Tensor<Backend, 1>; 2],
    step: AdamWStep,
) -> [Tensor<Backend, 1>; 3] {
    let (value, gradient) = (contiguous(value), contiguous(gradient));
    let [first, second] = moments.map(contiguous);
    let elements = count(&value);
    let outputs = [(); 3].map(|()| empty(&value, [elements], DType::F32));
    let parameters = vec![
        elements as u64,
        0,
        float_bits(step.beta1),
        float_bits(step.beta2),
        float_bits(step.epsilon),
        float_bits(step.step_size),
        float_bits(step.second_scale),
        float_bits(step.keep),
    ];
    let blocks = elements.div_ceil(256 * 4).clamp(1, 528);
    let mut buffers = vec![&value, &gradient, &first, &second];
    buffers.extend(&outputs);
    launch(
        &value.client,
        kernel("ADAMW"),
        [blocks, 1, 1],
        &buffers,
        parameters,
    );
    outputs.map(tensor)
}

pub(super) fn square_sums(tensors: Vec<Tensor<Backend, 1>>) -> Tensor<Backend, 1> {
    let buffers: Vec<Buffer> = tensors.into_iter().map(contiguous).collect();
    let sums = empty(&buffers[0], [buffers.len() * BLOCKS], DType::F32);
    for (index, buffer) in buffers.iter().enumerate() {
        let mut parameters = vec![0; 8];
        parameters[0] = count(buffer) as u64;
        parameters[1] = (index * BLOCKS) as u64;
        let grid = [BLOCKS, 1, 1];
        launch(
            &buffer.client,
            kernel("SQUARE_SUMS"),
            grid,
            &[buffer, &sums],
            parameters,
        );
    }
    tensor(sums)
}

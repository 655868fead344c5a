//! AdamW and the norm of all gradients, over many tensors in a launch: `optimizer.cu`.

use burn::{prelude::*, tensor::DType};
use burn_cubecl::cubecl::zspace::metadata::Metadata;

use super::{
    launch::{Backend, Buffer, Kernel, Parameters, contiguous, empty, float_bits, launch, tensor},
    memory::exact,
    operand::Operand,
};
use crate::ops::AdamWTensor;

const SOURCES: &[&str] = &[include_str!("scalar.cuh"), include_str!("optimizer.cu")];

/// Tensors of a launch: their pointers are its parameters, which have 4 KiB in all.
const STEPPED: usize = 24;
const SUMMED: usize = 64;

/// Blocks of a tensor whose squares are added up: each leaves one sum.
const BLOCKS: usize = 16;

/// Elements that results start at a multiple of: 512 bytes, as the allocator does it.
const ALIGNED: usize = 128;

fn kernel(variant: &'static str, more: &[(&'static str, i64)]) -> Kernel {
    let mut defines = vec![("SCALAR_BF16", 0), (variant, 1)];
    defines.extend(more);
    Kernel::new(variant, SOURCES, defines, 256)
}

fn count(buffer: &Buffer) -> usize {
    buffer.meta.shape().num_elements()
}

/// Part of a buffer.
fn view(whole: &Buffer, start: usize, length: usize) -> Buffer {
    let element = whole.dtype.size();
    let after = count(whole) - start - length;
    let mut part = whole.clone();
    part.handle = part
        .handle
        .offset_start((start * element) as u64)
        .offset_end((after * element) as u64);
    *part.meta = Metadata::new([length], [1]);
    part
}

/// Values, means and mean squares after one step; gradients are multiplied by `clip[1]` before.
///
/// Takes the tensors so that their memory is free as soon as they are stepped.
pub(super) fn adamw(
    tensors: Vec<AdamWTensor<Backend>>,
    clip: Option<&Tensor<Backend, 1>>,
) -> Result<Vec<[Tensor<Backend, 1>; 3]>, Vec<AdamWTensor<Backend>>> {
    let covered = |one: &AdamWTensor<Backend>| {
        let four = [&one.value, &one.gradient, &one.first, &one.second];
        four.iter().all(|tensor| tensor.dtype() == DType::F32)
    };
    if !tensors.iter().all(covered) {
        return Err(tensors);
    }
    let clip = clip.cloned().map(contiguous);
    let mut stepped = Vec::with_capacity(tensors.len());
    let mut rest = tensors.into_iter().peekable();
    while rest.peek().is_some() {
        stepped.extend(step(rest.by_ref().take(STEPPED).collect(), clip.as_ref()));
    }
    Ok(stepped)
}

fn step(tensors: Vec<AdamWTensor<Backend>>, clip: Option<&Buffer>) -> Vec<[Tensor<Backend, 1>; 3]> {
    let shared = tensors[0].step;
    let mut parameters: Parameters = [shared.beta1, shared.beta2, shared.epsilon]
        .map(float_bits)
        .to_vec();
    let total: usize = tensors
        .iter()
        .map(|one| one.value.dims()[0].next_multiple_of(ALIGNED))
        .sum();
    parameters.push(total as u64);
    let mut operands: Vec<Buffer> = Vec::with_capacity(4 * STEPPED);
    let mut places = Vec::with_capacity(tensors.len());
    let (mut place, mut most) = (0, 0);
    for one in tensors {
        let step = one.step;
        let four = [one.value, one.gradient, one.first, one.second].map(contiguous);
        let elements = count(&four[0]);
        assert!(
            four.iter().all(|x| count(x) == elements),
            "value, gradient and moments differ in length"
        );
        let scales = [step.step_size, step.second_scale, step.keep].map(float_bits);
        parameters.extend([elements as u64, place as u64]);
        parameters.extend(scales);
        places.push((place, elements));
        place += elements.next_multiple_of(ALIGNED);
        most = most.max(elements);
        operands.extend(four);
    }
    let like = operands[0].clone();
    // The moments of a whole run: of exactly their size, not in pages of the card's pools.
    let results = exact(&like.client, || empty(&like, [3 * total], DType::F32));
    let mut buffers: Vec<Operand<'_>> = (operands.chunks(4))
        .flat_map(|four| {
            let elements = count(&four[0]);
            four.iter()
                .map(move |x| Operand::contiguous(x, DType::F32, [elements]))
        })
        .collect();
    // Slots without a tensor are not read; any buffer fills them.
    let unused = Operand::unused(&like);
    buffers.resize(4 * STEPPED, unused);
    parameters.resize(4 + 5 * STEPPED, 0);
    buffers.push(clip.map_or(unused, |clip| Operand::contiguous(clip, DType::F32, [2])));
    buffers.push(Operand::contiguous(&results, DType::F32, [3 * total]));
    let more = [
        ("TENSORS", STEPPED as i64),
        ("CLIPPED", i64::from(clip.is_some())),
    ];
    let grid = [most.div_ceil(1024).max(1), places.len(), 1];
    launch(
        &like.client,
        kernel("ADAMW", &more),
        grid,
        &buffers,
        parameters,
    );
    places
        .into_iter()
        .map(|(place, elements)| {
            [0, 1, 2].map(|part| tensor(view(&results, part * total + place, elements)))
        })
        .collect()
}

/// The common norm of some tensors, and the factor that brings it down to `max_norm`; `[2]`.
pub(super) fn clip_scale(
    tensors: &[Tensor<Backend, 1>],
    max_norm: f64,
) -> Option<Tensor<Backend, 1>> {
    if tensors.iter().any(|tensor| tensor.dtype() != DType::F32) {
        return None;
    }
    let buffers: Vec<Buffer> = tensors.iter().cloned().map(contiguous).collect();
    let like = &buffers[0];
    let sums = empty(like, [buffers.len() * BLOCKS], DType::F32);
    for (index, group) in buffers.chunks(SUMMED).enumerate() {
        let mut parameters = vec![(index * SUMMED * BLOCKS) as u64];
        parameters.extend(group.iter().map(|buffer| count(buffer) as u64));
        parameters.resize(1 + SUMMED, 0);
        let mut operands: Vec<_> = group
            .iter()
            .map(|x| Operand::contiguous(x, DType::F32, [count(x)]))
            .collect();
        operands.resize(SUMMED, Operand::unused(like));
        operands.push(Operand::contiguous(&sums, DType::F32, [count(&sums)]));
        launch(
            &like.client,
            kernel("SQUARE_SUMS", &[("TENSORS", SUMMED as i64)]),
            [BLOCKS, group.len(), 1],
            &operands,
            parameters,
        );
    }
    let clip = empty(like, [2], DType::F32);
    launch(
        &like.client,
        kernel("CLIP_SCALE", &[]),
        [1, 1, 1],
        &[
            Operand::contiguous(&sums, DType::F32, [count(&sums)]),
            Operand::contiguous(&clip, DType::F32, [2]),
        ],
        vec![count(&sums) as u64, float_bits(max_norm)],
    );
    Some(tensor(clip))
}

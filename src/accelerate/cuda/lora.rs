//! Adapted linear layers: `lora.cu` beside the matmuls of `gemm.rs`.
//!
//! The adapter's B joins the layer's own matmul as one more pair of operands, so that
//! `x Wᵀ + low (sB)ᵀ` is one launch and the result is written once.

use burn::{prelude::*, tensor::DType};

use super::{
    frozen_matrix,
    gemm::{self, Epilogue, WeightLayout},
    launch::{Backend, Buffer, Kernel, Parameters, contiguous, empty, float_bits, launch, tensor},
    operand::Operand,
    plan,
};
use crate::ops::{BackwardMatmul, Dropout, LowRank, LowRankBackward, LowRankGradients};

const SOURCES: &[&str] = &[
    include_str!("scalar.cuh"),
    include_str!("dropout.cuh"),
    include_str!("swiglu.cuh"),
    include_str!("lora.cu"),
];

/// Largest rank the kernels hold in registers.
const LARGEST_RANK: usize = 64;

/// Whether the kernels cover an adapter over `[n, width]` inputs and `[n, out]` outputs.
pub(super) fn covers(adapter: &LowRank<Backend>, dtype: DType) -> bool {
    let [rank, width] = adapter.a.dims();
    let [out, _] = adapter.b.dims();
    super::supported(&adapter.a)
        && dtype == DType::BF16
        && [adapter.a.dtype(), adapter.b.dtype()] == [DType::F32; 2]
        && rank.is_multiple_of(8)
        && rank <= LARGEST_RANK
        && width.is_multiple_of(32)
        && out.is_multiple_of(32)
}

/// Whether the kernels cover the backward pass of a matmul and its adapter.
fn covers_backward(matmul: &BackwardMatmul<Backend>) -> bool {
    frozen_matrix::covers_matrix(&matmul.dy, &matmul.weight)
        && matmul.adapter.as_ref().is_none_or(|(low, adapter)| {
            covers(adapter, matmul.dy.dtype()) && low.dtype() == DType::BF16
        })
}

/// Sizes and factors of a launch; the rest of its parameters are the adapters' dropout.
#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    width: usize,
    /// Rows of a block, or number of parts.
    chunk: usize,
    scale: f64,
    low_parts: usize,
}

fn parameters(shape: Shape, dropouts: &[Option<Dropout>]) -> Parameters {
    let seed = |at: usize| dropouts.get(at).copied().flatten().map_or(0, |d| d.seed);
    let first = dropouts.first().copied().flatten();
    vec![
        shape.rows as u64,
        shape.width as u64,
        shape.chunk as u64,
        float_bits(shape.scale),
        seed(0),
        seed(1),
        seed(2),
        first.map_or(0, |dropout| u64::from(dropout.threshold())),
        float_bits(first.map_or(1.0, Dropout::keep_scale)),
        shape.low_parts as u64,
    ]
}

/// A kernel of `lora.cu`; `more` are the further defines of its variant.
fn kernel(
    variant: &'static str,
    rank: usize,
    dropouts: &[Option<Dropout>],
    threads: u32,
    more: &[(&'static str, i64)],
) -> Kernel {
    let dropout = dropouts.first().is_some_and(Option::is_some);
    let mut defines = vec![
        ("SCALAR_BF16", 1),
        ("RANK", rank as i64),
        ("ADAPTERS", dropouts.len().max(1) as i64),
        ("DROPOUT", i64::from(dropout)),
        (variant, 1),
    ];
    defines.extend(more);
    Kernel::new(variant, SOURCES, defines, threads)
}

fn rank(adapter: &LowRank<Backend>) -> usize {
    adapter.a.dims()[0]
}

/// How many of the first adapters one launch can serve: those that share a kernel's configuration
/// and fit a thread's registers.
fn together<'a>(mut adapters: impl Iterator<Item = &'a LowRank<Backend>>) -> usize {
    let Some(first) = adapters.next() else {
        return 0;
    };
    let probability = |one: &LowRank<Backend>| one.dropout.map(|dropout| dropout.probability);
    let most = (LARGEST_RANK / rank(first)).clamp(1, 3);
    1 + adapters
        .take(most - 1)
        .take_while(|other| rank(other) == rank(first) && probability(other) == probability(first))
        .count()
}

/// Columns of a warp in units of 32, by the tiles of eight ranks that its sums hold.
fn column_tiles(rank_tiles: usize) -> usize {
    match rank_tiles {
        1 => 4,
        2..=4 => 2,
        _ => 1,
    }
}

/// How blocks of four warps divide a large operand: blocks side by side, rows of each, and blocks
/// one below another. A function of the shape and the card alone, so that sums have one order.
fn split(rows: usize, width: usize, column_tiles: usize, processors: usize) -> [usize; 3] {
    let across = width.div_ceil(128 * column_tiles);
    // Three blocks for each processor.
    let below = (3 * processors / across).max(1);
    let chunk = rows.div_ceil(below).next_multiple_of(64);
    [across, chunk, rows.div_ceil(chunk)]
}

/// `drop(x) Aᵀ` of adapters that share their input, `[rows, rank]` bf16 each.
pub(super) fn low_rank_inputs(
    x: &Tensor<Backend, 2>,
    adapters: &[&LowRank<Backend>],
) -> Option<Vec<Tensor<Backend, 2>>> {
    if !adapters.iter().all(|one| covers(one, x.dtype())) {
        return None;
    }
    let x = contiguous(x.clone());
    let mut lows = Vec::with_capacity(adapters.len());
    let mut rest = adapters;
    while !rest.is_empty() {
        let (now, later) = rest.split_at(together(rest.iter().copied()));
        lows.extend(down(&x, now));
        rest = later;
    }
    Some(lows.into_iter().map(tensor).collect())
}

fn down(x: &Buffer, adapters: &[&LowRank<Backend>]) -> Vec<Buffer> {
    let [rows, width] = x.meta.shape().dims();
    let rank = rank(adapters[0]);
    // Sums a thread holds for each 16 rows, in units of four.
    let sums = adapters.len() * rank / 8;
    let processors = plan::device(x).processors;
    let row_tiles = (1..=(12 / sums).clamp(1, 4))
        .rev()
        .min_by_key(|tiles| rows.div_ceil(16 * tiles).div_ceil(processors) * tiles)
        .unwrap_or(1);
    let factors: Vec<Buffer> = adapters
        .iter()
        .map(|adapter| contiguous(adapter.a.clone()))
        .collect();
    let lows: Vec<Buffer> = adapters
        .iter()
        .map(|_| empty(x, [rows, rank], DType::BF16))
        .collect();
    let dropouts: Vec<_> = adapters.iter().map(|adapter| adapter.dropout).collect();
    let shape = Shape {
        rows,
        width,
        chunk: 0,
        scale: 1.0,
        low_parts: 0,
    };
    let more = [("ROW_TILES", row_tiles as i64)];
    let mut operands = vec![Operand::contiguous(x, DType::BF16, [rows, width])];
    operands.extend((factors.iter()).map(|a| Operand::contiguous(a, DType::F32, [rank, width])));
    operands.extend((lows.iter()).map(|low| Operand::contiguous(low, DType::BF16, [rows, rank])));
    launch(
        &x.client,
        kernel("LOW_RANK_DOWN", rank, &dropouts, 512, &more),
        [rows.div_ceil(16 * row_tiles), 1, 1],
        &operands,
        parameters(shape, &dropouts),
    );
    lows
}

/// `scale · B` as bf16.
fn scaled_b(adapter: &LowRank<Backend>) -> Buffer {
    let b = contiguous(adapter.b.clone());
    let [out, rank] = b.meta.shape().dims();
    let cast = empty(&b, [out, rank], DType::BF16);
    let shape = Shape {
        rows: 0,
        width: out,
        chunk: 0,
        scale: adapter.scaling,
        low_parts: 0,
    };
    launch(
        &b.client,
        kernel("SCALE_CAST", rank, &[], 256, &[]),
        [(out * rank).div_ceil(1024), 1, 1],
        &[
            Operand::contiguous(&b, DType::F32, [out, rank]),
            Operand::contiguous(&cast, DType::BF16, [out, rank]),
        ],
        parameters(shape, &[]),
    );
    cast
}

/// `x Wᵀ + s · low Bᵀ + residual`.
pub(super) fn adapted_linear(
    x: &Tensor<Backend, 2>,
    weight: &Tensor<Backend, 2>,
    low: &Tensor<Backend, 2>,
    adapter: &LowRank<Backend>,
    residual: Option<&Tensor<Backend, 2>>,
) -> Option<Tensor<Backend, 2>> {
    if !gemm::covers(x, weight) || !covers(adapter, x.dtype()) {
        return None;
    }
    let [x, weight, low] = [x, weight, low].map(|x| contiguous(x.clone()));
    let b = scaled_b(adapter);
    let residual = residual.cloned().map(contiguous);
    let epilogue = Epilogue {
        residual: residual.as_ref(),
        ..Epilogue::default()
    };
    let pairs = [(&x, &weight), (&low, &b)];
    let y = gemm::matmul(&pairs, WeightLayout::OutIn, epilogue, DType::BF16);
    Some(tensor(y))
}

/// Gradients of the weights of adapters that share the input `x`.
pub(super) fn low_rank_backward(
    x: &Tensor<Backend, 2>,
    backwards: &[LowRankBackward<Backend>],
) -> Option<Vec<LowRankGradients<Backend>>> {
    let covered = |backward: &LowRankBackward<Backend>| {
        let operands = [&backward.low, &backward.dy];
        covers(&backward.adapter, x.dtype()) && operands.iter().all(|x| x.dtype() == DType::BF16)
    };
    if !backwards.iter().all(covered) {
        return None;
    }
    let x = contiguous(x.clone());
    // The output gradient is read once for each adapter, the input once for all.
    let (of_b, lows): (Vec<Buffer>, Vec<Buffer>) =
        backwards.iter().map(b_and_low_gradients).unzip();
    let mut of_a = Vec::with_capacity(backwards.len());
    while of_a.len() < backwards.len() {
        let start = of_a.len();
        let count = together(backwards[start..].iter().map(|backward| &backward.adapter));
        let dropouts: Vec<_> = backwards[start..start + count]
            .iter()
            .map(|backward| backward.adapter.dropout)
            .collect();
        of_a.extend(outer(&x, &lows[start..start + count], &dropouts));
    }
    let gradients = of_a.into_iter().zip(of_b).zip(lows);
    let gradients = gradients.map(|((a, b), low)| LowRankGradients {
        a: tensor(a),
        b: tensor(b),
        low: tensor(low),
    });
    Some(gradients.collect())
}

/// The gradient of `B`, `[out, rank]` f32, and of `drop(x) Aᵀ`, `[rows, rank]` bf16.
fn b_and_low_gradients(backward: &LowRankBackward<Backend>) -> (Buffer, Buffer) {
    let (dy, low) = (
        contiguous(backward.dy.clone()),
        contiguous(backward.low.clone()),
    );
    let b = contiguous(backward.adapter.b.clone());
    let [rows, width] = dy.meta.shape().dims();
    let rank = rank(&backward.adapter);
    let tiles = column_tiles(rank / 8);
    let [across, chunk, chunks] = split(rows, width, tiles, plan::device(&dy).processors);
    let low_part = empty(&dy, [across, rows * rank], DType::F32);
    let b_part = empty(&dy, [chunks, width * rank], DType::F32);
    let shape = Shape {
        rows,
        width,
        chunk,
        scale: backward.adapter.scaling,
        low_parts: 0,
    };
    let more = [("COLUMN_TILES", tiles as i64)];
    let low_parts = Operand::contiguous(&low_part, DType::F32, [across, rows * rank]);
    let b_parts = Operand::contiguous(&b_part, DType::F32, [chunks, width * rank]);
    launch(
        &dy.client,
        kernel("LOW_RANK_FLOW", rank, &[], 128, &more),
        [across, chunks, 1],
        &[
            Operand::contiguous(&dy, DType::BF16, [rows, width]),
            Operand::contiguous(&low, DType::BF16, [rows, rank]),
            Operand::contiguous(&b, DType::F32, [width, rank]),
            low_parts,
            b_parts,
        ],
        parameters(shape, &[]),
    );
    let of_b = empty(&dy, [width, rank], DType::F32);
    let of_low = empty(&dy, [rows, rank], DType::BF16);
    let shape = Shape {
        chunk: chunks,
        low_parts: across,
        ..shape
    };
    launch(
        &dy.client,
        kernel("SUM_FLOW", rank, &[], 128, &[]),
        [((width + rows) * rank).div_ceil(512), 1, 1],
        &[
            b_parts,
            low_parts,
            Operand::contiguous(&of_b, DType::F32, [width, rank]),
            Operand::contiguous(&of_low, DType::BF16, [rows, rank]),
        ],
        parameters(shape, &[]),
    );
    (of_b, of_low)
}

/// `lowᵀ drop(x)` of adapters that share `x`, `[rank, width]` f32 each.
fn outer(x: &Buffer, lows: &[Buffer], dropouts: &[Option<Dropout>]) -> Vec<Buffer> {
    let [rows, width] = x.meta.shape().dims();
    let [_, rank] = lows[0].meta.shape().dims();
    let count = lows.len();
    let tiles = column_tiles(count * rank / 8);
    let [across, chunk, chunks] = split(rows, width, tiles, plan::device(x).processors);
    let part = empty(x, [chunks, count * width * rank], DType::F32);
    let shape = Shape {
        rows,
        width,
        chunk,
        scale: 1.0,
        low_parts: 0,
    };
    let more = [("COLUMN_TILES", tiles as i64)];
    let parts = Operand::contiguous(&part, DType::F32, [chunks, count * width * rank]);
    let mut operands = vec![Operand::contiguous(x, DType::BF16, [rows, width])];
    operands.extend((lows.iter()).map(|low| Operand::contiguous(low, DType::BF16, [rows, rank])));
    operands.push(parts);
    launch(
        &x.client,
        kernel("LOW_RANK_OUTER", rank, dropouts, 128, &more),
        [across, chunks, 1],
        &operands,
        parameters(shape, dropouts),
    );
    let outs: Vec<Buffer> = lows
        .iter()
        .map(|_| empty(x, [rank, width], DType::F32))
        .collect();
    let mut operands = vec![parts];
    operands.extend((outs.iter()).map(|out| Operand::contiguous(out, DType::F32, [rank, width])));
    launch(
        &x.client,
        kernel("SUM_OUTER", rank, &vec![None; count], 128, &[]),
        [(width * rank / 4).div_ceil(128), count, 1],
        &operands,
        parameters(
            Shape {
                chunk: chunks,
                ..shape
            },
            &[],
        ),
    );
    outs
}

/// The input gradient through the weights alone, `Σ dy W`, without the adapters' part.
fn weights_input_gradient(matmuls: &[BackwardMatmul<Backend>]) -> Buffer {
    let pairs: Vec<_> = matmuls
        .iter()
        .map(|matmul| (matmul.dy.clone(), frozen_matrix::floats(&matmul.weight)))
        .collect();
    contiguous(gemm::input_gradient(&pairs))
}

pub(super) fn input_gradient(matmuls: &[BackwardMatmul<Backend>]) -> Option<Tensor<Backend, 2>> {
    if !matmuls.iter().all(covers_backward) {
        return None;
    }
    let dx = weights_input_gradient(matmuls);
    let adapters: Vec<_> = matmuls
        .iter()
        .filter_map(|matmul| matmul.adapter.as_ref())
        .collect();
    let mut rest = adapters.as_slice();
    while !rest.is_empty() {
        let count = together(rest.iter().map(|(_, adapter)| adapter));
        let (now, later) = rest.split_at(count);
        spread(now, &dx, &[]);
        rest = later;
    }
    Some(tensor(dx))
}

/// The gradients of gate and up, in one pass over the gradient of SwiGLU's output.
pub(super) fn swiglu_input_gradient(
    matmul: &BackwardMatmul<Backend>,
    gate: &Tensor<Backend, 2>,
    up: &Tensor<Backend, 2>,
) -> Option<[Tensor<Backend, 2>; 2]> {
    if !covers_backward(matmul) || [gate.dtype(), up.dtype()] != [DType::BF16; 2] {
        return None;
    }
    let dx = weights_input_gradient(std::slice::from_ref(matmul));
    let Some(adapter) = &matmul.adapter else {
        return super::pointwise::swiglu_backward(gate, up, &tensor(dx));
    };
    let (gate, up) = (contiguous(gate.clone()), contiguous(up.clone()));
    let shape: [usize; 2] = dx.meta.shape().dims();
    let outputs = [(); 2].map(|()| empty(&dx, shape, DType::BF16));
    spread(&[adapter], &dx, &[&gate, &up, &outputs[0], &outputs[1]]);
    Some(outputs.map(tensor))
}

/// `dx += Σ drop(low A)`, in place, or on to the gradients of gate and up (SwiGLU's backward).
fn spread(adapters: &[&(Tensor<Backend, 2>, LowRank<Backend>)], dx: &Buffer, gate_up: &[&Buffer]) {
    let [rows, width] = dx.meta.shape().dims();
    let rank = rank(&adapters[0].1);
    let lows: Vec<Buffer> = (adapters.iter())
        .map(|(low, _)| contiguous(low.clone()))
        .collect();
    let factors: Vec<Buffer> = (adapters.iter())
        .map(|(_, one)| contiguous(one.a.clone()))
        .collect();
    let dropouts: Vec<_> = adapters.iter().map(|(_, one)| one.dropout).collect();
    let tiles = if adapters.len() * rank > 32 { 1 } else { 2 };
    // Nothing is summed over rows: more blocks than run at once.
    let (across, chunk) = (width.div_ceil(128 * tiles), 128);
    let chunks = rows.div_ceil(chunk);
    let shape = Shape {
        rows,
        width,
        chunk,
        scale: 1.0,
        low_parts: 0,
    };
    let mut operands: Vec<Operand<'_>> = (lows.iter())
        .map(|low| Operand::contiguous(low, DType::BF16, [rows, rank]))
        .collect();
    operands.extend((factors.iter()).map(|a| Operand::contiguous(a, DType::F32, [rank, width])));
    let wide = std::iter::once(dx).chain(gate_up.iter().copied());
    operands.extend(wide.map(|x| Operand::contiguous(x, DType::BF16, [rows, width])));
    let more = [
        ("COLUMN_TILES", tiles as i64),
        ("SWIGLU", i64::from(!gate_up.is_empty())),
    ];
    launch(
        &dx.client,
        kernel("LOW_RANK_SPREAD", rank, &dropouts, 128, &more),
        [across, chunks, 1],
        &operands,
        parameters(shape, &dropouts),
    );
}

/// The dropout mask that the kernels draw, as a tensor.
pub(super) fn dropout_mask(
    like: &Tensor<Backend, 2>,
    dropout: Dropout,
) -> Option<Tensor<Backend, 2>> {
    let [rows, width] = like.dims();
    let like = super::launch::strided(like.clone());
    let out = empty(&like, [rows, width], DType::F32);
    let shape = Shape {
        rows,
        width,
        chunk: 0,
        scale: 1.0,
        low_parts: 0,
    };
    launch(
        &like.client,
        kernel("MASK_FILL", 8, &[Some(dropout)], 256, &[]),
        [(rows * width).div_ceil(512), 1, 1],
        &[Operand::contiguous(&out, DType::F32, [rows, width])],
        parameters(shape, &[Some(dropout)]),
    );
    Some(tensor(out))
}

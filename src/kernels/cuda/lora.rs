//! Adapted linear layers: `lora.cu` beside the products of `gemm.rs`.
//!
//! The adapter's second factor joins the layer's own product as one more pair of operands, so that
//! `x Wᵀ + low (sB)ᵀ` is one launch and the result is written once.

use burn::{prelude::*, tensor::DType};

use super::{
    gemm::{self, Around, WeightLayout},
    launch::{Backend, Buffer, Kernel, Parameters, contiguous, empty, float_bits, launch, tensor},
};
use crate::kernels::{BackwardProduct, Dropout, LowRank, LowRankGradients};

const SOURCES: &[&str] = &[
    include_str!("scalar.cuh"),
    include_str!("dropout.cuh"),
    include_str!("lora.cu"),
];

/// Rows of one block's share where blocks split the rows.
const CHUNK: usize = 368;

/// Largest rank the kernels hold in registers.
const LARGEST_RANK: usize = 64;

/// Whether an adapter over `[n, width]` inputs and `[n, out]` outputs can be worked on.
pub(super) fn covers(adapter: &LowRank<Backend>, dtype: DType) -> bool {
    let [rank, width] = adapter.a.dims();
    let [out, _] = adapter.b.dims();
    super::supported()
        && dtype == DType::BF16
        && adapter.a.dtype() == DType::F32
        && rank.is_multiple_of(8)
        && rank <= LARGEST_RANK
        && width.is_multiple_of(32)
        && out.is_multiple_of(32)
}

/// Of 65,536 draws, those below this drop a column.
fn threshold(dropout: Option<Dropout>) -> u64 {
    dropout.map_or(0, |dropout| (dropout.probability * 65_536.0).round() as u64)
}

/// Factor on what is kept, exact for the threshold.
fn keep_scale(dropout: Option<Dropout>) -> f64 {
    65_536.0 / (65_536 - threshold(dropout)) as f64
}

#[derive(Clone, Copy)]
struct Shape {
    rows: usize,
    width: usize,
    chunk: usize,
    scale: f64,
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
        threshold(first),
        float_bits(keep_scale(first)),
    ]
}

fn kernel(form: &'static str, rank: usize, adapters: usize, dropout: bool, threads: u32) -> Kernel {
    let mut defines = vec![
        ("SCALAR_BF16", 1),
        ("RANK", rank as i64),
        ("ADAPTERS", adapters as i64),
        ("DROPOUT", i64::from(dropout)),
        (form, 1),
    ];
    if form == "SUM_PARTS" {
        defines.push(("TRANSPOSED", i64::from(adapters == 2)));
    }
    Kernel::new(form, SOURCES, defines, threads)
}

/// `scale · drop(x) Aᵀ`, `[rows, rank]` bf16; `a` `[rank, width]` f32.
fn down(x: &Buffer, a: &Buffer, scale: f64, dropout: Option<Dropout>) -> Buffer {
    let [rows, width] = x.meta.shape().dims();
    let [rank, _] = a.meta.shape().dims();
    let low = empty(x, [rows, rank], DType::BF16);
    let shape = Shape {
        rows,
        width,
        chunk: 0,
        scale,
    };
    launch(
        &x.client,
        kernel("LOW_RANK_DOWN", rank, 1, dropout.is_some(), 256),
        [rows.div_ceil(32), 1, 1],
        &[x, a, &low],
        parameters(shape, &[dropout]),
    );
    low
}

/// `scale · B` as `[out, rank]` bf16 and as `[rank, out]` f32.
fn scaled_b(adapter: &LowRank<Backend>) -> (Buffer, Buffer) {
    let b = contiguous(adapter.b.clone());
    let [out, rank] = b.meta.shape().dims();
    let cast = empty(&b, [out, rank], DType::BF16);
    let transposed = empty(&b, [rank, out], DType::F32);
    let shape = Shape {
        rows: 0,
        width: out,
        chunk: 0,
        scale: adapter.scaling,
    };
    launch(
        &b.client,
        kernel("SCALE_CAST", rank, 1, false, 256),
        [(out * rank).div_ceil(256), 1, 1],
        &[&b, &cast, &transposed],
        parameters(shape, &[]),
    );
    (cast, transposed)
}

/// `scale · lowᵀ drop(x)`, `[rank, width]` f32, or its transpose.
fn outer(low: &Buffer, x: &Buffer, scale: f64, dropout: Option<Dropout>, turned: bool) -> Buffer {
    let [rows, width] = x.meta.shape().dims();
    let [_, rank] = low.meta.shape().dims();
    let chunks = rows.div_ceil(CHUNK);
    let parts = empty(x, [chunks, rank * width], DType::F32);
    let shape = Shape {
        rows,
        width,
        chunk: CHUNK,
        scale,
    };
    launch(
        &x.client,
        kernel("LOW_RANK_OUTER", rank, 1, dropout.is_some(), 128),
        [width.div_ceil(256), chunks, 1],
        &[low, x, &parts],
        parameters(shape, &[dropout]),
    );
    let out = empty(
        x,
        if turned { [width, rank] } else { [rank, width] },
        DType::F32,
    );
    let shape = Shape {
        chunk: chunks,
        ..shape
    };
    launch(
        &x.client,
        kernel("SUM_PARTS", rank, 1 + usize::from(turned), false, 256),
        [(rank * width).div_ceil(256), 1, 1],
        &[&parts, &out],
        parameters(shape, &[]),
    );
    out
}

pub(super) fn adapted_linear(
    x: Tensor<Backend, 2>,
    weight: Tensor<Backend, 2>,
    adapter: &LowRank<Backend>,
    residual: Option<Tensor<Backend, 2>>,
) -> (Tensor<Backend, 2>, Tensor<Backend, 2>) {
    let x = contiguous(x);
    let a = contiguous(adapter.a.clone());
    let low = down(&x, &a, 1.0, adapter.dropout);
    let (b, _) = scaled_b(adapter);
    let weight = contiguous(weight);
    let residual = residual.map(contiguous);
    let y = gemm::product(
        &[(&x, &weight), (&low, &b)],
        WeightLayout::OutIn,
        Around {
            residual: residual.as_ref(),
            ..Around::default()
        },
        DType::BF16,
    );
    (tensor(y), tensor(low))
}

pub(super) fn adapted_linear_backward(
    x: Tensor<Backend, 2>,
    low: Tensor<Backend, 2>,
    adapter: &LowRank<Backend>,
    dy: Tensor<Backend, 2>,
) -> LowRankGradients<Backend> {
    let (x, low, dy) = (contiguous(x), contiguous(low), contiguous(dy));
    let (_, b) = scaled_b(adapter);
    let dlow = down(&dy, &b, 1.0, None);
    LowRankGradients {
        a: tensor(outer(&dlow, &x, 1.0, adapter.dropout, false)),
        b: tensor(outer(&low, &dy, adapter.scaling, None, true)),
        low: tensor(dlow),
    }
}

pub(super) fn input_gradient(products: &[BackwardProduct<Backend>]) -> Tensor<Backend, 2> {
    let pairs: Vec<_> = products
        .iter()
        .map(|product| (product.dy.clone(), product.weight.clone()))
        .collect();
    let dx = contiguous(gemm::input_gradient(&pairs));
    let adapters: Vec<_> = products
        .iter()
        .filter_map(|product| product.adapter.as_ref())
        .collect();
    // One launch serves the adapters that share the input, as far as they fit a thread's registers.
    let mut rest = adapters.as_slice();
    while let Some((_, first)) = rest.first() {
        let rank = first.a.dims()[0];
        let most = (24 / rank).clamp(1, 3);
        let count = rest
            .iter()
            .take(most)
            .take_while(|(_, other)| {
                other.a.dims()[0] == rank && other.dropout.is_some() == first.dropout.is_some()
            })
            .count();
        let (now, later) = rest.split_at(count);
        spread(now, &dx);
        rest = later;
    }
    tensor(dx)
}

/// `dx += Σ drop(low A)`, in place.
fn spread(adapters: &[&(Tensor<Backend, 2>, LowRank<Backend>)], dx: &Buffer) {
    let [rows, width] = dx.meta.shape().dims();
    let rank = adapters[0].1.a.dims()[0];
    let operands: Vec<Buffer> = adapters
        .iter()
        .flat_map(|(low, adapter)| [contiguous(low.clone()), contiguous(adapter.a.clone())])
        .collect();
    let dropouts: Vec<_> = adapters
        .iter()
        .map(|(_, adapter)| adapter.dropout)
        .collect();
    let chunk = CHUNK / 4;
    let shape = Shape {
        rows,
        width,
        chunk,
        scale: 1.0,
    };
    let mut buffers: Vec<&Buffer> = operands.iter().collect();
    buffers.push(dx);
    launch(
        &dx.client,
        kernel(
            "LOW_RANK_SPREAD",
            rank,
            adapters.len(),
            dropouts[0].is_some(),
            128,
        ),
        [width.div_ceil(256), rows.div_ceil(chunk), 1],
        &buffers,
        parameters(shape, &dropouts),
    );
}

/// The mask the kernels draw, as a tensor.
pub(super) fn dropout_mask(like: &Tensor<Backend, 2>, dropout: Dropout) -> Tensor<Backend, 2> {
    let [rows, width] = like.dims();
    let like = super::launch::strided(like.clone());
    let out = empty(&like, [rows, width], DType::F32);
    let shape = Shape {
        rows,
        width,
        chunk: 0,
        scale: 1.0,
    };
    launch(
        &like.client,
        kernel("MASK_FILL", 8, 1, true, 256),
        [(rows * width).div_ceil(512), 1, 1],
        &[&out],
        parameters(shape, &[Some(dropout)]),
    );
    tensor(out)
}

//! Matmul (GEMM): `gemm_wgmma.cu` on Hopper, `gemm_mma.cu` from Ampere on.

use burn::{prelude::*, tensor::DType};

use super::{
    launch::{
        Backend, Buffer, Kernel, MatrixMap, contiguous, empty, launch, launch_with_maps, tensor,
    },
    operand::Operand,
    plan::{self, Instructions, Tile},
};
use crate::ops::{Activation, cast::to_dtype};

const WGMMA: &[&str] = &[
    include_str!("common.cuh"),
    include_str!("gemm_epilogue.cuh"),
    include_str!("gemm_wgmma.cu"),
];
const MMA: &[&str] = &[
    include_str!("common.cuh"),
    include_str!("gemm_epilogue.cuh"),
    include_str!("gemm_mma.cu"),
];

/// Most pairs of operands of one launch.
const MOST_PAIRS: usize = 4;

/// How the second operand of a matmul is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WeightLayout {
    /// `[out, in]` in a matmul that sums over `in`.
    OutIn,
    /// `[in, out]` in a matmul that sums over `in`: a stored weight in the backward pass.
    InOut,
}

/// The epilogue of a matmul, applied before the result is stored: `activation(A B + bias) + residual`.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Epilogue<'a> {
    /// `[columns]`, bf16.
    pub bias: Option<&'a Buffer>,
    /// `[rows, columns]`, bf16.
    pub residual: Option<&'a Buffer>,
    pub activation: Option<Activation>,
}

impl Epilogue<'_> {
    /// `GemmShape::flags` of `gemm_epilogue.cuh`.
    fn flags(&self) -> u64 {
        let activation = match self.activation {
            None => 0,
            Some(Activation::GeluTanh) => 4,
            Some(Activation::GeluExact) => 8,
        };
        u64::from(self.bias.is_some()) + 2 * u64::from(self.residual.is_some()) + activation
    }
}

fn is_bf16(tensors: &[&Tensor<Backend, 2>]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::BF16)
}

/// Whether the kernels cover `x Wᵀ`, and its backward `dy W`: bf16, rows of multiples of 16 bytes.
pub(super) fn covers(x: &Tensor<Backend, 2>, weight: &Tensor<Backend, 2>) -> bool {
    let [out, inner] = weight.dims();
    super::supported(x)
        && is_bf16(&[x, weight])
        && out.is_multiple_of(8)
        && inner.is_multiple_of(8)
        && x.dims()[0] > 0
}

/// `activation(Σ A B + bias) + residual`, `[rows, columns]` in `dtype` (bf16 or f32).
///
/// Each pair holds `A` `[rows, k]` and `B` in `layout`; all are contiguous bf16.
///
/// # Panics
/// If shapes do not match.
pub(super) fn matmul(
    pairs: &[(&Buffer, &Buffer)],
    layout: WeightLayout,
    epilogue: Epilogue<'_>,
    dtype: DType,
) -> Buffer {
    let (a, b) = pairs[0];
    let [rows, _] = a.meta.shape().dims();
    let columns = |b: &Buffer| -> usize {
        let [out, inner] = b.meta.shape().dims();
        if layout == WeightLayout::OutIn {
            out
        } else {
            inner
        }
    };
    let n = columns(b);
    for (a, b) in pairs {
        let [m, k] = a.meta.shape().dims();
        let [out, inner] = b.meta.shape().dims();
        let depth = if layout == WeightLayout::OutIn {
            inner
        } else {
            out
        };
        assert!(
            m == rows && k == depth && columns(b) == n && k % 8 == 0 && n % 8 == 0,
            "a matmul of [{m}, {k}] and {layout:?} [{out}, {inner}] beside [{rows}, {n}]"
        );
    }
    let device = plan::device(a);
    let (now, later) = pairs.split_at(match device.instructions {
        Instructions::Wgmma => pairs.len().min(MOST_PAIRS),
        Instructions::Mma => 1,
    });
    let out = empty(a, [rows, n], dtype);
    run(&device, now, layout, epilogue, &out);
    // Pairs beyond one launch are added to its result.
    for pairs in later.chunks(1) {
        assert!(
            dtype == DType::BF16 && epilogue.activation.is_none(),
            "only bf16 sums without an activation are added up"
        );
        let sum = Epilogue {
            residual: Some(&out),
            ..Epilogue::default()
        };
        run(&device, pairs, layout, sum, &out);
    }
    out
}

fn run(
    device: &plan::Device,
    pairs: &[(&Buffer, &Buffer)],
    layout: WeightLayout,
    epilogue: Epilogue<'_>,
    out: &Buffer,
) {
    let [m, n] = out.meta.shape().dims();
    let depth = pairs.iter().map(|(a, _)| a.meta.shape()[1]).sum();
    let tile = plan::tile([m, n, depth], layout == WeightLayout::InOut, device);
    run_tile(tile, pairs, layout, epilogue, out);
}

fn run_tile<'a>(
    tile: Tile,
    pairs: &[(&'a Buffer, &'a Buffer)],
    layout: WeightLayout,
    epilogue: Epilogue<'a>,
    out: &'a Buffer,
) {
    let [m, n] = out.meta.shape().dims();
    let depths: Vec<usize> = pairs
        .iter()
        .map(|(a, _)| a.meta.shape().dims::<2>()[1])
        .collect();
    let transposed = layout == WeightLayout::InOut;
    let mut defines = vec![
        ("B_IS_KN", i64::from(transposed)),
        ("OUT_F32", i64::from(out.dtype == DType::F32)),
    ];
    // An absent operand is not read; any buffer takes its place.
    let or_unused = |x: Option<Operand<'a>>| x.unwrap_or(Operand::unused(out));
    let output_operands = [
        Operand::contiguous(out, out.dtype, [m, n]),
        or_unused(
            epilogue
                .bias
                .map(|x| Operand::contiguous(x, DType::BF16, [n])),
        ),
        or_unused((epilogue.residual).map(|x| Operand::contiguous(x, DType::BF16, [m, n]))),
    ];
    let depth = |at: usize| depths.get(at).copied().unwrap_or(0) as u64;
    let parameters = vec![
        m as u64 | (n as u64) << 32,
        depth(0) | depth(1) << 32,
        depth(2) | depth(3) << 32,
        epilogue.flags(),
    ];
    match tile {
        Tile::Wgmma(tile) => {
            defines.extend([
                ("PAIRS", pairs.len() as i64),
                ("TILE_N", tile.columns as i64),
                ("STAGES", tile.stages as i64),
            ]);
            let mut maps = Vec::new();
            for (a, b) in pairs {
                let rows = if transposed { 64 } else { tile.columns };
                maps.extend([(a, [128, 64]), (b, [rows, 64])].map(|(buffer, tile)| {
                    MatrixMap::new(buffer, buffer.meta.shape().dims(), tile)
                }));
            }
            let kernel = Kernel::new("gemm_wgmma", WGMMA, defines, 384)
                .with_entry_macro("GEMM_NAME")
                .with_shared(tile.shared_bytes);
            let grid = [tile.blocks, 1, 1];
            launch_with_maps(
                &out.client,
                kernel,
                grid,
                &maps,
                &output_operands,
                parameters,
            );
        }
        Tile::Mma(tile) => {
            defines.extend([
                ("TILE_M", tile.rows as i64),
                ("TILE_N", tile.columns as i64),
                ("WARP_M", tile.warp_rows as i64),
                ("WARP_N", tile.warp_columns as i64),
                ("STAGES", tile.stages as i64),
                ("BLOCKS_PER_SM", tile.blocks_per_processor as i64),
            ]);
            let (a, b) = pairs[0];
            let matrix =
                |x: &'a Buffer| Operand::contiguous(x, DType::BF16, x.meta.shape().dims::<2>());
            let operands: Vec<_> = [a, b]
                .map(matrix)
                .into_iter()
                .chain(output_operands)
                .collect();
            let kernel = Kernel::new("gemm_mma", MMA, defines, tile.threads())
                .with_entry_macro("GEMM_NAME")
                .with_shared(tile.shared_bytes());
            let grid = [tile.tiles(m, n), 1, 1];
            launch(&out.client, kernel, grid, &operands, parameters);
        }
    }
}

/// `activation(x Wᵀ + bias) + residual`.
pub(super) fn linear(
    x: &Tensor<Backend, 2>,
    weight: &Tensor<Backend, 2>,
    bias: Option<&Tensor<Backend, 1>>,
    residual: Option<&Tensor<Backend, 2>>,
    activation: Option<Activation>,
) -> Option<Tensor<Backend, 2>> {
    if !covers(x, weight) {
        return None;
    }
    let (x, weight) = (contiguous(x.clone()), contiguous(weight.clone()));
    let bias = bias.map(|bias| contiguous(to_dtype(bias.clone(), DType::BF16)));
    let residual = residual.map(|one| contiguous(to_dtype(one.clone(), DType::BF16)));
    let epilogue = Epilogue {
        bias: bias.as_ref(),
        residual: residual.as_ref(),
        activation,
    };
    let pairs = [(&x, &weight)];
    let y = matmul(&pairs, WeightLayout::OutIn, epilogue, DType::BF16);
    Some(tensor(y))
}

/// Logits in f32. The sums are f32 and are not rounded, as if both operands had been cast before.
pub(super) fn logits(
    hidden: &Tensor<Backend, 2>,
    head: &Tensor<Backend, 2>,
) -> Option<Tensor<Backend, 2>> {
    if !covers(hidden, head) {
        return None;
    }
    let (hidden, head) = (contiguous(hidden.clone()), contiguous(head.clone()));
    let pairs = [(&hidden, &head)];
    let logits = matmul(&pairs, WeightLayout::OutIn, Epilogue::default(), DType::F32);
    Some(tensor(logits))
}

/// `Σ dy W` over pairs of `dy` `[rows, out]` and `W` `[out, in]` that are covered.
pub(super) fn input_gradient(
    matmuls: &[(Tensor<Backend, 2>, Tensor<Backend, 2>)],
) -> Tensor<Backend, 2> {
    let operands: Vec<(Buffer, Buffer)> = matmuls
        .iter()
        .map(|(dy, weight)| (contiguous(dy.clone()), contiguous(weight.clone())))
        .collect();
    let pairs: Vec<_> = operands.iter().map(|(dy, weight)| (dy, weight)).collect();
    tensor(matmul(
        &pairs,
        WeightLayout::InOut,
        Epilogue::default(),
        DType::BF16,
    ))
}

/// Compiles the tiles for matmuls of any number of rows; `on_kernel` is called after each.
pub(super) fn prepare(like: &Buffer, vocab: usize, mut on_kernel: impl FnMut(usize, usize)) {
    // Deep enough for all stages of any tile.
    const DEPTH: usize = 512;
    let device = plan::device(like);
    let mut tiles: Vec<(Tile, DType)> = plan::forward_tiles(&device)
        .into_iter()
        .map(|tile| (tile, DType::BF16))
        .collect();
    tiles.push((plan::tile([1, vocab, DEPTH], false, &device), DType::F32));
    let a = empty(like, [8, DEPTH], DType::BF16);
    let b = empty(like, [256, DEPTH], DType::BF16);
    for (done, (tile, dtype)) in tiles.iter().enumerate() {
        let tile = match tile {
            Tile::Wgmma(tile) => Tile::Wgmma(plan::WgmmaTile { blocks: 1, ..*tile }),
            Tile::Mma(_) => *tile,
        };
        let out = empty(like, [8, 256], *dtype);
        run_tile(
            tile,
            &[(&a, &b)],
            WeightLayout::OutIn,
            Epilogue::default(),
            &out,
        );
        let _ = cubecl_common::future::block_on(like.client.sync());
        on_kernel(done + 1, tiles.len());
    }
}

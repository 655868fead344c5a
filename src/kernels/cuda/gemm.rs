//! Matrix products: `gemm_wgmma.cu` on Hopper, `gemm_mma.cu` from Ampere on.

use burn::{prelude::*, tensor::DType};

use super::{
    launch::{
        Backend, Buffer, Kernel, contiguous, empty, launch, launch_with_maps, tensor, tensor_map,
    },
    plan::{self, Form},
};
use crate::qwen3_vl::nn::to_dtype;

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

/// How the second operand of a product is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WeightLayout {
    /// `[out, in]` in a product that sums over `in`.
    OutIn,
    /// `[in, out]` in a product that sums over `in`: a stored weight on the way back.
    InOut,
}

fn is_bf16(tensors: &[&Tensor<Backend, 2>]) -> bool {
    tensors.iter().all(|tensor| tensor.dtype() == DType::BF16)
}

/// Whether `x Wᵀ`, and on the way back `dy W`, can be worked on: bf16, rows of 16 bytes' multiples.
pub(super) fn covers(x: &Tensor<Backend, 2>, weight: &Tensor<Backend, 2>) -> bool {
    let [out, inner] = weight.dims();
    super::supported()
        && is_bf16(&[x, weight])
        && out.is_multiple_of(8)
        && inner.is_multiple_of(8)
        && x.dims()[0] > 0
}

/// `Σ A B + bias + residual`, `[rows, columns]` in `dtype` (bf16 or f32).
///
/// Each pair holds `A` `[rows, k]` and `B` in `layout`; all are contiguous bf16.
///
/// # Panics
/// If shapes do not go together.
pub(super) fn product(
    pairs: &[(&Buffer, &Buffer)],
    layout: WeightLayout,
    bias: Option<&Buffer>,
    residual: Option<&Buffer>,
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
            "a product of [{m}, {k}] and {layout:?} [{out}, {inner}] beside [{rows}, {n}]"
        );
    }
    let device = plan::device(a);
    let (now, later) = pairs.split_at(match device.form {
        Form::Wgmma => pairs.len().min(MOST_PAIRS),
        Form::Mma => 1,
    });
    let out = empty(a, [rows, n], dtype);
    run(&device, now, layout, bias, residual, &out);
    // What one launch does not hold is added to what it left.
    for pairs in later.chunks(1) {
        assert_eq!(dtype, DType::BF16, "only bf16 results are added up");
        run(&device, pairs, layout, None, Some(&out), &out);
    }
    out
}

fn run(
    device: &plan::Device,
    pairs: &[(&Buffer, &Buffer)],
    layout: WeightLayout,
    bias: Option<&Buffer>,
    residual: Option<&Buffer>,
    out: &Buffer,
) {
    let [m, n] = out.meta.shape().dims();
    let depths: Vec<usize> = pairs
        .iter()
        .map(|(a, _)| a.meta.shape().dims::<2>()[1])
        .collect();
    let turned = layout == WeightLayout::InOut;
    let mut defines = vec![
        ("B_IS_KN", i64::from(turned)),
        ("HAS_BIAS", i64::from(bias.is_some())),
        ("ACTIVATION", 0),
        ("HAS_RESIDUAL", i64::from(residual.is_some())),
        ("OUT_F32", i64::from(out.dtype == DType::F32)),
    ];
    let mut buffers: Vec<&Buffer> = Vec::new();
    let depth = |at: usize| depths.get(at).copied().unwrap_or(0) as u64;
    let parameters = vec![
        m as u64 | (n as u64) << 32,
        depth(0) | depth(1) << 32,
        depth(2) | depth(3) << 32,
    ];
    match device.form {
        Form::Wgmma => {
            let tile = plan::wgmma(m, n, depths.iter().sum(), turned, device);
            defines.extend([
                ("PAIRS", pairs.len() as i64),
                ("TILE_N", tile.columns as i64),
                ("STAGES", tile.stages as i64),
            ]);
            let mut maps = Vec::new();
            for (a, b) in pairs {
                maps.push(tensor_map(a, a.meta.shape().dims(), [128, 64]));
                let box_rows = if turned { 64 } else { tile.columns };
                maps.push(tensor_map(b, b.meta.shape().dims(), [box_rows, 64]));
            }
            buffers.push(out);
            buffers.extend(bias);
            buffers.extend(residual);
            let kernel = Kernel::new("gemm_wgmma", WGMMA, defines, 384)
                .with_entry_macro("GEMM_NAME")
                .with_shared(tile.shared_bytes);
            let grid = [tile.blocks, 1, 1];
            launch_with_maps(&out.client, kernel, grid, maps, &buffers, parameters);
        }
        Form::Mma => {
            let tile = plan::mma(m, n, device);
            defines.extend([
                ("TILE_M", tile.rows as i64),
                ("TILE_N", tile.columns as i64),
                ("WARP_M", tile.warp_rows as i64),
                ("WARP_N", tile.warp_columns as i64),
                ("STAGES", tile.stages as i64),
                ("BLOCKS_PER_SM", tile.blocks_per_processor as i64),
            ]);
            let (a, b) = pairs[0];
            buffers.extend([a, b, out]);
            buffers.extend(bias);
            buffers.extend(residual);
            let kernel = Kernel::new("gemm_mma", MMA, defines, tile.threads())
                .with_entry_macro("GEMM_NAME")
                .with_shared(tile.shared_bytes());
            let grid = [tile.tiles(m, n), 1, 1];
            launch(&out.client, kernel, grid, &buffers, parameters);
        }
    }
}

pub(super) fn dense(
    x: Tensor<Backend, 2>,
    weight: Tensor<Backend, 2>,
    bias: Option<Tensor<Backend, 1>>,
    residual: Option<Tensor<Backend, 2>>,
) -> Tensor<Backend, 2> {
    let (x, weight) = (contiguous(x), contiguous(weight));
    let bias = bias.map(|bias| contiguous(to_dtype(bias, DType::BF16)));
    let residual = residual.map(|residual| contiguous(to_dtype(residual, DType::BF16)));
    tensor(product(
        &[(&x, &weight)],
        WeightLayout::OutIn,
        bias.as_ref(),
        residual.as_ref(),
        DType::BF16,
    ))
}

/// Logits in f32. The sums are f32 and are not rounded, as if both operands had been cast before.
pub(super) fn logits(hidden: Tensor<Backend, 2>, head: Tensor<Backend, 2>) -> Tensor<Backend, 2> {
    let (hidden, head) = (contiguous(hidden), contiguous(head));
    let pairs = [(&hidden, &head)];
    tensor(product(&pairs, WeightLayout::OutIn, None, None, DType::F32))
}

/// `Σ dy W` over pairs of `dy` `[rows, out]` and `W` `[out, in]`.
pub(super) fn input_gradient(
    products: &[(Tensor<Backend, 2>, Tensor<Backend, 2>)],
) -> Tensor<Backend, 2> {
    let operands: Vec<(Buffer, Buffer)> = products
        .iter()
        .map(|(dy, weight)| (contiguous(dy.clone()), contiguous(weight.clone())))
        .collect();
    let pairs: Vec<_> = operands.iter().map(|(dy, weight)| (dy, weight)).collect();
    tensor(product(
        &pairs,
        WeightLayout::InOut,
        None,
        None,
        DType::BF16,
    ))
}

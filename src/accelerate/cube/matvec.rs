//! Matmul of one to eight rows with float matrices `[out, in]` (matrix-vector), through [`super::products`];
//! of two rows and more in tiles ([`super::tile_matmul`]), where the device has them.

use burn::tensor::{DType, Tensor};
use burn_cubecl::{CubeRuntime, kernel::into_contiguous};
use cubecl::client::ComputeClient;

use super::{
    launch::{Buffer, Cube, array, contiguous, elements, empty, pieces, quads, strided, tensor},
    matmul_config::{MatmulConfig, Matrices, Stored},
    products::{one_matrix, swiglu_matrices, three_matrices},
    sums::Group,
    tile_config::{WIDEST, cooperative},
    tile_matmul::{self, Added, Operand},
    words::Packing,
};
use crate::ops::{LowRank, cast::to_f32};

/// Most rows of one matmul without tiles.
pub(super) const MOST_ROWS: usize = 8;

/// Most rows of a decoder's step with them.
const MOST_TILE_ROWS: usize = 64;

/// Most rows of a decoder's step; `widths` are those of the three matrices that share an input.
pub(super) fn most_rows<R: CubeRuntime>(
    client: &ComputeClient<R>,
    dtype: DType,
    widths: [usize; 3],
) -> usize {
    let whole = widths.iter().all(|width| width.is_multiple_of(WIDEST));
    if whole && dtype == DType::F16 && cooperative(client) {
        MOST_TILE_ROWS
    } else {
        MOST_ROWS
    }
}

fn config<R: CubeRuntime>(x: &Buffer<R>, width: usize, matrices: Matrices) -> MatmulConfig {
    let [rows, d_input] = x.meta.shape().dims();
    let packing = Packing::of(x.dtype).expect("`covers` accepted the type");
    let (stored, vectors) = (Stored::Floats(packing), d_input / packing.piece());
    let group = Group::of(&x.client);
    MatmulConfig::new(stored, [rows, width], matrices, vectors, group)
}

/// Whether the kernel covers a matmul of inputs `[rows, in]` in `dtype` with `weight` `[out, in]`.
fn covers<R: CubeRuntime>([rows, width]: [usize; 2], dtype: DType, weight: &Buffer<R>) -> bool {
    (1..=MOST_ROWS).contains(&rows)
        && dtype == weight.dtype
        && Packing::of(dtype).is_some_and(|packing| width.is_multiple_of(packing.piece()))
        && weight.is_contiguous()
}

/// Whether a matmul goes in tiles.
fn in_tiles<R: CubeRuntime>(x: &Tensor<Cube<R>, 2>, weight: &Buffer<R>) -> bool {
    tile_matmul::covers(&strided(x.clone())) && Operand::floats(weight).is_some()
}

/// The kernel of [`ForwardOps::matmul`](crate::ops::ForwardOps::matmul): rows with a matrix `[out, in]` that is
/// read in place, as linear layers have it.
pub(super) fn matmul_transposed<R: CubeRuntime, const D: usize>(
    a: &Tensor<Cube<R>, D>,
    b: &Tensor<Cube<R>, D>,
) -> Option<Tensor<Cube<R>, D>> {
    if D != 2 {
        return None;
    }
    let weight = strided(b.clone().transpose());
    let x = strided(a.clone());
    if !tile_matmul::covers(&x) || Operand::floats(&weight).is_none() {
        return None;
    }
    let x = into_contiguous(x);
    Some(tensor(matmul(&x, None, &weight, None, None, x.dtype)))
}

/// [`ForwardOps::linear_add`](crate::ops::ForwardOps::linear_add).
pub(super) fn linear_add<R: CubeRuntime>(
    x: &Tensor<Cube<R>, 2>,
    weight: &Tensor<Cube<R>, 2>,
    bias: Option<&Tensor<Cube<R>, 1>>,
    residual: Option<&Tensor<Cube<R>, 2>>,
) -> Option<Tensor<Cube<R>, 2>> {
    let (weight, dtype) = (strided(weight.clone()), x.dtype());
    let one_type = bias.is_none_or(|bias| bias.dtype() == dtype)
        && residual.is_none_or(|residual| residual.dtype() == dtype);
    if !one_type || !(in_tiles(x, &weight) || covers(x.dims(), dtype, &weight)) {
        return None;
    }
    let x = contiguous(x.clone());
    let bias = bias.cloned().map(contiguous);
    let residual = residual.cloned().map(contiguous);
    let (bias, residual) = (bias.as_ref(), residual.as_ref());
    Some(tensor(matmul(&x, None, &weight, bias, residual, dtype)))
}

/// [`ForwardOps::logits`](crate::ops::ForwardOps::logits).
pub(super) fn logits<R: CubeRuntime>(
    hidden: &Tensor<Cube<R>, 2>,
    head: &Tensor<Cube<R>, 2>,
) -> Option<Tensor<Cube<R>, 2>> {
    let head = strided(head.clone());
    if !in_tiles(hidden, &head) && !covers(hidden.dims(), hidden.dtype(), &head) {
        return None;
    }
    let hidden = contiguous(hidden.clone());
    Some(tensor(matmul(&hidden, None, &head, None, None, DType::F32)))
}

/// [`ForwardOps::low_rank_inputs`](crate::ops::ForwardOps::low_rank_inputs), without dropout.
pub(super) fn low_rank_inputs<R: CubeRuntime>(
    x: &Tensor<Cube<R>, 2>,
    adapters: &[&LowRank<Cube<R>>],
) -> Option<Vec<Tensor<Cube<R>, 2>>> {
    let matrices: Vec<_> = (adapters.iter())
        .map(|one| strided(one.a.clone()))
        .collect();
    let covered = adapters.iter().all(|one| one.dropout.is_none())
        && (matrices.iter()).all(|a| covers(x.dims(), DType::F32, a));
    if !covered {
        return None;
    }
    let x = contiguous(to_f32(x.clone()));
    let low = |a| tensor(matmul(&x, None, a, None, None, DType::F32));
    Some(matrices.iter().map(low).collect())
}

/// [`ForwardOps::adapted_linear`](crate::ops::ForwardOps::adapted_linear).
pub(super) fn adapted_linear<R: CubeRuntime>(
    x: &Tensor<Cube<R>, 2>,
    weight: &Tensor<Cube<R>, 2>,
    low: &Tensor<Cube<R>, 2>,
    adapter: &LowRank<Cube<R>>,
    residual: Option<&Tensor<Cube<R>, 2>>,
) -> Option<Tensor<Cube<R>, 2>> {
    let b = strided(adapter.b.clone());
    if !covers(low.dims(), DType::F32, &b) {
        return None;
    }
    let y = strided(linear_add(x, weight, None, residual)?);
    let scaled = contiguous(to_f32(low.clone()) * adapter.scaling);
    Some(tensor(matmul(&scaled, None, &b, None, Some(&y), x.dtype())))
}

/// A norm fused into the matmul, applied to its input.
#[derive(Debug, Clone)]
pub(super) struct InputNorm<R: CubeRuntime> {
    /// `[in]`.
    pub weight: Buffer<R>,
    /// Added to the mean square.
    pub epsilon: f64,
}

impl<R: CubeRuntime> InputNorm<R> {
    /// Scale and epsilon.
    pub(super) fn parts(&self) -> (&Buffer<R>, f64) {
        (&self.weight, self.epsilon)
    }
}

/// `norm(x) Wᵀ + bias + residual` in `out` type, which is that of bias and residual.
pub(super) fn matmul<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: Option<&InputNorm<R>>,
    weight: &Buffer<R>,
    bias: Option<&Buffer<R>>,
    residual: Option<&Buffer<R>>,
    out: DType,
) -> Buffer<R> {
    if tile_matmul::covers(x)
        && let Some(operand) = Operand::floats(weight)
    {
        let norm = norm.map(InputNorm::parts);
        return tile_matmul::matmul(x, norm, &operand, Added { bias, residual }, out);
    }
    let [width, _] = weight.meta.shape().dims();
    let config = MatmulConfig {
        norm: norm.is_some(),
        bias: bias.is_some(),
        residual: residual.is_some(),
        ..config(x, width, Matrices::One)
    };
    let y = empty(x, [config.rows, width], out);
    // SAFETY: the arrays have the lengths that the config and the widths give; the buffer in place of an
    // absent operand is not read.
    #[allow(unsafe_code)]
    unsafe {
        one_matrix::launch_unchecked::<R>(
            &x.client,
            config.count(width),
            config.dim(),
            quads(x),
            quads(norm.map_or(x, |norm| &norm.weight)),
            pieces(weight),
            elements(weight),
            elements(bias.unwrap_or(&y)),
            elements(residual.unwrap_or(&y)),
            array(weight, 4),
            array(weight, 4),
            elements(&y),
            width,
            0,
            norm.map_or(0.0, |norm| norm.epsilon as f32),
            config,
            Packing::of(out).expect("the kernels support the output type"),
            [weight.dtype.into(), x.dtype.into(), out.into()],
        );
    }
    y
}

/// Matmuls of one input with three matrices, concatenated `[rows, out₁ + out₂ + out₃]`.
///
/// # Panics
/// If a width is no multiple of four.
pub(super) fn three_matmuls<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: &InputNorm<R>,
    weights: [&Buffer<R>; 3],
) -> Buffer<R> {
    let widths = weights.map(|weight| weight.meta.shape()[0]);
    assert!(
        widths.iter().all(|width| width.is_multiple_of(4)),
        "widths {widths:?} are no multiples of four"
    );
    if tile_matmul::covers(x)
        && let [Some(q), Some(k), Some(v)] = weights.map(Operand::floats)
        && tile_matmul::whole([&q, &k, &v])
    {
        return tile_matmul::three_matmuls(x, Some(norm.parts()), [&q, &k, &v]);
    }
    let width = widths.iter().sum();
    let config = MatmulConfig {
        norm: true,
        ..config(x, width, Matrices::Three)
    };
    let y = empty(x, [config.rows, width], x.dtype);
    // SAFETY: as for `matmul`.
    #[allow(unsafe_code)]
    unsafe {
        three_matrices::launch_unchecked::<R>(
            &x.client,
            config.count(width),
            config.dim(),
            quads(x),
            quads(&norm.weight),
            pieces(weights[0]),
            elements(weights[0]),
            pieces(weights[1]),
            elements(weights[1]),
            pieces(weights[2]),
            elements(weights[2]),
            array(&norm.weight, 4),
            elements(&y),
            widths[0],
            widths[1],
            widths[2],
            norm.epsilon as f32,
            config,
            Packing::of(x.dtype).expect("`covers` accepted the type"),
            [x.dtype.into(); 2],
        );
    }
    y
}

/// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
pub(super) fn swiglu_matmul<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: &InputNorm<R>,
    gate: &Buffer<R>,
    up: &Buffer<R>,
) -> Buffer<R> {
    if tile_matmul::covers(x)
        && let [Some(gate), Some(up)] = [gate, up].map(Operand::floats)
    {
        return tile_matmul::swiglu_matmul(x, Some(norm.parts()), [&gate, &up]);
    }
    let [width, _] = gate.meta.shape().dims();
    let config = MatmulConfig {
        norm: true,
        ..config(x, width, Matrices::Pair)
    };
    let y = empty(x, [config.rows, width], x.dtype);
    // SAFETY: as for `matmul`.
    #[allow(unsafe_code)]
    unsafe {
        swiglu_matrices::launch_unchecked::<R>(
            &x.client,
            config.count(width),
            config.dim(),
            quads(x),
            quads(&norm.weight),
            pieces(gate),
            elements(gate),
            pieces(up),
            elements(up),
            array(&norm.weight, 4),
            elements(&y),
            width,
            norm.epsilon as f32,
            config,
            Packing::of(x.dtype).expect("`covers` accepted the type"),
            [x.dtype.into(); 2],
        );
    }
    y
}

//! Launches of the matmuls of one to eight rows ([`super::row_kernels`]), of floats or quantised.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;

use super::{
    launch::{Buffer, array, elements, empty, pieces, quads},
    matmul_config::MatmulConfig,
    row_kernels::{one_matrix, swiglu_matrices, three_matrices},
    words::Packing,
};

/// A matrix `[out, in]`: its words and its scales; one of floats stands for both.
pub(super) type Buffers<'a, R> = (&'a Buffer<R>, &'a Buffer<R>);

/// A norm fused into the matmul, applied to its input: scale and epsilon.
pub(super) type Norm<'a, R> = (&'a Buffer<R>, f64);

/// An adapter's low-rank part: `low` `[rows, rank]` already scaled, `up` `[out, rank]`, the rank.
pub(super) type Share<R> = (Buffer<R>, Buffer<R>, usize);

/// `norm(x) Wᵀ + bias + residual` and a low-rank part, in type `out`, which bias and residual have too.
pub(super) fn matmul<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: Option<Norm<'_, R>>,
    (words, scales): Buffers<'_, R>,
    (bias, residual): (Option<&Buffer<R>>, Option<&Buffer<R>>),
    share: Option<&Share<R>>,
    (width, out): (usize, DType),
    config: MatmulConfig,
) -> Buffer<R> {
    let config = MatmulConfig {
        norm: norm.is_some(),
        bias: bias.is_some(),
        residual: residual.is_some(),
        adapter: share.is_some(),
        ..config
    };
    let y = empty(x, [config.rows, width], out);
    let (low, up, rank) = share.map_or((scales, scales, 0), |(low, up, rank)| (low, up, *rank));
    // SAFETY: the arrays have the lengths that the config and the widths give; the buffer in place of an
    // absent operand is not read.
    #[allow(unsafe_code)]
    unsafe {
        one_matrix::launch_unchecked::<R>(
            &x.client,
            config.count(width),
            config.dim(),
            quads(x),
            quads(norm.map_or(x, |(norm, _)| norm)),
            pieces(words),
            elements(scales),
            elements(bias.unwrap_or(&y)),
            elements(residual.unwrap_or(&y)),
            array(low, 4),
            array(up, 4),
            elements(&y),
            width,
            rank,
            norm.map_or(0.0, |(_, epsilon)| epsilon as f32),
            config,
            Packing::of(out).expect("the kernels support the output type"),
            [scales.dtype.into(), x.dtype.into(), out.into()],
        );
    }
    y
}

/// Matmuls of one normalised input with three matrices of `widths` outputs, concatenated `[rows, out₁ + out₂ + out₃]`.
pub(super) fn three_matmuls<R: CubeRuntime>(
    x: &Buffer<R>,
    (norm, epsilon): Norm<'_, R>,
    [first, second, third]: [Buffers<'_, R>; 3],
    widths: [usize; 3],
    config: MatmulConfig,
) -> Buffer<R> {
    let config = MatmulConfig {
        norm: true,
        ..config
    };
    let width = widths.iter().sum();
    let y = empty(x, [config.rows, width], x.dtype);
    // SAFETY: as for `matmul`.
    #[allow(unsafe_code)]
    unsafe {
        three_matrices::launch_unchecked::<R>(
            &x.client,
            config.count(width),
            config.dim(),
            quads(x),
            quads(norm),
            pieces(first.0),
            elements(first.1),
            pieces(second.0),
            elements(second.1),
            pieces(third.0),
            elements(third.1),
            array(norm, 4),
            elements(&y),
            widths[0],
            widths[1],
            widths[2],
            epsilon as f32,
            config,
            Packing::of(x.dtype).expect("`covers` accepted the type"),
            [first.1.dtype.into(), x.dtype.into()],
        );
    }
    y
}

/// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`, `[rows, width]`.
pub(super) fn swiglu_matmul<R: CubeRuntime>(
    x: &Buffer<R>,
    (norm, epsilon): Norm<'_, R>,
    gate: Buffers<'_, R>,
    up: Buffers<'_, R>,
    width: usize,
    config: MatmulConfig,
) -> Buffer<R> {
    let config = MatmulConfig {
        norm: true,
        ..config
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
            quads(norm),
            pieces(gate.0),
            elements(gate.1),
            pieces(up.0),
            elements(up.1),
            array(norm, 4),
            elements(&y),
            width,
            epsilon as f32,
            config,
            Packing::of(x.dtype).expect("`covers` accepted the type"),
            [gate.1.dtype.into(), x.dtype.into()],
        );
    }
    y
}

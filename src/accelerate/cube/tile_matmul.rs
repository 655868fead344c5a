//! Matmul in tiles ([`super::tiles`]) of f16 rows with matrices `[out, in]`, floats or quantised.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;

use super::{
    launch::{Buffer, elements, empty, pieces},
    matmul_config::{Matrices, Stored},
    rows,
    tile_config::{HALVES, NORMED, TileConfig, WIDEST, cooperative, reads},
    tiles::tiled,
    words::Packing,
};

/// A matrix as the kernel reads it.
pub(super) struct Operand<'a, R: CubeRuntime> {
    /// Its elements or words, `[out, pieces of a row]`.
    pub words: &'a Buffer<R>,
    /// `[out, scales of a row]`; anything for floats.
    pub scales: &'a Buffer<R>,
    /// How values are stored.
    pub stored: Stored,
    /// Pieces of a row.
    pub row_pieces: usize,
}

impl<'a, R: CubeRuntime> Operand<'a, R> {
    /// A float matrix.
    pub(super) fn floats(weight: &'a Buffer<R>) -> Option<Self> {
        let [_, d_input] = weight.meta.shape().dims();
        let fits =
            weight.dtype == DType::F16 && weight.is_contiguous() && d_input.is_multiple_of(HALVES);
        fits.then_some(Self {
            words: weight,
            scales: weight,
            stored: Stored::Floats(Packing::F16),
            row_pieces: d_input / HALVES,
        })
    }

    /// Outputs.
    fn width(&self) -> usize {
        self.words.meta.shape()[0]
    }

    /// Whether a row has one scale.
    fn row_scale(&self) -> bool {
        matches!(self.stored, Stored::Levels { group_vectors, .. } if group_vectors == self.row_pieces)
    }
}

/// Whether these input rows are multiplied in tiles on their device. One row is not: it is limited by reading
/// the matrix, and the kernels for few rows read faster.
pub(super) fn covers<R: CubeRuntime>(x: &Buffer<R>) -> bool {
    let [rows, d_input] = x.meta.shape().dims();
    #[cfg(test)]
    if super::tile_tests::WITHOUT.load(std::sync::atomic::Ordering::Relaxed) {
        return false;
    }
    rows > 1 && reads(x.dtype, d_input) && cooperative(&x.client)
}

/// Whether three matrices fill their tiles, of whatever number of rows.
pub(super) fn whole<R: CubeRuntime>(weights: [&Operand<'_, R>; 3]) -> bool {
    weights
        .iter()
        .all(|weight| weight.width().is_multiple_of(WIDEST))
}

/// What is added to the result.
pub(super) struct Added<'a, R: CubeRuntime> {
    /// `[out]`.
    pub bias: Option<&'a Buffer<R>>,
    /// `[rows, out]`.
    pub residual: Option<&'a Buffer<R>>,
}

/// Nothing is added.
pub(super) fn nothing<'a, R: CubeRuntime>() -> Added<'a, R> {
    Added {
        bias: None,
        residual: None,
    }
}

/// A norm fused into the matmul, applied to its input: scale and epsilon.
pub(super) type Norm<'a, R> = Option<(&'a Buffer<R>, f64)>;

/// `norm(x) Wᵀ + bias + residual` in type `out`, which bias and residual have too.
pub(super) fn matmul<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: Norm<'_, R>,
    weight: &Operand<'_, R>,
    added: Added<'_, R>,
    out: DType,
) -> Buffer<R> {
    launch(x, norm, [weight; 3], Matrices::One, added, out, true)
}

/// Matmuls of one input with three matrices that are [`whole`], concatenated.
pub(super) fn three_matmuls<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: Norm<'_, R>,
    weights: [&Operand<'_, R>; 3],
) -> Buffer<R> {
    launch(x, norm, weights, Matrices::Three, nothing(), x.dtype, true)
}

/// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
pub(super) fn swiglu_matmul<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: Norm<'_, R>,
    [gate, up]: [&Operand<'_, R>; 2],
) -> Buffer<R> {
    launch(
        x,
        norm,
        [gate, up, up],
        Matrices::Pair,
        nothing(),
        x.dtype,
        true,
    )
}

/// Launches the kernel; without `cooperative` matrices its units multiply.
///
/// # Panics
/// If a type or shape does not fit.
pub(super) fn launch<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: Norm<'_, R>,
    weights: [&Operand<'_, R>; 3],
    matrices: Matrices,
    added: Added<'_, R>,
    out: DType,
    cooperative: bool,
) -> Buffer<R> {
    let [rows, d_input] = x.meta.shape().dims();
    if let Some((scales, epsilon)) = norm
        && rows > NORMED
    {
        let x = rows::root_mean_square(x, scales, epsilon);
        return launch(&x, None, weights, matrices, added, out, cooperative);
    }
    assert!(
        norm.is_none_or(|(scales, _)| scales.dtype == x.dtype),
        "the norm of the matmul"
    );
    let [first, second, third] = weights;
    assert!(
        reads(x.dtype, d_input) && x.is_contiguous(),
        "inputs of the matmul"
    );
    assert!(
        weights
            .iter()
            .all(|weight| weight.stored == first.stored && weight.row_pieces == first.row_pieces),
        "matrices of one input are stored differently"
    );
    let widths = weights.map(Operand::width);
    let (width, total) = match matrices {
        Matrices::One | Matrices::Pair => (widths[0], widths[0]),
        Matrices::Three => (widths.iter().sum(), widths.iter().sum()),
    };
    let shape = TileConfig::new(
        first.stored,
        first.row_scale(),
        [rows, width],
        matrices,
        cooperative,
        x.client.properties().hardware.max_shared_memory_size,
    );
    let config = TileConfig {
        norm: norm.is_some(),
        bias: added.bias.is_some(),
        residual: added.residual.is_some(),
        ..shape
    };
    assert!(
        matrices != Matrices::Three
            || widths
                .iter()
                .all(|width| width.is_multiple_of(config.outputs)),
        "widths {widths:?} do not fill tiles of {}",
        config.outputs
    );
    for (added, shape) in [(added.bias, &[total][..]), (added.residual, &[rows, total])] {
        let fits = |added: &Buffer<R>| added.dtype == out && added.meta.shape().as_slice() == shape;
        assert!(added.is_none_or(fits), "what is added to the matmul");
    }
    let y = empty(x, [rows, total], out);
    // SAFETY: the arrays have the lengths that the rows and widths give, and reads beyond are clamped; the
    // buffer in place of an absent operand is not read.
    #[allow(unsafe_code)]
    unsafe {
        tiled::launch_unchecked::<R>(
            &x.client,
            config.count([rows, width]),
            config.dim(),
            pieces(x),
            pieces(norm.map_or(x, |(scales, _)| scales)),
            pieces(first.words),
            elements(first.scales),
            pieces(second.words),
            elements(second.scales),
            pieces(third.words),
            elements(third.scales),
            elements(added.bias.unwrap_or(&y)),
            elements(added.residual.unwrap_or(&y)),
            elements(&y),
            rows,
            widths[0],
            widths[1],
            widths[2],
            d_input / HALVES,
            first.row_pieces,
            norm.map_or(0.0, |(_, epsilon)| epsilon as f32),
            config,
            Packing::of(out).expect("the kernels support the output type"),
            [first.scales.dtype.into(), out.into()],
        );
    }
    y
}

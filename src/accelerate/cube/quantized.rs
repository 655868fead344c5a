//! Matmul with quantised weights (see [`crate::ops::quantised`]): the kernels read the packed words directly.
//!
//! Where the device multiplies cooperative matrices, several rows go in one launch of tiles
//! ([`super::tile_matmul`]). Else, and with an adapter, up to [`MOST_ROWS`] rows go in several launches over the
//! words; more rows use the float matmul with rows of the matrix that a kernel dequantises, at most
//! [`UNPACKED_BYTES`](crate::ops::quantised::weight::UNPACKED_BYTES) at once.

use burn::tensor::{DType, Tensor};
use burn_cubecl::{CubeRuntime, kernel::into_contiguous};
use cubecl::prelude::*;

use super::{
    launch::{Buffer, Cube, array, contiguous, cubes, elements, empty, pieces, strided, tensor},
    matmul_config::{MatmulConfig, Matrices, Stored},
    row_kernels::low_rank,
    row_matmul::{self, Buffers, Norm, Share},
    sums::{Group, UNITS},
    tile_matmul::{self, Added, Operand},
    unpack::{pad_rows, unpack},
    words::Packing,
};
use crate::ops::{
    LowRank,
    cast::{to_dtype, to_f32},
    quantised::{Format, QuantisedWeight},
};

/// Rows of one launch.
const ROWS: usize = 8;

/// Rows up to which launches over the quantised words are faster than dequantising the matrix.
const MOST_ROWS: usize = 4 * ROWS;

/// The buffers of a quantised matrix.
#[derive(Debug, Clone)]
pub(super) struct Quantised<R: CubeRuntime> {
    /// `[out, words of a row]`.
    words: Buffer<R>,
    /// `[out, scales of a row]`.
    scales: Buffer<R>,
    format: Format,
    d_input: usize,
}

impl<R: CubeRuntime> Quantised<R> {
    /// Of a matrix on the device.
    pub(super) fn of(weight: &QuantisedWeight<Cube<R>>) -> Self {
        Self {
            words: into_contiguous(weight.words().clone().into_primitive()),
            scales: contiguous(weight.scales().clone()),
            format: weight.format(),
            d_input: weight.dims()[1],
        }
    }

    /// Words, scales and format.
    pub(super) fn parts(&self) -> (&Buffer<R>, &Buffer<R>, Format) {
        (&self.words, &self.scales, self.format)
    }

    /// The same matrix with buffers of another runtime.
    #[cfg(feature = "wgpu")]
    pub(super) fn with_buffers<S: CubeRuntime>(
        &self,
        buffer: impl Fn(&Buffer<R>) -> Buffer<S>,
    ) -> Quantised<S> {
        Quantised {
            words: buffer(&self.words),
            scales: buffer(&self.scales),
            format: self.format,
            d_input: self.d_input,
        }
    }

    /// Words and scales.
    fn buffers(&self) -> Buffers<'_, R> {
        (&self.words, &self.scales)
    }

    /// Outputs.
    pub(super) fn width(&self) -> usize {
        self.words.meta.shape()[0]
    }

    /// Whether the kernels cover the matrix: they do not read zero points.
    pub(super) fn is_covered(&self) -> bool {
        self.format.is_symmetric()
    }

    /// Whether another matrix has the same format, so that one launch multiplies by both.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        self.format == other.format
    }

    /// Whether rows of the matrix have no padding, so that an input is read without padding.
    pub(super) fn is_whole(&self) -> bool {
        self.format.padded(self.d_input) == self.d_input
    }

    fn config(&self, x: &Buffer<R>, matrices: Matrices) -> MatmulConfig {
        let [rows, width] = x.meta.shape().dims();
        assert_eq!(
            width,
            self.format.padded(self.d_input),
            "inputs of the matmul"
        );
        let group = Group::of(&x.client);
        let sizes = [rows, self.width()];
        let stored = self.stored();
        MatmulConfig::new(stored, sizes, matrices, width / self.per_piece(), group)
    }

    /// Inputs of a row in sixteen bytes.
    fn per_piece(&self) -> usize {
        4 * self.format.per_word()
    }

    fn stored(&self) -> Stored {
        Stored::Levels {
            bits: self.format.bits(),
            group_vectors: self.format.group(self.d_input) / self.per_piece(),
        }
    }

    /// As the kernel of tiles reads it.
    pub(super) fn operand(&self) -> Operand<'_, R> {
        Operand {
            words: &self.words,
            scales: &self.scales,
            stored: self.stored(),
            row_pieces: self.format.padded(self.d_input) / self.per_piece(),
        }
    }
}

/// [`ForwardOps::linear_quantised`](crate::ops::ForwardOps::linear_quantised).
pub(in crate::accelerate) fn linear_quantised<R: CubeRuntime>(
    x: &Tensor<Cube<R>, 2>,
    weight: &QuantisedWeight<Cube<R>>,
    bias: Option<&Tensor<Cube<R>, 1>>,
    residual: Option<&Tensor<Cube<R>, 2>>,
) -> Option<Tensor<Cube<R>, 2>> {
    let dtype = x.dtype();
    if let Some(x) = in_tiles(x, weight) {
        let bias = bias.cloned().map(contiguous);
        let residual = residual.cloned().map(contiguous);
        let (bias, residual) = (bias.as_ref(), residual.as_ref());
        return Some(tile_linear(&x, weight, bias, residual, dtype));
    }
    covers(x, weight).then(|| by_rows(x, weight, bias, residual, None, dtype))
}

/// [`ForwardOps::adapted_linear_quantised`](crate::ops::ForwardOps::adapted_linear_quantised).
pub(in crate::accelerate) fn adapted_linear_quantised<R: CubeRuntime>(
    x: &Tensor<Cube<R>, 2>,
    weight: &QuantisedWeight<Cube<R>>,
    adapter: &LowRank<Cube<R>>,
    residual: Option<&Tensor<Cube<R>, 2>>,
) -> Option<Tensor<Cube<R>, 2>> {
    // Sixteen bytes of the input are read at once.
    let whole = weight.dims()[1].is_multiple_of(8);
    let dtype = x.dtype();
    let covered = covers(x, weight) && whole && adapter.dropout.is_none();
    let few = covered && x.dims()[0] <= ROWS;
    if let Some(rows) = in_tiles(x, weight)
        && !few
        && adapter.dropout.is_none()
    {
        let low = to_f32(x.clone()).matmul(adapter.a.clone().transpose()) * adapter.scaling;
        let share = low.matmul(adapter.b.clone().transpose());
        let y = tile_linear(&rows, weight, None, None, DType::F32) + share;
        let y = match residual {
            Some(residual) => y + to_f32(residual.clone()),
            None => y,
        };
        return Some(to_dtype(y, dtype));
    }
    covered.then(|| by_rows(x, weight, None, residual, Some(adapter), dtype))
}

/// [`ForwardOps::logits_quantised`](crate::ops::ForwardOps::logits_quantised).
pub(in crate::accelerate) fn logits_quantised<R: CubeRuntime>(
    hidden: &Tensor<Cube<R>, 2>,
    head: &QuantisedWeight<Cube<R>>,
) -> Option<Tensor<Cube<R>, 2>> {
    if let Some(hidden) = in_tiles(hidden, head) {
        return Some(tile_linear(&hidden, head, None, None, DType::F32));
    }
    covers(hidden, head).then(|| by_rows(hidden, head, None, None, None, DType::F32))
}

/// [`ForwardOps::dequantise_rows`](crate::ops::ForwardOps::dequantise_rows).
pub(in crate::accelerate) fn dequantise_rows<R: CubeRuntime>(
    weight: &QuantisedWeight<Cube<R>>,
    start: usize,
    count: usize,
    dtype: DType,
) -> Option<Tensor<Cube<R>, 2>> {
    let covered = weight.format().is_symmetric()
        && weight.dims()[1].is_multiple_of(4)
        && Packing::of(dtype).is_some();
    covered.then(|| unpacked(weight, start, count, dtype))
}

/// Whether the matmul uses the kernel over quantised words.
fn covers<R: CubeRuntime>(x: &Tensor<Cube<R>, 2>, weight: &QuantisedWeight<Cube<R>>) -> bool {
    let [rows, width] = x.dims();
    assert_eq!(width, weight.dims()[1], "inputs of the matmul");
    (1..=MOST_ROWS).contains(&rows)
        && weight.format().is_symmetric()
        && Packing::of(x.dtype()).is_some()
}

/// The buffer of an input that is multiplied in tiles.
fn in_tiles<R: CubeRuntime>(
    x: &Tensor<Cube<R>, 2>,
    weight: &QuantisedWeight<Cube<R>>,
) -> Option<Buffer<R>> {
    let x = strided(x.clone());
    let covered = weight.format().is_symmetric() && tile_matmul::covers(&x);
    covered.then(|| into_contiguous(x))
}

/// `x Wᵀ + bias + residual` in type `out`, in tiles.
fn tile_linear<R: CubeRuntime>(
    x: &Buffer<R>,
    weight: &QuantisedWeight<Cube<R>>,
    bias: Option<&Buffer<R>>,
    residual: Option<&Buffer<R>>,
    out: DType,
) -> Tensor<Cube<R>, 2> {
    let weight = Quantised::of(weight);
    let added = Added { bias, residual };
    tensor(tile_matmul::matmul(x, None, &weight.operand(), added, out))
}

/// `x Wᵀ + bias + residual + scaling · x Aᵀ Bᵀ` in type `out`, some rows a launch.
fn by_rows<R: CubeRuntime>(
    x: &Tensor<Cube<R>, 2>,
    weight: &QuantisedWeight<Cube<R>>,
    bias: Option<&Tensor<Cube<R>, 1>>,
    residual: Option<&Tensor<Cube<R>, 2>>,
    adapter: Option<&LowRank<Cube<R>>>,
    out: DType,
) -> Tensor<Cube<R>, 2> {
    let [rows, d_input] = x.dims();
    let weight = Quantised::of(weight);
    let bias = bias.cloned().map(contiguous);
    let parts = (0..rows).step_by(ROWS).map(|start| {
        let count = ROWS.min(rows - start);
        let cut = |x: &Tensor<Cube<R>, 2>| match count == rows {
            true => x.clone(),
            false => x.clone().narrow(0, start, count),
        };
        let x = contiguous(cut(x));
        let residual = residual.map(|residual| contiguous(cut(residual)));
        let share = adapter.map(|adapter| {
            let low = low_rank_input(&x, adapter);
            (low, contiguous(adapter.b.clone()), adapter.b.dims()[1])
        });
        let x = if weight.is_whole() {
            x
        } else {
            padded_rows(&x, weight.format.padded(d_input))
        };
        let added = (bias.as_ref(), residual.as_ref());
        tensor(matmul(&x, None, &weight, added, share.as_ref(), out))
    });
    let mut parts: Vec<_> = parts.collect();
    if parts.len() == 1 {
        parts.remove(0)
    } else {
        Tensor::cat(parts, 0)
    }
}

/// `norm(x) Wᵀ + bias + residual` and a low-rank part, in type `out`, which bias and residual have too.
///
/// `x` has the padded width of the matrix.
///
/// # Panics
/// If a type or shape does not fit.
pub(super) fn matmul<R: CubeRuntime>(
    x: &Buffer<R>,
    norm: Option<Norm<'_, R>>,
    weight: &Quantised<R>,
    (bias, residual): (Option<&Buffer<R>>, Option<&Buffer<R>>),
    share: Option<&Share<R>>,
    out: DType,
) -> Buffer<R> {
    if share.is_none() && tile_matmul::covers(x) {
        let added = Added { bias, residual };
        return tile_matmul::matmul(x, norm, &weight.operand(), added, out);
    }
    let width = weight.width();
    let config = weight.config(x, Matrices::One);
    for (added, shape) in [(bias, &[width][..]), (residual, &[config.rows, width])] {
        let fits = |added: &Buffer<R>| added.dtype == out && added.meta.shape().as_slice() == shape;
        assert!(added.is_none_or(fits), "what is added to the matmul");
    }
    let added = (bias, residual);
    row_matmul::matmul(
        x,
        norm,
        weight.buffers(),
        added,
        share,
        (width, out),
        config,
    )
}

/// Matmuls of one normalised input with three matrices, concatenated `[rows, out₁ + out₂ + out₃]`.
///
/// # Panics
/// If the matrices are quantised differently, or a width is no multiple of four.
pub(super) fn three_matmuls<R: CubeRuntime>(
    x: &Buffer<R>,
    (norm, epsilon): Norm<'_, R>,
    weights: [&Quantised<R>; 3],
) -> Buffer<R> {
    let widths = weights.map(Quantised::width);
    assert!(
        widths.iter().all(|width| width.is_multiple_of(4)),
        "widths {widths:?} are no multiples of four"
    );
    let [first, second, third] = weights;
    assert!(
        first.format == second.format && first.format == third.format,
        "matrices of one input are quantised differently"
    );
    let operands = weights.map(Quantised::operand);
    if tile_matmul::covers(x) && tile_matmul::whole(operands.each_ref()) {
        return tile_matmul::three_matmuls(x, Some((norm, epsilon)), operands.each_ref());
    }
    let (config, buffers) = (
        first.config(x, Matrices::Three),
        weights.map(Quantised::buffers),
    );
    row_matmul::three_matmuls(x, (norm, epsilon), buffers, widths, config)
}

/// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
///
/// # Panics
/// If the matrices are quantised differently.
pub(super) fn swiglu_matmul<R: CubeRuntime>(
    x: &Buffer<R>,
    (norm, epsilon): Norm<'_, R>,
    gate: &Quantised<R>,
    up: &Quantised<R>,
) -> Buffer<R> {
    assert_eq!(
        (gate.format, gate.width()),
        (up.format, up.width()),
        "gate and up"
    );
    if tile_matmul::covers(x) {
        let pair = [&gate.operand(), &up.operand()];
        return tile_matmul::swiglu_matmul(x, Some((norm, epsilon)), pair);
    }
    let (width, config) = (gate.width(), gate.config(x, Matrices::Pair));
    row_matmul::swiglu_matmul(
        x,
        (norm, epsilon),
        gate.buffers(),
        up.buffers(),
        width,
        config,
    )
}

/// Rows padded with zeros, to the padded width of the quantised rows.
fn padded_rows<R: CubeRuntime>(x: &Buffer<R>, padded: usize) -> Buffer<R> {
    let [rows, d_input] = x.meta.shape().dims();
    let y = empty(x, [rows, padded], x.dtype);
    let count = rows * padded;
    // SAFETY: the arrays are as long as rows and widths say.
    #[allow(unsafe_code)]
    unsafe {
        pad_rows::launch_unchecked::<R>(
            &x.client,
            cubes(count.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            elements(x),
            elements(&y),
            d_input,
            padded,
            count,
            x.dtype.into(),
        );
    }
    y
}

/// `scaling · x Aᵀ`, `[rows, rank]`, f32.
fn low_rank_input<R: CubeRuntime>(x: &Buffer<R>, adapter: &LowRank<Cube<R>>) -> Buffer<R> {
    let [rows, d_input] = x.meta.shape().dims();
    let [rank, width] = adapter.a.dims();
    assert_eq!(width, d_input, "inputs of the adapter");
    let a = contiguous(adapter.a.clone());
    let packing = Packing::of(x.dtype).expect("`covers` accepted the type");
    let group = Group::of(&x.client);
    let groups = group.in_a_cube();
    let low = empty(x, [rows, rank], DType::F32);
    // SAFETY: the arrays are as long as rows, rank and pieces say.
    #[allow(unsafe_code)]
    unsafe {
        low_rank::launch_unchecked::<R>(
            &x.client,
            cubes(rank.div_ceil(groups)),
            CubeDim::new_1d((group.lanes * groups) as u32),
            pieces(x),
            pieces(&a),
            elements(&low),
            rank,
            d_input / packing.piece(),
            adapter.scaling as f32,
            rows,
            group,
            groups,
            packing,
        );
    }
    low
}

/// Rows `start .. start + count` of the matrix as floats.
///
/// # Panics
/// If the rows are out of range.
fn unpacked<R: CubeRuntime>(
    weight: &QuantisedWeight<Cube<R>>,
    start: usize,
    count: usize,
    dtype: DType,
) -> Tensor<Cube<R>, 2> {
    let [out, d_input] = weight.dims();
    assert!(start + count <= out, "rows to unpack");
    let Quantised {
        words,
        scales,
        format,
        ..
    } = Quantised::of(weight);
    let y = empty(&words, [count, d_input], dtype);
    let words_row = format.words(d_input);
    // SAFETY: the arrays are as long as rows, words and inputs say.
    #[allow(unsafe_code)]
    unsafe {
        unpack::launch_unchecked::<R>(
            &words.client,
            cubes((count * words_row).div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            elements(&words),
            elements(&scales),
            array(&y, 4 * dtype.size()),
            start,
            count,
            words_row,
            format.group(d_input) / format.per_word(),
            d_input,
            format.bits() as u32,
            [dtype.into(), scales.dtype.into()],
        );
    }
    tensor(y)
}

//! Products with packed weights (see [`crate::quant`]): the words are read as they lie.
//!
//! One to eight rows at a time are multiplied by a plane (a warp, a subgroup) an output channel or
//! several, each lane reading 16 bytes of words at a stride. Values are masked out where they stand,
//! `word & (15 << 4i)` is `16ⁱ` times the level, and the input is scaled by `16⁻ⁱ` in place of shifting
//! every word; that levels are stored with an offset costs one product with the sum of the inputs.
//! More rows go through the dense product over rows of the matrix that [`unpack`] writes out.

use burn::tensor::{DType, Tensor, TensorPrimitive};
use burn_cubecl::{
    CubeBackend, CubeRuntime, kernel::into_contiguous, ops::numeric::empty_device_contiguous_dtype,
    tensor::CubeTensor,
};
use cubecl::{client::ComputeClient, features::Plane, prelude::*};

use super::quantized_kernels::{Shape, low_rank, product, unpack};
use crate::{
    kernels::{Kernels, LowRank},
    quant::{self, Format, PackedWeight},
};

/// A backend of CubeCL as Burn instantiates it.
type Cube<R> = CubeBackend<R, f32, i32, u8>;

/// Rows of one launch.
const ROWS: usize = 8;

/// Rows up to which launches over the packed words beat unpacking the matrix.
const MOST_ROWS: usize = 4 * ROWS;

/// Units of a cube.
const UNITS: u32 = 128;

/// Output channels of all planes together below which a plane takes fewer: a device should have
/// enough planes to hide its memory's latency.
const WIDE: usize = 8192;

fn buffer<R: CubeRuntime, const D: usize>(tensor: Tensor<Cube<R>, D>) -> CubeTensor<R> {
    into_contiguous(tensor.into_primitive().tensor())
}

fn tensor<R: CubeRuntime>(buffer: CubeTensor<R>) -> Tensor<Cube<R>, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(buffer))
}

fn argument<R: CubeRuntime>(buffer: &CubeTensor<R>) -> ArrayArg<R> {
    buffer.clone().into_array_arg()
}

/// [`Kernels::dense_packed`].
pub(in crate::kernels) fn dense_packed<R: CubeRuntime>(
    x: Tensor<Cube<R>, 2>,
    weight: &PackedWeight<Cube<R>>,
    bias: Option<Tensor<Cube<R>, 1>>,
    residual: Option<Tensor<Cube<R>, 2>>,
) -> Tensor<Cube<R>, 2>
where
    Cube<R>: Kernels,
{
    if covers(&x, weight) {
        let dtype = x.dtype();
        product_of(x, weight, bias, residual, None, dtype)
    } else {
        quant::weight::dense(x, weight, bias, residual)
    }
}

/// [`Kernels::adapted_packed`].
pub(in crate::kernels) fn adapted_packed<R: CubeRuntime>(
    x: Tensor<Cube<R>, 2>,
    weight: &PackedWeight<Cube<R>>,
    adapter: &LowRank<Cube<R>>,
    residual: Option<Tensor<Cube<R>, 2>>,
) -> Tensor<Cube<R>, 2>
where
    Cube<R>: Kernels,
{
    if covers(&x, weight) && adapter.dropout.is_none() {
        let dtype = x.dtype();
        product_of(x, weight, None, residual, Some(adapter), dtype)
    } else {
        quant::weight::adapted(x, weight, adapter, residual)
    }
}

/// [`Kernels::logits_packed`].
pub(in crate::kernels) fn logits_packed<R: CubeRuntime>(
    hidden: Tensor<Cube<R>, 2>,
    head: &PackedWeight<Cube<R>>,
) -> Tensor<Cube<R>, 2>
where
    Cube<R>: Kernels,
{
    if covers(&hidden, head) {
        product_of(hidden, head, None, None, None, DType::F32)
    } else {
        quant::weight::logits(hidden, head)
    }
}

/// [`Kernels::unpack_rows`].
pub(in crate::kernels) fn unpack_rows<R: CubeRuntime>(
    weight: &PackedWeight<Cube<R>>,
    start: usize,
    count: usize,
    dtype: DType,
) -> Tensor<Cube<R>, 2> {
    if unpacks(weight, dtype) {
        unpacked(weight, start, count, dtype)
    } else {
        weight.rows(start, count).unpack(dtype)
    }
}

/// Whether the product goes through the kernel over packed words.
fn covers<R: CubeRuntime>(x: &Tensor<Cube<R>, 2>, weight: &PackedWeight<Cube<R>>) -> bool {
    let client = R::client(&x.device());
    let [rows, width] = x.dims();
    assert_eq!(width, weight.dims()[1], "inputs of the product");
    rows <= MOST_ROWS && unpacks(weight, x.dtype()) && client.features().plane.contains(Plane::Ops)
}

/// Whether rows of the matrix are unpacked to `dtype` by a kernel.
fn unpacks<R: CubeRuntime>(weight: &PackedWeight<Cube<R>>, dtype: DType) -> bool {
    weight.dims()[1].is_multiple_of(4) && matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// `x Wᵀ + bias + residual + scaling · x Aᵀ Bᵀ` in `dtype`.
///
/// # Panics
/// If a type is not that of `x`, or a shape does not fit.
fn product_of<R: CubeRuntime>(
    x: Tensor<Cube<R>, 2>,
    weight: &PackedWeight<Cube<R>>,
    bias: Option<Tensor<Cube<R>, 1>>,
    residual: Option<Tensor<Cube<R>, 2>>,
    adapter: Option<&LowRank<Cube<R>>>,
    dtype: DType,
) -> Tensor<Cube<R>, 2> {
    let [rows, _] = x.dims();
    if rows <= ROWS {
        return few_rows(x, weight, bias, residual, adapter, dtype);
    }
    let parts = (0..rows).step_by(ROWS).map(|start| {
        let count = ROWS.min(rows - start);
        let cut = |x: &Tensor<Cube<R>, 2>| x.clone().narrow(0, start, count);
        let residual = residual.as_ref().map(cut);
        few_rows(cut(&x), weight, bias.clone(), residual, adapter, dtype)
    });
    Tensor::cat(parts.collect(), 0)
}

fn few_rows<R: CubeRuntime>(
    x: Tensor<Cube<R>, 2>,
    weight: &PackedWeight<Cube<R>>,
    bias: Option<Tensor<Cube<R>, 1>>,
    residual: Option<Tensor<Cube<R>, 2>>,
    adapter: Option<&LowRank<Cube<R>>>,
    dtype: DType,
) -> Tensor<Cube<R>, 2> {
    let [rows, d_input] = x.dims();
    let [out, _] = weight.dims();
    let format = weight.format();
    let input = x.dtype();
    let add = |tensor: &CubeTensor<R>, shape: &[usize]| {
        assert_eq!(tensor.dtype, input, "type of what is added");
        assert_eq!(
            tensor.meta.shape().as_slice(),
            shape,
            "shape of what is added"
        );
    };
    let bias = bias.map(buffer);
    let residual = residual.map(buffer);
    bias.iter().for_each(|bias| add(bias, &[out]));
    residual
        .iter()
        .for_each(|residual| add(residual, &[rows, out]));

    let x = buffer(x);
    let low = adapter.map(|adapter| {
        let low = low_rank_input(&x, [rows, d_input], adapter);
        (low, buffer(adapter.b.clone()), adapter.b.dims()[1])
    });
    // Padding of the rows of words meets zeros.
    let padded = format.padded(d_input);
    let x = if padded == d_input {
        x
    } else {
        let x: Tensor<Cube<R>, 2> = tensor(x);
        buffer(x.pad((0, padded - d_input, 0, 0), 0.0f32))
    };

    let words = buffer_int(weight);
    let scales = buffer(weight.scales().clone());
    let y = empty_device_contiguous_dtype(
        x.client.clone(),
        x.device.clone(),
        [rows, out].into(),
        dtype,
    );
    let shape = Shape {
        bits: format.bits() as u32,
        rows: rows as u32,
        outputs: outputs(out),
        bias: bias.is_some(),
        residual: residual.is_some(),
        adapter: low.is_some(),
        saturate: dtype == DType::F16,
    };
    let vectors = format.words(d_input) / 4;
    let group_vectors = format.group(d_input) / format.per_word() / 4;
    let (low, up, rank) = match &low {
        Some((low, up, rank)) => (argument(low), argument(up), *rank),
        // Never read.
        None => (argument(&scales), argument(&scales), 0),
    };
    // SAFETY: the shapes above are those of the kernel's header, and all buffers are compact.
    #[allow(unsafe_code)]
    unsafe {
        product::launch_unchecked::<R>(
            &x.client,
            cubes(&x.client, out.div_ceil(shape.outputs as usize)),
            CubeDim::new_1d(UNITS),
            argument(&x),
            argument(&words),
            argument(&scales),
            argument(bias.as_ref().unwrap_or(&x)),
            argument(residual.as_ref().unwrap_or(&x)),
            low,
            up,
            argument(&y),
            out as u32,
            vectors as u32,
            group_vectors as u32,
            rank as u32,
            shape,
            [input.into(), scales.dtype.into(), dtype.into()],
        );
    }
    tensor(y)
}

/// `scaling · x Aᵀ`, `[rows, rank]`, f32.
fn low_rank_input<R: CubeRuntime>(
    x: &CubeTensor<R>,
    [rows, d_input]: [usize; 2],
    adapter: &LowRank<Cube<R>>,
) -> CubeTensor<R> {
    let [rank, width] = adapter.a.dims();
    assert_eq!(width, d_input, "inputs of the adapter");
    let a = buffer(adapter.a.clone());
    let low = empty_device_contiguous_dtype(
        x.client.clone(),
        x.device.clone(),
        [rows, rank].into(),
        DType::F32,
    );
    // SAFETY: the shapes are those of the kernel's header, and all buffers are compact.
    #[allow(unsafe_code)]
    unsafe {
        low_rank::launch_unchecked::<R>(
            &x.client,
            cubes(&x.client, rank),
            CubeDim::new_1d(UNITS),
            argument(x),
            argument(&a),
            argument(&low),
            rank as u32,
            (d_input / 4) as u32,
            adapter.scaling as f32,
            rows as u32,
            x.dtype.into(),
        );
    }
    low
}

/// Output channels a plane works on: inputs are read once for all of them.
fn outputs(out: usize) -> u32 {
    match out {
        0..WIDE => 2,
        _ => 4,
    }
}

/// Cubes that have a plane for each of `tasks`; kernels go on where there are fewer.
fn cubes<R: CubeRuntime>(client: &ComputeClient<R>, tasks: usize) -> CubeCount {
    let hardware = &client.properties().hardware;
    let planes = (UNITS / hardware.plane_size_max.max(1)).max(1) as usize;
    let most = hardware.max_cube_count.0 as usize;
    CubeCount::Static(tasks.div_ceil(planes).min(most) as u32, 1, 1)
}

fn buffer_int<R: CubeRuntime>(weight: &PackedWeight<Cube<R>>) -> CubeTensor<R> {
    into_contiguous(weight.words().clone().into_primitive())
}

/// Rows `start .. start + count` of the matrix as floats.
///
/// # Panics
/// If the rows are not there.
fn unpacked<R: CubeRuntime>(
    weight: &PackedWeight<Cube<R>>,
    start: usize,
    count: usize,
    dtype: DType,
) -> Tensor<Cube<R>, 2> {
    let [out, d_input] = weight.dims();
    assert!(start + count <= out, "rows to unpack");
    let format: Format = weight.format();
    let words = buffer_int(weight);
    let scales = buffer(weight.scales().clone());
    let y = empty_device_contiguous_dtype(
        words.client.clone(),
        words.device.clone(),
        [count, d_input].into(),
        dtype,
    );
    let words_row = format.words(d_input);
    let units = 256;
    let cubes = (count * words_row).div_ceil(units as usize);
    let most = words.client.properties().hardware.max_cube_count.0 as usize;
    // SAFETY: the shapes are those of the kernel's header, and all buffers are compact.
    #[allow(unsafe_code)]
    unsafe {
        unpack::launch_unchecked::<R>(
            &words.client,
            CubeCount::Static(cubes.min(most) as u32, cubes.div_ceil(most) as u32, 1),
            CubeDim::new_1d(units),
            argument(&words),
            argument(&scales),
            argument(&y),
            start as u32,
            count as u32,
            words_row as u32,
            (format.group(d_input) / format.per_word()) as u32,
            d_input as u32,
            format.bits() as u32,
            [dtype.into(), scales.dtype.into()],
        );
    }
    tensor(y)
}

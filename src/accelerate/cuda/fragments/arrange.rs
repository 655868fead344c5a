//! Into fragment order, and from it to floats: `arrange.cu`.

use burn::tensor::{DType, Int, Tensor};

use super::{
    super::{
        launch::{Backend, Buffer, Defines, Kernel, contiguous, empty, launch, tensor},
        operand::Operand,
    },
    Fragments, covers,
};
use crate::ops::{
    cast::to_dtype,
    quantised::{
        Format, QuantisedWeight,
        weight::{UNPACKED_BYTES, persistent},
    },
};

const SOURCES: &[&str] = &[include_str!("../scalar.cuh"), include_str!("arrange.cu")];

/// Blocks of a launch over any number of elements.
const MOST_BLOCKS: usize = 4096;

/// One of the kernels, and whether it writes bf16.
fn kernel(which: &'static str, format: Format, d_input: usize, bf16: bool) -> Kernel {
    let group = match format {
        Format::Int8 => 0,
        _ => format.group(d_input),
    };
    let mut defines: Defines = vec![
        ("SCALAR_BF16", i64::from(bf16)),
        ("BITS", format.bits() as i64),
        ("GROUP", group as i64),
    ];
    for name in ["ARRANGE", "SCALES", "PUT", "FLOATS", "PICK", "ROWS"] {
        defines.push((name, i64::from(name == which)));
    }
    defines.push(("ZEROS", i64::from(!format.is_symmetric())));
    Kernel::new(which, SOURCES, defines, 256)
}

/// Parameters of the kernels.
struct Sizes {
    tiles: usize,
    k: usize,
    groups: usize,
    start: usize,
    count: usize,
    offset: usize,
}

impl Sizes {
    fn of(weight: (Format, [usize; 2])) -> Self {
        let (format, [rows, d_input]) = weight;
        Self {
            tiles: rows / 16,
            k: d_input,
            groups: format.scales(d_input),
            start: 0,
            count: 0,
            offset: 0,
        }
    }

    fn words(self) -> Vec<u64> {
        [
            self.tiles,
            self.k,
            self.groups,
            self.start,
            self.count,
            self.offset,
        ]
        .map(|size| size as u64)
        .to_vec()
    }
}

fn grid(items: usize, a_block: usize) -> [usize; 3] {
    [items.div_ceil(a_block).clamp(1, MOST_BLOCKS), 1, 1]
}

/// Whether a matrix that is row by row can be arranged on its card.
pub(in super::super) fn can_arrange(weight: &QuantisedWeight<Backend>) -> bool {
    let format = weight.format();
    !weight.is_arranged()
        && super::super::plan::card(weight.device().index).is_supported()
        && weight.dtype() == DType::BF16
        // Scales are f32 where a device has no f16.
        && weight.scales().dtype() == format.scale_dtype()
        && covers(format, weight.dims())
}

/// The matrix in fragment order, in its own memory where nobody else holds it.
///
/// # Panics
/// If it cannot be arranged.
pub(in super::super) fn arranged(weight: QuantisedWeight<Backend>) -> QuantisedWeight<Backend> {
    assert!(can_arrange(&weight), "a matrix that kernels do not cover");
    let (format, dims) = (weight.format(), weight.dims());
    weight.arrange(|words, scales| {
        let words = own(contiguous_words(words));
        let [rows, width] = words.meta.shape().dims();
        in_place(&words, [rows, width], "ARRANGE", (format, dims));
        let scales = contiguous(scales);
        if format == Format::Int8 {
            return (Tensor::from_primitive(words), tensor(scales));
        }
        let scales = own(scales);
        let [rows, width] = scales.meta.shape().dims();
        in_place(&scales, [rows, width], "SCALES", (format, dims));
        (Tensor::from_primitive(words), tensor(scales))
    })
}

fn contiguous_words(words: Tensor<Backend, 2, Int>) -> Buffer {
    burn_cubecl::kernel::into_contiguous(words.into_primitive())
}

/// A buffer that nobody else holds: this one, or a copy that stays.
fn own(buffer: Buffer) -> Buffer {
    if buffer.can_mut() {
        return buffer;
    }
    let device = buffer.device.clone();
    persistent::<Backend, _, _>(&device, buffer, |buffer| buffer.copy())
}

/// Arranges a buffer of whole tiles where it is, some tiles at a time by way of another.
fn in_place(
    buffer: &Buffer,
    [rows, width]: [usize; 2],
    which: &'static str,
    matrix: (Format, [usize; 2]),
) {
    let (format, [_, d_input]) = matrix;
    let row_bytes = width * buffer.dtype.size();
    let at_once = (UNPACKED_BYTES / (16 * row_bytes)).clamp(1, rows / 16);
    for tile in (0..rows / 16).step_by(at_once) {
        let tiles = at_once.min(rows / 16 - tile);
        let elements = tiles * 16 * width;
        let part = empty(buffer, [tiles * 16, width], buffer.dtype);
        let whole = Operand::contiguous(buffer, buffer.dtype, [rows, width]);
        let some = Operand::contiguous(&part, buffer.dtype, [tiles * 16, width]);
        let sizes = Sizes {
            tiles,
            offset: tile * 16 * width,
            ..Sizes::of(matrix)
        };
        let of_part = kernel(which, format, d_input, true);
        let threads = elements * buffer.dtype.size() / 4;
        launch(
            &buffer.client,
            of_part,
            grid(threads, 256),
            &[whole, some],
            sizes.words(),
        );
        let bytes = elements * buffer.dtype.size();
        let sizes = Sizes {
            count: bytes / 16,
            offset: tile * 16 * row_bytes / 16,
            ..Sizes::of(matrix)
        };
        launch(
            &buffer.client,
            kernel("PUT", format, d_input, true),
            grid(bytes / 16, 256),
            &[some, whole],
            sizes.words(),
        );
    }
}

/// [`ForwardOps::dequantise_rows`](crate::ops::ForwardOps::dequantise_rows) of an arranged matrix.
///
/// # Panics
/// If the rows are out of range.
pub(in super::super) fn dequantise_rows(
    weight: &QuantisedWeight<Backend>,
    start: usize,
    count: usize,
    dtype: DType,
) -> Option<Tensor<Backend, 2>> {
    let matrix = Fragments::of(weight)?;
    let [out, d_input] = matrix.dims;
    assert!(start + count <= out, "rows to unpack");
    let stored = stored_type(dtype);
    let y = empty(&matrix.words, [count, d_input], stored);
    let sizes = Sizes {
        start,
        count,
        ..Sizes::of((matrix.format, matrix.dims))
    };
    let [words, scales] = matrix.operands();
    let to = Operand::contiguous(&y, stored, [count, d_input]);
    launch(
        &y.client,
        kernel("FLOATS", matrix.format, d_input, stored == DType::BF16),
        grid(count * d_input / 16 / 32, 8),
        &[words, scales, to],
        sizes.words(),
    );
    Some(to_dtype(tensor(y), dtype))
}

/// [`ForwardOps::select_quantised`](crate::ops::ForwardOps::select_quantised) of an arranged matrix.
pub(in super::super) fn select_rows(
    weight: &QuantisedWeight<Backend>,
    indices: &Tensor<Backend, 1, Int>,
) -> Option<Tensor<Backend, 2>> {
    let (matrix, dtype) = (Fragments::of(weight)?, weight.dtype());
    let [_, d_input] = matrix.dims;
    let [count] = indices.dims();
    let indices = indices.clone().cast(burn::tensor::IntDType::I32);
    let indices = burn_cubecl::kernel::into_contiguous(indices.into_primitive());
    let stored = stored_type(dtype);
    let y = empty(&matrix.words, [count, d_input], stored);
    let sizes = Sizes {
        count,
        ..Sizes::of((matrix.format, matrix.dims))
    };
    let [words, scales] = matrix.operands();
    let rows = Operand::contiguous(&indices, DType::I32, [count]);
    let to = Operand::contiguous(&y, stored, [count, d_input]);
    launch(
        &y.client,
        kernel("PICK", matrix.format, d_input, stored == DType::BF16),
        grid(count * d_input / 8, 256),
        &[words, scales, rows, to],
        sizes.words(),
    );
    Some(to_dtype(tensor(y), dtype))
}

/// [`ForwardOps::dequantise_rows`](crate::ops::ForwardOps::dequantise_rows) of a matrix that is row by row, with zero
/// points or without.
///
/// # Panics
/// If the rows are out of range.
pub(in super::super) fn row_floats(
    weight: &QuantisedWeight<Backend>,
    start: usize,
    count: usize,
    dtype: DType,
) -> Option<Tensor<Backend, 2>> {
    let (format, [out, d_input]) = (weight.format(), weight.dims());
    let covered = super::super::plan::card(weight.device().index).is_supported()
        && weight.scales().dtype() == format.scale_dtype()
        && d_input.is_multiple_of(8)
        // Numbers of eight values are counted in 32 bits.
        && count.checked_mul(d_input / 8).is_some_and(|eights| eights < 1 << 31);
    if !covered || count == 0 {
        return None;
    }
    assert!(start + count <= out, "rows to unpack");
    let words = contiguous_words(weight.words().clone());
    let scales = contiguous(weight.scales().clone());
    let zeros = weight.zeros().cloned().map(contiguous);
    let stored = stored_type(dtype);
    let y = empty(&words, [count, d_input], stored);
    let sizes = Sizes {
        start,
        count,
        offset: format.words(d_input),
        ..Sizes::of((format, weight.dims()))
    };
    let groups = [out, format.scales(d_input)];
    let mut operands = vec![
        Operand::contiguous(&words, DType::I32, [out, format.words(d_input)]),
        Operand::contiguous(&scales, format.scale_dtype(), groups),
    ];
    operands.extend(
        (zeros.as_ref()).map(|zeros| Operand::contiguous(zeros, format.scale_dtype(), groups)),
    );
    operands.push(Operand::contiguous(&y, stored, [count, d_input]));
    launch(
        &y.client,
        kernel("ROWS", format, d_input, stored == DType::BF16),
        grid(count * d_input / 8, 4 * 256),
        &operands,
        sizes.words(),
    );
    Some(to_dtype(tensor(y), dtype))
}

/// The type that the kernels write on the way to `dtype`.
fn stored_type(dtype: DType) -> DType {
    match dtype {
        DType::BF16 => DType::BF16,
        _ => DType::F32,
    }
}

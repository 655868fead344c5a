//! Quantised weights in the order of the tensor cores' fragments (`fragments.cuh`): few rows of an input at the speed of
//! memory.
//!
//! A model's matrices are arranged once, after loading, where they are; [`QuantisedWeight`] records the order,
//! and only what is here reads it. Matmuls of up to [`MOST_VECTORS`] rows read the quantised words; more rows
//! go through floats, some rows of the matrix at a time, as on every backend.

mod arrange;
mod plan;
#[cfg(test)]
mod tests;

use burn::tensor::{DType, Int, Tensor};

pub(super) use arrange::{arranged, can_arrange, dequantise_rows, row_floats, select_rows};
pub(super) use plan::{FragmentLaunch, FragmentMatmul, Fused, MOST_VECTORS};

use super::{
    launch::{Backend, Buffer, contiguous, empty, launch, tensor},
    operand::Operand,
};
use crate::ops::{
    cast::to_dtype,
    quantised::{Format, QuantisedWeight},
};

/// Whether matrices of this format and shape `[out, in]` can be arranged: whole tiles of 16 rows, and pieces of 64 columns.
pub(super) fn covers(format: Format, [rows, d_input]: [usize; 2]) -> bool {
    let group = match format {
        Format::Int8 => 64,
        Format::Int4 { group } => group.max(64),
        Format::Int4Zeros { .. } => return false,
    };
    rows.is_multiple_of(16) && d_input.is_multiple_of(group)
}

/// Buffers of a matrix in fragment order.
pub(super) struct Fragments {
    pub words: Buffer,
    pub scales: Buffer,
    pub format: Format,
    /// `[out, in]`.
    pub dims: [usize; 2],
}

impl Fragments {
    /// Those of an arranged matrix.
    pub(super) fn of(weight: &QuantisedWeight<Backend>) -> Option<Self> {
        let (words, scales) = weight.fragments()?;
        Some(Self {
            words: words.clone().into_primitive(),
            scales: contiguous(scales.clone()),
            format: weight.format(),
            dims: weight.dims(),
        })
    }

    /// Words and scales as operands.
    pub(super) fn operands(&self) -> [Operand<'_>; 2] {
        let [rows, d_input] = self.dims;
        let format = self.format;
        [
            Operand::contiguous(&self.words, DType::I32, [rows, format.words(d_input)]),
            Operand::contiguous(
                &self.scales,
                format.scale_dtype(),
                [rows, format.scales(d_input)],
            ),
        ]
    }
}

/// `x Wᵀ + bias + residual` in type `out`; `None` where the kernels do not cover it.
fn matmul(
    x: &Tensor<Backend, 2>,
    weight: &QuantisedWeight<Backend>,
    bias: Option<&Tensor<Backend, 1>>,
    residual: Option<&Tensor<Backend, 2>>,
    out: DType,
) -> Option<Tensor<Backend, 2>> {
    let [vectors, k] = x.dims();
    if x.dtype() != DType::BF16 || !(1..=MOST_VECTORS).contains(&vectors) {
        return None;
    }
    let matrix = Fragments::of(weight)?;
    let [rows, d_input] = matrix.dims;
    assert_eq!(k, d_input, "inputs of the matmul");
    let x = contiguous(x.clone());
    let bias = bias.map(|bias| contiguous(to_dtype(bias.clone(), DType::BF16)));
    let residual = residual.map(|one| contiguous(to_dtype(one.clone(), DType::BF16)));
    let one = FragmentMatmul {
        format: matrix.format,
        k,
        rows: [rows, 0, 0],
        gate: false,
        vectors,
    };
    let fused = Fused {
        bias: bias.is_some(),
        residual: residual.is_some(),
        out_f32: out == DType::F32,
        ..Fused::default()
    };
    let device = super::plan::device(&x);
    let FragmentLaunch {
        kernel,
        grid,
        splits,
    } = one.launch(fused, &device);
    let partial = splits.then(|| {
        let counters = Tensor::<Backend, 1, Int>::zeros([one.counters()], (&x.device, DType::I32));
        let partial = empty(&x, [one.partial(&device)], DType::F32);
        (partial, counters.into_primitive())
    });
    let y = empty(&x, [vectors, rows], out);
    let mut operands = vec![Operand::contiguous(&x, DType::BF16, [vectors, k])];
    operands.extend(matrix.operands());
    operands.extend(
        bias.as_ref()
            .map(|bias| Operand::contiguous(bias, DType::BF16, [rows])),
    );
    operands.extend(
        residual
            .as_ref()
            .map(|residual| Operand::contiguous(residual, DType::BF16, [vectors, rows])),
    );
    if let Some((partial, counters)) = &partial {
        operands.push(Operand::contiguous(
            partial,
            DType::F32,
            [one.partial(&device)],
        ));
        operands.push(Operand::contiguous(counters, DType::I32, [one.counters()]));
    }
    operands.push(Operand::contiguous(&y, out, [vectors, rows]));
    launch(
        &x.client,
        kernel,
        grid,
        &operands,
        one.parameters(0.0, None),
    );
    Some(tensor(y))
}

/// [`ForwardOps::linear_quantised`](crate::ops::ForwardOps::linear_quantised).
pub(super) fn linear(
    x: &Tensor<Backend, 2>,
    weight: &QuantisedWeight<Backend>,
    bias: Option<&Tensor<Backend, 1>>,
    residual: Option<&Tensor<Backend, 2>>,
) -> Option<Tensor<Backend, 2>> {
    matmul(x, weight, bias, residual, DType::BF16)
}

/// [`ForwardOps::logits_quantised`](crate::ops::ForwardOps::logits_quantised).
pub(super) fn logits(
    hidden: &Tensor<Backend, 2>,
    head: &QuantisedWeight<Backend>,
) -> Option<Tensor<Backend, 2>> {
    matmul(hidden, head, None, None, DType::F32)
}

//! A frozen matrix, quantised or not, as the bf16 operand of a matmul.

use burn::{prelude::*, tensor::DType};

use super::{gemm, launch::Backend};
use crate::ops::{ForwardOps, Matrix, quantised::QuantisedWeight};

/// Whether the matmuls cover `dy W` and `x Wᵀ` with a quantised matrix dequantised as bf16; `x` has its inputs or
/// outputs.
pub(super) fn covers(x: &Tensor<Backend, 2>, weight: &QuantisedWeight<Backend>) -> bool {
    super::supported(x)
        && x.dtype() == DType::BF16
        && x.dims()[0] > 0
        && weight.dims().iter().all(|width| width.is_multiple_of(8))
}

/// Whether the matmuls cover `dy W`.
pub(super) fn covers_matrix(dy: &Tensor<Backend, 2>, weight: &Matrix<Backend>) -> bool {
    match weight {
        Matrix::Dense(weight) => gemm::covers(dy, weight),
        Matrix::Quantised(weight) => covers(dy, weight),
    }
}

/// The matrix in bf16, `[out, in]`.
pub(super) fn floats(weight: &Matrix<Backend>) -> Tensor<Backend, 2> {
    match weight {
        Matrix::Dense(weight) => weight.clone(),
        Matrix::Quantised(weight) => whole(weight),
    }
}

/// A quantised matrix in bf16, `[out, in]`.
pub(super) fn whole(weight: &QuantisedWeight<Backend>) -> Tensor<Backend, 2> {
    Backend::dequantise_for_matmul(weight, 0, weight.dims()[0], DType::BF16)
}

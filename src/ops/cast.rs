//! Casts that cost nothing where the type is right already.

use burn::{
    prelude::*,
    tensor::{DType, FloatDType},
};

/// Casts to f32 unless the tensor is f32 already.
pub fn to_f32<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    to_dtype(x, DType::F32)
}

/// Casts to `dtype` unless the tensor has it already.
pub fn to_dtype<B: Backend, const D: usize>(x: Tensor<B, D>, dtype: DType) -> Tensor<B, D> {
    if x.dtype() == dtype {
        x
    } else {
        x.cast(FloatDType::from(dtype))
    }
}

//! A matrix of the model as the decoder reads it: floats or quantised.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;

use super::{
    launch::{Buffer, Cube, strided},
    matvec::{self, InputNorm},
    quantized::{self, Quantised},
    words::Packing,
};
use crate::weights::Weight;

/// Buffers of a matrix `[out, in]`.
#[expect(
    clippy::large_enum_variant,
    reason = "seven a layer, made once; a box would be one more read a launch"
)]
pub(super) enum Matrix<R: CubeRuntime> {
    /// Its elements.
    Floats(Buffer<R>),
    /// Its words and scales.
    Quantised(Quantised<R>),
}

impl<R: CubeRuntime> Matrix<R> {
    /// The buffers of a weight, without a copy.
    pub(super) fn of(weight: &Weight<Cube<R>>) -> Self {
        match weight {
            Weight::Dense(param) => Self::Floats(strided(param.val())),
            Weight::Packed(weight) => Self::Quantised(Quantised::of(weight)),
        }
    }

    /// Whether the kernels cover matmuls of inputs of `dtype` with these buffers.
    pub(super) fn covers(&self, dtype: DType) -> bool {
        match self {
            Self::Floats(buffer) => buffer.dtype == dtype && buffer.is_contiguous(),
            Self::Quantised(weight) => {
                weight.is_covered() && weight.is_whole() && Packing::of(dtype).is_some()
            }
        }
    }

    /// Whether one launch can multiply by both.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Floats(_), Self::Floats(_)) => true,
            (Self::Quantised(this), Self::Quantised(other)) => this.is_like(other),
            _ => false,
        }
    }

    /// `norm(x) Wᵀ + residual` in type `out`.
    pub(super) fn matmul(
        &self,
        x: &Buffer<R>,
        norm: Option<&InputNorm<R>>,
        residual: Option<&Buffer<R>>,
        out: DType,
    ) -> Buffer<R> {
        match self {
            Self::Floats(weight) => matvec::matmul(x, norm, weight, None, residual, out),
            Self::Quantised(weight) => {
                let norm = norm.map(|norm| (&norm.weight, norm.epsilon));
                quantized::matmul(x, norm, weight, (None, residual), None, out)
            }
        }
    }

    /// Matmuls of one normalised input with three matrices, concatenated.
    ///
    /// # Panics
    /// If some are quantised and some are not ([`Self::is_like`]).
    pub(super) fn three_matmuls(
        x: &Buffer<R>,
        norm: &InputNorm<R>,
        weights: [&Self; 3],
    ) -> Buffer<R> {
        match weights {
            [Self::Floats(a), Self::Floats(b), Self::Floats(c)] => {
                matvec::three_matmuls(x, norm, [a, b, c])
            }
            [Self::Quantised(a), Self::Quantised(b), Self::Quantised(c)] => {
                quantized::three_matmuls(x, (&norm.weight, norm.epsilon), [a, b, c])
            }
            _ => panic!("matrices of one input are stored differently"),
        }
    }

    /// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
    ///
    /// # Panics
    /// If one is quantised and the other is not.
    pub(super) fn swiglu_matmul(
        x: &Buffer<R>,
        norm: &InputNorm<R>,
        gate: &Self,
        up: &Self,
    ) -> Buffer<R> {
        match (gate, up) {
            (Self::Floats(gate), Self::Floats(up)) => matvec::swiglu_matmul(x, norm, gate, up),
            (Self::Quantised(gate), Self::Quantised(up)) => {
                quantized::swiglu_matmul(x, (&norm.weight, norm.epsilon), gate, up)
            }
            _ => panic!("gate and up are stored differently"),
        }
    }
}

//! The low-rank adapter (LoRA, DoRA) of one linear layer: its weights and its share of the matmul.
//!
//! Names and conventions are PEFT's: `A` is `[r, in]`, `B` is `[out, r]`, the low-rank matmul is scaled by
//! `alpha / r` (`alpha / √r` with rank stabilisation). The base weight is never composed with the
//! adapter during training; `adapters::lora::merge` does so once, for inference.

use burn::{module::Param, prelude::*};

use crate::{
    base::seeds::mix,
    ops::{
        Dropout, LowRank, Ops,
        cast::{to_dtype, to_f32},
    },
    weights::Weight,
};

/// The adapter of one linear layer. Weights are f32 whatever the base is stored in.
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// `[r, in]`.
    pub lora_a: Param<Tensor<B, 2>>,
    /// `[out, r]`; zero when fresh, so that a fresh adapter changes nothing.
    pub lora_b: Param<Tensor<B, 2>>,
    /// DoRA's row magnitudes, `[out]`.
    pub lora_magnitude_vector: Option<Param<Tensor<B, 1>>>,
    scaling: f64,
    dropout: f64,
    /// Index among the adapters: layers have different dropout masks.
    index: usize,
}

impl<B: Backend> Lora<B> {
    /// An adapter without dropout.
    ///
    /// # Shapes
    /// - `a`: `[r, in]`, `b`: `[out, r]`, `magnitude`: `[out]`, DoRA's
    pub fn new(
        [a, b]: [Param<Tensor<B, 2>>; 2],
        magnitude: Option<Param<Tensor<B, 1>>>,
        scaling: f64,
    ) -> Self {
        Self {
            lora_a: a,
            lora_b: b,
            lora_magnitude_vector: magnitude,
            scaling,
            dropout: 0.0,
            index: 0,
        }
    }

    /// Drops inputs with this probability in training; `index` gives each layer a mask of its
    /// own.
    #[must_use]
    pub fn with_dropout(self, probability: f64, index: usize) -> Self {
        Self {
            dropout: probability,
            index,
            ..self
        }
    }
}

impl<B: Ops> Lora<B> {
    /// The adapter as an operand; a `dropout_seed` enables dropout and decides its mask.
    pub fn low_rank(&self, dropout_seed: Option<u64>) -> LowRank<B> {
        LowRank {
            a: self.lora_a.val(),
            b: self.lora_b.val(),
            scaling: self.scaling,
            dropout: dropout_seed
                .filter(|_| self.dropout > 0.0)
                .map(|seed| Dropout {
                    probability: self.dropout,
                    seed: mix(seed, self.index as u64),
                }),
        }
    }

    /// The linear layer without bias, `x W^T + s · drop(x) A^T B^T`, plus `residual`.
    ///
    /// With DoRA the rows are rescaled to the trained magnitudes; the norm of `W + s·B·A` is
    /// computed from matmuls with `A`, not from a composed matrix, and carries no gradient.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`, `weight`: `[out, in]`, `residual`: `[tokens, out]`
    /// - returns: `[tokens, out]` in the dtype of `x`
    ///
    /// Source: `Linear.forward` and `DoraLinearLayer.forward`, PEFT, `tuners/lora`.
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        weight: &Weight<B>,
        residual: Option<Tensor<B, 2>>,
        dropout_seed: Option<u64>,
    ) -> Tensor<B, 2> {
        let adapter = self.low_rank(dropout_seed);
        let Some(magnitude) = &self.lora_magnitude_vector else {
            return weight.adapted_linear(x, &adapter, residual);
        };
        let dtype = x.dtype();
        let input = to_f32(x.clone());
        let input = match adapter.dropout {
            Some(dropout) => input.clone() * B::dropout_mask(&input, dropout),
            None => input,
        };
        let low = B::matmul(input.clone(), adapter.a.transpose());
        let low = B::matmul(low, adapter.b.transpose()) * self.scaling;
        let norm = self.row_norms(weight);
        let scale = (magnitude.val() / norm).unsqueeze();
        let y = if adapter.dropout.is_some() {
            // PEFT drops the base matmul's input as well once dropout is on.
            let base = to_f32(weight.multiply(to_dtype(input, dtype)));
            let plain = to_f32(weight.multiply(x));
            plain + (scale.clone() - 1.0) * base + scale * low
        } else {
            scale * (to_f32(weight.multiply(x)) + low)
        };
        let y = to_dtype(y, dtype);
        match residual {
            Some(residual) => residual + y,
            None => y,
        }
    }
}

impl<B: Ops> Lora<B> {
    /// Factor on the low-rank matmul.
    pub fn scaling(&self) -> f64 {
        self.scaling
    }

    /// Euclidean norm of each row of `W + s·B·A`, `[out]`, detached; of a quantised `W` some rows as floats
    /// at a time.
    fn row_norms(&self, weight: &Weight<B>) -> Tensor<B, 1> {
        let b = self.lora_b.val().detach();
        let packed = match weight {
            Weight::Dense(param) => return self.norms_of_rows(param.val(), b),
            Weight::Packed(packed) => packed,
        };
        let dtype = packed.dtype();
        let pieces = packed.row_pieces(dtype).map(|(start, count)| {
            let rows = B::dequantise_for_matmul(packed, start, count, dtype);
            self.norms_of_rows(rows, b.clone().narrow(0, start, count))
        });
        Tensor::cat(pieces.collect(), 0)
    }

    /// Euclidean norm of each row of `W + s·B·A`, `[out]`, detached.
    pub(crate) fn composed_row_norms(&self, weight: Tensor<B, 2>) -> Tensor<B, 1> {
        self.norms_of_rows(weight, self.lora_b.val().detach())
    }

    /// [`Self::composed_row_norms`] of some rows: `weight` `[n, in]`, `b` `[n, r]`.
    fn norms_of_rows(&self, weight: Tensor<B, 2>, b: Tensor<B, 2>) -> Tensor<B, 1> {
        let weight = to_f32(weight.detach());
        let a = self.lora_a.val().detach();
        let b = b * self.scaling;
        let square = (weight.clone() * weight.clone()).sum_dim(1);
        let cross = (B::matmul(weight, a.clone().transpose()) * b.clone()).sum_dim(1) * 2.0;
        let low = (B::matmul(b.clone(), B::matmul(a.clone(), a.transpose())) * b).sum_dim(1);
        (square + cross + low).clamp_min(0.0).sqrt().squeeze_dim(1)
    }

    /// `s · B · A`, `[out, in]`, f32: what merging adds.
    pub fn delta(&self) -> Tensor<B, 2> {
        B::matmul(self.lora_b.val(), self.lora_a.val()) * self.scaling
    }
}

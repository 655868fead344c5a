//! Operands and results of the operations.

use burn::prelude::*;

use super::{Dropout, quantised::QuantisedWeight};

/// One low-rank adapter as an operand: `y += scaling · drop(x) Aᵀ Bᵀ`.
#[derive(Debug, Clone)]
pub struct LowRank<B: Backend> {
    /// `[r, in]`, f32.
    pub a: Tensor<B, 2>,
    /// `[out, r]`, f32.
    pub b: Tensor<B, 2>,
    /// Factor on the low-rank matmul, `alpha / r`.
    pub scaling: f64,
    /// Set in training only.
    pub dropout: Option<Dropout>,
}

/// A root-mean-square norm over each head.
#[derive(Debug, Clone)]
pub struct HeadNorm<B: Backend> {
    /// `[head_dim]`.
    pub weight: Tensor<B, 1>,
    /// Added to the mean square.
    pub epsilon: f64,
}

/// What a low-rank adapter's backward pass starts from.
#[derive(Debug, Clone)]
pub struct LowRankBackward<B: Backend> {
    /// `drop(x) Aᵀ` of the forward pass, `[tokens, r]`.
    pub low: Tensor<B, 2>,
    /// Gradient of the layer's output, `[tokens, out]`.
    pub dy: Tensor<B, 2>,
    /// The adapter.
    pub adapter: LowRank<B>,
}

/// Gradients of a low-rank adapter.
#[derive(Debug, Clone)]
pub struct LowRankGradients<B: Backend> {
    /// Of `A`, `[r, in]`, f32.
    pub a: Tensor<B, 2>,
    /// Of `B`, `[out, r]`, f32.
    pub b: Tensor<B, 2>,
    /// Of `drop(x) Aᵀ`, `[tokens, r]`.
    pub low: Tensor<B, 2>,
}

/// Loss over some targets and its gradient.
#[derive(Debug, Clone)]
pub struct TargetLoss<B: Backend> {
    /// Sum of the negative log likelihoods, number of right predictions; `[2]`, f32.
    pub sums: Tensor<B, 1>,
    /// Gradient of the weighted loss, `[targets, hidden]`, in the type of the hidden states.
    pub hidden_gradient: Tensor<B, 2>,
}

/// What one AdamW step of one tensor needs besides value and gradient.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamWStep {
    /// Share of the old mean of the gradient.
    pub beta1: f64,
    /// Share of the old mean of its square.
    pub beta2: f64,
    /// Added to the root.
    pub epsilon: f64,
    /// Learning rate over the bias correction of the mean.
    pub step_size: f64,
    /// One over the bias correction of the mean square.
    pub second_scale: f64,
    /// Weight decay: what the value is multiplied with first, one less learning rate times decay.
    pub keep: f64,
}

/// One parameter in an AdamW step; all `[count]`, f32.
#[derive(Debug, Clone)]
pub struct AdamWTensor<B: Backend> {
    /// The parameter.
    pub value: Tensor<B, 1>,
    /// Its gradient.
    pub gradient: Tensor<B, 1>,
    /// Running mean of the gradient.
    pub first: Tensor<B, 1>,
    /// Running mean of its square.
    pub second: Tensor<B, 1>,
    /// The rest; the first three numbers are the same for all parameters.
    pub step: AdamWStep,
}

/// A frozen matrix `[out, in]` as an operand.
#[derive(Debug, Clone)]
pub enum Matrix<B: Backend> {
    /// Floats.
    Dense(Tensor<B, 2>),
    /// Quantised; never a float copy of the whole for longer than one matmul.
    Quantised(QuantisedWeight<B>),
}

impl<B: Backend> From<Tensor<B, 2>> for Matrix<B> {
    fn from(floats: Tensor<B, 2>) -> Self {
        Self::Dense(floats)
    }
}

/// One matmul whose input gradient is wanted.
#[derive(Debug, Clone)]
pub struct BackwardMatmul<B: Backend> {
    /// Gradient of its output, `[tokens, out]`.
    pub dy: Tensor<B, 2>,
    /// `[out, in]`.
    pub weight: Matrix<B>,
    /// Gradient of the low-rank part `[tokens, r]`, and the adapter.
    pub adapter: Option<(Tensor<B, 2>, LowRank<B>)>,
}

/// Activation function after a linear layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// GELU in the tanh form.
    GeluTanh,
    /// GELU with the error function.
    GeluExact,
}

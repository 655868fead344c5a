//! The building blocks both towers share, under the checkpoint's own names and layouts.
//!
//! Hidden states are two-dimensional, `[tokens, width]`, everywhere in the model: one
//! matmul serves batches, packed samples and single tokens alike.

use burn::{
    module::{Param, ParamId},
    prelude::*,
    tensor::DType,
};

use crate::{
    ops::{Activation, HeadNorm, Ops, cast::to_dtype},
    weights::{Weight, lora::Lora},
};

/// A parameter that costs nothing until it is loaded or drawn: normal with the given deviation.
pub(crate) fn lazy_normal<B: Backend, const D: usize>(
    shape: [usize; D],
    std: f64,
    dtype: DType,
    device: &B::Device,
) -> Param<Tensor<B, D>> {
    Param::uninitialized(
        ParamId::new(),
        move |device, require_grad| {
            let tensor = Tensor::<B, D>::random(
                shape,
                burn::tensor::Distribution::Normal(0.0, std),
                (device, DType::F32),
            );
            to_dtype(tensor, dtype).set_require_grad(require_grad)
        },
        device.clone(),
        true,
        shape.into(),
    )
}

/// A parameter that costs nothing until it is loaded or used: every element `value`.
pub(crate) fn lazy_full<B: Backend, const D: usize>(
    shape: [usize; D],
    value: f32,
    dtype: DType,
    device: &B::Device,
) -> Param<Tensor<B, D>> {
    Param::uninitialized(
        ParamId::new(),
        move |device, require_grad| {
            Tensor::<B, D>::full(shape, value, (device, dtype)).set_require_grad(require_grad)
        },
        device.clone(),
        true,
        shape.into(),
    )
}

/// How fresh parameters are drawn and stored.
#[derive(Debug, Clone, Copy)]
pub struct InitOptions {
    /// Type of the stored weights.
    pub dtype: DType,
    /// Standard deviation of fresh weight matrices; the published value is 0.02.
    pub initializer_range: f64,
}

impl Default for InitOptions {
    fn default() -> Self {
        Self {
            dtype: DType::F32,
            initializer_range: 0.02,
        }
    }
}

/// A linear layer with the weight as published, `[out, in]`, and an optional low-rank adapter (LoRA).
///
/// The checkpoint's layout is kept (Burn's own `Linear` has `[in, out]`) because a matrix-vector
/// matmul over it reads memory in rows, and because nothing has to be transposed at load.
#[derive(Module, Debug)]
pub struct Linear<B: Backend> {
    /// `[out, in]`.
    pub weight: Weight<B>,
    /// `[out]`.
    pub bias: Option<Param<Tensor<B, 1>>>,
    /// The adapter, where one is attached.
    pub lora: Option<Lora<B>>,
}

impl<B: Ops> Linear<B> {
    /// A layer from `d_input` to `d_output` features.
    pub fn new(
        d_input: usize,
        d_output: usize,
        bias: bool,
        options: &InitOptions,
        device: &B::Device,
    ) -> Self {
        Self {
            weight: Weight::Dense(lazy_normal(
                [d_output, d_input],
                options.initializer_range,
                options.dtype,
                device,
            )),
            bias: bias.then(|| lazy_full([d_output], 0.0, options.dtype, device)),
            lora: None,
        }
    }

    /// `x W^T + b`, plus the adapter's share where one is attached.
    ///
    /// A `dropout_seed` enables the adapter's dropout and decides its mask; `None` is inference.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, out]`
    pub fn forward(&self, x: Tensor<B, 2>, dropout_seed: Option<u64>) -> Tensor<B, 2> {
        self.run(x, None, dropout_seed)
    }

    /// [`Linear::forward`] plus `residual`.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - `residual` and result: `[tokens, out]`
    pub fn forward_add(
        &self,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
        dropout_seed: Option<u64>,
    ) -> Tensor<B, 2> {
        self.run(x, Some(residual), dropout_seed)
    }

    /// [`Linear::forward`], then an activation.
    ///
    /// # Shapes
    /// - `x`: `[tokens, in]`
    /// - returns: `[tokens, out]`
    pub fn forward_activated(
        &self,
        x: Tensor<B, 2>,
        activation: Activation,
        dropout_seed: Option<u64>,
    ) -> Tensor<B, 2> {
        match &self.lora {
            None => {
                let bias = self.bias.as_ref().map(Param::val);
                self.weight.linear_activated(x, bias, activation)
            }
            Some(_) => B::activate(self.forward(x, dropout_seed), activation),
        }
    }

    fn run(
        &self,
        x: Tensor<B, 2>,
        residual: Option<Tensor<B, 2>>,
        dropout_seed: Option<u64>,
    ) -> Tensor<B, 2> {
        let bias = self.bias.as_ref().map(Param::val);
        match &self.lora {
            None => self.weight.linear(x, bias, residual),
            Some(lora) => {
                let y = lora.forward(x, &self.weight, residual, dropout_seed);
                match bias {
                    Some(bias) => y + bias.unsqueeze(),
                    None => y,
                }
            }
        }
    }
}

/// Root-mean-square norm with a scale, statistics in f32.
///
/// Source: `Qwen3VLTextRMSNorm`, transformers, `modeling_qwen3_vl.py`.
#[derive(Module, Debug)]
pub struct RmsNorm<B: Backend> {
    /// `[width]`.
    pub weight: Param<Tensor<B, 1>>,
    epsilon: f64,
}

impl<B: Ops> RmsNorm<B> {
    /// A norm over the last `width` elements with scale 1.
    pub fn new(width: usize, epsilon: f64, options: &InitOptions, device: &B::Device) -> Self {
        Self {
            weight: lazy_full([width], 1.0, options.dtype, device),
            epsilon,
        }
    }

    /// Normalises each row.
    ///
    /// # Shapes
    /// - `x` and result: `[tokens, width]`
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        B::rms_norm(x, self.weight.val(), self.epsilon)
    }

    /// The norm as an operand of [`rotate_heads`](crate::ops::ForwardOps::rotate_heads).
    pub fn of_heads(&self) -> HeadNorm<B> {
        HeadNorm {
            weight: self.weight.val(),
            epsilon: self.epsilon,
        }
    }

    /// Added to the mean square.
    pub fn epsilon(&self) -> f64 {
        self.epsilon
    }
}

/// Layer norm with scale and shift, statistics in f32.
///
/// Source: `torch.nn.LayerNorm` as used by `Qwen3VLVisionBlock`.
#[derive(Module, Debug)]
pub struct LayerNorm<B: Backend> {
    /// `[width]`.
    pub weight: Param<Tensor<B, 1>>,
    /// `[width]`.
    pub bias: Param<Tensor<B, 1>>,
    epsilon: f64,
}

impl<B: Ops> LayerNorm<B> {
    /// A norm over the last `width` elements with scale 1 and shift 0.
    pub fn new(width: usize, epsilon: f64, options: &InitOptions, device: &B::Device) -> Self {
        Self {
            weight: lazy_full([width], 1.0, options.dtype, device),
            bias: lazy_full([width], 0.0, options.dtype, device),
            epsilon,
        }
    }

    /// Normalises each row.
    ///
    /// # Shapes
    /// - `x` and result: `[tokens, width]`
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        B::row_layer_norm(x, self.weight.val(), self.bias.val(), self.epsilon)
    }
}

/// A table of rows chosen by index.
#[derive(Module, Debug)]
pub struct Embedding<B: Backend> {
    /// `[rows, width]`.
    pub weight: Weight<B>,
}

impl<B: Ops> Embedding<B> {
    /// A table of `rows` vectors.
    pub fn new(rows: usize, width: usize, options: &InitOptions, device: &B::Device) -> Self {
        Self {
            weight: Weight::Dense(lazy_normal(
                [rows, width],
                options.initializer_range,
                options.dtype,
                device,
            )),
        }
    }

    /// Rows of the table.
    ///
    /// # Shapes
    /// - `indices`: `[n]`
    /// - returns: `[n, width]`
    pub fn forward(&self, indices: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        self.weight.select(indices)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn_flex::Flex;

    #[test]
    fn a_layer_multiplies_by_the_transposed_weight() {
        let device = Default::default();
        let mut layer = Linear::<Flex>::new(2, 3, true, &InitOptions::default(), &device);
        let weight = Param::from_data([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], &device);
        layer.weight = Weight::Dense(weight);
        layer.bias = Some(Param::from_data([0.5, 0.0, -1.0], &device));
        let y = layer.forward(Tensor::from_floats([[2.0, 3.0]], &device), None);
        assert_eq!(y.into_data().to_vec::<f32>().unwrap(), [2.5, 3.0, 4.0]);
    }
}

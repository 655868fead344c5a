//! The weight of a linear layer: a matrix of floats or a quantised one, and an adapter beside either.

pub mod lora;

use burn::{
    module::{
        AutodiffModule, Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault,
        ModuleMapper, ModuleVisitor, Param,
    },
    prelude::*,
    tensor::backend::AutodiffBackend,
};

use crate::ops::{Activation, LowRank, Matrix, Ops, cast::to_dtype, quantised::QuantisedWeight};

/// A matrix `[out, in]` of the model: a parameter, or quantised and then no parameter.
///
/// Quantised weights are constants: visitors and mappers of parameters skip them, and what needs the
/// floats calls [`Weight::val`].
#[derive(Debug, Clone)]
pub enum Weight<B: Backend> {
    /// Floats.
    Dense(Param<Tensor<B, 2>>),
    /// Quantised.
    Packed(QuantisedWeight<B>),
}

impl<B: Backend> Weight<B> {
    /// The values as floats, `[out, in]`; dequantised for this call where they are quantised.
    pub fn val(&self) -> Tensor<B, 2> {
        match self {
            Self::Dense(param) => param.val(),
            Self::Packed(packed) => packed.unpack(packed.dtype()),
        }
    }

    /// The quantised matrix, where it is one.
    pub fn packed(&self) -> Option<&QuantisedWeight<B>> {
        match self {
            Self::Dense(_) => None,
            Self::Packed(packed) => Some(packed),
        }
    }

    /// The weight with a quantised matrix replaced.
    pub fn map_packed(
        self,
        replace: impl FnOnce(QuantisedWeight<B>) -> QuantisedWeight<B>,
    ) -> Self {
        match self {
            Self::Packed(packed) => Self::Packed(replace(packed)),
            dense => dense,
        }
    }

    /// Shape `[out, in]`, without initialising the parameter.
    pub fn lazy_shape(&self) -> burn::tensor::Shape {
        match self {
            Self::Dense(param) => param.lazy_shape(),
            Self::Packed(packed) => packed.dims().into(),
        }
    }

    /// Device that it is stored on, without initialising the parameter.
    pub fn lazy_device(&self) -> B::Device {
        match self {
            Self::Dense(param) => param.lazy_device(),
            Self::Packed(packed) => packed.device(),
        }
    }

    /// Whether gradients are wanted; never of a quantised matrix.
    pub fn is_require_grad(&self) -> bool {
        match self {
            Self::Dense(param) => param.is_require_grad(),
            Self::Packed(_) => false,
        }
    }
}

impl<B: Ops> Weight<B> {
    /// The matrix as an operand of the backward pass.
    pub fn operand(&self) -> Matrix<B> {
        match self {
            Self::Dense(param) => Matrix::Dense(param.val()),
            Self::Packed(packed) => Matrix::Quantised(packed.clone()),
        }
    }

    /// `x Wᵀ`.
    ///
    /// # Shapes
    /// - `x`: `[n, in]`
    /// - returns: `[n, out]`
    pub fn multiply(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self {
            Self::Dense(param) => B::matmul(x, param.val().transpose()),
            Self::Packed(packed) => B::linear_quantised(x, packed, None, None),
        }
    }

    /// Rows by index as floats.
    ///
    /// # Shapes
    /// - `indices`: `[n]`
    /// - returns: `[n, in]`
    pub fn select(&self, indices: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        match self {
            Self::Dense(param) => param.val().select(0, indices),
            Self::Packed(packed) => B::select_quantised(packed, indices),
        }
    }

    /// [`linear_add`](crate::ops::ForwardOps::linear_add), whatever form the matrix has.
    ///
    /// # Shapes
    /// - `x`: `[n, in]`, `bias`: `[out]`, `residual`: `[n, out]`
    /// - returns: `[n, out]`
    pub fn linear(
        &self,
        x: Tensor<B, 2>,
        bias: Option<Tensor<B, 1>>,
        residual: Option<Tensor<B, 2>>,
    ) -> Tensor<B, 2> {
        match self {
            Self::Dense(param) => B::linear_add(x, param.val(), bias, residual),
            Self::Packed(packed) => {
                // Parts computed in another type multiply by the same words.
                let dtype = x.dtype();
                let bias = bias.map(|bias| to_dtype(bias, dtype));
                let residual = residual.map(|residual| to_dtype(residual, dtype));
                B::linear_quantised(x, packed, bias, residual)
            }
        }
    }

    /// [`linear_activated`](crate::ops::ForwardOps::linear_activated), whatever form the matrix has.
    ///
    /// # Shapes
    /// - `x`: `[n, in]`, `bias`: `[out]`
    /// - returns: `[n, out]`
    pub fn linear_activated(
        &self,
        x: Tensor<B, 2>,
        bias: Option<Tensor<B, 1>>,
        activation: Activation,
    ) -> Tensor<B, 2> {
        match self {
            Self::Dense(param) => B::linear_activated(x, param.val(), bias, activation),
            Self::Packed(_) => B::activate(self.linear(x, bias, None), activation),
        }
    }

    /// `x Wᵀ + residual` and an adapter's share. Beside a quantised matrix the low-rank path stays
    /// separate: nothing is quantised again.
    ///
    /// # Shapes
    /// - `x`: `[n, in]`, `residual`: `[n, out]`
    /// - returns: `[n, out]`
    pub fn adapted_linear(
        &self,
        x: Tensor<B, 2>,
        adapter: &LowRank<B>,
        residual: Option<Tensor<B, 2>>,
    ) -> Tensor<B, 2> {
        match self {
            Self::Dense(param) => {
                let low = B::low_rank_inputs(x.clone(), &[adapter]).remove(0);
                B::adapted_linear(x, param.val(), low, adapter, residual)
            }
            Self::Packed(packed) => B::adapted_linear_quantised(x, packed, adapter, residual),
        }
    }

    /// [`Weight::adapted_linear`] where the adapter's `low` of
    /// [`low_rank_inputs`](crate::ops::ForwardOps::low_rank_inputs) is kept for the backward pass.
    ///
    /// # Shapes
    /// - `x`: `[n, in]`
    /// - `low`: `[n, r]`
    /// - `residual` and result: `[n, out]`
    pub fn adapted_linear_for_backward(
        &self,
        x: Tensor<B, 2>,
        low: Tensor<B, 2>,
        adapter: &LowRank<B>,
        residual: Option<Tensor<B, 2>>,
    ) -> Tensor<B, 2> {
        match self {
            Self::Dense(param) => B::adapted_linear(x, param.val(), low, adapter, residual),
            Self::Packed(packed) => {
                B::adapted_linear_for_backward(x, packed, low, adapter, residual)
            }
        }
    }
}

impl<B: Backend> Module<B> for Weight<B> {
    type Record = Option<<Param<Tensor<B, 2>> as Module<B>>::Record>;

    fn visit<V: ModuleVisitor<B>>(&self, visitor: &mut V) {
        if let Self::Dense(param) = self {
            param.visit(visitor);
        }
    }

    fn map<M: ModuleMapper<B>>(self, mapper: &mut M) -> Self {
        match self {
            Self::Dense(param) => Self::Dense(Module::map(param, mapper)),
            packed => packed,
        }
    }

    fn load_record(self, record: Self::Record) -> Self {
        match (self, record) {
            (Self::Dense(param), Some(record)) => Self::Dense(param.load_record(record)),
            (this, _) => this,
        }
    }

    fn into_record(self) -> Self::Record {
        match self {
            Self::Dense(param) => Some(param.into_record()),
            Self::Packed(_) => None,
        }
    }

    fn to_device(self, device: &B::Device) -> Self {
        match self {
            Self::Dense(param) => Self::Dense(Module::to_device(param, device)),
            Self::Packed(packed) => Self::Packed(packed.to_device(device)),
        }
    }

    fn fork(self, device: &B::Device) -> Self {
        match self {
            Self::Dense(param) => Self::Dense(Module::fork(param, device)),
            Self::Packed(packed) => Self::Packed(packed.to_device(device)),
        }
    }

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        match self {
            Self::Dense(param) => param.collect_devices(devices),
            Self::Packed(packed) => packed.collect_devices(devices),
        }
    }
}

impl<B: AutodiffBackend> AutodiffModule<B> for Weight<B> {
    type InnerModule = Weight<B::InnerBackend>;

    fn valid(&self) -> Self::InnerModule {
        match self {
            Self::Dense(param) => Weight::Dense(param.valid()),
            Self::Packed(packed) => Weight::Packed(packed.inner()),
        }
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        match module {
            Weight::Dense(param) => Self::Dense(AutodiffModule::from_inner(param)),
            Weight::Packed(packed) => Self::Packed(QuantisedWeight::from_inner(packed)),
        }
    }
}

impl<B: Backend> ModuleDisplayDefault for Weight<B> {
    fn content(&self, content: Content) -> Option<Content> {
        match self {
            Self::Dense(param) => content.add_single(param).optional(),
            Self::Packed(packed) => {
                let text = format!("{} {:?}", packed.format(), packed.dims());
                content.add_formatted(&text).optional()
            }
        }
    }
}

impl<B: Backend> ModuleDisplay for Weight<B> {}

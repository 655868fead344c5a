//! Merging adapters into the base weights.

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleMapper, Param},
    prelude::*,
};

use super::attach::LinearMapper;
use crate::{
    ops::{
        Ops,
        cast::{to_dtype, to_f32},
    },
    qwen3_vl::{Qwen3Vl, nn::Linear},
    weights::lora::Lora,
};

/// Detaches every adapter from its layer and keeps it by the path of the weight it belongs to.
struct DetachLora<B: Backend> {
    adapters: HashMap<String, Lora<B>>,
}

impl<B: Ops> LinearMapper<B> for DetachLora<B> {
    fn map_linear(&mut self, path: &str, mut linear: Linear<B>) -> Linear<B> {
        if let Some(lora) = linear.lora.take() {
            self.adapters.insert(format!("{path}.weight"), lora);
        }
        linear
    }
}

/// Adds each adapter to the weight at its path.
struct MergeLora<B: Backend> {
    adapters: HashMap<String, Lora<B>>,
    path: Vec<String>,
}

impl<B: Ops> ModuleMapper<B> for MergeLora<B> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        match self.adapters.remove(&self.path.join(".")) {
            Some(lora) => param.map(|weight| {
                let shape = weight.shape();
                merged(weight.reshape([shape[0], shape[1]]), &lora).reshape(shape)
            }),
            None => param,
        }
    }
}

/// `W + s·B·A`, `[out, in]`, rescaled to the trained magnitudes with DoRA; in f32, then back to the dtype
/// of `W`.
fn merged<B: Ops>(weight: Tensor<B, 2>, lora: &Lora<B>) -> Tensor<B, 2> {
    let dtype = weight.dtype();
    let composed = to_f32(weight.clone()) + lora.delta();
    let composed = match &lora.lora_magnitude_vector {
        Some(magnitude) => {
            let scale = magnitude.val() / lora.composed_row_norms(weight);
            composed * scale.unsqueeze_dim(1)
        }
        None => composed,
    };
    to_dtype(composed, dtype)
}

/// The model for inference: adapters are merged into the weights, or stay beside them where these are
/// quantised, which would have to be quantised again.
pub fn merge_unless_quantised<B: Ops>(model: Qwen3Vl<B>) -> Qwen3Vl<B> {
    match model.quantization() {
        Some(_) => model,
        None => merge(model),
    }
}

/// Merges all attached adapters into the weights; the result has none.
///
/// # Panics
/// If the weights are quantised: they would have to be quantised again.
///
/// Source: `merge_and_unload`, PEFT.
pub fn merge<B: Ops>(model: Qwen3Vl<B>) -> Qwen3Vl<B> {
    let packed = |linear: &Linear<B>| linear.weight.packed().is_some();
    assert!(
        !model.linears().iter().any(|(_, linear)| packed(linear)),
        "adapters are not merged into packed weights"
    );
    let mut detach = DetachLora {
        adapters: HashMap::new(),
    };
    let model = model.map_linears(&mut detach);
    model.map(&mut MergeLora {
        adapters: detach.adapters,
        path: Vec::new(),
    })
}

//! Whole parameters and biases in the place of the base's.

use std::collections::HashMap;

use burn::{
    module::{Module, ModuleMapper, Param, ParamId},
    prelude::*,
    tensor::{DType, TensorData},
};

use super::{Changes, MODULES_TO_SAVE, all_shapes};
use crate::{
    adapters::lora::{
        attach::LinearMapper,
        config::{AdapterError, Bias},
        keys::{Keys, Part},
        source::Source,
        targets::{EMBED_TOKENS, LM_HEAD, PATCH_EMBED},
    },
    ops::{
        Ops,
        cast::{to_dtype, to_f32},
    },
    qwen3_vl::{Qwen3Vl, nn::Linear},
    weights::Weight,
};

/// Puts whole parameters in the place of the base's.
pub(super) fn parameters<B: Ops>(
    model: Qwen3Vl<B>,
    source: &Source<'_>,
    keys: &mut Keys,
    changes: &mut Changes,
) -> Result<Qwen3Vl<B>, AdapterError> {
    let shapes = all_shapes(&model);
    let mut names = HashMap::new();
    for (module, leaf) in parameter_keys(keys) {
        let Some(name) = keys.take(&module, Part::Parameter(leaf.clone())) else {
            continue;
        };
        let mut path = format!("{module}.{leaf}");
        if module == LM_HEAD && model.lm_head.is_none() {
            // A copy of the one table.
            path = format!("{EMBED_TOKENS}.weight");
        }
        let Some(expected) = shapes.get(&path) else {
            return Err(source.mismatch(format!(
                "tensor `{name}` has no place in the model, which has no `{path}`"
            )));
        };
        source.expect(&name, expected)?;
        let key = if source.config.saves(&module) {
            Some(MODULES_TO_SAVE)
        } else if leaf == "bias" && source.config.bias != Bias::None {
            Some("bias")
        } else {
            None
        };
        names.insert(path, (name, key));
    }
    if names.is_empty() {
        return Ok(model);
    }
    let mut replace = Replace {
        names,
        source,
        path: Vec::new(),
        changes,
        error: None,
    };
    let mut model = model.map_linears(&mut replace);
    let table = &mut model.model.language_model.embed_tokens;
    table.weight = replace.matrix(&format!("{EMBED_TOKENS}.weight"), table.weight.clone());
    let model = model.map(&mut replace);
    match replace.error {
        Some(error) => Err(error),
        None => Ok(model),
    }
}

fn parameter_keys(keys: &Keys) -> Vec<(String, String)> {
    let parameters = keys.names.keys().filter_map(|(module, part)| match part {
        Part::Parameter(leaf) => Some((module.clone(), leaf.clone())),
        _ => None,
    });
    parameters.collect()
}

/// Replaces parameters by those of the file, by path.
struct Replace<'a, 'b> {
    /// The tensor's name, and the key that asks for it, by the parameter's path.
    names: HashMap<String, (String, Option<&'static str>)>,
    source: &'a Source<'b>,
    path: Vec<String>,
    changes: &'a mut Changes,
    error: Option<AdapterError>,
}

impl Replace<'_, '_> {
    /// The tensor for the parameter at `path`, where there is one that differs from `base`.
    fn tensor<B: Ops, const D: usize>(
        &mut self,
        path: &str,
        shape: [usize; D],
        dtype: DType,
        device: &B::Device,
        base: impl FnOnce() -> Tensor<B, D>,
    ) -> Option<Tensor<B, D>> {
        if self.error.is_some() {
            return None;
        }
        let (name, key) = self.names.remove(path)?;
        let data = match self.source.file.read(&name, dtype) {
            Ok(data) => data,
            Err(error) => {
                self.error = Some(error.into());
                return None;
            }
        };
        let data = TensorData {
            shape: shape.into(),
            ..data
        };
        let new = Tensor::<B, D>::from_data(data, (device, dtype));
        let key = match key {
            Some(key) => key,
            // PEFT's copies of the base's tables: compared, for a copy says nothing.
            None => {
                let far = to_f32(new.clone() - base()).abs().max();
                if far.into_data().iter::<f32>().all(|far| far == 0.0) {
                    return None;
                }
                self.changes.notes.push(format!(
                    "`{name}` differs from the base's `{path}` and is used in its place, as in PEFT"
                ));
                "save_embedding_layers"
            }
        };
        self.changes.add(path, key);
        Some(new)
    }

    /// [`Self::tensor`] for a matrix that may be quantised; the new one is not.
    fn matrix<B: Ops>(&mut self, path: &str, weight: Weight<B>) -> Weight<B> {
        let Some(packed) = weight.packed() else {
            return weight;
        };
        let (shape, dtype, device) = (packed.dims(), packed.dtype(), packed.device());
        match self.tensor(path, shape, dtype, &device, || weight.val()) {
            Some(new) => Weight::Dense(Param::initialized(ParamId::new(), new)),
            None => weight,
        }
    }
}

impl<B: Ops> LinearMapper<B> for Replace<'_, '_> {
    fn map_linear(&mut self, path: &str, mut linear: Linear<B>) -> Linear<B> {
        linear.weight = self.matrix(&format!("{path}.weight"), linear.weight);
        linear
    }
}

impl<B: Ops> ModuleMapper<B> for Replace<'_, '_> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let path = self.path.join(".");
        if !self.names.contains_key(&path) {
            return param;
        }
        let base = param.val();
        let (shape, dtype, device) = (base.dims(), base.dtype(), base.device());
        match self.tensor(&path, shape, dtype, &device, || base) {
            Some(new) => Param::initialized(param.id, new),
            None => param,
        }
    }
}

/// Adds the biases of `B` to those of linear layers, or gives a layer one.
pub(super) fn biases<B: Ops>(
    mut model: Qwen3Vl<B>,
    source: &Source<'_>,
    keys: &mut Keys,
    changes: &mut Changes,
) -> Result<Qwen3Vl<B>, AdapterError> {
    struct Add<'a, 'b> {
        names: HashMap<String, String>,
        source: &'a Source<'b>,
        changes: &'a mut Changes,
        error: Option<AdapterError>,
    }
    impl Add<'_, '_> {
        fn sum<B: Ops>(
            &mut self,
            path: &str,
            out: usize,
            bias: Option<Tensor<B, 1>>,
            dtype: DType,
            device: &B::Device,
        ) -> Result<Option<Tensor<B, 1>>, AdapterError> {
            let Some(name) = self.names.remove(path) else {
                return Ok(None);
            };
            let scaling = self.source.config.scaling_of(path)?;
            let own = self.source.read::<B, 1>(&name, [out], device)? * scaling;
            self.changes.add(&format!("{path}.bias"), "lora_bias");
            let sum = match bias {
                Some(bias) => to_f32(bias) + own,
                None => own,
            };
            Ok(Some(to_dtype(sum, dtype)))
        }
    }
    impl<B: Ops> LinearMapper<B> for Add<'_, '_> {
        fn map_linear(&mut self, path: &str, mut linear: Linear<B>) -> Linear<B> {
            if self.error.is_some() || !self.names.contains_key(path) {
                return linear;
            }
            let [out, _] = linear.weight.lazy_shape().dims();
            let dtype = match &linear.weight {
                Weight::Dense(weight) => weight.val().dtype(),
                Weight::Packed(packed) => packed.dtype(),
            };
            let bias = linear.bias.as_ref().map(Param::val);
            match self.sum(path, out, bias, dtype, &linear.weight.lazy_device()) {
                Ok(Some(sum)) => linear.bias = Some(Param::initialized(ParamId::new(), sum)),
                Ok(None) => {}
                Err(error) => self.error = Some(error),
            }
            linear
        }
    }
    let mut add = Add {
        names: HashMap::new(),
        source,
        changes,
        error: None,
    };
    for module in keys.modules(&Part::Bias) {
        if let Some(name) = keys.take(&module, Part::Bias) {
            add.names.insert(module, name);
        }
    }
    if add.names.is_empty() {
        return Ok(model);
    }
    if !source.config.lora_bias {
        let name = add.names.values().next().cloned().unwrap_or_default();
        return Err(source.contradiction(format!(
            "it holds `{name}`, and `lora_bias` is not true in `adapter_config.json`"
        )));
    }
    let patches = &mut model.model.visual.patch_embed.proj;
    let bias = patches.bias.val();
    let ([out], dtype, device) = (bias.dims(), bias.dtype(), bias.device());
    if let Some(sum) = add.sum(PATCH_EMBED, out, Some(bias), dtype, &device)? {
        patches.bias = Param::initialized(patches.bias.id, sum);
    }
    let model = model.map_linears(&mut add);
    if let Some(error) = add.error {
        return Err(error);
    }
    match add.names.values().next() {
        Some(name) => Err(source.mismatch(format!("tensor `{name}` has no place in the model"))),
        None => Ok(model),
    }
}

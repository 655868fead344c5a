//! PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

use std::{collections::BTreeMap, io::Write, path::Path};

use burn::{
    module::{Param, ParamId},
    prelude::*,
    tensor::DType,
};

use super::{
    Lora,
    attach::{LinearMapper, attach},
    config::{AdapterError, LoraConfig},
};
use crate::{
    files::write_atomic,
    qwen3_vl::{
        Qwen3Vl,
        nn::Linear,
        weights::{LazyTensor, TensorFile, write_safetensors},
    },
};

const PREFIX: &str = "base_model.model.";
const TENSORS: &str = "adapter_model.safetensors";

/// Replaces the tensors of attached adapters by those of a file.
struct FillLora<'a> {
    file: &'a TensorFile,
    shapes: BTreeMap<String, Vec<usize>>,
    error: Option<AdapterError>,
}

impl FillLora<'_> {
    fn tensor<B: Backend, const D: usize>(
        &mut self,
        names: &[String],
        like: &Param<Tensor<B, D>>,
    ) -> Result<Param<Tensor<B, D>>, AdapterError> {
        let mismatch = |reason| AdapterError::Mismatch {
            path: self.file.path().to_path_buf(),
            reason,
        };
        let found = names.iter().find(|name| self.shapes.contains_key(*name));
        let Some((name, shape)) = found.and_then(|name| Some((name, self.shapes.get(name)?)))
        else {
            return Err(mismatch(format!("tensor `{}` is missing", names[0])));
        };
        let expected = like.shape().to_vec();
        if *shape != expected {
            return Err(mismatch(format!(
                "tensor `{name}` has shape {shape:?}, expected {expected:?}"
            )));
        }
        let data = self.file.read(name, DType::F32)?;
        let tensor = Tensor::from_data(data, (&like.device(), DType::F32));
        self.shapes.remove(&name.clone());
        Ok(Param::initialized(like.id, tensor.require_grad()))
    }

    fn fill<B: Backend>(&mut self, path: &str, lora: &mut Lora<B>) -> Result<(), AdapterError> {
        let name = |part: &str| format!("{PREFIX}{path}.{part}");
        lora.lora_a = self.tensor(&[name("lora_A.weight")], &lora.lora_a)?;
        lora.lora_b = self.tensor(&[name("lora_B.weight")], &lora.lora_b)?;
        if let Some(magnitude) = lora.lora_magnitude_vector.take() {
            let names = [
                name("lora_magnitude_vector"),
                name("lora_magnitude_vector.weight"),
            ];
            lora.lora_magnitude_vector = Some(self.tensor(&names, &magnitude)?);
        }
        Ok(())
    }
}

impl<B: Backend> LinearMapper<B> for FillLora<'_> {
    fn map_linear(&mut self, path: &str, mut linear: Linear<B>) -> Linear<B> {
        if self.error.is_none()
            && let Some(lora) = linear.lora.as_mut()
            && let Err(error) = self.fill(path, lora)
        {
            self.error = Some(error);
        }
        linear
    }
}

/// Attaches the adapter in `dir`, unmerged.
///
/// # Errors
/// [`AdapterError`] names the file and the key or tensor; every tensor of the file must be used.
pub fn load_adapter<B: Backend>(
    model: Qwen3Vl<B>,
    dir: &Path,
) -> Result<(Qwen3Vl<B>, LoraConfig), AdapterError> {
    let config = LoraConfig::from_dir(dir)?;
    let model = load_adapter_tensors(model, &config, dir)?;
    Ok((model, config))
}

/// Attaches the adapter in `dir` to be trained on with the given dropout.
///
/// # Errors
/// As [`load_adapter`].
pub fn load_adapter_for_training<B: Backend>(
    model: Qwen3Vl<B>,
    dir: &Path,
    dropout: f64,
) -> Result<(Qwen3Vl<B>, LoraConfig), AdapterError> {
    let config = LoraConfig {
        lora_dropout: dropout,
        ..LoraConfig::from_dir(dir)?
    };
    let model = load_adapter_tensors(model, &config, dir)?;
    Ok((model, config))
}

/// Attaches the tensors in `dir` under a config read elsewhere.
///
/// # Errors
/// As [`load_adapter`].
pub fn load_adapter_tensors<B: Backend>(
    model: Qwen3Vl<B>,
    config: &LoraConfig,
    dir: &Path,
) -> Result<Qwen3Vl<B>, AdapterError> {
    let (model, _) = attach(model, config, 0)?;
    let file = TensorFile::open(&dir.join(TENSORS))?;
    let mut mapper = FillLora {
        shapes: file.shapes()?,
        file: &file,
        error: None,
    };
    let model = model.map_linears(&mut mapper);
    if let Some(error) = mapper.error {
        return Err(error);
    }
    if let Some((name, _)) = mapper.shapes.first_key_value() {
        return Err(AdapterError::Mismatch {
            path: file.path().to_path_buf(),
            reason: format!(
                "{} tensor(s) have no place in the model, first `{name}`",
                mapper.shapes.len()
            ),
        });
    }
    Ok(model)
}

/// All adapter tensors of a model under PEFT's names, in order of name.
pub fn adapter_tensors<B: Backend>(model: &Qwen3Vl<B>) -> Vec<LazyTensor> {
    fn lazy<B: Backend, const D: usize>(name: String, param: &Param<Tensor<B, D>>) -> LazyTensor {
        let tensor = param.val();
        LazyTensor {
            name,
            shape: tensor.dims().to_vec(),
            dtype: tensor.dtype(),
            data: Box::new(move || tensor.to_data()),
        }
    }
    let mut tensors = Vec::new();
    for (path, linear) in model.linears() {
        if let Some(lora) = &linear.lora {
            let name = |part: &str| format!("{PREFIX}{path}.{part}");
            tensors.push(lazy(name("lora_A.weight"), &lora.lora_a));
            tensors.push(lazy(name("lora_B.weight"), &lora.lora_b));
            if let Some(magnitude) = &lora.lora_magnitude_vector {
                tensors.push(lazy(name("lora_magnitude_vector"), magnitude));
            }
        }
    }
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    tensors
}

/// The ids of all adapter parameters with PEFT's names, in order of name.
pub fn adapter_params<B: Backend>(model: &Qwen3Vl<B>) -> Vec<(String, ParamId)> {
    let mut params = Vec::new();
    for (path, linear) in model.linears() {
        if let Some(lora) = &linear.lora {
            let name = |part: &str| format!("{PREFIX}{path}.{part}");
            params.push((name("lora_A.weight"), lora.lora_a.id));
            params.push((name("lora_B.weight"), lora.lora_b.id));
            if let Some(magnitude) = &lora.lora_magnitude_vector {
                params.push((name("lora_magnitude_vector"), magnitude.id));
            }
        }
    }
    params.sort();
    params
}

/// Writes the attached adapter in PEFT's form.
///
/// # Errors
/// [`AdapterError::File`] names the file.
pub fn save_adapter<B: Backend>(
    model: &Qwen3Vl<B>,
    config: &LoraConfig,
    dir: &Path,
) -> Result<(), AdapterError> {
    let tensors = adapter_tensors(model);
    write_safetensors(&dir.join(TENSORS), &tensors.iter().collect::<Vec<_>>())?;
    write_atomic(&dir.join("adapter_config.json"), |out: &mut dyn Write| {
        out.write_all(config.to_json().as_bytes())
    })?;
    Ok(())
}

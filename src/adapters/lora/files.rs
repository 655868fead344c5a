//! PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.

use std::{collections::BTreeMap, fs, io::Write, path::Path};

use burn::{
    module::{Param, ParamId},
    prelude::*,
    tensor::DType,
};
use serde_json::Value;

use super::{
    attach::{LinearMapper, attach},
    config::{AdapterError, LoraConfig},
};
use crate::{
    base::files::{FileError, sha256_file, write_atomic},
    processor::patches::ImageProcessorConfig,
    qwen3_vl::{
        Qwen3Vl,
        nn::Linear,
        weights::{LazyTensor, TensorFile, write_safetensors},
    },
    weights::lora::Lora,
};

const PREFIX: &str = "base_model.model.";
const TENSORS: &str = "adapter_model.safetensors";

/// SHA-256 of the weights of the adapter in `dir`: two adapters of one base are told apart by it.
///
/// # Errors
/// [`FileError`] if they cannot be read.
pub fn adapter_hash(dir: &Path) -> Result<String, FileError> {
    sha256_file(&dir.join(TENSORS))
}

/// Pixel limits `[min_pixels, max_pixels]` of the run that trained the adapter in `dir`, where its folder
/// says: `trainer_state.json` of this program (a run without limits of its own has the recipe's), or
/// ms-swift's `args.json`. `None` where it does not, as PEFT's folders.
///
/// # Errors
/// [`AdapterError::Parse`] for a damaged file.
pub fn trained_pixel_limits(dir: &Path) -> Result<Option<[usize; 2]>, AdapterError> {
    let read = |name: &str| -> Result<Option<Value>, AdapterError> {
        let path = dir.join(name);
        match fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text)
                .map(Some)
                .map_err(|cause| AdapterError::Parse { path, cause }),
            Err(_) => Ok(None),
        }
    };
    let recipe = ImageProcessorConfig::default();
    let limits = |tree: &Value| {
        let number = |key: &str| Some(tree.get(key)?.as_u64()? as usize);
        [number("min_pixels"), number("max_pixels")]
    };
    // transformers' trainer writes a file of the same name, without the config.
    if let Some(config) = read("trainer_state.json")?
        .as_ref()
        .and_then(|state| state.get("config"))
        .filter(|config| config.get("lora_rank").is_some())
    {
        let [min, max] = limits(config);
        return Ok(Some([
            min.unwrap_or(recipe.min_pixels),
            max.unwrap_or(recipe.max_pixels),
        ]));
    }
    Ok(match read("args.json")?.as_ref().map(limits) {
        Some([min, Some(max)]) => Some([min.unwrap_or(recipe.min_pixels).min(max), max]),
        _ => None,
    })
}

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
            let found = match self.shapes.keys().next() {
                Some(found) => format!("; the file holds names like `{found}`"),
                None => String::new(),
            };
            return Err(mismatch(format!("tensor `{}` is missing{found}", names[0])));
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
        // The second form is what a state dict holds before PEFT drops the adapter's name from its keys.
        let both = |part: &str| {
            [
                name(&format!("{part}.weight")),
                name(&format!("{part}.default.weight")),
            ]
        };
        lora.lora_a = self.tensor(&both("lora_A"), &lora.lora_a)?;
        lora.lora_b = self.tensor(&both("lora_B"), &lora.lora_b)?;
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
    if !dir.join(TENSORS).is_file() && dir.join("adapter_model.bin").is_file() {
        return Err(AdapterError::Folder {
            dir: dir.to_path_buf(),
            hint: format!(
                "it holds `adapter_model.bin`, which is not read here (a pickle may run code), and no `{TENSORS}`; load it in PEFT once and `save_pretrained` it"
            ),
        });
    }
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
        let what = if name.contains("lora_embedding_") || name.contains("embed_tokens") {
            ": adapters of the embedding are not read here"
        } else if name.contains("patch_embed") {
            ": adapters of the patch embedding, a convolution, are not read here"
        } else if name.contains(".base_layer.") {
            ": a copy of the base's own weights is not read here; leave it out with `save_embedding_layers=False`"
        } else {
            ""
        };
        return Err(AdapterError::Mismatch {
            path: file.path().to_path_buf(),
            reason: format!(
                "{} tensor(s) have no place in the model, first `{name}`{what}",
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

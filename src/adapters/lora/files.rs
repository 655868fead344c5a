//! PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`, or `adapter_model.bin`.

use std::{fs, io::Write, path::Path};

use burn::{
    module::{Param, ParamId},
    prelude::*,
};
use serde_json::Value;

use super::{
    attach::LinearMapper,
    base::quantisation_remark,
    base_changes::{Change, MODULES_TO_SAVE, change_base},
    config::{AdapterError, LoraConfig},
    keys::{Keys, PREFIX, Part},
    saved_modules::{saved_tensors, train_saved},
    source::Source,
    targets::{OTHER_LAYERS, TargetMatcher},
};
use crate::{
    base::files::{FileError, sha256_file, write_atomic},
    ops::Ops,
    processor::patches::ImageProcessorConfig,
    qwen3_vl::{
        Qwen3Vl,
        nn::Linear,
        weights::{LazyTensor, TensorFile, write_safetensors},
    },
    weights::lora::Lora,
};

const TENSORS: &str = "adapter_model.safetensors";
const PICKLE: &str = "adapter_model.bin";

/// SHA-256 of the weights of the adapter in `dir`, which identifies it among the adapters of one base.
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

/// Builds the adapters of linear layers from a file's tensors.
struct AttachFromFile<'a> {
    source: &'a Source<'a>,
    keys: &'a mut Keys,
    /// The adapter as training began, whose share is taken off.
    initial: Option<(TensorFile, Keys)>,
    /// Layers that the config asks for; `None` where the file alone says.
    matcher: Option<TargetMatcher>,
    attached: usize,
    error: Option<AdapterError>,
}

impl AttachFromFile<'_> {
    /// The adapter of the layer at `path`, if it has one.
    fn lora<B: Ops>(
        &mut self,
        path: &str,
        [out, d_input]: [usize; 2],
        device: &B::Device,
    ) -> Result<Option<Lora<B>>, AdapterError> {
        let (source, config) = (self.source, self.source.config);
        let names = (self.keys.take(path, Part::A), self.keys.take(path, Part::B));
        let (a, b) = match names {
            (None, None) => match &self.matcher {
                Some(matcher) if matcher.matches(path) => {
                    return Err(source.missing(&format!("{path}.lora_A.weight")));
                }
                _ => return Ok(None),
            },
            (Some(a), Some(b)) => (a, b),
            (Some(_), None) => return Err(source.missing(&format!("{path}.lora_B.weight"))),
            (None, Some(_)) => return Err(source.missing(&format!("{path}.lora_A.weight"))),
        };
        if self
            .matcher
            .as_ref()
            .is_some_and(|matcher| !matcher.matches(path))
        {
            return Err(source.mismatch(format!(
                "tensor `{a}` is of a layer that `target_modules` {} do not match",
                config.target_modules
            )));
        }
        let rank = config.rank_of(path)?;
        let mut a = source.read::<B, 2>(&a, [rank, d_input], device)?;
        let mut b = source.read::<B, 2>(&b, [out, rank], device)?;
        if let Some((file, keys)) = &self.initial {
            let shapes = file.shapes()?;
            let source = Source {
                file,
                config,
                shapes: &shapes,
            };
            let part = |part: Part, end: &str| {
                let name = keys.get(path, part);
                name.ok_or_else(|| source.missing(&format!("{path}.{end}.weight")))
            };
            let first_a = source.read::<B, 2>(part(Part::A, "lora_A")?, [rank, d_input], device)?;
            let first_b = source.read::<B, 2>(part(Part::B, "lora_B")?, [out, rank], device)?;
            a = Tensor::cat(vec![a, first_a], 0);
            b = Tensor::cat(vec![b, -first_b], 1);
        }
        let magnitude = match (config.use_dora, self.keys.take(path, Part::Magnitude)) {
            (true, Some(name)) => Some(source.read::<B, 1>(&name, [out], device)?),
            (false, None) => None,
            (true, None) => {
                return Err(source.missing(&format!("{path}.lora_magnitude_vector")));
            }
            (false, Some(name)) => {
                return Err(source.mismatch(format!(
                    "tensor `{name}` is there, and `use_dora` is not true in `adapter_config.json`"
                )));
            }
        };
        let param =
            |tensor: Tensor<B, 2>| Param::initialized(ParamId::new(), tensor.require_grad());
        let magnitude =
            magnitude.map(|tensor| Param::initialized(ParamId::new(), tensor.require_grad()));
        let lora = Lora::new([param(a), param(b)], magnitude, config.scaling_of(path)?);
        let lora = lora.with_dropout(config.lora_dropout, self.attached);
        self.attached += 1;
        Ok(Some(lora))
    }
}

impl<B: Ops> LinearMapper<B> for AttachFromFile<'_> {
    fn map_linear(&mut self, path: &str, mut linear: Linear<B>) -> Linear<B> {
        if self.error.is_some() {
            return linear;
        }
        let (shape, device) = (
            linear.weight.lazy_shape().dims(),
            linear.weight.lazy_device(),
        );
        match self.lora(path, shape, &device) {
            Ok(Some(_)) if linear.lora.is_some() => {
                let layer = path.to_string();
                self.error = Some(AdapterError::Attached { layer });
            }
            Ok(Some(lora)) => linear.lora = Some(lora),
            Ok(None) => {}
            Err(error) => self.error = Some(error),
        }
        linear
    }
}

/// A model with an adapter attached.
#[derive(Debug)]
pub struct Adapted<B: Backend> {
    /// The model. Low-rank matrices of linear layers are beside them; all else is in the weights already.
    pub model: Qwen3Vl<B>,
    /// The adapter's config.
    pub config: LoraConfig,
    /// What a person should know about how the files were read.
    pub notes: Vec<String>,
    /// Weights of the base that the adapter brings others for.
    pub changed: Vec<Change>,
    /// Whether some of them belong to the language model or its head.
    pub changes_text: bool,
}

/// Attaches the adapter in `dir`, unmerged.
///
/// # Errors
/// [`AdapterError`] names the file and the key or tensor; every tensor of the file must be used.
pub fn load_adapter<B: Ops>(
    model: Qwen3Vl<B>,
    dir: &Path,
) -> Result<(Qwen3Vl<B>, LoraConfig), AdapterError> {
    let adapted = attach_adapter(model, dir)?;
    Ok((adapted.model, adapted.config))
}

/// [`load_adapter`], with all that there is to know about it.
///
/// # Errors
/// As [`load_adapter`].
pub fn attach_adapter<B: Ops>(model: Qwen3Vl<B>, dir: &Path) -> Result<Adapted<B>, AdapterError> {
    attach_tensors(model, LoraConfig::from_dir(dir)?, dir)
}

/// Attaches the adapter in `dir` to be trained on with the given dropout.
///
/// # Errors
/// As [`load_adapter`]; [`AdapterError::ChangesBase`] for one with more than low-rank matrices of linear layers and
/// whole modules (`modules_to_save`), which alone are trained.
pub fn load_adapter_for_training<B: Ops>(
    model: Qwen3Vl<B>,
    dir: &Path,
    dropout: f64,
) -> Result<Adapted<B>, AdapterError> {
    let config = LoraConfig {
        lora_dropout: dropout,
        ..LoraConfig::from_dir(dir)?
    };
    let mut adapted = attach_tensors(model, config, dir)?;
    let others = adapted.changed.iter();
    let mut changed: Vec<String> = others
        .filter(|change| change.key != MODULES_TO_SAVE)
        .map(Change::to_string)
        .collect();
    if adapted.config.initial.is_some() {
        changed.push("all adapted layers by `init_lora_weights`".to_owned());
    }
    if !changed.is_empty() {
        return Err(AdapterError::ChangesBase {
            dir: dir.to_path_buf(),
            changed,
            reason: "training moves low-rank matrices of linear layers and whole modules (`modules_to_save`) only",
        });
    }
    let (model, notes) = train_saved(adapted.model, &adapted.config)?;
    adapted.model = model;
    adapted.notes.extend(notes);
    Ok(adapted)
}

/// Attaches the tensors in `dir` under a config read elsewhere.
///
/// # Errors
/// As [`load_adapter`].
pub fn load_adapter_tensors<B: Ops>(
    model: Qwen3Vl<B>,
    config: &LoraConfig,
    dir: &Path,
) -> Result<Qwen3Vl<B>, AdapterError> {
    Ok(attach_tensors(model, config.clone(), dir)?.model)
}

fn attach_tensors<B: Ops>(
    model: Qwen3Vl<B>,
    config: LoraConfig,
    dir: &Path,
) -> Result<Adapted<B>, AdapterError> {
    let file = open(dir)?;
    let shapes = file.shapes()?;
    let mut keys = Keys::of(shapes.keys(), file.path())?;
    let source = Source {
        file: &file,
        config: &config,
        shapes: &shapes,
    };
    let remark = quantisation_remark(dir, model.quantization());
    let mut notes: Vec<String> = remark.into_iter().map(|(_, english)| english).collect();
    if let Some(mapped) = &keys.mapped {
        notes.push(format!(
            "`{}` names its tensors as another layout does; read {mapped}, and all others likewise",
            file.path().display()
        ));
    }
    let (model, changes) = change_base(model, &source, &mut keys)?;
    let initial = match &config.initial {
        None => None,
        Some(dir) => {
            notes.push(format!(
                "the adapter was trained on a base without the part that `{}` holds; the difference of the two is used, which belongs to the base as it is",
                dir.display()
            ));
            let file = open(dir)?;
            let keys = Keys::of(file.shapes()?.keys(), file.path())?;
            Some((file, keys))
        }
    };
    // Patterns over paths mean the paths of the layout they were written for.
    let matcher = match keys.mapped {
        None => Some(config.matcher()?),
        Some(_) => None,
    };
    if let Some(matcher) = &matcher
        && let Some((layer, _)) = OTHER_LAYERS.iter().find(|(layer, _)| {
            matcher.matches(layer) && !changes.weights.iter().any(|made| made.path.contains(layer))
        })
    {
        return Err(source.mismatch(format!(
            "`target_modules` {} match `{layer}`, and the file holds nothing for it",
            config.target_modules
        )));
    }
    let mut mapper = AttachFromFile {
        source: &source,
        keys: &mut keys,
        initial,
        matcher,
        attached: 0,
        error: None,
    };
    let model = model.map_linears(&mut mapper);
    if let Some(error) = mapper.error {
        return Err(error);
    }
    let attached = mapper.attached;
    if let Some(name) = keys.names.values().next() {
        return Err(source.mismatch(format!(
            "{} tensor(s) have no place in the model, first `{name}`",
            keys.names.len()
        )));
    }
    if attached == 0 && changes.weights.is_empty() {
        return Err(AdapterError::NoTarget {
            targets: config.target_modules.to_string(),
        });
    }
    notes.extend(changes.notes);
    Ok(Adapted {
        model,
        config,
        notes,
        changed: changes.weights,
        changes_text: changes.text,
    })
}

/// Opens the tensors of an adapter; safetensors count, where both are there, as for PEFT.
fn open(dir: &Path) -> Result<TensorFile, AdapterError> {
    let files = [TENSORS, PICKLE].map(|name| dir.join(name));
    let found = files.iter().find(|path| path.is_file());
    Ok(TensorFile::open(found.unwrap_or(&files[0]))?)
}

/// The low-rank matrices and magnitudes of a model under PEFT's names, in order of name.
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
    let mut tensors = adapter_tensors(model);
    tensors.extend(saved_tensors(model, config));
    write_safetensors(&dir.join(TENSORS), &tensors.iter().collect::<Vec<_>>())?;
    write_atomic(&dir.join("adapter_config.json"), |out: &mut dyn Write| {
        out.write_all(config.to_json().as_bytes())
    })?;
    Ok(())
}

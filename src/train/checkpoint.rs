//! Contents of a `checkpoint-N/`: the adapter in PEFT's form (or the whole model), the optimizer's
//! moments and the state of the run.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
};

use burn::{
    module::{Module, ModuleVisitor, Param, ParamId},
    prelude::*,
    tensor::{DType, TensorData},
};
use serde::{Deserialize, Serialize};

use super::{
    config::{TrainConfig, Tuner},
    loss_scale::LossScaleState,
    objective::watch::RewardWatch,
    optimizer::{AdamW, Moments},
};
use crate::{
    adapters::lora::{
        base::BaseFingerprint,
        config::{AdapterError, LoraConfig},
        files::save_adapter,
    },
    base::files::{FileError, write_atomic},
    processor::patches::write_pixel_limits,
    qwen3_vl::{
        Qwen3Vl,
        config::Qwen3VlConfig,
        weights::{
            LazyTensor, MAX_SHARD_BYTES, TensorFile, WeightsError,
            gguf::{self, GgufParts},
            load_checkpoint, save_checkpoint, write_safetensors,
        },
    },
    runtime::accelerator::{Accelerator, TrainAccelerator},
};

const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "trainer_state.json";

/// Why a checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "each variant is the error of the part it names"
)]
pub enum CheckpointError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error("`{}`: {reason}; the checkpoint was written by another run or version", .path.display())]
    State { path: PathBuf, reason: String },
}

impl CheckpointError {
    /// The file error inside, if there is one: it distinguishes a full disk from other failures.
    pub fn into_cause(self) -> Box<dyn std::error::Error + Send + Sync> {
        match self {
            Self::File(error)
            | Self::Adapter(AdapterError::File(error))
            | Self::Adapter(AdapterError::Weights(WeightsError::Write(error)))
            | Self::Weights(WeightsError::Write(error)) => error.into(),
            other => other.into(),
        }
    }
}

/// In place of the fingerprint of a base whose weights are random.
pub const RANDOM_BASE: &str = "random";

/// Progress of a run; all that is random is a function of the seed and the step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainerState {
    /// Optimizer steps done; the next window's number.
    pub step: usize,
    /// Epochs done.
    pub epoch: f64,
    /// Best value of the metric so far, and the step it was reached at.
    pub best: Option<(usize, f64)>,
    /// Validations since the best one.
    pub validations_without_gain: usize,
    /// A validation was put off by an interruption.
    pub validation_due: bool,
    /// Number of devices that share a window.
    pub devices: usize,
    /// Type of the weights.
    pub dtype: String,
    /// The settings the run was started with.
    pub config: TrainConfig,
    /// Fingerprint of the training data.
    pub train_data: String,
    /// Fingerprint of its images; `None` in checkpoints from before it was kept.
    #[serde(default)]
    pub images: Option<String>,
    /// Fingerprint of the base's weights, or [`RANDOM_BASE`]; `None` in checkpoints from before it was
    /// kept.
    #[serde(default)]
    pub base: Option<String>,
    /// What its adapters are trained on, which is written beside each; `None` for random weights, and in
    /// checkpoints from before it was kept.
    #[serde(default)]
    pub trained_on: Option<BaseFingerprint>,
    /// Trained and held-out rewards so far.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward_watch: Option<RewardWatch>,
    /// Of the loss, with weights in f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub loss_scale: Option<LossScaleState>,
    /// Version of this program.
    pub version: String,
}

/// Paths and ids of all trained parameters, in the order of the module tree.
pub fn trained_params<B: Accelerator, M: Module<B>>(module: &M) -> Vec<(String, ParamId)> {
    struct Collect {
        path: Vec<String>,
        params: Vec<(String, ParamId)>,
    }
    impl<B: Backend> ModuleVisitor<B> for Collect {
        fn enter_module(&mut self, name: &str, _container_type: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _name: &str, _container_type: &str) {
            self.path.pop();
        }
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                self.params.push((self.path.join("."), param.id));
            }
        }
    }
    let mut collect = Collect {
        path: Vec::new(),
        params: Vec::new(),
    };
    module.visit(&mut collect);
    collect.params
}

/// Files of a checkpoint folder that are written anew for another checkpoint made from it, or belong to
/// the run or the weights of the old one.
const NOT_COPIED: &[&str] = &[
    "COMPLETE.json",
    "adapter_config.json",
    "args.json",
    "base_fingerprint.json",
    "config.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "quantize_config.json",
    "trainer_state.json",
    "training_args.bin",
];

/// Endings of text that goes with weights: tokenizer, templates, processors, terms and model card.
const COPIED: &[&str] = &[
    "gz", "jinja", "json", "md", "model", "py", "tiktoken", "txt",
];

/// Copies what a checkpoint folder holds besides weights: tokenizer, templates, processor, generation
/// config, licence, model card, and whatever else of that kind a later `AutoProcessor` or ModelScope reads. Those of the
/// tokenizer in `parts`, where one is named, take the place of the model's.
///
/// # Errors
/// [`FileError`] names the file.
pub fn copy_side_files(from: &Path, parts: &GgufParts, to: &Path) -> Result<(), FileError> {
    if let Some(path) = parts
        .tokenizer
        .as_ref()
        .map(|dir| dir.join("tokenizer.json"))
        && !path.is_file()
    {
        return Err(FileError::read(&path, std::io::ErrorKind::NotFound.into()));
    }
    if gguf::is_model(from) {
        return write_gguf_side_files(from, parts, to);
    }
    copy_folder(from, to)?;
    // The tokenizer that was named in place of the model's.
    parts
        .tokenizer
        .as_deref()
        .map_or(Ok(()), |dir| copy_folder(dir, to))
}

/// Copies the files beside the weights of a folder.
fn copy_folder(from: &Path, to: &Path) -> Result<(), FileError> {
    let entries = fs::read_dir(from).map_err(|cause| FileError::read(from, cause))?;
    for entry in entries {
        let source = entry.map_err(|cause| FileError::read(from, cause))?.path();
        let (Some(name), true) = (source.file_name(), source.is_file()) else {
            // Templates by name, as transformers keeps more than one.
            if source.ends_with("additional_chat_templates") {
                let target = to.join("additional_chat_templates");
                fs::create_dir_all(&target).map_err(|cause| FileError::write(&target, cause))?;
                copy_folder(&source, &target)?;
            }
            continue;
        };
        let text = name.to_string_lossy();
        let ending = source.extension().map(|ending| ending.to_string_lossy());
        let kind = match &ending {
            Some(ending) => COPIED.contains(&ending.as_ref()),
            None => ["LICENSE", "NOTICE", "USE_POLICY"].contains(&text.as_ref()),
        };
        if !kind || NOT_COPIED.contains(&text.as_ref()) || text.ends_with(".index.json") {
            continue;
        }
        let target = to.join(name);
        fs::copy(&source, &target).map_err(|cause| FileError::write(&target, cause))?;
    }
    Ok(())
}

/// Writes what goes with the weights of a GGUF: the files of the original checkpoint beside it, else what
/// its metadata says.
fn write_gguf_side_files(from: &Path, parts: &GgufParts, to: &Path) -> Result<(), FileError> {
    let wrong = |cause| FileError::read(from, std::io::Error::other(format!("{cause}")));
    let Some(pair) = gguf::find(from, parts).map_err(wrong)? else {
        return Ok(());
    };
    for (name, own) in pair.side_files() {
        let folder = parts.tokenizer.as_deref().unwrap_or(pair.folder());
        let source = folder.join(name);
        let target = to.join(name);
        if source.is_file() {
            fs::copy(&source, &target).map_err(|cause| FileError::write(&target, cause))?;
        } else if let Some(own) = own {
            write_atomic(&target, |out: &mut dyn Write| out.write_all(&own))?;
        }
    }
    Ok(())
}

/// Name of a type as `config.json` spells it.
pub fn dtype_text(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    }
}

/// Writes a whole model with all that belongs to it into `dir`, with the pixel limits `[min_pixels,
/// max_pixels]` of its training where it was trained here.
///
/// # Errors
/// [`FileError`] names the file.
pub fn save_model<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    base: (&Path, &GgufParts),
    limits: Option<[usize; 2]>,
    dir: &Path,
) -> Result<(), FileError> {
    save_checkpoint(model, dir, MAX_SHARD_BYTES)?;
    let text = config.to_published_json(dtype_text(model.dtype()));
    write_atomic(&dir.join("config.json"), |out: &mut dyn Write| {
        out.write_all(text.as_bytes())
    })?;
    copy_side_files(base.0, base.1, dir)?;
    match limits {
        Some([min_pixels, max_pixels]) => write_pixel_limits(dir, min_pixels, max_pixels),
        None => Ok(()),
    }
}

/// Writes everything into `dir`, which is a fresh folder.
///
/// # Errors
/// [`CheckpointError`] names the file.
pub fn write<B: TrainAccelerator>(
    dir: &Path,
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    lora: &LoraConfig,
    optimizer: &AdamW<B>,
    state: &TrainerState,
) -> Result<(), CheckpointError> {
    match state.config.tuner {
        Tuner::Lora => {
            save_adapter(model, lora, dir)?;
            if let Some(trained_on) = &state.trained_on {
                trained_on.save(dir)?;
            }
        }
        Tuner::Full => {
            let limits = Some(state.config.pixel_limits());
            let parts = state.config.gguf_parts();
            save_model(model, config, (&state.config.model, &parts), limits, dir)?;
        }
    }
    let moments = optimizer.state();
    let mut tensors = Vec::new();
    for (path, id) in trained_params(model) {
        if let Some(Moments {
            steps,
            first,
            second,
        }) = moments.moments.get(&id)
        {
            let steps = *steps as f32;
            tensors.push(LazyTensor {
                name: format!("{path}.step"),
                shape: vec![1],
                dtype: DType::F32,
                data: Box::new(move || TensorData::new(vec![steps], [1])),
            });
            for (part, tensor) in [("exp_avg", first), ("exp_avg_sq", second)] {
                let tensor = tensor.clone();
                tensors.push(LazyTensor {
                    name: format!("{path}.{part}"),
                    shape: tensor.dims().to_vec(),
                    dtype: tensor.dtype(),
                    data: Box::new(move || tensor.to_data()),
                });
            }
        }
    }
    write_safetensors(&dir.join(OPTIMIZER), &tensors.iter().collect::<Vec<_>>())?;
    write_atomic(&dir.join(STATE), |out: &mut dyn Write| {
        serde_json::to_writer_pretty(&mut *out, state)?;
        out.write_all(b"\n")
    })?;
    Ok(())
}

/// Reads the state of a run from its checkpoint.
///
/// # Errors
/// [`CheckpointError::State`], [`CheckpointError::File`].
pub fn read_state(dir: &Path) -> Result<TrainerState, CheckpointError> {
    let path = dir.join(STATE);
    let text = fs::read_to_string(&path).map_err(|cause| FileError::read(&path, cause))?;
    serde_json::from_str(&text).map_err(|cause| CheckpointError::State {
        path,
        reason: cause.to_string(),
    })
}

/// Replaces all parameters of a model by those of a checkpoint.
///
/// # Errors
/// [`CheckpointError`] names the file and the tensor.
pub fn restore_weights<B: Accelerator>(
    dir: &Path,
    mut model: Qwen3Vl<B>,
) -> Result<Qwen3Vl<B>, CheckpointError> {
    let dtype = model.dtype();
    load_checkpoint(&mut model, dir, dtype, &mut |_, _| {})?;
    Ok(model)
}

/// Puts the moments of a checkpoint into an optimizer for `model`, whose ids they are kept under.
///
/// # Errors
/// [`CheckpointError`] names the file and the tensor.
pub fn restore_optimizer<B: TrainAccelerator>(
    dir: &Path,
    model: &Qwen3Vl<B>,
    optimizer: &AdamW<B>,
    steps: usize,
    device: &B::Device,
) -> Result<(), CheckpointError> {
    let file = TensorFile::open(&dir.join(OPTIMIZER))?;
    let shapes = file.shapes()?;
    let mut state = optimizer.state();
    state.moments.clear();
    let mut used = 0;
    for (path, id) in trained_params(model) {
        if !shapes.contains_key(&format!("{path}.exp_avg")) {
            continue;
        }
        let read = |part: &str| -> Result<Tensor<B::InnerBackend, 1>, CheckpointError> {
            let data: TensorData = file.read(&format!("{path}.{part}"), DType::F32)?;
            Ok(Tensor::from_data(data, (device, DType::F32)))
        };
        let own_steps = format!("{path}.step");
        let steps = if shapes.contains_key(&own_steps) {
            used += 1;
            let data = file.read(&own_steps, DType::F32)?;
            data.iter::<f32>().next().unwrap_or_default() as u64
        } else {
            // Checkpoints from before each parameter had its own.
            steps as u64
        };
        let moments = Moments {
            steps,
            first: read("exp_avg")?,
            second: read("exp_avg_sq")?,
        };
        state.moments.insert(id, moments);
        used += 2;
    }
    if used != shapes.len() {
        return Err(CheckpointError::State {
            path: file.path().to_path_buf(),
            reason: format!(
                "{} of {} tensors belong to no trained parameter",
                shapes.len() - used,
                shapes.len()
            ),
        });
    }
    Ok(())
}

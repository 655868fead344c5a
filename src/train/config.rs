//! One run as a file: `configs/*.toml`, every key with its reason there.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use super::{data_key, gradients::GradientOptions, optimizer::AdamWConfig};
use crate::{
    adapters::lora::config::{LoraConfig, TargetModules},
    dataset::{
        Columns, DataOptions,
        loader::{Overlong, WindowPlan},
    },
    processor::patches::ImageProcessorConfig,
    qwen3_vl::layer::Projection,
    schedule::{Schedule, ScheduleKind},
};

pub use crate::base::files::nearest::nearest;

/// Errors in a run's settings.
#[derive(Debug, thiserror::Error)]
pub enum TrainConfigError {
    /// The file cannot be read.
    #[error("cannot read `{}`: {cause}; `configs/` holds examples", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The file is not TOML, or a key is unknown or of another type.
    #[error("`{}`: {reason}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why, with line and key.
        reason: String,
    },
    /// A value cannot be used.
    #[error("key `{key}` is {found}, expected {expected}")]
    Value {
        /// The key.
        key: &'static str,
        /// Its value.
        found: String,
        /// What is allowed.
        expected: &'static str,
    },
}

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tuner {
    /// Low-rank adapters on a frozen base.
    #[default]
    Lora,
    /// The parameters themselves.
    Full,
}

/// What the loss of a step is the mean of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LossReduction {
    /// All target tokens of the step, as in ms-swift.
    #[default]
    Token,
    /// The means of the micro-batches.
    Micro,
}

/// One fine-tuning run. Keys have ms-swift's names where it has the key; `configs/openi-lora.toml` gives the
/// reason for each value of the published recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Folder of the base checkpoint.
    pub model: PathBuf,
    /// PEFT adapter to start from instead of a new one; its own rank, scaling and target modules apply. `lora` only.
    pub adapter: Option<PathBuf>,
    /// Training data: a file (JSONL, JSON, CSV, TSV or Parquet), or `phantom:SEED:FROM..TO[:STYLE]`; several as a list or
    /// with commas, each `[NAME=]PATH[:WEIGHT][#ROWS]`.
    #[serde(deserialize_with = "data_key::name")]
    pub train_data: String,
    /// Validation data in the same forms; `None` does not validate unless `split_dataset_ratio` is set.
    #[serde(deserialize_with = "data_key::optional")]
    pub val_data: Option<String>,
    /// Columns of the data files under other names: our key = the name in the file.
    #[serde(skip_serializing_if = "Columns::is_empty")]
    pub columns: Columns,
    /// Fetches images that rows name by an address on the web, once, into a cache folder.
    pub allow_image_urls: bool,
    /// Share of the training rows held out for validation, in whole studies; 0 holds out none. Excludes `val_data`.
    pub split_dataset_ratio: f64,
    /// Folder of the run: settings, checkpoints, metrics, curves.
    pub output_dir: PathBuf,
    /// Devices, each with a whole copy of the model; empty uses the best one available.
    pub device: Vec<String>,
    /// Type of the base weights: `bf16`, `f16` or `f32`; `None` uses the device's default. Adapters, gradients of
    /// adapters and optimizer moments are f32 in any case.
    pub dtype: Option<String>,
    /// Decides the order of the samples, the initial adapters and the dropout masks.
    pub seed: u64,

    /// Whether adapters or the parameters themselves are trained.
    pub tuner: Tuner,
    /// Rank of the adapters.
    pub lora_rank: usize,
    /// The adapter's output is scaled by `lora_alpha / lora_rank`.
    pub lora_alpha: f64,
    /// Probability of dropping an element of an adapter's input in training.
    pub lora_dropout: f64,
    /// Which linear layers get an adapter: `"all-linear"` (all in the parts that are not frozen), a regular
    /// expression over whole module paths, or a list of last names.
    pub target_modules: TargetModules,
    /// Scales by `lora_alpha / sqrt(lora_rank)` instead (rsLoRA).
    pub use_rslora: bool,
    /// Trains the magnitude of each weight row separately (DoRA).
    pub use_dora: bool,
    /// Keeps the vision tower as it is.
    pub freeze_vit: bool,
    /// Keeps the mergers between vision tower and language model as they are.
    pub freeze_aligner: bool,
    /// Keeps the language model as it is.
    pub freeze_llm: bool,

    /// Passes over the training data; may be a fraction.
    pub num_train_epochs: f64,
    /// Ends the run after this many optimizer steps; 0 runs all epochs.
    pub max_steps: usize,
    /// Samples of a micro-batch on each device.
    pub per_device_train_batch_size: usize,
    /// Micro-batches of an optimizer step on each device.
    pub gradient_accumulation_steps: usize,
    /// Concatenates the samples of a step into rows instead of padding them.
    pub packing: bool,
    /// Tokens of a packed row; 0 means `max_length`.
    pub packing_tokens: usize,
    /// Maximum number of tokens of a sample, image tokens included.
    pub max_length: usize,
    /// What happens to longer samples; nothing is ever truncated.
    pub overlong: Overlong,
    /// Minimum size of a resized image in pixels; `None` means 4,096.
    pub min_pixels: Option<usize>,
    /// Maximum size of a resized image in pixels; `None` means 1,003,520. 1,024 pixels are one token.
    pub max_pixels: Option<usize>,
    /// What the loss of a step is the mean of.
    pub loss_reduction: LossReduction,

    /// Peak learning rate, reached at the end of the warm-up.
    pub learning_rate: f64,
    /// Shape of the learning rate after the warm-up.
    pub lr_scheduler_type: ScheduleKind,
    /// Share of all steps in which the learning rate rises from 0 to its peak.
    pub warmup_ratio: f64,
    /// Decoupled weight decay of AdamW, on all but norms and biases.
    pub weight_decay: f64,
    /// Decay of the first moment (mean of the gradient).
    pub adam_beta1: f64,
    /// Decay of the second moment (mean of its square).
    pub adam_beta2: f64,
    /// Added to the root of the second moment.
    pub adam_epsilon: f64,
    /// The global norm of all gradients is clipped to this; 0 only measures it.
    pub max_grad_norm: f64,
    /// Keeps only the input of each decoder layer and recomputes the layer in the backward pass.
    pub gradient_checkpointing: bool,
    /// Keeps the results of matmuls and recomputes norms, rotation and SwiGLU in the backward pass; without
    /// `gradient_checkpointing` only.
    pub recompute_pointwise: bool,
    /// GiB of device memory that the run may use. Sets `packing`, `packing_tokens`, `gradient_checkpointing` and
    /// `recompute_pointwise`; the samples of a step and the loss do not change.
    pub memory_budget: Option<f64>,
    /// Computes every 50th step twice and ends the run if loss or gradients differ in a single bit.
    pub deterministic: bool,
    /// `gradient_checkpointing` for the vision tower; no effect while it is frozen.
    pub vit_gradient_checkpointing: bool,

    /// Steps between two progress lines where there is no dashboard; 0 prints some 50 lines a run.
    pub logging_steps: usize,
    /// Steps between two validations; 0 validates only at the end.
    pub eval_steps: usize,
    /// Number of held-out reports that are generated and scored at each validation, before the first step, and
    /// at the end once more with the images swapped between studies.
    pub eval_generate: usize,
    /// Maximum number of tokens of such a report.
    pub eval_max_new_tokens: usize,
    /// Samples of a batch in validation and generation.
    pub per_device_eval_batch_size: usize,
    /// What selects the best checkpoint: one of [`BEST_METRICS`].
    pub metric_for_best_model: String,
    /// Ends the run after this many validations without a better value; 0 never does.
    pub early_stopping_patience: usize,
    /// Steps between two checkpoints; a checkpoint is also saved at each new best value, at the end and on
    /// interruption. 0 saves only then.
    pub save_steps: usize,
    /// Number of newest checkpoints to keep; the best one is kept in addition.
    pub save_total_limit: usize,
    /// Threads that read and resize images ahead of the device.
    pub dataloader_num_workers: usize,
    /// Seconds that several devices wait for each other and for samples before the run ends with an error.
    pub ddp_timeout: f64,
}

impl Default for TrainConfig {
    /// The published recipe.
    fn default() -> Self {
        Self {
            model: "model/tiny".into(),
            adapter: None,
            train_data: "data/sample/train/samples.jsonl".into(),
            val_data: None,
            columns: Columns::default(),
            allow_image_urls: false,
            split_dataset_ratio: 0.0,
            output_dir: "artifacts/run".into(),
            device: Vec::new(),
            dtype: None,
            seed: 42,
            tuner: Tuner::Lora,
            lora_rank: 8,
            lora_alpha: 32.0,
            lora_dropout: 0.05,
            target_modules: TargetModules::default(),
            use_rslora: false,
            use_dora: false,
            freeze_vit: true,
            freeze_aligner: true,
            freeze_llm: false,
            num_train_epochs: 3.0,
            max_steps: 0,
            per_device_train_batch_size: 1,
            gradient_accumulation_steps: 16,
            packing: false,
            packing_tokens: 0,
            max_length: 2048,
            overlong: Overlong::Error,
            min_pixels: None,
            max_pixels: None,
            loss_reduction: LossReduction::Token,
            learning_rate: 1e-4,
            lr_scheduler_type: ScheduleKind::Cosine,
            warmup_ratio: 0.05,
            weight_decay: 0.1,
            adam_beta1: 0.9,
            adam_beta2: 0.95,
            adam_epsilon: 1e-8,
            max_grad_norm: 1.0,
            gradient_checkpointing: true,
            recompute_pointwise: false,
            memory_budget: None,
            deterministic: false,
            vit_gradient_checkpointing: true,
            logging_steps: 0,
            eval_steps: 100,
            eval_generate: 0,
            eval_max_new_tokens: 512,
            per_device_eval_batch_size: 4,
            metric_for_best_model: "eval_loss".into(),
            early_stopping_patience: 0,
            save_steps: 100,
            save_total_limit: 3,
            dataloader_num_workers: 1,
            ddp_timeout: 1800.0,
        }
    }
}

/// Metrics that may choose the best checkpoint, and whether more is better.
pub const BEST_METRICS: &[(&str, bool)] = &[
    ("eval_loss", false),
    ("eval_token_acc", true),
    ("eval_rouge_l", true),
    ("eval_finding_f1", true),
];

/// Keys that may differ between a run and its continuation: they change no number of it. The number of
/// devices and the dtype are compared by themselves.
const FREE_ON_RESUME: &[&str] = &[
    "output_dir",
    "allow_image_urls",
    "device",
    "dtype",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "dataloader_num_workers",
    "ddp_timeout",
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "recompute_pointwise",
    "memory_budget",
    "deterministic",
    "vit_gradient_checkpointing",
];

impl TrainConfig {
    /// Reads a file.
    ///
    /// # Errors
    /// [`TrainConfigError`] names the file and the key.
    pub fn from_file(path: &Path) -> Result<Self, TrainConfigError> {
        let text = fs::read_to_string(path).map_err(|cause| TrainConfigError::Read {
            path: path.to_path_buf(),
            cause,
        })?;
        toml::from_str(&text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = text.as_bytes()[..at]
                .iter()
                .filter(|byte| **byte == b'\n')
                .count()
                + 1;
            TrainConfigError::Parse {
                path: path.to_path_buf(),
                reason: format!("line {line}: {}", explain(error.message())),
            }
        })
    }

    /// Names of all keys.
    pub fn keys() -> Vec<String> {
        // An unknown key is answered with all that are known.
        let refused = toml::from_str::<Self>("no_such_key = 0");
        let answer = refused.err().map(|error| error.message().to_string());
        let words = answer.as_deref().unwrap_or_default().split('`');
        // Every second piece is in backticks; the first of them is the unknown key itself.
        words.skip(3).step_by(2).map(str::to_string).collect()
    }

    /// How the data files are read.
    pub fn data_options(&self) -> DataOptions {
        DataOptions {
            columns: self.columns.clone(),
            allow_image_urls: self.allow_image_urls,
            seed: self.seed,
            ..DataOptions::default()
        }
    }

    /// The file's text.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
    }

    /// Smallest and largest size an image is scaled to, in pixels: the keys, else the recipe's.
    pub fn pixel_limits(&self) -> [usize; 2] {
        let recipe = ImageProcessorConfig::default();
        [
            self.min_pixels.unwrap_or(recipe.min_pixels),
            self.max_pixels.unwrap_or(recipe.max_pixels),
        ]
    }

    /// Checks the keys alone and against each other.
    ///
    /// # Errors
    /// The first key that cannot be used.
    pub fn validate(&self) -> Result<(), TrainConfigError> {
        fn check(
            ok: bool,
            key: &'static str,
            found: impl ToString,
            expected: &'static str,
        ) -> Result<(), TrainConfigError> {
            if ok {
                Ok(())
            } else {
                Err(TrainConfigError::Value {
                    key,
                    found: found.to_string(),
                    expected,
                })
            }
        }
        let positive = "a positive number";
        check(
            self.num_train_epochs > 0.0 && self.num_train_epochs.is_finite(),
            "num_train_epochs",
            self.num_train_epochs,
            positive,
        )?;
        check(
            self.per_device_train_batch_size > 0,
            "per_device_train_batch_size",
            0,
            positive,
        )?;
        check(
            self.per_device_eval_batch_size > 0,
            "per_device_eval_batch_size",
            0,
            positive,
        )?;
        check(
            self.gradient_accumulation_steps > 0,
            "gradient_accumulation_steps",
            0,
            positive,
        )?;
        check(
            self.max_length > 1,
            "max_length",
            self.max_length,
            "at least 2 tokens",
        )?;
        check(
            self.packing || self.packing_tokens == 0,
            "packing_tokens",
            self.packing_tokens,
            "0, or `packing = true`",
        )?;
        check(
            !self.packing || self.loss_reduction == LossReduction::Token,
            "loss_reduction",
            "micro",
            "token with `packing`: a packed row joins samples of several micro-batches",
        )?;
        check(
            self.memory_budget
                .is_none_or(|gib| gib > 0.0 && gib.is_finite()),
            "memory_budget",
            self.memory_budget.unwrap_or_default(),
            "a positive number of GiB",
        )?;
        check(self.lora_rank > 0, "lora_rank", 0, positive)?;
        check(
            (0.0..1.0).contains(&self.lora_dropout),
            "lora_dropout",
            self.lora_dropout,
            "0 or more and less than 1",
        )?;
        check(
            self.learning_rate > 0.0 && self.learning_rate.is_finite(),
            "learning_rate",
            self.learning_rate,
            positive,
        )?;
        check(
            (0.0..=1.0).contains(&self.warmup_ratio),
            "warmup_ratio",
            self.warmup_ratio,
            "0 to 1",
        )?;
        check(
            (0.0..1.0).contains(&self.adam_beta1),
            "adam_beta1",
            self.adam_beta1,
            "0 or more and less than 1",
        )?;
        check(
            (0.0..1.0).contains(&self.adam_beta2),
            "adam_beta2",
            self.adam_beta2,
            "0 or more and less than 1",
        )?;
        check(
            self.weight_decay >= 0.0,
            "weight_decay",
            self.weight_decay,
            "0 or more",
        )?;
        check(
            self.max_grad_norm >= 0.0,
            "max_grad_norm",
            self.max_grad_norm,
            "0 (off) or more",
        )?;
        check(
            self.ddp_timeout > 0.0 && self.ddp_timeout <= 1e9,
            "ddp_timeout",
            self.ddp_timeout,
            "a positive number of seconds",
        )?;
        check(self.save_total_limit > 0, "save_total_limit", 0, positive)?;
        check(
            !(self.freeze_vit && self.freeze_aligner && self.freeze_llm),
            "freeze_llm",
            true,
            "false: with freeze_vit and freeze_aligner nothing is left to train",
        )?;
        check(
            BEST_METRICS
                .iter()
                .any(|(name, _)| *name == self.metric_for_best_model),
            "metric_for_best_model",
            &self.metric_for_best_model,
            "eval_loss, eval_token_acc, eval_rouge_l or eval_finding_f1",
        )?;
        let bare = match &self.target_modules {
            TargetModules::Pattern(pattern) if pattern != "all-linear" => {
                let is_name = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
                pattern.bytes().all(is_name).then_some(pattern.as_str())
            }
            _ => None,
        };
        check(
            bare.is_none(),
            "target_modules",
            format!("\"{}\"", bare.unwrap_or_default()),
            "a list of names such as [\"q_proj\"], \"all-linear\", or a regular expression over whole paths, which a single name never matches",
        )?;
        let generated = ["eval_rouge_l", "eval_finding_f1"];
        check(
            self.tuner == Tuner::Lora || self.adapter.is_none(),
            "adapter",
            "given",
            "it absent with `tuner = \"full\"`; merge it into the model first",
        )?;
        check(
            (0.0..1.0).contains(&self.split_dataset_ratio),
            "split_dataset_ratio",
            self.split_dataset_ratio,
            "0 or more and less than 1",
        )?;
        check(
            self.split_dataset_ratio == 0.0 || self.val_data.is_none(),
            "split_dataset_ratio",
            self.split_dataset_ratio,
            "0 with `val_data`: the run validates on one of them",
        )?;
        check(
            self.early_stopping_patience == 0 || self.validates(),
            "early_stopping_patience",
            self.early_stopping_patience,
            "0, or `val_data` or `split_dataset_ratio` to validate on",
        )?;
        check(
            self.eval_generate > 0 || !generated.contains(&self.metric_for_best_model.as_str()),
            "metric_for_best_model",
            &self.metric_for_best_model,
            "a metric that needs no generated reports, or `eval_generate` above 0",
        )
    }

    /// Whether the run validates: on data of its own, or on what is held out of the training data.
    pub fn validates(&self) -> bool {
        self.val_data.is_some() || self.split_dataset_ratio > 0.0
    }

    /// Whether more of the metric for the best checkpoint is better.
    pub fn more_is_better(&self) -> bool {
        BEST_METRICS
            .iter()
            .any(|(name, more)| *name == self.metric_for_best_model && *more)
    }

    /// The adapter's settings; `all-linear` means what the freeze flags leave, as in ms-swift.
    pub fn lora_config(&self) -> LoraConfig {
        let target_modules = match &self.target_modules {
            TargetModules::Pattern(pattern) if pattern == "all-linear" => {
                let mut parts = Vec::new();
                if !self.freeze_llm {
                    let names = Projection::ALL.map(Projection::name).join("|");
                    parts.push(format!(r"model\.language_model\..*\.({names})"));
                }
                if !self.freeze_vit {
                    parts.push(
                        r"model\.visual\.blocks\..*\.(qkv|proj|linear_fc1|linear_fc2)".to_string(),
                    );
                }
                if !self.freeze_aligner {
                    parts.push(r"model\.visual\.(merger|deepstack_merger_list\.\d+)\.(linear_fc1|linear_fc2)".to_string());
                }
                TargetModules::Pattern(format!("^({})$", parts.join("|")))
            }
            other => other.clone(),
        };
        LoraConfig {
            r: self.lora_rank,
            lora_alpha: self.lora_alpha,
            lora_dropout: self.lora_dropout,
            target_modules,
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            base_model_name_or_path: Some(self.model.display().to_string()),
            ..LoraConfig::default()
        }
    }

    /// Tokens of a packed row; `None` when samples are padded.
    pub fn row_tokens(&self) -> Option<usize> {
        self.packing.then_some(match self.packing_tokens {
            0 => self.max_length,
            tokens => tokens,
        })
    }

    /// How samples become windows on `devices` devices.
    pub fn window_plan(&self, devices: usize) -> WindowPlan {
        WindowPlan {
            epochs: self.num_train_epochs,
            batch_size: self.per_device_train_batch_size,
            accumulation: self.gradient_accumulation_steps,
            devices,
            packing_tokens: self.row_tokens().unwrap_or(0),
            max_length: self.max_length,
            overlong: self.overlong,
            seed: self.seed,
            in_order: false,
        }
    }

    /// Windows of a validation set: in order, once.
    pub fn validation_plan(&self) -> WindowPlan {
        WindowPlan {
            epochs: 1.0,
            batch_size: self.per_device_eval_batch_size,
            accumulation: 1,
            devices: 1,
            packing_tokens: 0,
            in_order: true,
            ..self.window_plan(1)
        }
    }

    /// Optimizer steps over `samples` samples on `devices` devices.
    pub fn total_steps(&self, samples: usize, devices: usize) -> usize {
        let steps = self.window_plan(devices).total_steps(samples);
        match self.max_steps {
            0 => steps,
            most => steps.min(most),
        }
    }

    /// The learning rate of each step.
    pub fn schedule(&self, total_steps: usize) -> Schedule {
        Schedule::new(
            self.lr_scheduler_type,
            self.learning_rate,
            self.warmup_ratio,
            total_steps as u64,
        )
    }

    /// How long devices of a run wait for each other and for samples.
    pub fn patience(&self) -> Duration {
        Duration::from_secs_f64(self.ddp_timeout)
    }

    /// Settings of the optimizer.
    pub fn adamw(&self) -> AdamWConfig {
        AdamWConfig {
            beta1: self.adam_beta1,
            beta2: self.adam_beta2,
            epsilon: self.adam_epsilon,
            weight_decay: self.weight_decay,
        }
    }

    /// Whether only adapters of the language model are trained, so that the manual backward pass is used
    /// and no graph is recorded.
    pub fn writes_gradients_out(&self) -> bool {
        let text_only = self.freeze_vit && self.freeze_aligner && !self.freeze_llm;
        self.tuner == Tuner::Lora && text_only && !self.use_dora
    }

    /// What is recomputed.
    pub fn gradient_options(&self, dropout_seed: Option<u64>) -> GradientOptions {
        GradientOptions {
            checkpoint_text: self.gradient_checkpointing,
            recompute_pointwise: self.recompute_pointwise,
            checkpoint_vision: self.vit_gradient_checkpointing,
            dropout_seed,
            manual_backward: true,
        }
    }

    /// Keys in which a continued run would differ from this one: `(key, here, there)`.
    pub fn differences(&self, other: &Self) -> Vec<(String, String, String)> {
        let table = |config: &Self| toml::Table::try_from(config).unwrap_or_default();
        let (ours, theirs) = (table(self), table(other));
        let mut keys: Vec<&String> = ours.keys().chain(theirs.keys()).collect();
        keys.sort();
        keys.dedup();
        keys.into_iter()
            .filter(|key| {
                !FREE_ON_RESUME.contains(&key.as_str()) && ours.get(*key) != theirs.get(*key)
            })
            .map(|key| {
                let text = |table: &toml::Table| {
                    table
                        .get(key)
                        .map_or_else(|| "absent".to_string(), toml::Value::to_string)
                };
                (key.clone(), text(&ours), text(&theirs))
            })
            .collect()
    }
}

/// What toml says of a key or a value, in the words of this file.
pub fn explain(message: &str) -> String {
    let words = message.replace('\n', " ");
    if let Some((_, rest)) = words.split_once("unknown field `")
        && let Some((key, _)) = rest.split_once('`')
    {
        return unknown_key(key);
    }
    [
        ("expected usize", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected a string", "expected text"),
        ("invalid type: ", ""),
        ("invalid value: ", ""),
    ]
    .iter()
    .fold(words, |words, (from, to)| words.replace(from, to))
    .trim()
    .to_string()
}

/// Says that a key is none, and which may be meant.
pub fn unknown_key(key: &str) -> String {
    let known = TrainConfig::keys();
    match nearest(key, known.iter().map(String::as_str)) {
        Some(near) => format!("unknown key `{key}`; did you mean `{near}`?"),
        None => format!("unknown key `{key}`; `configs/openi-lora.toml` explains every key"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_all_that_a_file_may_hold() {
        let keys = TrainConfig::keys();
        for key in [
            "model",
            "adapter",
            "memory_budget",
            "logging_steps",
            "ddp_timeout",
        ] {
            assert!(
                keys.iter().any(|known| known == key),
                "no `{key}` in {keys:?}"
            );
        }
        assert!(!keys.iter().any(|key| key == "no_such_key"));
    }

    #[test]
    fn the_recipe_takes_573_steps_on_two_devices() {
        assert_eq!(TrainConfig::default().total_steps(6102, 2), 573);
    }

    #[test]
    fn every_file_in_configs_is_valid() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let mut seen = 0;
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            TrainConfig::from_file(&path).unwrap().validate().unwrap();
            seen += 1;
        }
        assert!(seen >= 3);
    }

    #[test]
    fn an_unknown_key_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        fs::write(&path, "learning_rat = 1.0\n").unwrap();
        let error = TrainConfig::from_file(&path).unwrap_err().to_string();
        assert!(
            error.contains(
                "run.toml`: line 1: unknown key `learning_rat`; did you mean `learning_rate`?"
            ),
            "{error}"
        );
    }

    #[test]
    fn differences_name_the_key_and_both_values() {
        let here = TrainConfig::default();
        let there = TrainConfig {
            learning_rate: 2e-4,
            save_steps: 7,
            ..TrainConfig::default()
        };
        let differences = here.differences(&there);
        assert_eq!(differences.len(), 1);
        assert_eq!(differences[0].0, "learning_rate");
    }

    #[test]
    fn all_linear_means_what_the_freeze_flags_leave() {
        let text = "model.language_model.layers.0.mlp.up_proj";
        let visual = "model.visual.blocks.1.attn.qkv";
        let aligner = "model.visual.deepstack_merger_list.0.linear_fc1";
        let matched = |config: &TrainConfig| {
            let matcher = config.lora_config().matcher().unwrap();
            [text, visual, aligner].map(|path| matcher.matches(path))
        };
        assert_eq!(matched(&TrainConfig::default()), [true, false, false]);
        let config = TrainConfig {
            freeze_vit: false,
            freeze_llm: true,
            ..TrainConfig::default()
        };
        assert_eq!(matched(&config), [false, true, false]);
        let config = TrainConfig {
            freeze_aligner: false,
            ..TrainConfig::default()
        };
        assert_eq!(matched(&config), [true, false, true]);
    }
}

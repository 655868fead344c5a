//! One run as a file: `configs/*.toml`, every key with its reason there.

mod checks;
mod derived;
mod messages;
mod objective;
pub mod schema;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    data_key,
    objective::{
        advantages::ScaleRewards,
        rewards::{RewardConfig, RewardError},
        settings::{LossType, Objective, RatioLevelKey, ReferenceKey},
    },
};
use crate::{
    adapters::lora::config::TargetModules,
    dataset::{Columns, DataOptions, loader::Overlong},
    qwen3_vl::weights::gguf::GgufParts,
    schedule::ScheduleKind,
};

pub use crate::base::files::nearest::nearest;
pub use messages::{explain, unknown_key};
pub use objective::RolloutPlan;

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
    /// A format of quantised weights that there is not.
    #[error("key `quantize`: {0}")]
    Quantize(String),
    /// A reward in one of the lists.
    #[error("key `rewards` or `held_out_rewards`: {0}")]
    Reward(RewardError),
}

/// What is trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Tuner {
    /// Low-rank adapters on a frozen base.
    #[default]
    Lora,
    /// The parameters themselves.
    Full,
}

/// What the loss of a step is the mean of.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum LossReduction {
    /// All target tokens of the step, as in ms-swift.
    #[default]
    Token,
    /// The means of the micro-batches.
    Micro,
}

/// Where the measured values of a run go, besides `metrics.jsonl`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Reporter {
    /// Event files for TensorBoard, in `OUTPUT_DIR/tensorboard`.
    Tensorboard,
    /// The program of `report_command`, as JSON lines.
    Command,
}

/// One fine-tuning run. Keys have ms-swift's names where it has the key; `configs/openi-lora.toml` gives the
/// reason for each value of the published recipe.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct TrainConfig {
    /// Folder of the base checkpoint; commands also take its name on a hub.
    pub model: PathBuf,
    /// With a `model` in GGUF: the file of its vision tower; without it, the only mmproj file beside it.
    pub mmproj: Option<PathBuf>,
    /// Folder with tokenizer, chat template and image processor in place of the model's, for a GGUF that lacks them.
    pub tokenizer: Option<PathBuf>,
    /// PEFT adapter to start from instead of a new one; its own rank, scaling and target modules apply. `lora` only.
    pub adapter: Option<PathBuf>,
    /// Training data: a file (JSONL, JSON, CSV, TSV or Parquet), or `phantom:SEED:FROM..TO[:STYLE]`; several as a list or
    /// with commas, each `[NAME=]PATH[:WEIGHT][#ROWS]`.
    #[serde(deserialize_with = "data_key::name")]
    #[schemars(schema_with = "schema::data_sets")]
    pub train_data: String,
    /// Validation data in the same forms; without it the run validates only if `split_dataset_ratio` is set.
    #[serde(deserialize_with = "data_key::optional")]
    #[schemars(schema_with = "schema::data_sets")]
    pub val_data: Option<String>,
    /// Columns of the data files under other names: our key = the name in the file.
    #[serde(skip_serializing_if = "Columns::is_empty")]
    #[schemars(with = "BTreeMap<String, String>")]
    pub columns: Columns,
    /// Fetches images that rows name by an address on the web, once, into a cache folder.
    pub allow_image_urls: bool,
    /// Share of the training rows held out for validation, in whole studies; 0 holds out none. Excludes `val_data`.
    pub split_dataset_ratio: f64,
    /// Folder of the run: settings, checkpoints, metrics, curves.
    pub output_dir: PathBuf,
    /// Devices, each with a whole copy of the model; empty uses the best one available.
    pub device: Vec<String>,
    /// Type of the base weights: `bf16`, `f16` or `f32`; without it, the device's default. Adapters, gradients of
    /// adapters and optimizer moments are f32 in any case.
    pub dtype: Option<String>,
    /// Quantises the base weights while they are loaded, `int8`, `int4` (groups of 64) or `int4:32`, and trains
    /// adapters beside them (QLoRA). A folder that `quantize` wrote needs no key.
    pub quantize: Option<String>,
    /// Decides the order of the samples, the initial adapters and the dropout masks.
    pub seed: u64,

    /// What is minimised: `sft` the cross-entropy of the answers in the data, `dpo` a preference loss over rows with
    /// `rejected_response` or `rejected_messages`, `grpo` a policy loss over rewards of the model's own answers.
    pub objective: Objective,
    /// How strongly the reference holds: 0.1 with `dpo`, 0.04 with `grpo` where it is absent; 0 needs no reference.
    pub beta: Option<f64>,
    /// Form of the loss: `sigmoid` (the default) or `ipo` with `dpo`; `grpo` (the default), `dr_grpo` or `dapo` with `grpo`.
    pub loss_type: Option<LossType>,
    /// Weights that an objective measures from: `start`, those that the run starts from, or `base`, without any adapter.
    pub reference: ReferenceKey,
    /// `dpo`: share of pairs that are taken to be the wrong way round.
    pub label_smoothing: f64,
    /// `dpo`: weight of the cross-entropy of the chosen answers beside the preference loss.
    pub rpo_alpha: f64,
    /// `grpo`: answers drawn for each question; they are compared with each other.
    pub num_generations: usize,
    /// `grpo`: passes over the answers of a rollout.
    pub num_iterations: usize,
    /// `grpo`: optimizer steps that the answers of a rollout are divided into.
    pub steps_per_generation: usize,
    /// `grpo`: probability ratios below `1 - epsilon` are clipped, and above `1 + epsilon` where `epsilon_high` is absent.
    pub epsilon: f64,
    /// `grpo`: probability ratios above `1 + epsilon_high` are clipped.
    pub epsilon_high: Option<f64>,
    /// `grpo`: what has one probability ratio: each `token`, or each `sequence` (GSPO).
    pub importance_sampling_level: RatioLevelKey,
    /// `grpo`: what differences from a group's mean reward are divided by: the standard deviation of the `group` or of the
    /// `batch`, or `none` (Dr. GRPO).
    pub scale_rewards: ScaleRewards,
    /// `grpo`: temperature of the draws, and of the probabilities that are trained.
    pub temperature: f64,
    /// `grpo`: most tokens of a drawn answer.
    pub max_completion_length: usize,
    /// `grpo`: what is rewarded, as a list of `{ kind = "finding_f1", weight = 1.0 }`.
    pub rewards: Vec<RewardConfig>,
    /// `grpo`: rewards that are measured beside and not trained on: they show when a reward is gamed.
    pub held_out_rewards: Vec<RewardConfig>,
    /// `grpo`: table of words that reads findings, `openi`, `hospital`, `english` or a file; guessed from the data where absent.
    pub reward_rules: Option<String>,
    /// `grpo`: ends the run after this many rollouts in a row in which the held-out rewards are below their best while the
    /// trained ones are above what they were then; 0 never does.
    pub reward_patience: usize,
    /// `grpo`: steps between two samples of rollouts with their rewards in the run's folder; 0 writes none.
    pub rollout_steps: usize,

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
    /// Modules that are trained whole beside the adapters and stored with them, by the ends of their paths, such as
    /// `["lm_head", "embed_tokens"]`; they keep the type of the base. `lora` only.
    pub modules_to_save: Vec<String>,
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
    /// Minimum size of a resized image in pixels; 4,096 if absent.
    pub min_pixels: Option<usize>,
    /// Maximum size of a resized image in pixels; 1,003,520 if absent. 1,024 pixels are one token.
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
    /// Where the measured values go besides `metrics.jsonl`: `tensorboard` (event files), `command` (the program of
    /// `report_command`), both, or nowhere.
    pub report_to: Vec<Reporter>,
    /// Program and arguments that are given each measured value as a JSON line, such as
    /// `["python3", "configs/hooks/wandb_log.py"]`; with `command` in `report_to`. A program that fails does not end the run.
    pub report_command: Vec<String>,
    /// Steps between two validations; 0 validates only at the end.
    pub eval_steps: usize,
    /// Number of held-out reports that are generated and scored at each validation, before the first step, and
    /// at the end once more with the images swapped between studies.
    pub eval_generate: usize,
    /// Maximum number of tokens of such a report.
    pub eval_max_new_tokens: usize,
    /// Samples of a batch in validation and generation.
    pub per_device_eval_batch_size: usize,
    /// What selects the best checkpoint: `eval_loss` or `eval_token_acc`; with `eval_generate` also `eval_rouge_l`
    /// or `eval_finding_f1`.
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
            mmproj: None,
            tokenizer: None,
            adapter: None,
            train_data: "data/sample/train/samples.jsonl".into(),
            val_data: None,
            columns: Columns::default(),
            allow_image_urls: false,
            split_dataset_ratio: 0.0,
            output_dir: "artifacts/run".into(),
            device: Vec::new(),
            dtype: None,
            quantize: None,
            seed: 42,
            objective: Objective::Sft,
            beta: None,
            loss_type: None,
            reference: ReferenceKey::Start,
            label_smoothing: 0.0,
            rpo_alpha: 0.0,
            num_generations: 8,
            num_iterations: 1,
            steps_per_generation: 1,
            epsilon: 0.2,
            epsilon_high: None,
            importance_sampling_level: RatioLevelKey::Token,
            scale_rewards: ScaleRewards::Group,
            temperature: 1.0,
            max_completion_length: 512,
            rewards: Vec::new(),
            held_out_rewards: Vec::new(),
            reward_rules: None,
            reward_patience: 0,
            rollout_steps: 50,
            tuner: Tuner::Lora,
            lora_rank: 8,
            lora_alpha: 32.0,
            lora_dropout: 0.05,
            target_modules: TargetModules::default(),
            modules_to_save: Vec::new(),
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
            report_to: vec![Reporter::Tensorboard],
            report_command: Vec::new(),
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
    "report_to",
    "report_command",
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
    "rollout_steps",
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

    /// The files that go with a model in GGUF.
    pub fn gguf_parts(&self) -> GgufParts {
        GgufParts {
            mmproj: self.mmproj.clone(),
            tokenizer: self.tokenizer.clone(),
        }
    }

    /// How the data files are read.
    pub fn data_options(&self) -> DataOptions {
        DataOptions {
            columns: self.columns.clone(),
            allow_image_urls: self.allow_image_urls,
            seed: self.seed,
            pairs: self.objective == Objective::Dpo,
            ..DataOptions::default()
        }
    }

    /// The file's text.
    pub fn to_toml(&self) -> String {
        toml::to_string_pretty(self).unwrap_or_default()
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
    fn every_file_in_configs_is_valid() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("configs");
        let mut seen = 0;
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_none_or(|ending| ending != "toml") {
                continue;
            }
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
}

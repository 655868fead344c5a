//! What the parts of a run take from its settings.

use std::{collections::BTreeSet, path::Path, time::Duration};

use super::{TrainConfig, Tuner};
use crate::{
    adapters::{
        lora::config::{LoraConfig, TargetModules},
        quantised::files::of_checkpoint,
    },
    base::hub::repo_of_folder,
    dataset::loader::{WindowKind, WindowPlan},
    ops::quantised::Quantization,
    processor::patches::ImageProcessorConfig,
    qwen3_vl::layer::Projection,
    runtime::pipeline::PipelineError,
    schedule::Schedule,
    train::{
        gradients::GradientOptions, objective::settings::Objective, optimizer::AdamWConfig,
        outcome::TrainError,
    },
};

impl TrainConfig {
    /// Smallest and largest size an image is scaled to, in pixels: the keys, else the recipe's.
    pub fn pixel_limits(&self) -> [usize; 2] {
        let recipe = ImageProcessorConfig::default();
        [
            self.min_pixels.unwrap_or(recipe.min_pixels),
            self.max_pixels.unwrap_or(recipe.max_pixels),
        ]
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
            modules_to_save: self.modules_to_save.clone(),
            use_rslora: self.use_rslora,
            use_dora: self.use_dora,
            base_model_name_or_path: Some(
                repo_of_folder(&self.model).unwrap_or_else(|| self.model.display().to_string()),
            ),
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
            kind: match self.objective {
                Objective::Sft => WindowKind::Answers,
                Objective::Dpo => WindowKind::Pairs,
                Objective::Grpo => WindowKind::Rows,
            },
        }
    }

    /// Windows of a validation set: in order, once.
    pub fn validation_plan(&self) -> WindowPlan {
        WindowPlan {
            max_length: self.max_length,
            overlong: self.overlong,
            ..WindowPlan::once_in_order(self.per_device_eval_batch_size)
        }
    }

    /// Optimizer steps over `samples` samples on `devices` devices.
    pub fn total_steps(&self, samples: usize, devices: usize) -> usize {
        let steps = match self.objective {
            Objective::Grpo => {
                self.prompt_plan(devices).total_steps(samples) * self.updates_per_rollout()
            }
            _ => self.window_plan(devices).total_steps(samples),
        };
        match self.max_steps {
            0 => steps,
            most => steps.min(most),
        }
    }

    /// Rows that the first `steps` optimizer steps on `devices` devices have seen.
    pub fn rows_before(&self, steps: usize, samples: usize, devices: usize) -> BTreeSet<usize> {
        match self.objective {
            Objective::Grpo => {
                let rollouts = steps.div_ceil(self.updates_per_rollout());
                self.prompt_plan(devices).rows_before(rollouts, samples)
            }
            _ => self.window_plan(devices).rows_before(steps, samples),
        }
    }

    /// Optimizer steps of an epoch over `samples` samples on `devices` devices.
    pub fn steps_per_epoch(&self, samples: usize, devices: usize) -> usize {
        match self.objective {
            Objective::Grpo => {
                self.prompt_plan(devices).steps_per_epoch(samples) * self.updates_per_rollout()
            }
            _ => self.window_plan(devices).steps_per_epoch(samples),
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

    /// How the weights are quantised beside which adapters are trained: as they are on the disk in `model`,
    /// else by the key.
    ///
    /// # Errors
    /// The folder's entry cannot be read, or contradicts a key.
    pub fn quantization(&self, model: &Path) -> Result<Option<Quantization>, TrainError> {
        let stored = of_checkpoint(model).map_err(PipelineError::from)?;
        let key = self.quantize.as_ref().and_then(|text| text.parse().ok());
        match (stored, key) {
            (Some(_), _) if self.tuner == Tuner::Full => {
                let model = model.to_path_buf();
                Err(TrainError::QuantisedFull { model })
            }
            (Some(found), Some(key)) if found != key => Err(TrainError::QuantisedOtherwise {
                model: model.to_path_buf(),
                found,
                key: self.quantize.clone().unwrap_or_default(),
            }),
            (stored, key) => Ok(stored.or(key)),
        }
    }

    /// Whether only adapters of the language model are trained, so that the manual backward pass is used
    /// and no graph is recorded.
    pub fn writes_gradients_out(&self) -> bool {
        let text_only = self.freeze_vit && self.freeze_aligner && !self.freeze_llm;
        self.tuner == Tuner::Lora && text_only && !self.use_dora && self.modules_to_save.is_empty()
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_takes_573_steps_on_two_devices() {
        assert_eq!(TrainConfig::default().total_steps(6102, 2), 573);
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

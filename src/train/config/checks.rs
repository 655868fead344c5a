//! Which values a run can use: the keys alone and against each other.

use super::{BEST_METRICS, LossReduction, Reporter, TrainConfig, TrainConfigError, Tuner};
use crate::{adapters::lora::config::TargetModules, ops::quantised::Quantization};

const POSITIVE: &str = "a positive number";

pub(super) fn check(
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

impl TrainConfig {
    /// Checks the keys alone and against each other.
    ///
    /// # Errors
    /// The first key that cannot be used.
    pub fn validate(&self) -> Result<(), TrainConfigError> {
        check(
            self.num_train_epochs > 0.0 && self.num_train_epochs.is_finite(),
            "num_train_epochs",
            self.num_train_epochs,
            POSITIVE,
        )?;
        check(
            self.per_device_train_batch_size > 0,
            "per_device_train_batch_size",
            0,
            POSITIVE,
        )?;
        check(
            self.per_device_eval_batch_size > 0,
            "per_device_eval_batch_size",
            0,
            POSITIVE,
        )?;
        check(
            self.gradient_accumulation_steps > 0,
            "gradient_accumulation_steps",
            0,
            POSITIVE,
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
        check(self.lora_rank > 0, "lora_rank", 0, POSITIVE)?;
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
            POSITIVE,
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
        check(self.save_total_limit > 0, "save_total_limit", 0, POSITIVE)?;
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
        let names = &self.modules_to_save;
        check(
            names.iter().all(|name| !name.trim().is_empty()),
            "modules_to_save",
            format!("{names:?}"),
            "names such as \"lm_head\"",
        )?;
        check(
            self.tuner == Tuner::Lora || names.is_empty(),
            "modules_to_save",
            format!("{names:?}"),
            "it absent with `tuner = \"full\"`, which trains all modules that no freeze key holds",
        )?;
        check(
            self.adapter.is_none() || names.is_empty(),
            "modules_to_save",
            format!("{names:?}"),
            "it absent with `adapter`: those that its own `adapter_config.json` names are trained on",
        )?;
        self.validate_reports()?;
        self.validate_objective()?;
        let generated = ["eval_rouge_l", "eval_finding_f1"];
        if let Some(text) = &self.quantize
            && let Err(reason) = text.parse::<Quantization>()
        {
            return Err(TrainConfigError::Quantize(reason));
        }
        check(
            self.tuner == Tuner::Lora || self.quantize.is_none(),
            "quantize",
            self.quantize.clone().unwrap_or_default(),
            "it absent with `tuner = \"full\"`: quantised weights stay as they are",
        )?;
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

    /// Checks where the measured values go.
    fn validate_reports(&self) -> Result<(), TrainConfigError> {
        let to_command = self.report_to.contains(&Reporter::Command);
        let is_given = self
            .report_command
            .first()
            .is_some_and(|program| !program.is_empty());
        check(
            is_given || !to_command,
            "report_command",
            format!("{:?}", self.report_command),
            "the program that `report_to` with \"command\" starts, such as [\"python3\", \"configs/hooks/wandb_log.py\"]",
        )?;
        check(
            to_command || self.report_command.is_empty(),
            "report_to",
            "without \"command\"",
            "\"command\" in it, as `report_command` is given",
        )
    }
}

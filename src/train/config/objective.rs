//! Keys of objectives: checks, and what follows from them.

use super::{LossReduction, TrainConfig, TrainConfigError, Tuner, checks::check};
use crate::{
    dataset::loader::WindowPlan,
    train::objective::{
        advantages::ScaleRewards,
        dpo::{Dpo, PairLoss},
        grpo::{Grpo, PolicyLoss, RatioLevel},
        settings::{LossType, Objective, RatioLevelKey},
    },
};

/// How a rollout is divided into optimizer steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RolloutPlan {
    /// Rows of the data set in a rollout.
    pub prompts: usize,
    /// Parts that its answers are dealt out into, each a step.
    pub parts: usize,
    /// Optimizer steps: the parts, `num_iterations` times.
    pub updates: usize,
}

impl TrainConfig {
    /// `beta`: how strongly the reference holds.
    pub fn reference_weight(&self) -> f64 {
        self.beta.unwrap_or(match self.objective {
            Objective::Sft => 0.0,
            Objective::Dpo => 0.1,
            Objective::Grpo => 0.04,
        })
    }

    /// Settings of the preference loss.
    pub fn dpo(&self) -> Dpo {
        Dpo {
            loss: match self.loss_type {
                Some(LossType::Ipo) => PairLoss::Ipo,
                _ => PairLoss::Sigmoid,
            },
            beta: self.reference_weight(),
            label_smoothing: self.label_smoothing,
            sft: self.rpo_alpha,
        }
    }

    /// Settings of the policy loss.
    pub fn grpo(&self) -> Grpo {
        Grpo {
            loss: match self.loss_type {
                Some(LossType::DrGrpo) => PolicyLoss::DrGrpo,
                Some(LossType::Dapo) => PolicyLoss::Dapo,
                _ => PolicyLoss::Grpo,
            },
            level: match self.importance_sampling_level {
                RatioLevelKey::Token => RatioLevel::Token,
                RatioLevelKey::Sequence => RatioLevel::Sequence,
            },
            epsilon_low: self.epsilon,
            epsilon_high: self.epsilon_high.unwrap_or(self.epsilon),
            beta: self.reference_weight(),
            max_completion_length: self.max_completion_length,
        }
    }

    /// Tokens of the longest sample as a step takes it, where `longest` tokens are the most that question and true answer
    /// have: both answers of a pair, or a question with the longest answer that may be drawn.
    pub fn longest_as_learnt(&self, longest: usize) -> usize {
        match self.objective {
            Objective::Sft => longest,
            Objective::Dpo => 2 * longest,
            Objective::Grpo => longest + self.max_completion_length,
        }
    }

    /// Optimizer steps of a rollout; 1 without rollouts.
    pub fn updates_per_rollout(&self) -> usize {
        match self.objective {
            Objective::Grpo => (self.num_iterations * self.steps_per_generation).max(1),
            _ => 1,
        }
    }

    /// How rollouts are divided on `devices` devices; `None` where no answers are drawn.
    ///
    /// # Errors
    /// [`TrainConfigError`] where the answers of a step are no whole groups.
    pub fn rollout_plan(&self, devices: usize) -> Result<Option<RolloutPlan>, TrainConfigError> {
        if self.objective != Objective::Grpo {
            return Ok(None);
        }
        let a_step = self.per_device_train_batch_size * self.gradient_accumulation_steps * devices;
        let answers = a_step * self.steps_per_generation;
        check(
            answers.is_multiple_of(self.num_generations),
            "num_generations",
            self.num_generations,
            "a divisor of per_device_train_batch_size x gradient_accumulation_steps x devices x steps_per_generation: the answers of a rollout are whole groups",
        )?;
        Ok(Some(RolloutPlan {
            prompts: answers / self.num_generations,
            parts: self.steps_per_generation,
            updates: self.updates_per_rollout(),
        }))
    }

    /// Windows of rows that answers are drawn for, one a rollout.
    pub fn prompt_plan(&self, devices: usize) -> WindowPlan {
        let plan = self.rollout_plan(devices).ok().flatten();
        WindowPlan {
            batch_size: plan.map_or(1, |plan| plan.prompts.max(1)),
            accumulation: 1,
            devices: 1,
            packing_tokens: 0,
            ..self.window_plan(devices)
        }
    }

    /// Checks the keys of objectives: those of another objective than the run's are not passed over in silence.
    pub(super) fn validate_objective(&self) -> Result<(), TrainConfigError> {
        let plain = Self::default();
        let objective = self.objective;
        let [dpo, grpo] = [Objective::Dpo, Objective::Grpo].map(|one| objective == one);
        let given = [
            ("beta", self.beta.is_some(), dpo || grpo),
            ("loss_type", self.loss_type.is_some(), dpo || grpo),
            ("reference", self.reference != plain.reference, dpo || grpo),
            (
                "label_smoothing",
                self.label_smoothing != plain.label_smoothing,
                dpo,
            ),
            ("rpo_alpha", self.rpo_alpha != plain.rpo_alpha, dpo),
            (
                "num_generations",
                self.num_generations != plain.num_generations,
                grpo,
            ),
            (
                "num_iterations",
                self.num_iterations != plain.num_iterations,
                grpo,
            ),
            (
                "steps_per_generation",
                self.steps_per_generation != plain.steps_per_generation,
                grpo,
            ),
            ("epsilon", self.epsilon != plain.epsilon, grpo),
            ("epsilon_high", self.epsilon_high.is_some(), grpo),
            (
                "importance_sampling_level",
                self.importance_sampling_level != plain.importance_sampling_level,
                grpo,
            ),
            (
                "scale_rewards",
                self.scale_rewards != ScaleRewards::Group,
                grpo,
            ),
            ("temperature", self.temperature != plain.temperature, grpo),
            (
                "max_completion_length",
                self.max_completion_length != plain.max_completion_length,
                grpo,
            ),
            ("rewards", !self.rewards.is_empty(), grpo),
            ("held_out_rewards", !self.held_out_rewards.is_empty(), grpo),
            ("reward_rules", self.reward_rules.is_some(), grpo),
            (
                "reward_patience",
                self.reward_patience != plain.reward_patience,
                grpo,
            ),
            (
                "rollout_steps",
                self.rollout_steps != plain.rollout_steps,
                grpo,
            ),
        ];
        if let Some((key, ..)) = given.iter().find(|(_, given, belongs)| *given && !belongs) {
            let expected = match *key {
                "label_smoothing" | "rpo_alpha" => "it absent but for `objective = \"dpo\"`",
                "beta" | "loss_type" | "reference" => {
                    "it absent but for `objective` \"dpo\" or \"grpo\""
                }
                _ => "it absent but for `objective = \"grpo\"`",
            };
            return check(false, key, "given", expected);
        }
        if objective == Objective::Sft {
            return Ok(());
        }
        check(
            self.reference_weight() >= 0.0 && self.reference_weight().is_finite(),
            "beta",
            self.reference_weight(),
            "0 or more",
        )?;
        check(
            grpo || self.reference_weight() > 0.0,
            "beta",
            self.reference_weight(),
            "more than 0 with `objective = \"dpo\"`",
        )?;
        let fits = match self.loss_type {
            None => true,
            Some(LossType::Sigmoid | LossType::Ipo) => dpo,
            Some(_) => grpo,
        };
        check(
            fits,
            "loss_type",
            format!("{:?}", self.loss_type),
            "sigmoid or ipo with `objective = \"dpo\"`; grpo, dr_grpo or dapo with \"grpo\"",
        )?;
        check(
            self.loss_reduction == LossReduction::Token,
            "loss_reduction",
            "micro",
            "token: `loss_type` says what the loss is the mean of",
        )?;
        let needs_reference = self.reference_weight() > 0.0;
        check(
            self.tuner == Tuner::Lora || !needs_reference,
            "tuner",
            "full",
            "lora, or beta 0 with `objective = \"grpo\"`: the reference is the model without its adapter",
        )?;
        check(
            !self.use_dora || !needs_reference,
            "use_dora",
            true,
            "false with a reference",
        )?;
        check(
            (0.0..0.5).contains(&self.label_smoothing),
            "label_smoothing",
            self.label_smoothing,
            "0 or more and less than 0.5",
        )?;
        check(
            self.label_smoothing == 0.0 || self.loss_type != Some(LossType::Ipo),
            "label_smoothing",
            self.label_smoothing,
            "0 with `loss_type = \"ipo\"`",
        )?;
        check(
            self.rpo_alpha >= 0.0 && self.rpo_alpha.is_finite(),
            "rpo_alpha",
            self.rpo_alpha,
            "0 or more",
        )?;
        if !grpo {
            return Ok(());
        }
        check(
            !self.rewards.is_empty(),
            "rewards",
            "empty",
            "at least one reward",
        )?;
        for reward in self.rewards.iter().chain(&self.held_out_rewards) {
            reward.check().map_err(TrainConfigError::Reward)?;
        }
        check(
            self.num_generations > 1,
            "num_generations",
            self.num_generations,
            "2 or more: an answer is compared with the others of its group",
        )?;
        check(
            self.num_iterations > 0,
            "num_iterations",
            0,
            "a positive number",
        )?;
        check(
            self.steps_per_generation > 0,
            "steps_per_generation",
            0,
            "a positive number",
        )?;
        check(
            self.epsilon > 0.0 && self.epsilon < 1.0,
            "epsilon",
            self.epsilon,
            "more than 0 and less than 1",
        )?;
        check(
            self.epsilon_high
                .is_none_or(|one| one > 0.0 && one.is_finite()),
            "epsilon_high",
            self.epsilon_high.unwrap_or_default(),
            "a positive number",
        )?;
        check(
            self.temperature > 0.0 && self.temperature <= 100.0,
            "temperature",
            self.temperature,
            "more than 0 and at most 100",
        )?;
        check(
            self.max_completion_length > 0,
            "max_completion_length",
            0,
            "a positive number",
        )?;
        check(
            self.reward_patience == 0 || !self.held_out_rewards.is_empty(),
            "reward_patience",
            self.reward_patience,
            "0, or `held_out_rewards` to compare with",
        )?;
        let updates = self.updates_per_rollout();
        for (key, every) in [
            ("save_steps", self.save_steps),
            ("eval_steps", self.eval_steps),
        ] {
            check(
                every.is_multiple_of(updates),
                key,
                every,
                "a multiple of num_iterations x steps_per_generation: a run stops between rollouts",
            )?;
        }
        check(
            self.max_steps.is_multiple_of(updates),
            "max_steps",
            self.max_steps,
            "a multiple of num_iterations x steps_per_generation: a run stops between rollouts",
        )?;
        self.rollout_plan(self.device.len().max(1)).map(|_| ())
    }
}

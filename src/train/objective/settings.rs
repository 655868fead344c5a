//! Keys of a run's config that choose an objective.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a run minimises.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema, clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Objective {
    /// Cross-entropy of the answers in the data.
    #[default]
    Sft,
    /// Direct preference optimisation, on rows with a rejected answer.
    Dpo,
    /// Group-relative policy optimisation, on rewards of the model's own answers.
    Grpo,
}

impl Objective {
    /// As a config spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Sft => "sft",
            Self::Dpo => "dpo",
            Self::Grpo => "grpo",
        }
    }
}

/// The form of an objective's loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossType {
    /// `dpo`: the logistic loss of the margin.
    Sigmoid,
    /// `dpo`: the squared distance of the margin of token means from `1/(2 beta)`.
    Ipo,
    /// `grpo`: the mean over answers of their token means.
    Grpo,
    /// `grpo`: all tokens over `max_completion_length`: length is no advantage.
    DrGrpo,
    /// `grpo`: the mean over all tokens of the step.
    Dapo,
}

/// What has one probability ratio.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RatioLevelKey {
    /// Each token.
    #[default]
    Token,
    /// Each answer (GSPO).
    Sequence,
}

/// Which weights an objective measures from.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReferenceKey {
    /// Those that the run starts from: the base with the adapter in `adapter`, or alone.
    #[default]
    Start,
    /// The base without any adapter.
    Base,
}

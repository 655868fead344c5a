//! Rewards of an answer: a weighted list, each part in its own column.
//!
//! Every reward of this program is between 0 and 1, 1 being good. Each can be won in a way that nobody wants: its
//! failure mode is written at [`RewardKind`], and a second list that is not trained on shows when that happens.

mod findings;
mod program;
mod text;

use serde::{Deserialize, Serialize};

use crate::eval::findings::{RuleSet, RuleSetError};

/// One reward of a run's list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct RewardConfig {
    /// What is rewarded.
    pub kind: RewardKind,
    /// Factor on it in the sum.
    pub weight: f64,
    /// `finding_f1`: a finding counts by side, so that 左侧胸腔积液 is not 右侧胸腔积液.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub side: Option<bool>,
    /// `finding_f1`: the zone of the lung counts as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<bool>,
    /// `finding_f1`: the degree counts as well.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub severity: Option<bool>,
    /// `text`: a score of `eval` such as `characters.rouge_l`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
    /// `length`: fewest characters that are wanted; without it and `max_characters` the true report's length is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub min_characters: Option<usize>,
    /// `length`: most characters that are wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_characters: Option<usize>,
    /// `format`: keys of the JSON object that an answer has to be; without it, the headings of findings and impression.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json_keys: Option<Vec<String>>,
    /// `command`: program and arguments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
    /// `http`: address that answers are posted to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// `command` and `http`: seconds that the answers of a rollout may take; 600 if absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<f64>,
}

impl Default for RewardConfig {
    fn default() -> Self {
        Self {
            kind: RewardKind::FindingF1,
            weight: 1.0,
            side: None,
            zone: None,
            severity: None,
            metric: None,
            min_characters: None,
            max_characters: None,
            json_keys: None,
            command: None,
            url: None,
            timeout: None,
        }
    }
}

/// What can be rewarded, and how each is won without a better report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum RewardKind {
    /// F1 of the findings that the labeler reads in answer and truth, times the share of the answer that it can read.
    /// Fails where the labeler errs: short formulas it surely reads win over words that it reads less well.
    FindingF1,
    /// 1 unless the answer compares with an earlier film and the truth does not. Won by never comparing, also where
    /// an earlier film is shown.
    UnsupportedComparison,
    /// 1 unless the answer states and denies one finding. Won by naming less.
    Contradiction,
    /// Share of the answer's ten-character pieces that are no repeats. Won by short answers.
    Repetition,
    /// Length in characters near the truth's or within bounds. Won by filler of the right length.
    Length,
    /// Headings of findings and impression, each with words after it, or a JSON object with given keys. Won by
    /// empty words under the headings.
    Format,
    /// A text score of `eval` against the truth. Won by the commonest sentences: normal reports score high.
    Text,
    /// What a program says: one JSON line an answer in, one JSON line with `reward` out. As good as the program.
    Command,
    /// What a server says: `{"answers": […]}` posted, `{"rewards": […]}` returned. As good as the server.
    Http,
}

impl RewardKind {
    /// As a config spells it.
    pub fn name(self) -> &'static str {
        match self {
            Self::FindingF1 => "finding_f1",
            Self::UnsupportedComparison => "unsupported_comparison",
            Self::Contradiction => "contradiction",
            Self::Repetition => "repetition",
            Self::Length => "length",
            Self::Format => "format",
            Self::Text => "text",
            Self::Command => "command",
            Self::Http => "http",
        }
    }
}

/// An answer to be rewarded.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Answered {
    /// Row of the data set, from 0.
    pub row: usize,
    /// The true report.
    pub truth: String,
    /// The answer, reasoning left out.
    pub answer: String,
    /// The reasoning before it, of models that think.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thinking: Option<String>,
    /// Whether it ended by itself, and not at the limit.
    pub ended: bool,
}

/// Why answers cannot be rewarded.
#[derive(Debug, thiserror::Error)]
pub enum RewardError {
    /// A value in the config.
    #[error("reward `{kind}`: {reason}")]
    Config {
        /// The reward.
        kind: &'static str,
        /// What is wrong, and what is expected.
        reason: String,
    },
    /// A table of words.
    #[error(transparent)]
    Rules(#[from] RuleSetError),
    /// The program or the server.
    #[error("reward `{name}`: {reason}")]
    Outside {
        /// Its column.
        name: String,
        /// What came of it.
        reason: String,
    },
}

/// One part of a reward over some answers.
trait Reward: Send {
    /// A value for each answer.
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String>;
}

/// Rewards of some answers by part.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RewardTable {
    /// Values of each part, one an answer, in the order of the list.
    pub parts: Vec<(String, Vec<f64>)>,
    /// The weighted sum of each answer.
    pub totals: Vec<f64>,
}

impl RewardTable {
    /// Mean of each part.
    pub fn means(&self) -> Vec<(&str, f64)> {
        let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len().max(1) as f64;
        let parts = self.parts.iter();
        parts
            .map(|(name, values)| (name.as_str(), mean(values)))
            .collect()
    }

    /// Mean of the weighted sums.
    pub fn mean(&self) -> f64 {
        self.totals.iter().sum::<f64>() / self.totals.len().max(1) as f64
    }
}

/// A list of rewards, ready to score.
pub struct Rewards {
    parts: Vec<(String, f64, Box<dyn Reward>)>,
}

impl Rewards {
    /// Prepares a list. `truths` are reports of the data set: they decide which table of words reads the findings
    /// where `rules` names none.
    ///
    /// # Errors
    /// [`RewardError`]: a key that does not belong to its reward, or is missing.
    pub fn new<'t>(
        list: &[RewardConfig],
        rules: Option<&str>,
        truths: impl IntoIterator<Item = &'t str> + Clone,
    ) -> Result<Self, RewardError> {
        let rules = match rules {
            Some(name) => RuleSet::named(name)?,
            None => RuleSet::guess(truths),
        };
        let rules = std::sync::Arc::new(rules);
        let mut parts: Vec<(String, f64, Box<dyn Reward>)> = Vec::new();
        for config in list {
            config.check()?;
            let mut name = match &config.metric {
                Some(metric) => metric.clone(),
                None => config.kind.name().to_owned(),
            };
            let same = parts.iter().filter(|(known, ..)| {
                known
                    .rsplit_once('#')
                    .map_or(known.as_str(), |(known, _)| known)
                    == name
            });
            let same = same.count();
            if same > 0 {
                name = format!("{name}#{}", same + 1);
            }
            let rules = rules.clone();
            let is = |given: Option<bool>, default| given.unwrap_or(default);
            let reward: Box<dyn Reward> = match config.kind {
                RewardKind::FindingF1 => Box::new(findings::FindingF1 {
                    rules,
                    side: is(config.side, true),
                    zone: is(config.zone, false),
                    severity: is(config.severity, false),
                }),
                RewardKind::UnsupportedComparison => Box::new(findings::Comparison(rules)),
                RewardKind::Contradiction => Box::new(findings::Contradiction(rules)),
                RewardKind::Repetition => Box::new(text::Repetition),
                RewardKind::Length => Box::new(text::Length {
                    least: config.min_characters,
                    most: config.max_characters,
                }),
                RewardKind::Format => Box::new(text::Format {
                    rules,
                    json_keys: config.json_keys.clone(),
                }),
                RewardKind::Text => Box::new(text::Score::new(config.metric.clone())),
                RewardKind::Command => Box::new(program::Program::new(config)),
                RewardKind::Http => Box::new(program::Server::new(config)),
            };
            parts.push((name, config.weight, reward));
        }
        Ok(Self { parts })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Rewards some answers.
    ///
    /// # Errors
    /// [`RewardError::Outside`]: a program or server that fails, or a value that is no number.
    pub fn of(&mut self, answers: &[Answered]) -> Result<RewardTable, RewardError> {
        let mut table = RewardTable {
            parts: Vec::new(),
            totals: vec![0.0; answers.len()],
        };
        for (name, weight, reward) in &mut self.parts {
            let outside = |reason| RewardError::Outside {
                name: name.clone(),
                reason,
            };
            let values = reward.values(answers).map_err(outside)?;
            if values.len() != answers.len() {
                return Err(outside(format!(
                    "{} values for {} answers",
                    values.len(),
                    answers.len()
                )));
            }
            if let Some(at) = values.iter().position(|value| !value.is_finite()) {
                let row = answers[at].row + 1;
                return Err(outside(format!(
                    "the answer about row {row} has {}",
                    values[at]
                )));
            }
            for (total, value) in table.totals.iter_mut().zip(&values) {
                *total += *weight * value;
            }
            table.parts.push((name.clone(), values));
        }
        Ok(table)
    }
}

impl RewardConfig {
    /// Checks that each key belongs to the reward, and that it has those it needs.
    ///
    /// # Errors
    /// [`RewardError::Config`].
    pub fn check(&self) -> Result<(), RewardError> {
        let kind = self.kind.name();
        let wrong = |reason: String| Err(RewardError::Config { kind, reason });
        if !self.weight.is_finite() {
            return wrong(format!("`weight` is {}, expected a number", self.weight));
        }
        let is = |wanted: &[RewardKind]| wanted.contains(&self.kind);
        use RewardKind::{Command, FindingF1, Format, Http, Length, Text};
        let keys = [
            ("side", self.side.is_some(), is(&[FindingF1])),
            ("zone", self.zone.is_some(), is(&[FindingF1])),
            ("severity", self.severity.is_some(), is(&[FindingF1])),
            ("metric", self.metric.is_some(), is(&[Text])),
            (
                "min_characters",
                self.min_characters.is_some(),
                is(&[Length]),
            ),
            (
                "max_characters",
                self.max_characters.is_some(),
                is(&[Length]),
            ),
            ("json_keys", self.json_keys.is_some(), is(&[Format])),
            ("command", self.command.is_some(), is(&[Command])),
            ("url", self.url.is_some(), is(&[Http])),
            ("timeout", self.timeout.is_some(), is(&[Command, Http])),
        ];
        if let Some((key, ..)) = keys.iter().find(|(_, given, belongs)| *given && !belongs) {
            return wrong(format!("`{key}` has no meaning for it; take it out"));
        }
        if let (Some(least), Some(most)) = (self.min_characters, self.max_characters)
            && least > most
        {
            return wrong(format!(
                "`min_characters` is {least}, expected at most `max_characters`, {most}"
            ));
        }
        if self
            .timeout
            .is_some_and(|seconds| !(seconds > 0.0 && seconds <= 1e6))
        {
            return wrong("`timeout` is no positive number of seconds".to_owned());
        }
        match self.kind {
            Text => text::check_metric(self.metric.as_deref()).or_else(wrong),
            Command
                if self
                    .command
                    .as_ref()
                    .is_none_or(|words| words.first().is_none_or(String::is_empty)) =>
            {
                wrong("it needs `command`, such as [\"python3\", \"reward.py\"]".to_owned())
            }
            Http if !self
                .url
                .as_ref()
                .is_some_and(|url| url.starts_with("http://") || url.starts_with("https://")) =>
            {
                wrong("it needs `url`, an address that begins with http:// or https://".to_owned())
            }
            Http if self
                .url
                .as_ref()
                .is_some_and(|url| url.starts_with("https://"))
                && !cfg!(feature = "tls") =>
            {
                wrong("https needs TLS; this program was built without `tls`".to_owned())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;

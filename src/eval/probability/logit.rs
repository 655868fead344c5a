//! Log-probabilities of sentences to the logit of a class.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How the log-probability of a sentence is made of those of its tokens.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum ScoreForm {
    /// Their sum: the probability of the sentence.
    Sum,
    /// Their mean: long sentences are not less likely than short ones. Better calibrated on the tiny model.
    #[default]
    Mean,
}

/// After what the sentences are put.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum SentenceContext {
    /// At the beginning of the answer.
    Start,
    /// At the beginning and after each sentence of the model's own report: a sentence counts where the report has room
    /// for it.
    #[default]
    Report,
}

impl fmt::Display for SentenceContext {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Report => "report",
        })
    }
}

impl fmt::Display for ScoreForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sum => "sum",
            Self::Mean => "mean",
        })
    }
}

/// `ln(Σ exp(x))`, without overflow; minus infinity for nothing.
pub fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let most = values.clone().fold(f64::NEG_INFINITY, f64::max);
    if !most.is_finite() {
        return most;
    }
    most + values.map(|value| (value - most).exp()).sum::<f64>().ln()
}

/// The logit of a class: log-sum-exp over the sentences that state it less that over those that deny it. A sentence
/// is given by the log-probabilities of its tokens; in several places it is there several times.
pub fn class_logit(form: ScoreForm, stated: &[Vec<f32>], denied: &[Vec<f32>]) -> f64 {
    let score = |tokens: &Vec<f32>| {
        let sum: f64 = tokens.iter().map(|token| f64::from(*token)).sum();
        match form {
            ScoreForm::Sum => sum,
            ScoreForm::Mean => sum / tokens.len().max(1) as f64,
        }
    };
    log_sum_exp(stated.iter().map(score)) - log_sum_exp(denied.iter().map(score))
}

/// `1 / (1 + exp(-x))`.
pub fn sigmoid(logit: f64) -> f64 {
    if logit >= 0.0 {
        1.0 / (1.0 + (-logit).exp())
    } else {
        let odds = logit.exp();
        odds / (1.0 + odds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sentences_are_added_as_probabilities() {
        let half = 0.5_f32.ln();
        // 0.25 + 0.5 against 0.125.
        let stated = [vec![half, half], vec![half]];
        let denied = [vec![half, half, half]];
        let logit = class_logit(ScoreForm::Sum, &stated, &denied);
        assert!((logit - 6.0_f64.ln()).abs() < 1e-6, "{logit}");
        // By the token all sentences are alike: two against one.
        let logit = class_logit(ScoreForm::Mean, &stated, &denied);
        assert!((logit - 2.0_f64.ln()).abs() < 1e-6, "{logit}");
    }

    #[test]
    fn nothing_overflows() {
        let large = [-4000.0, -4001.0];
        assert!((log_sum_exp(large.into_iter()) + 4000.0 - 0.313_261_687).abs() < 1e-8);
        assert_eq!(log_sum_exp(std::iter::empty()), f64::NEG_INFINITY);
        assert_eq!((sigmoid(800.0), sigmoid(-800.0)), (1.0, 0.0));
        assert!((sigmoid(1.0) + sigmoid(-1.0) - 1.0).abs() < 1e-15);
    }
}

//! Log-probabilities of sentences, or counts of drawn reports, to the logit of a class.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How the logit of a class is got from a model: from reports that it draws, or from the log-probabilities of fixed
/// sentences.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum ScoreForm {
    /// The share of reports, drawn at temperature 1, that state the class: an estimate of the probability that the model
    /// gives it, in whatever words. On the tiny model by far the best.
    #[default]
    Drawn,
    /// Fixed sentences, the sum of the log-probabilities of their tokens: those that state the class against those that
    /// deny it.
    Sum,
    /// Fixed sentences, the mean over the tokens: long sentences are not less likely than short ones.
    Mean,
    /// The probability that any fixed sentence that states the class comes, whatever denies it: for reports that leave
    /// out what is not there, with `--context report`.
    Stated,
}

impl ScoreForm {
    /// Whether it is made of the log-probabilities of fixed sentences.
    pub fn is_of_sentences(self) -> bool {
        self != Self::Drawn
    }
}

/// Reports that are drawn of an image where nothing else is said. On the tiny model 8 are nearly as good, and more than
/// 16 no better.
pub const DRAWN_REPORTS: usize = 16;

/// Most tokens of a drawn report.
pub const DRAWN_TOKENS: usize = 512;

/// Most reports that may be drawn of an image.
pub const MOST_DRAWN: usize = 256;

/// The logit of a share of `of` reports, with half a report on either side, since a few draws prove nothing impossible.
pub fn share_logit(stated: f64, of: usize) -> f64 {
    ((stated + 0.5) / (of as f64 - stated + 0.5)).ln()
}

/// After what the sentences are put.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum SentenceContext {
    /// At the beginning of the answer.
    #[default]
    Start,
    /// At the beginning and after each sentence and clause of the model's own report: a sentence counts where the
    /// report has room for it.
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
            Self::Drawn => "drawn",
            Self::Sum => "sum",
            Self::Mean => "mean",
            Self::Stated => "stated",
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

/// Probability below which a sentence says nothing where a whole report has been gone through: a report that neither
/// states nor denies a class has tiny probabilities for both, whose ratio is chance.
const FLOOR: f64 = 1e-3;

/// The logit of a class: log-sum-exp over the sentences that state it less that over those that deny it. A sentence
/// is given by the log-probabilities of its tokens; in several places it is there several times.
///
/// # Panics
/// In a form that is not of sentences.
pub fn class_logit(
    form: ScoreForm,
    context: SentenceContext,
    stated: &[Vec<f32>],
    denied: &[Vec<f32>],
) -> f64 {
    assert!(form.is_of_sentences(), "sentences in the form {form}");
    let sum = |tokens: &Vec<f32>| -> f64 { tokens.iter().map(|token| f64::from(*token)).sum() };
    if form == ScoreForm::Stated {
        return any_logit(stated.iter().map(sum));
    }
    let score = |tokens: &Vec<f32>| match form {
        ScoreForm::Mean => sum(tokens) / tokens.len().max(1) as f64,
        ScoreForm::Sum | ScoreForm::Stated | ScoreForm::Drawn => sum(tokens),
    };
    let floor = match (form, context) {
        (ScoreForm::Sum, SentenceContext::Report) => Some(FLOOR.ln()),
        _ => None,
    };
    let all = |sentences: &[Vec<f32>]| log_sum_exp(sentences.iter().map(score).chain(floor));
    all(stated) - all(denied)
}

/// A sentence is never surer than this: f32 ends near it.
const SUREST: f64 = -1e-7;

/// The logit of "at least one of these comes", of their log-probabilities, as if they were independent.
fn any_logit(values: impl Iterator<Item = f64>) -> f64 {
    // ln Π (1 - p)
    let none: f64 = values.map(|value| (-value.min(SUREST).exp()).ln_1p()).sum();
    let any = -none.exp_m1();
    any.max(f64::MIN_POSITIVE).ln() - none
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
        let logit = class_logit(ScoreForm::Sum, SentenceContext::Start, &stated, &denied);
        assert!((logit - 6.0_f64.ln()).abs() < 1e-6, "{logit}");
        // By the token all sentences are alike: two against one.
        let logit = class_logit(ScoreForm::Mean, SentenceContext::Report, &stated, &denied);
        assert!((logit - 2.0_f64.ln()).abs() < 1e-6, "{logit}");
    }

    #[test]
    fn what_is_stated_anywhere_counts_whatever_denies_it() {
        let [half, tenth] = [0.5_f32, 0.1].map(|p| vec![p.ln()]);
        let logit = |denied: &[Vec<f32>]| {
            let stated = [half.clone(), tenth.clone()];
            class_logit(ScoreForm::Stated, SentenceContext::Report, &stated, denied)
        };
        // 1 - 0.5 · 0.9 against 0.45.
        let expected = (0.55_f64 / 0.45).ln();
        assert!((logit(&[]) - expected).abs() < 1e-6);
        assert_eq!(logit(&[]), logit(&[vec![0.0]]));
        assert!(any_logit([0.0].into_iter()).is_finite());
        assert!(any_logit([-4000.0].into_iter()).is_finite());
        let small = any_logit([-30.0].into_iter());
        assert!((small + 30.0).abs() < 1e-6, "{small}");
    }

    #[test]
    fn a_report_that_says_nothing_of_a_class_leaves_it_open() {
        let [likely, unlikely, never] = [0.9_f32, 1e-6, 1e-9].map(|p| vec![p.ln()]);
        let logit = |stated: &Vec<f32>, denied: &Vec<f32>, context| {
            let [stated, denied] = [stated, denied].map(|tokens| [tokens.clone()]);
            class_logit(ScoreForm::Sum, context, &stated, &denied)
        };
        let report = SentenceContext::Report;
        assert!(logit(&unlikely, &never, report).abs() < 0.01);
        assert!(logit(&likely, &never, report) > 6.0);
        assert!(logit(&never, &likely, report) < -6.0);
        assert!(logit(&unlikely, &never, SentenceContext::Start) > 6.0);
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

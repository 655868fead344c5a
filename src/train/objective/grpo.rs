//! Group-relative policy optimisation: answers that were rewarded above the mean of their group become likelier.
//!
//! The ratio of a token's (or an answer's: GSPO) probability to that under the weights it was drawn from is clipped,
//! and the divergence from the reference costs `beta`.
//!
//! Source: Shao et al., 2024 (GRPO); Liu et al., 2025 (Dr. GRPO); Yu et al., 2025 (DAPO); Zheng et al., 2025 (GSPO);
//! `GRPOTrainer._compute_loss`, TRL 1.16.

use super::sums::ObjectiveSums;
use crate::batch::sequences::{SequenceCounts, Sequences};
use crate::train::scores::TokenScores;

/// What the loss is the mean of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PolicyLoss {
    /// The means over each answer's tokens.
    Grpo,
    /// All answers' tokens over the longest possible answer: length is no advantage.
    DrGrpo,
    /// All tokens of the step.
    Dapo,
}

/// What has one probability ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RatioLevel {
    /// Each token.
    Token,
    /// Each answer: the geometric mean over its tokens.
    Sequence,
}

/// Settings of the objective.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grpo {
    /// What the loss is the mean of.
    pub loss: PolicyLoss,
    /// What has one ratio.
    pub level: RatioLevel,
    /// Ratios below `1 - epsilon_low` are clipped.
    pub epsilon_low: f64,
    /// Ratios above `1 + epsilon_high` are clipped.
    pub epsilon_high: f64,
    /// Cost of the divergence from the reference.
    pub beta: f64,
    /// Most tokens of an answer.
    pub max_completion_length: usize,
}

impl Grpo {
    /// The derivative of the loss by each target's log-probability, and what the answers came to.
    ///
    /// Means are over the whole window, of which `counts` are.
    ///
    /// # Panics
    /// If an advantage, or with `beta` the reference, is missing.
    pub fn derivative(
        &self,
        answers: &Sequences,
        counts: &SequenceCounts,
        scores: &TokenScores,
    ) -> (Vec<f32>, ObjectiveSums) {
        let logs = &scores.log_probabilities;
        assert_eq!(
            answers.advantages.len(),
            answers.targets.len(),
            "advantages"
        );
        assert!(
            self.beta == 0.0 || answers.reference.len() == logs.len(),
            "targets of the reference"
        );
        let all = counts.sequences.max(1) as f64;
        let mut derivative = vec![0.0; logs.len()];
        let mut sums = ObjectiveSums {
            sequences: answers.targets.len() as f64,
            targets: logs.len() as f64,
            entropy: scores.entropies.iter().map(|one| f64::from(*one)).sum(),
            ..ObjectiveSums::default()
        };
        for (range, advantage) in answers.ranges().into_iter().zip(&answers.advantages) {
            let (tokens, advantage) = (range.len().max(1) as f64, f64::from(*advantage));
            // How much a token counts in the mean.
            let share = match self.loss {
                PolicyLoss::Grpo => 1.0 / (all * tokens),
                PolicyLoss::DrGrpo => 1.0 / (all * self.max_completion_length.max(1) as f64),
                PolicyLoss::Dapo => 1.0 / counts.targets.max(1) as f64,
            };
            let log_ratio = |at: usize| match answers.sampled.get(at) {
                Some(sampled) => f64::from(logs[at]) - f64::from(*sampled),
                // Drawn from the weights of this step.
                None => 0.0,
            };
            let of_answer = match self.level {
                RatioLevel::Token => None,
                RatioLevel::Sequence => {
                    let sum: f64 = range.clone().map(log_ratio).sum();
                    Some((sum / tokens).exp())
                }
            };
            let mut of_all_tokens = 0.0;
            for at in range.clone() {
                let ratio = of_answer.unwrap_or_else(|| log_ratio(at).exp());
                let clipped = ratio.clamp(1.0 - self.epsilon_low, 1.0 + self.epsilon_high);
                let (free, held) = (ratio * advantage, clipped * advantage);
                sums.loss -= share * free.min(held);
                sums.ratio += ratio;
                // Where the clipped value is the smaller one it is constant.
                let slope = if held < free { 0.0 } else { -share * free };
                sums.clipped += f64::from(u8::from(held < free));
                match self.level {
                    RatioLevel::Token => derivative[at] += slope as f32,
                    RatioLevel::Sequence => of_all_tokens += slope,
                }
                if self.beta > 0.0 {
                    let distance = f64::from(answers.reference[at]) - f64::from(logs[at]);
                    let kl = distance.exp() - distance - 1.0;
                    sums.kl += kl;
                    sums.loss += self.beta * share * kl;
                    derivative[at] += (self.beta * share * (1.0 - distance.exp())) as f32;
                }
            }
            if self.level == RatioLevel::Sequence {
                // The answer's ratio depends on each of its tokens alike.
                for value in &mut derivative[range] {
                    *value += (of_all_tokens / tokens) as f32;
                }
            }
        }
        (derivative, sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers() -> (Sequences, SequenceCounts, TokenScores) {
        let answers = Sequences {
            targets: vec![2, 3, 1],
            advantages: vec![1.2, -0.7, 0.4],
            sampled: vec![-0.9, -0.5, -0.2, -1.5, -0.7, -1.6],
            reference: vec![-1.0, -0.5, -0.2, -1.2, -0.9, -2.0],
        };
        let scores = TokenScores {
            log_probabilities: vec![-0.8, -0.55, -0.1, -2.1, -0.65, -1.0],
            entropies: vec![0.5; 6],
            correct: 0.0,
        };
        let counts = SequenceCounts::of([&answers]);
        (answers, counts, scores)
    }

    const GRPO: Grpo = Grpo {
        loss: PolicyLoss::Grpo,
        level: RatioLevel::Token,
        epsilon_low: 0.2,
        epsilon_high: 0.3,
        beta: 0.1,
        max_completion_length: 8,
    };

    #[test]
    fn the_derivative_is_that_of_the_loss() {
        for loss in [PolicyLoss::Grpo, PolicyLoss::DrGrpo, PolicyLoss::Dapo] {
            for level in [RatioLevel::Token, RatioLevel::Sequence] {
                let grpo = Grpo {
                    loss,
                    level,
                    ..GRPO
                };
                let (answers, counts, scores) = answers();
                let (derivative, _) = grpo.derivative(&answers, &counts, &scores);
                for (at, found) in derivative.iter().enumerate() {
                    let moved = |by: f32| {
                        let mut scores = scores.clone();
                        scores.log_probabilities[at] += by;
                        grpo.derivative(&answers, &counts, &scores).1.loss
                    };
                    let step = 1.0 / 512.0;
                    let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
                    let found = f64::from(*found);
                    assert!(
                        (slope - found).abs() < 1e-4,
                        "{loss:?} {level:?} {at}: {slope} {found}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_ratio_beyond_its_bound_has_no_gradient() {
        let (answers, counts, scores) = answers();
        let grpo = Grpo { beta: 0.0, ..GRPO };
        let (derivative, sums) = grpo.derivative(&answers, &counts, &scores);
        // e^(-2.1 + 1.5) = 0.55 with a negative advantage, e^0.6 = 1.82 with a positive one.
        assert_eq!(
            (derivative[3], derivative[5], sums.clipped),
            (0.0, 0.0, 2.0)
        );
        assert!(derivative[0] < 0.0 && derivative[2] > 0.0);
    }

    #[test]
    fn without_sampled_values_every_ratio_is_one() {
        let (mut answers, counts, scores) = answers();
        answers.sampled.clear();
        let grpo = Grpo { beta: 0.0, ..GRPO };
        let (derivative, sums) = grpo.derivative(&answers, &counts, &scores);
        assert_eq!((sums.ratio, sums.clipped), (6.0, 0.0));
        assert!((derivative[0] + 1.2 / 6.0).abs() < 1e-6, "{derivative:?}");
    }
}

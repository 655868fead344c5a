//! Direct preference optimisation: the chosen answer of a pair is made likelier than the rejected one, both
//! measured from the reference.
//!
//! Source: Rafailov et al., 2023 (sigmoid); Azar et al., 2023 (IPO); `DPOTrainer._compute_loss`, TRL 1.16.

use super::sums::ObjectiveSums;
use crate::batch::sequences::{SequenceCounts, Sequences};
use crate::train::scores::TokenScores;

/// Which function of the margin is minimised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PairLoss {
    /// `-log σ(β·margin)`, with label smoothing.
    Sigmoid,
    /// `(margin - 1/(2β))²`, of means over an answer's tokens.
    Ipo,
}

/// Settings of the objective.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dpo {
    /// Which loss.
    pub loss: PairLoss,
    /// How strongly the reference holds.
    pub beta: f64,
    /// Share of pairs that are taken to be the wrong way round; of the sigmoid loss.
    pub label_smoothing: f64,
    /// Weight of the mean negative log likelihood of the chosen answers' tokens.
    pub sft: f64,
}

/// `log σ(x)` without overflow.
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

fn sum(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value)).sum()
}

impl Dpo {
    /// Loss of a pair, and its derivative by the margin; `margin` is that of sums, or of means for IPO.
    fn of_margin(&self, margin: f64) -> (f64, f64) {
        let x = self.beta * margin;
        match self.loss {
            PairLoss::Sigmoid => {
                let smoothing = self.label_smoothing;
                let loss = -(1.0 - smoothing) * log_sigmoid(x) - smoothing * log_sigmoid(-x);
                let slope = -(1.0 - smoothing) * sigmoid(-x) + smoothing * sigmoid(x);
                (loss, self.beta * slope)
            }
            PairLoss::Ipo => {
                let from = margin - 1.0 / (2.0 * self.beta);
                (from * from, 2.0 * from)
            }
        }
    }

    /// The derivative of the loss by each target's log-probability, and what the pairs came to.
    ///
    /// The loss is the mean over the pairs of the whole window, of which `counts` are.
    ///
    /// # Panics
    /// If the sequences are no pairs, or have no reference.
    pub fn derivative(
        &self,
        pairs: &Sequences,
        counts: &SequenceCounts,
        scores: &TokenScores,
    ) -> (Vec<f32>, ObjectiveSums) {
        let logs = &scores.log_probabilities;
        assert_eq!(pairs.targets.len() % 2, 0, "an answer without its pair");
        assert_eq!(
            pairs.reference.len(),
            logs.len(),
            "targets of the reference"
        );
        let all_pairs = (counts.sequences / 2).max(1) as f64;
        let mut derivative = vec![0.0; logs.len()];
        let mut sums = ObjectiveSums {
            targets: logs.len() as f64,
            entropy: sum(&scores.entropies),
            ..ObjectiveSums::default()
        };
        for pair in pairs.ranges().chunks(2) {
            let [chosen, rejected] = [&pair[0], &pair[1]].map(|range| {
                let range = range.clone();
                sum(&logs[range.clone()]) - sum(&pairs.reference[range])
            });
            let share = [&pair[0], &pair[1]].map(|range| match self.loss {
                PairLoss::Sigmoid => 1.0,
                PairLoss::Ipo => 1.0 / range.len().max(1) as f64,
            });
            let (loss, slope) = self.of_margin(chosen * share[0] - rejected * share[1]);
            sums.loss += loss / all_pairs;
            for (range, by_margin) in pair.iter().zip([share[0], -share[1]]) {
                derivative[range.clone()].fill((slope * by_margin / all_pairs) as f32);
            }
            if self.sft > 0.0 {
                let each = self.sft / counts.chosen.max(1) as f64;
                sums.loss -= each * sum(&logs[pair[0].clone()]);
                for value in &mut derivative[pair[0].clone()] {
                    *value -= each as f32;
                }
            }
            sums.sequences += 1.0;
            sums.chosen += self.beta * chosen;
            sums.rejected += self.beta * rejected;
            sums.preferred += f64::from(u8::from(chosen > rejected));
        }
        (derivative, sums)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs() -> (Sequences, SequenceCounts, TokenScores) {
        let pairs = Sequences {
            targets: vec![2, 3, 1, 2],
            reference: vec![-1.0, -0.5, -0.2, -1.5, -0.7, -2.0, -0.3, -0.9],
            ..Sequences::default()
        };
        let scores = TokenScores {
            log_probabilities: vec![-0.8, -0.6, -0.1, -1.9, -0.4, -1.0, -0.8, -0.2],
            entropies: vec![0.5; 8],
            correct: 0.0,
        };
        let counts = SequenceCounts::of([&pairs]);
        (pairs, counts, scores)
    }

    /// The derivative is the slope of the loss, for all forms of it.
    #[test]
    fn the_derivative_is_that_of_the_loss() {
        for loss in [PairLoss::Sigmoid, PairLoss::Ipo] {
            let dpo = Dpo {
                loss,
                beta: 0.3,
                label_smoothing: 0.1,
                sft: 0.5,
            };
            let (pairs, counts, scores) = pairs();
            let (derivative, _) = dpo.derivative(&pairs, &counts, &scores);
            for (at, found) in derivative.iter().enumerate() {
                let moved = |by: f32| {
                    let mut scores = scores.clone();
                    scores.log_probabilities[at] += by;
                    dpo.derivative(&pairs, &counts, &scores).1.loss
                };
                let step = 1.0 / 256.0;
                let slope = (moved(step) - moved(-step)) / (2.0 * f64::from(step));
                let found = f64::from(*found);
                assert!(
                    (slope - found).abs() < 1e-4,
                    "{loss:?} {at}: {slope} {found}"
                );
            }
        }
    }

    #[test]
    fn at_the_reference_no_answer_is_preferred_and_the_loss_is_that_of_a_coin() {
        let dpo = Dpo {
            loss: PairLoss::Sigmoid,
            beta: 0.1,
            label_smoothing: 0.0,
            sft: 0.0,
        };
        let (mut pairs, counts, scores) = pairs();
        pairs.reference = scores.log_probabilities.clone();
        let (derivative, sums) = dpo.derivative(&pairs, &counts, &scores);
        assert!((sums.loss - std::f64::consts::LN_2).abs() < 1e-12);
        assert_eq!(
            (sums.sequences, sums.preferred, sums.chosen),
            (2.0, 0.0, 0.0)
        );
        // Half of beta, over two pairs: up for the chosen, down for the rejected.
        assert!((derivative[0] + 0.025).abs() < 1e-7 && (derivative[2] - 0.025).abs() < 1e-7);
    }

    #[test]
    fn parts_of_a_window_add_up_to_the_whole() {
        let dpo = Dpo {
            loss: PairLoss::Ipo,
            beta: 0.2,
            label_smoothing: 0.0,
            sft: 1.0,
        };
        let (pairs, counts, scores) = pairs();
        let (whole, sums) = dpo.derivative(&pairs, &counts, &scores);
        let mut parts = ObjectiveSums::default();
        let mut joined = Vec::new();
        for (targets, range) in [(vec![2, 3], 0..5), (vec![1, 2], 5..8)] {
            let part = Sequences {
                targets,
                reference: pairs.reference[range.clone()].to_vec(),
                ..Sequences::default()
            };
            let scores = TokenScores {
                log_probabilities: scores.log_probabilities[range.clone()].to_vec(),
                entropies: scores.entropies[range].to_vec(),
                correct: 0.0,
            };
            let (derivative, sums) = dpo.derivative(&part, &counts, &scores);
            joined.extend(derivative);
            parts.add(&sums);
        }
        assert_eq!(joined, whole);
        assert!((parts.loss - sums.loss).abs() < 1e-12);
    }
}

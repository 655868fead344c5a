//! chrF: an F score over n-grams of up to six characters in which recall weighs four times as much
//! as precision.
//!
//! Scores are fractions, 0 to 1. Source: `CHRF`, sacrebleu 2.6.0, with its defaults (no words,
//! white space left out).

use super::ngrams::{Overlap, repeated};

/// The longest n-gram.
pub const CHRF_ORDER: usize = 6;
const BETA: f64 = 2.0;

/// What chrF needs of one pair or, added up, of many; by order - 1. Whole numbers, unless weighted.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ChrfCounts {
    /// N-grams in both.
    pub matches: [f64; CHRF_ORDER],
    /// N-grams of the prediction; 0 where the reference has none.
    pub prediction: [f64; CHRF_ORDER],
    /// N-grams of the reference.
    pub reference: [f64; CHRF_ORDER],
}

impl ChrfCounts {
    /// The counts of one pair of token lists: characters for chrF proper.
    #[must_use]
    pub fn of<T: Ord>(prediction: &[T], reference: &[T]) -> Self {
        Self::from_overlaps(&std::array::from_fn(|at| {
            repeated(prediction, reference, at + 1)
        }))
    }

    pub(super) fn from_overlaps(overlaps: &[Overlap; CHRF_ORDER]) -> Self {
        Self {
            matches: overlaps.map(|overlap| overlap.matches as f64),
            prediction: overlaps.map(|overlap| {
                if overlap.reference == 0 {
                    0.0
                } else {
                    overlap.prediction as f64
                }
            }),
            reference: overlaps.map(|overlap| overlap.reference as f64),
        }
    }

    /// Adds `other`, taken `weight` times.
    pub fn add(&mut self, other: &Self, weight: f64) {
        for at in 0..CHRF_ORDER {
            self.matches[at] += weight * other.matches[at];
            self.prediction[at] += weight * other.prediction[at];
            self.reference[at] += weight * other.reference[at];
        }
    }

    /// The F score of the mean precision and the mean recall over the orders that both sides have.
    #[must_use]
    pub fn score(&self) -> f64 {
        let (mut precision, mut recall, mut orders) = (0.0, 0.0, 0.0);
        for at in 0..CHRF_ORDER {
            if self.prediction[at] > 0.0 && self.reference[at] > 0.0 {
                precision += self.matches[at] / self.prediction[at];
                recall += self.matches[at] / self.reference[at];
                orders += 1.0;
            }
        }
        if precision + recall == 0.0 {
            return 0.0;
        }
        precision /= orders;
        recall /= orders;
        let weight = BETA * BETA;
        (1.0 + weight) * precision * recall / (weight * precision + recall)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_order_by_hand() {
        // Precision 1, recall 1/2 over the only order that both sides have.
        let score = ChrfCounts::of(&[1], &[1, 2]).score();
        assert!((score - 5.0 * 0.5 / 4.5).abs() < 1e-12);
    }

    #[test]
    fn nothing_in_common_or_nothing_at_all_is_zero() {
        assert_eq!(ChrfCounts::of(&[1], &[2]).score(), 0.0);
        assert_eq!(ChrfCounts::of::<u32>(&[], &[]).score(), 0.0);
    }
}

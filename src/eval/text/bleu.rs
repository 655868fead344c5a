//! BLEU: how much of a prediction is in the reference, n-gram by n-gram, with a penalty for
//! brevity.
//!
//! The corpus form adds the counts of all pairs and divides once; it is no mean of sentence scores.
//! Scores are fractions, 0 to 1.

use super::ngrams::{Overlap, repeated};

/// The longest n-gram of BLEU-4.
pub const MAX_ORDER: usize = 4;

/// What replaces a precision of zero, so that one missing order does not make the whole score
/// zero.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Smoothing {
    /// Nothing: an order without a match makes the score 0.
    None,
    /// Halves with each order without a match: 1/2, 1/4, … match (NIST; sacrebleu's default).
    Exponential,
    /// Adds so many matches and n-grams to each order above 1.
    AddK(f64),
}

/// What BLEU needs of one pair or, added up, of many. Whole numbers, unless weighted.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BleuCounts {
    /// By order - 1: n-grams of the predictions that the references have too.
    pub matches: [f64; MAX_ORDER],
    /// By order - 1: n-grams of the predictions.
    pub totals: [f64; MAX_ORDER],
    /// Tokens of the predictions.
    pub prediction_length: f64,
    /// Tokens of the references.
    pub reference_length: f64,
}

impl BleuCounts {
    /// The counts of one pair of token lists.
    #[must_use]
    pub fn of<T: Ord>(prediction: &[T], reference: &[T]) -> Self {
        let overlaps = std::array::from_fn(|at| repeated(prediction, reference, at + 1));
        Self::from_overlaps(&overlaps, prediction.len(), reference.len())
    }

    pub(super) fn from_overlaps(
        overlaps: &[Overlap; MAX_ORDER],
        prediction: usize,
        reference: usize,
    ) -> Self {
        Self {
            matches: overlaps.map(|overlap| overlap.matches as f64),
            totals: overlaps.map(|overlap| overlap.prediction as f64),
            prediction_length: prediction as f64,
            reference_length: reference as f64,
        }
    }

    /// Adds `other`, taken `weight` times.
    pub fn add(&mut self, other: &Self, weight: f64) {
        for at in 0..MAX_ORDER {
            self.matches[at] += weight * other.matches[at];
            self.totals[at] += weight * other.totals[at];
        }
        self.prediction_length += weight * other.prediction_length;
        self.reference_length += weight * other.reference_length;
    }

    /// BLEU of `order` (1 to 4) for counts of a whole corpus; sacrebleu's `corpus_score`.
    ///
    /// # Panics
    /// If `order` is 0 or above 4.
    #[must_use]
    pub fn corpus(&self, order: usize, smoothing: Smoothing) -> f64 {
        self.score(order, smoothing, false)
    }

    /// BLEU of `order` (1 to 4) for the counts of one pair, over the orders that the prediction is
    /// long enough for; sacrebleu's `sentence_score` with `effective_order`.
    ///
    /// # Panics
    /// If `order` is 0 or above 4.
    #[must_use]
    pub fn sentence(&self, order: usize, smoothing: Smoothing) -> f64 {
        self.score(order, smoothing, true)
    }

    /// Source: `BLEU.compute_bleu`, sacrebleu 2.6.0.
    fn score(&self, order: usize, smoothing: Smoothing, effective_order: bool) -> f64 {
        assert!(
            (1..=MAX_ORDER).contains(&order),
            "order is {order}, expected 1 to {MAX_ORDER}"
        );
        if self.matches[..order].iter().all(|&matches| matches == 0.0) {
            return 0.0;
        }
        let mut logs = 0.0;
        let mut counted = 0;
        let mut factor = 1.0;
        for at in 0..order {
            let added = match smoothing {
                Smoothing::AddK(k) if at > 0 => k,
                _ => 0.0,
            };
            let (matches, total) = (self.matches[at] + added, self.totals[at] + added);
            if total == 0.0 {
                if effective_order {
                    break;
                }
                return 0.0;
            }
            counted += 1;
            if matches > 0.0 {
                logs += (matches / total).ln();
            } else if smoothing == Smoothing::Exponential {
                factor *= 2.0;
                logs += (1.0 / (factor * total)).ln();
            } else {
                return 0.0;
            }
        }
        self.brevity_penalty() * (logs / f64::from(counted)).exp()
    }

    fn brevity_penalty(&self) -> f64 {
        if self.prediction_length >= self.reference_length {
            1.0
        } else if self.prediction_length == 0.0 {
            0.0
        } else {
            (1.0 - self.reference_length / self.prediction_length).exp()
        }
    }
}

/// Sentence BLEU-4 as training programs report it: nltk's `sentence_bleu` with smoothing method 3.
///
/// Unlike sacrebleu's, it counts all four orders however short the prediction is.
/// Source: `nltk/translate/bleu_score.py`, nltk 3.10.
#[must_use]
pub fn nltk_method3<T: Ord>(prediction: &[T], reference: &[T]) -> f64 {
    let counts = BleuCounts::of(prediction, reference);
    if counts.matches[0] == 0.0 {
        return 0.0;
    }
    let mut factor = 1.0;
    let mut logs = 0.0;
    for (matches, total) in counts.matches.into_iter().zip(counts.totals) {
        let total = total.max(1.0);
        logs += 0.25
            * if matches == 0.0 {
                factor *= 2.0;
                (1.0 / (factor * total)).ln()
            } else {
                (matches / total).ln()
            };
    }
    counts.brevity_penalty() * logs.exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn precisions_and_brevity_by_hand() {
        let counts = BleuCounts::of(&[1, 2, 3], &[1, 2, 4, 5]);
        let brevity = (1.0_f64 - 4.0 / 3.0).exp();
        let unigrams = 2.0_f64 / 3.0;
        assert!((counts.corpus(1, Smoothing::None) - brevity * unigrams).abs() < 1e-12);
        assert!(
            (counts.corpus(2, Smoothing::None) - brevity * (unigrams * 0.5).sqrt()).abs() < 1e-12
        );
        assert_eq!(counts.corpus(3, Smoothing::None), 0.0);
        let smoothed = brevity * (unigrams * 0.5 * 0.5).cbrt();
        assert!((counts.corpus(3, Smoothing::Exponential) - smoothed).abs() < 1e-12);
        // No four tokens, no fourth order: the corpus form gives 0, the sentence form leaves it
        // out.
        assert_eq!(counts.corpus(4, Smoothing::Exponential), 0.0);
        assert!((counts.sentence(4, Smoothing::Exponential) - smoothed).abs() < 1e-12);
    }

    #[test]
    fn an_equal_text_scores_one_and_an_empty_one_zero() {
        let tokens = [1, 2, 3, 4, 5];
        assert_eq!(
            BleuCounts::of(&tokens, &tokens).corpus(4, Smoothing::None),
            1.0
        );
        assert_eq!(nltk_method3(&tokens, &tokens), 1.0);
        assert_eq!(
            BleuCounts::of(&[], &tokens).sentence(4, Smoothing::AddK(1.0)),
            0.0
        );
        assert_eq!(nltk_method3(&[], &tokens), 0.0);
    }

    #[test]
    fn adding_with_weight_two_is_adding_twice() {
        let pair = BleuCounts::of(&[1, 2, 3], &[1, 2, 4, 5]);
        let (mut once, mut twice) = (BleuCounts::default(), BleuCounts::default());
        once.add(&pair, 2.0);
        twice.add(&pair, 1.0);
        twice.add(&pair, 1.0);
        assert_eq!(once, twice);
    }
}

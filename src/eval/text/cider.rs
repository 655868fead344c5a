//! CIDEr-D: likeness of a prediction to its reference in n-grams weighted by how rare they are
//! among all references.
//!
//! 0 to 10, the source's scale. The weights come from the references of the corpus that is scored,
//! so scores of two test sets do not compare; an n-gram that is in every reference weighs
//! nothing, and a corpus of one pair scores 0. Images of one study with the same report count as so
//! many documents, as they would in the source.
//!
//! Source: `CiderScorer`, pycocoevalcap 1.2, which is CIDEr-D (clipped counts, length penalty,
//! sigma 6).

use std::collections::HashMap;

/// The longest n-gram.
const ORDER: usize = 4;
const SIGMA: f64 = 6.0;

/// N-grams of one order with their counts, sorted; a key packs up to four token numbers.
type Terms = Vec<(u128, f64)>;

/// The rarity of n-grams among a set of references.
#[derive(Debug)]
pub struct CiderD {
    /// How many references have an n-gram.
    frequency: HashMap<u128, f64>,
    log_documents: f64,
}

impl CiderD {
    /// Counts the n-grams of `references`, token numbers of one
    /// [`Vocabulary`](super::segment::Vocabulary).
    pub fn new<'a>(references: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut frequency = HashMap::new();
        let mut documents = 0.0_f64;
        for reference in references {
            documents += 1.0;
            for order in 1..=ORDER {
                for (key, _) in terms(reference, order) {
                    *frequency.entry(key).or_insert(0.0) += 1.0;
                }
            }
        }
        Self {
            frequency,
            log_documents: documents.max(1.0).ln(),
        }
    }

    /// The score of one pair, 0 to 10, in numbers of the same vocabulary.
    #[must_use]
    pub fn score(&self, prediction: &[u32], reference: &[u32]) -> f64 {
        // The source takes the number of bigrams for the length.
        let length = |tokens: &[u32]| tokens.len().saturating_sub(1) as f64;
        let difference = length(prediction) - length(reference);
        let penalty = (-difference * difference / (2.0 * SIGMA * SIGMA)).exp();
        let likeness: f64 = (1..=ORDER)
            .map(|order| self.cosine(prediction, reference, order))
            .sum();
        10.0 * penalty * likeness / ORDER as f64
    }

    fn cosine(&self, prediction: &[u32], reference: &[u32], order: usize) -> f64 {
        let (prediction, reference) = (
            self.weighted(prediction, order),
            self.weighted(reference, order),
        );
        let mut product = 0.0;
        let mut others = reference.iter().peekable();
        for &(key, weight) in &prediction {
            while others.next_if(|other| other.0 < key).is_some() {}
            if let Some(other) = others.next_if(|other| other.0 == key) {
                product += weight.min(other.1) * other.1;
            }
        }
        let norm = |terms: &Terms| terms.iter().map(|term| term.1 * term.1).sum::<f64>().sqrt();
        let norms = norm(&prediction) * norm(&reference);
        if norms > 0.0 { product / norms } else { 0.0 }
    }

    fn weighted(&self, tokens: &[u32], order: usize) -> Terms {
        let mut terms = terms(tokens, order);
        for (key, weight) in &mut terms {
            let documents = self.frequency.get(key).copied().unwrap_or(1.0);
            *weight *= self.log_documents - documents.ln();
        }
        terms
    }
}

fn terms(tokens: &[u32], order: usize) -> Terms {
    // A number is raised by one, so that no n-gram looks like a longer one that starts with number
    // 0.
    let pack = |ngram: &[u32]| {
        ngram.iter().fold(0_u128, |key, &token| {
            key << 32 | u128::from(token.wrapping_add(1))
        })
    };
    let mut keys: Vec<u128> = tokens.windows(order).map(pack).collect();
    keys.sort_unstable();
    keys.chunk_by(|a, b| a == b)
        .map(|run| (run[0], run.len() as f64))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_equal_rare_text_scores_ten() {
        let references: [&[u32]; 2] = [&[1, 2, 3, 4, 5], &[6, 7, 8, 9, 10]];
        let cider = CiderD::new(references);
        assert!((cider.score(references[0], references[0]) - 10.0).abs() < 1e-12);
        assert_eq!(cider.score(references[0], references[1]), 0.0);
        assert_eq!(cider.score(&[], references[1]), 0.0);
    }

    #[test]
    fn what_every_reference_says_weighs_nothing() {
        let references: [&[u32]; 2] = [&[1, 2], &[1, 2]];
        assert_eq!(CiderD::new(references).score(&[1, 2], &[1, 2]), 0.0);
    }

    #[test]
    fn orders_do_not_mix() {
        assert_eq!(terms(&[0, 0], 1), [(1, 2.0)]);
        assert_eq!(terms(&[0, 0], 2), [((1 << 32) + 1, 1.0)]);
    }
}

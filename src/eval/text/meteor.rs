//! METEOR with the exact matching module alone: recall-heavy F mean of the shared tokens, less a
//! penalty for their order. Stems and synonyms are English resources, so Chinese reports are
//! compared by the tokens themselves.
//!
//! Scores are fractions, 0 to 1. Source: `nltk/translate/meteor_score.py`, nltk 3.10 (`alpha`,
//! `beta`, `gamma` its defaults).

use std::collections::HashMap;
use std::hash::Hash;

const ALPHA: f64 = 0.9;
const BETA: i32 = 3;
const GAMMA: f64 = 0.5;

/// METEOR of two token lists. The reference code compares in lower case: lower the tokens first.
#[must_use]
pub fn meteor<T: Eq + Hash>(prediction: &[T], reference: &[T]) -> f64 {
    let matches = align(prediction, reference);
    if matches.is_empty() {
        return 0.0;
    }
    let count = matches.len() as f64;
    let precision = count / prediction.len() as f64;
    let recall = count / reference.len() as f64;
    let mean = precision * recall / (ALPHA * precision + (1.0 - ALPHA) * recall);
    let follows =
        |pair: &[(usize, usize)]| pair[1].0 == pair[0].0 + 1 && pair[1].1 == pair[0].1 + 1;
    let chunks = 1 + matches.windows(2).filter(|pair| !follows(pair)).count();
    let penalty = GAMMA * (chunks as f64 / count).powi(BETA);
    (1.0 - penalty) * mean
}

/// Pairs of equal tokens as (position in the prediction, position in the reference), in the order
/// of the prediction.
///
/// From the end, each token takes the last free equal one; this is not always the alignment with
/// the fewest chunks, but it is the one that the reference code scores.
fn align<T: Eq + Hash>(prediction: &[T], reference: &[T]) -> Vec<(usize, usize)> {
    let mut free: HashMap<&T, Vec<usize>> = HashMap::with_capacity(reference.len());
    for (at, token) in reference.iter().enumerate() {
        free.entry(token).or_default().push(at);
    }
    let mut matches = Vec::with_capacity(prediction.len());
    for (at, token) in prediction.iter().enumerate().rev() {
        if let Some(other) = free.get_mut(token).and_then(Vec::pop) {
            matches.push((at, other));
        }
    }
    matches.reverse();
    matches
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_the_reference_code() {
        let prediction = "it is a guide to action which ensures that the military always \
                          obeys the commands of the party";
        let reference = "it is a guide to action that ensures that the military will \
                         forever heed party commands";
        let split = |text: &'static str| text.split(' ').collect::<Vec<_>>();
        assert!((meteor(&split(prediction), &split(reference)) - 0.6944).abs() < 5e-5);
    }

    #[test]
    fn an_equal_text_loses_one_chunk() {
        assert!((meteor(&[1, 2], &[1, 2]) - (1.0 - 0.5 / 8.0)).abs() < 1e-12);
        assert!((meteor(&[1, 2], &[2, 1]) - 0.5).abs() < 1e-12);
    }

    #[test]
    fn nothing_in_common_is_zero() {
        assert_eq!(meteor(&[1], &[2]), 0.0);
        assert_eq!(meteor::<u32>(&[], &[]), 0.0);
    }
}

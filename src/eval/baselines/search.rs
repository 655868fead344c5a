//! What a model has to beat: the same report for everyone, any report of the training set, and the
//! report of the most similar training image. None of them looks for a finding.

use std::collections::HashMap;

use rand::seq::index;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::eval::text::{
    lcs::Pattern,
    ngrams::Overlap,
    rouge::f1,
    segment::{Vocabulary, characters},
};

/// Embeddings that cannot be compared.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum BaselineError {
    /// There is nothing to take a neighbour from.
    #[error("the training set has no embedding, expected at least one")]
    NoTraining,
    /// A dimension of 0, or values that are not whole rows of it.
    #[error(
        "the {set} embeddings hold {values} values, expected a multiple of the dimension `{dimension}`"
    )]
    Shape {
        /// `training` or `query`.
        set: &'static str,
        /// How many values there are.
        values: usize,
        /// The width of a row.
        dimension: usize,
    },
    /// A row without direction, for which the cosine does not exist.
    #[error(
        "row {row} of the {set} embeddings is all zero or not finite, expected a vector with a direction"
    )]
    Row {
        /// `training` or `query`.
        set: &'static str,
        /// Which row, from 0.
        row: usize,
    },
}

/// How the best constant report is sought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConstantSearch {
    /// Up to so many distinct reports, each is compared with all; above, a sample of so many with
    /// each other.
    pub most_compared: usize,
    /// The same seed takes the same sample.
    pub seed: u64,
}

impl Default for ConstantSearch {
    fn default() -> Self {
        Self {
            most_compared: 4000,
            seed: 42,
        }
    }
}

/// The report that fits all others best.
#[derive(Debug, Clone, PartialEq)]
pub struct ConstantReport {
    /// Its first place among the reports.
    pub index: usize,
    /// Its mean ROUGE-L on characters with the reports compared, itself among them; a fraction, 0
    /// to 1.
    pub mean_rouge_l: f64,
    /// Whether every report was compared, and not a sample.
    pub exact: bool,
}

/// Finds the training report with the highest mean character ROUGE-L over the training reports.
///
/// A report that occurs often counts as often as it occurs. Of equal ones the first is taken.
/// `None` without reports.
#[must_use]
pub fn best_constant_report<R: AsRef<str>>(
    reports: &[R],
    search: &ConstantSearch,
) -> Option<ConstantReport> {
    let mut occurrences: HashMap<&str, (usize, f64)> = HashMap::new();
    for (at, report) in reports.iter().enumerate() {
        occurrences.entry(report.as_ref()).or_insert((at, 0.0)).1 += 1.0;
    }
    let mut distinct: Vec<(usize, f64)> = occurrences.into_values().collect();
    distinct.sort_unstable_by_key(|&(at, _)| at);
    let exact = distinct.len() <= search.most_compared;
    if !exact {
        let mut rng = ChaCha8Rng::seed_from_u64(search.seed);
        let mut chosen = index::sample(&mut rng, distinct.len(), search.most_compared).into_vec();
        chosen.sort_unstable();
        distinct = chosen.into_iter().map(|at| distinct[at]).collect();
    }

    let mut vocabulary = Vocabulary::default();
    let texts: Vec<Vec<u32>> = distinct
        .iter()
        .map(|&(at, _)| vocabulary.numbers(&characters(reports[at].as_ref())))
        .collect();
    let mut sums = vec![0.0; texts.len()];
    for (at, text) in texts.iter().enumerate() {
        let pattern = Pattern::new(text, vocabulary.len());
        sums[at] += distinct[at].1 * if text.is_empty() { 0.0 } else { 1.0 };
        for (other, with) in texts.iter().enumerate().skip(at + 1) {
            let matches = pattern.length_with(with);
            // F1 is the same either way round, so each pair is compared once.
            let score = f1(Overlap {
                matches,
                prediction: text.len(),
                reference: with.len(),
            });
            sums[at] += distinct[other].1 * score;
            sums[other] += distinct[at].1 * score;
        }
    }
    let compared: f64 = distinct.iter().map(|&(_, times)| times).sum();
    let mut best: Option<(usize, f64)> = None;
    for (at, &sum) in sums.iter().enumerate() {
        if best.is_none_or(|(_, highest)| sum > highest) {
            best = Some((at, sum));
        }
    }
    best.map(|(at, sum)| ConstantReport {
        index: distinct[at].0,
        mean_rouge_l: sum / compared,
        exact,
    })
}

/// For each of `count` predictions, the place of a training report drawn at random (with
/// replacement).
///
/// The same seed draws the same places. Empty if there are no `reports`.
#[must_use]
pub fn random_reports(reports: usize, count: usize, seed: u64) -> Vec<usize> {
    if reports == 0 {
        return Vec::new();
    }
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(0..reports)).collect()
}

/// The training row most like a query.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Neighbour {
    /// Which training row, from 0; of equal ones the first.
    pub index: usize,
    /// Cosine of the angle between the two, -1 to 1.
    pub cosine: f32,
}

/// Finds for each query row the training row with the greatest cosine.
///
/// # Shapes
/// - `queries`: `[queries, dimension]`, row after row
/// - `training`: `[reports, dimension]`, row after row
/// - returns: `[queries]`
///
/// # Errors
/// [`BaselineError`] for values that are no whole rows, for a row that is zero or not finite, and
/// without training rows.
pub fn nearest_neighbours(
    queries: &[f32],
    training: &[f32],
    dimension: usize,
) -> Result<Vec<Neighbour>, BaselineError> {
    let queries = unit_rows("query", queries, dimension)?;
    let training = unit_rows("training", training, dimension)?;
    if training.is_empty() {
        return Err(BaselineError::NoTraining);
    }
    let nearest = |query: &[f32]| {
        let mut best = Neighbour {
            index: 0,
            cosine: f32::NEG_INFINITY,
        };
        for (index, row) in training.chunks_exact(dimension).enumerate() {
            let cosine: f32 = query.iter().zip(row).map(|(a, b)| a * b).sum();
            if cosine > best.cosine {
                best = Neighbour { index, cosine };
            }
        }
        best.cosine = best.cosine.clamp(-1.0, 1.0);
        best
    };
    Ok(queries.chunks_exact(dimension).map(nearest).collect())
}

fn unit_rows(
    set: &'static str,
    values: &[f32],
    dimension: usize,
) -> Result<Vec<f32>, BaselineError> {
    if dimension == 0 || !values.len().is_multiple_of(dimension) {
        return Err(BaselineError::Shape {
            set,
            values: values.len(),
            dimension,
        });
    }
    let mut rows = Vec::with_capacity(values.len());
    for (row, vector) in values.chunks_exact(dimension).enumerate() {
        let norm = vector
            .iter()
            .map(|&value| f64::from(value).powi(2))
            .sum::<f64>()
            .sqrt();
        if !(norm.is_finite() && norm > 0.0) {
            return Err(BaselineError::Row { set, row });
        }
        rows.extend(vector.iter().map(|&value| (f64::from(value) / norm) as f32));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::text::rouge::rouge_l;

    const REPORTS: [&str; 5] = [
        "双肺纹理清晰。",
        "心影增大。",
        "双肺纹理增多。",
        "双肺纹理清晰，心影不大。",
        "心影增大。",
    ];

    #[test]
    fn the_best_constant_is_the_best_by_plain_search() {
        let found =
            best_constant_report(&REPORTS, &ConstantSearch::default()).expect("there are reports");
        let mean = |at: usize| {
            let score = |other: &&str| rouge_l(&characters(REPORTS[at]), &characters(other));
            REPORTS.iter().map(score).sum::<f64>() / REPORTS.len() as f64
        };
        assert!(found.exact);
        assert!((found.mean_rouge_l - mean(found.index)).abs() < 1e-12);
        assert!((0..REPORTS.len()).all(|at| mean(at) <= found.mean_rouge_l + 1e-12));
    }

    #[test]
    fn a_sample_is_seeded_and_says_so() {
        let search = ConstantSearch {
            most_compared: 2,
            seed: 7,
        };
        let found = best_constant_report(&REPORTS, &search);
        assert!(!found.as_ref().expect("there are reports").exact);
        assert_eq!(found, best_constant_report(&REPORTS, &search));
        assert_eq!(best_constant_report::<&str>(&[], &search), None);
        assert_eq!(
            best_constant_report(&[""], &search)
                .expect("one report")
                .mean_rouge_l,
            0.0
        );
    }

    #[test]
    fn random_places_are_seeded_and_in_range() {
        let places = random_reports(7, 100, 1);
        assert_eq!(places, random_reports(7, 100, 1));
        assert_ne!(places, random_reports(7, 100, 2));
        assert!(places.iter().all(|&at| at < 7));
        assert!(random_reports(0, 3, 1).is_empty());
    }

    #[test]
    fn the_neighbour_is_the_nearest_by_angle_not_by_length() {
        let training = [10.0, 0.0, 0.1, 0.1, -1.0, 0.0];
        let found =
            nearest_neighbours(&[1.0, 0.9, 5.0, -1.0], &training, 2).expect("rows are good");
        assert_eq!((found[0].index, found[1].index), (1, 0));
        assert!((found[0].cosine - 0.998_618).abs() < 1e-5);
    }

    #[test]
    fn bad_embeddings_are_named() {
        let shape = |dimension| BaselineError::Shape {
            set: "query",
            values: 3,
            dimension,
        };
        assert_eq!(nearest_neighbours(&[1.0; 3], &[1.0; 2], 2), Err(shape(2)));
        assert_eq!(nearest_neighbours(&[1.0; 3], &[1.0; 2], 0), Err(shape(0)));
        assert_eq!(
            nearest_neighbours(&[1.0; 2], &[], 2),
            Err(BaselineError::NoTraining)
        );
        let row = BaselineError::Row {
            set: "training",
            row: 1,
        };
        assert_eq!(nearest_neighbours(&[1.0], &[1.0, 0.0], 1), Err(row.clone()));
        assert_eq!(nearest_neighbours(&[1.0], &[1.0, f32::NAN], 1), Err(row));
    }
}

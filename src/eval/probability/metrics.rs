//! How good probabilities are: AUC, expected calibration error, Brier score, coverage against error.
//!
//! Every function takes cases of probability and truth; all but [`Ranked::auc`] want probabilities from 0 to 1.

use serde::Serialize;

/// Bins of a reliability curve.
pub const BINS: usize = 10;

/// Most points of a coverage curve that are kept.
const MOST_POINTS: usize = 200;

/// Cases in the order of their scores, for AUCs of many draws.
#[derive(Debug, Clone)]
pub struct Ranked {
    /// Score, truth, place of the study; rising.
    cases: Vec<(f64, bool, usize)>,
}

impl Ranked {
    /// Sorts cases of score, truth and study.
    pub fn new(mut cases: Vec<(f64, bool, usize)>) -> Self {
        cases.sort_by(|a, b| a.0.total_cmp(&b.0));
        Self { cases }
    }

    /// Area under the ROC curve, ties counted half, with study `s` taken `times[s]` times; not a number without both
    /// truths.
    ///
    /// Source: `roc_auc_score`, scikit-learn, with `sample_weight`.
    pub fn auc(&self, times: &[f64]) -> f64 {
        let (mut below, mut area, mut positives) = (0.0, 0.0, 0.0);
        for tied in self.cases.chunk_by(|a, b| a.0 == b.0) {
            let (mut there, mut not) = (0.0, 0.0);
            for (_, truth, study) in tied {
                if *truth {
                    there += times[*study];
                } else {
                    not += times[*study];
                }
            }
            area += there * (below + 0.5 * not);
            below += not;
            positives += there;
        }
        area / (positives * below)
    }
}

/// A bin of a reliability curve.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ReliabilityBin {
    /// Mean probability of its cases.
    pub probability: f64,
    /// Share of its cases that are positive.
    pub observed: f64,
    /// Its cases.
    pub count: usize,
}

/// The reliability curve over [`BINS`] bins of equal count. Bins end at quantiles of the probabilities, and equal
/// probabilities share a bin; empty ones are left out.
///
/// Source: `calibration_curve` with `strategy="quantile"`, scikit-learn.
pub fn reliability(cases: &[(f64, bool)]) -> Vec<ReliabilityBin> {
    let mut sorted: Vec<f64> = cases.iter().map(|case| case.0).collect();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else {
        return Vec::new();
    };
    let edges: Vec<f64> = (1..BINS)
        .map(|edge| {
            let place = edge as f64 / BINS as f64 * last as f64;
            let low = place.floor() as usize;
            let (a, b) = (sorted[low], sorted[(low + 1).min(last)]);
            let share = place - low as f64;
            // numpy interpolates from the nearer end; the last bit decides on which side of an edge a value is.
            if share >= 0.5 {
                b - (b - a) * (1.0 - share)
            } else {
                a + (b - a) * share
            }
        })
        .collect();
    let mut bins = [(0.0, 0.0, 0_usize); BINS];
    for (probability, truth) in cases {
        let bin = &mut bins[edges.partition_point(|edge| edge < probability)];
        bin.0 += probability;
        bin.1 += f64::from(u8::from(*truth));
        bin.2 += 1;
    }
    let filled = bins.into_iter().filter(|bin| bin.2 > 0);
    filled
        .map(|(probability, positives, count)| ReliabilityBin {
            probability: probability / count as f64,
            observed: positives / count as f64,
            count,
        })
        .collect()
}

/// Expected calibration error over the bins of a [`reliability`] curve: the mean distance of probability and observed
/// share, by the number of cases.
pub fn expected_calibration_error(bins: &[ReliabilityBin]) -> f64 {
    let all: usize = bins.iter().map(|bin| bin.count).sum();
    let distance = |bin: &ReliabilityBin| bin.count as f64 * (bin.probability - bin.observed).abs();
    bins.iter().map(distance).sum::<f64>() / all as f64
}

/// Mean square of probability less truth.
///
/// Source: `brier_score_loss`, scikit-learn.
pub fn brier(cases: &[(f64, bool)]) -> f64 {
    let square = |(p, truth): &(f64, bool)| (p - f64::from(u8::from(*truth))).powi(2);
    cases.iter().map(square).sum::<f64>() / cases.len() as f64
}

/// Coverage and error as more cases are answered, the surest first: `(share answered, error among them)`. An answer
/// is "there" from 0.5 on, its confidence the larger of `p` and `1 - p`; cases of equal confidence are answered
/// together.
pub fn coverage_curve(cases: &[(f64, bool)]) -> Vec<(f64, f64)> {
    let mut sorted: Vec<(f64, bool)> = cases
        .iter()
        .map(|(p, truth)| (p.max(1.0 - p), (*p >= 0.5) != *truth))
        .collect();
    sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
    let (mut answered, mut wrong) = (0_usize, 0_usize);
    sorted
        .chunk_by(|a, b| a.0 == b.0)
        .map(|tied| {
            answered += tied.len();
            wrong += tied.iter().filter(|case| case.1).count();
            (
                answered as f64 / cases.len() as f64,
                wrong as f64 / answered as f64,
            )
        })
        .collect()
}

/// The largest coverage of a [`coverage_curve`] whose error is at most `error`; 0 if there is none.
pub fn coverage_at(curve: &[(f64, f64)], error: f64) -> f64 {
    let good = curve.iter().filter(|(_, found)| *found <= error);
    good.map(|(coverage, _)| *coverage).fold(0.0, f64::max)
}

/// Cases in the order of their confidence, for the coverage of many draws of studies.
#[derive(Debug, Clone)]
pub struct Surest {
    /// Confidence, whether the answer is wrong, place of the study; falling.
    cases: Vec<(f64, bool, usize)>,
}

impl Surest {
    /// Sorts cases of probability, truth and study; answers and confidence as in [`coverage_curve`].
    pub fn new(cases: &[(f64, bool, usize)]) -> Self {
        let answered = |(p, truth, study): &(f64, bool, usize)| {
            (p.max(1.0 - p), (*p >= 0.5) != *truth, *study)
        };
        let mut cases: Vec<_> = cases.iter().map(answered).collect();
        cases.sort_by(|a, b| b.0.total_cmp(&a.0));
        Self { cases }
    }

    /// Coverage and error at each level of confidence, with study `s` taken `times[s]` times.
    fn levels<'a>(&'a self, times: &'a [f64]) -> impl Iterator<Item = (f64, f64)> + 'a {
        let all: f64 = self.cases.iter().map(|case| times[case.2]).sum();
        let (mut answered, mut wrong) = (0.0, 0.0);
        self.cases
            .chunk_by(|a, b| a.0 == b.0)
            .filter_map(move |tied| {
                for (_, is_wrong, study) in tied {
                    answered += times[*study];
                    wrong += f64::from(u8::from(*is_wrong)) * times[*study];
                }
                (answered > 0.0).then(|| (answered / all, wrong / answered))
            })
    }

    /// The largest coverage whose error is at most `error`; 0 if there is none, not a number without cases.
    pub fn coverage(&self, times: &[f64], error: f64) -> f64 {
        let mut any = false;
        let good = self
            .levels(times)
            .inspect(|_| any = true)
            .filter(|(_, found)| *found <= error);
        let best = good.map(|(coverage, _)| coverage).fold(0.0, f64::max);
        if any { best } else { f64::NAN }
    }

    /// The error when the surest answers are given until a share of at least `coverages[i]` is answered; `coverages`
    /// rise. Not a number without cases.
    pub fn errors(&self, times: &[f64], coverages: &[f64]) -> Vec<f64> {
        let mut found = Vec::with_capacity(coverages.len());
        let mut last = f64::NAN;
        for (coverage, error) in self.levels(times) {
            last = error;
            // Sums of shares end a little below 1.
            while found.len() < coverages.len() && coverage >= coverages[found.len()] - 1e-9 {
                found.push(error);
            }
        }
        found.resize(coverages.len(), last);
        found
    }
}

/// The curve with at most some 200 points, first and last among them: for drawing.
pub fn thinned(curve: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let Some(last) = curve.len().checked_sub(1) else {
        return Vec::new();
    };
    let step = curve.len().div_ceil(MOST_POINTS);
    let kept = curve.iter().enumerate();
    kept.filter(|(at, _)| at % step == 0 || *at == last)
        .map(|(_, point)| *point)
        .collect()
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    const GOLDENS: &str = include_str!("../../../tests/fixtures/probability/goldens.json");

    /// Sums in another order differ in the last digits.
    const CLOSE: f64 = 1e-12;

    fn numbers(value: &Value) -> Vec<f64> {
        let list = value.as_array().expect("a list");
        list.iter()
            .map(|one| one.as_f64().expect("a number"))
            .collect()
    }

    #[test]
    fn scores_are_those_of_scikit_learn() {
        let goldens: Value = serde_json::from_str(GOLDENS).expect("JSON");
        let cases = goldens["cases"].as_object().expect("named cases");
        assert!(cases.len() >= 4);
        for (name, golden) in cases {
            let probabilities = numbers(&golden["probability"]);
            let truths: Vec<bool> = numbers(&golden["truth"]).iter().map(|t| *t > 0.5).collect();
            let cases: Vec<(f64, bool)> = probabilities.into_iter().zip(truths).collect();
            let close = |what: &str, found: f64| {
                let expected = golden[what].as_f64().expect("a number");
                assert!(
                    (found - expected).abs() < CLOSE,
                    "{name} {what}: {found} {expected}"
                );
            };
            let alone = cases.iter().enumerate();
            let ranked = Ranked::new(alone.map(|(at, case)| (case.0, case.1, at)).collect());
            close("auc", ranked.auc(&vec![1.0; cases.len()]));
            close("auc_weighted", ranked.auc(&numbers(&golden["weights"])));
            close("brier", brier(&cases));
            let bins = reliability(&cases);
            close("ece", expected_calibration_error(&bins));
            let (predicted, observed) = (
                numbers(&golden["mean_predicted"]),
                numbers(&golden["fraction_positive"]),
            );
            assert_eq!(bins.len(), predicted.len(), "{name}");
            for (bin, (p, y)) in bins.iter().zip(predicted.iter().zip(&observed)) {
                assert!((bin.probability - p).abs() < CLOSE, "{name}: {bin:?} {p}");
                assert!((bin.observed - y).abs() < CLOSE, "{name}: {bin:?} {y}");
            }
            let curve = coverage_curve(&cases);
            for (target, expected) in [0.05, 0.1, 0.2]
                .iter()
                .zip(numbers(&golden["coverage_at_05_10_20"]))
            {
                let found = coverage_at(&curve, *target);
                assert!(
                    (found - expected).abs() < CLOSE,
                    "{name} at {target}: {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn coverage_of_weighted_cases_is_that_of_numpy() {
        let goldens: Value = serde_json::from_str(GOLDENS).expect("JSON");
        let grid = numbers(&goldens["coverage_grid"]);
        for (name, golden) in goldens["cases"].as_object().expect("named cases") {
            let (probabilities, truths) =
                (numbers(&golden["probability"]), numbers(&golden["truth"]));
            let pairs = probabilities.iter().zip(&truths).enumerate();
            let cases: Vec<(f64, bool, usize)> =
                pairs.map(|(at, (p, t))| (*p, *t > 0.5, at)).collect();
            let surest = Surest::new(&cases);
            let ones = vec![1.0; cases.len()];
            for (times, part) in [(&ones, "plain"), (&numbers(&golden["weights"]), "weighted")] {
                let expected = &golden[part];
                let levels: Vec<(f64, f64)> = surest.levels(times).collect();
                let curve = expected["curve"].as_array().expect("a list");
                assert_eq!(levels.len(), curve.len(), "{name} {part}");
                for ((coverage, error), point) in levels.iter().zip(curve) {
                    let point = numbers(point);
                    assert!((coverage - point[0]).abs() < CLOSE, "{name} {part}");
                    assert!((error - point[1]).abs() < CLOSE, "{name} {part}");
                }
                for (target, value) in [0.05, 0.1, 0.2].iter().zip(numbers(&expected["coverage"])) {
                    let found = surest.coverage(times, *target);
                    assert!(
                        (found - value).abs() < CLOSE,
                        "{name} {part}: {found} {value}"
                    );
                }
                let errors = surest.errors(times, &grid);
                for (found, value) in errors.iter().zip(numbers(&expected["errors"])) {
                    assert!(
                        (found - value).abs() < CLOSE,
                        "{name} {part}: {found} {value}"
                    );
                }
            }
        }
        let nothing = Surest::new(&[(0.5, true, 0)]);
        assert!(nothing.coverage(&[0.0], 0.05).is_nan());
        assert!(nothing.errors(&[0.0], &[0.5])[0].is_nan());
    }

    #[test]
    fn one_truth_alone_has_no_auc_and_nothing_no_curve() {
        let ranked = Ranked::new(vec![(0.2, true, 0), (0.3, true, 1)]);
        assert!(ranked.auc(&[1.0, 1.0]).is_nan());
        assert!(reliability(&[]).is_empty() && thinned(&[]).is_empty());
        let long: Vec<(f64, f64)> = (0..1000).map(|at| (f64::from(at), 0.0)).collect();
        let kept = thinned(&long);
        assert!(kept.len() <= MOST_POINTS + 1 && kept.last() == long.last());
    }
}

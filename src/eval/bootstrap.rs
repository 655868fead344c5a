//! Intervals by bootstrap over studies, and the paired comparison of two runs.
//!
//! The images of one study share a report, so their scores are not independent: whole studies are
//! drawn with replacement, never single pairs. It knows no metric: a statistic is any function of
//! how often each study was drawn.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::error::EvaluateError;

/// Fewest studies for a p value: a sign-flip test of `n` studies gives no less than `2 / 2^n`, which is below 0.05
/// from six on.
pub const FEWEST_FOR_P: usize = 6;

/// Up to so many studies all ways to swap answers are tried, 4,096 of them; above they are drawn.
const MOST_FOR_ALL_SWAPS: usize = 12;

/// Swaps that are drawn where a p value may be small, as many as RadEval draws: fewer could not give one that stays below
/// 0.05 when it is corrected for all scores.
const SWAPS: usize = 10_000;

/// Fewest studies for an interval: one study redrawn is always itself.
pub const FEWEST_FOR_INTERVAL: usize = 2;

/// How intervals are drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bootstrap {
    /// How many times the test set is drawn anew.
    pub resamples: usize,
    /// Share of the redrawn values inside the interval, above 0 and below 1.
    pub confidence: f64,
    /// The same seed draws the same studies.
    pub seed: u64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self {
            resamples: 1000,
            confidence: 0.95,
            seed: 42,
        }
    }
}

/// A value with its percentile interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// The statistic of the whole test set.
    pub value: f64,
    /// Lower end; not a number where there is no interval.
    pub low: f64,
    /// Upper end; not a number where there is no interval.
    pub high: f64,
}

/// Two runs on the same studies, with the interval of their difference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Comparison {
    /// The statistic of the first run.
    pub first: f64,
    /// The statistic of the second run.
    pub second: f64,
    /// Second less first, on the same redrawn studies each time.
    pub difference: Interval,
    /// Two-sided p value of paired approximate randomisation: how often a difference as large comes about when the two
    /// runs' answers are swapped at random, study by study. Never 0: up to twelve studies all
    /// swaps are counted, above the least is 1 / 10,001. Not a number below [`FEWEST_FOR_P`] studies, and where one run has no value.
    pub p: f64,
    /// The p value corrected by Holm's method for the number of scores compared.
    pub p_adjusted: f64,
}

impl Bootstrap {
    /// Checks the settings and that there is something to draw.
    fn check(&self, studies: usize) -> Result<(), EvaluateError> {
        if self.resamples == 0 {
            return Err(EvaluateError::Resamples);
        }
        if !(self.confidence > 0.0 && self.confidence < 1.0) {
            return Err(EvaluateError::Confidence(self.confidence));
        }
        if studies == 0 {
            return Err(EvaluateError::Empty);
        }
        Ok(())
    }

    /// Calls `statistics` once with every study taken once, then for each redraw; returns (first,
    /// others).
    fn draw(
        &self,
        studies: usize,
        mut statistics: impl FnMut(&[f64]) -> Vec<f64>,
    ) -> (Vec<f64>, Vec<Vec<f64>>) {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        let mut times = vec![1.0; studies];
        let whole = statistics(&times);
        let redrawn = (0..self.resamples)
            .map(|_| {
                times.fill(0.0);
                for _ in 0..studies {
                    times[rng.random_range(0..studies)] += 1.0;
                }
                statistics(&times)
            })
            .collect();
        (whole, redrawn)
    }

    /// An interval for each value that `statistics` gives.
    ///
    /// `statistics` gets, for each of `studies`, how often it was drawn, and returns the same
    /// number of values in the same order each time. A value that is not a number in some redraws
    /// (a rate over nothing) takes its interval from the others.
    ///
    /// # Errors
    /// [`EvaluateError::Resamples`], [`EvaluateError::Confidence`] for settings out of range,
    /// [`EvaluateError::Empty`] without studies.
    pub fn intervals(
        &self,
        studies: usize,
        statistics: impl FnMut(&[f64]) -> Vec<f64>,
    ) -> Result<Vec<Interval>, EvaluateError> {
        self.check(studies)?;
        let (whole, redrawn) = self.draw(studies, statistics);
        Ok((0..whole.len())
            .map(|at| {
                let redrawn = redrawn.iter().map(|values| values[at]).collect();
                self.interval(whole[at], redrawn, studies)
            })
            .collect())
    }

    /// Compares two runs value by value on the same redrawn studies.
    ///
    /// `first` and `second` are statistics as in [`Bootstrap::intervals`], over the same studies in
    /// the same order and with the same values in the same order. `mixed` gives the differences, second less first,
    /// with the marked studies swapped between the two. [`Comparison::p_adjusted`] is left equal to `p`: see
    /// [`adjust`].
    ///
    /// # Errors
    /// As [`Bootstrap::intervals`].
    pub fn compare(
        &self,
        studies: usize,
        mut first: impl FnMut(&[f64]) -> Vec<f64>,
        mut second: impl FnMut(&[f64]) -> Vec<f64>,
        mut mixed: impl FnMut(&[bool]) -> Vec<f64>,
    ) -> Result<Vec<Comparison>, EvaluateError> {
        self.check(studies)?;
        let mut wholes = Vec::new();
        let (whole, redrawn) = self.draw(studies, |times| {
            let (first, second) = (first(times), second(times));
            let differences = first
                .iter()
                .zip(&second)
                .map(|(first, second)| second - first)
                .collect();
            if wholes.is_empty() {
                wholes = first.into_iter().zip(second).collect();
            }
            differences
        });
        let p_values = if studies < FEWEST_FOR_P {
            vec![f64::NAN; whole.len()]
        } else {
            self.randomise(studies, &whole, &mut mixed)
        };
        Ok(wholes
            .into_iter()
            .enumerate()
            .map(|(at, (first, second))| {
                let differences: Vec<f64> = redrawn.iter().map(|values| values[at]).collect();
                Comparison {
                    first,
                    second,
                    difference: self.interval(whole[at], differences, studies),
                    p: p_values[at],
                    p_adjusted: p_values[at],
                }
            })
            .collect())
    }

    /// p values of paired approximate randomisation for the differences `whole`.
    fn randomise(
        &self,
        studies: usize,
        whole: &[f64],
        mixed: &mut impl FnMut(&[bool]) -> Vec<f64>,
    ) -> Vec<f64> {
        let all = 1_usize << studies.min(usize::BITS as usize - 1);
        let exact = studies <= MOST_FOR_ALL_SWAPS;
        let most = if exact {
            all
        } else {
            self.resamples.max(SWAPS)
        };
        // Another stream than that of the intervals.
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed ^ 0x5EED);
        let mut as_large = vec![0_usize; whole.len()];
        let mut swapped = vec![false; studies];
        let mut draws = 0;
        while draws < most {
            for (study, swap) in swapped.iter_mut().enumerate() {
                *swap = if exact {
                    draws >> study & 1 == 1
                } else {
                    rng.random()
                };
            }
            for ((count, observed), found) in as_large.iter_mut().zip(whole).zip(mixed(&swapped)) {
                // Sums in another order differ in the last digits.
                *count += usize::from(found.abs() >= observed.abs() - 1e-12);
            }
            draws += 1;
            // More tell nothing where no difference is large.
            let is_small = |count: &usize| *count * 20 < draws;
            if !exact && draws == self.resamples && !as_large.iter().any(is_small) {
                break;
            }
        }
        // The answers as they are count as one of the draws.
        let given = usize::from(!exact);
        let p = |(count, observed): (usize, &f64)| {
            if observed.is_nan() {
                return f64::NAN;
            }
            (count + given) as f64 / (draws + given) as f64
        };
        as_large.into_iter().zip(whole).map(p).collect()
    }

    fn interval(&self, value: f64, mut redrawn: Vec<f64>, studies: usize) -> Interval {
        redrawn.retain(|value| !value.is_nan());
        if studies < FEWEST_FOR_INTERVAL || value.is_nan() {
            redrawn.clear();
        }
        redrawn.sort_unstable_by(f64::total_cmp);
        let tail = (1.0 - self.confidence) / 2.0;
        Interval {
            value,
            low: quantile(&redrawn, tail),
            high: quantile(&redrawn, 1.0 - tail),
        }
    }
}

/// The quantile of sorted values with linear interpolation (numpy's default); NaN without values.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let place = share * last as f64;
    let low = place.floor() as usize;
    let high = (low + 1).min(last);
    sorted[low] + (sorted[high] - sorted[low]) * (place - low as f64)
}

/// Corrects the p values of `comparisons` by Holm's method; values that are not numbers do not count.
pub fn adjust<'c>(comparisons: impl IntoIterator<Item = &'c mut Comparison>) {
    let mut tested: Vec<&mut Comparison> = comparisons
        .into_iter()
        .filter(|comparison| !comparison.p.is_nan())
        .collect();
    tested.sort_by(|a, b| a.p.total_cmp(&b.p));
    let all = tested.len();
    let mut least: f64 = 0.0;
    for (rank, comparison) in tested.into_iter().enumerate() {
        least = least.max((comparison.p * (all - rank) as f64).min(1.0));
        comparison.p_adjusted = least;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mean_of(values: &[f64]) -> impl Fn(&[f64]) -> Vec<f64> {
        move |times| {
            let sum: f64 = times
                .iter()
                .zip(values)
                .map(|(times, value)| times * value)
                .sum();
            vec![sum / times.iter().sum::<f64>()]
        }
    }

    /// Differences of two means with some studies swapped.
    fn mixed_means<'v>(first: &'v [f64], second: &'v [f64]) -> impl Fn(&[bool]) -> Vec<f64> + 'v {
        move |swapped| {
            let difference = |at: usize| {
                let by = second[at] - first[at];
                if swapped[at] { -by } else { by }
            };
            let sum: f64 = (0..first.len()).map(difference).sum();
            vec![sum / first.len() as f64]
        }
    }

    #[test]
    fn the_interval_of_a_mean_is_near_the_normal_one() {
        let values: Vec<f64> = (0..400).map(|at| f64::from(at % 20)).collect();
        let drawn = Bootstrap::default()
            .intervals(values.len(), mean_of(&values))
            .expect("settings are good");
        // Standard error sqrt(33.25 / 400) = 0.288, times 1.96.
        assert!((drawn[0].value - 9.5).abs() < 1e-12);
        assert!((drawn[0].low - 8.935).abs() < 0.1, "{:?}", drawn[0]);
        assert!((drawn[0].high - 10.065).abs() < 0.1, "{:?}", drawn[0]);
    }

    #[test]
    fn the_same_seed_draws_the_same_and_another_does_not() {
        let values: Vec<f64> = (0..50).map(|at| f64::from(at * at)).collect();
        let draw = |seed| {
            Bootstrap {
                seed,
                ..Bootstrap::default()
            }
            .intervals(50, mean_of(&values))
            .expect("good")[0]
        };
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
    }

    #[test]
    fn a_small_steady_gain_is_seen_and_none_is_not() {
        let first: Vec<f64> = (0..100).map(|at| f64::from(at % 10)).collect();
        let second: Vec<f64> = first.iter().map(|value| value + 0.1).collect();
        let bootstrap = Bootstrap::default();
        let gain = bootstrap
            .compare(
                100,
                mean_of(&first),
                mean_of(&second),
                mixed_means(&first, &second),
            )
            .expect("good")[0];
        assert!((gain.difference.value - 0.1).abs() < 1e-9 && gain.difference.low > 0.0999);
        assert!((gain.p - 1.0 / 10_001.0).abs() < 1e-12);
        let none = bootstrap
            .compare(
                100,
                mean_of(&first),
                mean_of(&first),
                mixed_means(&first, &first),
            )
            .expect("good")[0];
        assert_eq!(
            (none.difference.low, none.difference.high, none.p),
            (0.0, 0.0, 1.0)
        );
    }

    #[test]
    fn few_studies_give_no_test_and_one_no_interval() {
        let bootstrap = Bootstrap::default();
        let compare = |studies: usize| {
            let (first, second) = (vec![0.0; studies], vec![1.0; studies]);
            bootstrap
                .compare(
                    studies,
                    mean_of(&first),
                    mean_of(&second),
                    mixed_means(&first, &second),
                )
                .expect("good")[0]
        };
        let one = compare(1);
        assert_eq!(
            (one.first, one.second, one.difference.value),
            (0.0, 1.0, 1.0)
        );
        assert!(one.p.is_nan() && one.difference.low.is_nan() && one.difference.high.is_nan());
        assert!(compare(5).p.is_nan() && !compare(5).difference.low.is_nan());
        // All six better: 2 of the 64 ways to flip signs are as far off.
        assert!(
            (compare(6).p - 2.0 / 64.0).abs() < 1e-12,
            "{}",
            compare(6).p
        );
        assert!((compare(20).p - 1.0 / 10_001.0).abs() < 1e-12);
    }

    #[test]
    fn a_value_that_one_run_lacks_has_no_p() {
        let nothing = |_: &[f64]| vec![f64::NAN];
        let compared = Bootstrap::default()
            .compare(10, nothing, mean_of(&[1.0; 10]), |_| vec![f64::NAN])
            .expect("good")[0];
        assert!(
            compared.p.is_nan() && compared.difference.value.is_nan(),
            "{compared:?}"
        );
    }

    #[test]
    fn settings_out_of_range_are_refused() {
        let statistic = |_: &[f64]| vec![0.0];
        let bad = |bootstrap: Bootstrap, studies| bootstrap.intervals(studies, statistic).is_err();
        assert!(bad(
            Bootstrap {
                resamples: 0,
                ..Bootstrap::default()
            },
            3
        ));
        assert!(bad(
            Bootstrap {
                confidence: 1.0,
                ..Bootstrap::default()
            },
            3
        ));
        assert!(bad(
            Bootstrap {
                confidence: f64::NAN,
                ..Bootstrap::default()
            },
            3
        ));
        assert!(bad(Bootstrap::default(), 0));
    }

    #[test]
    fn quantiles_are_interpolated() {
        assert_eq!(quantile(&[1.0, 2.0, 4.0], 0.75), 3.0);
        assert_eq!(quantile(&[7.0], 0.975), 7.0);
        assert!(quantile(&[], 0.5).is_nan());
    }

    #[test]
    fn holm_corrects_in_the_order_of_the_p_values() {
        let of = |p: f64| Comparison {
            first: 0.0,
            second: 0.0,
            difference: Interval {
                value: 0.0,
                low: 0.0,
                high: 0.0,
            },
            p,
            p_adjusted: p,
        };
        let mut all = [of(0.01), of(0.04), of(f64::NAN), of(0.03), of(0.005)];
        adjust(&mut all);
        let adjusted: Vec<f64> = all.iter().map(|one| one.p_adjusted).collect();
        // statsmodels 0.14: multipletests([0.01, 0.04, 0.03, 0.005], method="holm").
        for (found, expected) in adjusted.iter().zip([0.03, 0.06, f64::NAN, 0.06, 0.02]) {
            assert!(found.is_nan() == expected.is_nan());
            assert!(
                found.is_nan() || (found - expected).abs() < 1e-12,
                "{adjusted:?}"
            );
        }
    }
}

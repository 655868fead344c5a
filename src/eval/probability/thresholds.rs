//! Two thresholds of a class, between which the answer is "undecided".

use serde::{Deserialize, Serialize};

/// Fewest cases with the class, and fewest without it, for a threshold; and fewest decisions of a kind.
pub const FEWEST_CASES: usize = 5;

/// What a probability decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    /// The class is there.
    Present,
    /// It is not.
    Absent,
    /// Neither is sure enough.
    Undecided,
}

/// Up to which probability a class is absent, and from which it is present. `None`: never.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Thresholds {
    /// The highest probability that decides "absent".
    pub absent_to: Option<f64>,
    /// The lowest that decides "present".
    pub present_from: Option<f64>,
}

impl Thresholds {
    /// What `probability` decides.
    pub fn decide(&self, probability: f64) -> Decision {
        if self.present_from.is_some_and(|from| probability >= from) {
            Decision::Present
        } else if self.absent_to.is_some_and(|to| probability <= to) {
            Decision::Absent
        } else {
            Decision::Undecided
        }
    }

    /// The thresholds that decide the most of `cases` with at most `target_error` of wrong ones among those called
    /// present, and among those called absent.
    ///
    /// Both kinds are held to the target, so that many easy negatives do not pay for wrong positives. Nothing above one half
    /// is called absent, and nothing below it present: on few cases the target alone would allow that. A class with
    /// fewer than [`FEWEST_CASES`] cases of either truth gets no threshold: nothing shows that its answers are right.
    pub fn choose(cases: &[(f64, bool)], target_error: f64) -> Self {
        let positives = cases.iter().filter(|(_, truth)| *truth).count();
        if positives < FEWEST_CASES || cases.len() - positives < FEWEST_CASES {
            return Self::default();
        }
        let levels = levels(cases);
        // Positives and cases up to each level.
        let mut below = Vec::with_capacity(levels.len());
        let mut sums = [0, 0];
        for (_, counts) in &levels {
            sums = [sums[0] + counts[0], sums[1] + counts[1]];
            below.push(sums);
        }
        let allowed = |wrong: usize, of: usize| {
            of >= FEWEST_CASES && wrong as f64 <= target_error * of as f64
        };
        let absent = |at: usize| levels[at].0 <= 0.5 && allowed(below[at][0], below[at][1]);
        let above = |at: usize| -> [usize; 2] {
            let before = if at == 0 { [0, 0] } else { below[at - 1] };
            [sums[0] - before[0], sums[1] - before[1]]
        };
        let present = |at: usize| {
            let [right, of] = above(at);
            levels[at].0 >= 0.5 && allowed(of - right, of)
        };
        let highest = (0..levels.len()).rev().find(|at| absent(*at));
        let lowest = (0..levels.len()).find(|at| present(*at));
        let (absent_at, present_at) = match (highest, lowest) {
            // Both reach over the middle: everything is decided, at the cut with the fewest errors.
            (Some(high), Some(low)) if low <= high => {
                let cuts = (low.max(1)..=high + 1)
                    .filter(|cut| *cut < levels.len() && present(*cut) && absent(*cut - 1));
                let wrong = |cut: &usize| {
                    let [right, of] = above(*cut);
                    below[*cut - 1][0] + of - right
                };
                match cuts.min_by_key(wrong) {
                    Some(cut) => (Some(cut - 1), Some(cut)),
                    // No cut holds the target on both sides: "present" keeps its reach, "absent" ends below.
                    None => ((0..low).rev().find(|at| absent(*at)), Some(low)),
                }
            }
            found => found,
        };
        Self {
            absent_to: absent_at.map(|at| levels[at].0),
            present_from: present_at.map(|at| levels[at].0),
        }
    }
}

/// Decisions that were made, and wrong ones among them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decided {
    /// All cases.
    pub cases: usize,
    /// Decided ones.
    pub decided: usize,
    /// Wrong ones among these.
    pub errors: usize,
}

impl Decided {
    /// Counts one case.
    pub fn add(&mut self, decision: Decision, truth: bool) {
        self.cases += 1;
        if decision != Decision::Undecided {
            self.decided += 1;
            self.errors += usize::from((decision == Decision::Present) != truth);
        }
    }
}

/// Distinct probabilities, rising, each with its positives and cases.
fn levels(cases: &[(f64, bool)]) -> Vec<(f64, [usize; 2])> {
    let mut sorted = cases.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut levels: Vec<(f64, [usize; 2])> = Vec::new();
    for (probability, truth) in sorted {
        match levels.last_mut() {
            Some((level, counts)) if *level == probability => {
                counts[0] += usize::from(truth);
                counts[1] += 1;
            }
            _ => levels.push((probability, [usize::from(truth), 1])),
        }
    }
    levels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(cases: &[(f64, bool)], thresholds: Thresholds) -> Decided {
        let mut counted = Decided::default();
        for (probability, truth) in cases {
            counted.add(thresholds.decide(*probability), *truth);
        }
        counted
    }

    #[test]
    fn the_error_among_decided_ones_is_at_most_the_target() {
        // From 0.3 to 0.7 truth is a coin; outside it is certain.
        let cases: Vec<(f64, bool)> = (0..100)
            .map(|at| {
                let p = f64::from(at) / 100.0;
                (
                    p,
                    if p < 0.3 {
                        false
                    } else {
                        p > 0.7 || at % 2 == 0
                    },
                )
            })
            .collect();
        for target in [0.0, 0.05, 0.1] {
            let found = Thresholds::choose(&cases, target);
            let counted = counted(&cases, found);
            assert!(counted.errors as f64 <= target * counted.decided as f64);
            assert!(counted.decided >= 58, "{target}: {found:?} {counted:?}");
        }
        let strict = Thresholds::choose(&cases, 0.0);
        assert_eq!(strict.absent_to, Some(0.29));
        assert_eq!(strict.present_from, Some(0.7));
        assert_eq!(strict.decide(0.5), Decision::Undecided);
        assert_eq!(strict.decide(0.29), Decision::Absent);
        assert_eq!(strict.decide(0.7), Decision::Present);
    }

    #[test]
    fn separated_classes_are_all_decided() {
        let cases: Vec<(f64, bool)> = (0..40).map(|at| (f64::from(at) / 40.0, at >= 20)).collect();
        let found = Thresholds::choose(&cases, 0.05);
        assert_eq!(counted(&cases, found).decided, 40);
        assert_eq!(counted(&cases, found).errors, 0);
    }

    #[test]
    fn what_is_likely_is_not_called_absent() {
        // Five of two hundred have it, all above one half: few enough for "absent" to reach over them.
        let cases: Vec<(f64, bool)> = (0..200)
            .map(|at| (f64::from(at) / 200.0, at >= 190 && at % 2 == 0))
            .collect();
        let found = Thresholds::choose(&cases, 0.05);
        assert_eq!(found.absent_to, Some(0.5));
        assert_eq!(found.decide(0.8), Decision::Undecided);
    }

    #[test]
    fn too_few_cases_of_a_kind_decide_nothing() {
        let cases: Vec<(f64, bool)> = (0..40).map(|at| (f64::from(at), at >= 36)).collect();
        let found = Thresholds::choose(&cases, 0.05);
        assert_eq!(found, Thresholds::default());
        assert_eq!(found.decide(0.0), Decision::Undecided);
    }

    #[test]
    fn a_useless_probability_decides_nothing() {
        let cases: Vec<(f64, bool)> = (0..60).map(|at| (0.5, at % 2 == 0)).collect();
        assert_eq!(Thresholds::choose(&cases, 0.05), Thresholds::default());
    }
}

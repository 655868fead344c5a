//! Findings of many reports, counted so that any weighting of studies is a sum and a few divisions: for intervals
//! and for the paired comparison of two runs.

use std::collections::BTreeMap;

use crate::eval::{
    bootstrap::{Bootstrap, Comparison, Interval},
    error::EvaluateError,
};

use super::{
    field::FieldSums,
    finding::Finding,
    pair::{CLASSES, LabelledPair, Policies},
};

/// Cases, and cases where the question arises.
type RateSums = [f64; 2];

/// One report beside its truth, or a weighted sum of many.
#[derive(Debug, Clone)]
pub struct FindingSums {
    /// True positives, false positives, false negatives by class.
    counts: [[f64; 3]; CLASSES],
    false_normal: RateSums,
    invented: RateSums,
    laterality_errors: RateSums,
    contradictions: RateSums,
    invented_comparisons: RateSums,
    inner_contradictions: RateSums,
    field: FieldSums,
}

impl Default for FindingSums {
    fn default() -> Self {
        Self {
            counts: [[0.0; 3]; CLASSES],
            false_normal: [0.0; 2],
            invented: [0.0; 2],
            laterality_errors: [0.0; 2],
            contradictions: [0.0; 2],
            invented_comparisons: [0.0; 2],
            inner_contradictions: [0.0; 2],
            field: FieldSums::default(),
        }
    }
}

impl FindingSums {
    /// Counts one report, as [`super::score::score`] does.
    pub fn of(pair: &LabelledPair, policies: Policies) -> Self {
        let compared = pair.compare(policies);
        let share = |hit: Option<bool>| -> RateSums {
            hit.map_or([0.0; 2], |hit| [f64::from(u8::from(hit)), 1.0])
        };
        let mut sums = Self {
            counts: compared
                .classes
                .map(|class| match (class.in_truth, class.in_prediction) {
                    (Some(true), Some(true)) => [1.0, 0.0, 0.0],
                    (Some(false), Some(true)) => [0.0, 1.0, 0.0],
                    (Some(true), Some(false)) => [0.0, 0.0, 1.0],
                    _ => [0.0; 3],
                }),
            false_normal: share(compared.false_normal),
            invented: share(compared.invented),
            laterality_errors: [0.0; 2],
            contradictions: share(compared.contradiction),
            invented_comparisons: share(compared.invented_comparison),
            inner_contradictions: share(compared.inner_contradiction),
            field: FieldSums::of(pair, policies),
        };
        for class in compared.classes {
            let [wrong, of] = share(class.wrong_side);
            sums.laterality_errors[0] += wrong;
            sums.laterality_errors[1] += of;
        }
        sums
    }

    /// Adds `other`, taken `weight` times.
    pub fn add(&mut self, other: &Self, weight: f64) {
        self.field.add(&other.field, weight);
        let pairs = self.counts.iter_mut().zip(&other.counts);
        for (sum, value) in pairs.flat_map(|(sums, values)| sums.iter_mut().zip(values)) {
            *sum += weight * value;
        }
        for (sums, values) in [
            (&mut self.false_normal, &other.false_normal),
            (&mut self.invented, &other.invented),
            (&mut self.laterality_errors, &other.laterality_errors),
            (&mut self.contradictions, &other.contradictions),
            (&mut self.invented_comparisons, &other.invented_comparisons),
            (&mut self.inner_contradictions, &other.inner_contradictions),
        ] {
            sums[0] += weight * values[0];
            sums[1] += weight * values[1];
        }
    }

    /// Names such as `micro.f1` and `pneumothorax.f1`, in the order of the values.
    pub fn names() -> Vec<String> {
        let averages = ["micro", "macro"]
            .into_iter()
            .flat_map(|kind| ["precision", "recall", "f1"].map(|what| format!("{kind}.{what}")));
        let rates = [
            "false_normal",
            "invented",
            "laterality_errors",
            "contradictions",
            "invented_comparisons",
            "inner_contradictions",
        ];
        let classes = Finding::ALL.into_iter().flat_map(|finding| {
            ["precision", "recall", "f1"].map(|what| format!("{finding}.{what}"))
        });
        averages
            .chain(rates.map(str::to_owned))
            .chain(classes)
            .chain(FieldSums::names())
            .collect()
    }

    /// Which classes are in truth or prediction.
    fn occurring(&self) -> [bool; CLASSES] {
        self.counts.map(|counts| counts.iter().sum::<f64>() > 0.0)
    }

    /// Every score, from 0 to 1, in the order of [`FindingSums::names`]; NaN for a share of nothing.
    ///
    /// The macro average is taken over `averaged`, the classes of the whole sample: the rare ones do not come and go
    /// from draw to draw, and count 0 where a draw lacks them.
    fn values(&self, averaged: &[bool; CLASSES]) -> Vec<f64> {
        let mut sum = [0.0; 3];
        let mut means = [0.0; 3];
        let mut classes = 0.0;
        for (counts, averaged) in self.counts.iter().zip(averaged) {
            for (sum, count) in sum.iter_mut().zip(counts) {
                *sum += count;
            }
            if *averaged {
                classes += 1.0;
                for (mean, value) in means.iter_mut().zip(precision_recall_f1(counts)) {
                    *mean += if value.is_nan() { 0.0 } else { value };
                }
            }
        }
        let zero_for_nothing = |value: f64| if value.is_nan() { 0.0 } else { value };
        let mut values: Vec<f64> = precision_recall_f1(&sum).map(zero_for_nothing).to_vec();
        values.extend(means.map(|mean| mean / f64::max(classes, 1.0)));
        for [count, of] in [
            self.false_normal,
            self.invented,
            self.laterality_errors,
            self.contradictions,
            self.invented_comparisons,
            self.inner_contradictions,
        ] {
            values.push(count / of);
        }
        values.extend(self.counts.iter().flat_map(precision_recall_f1));
        values.extend(self.field.values());
        values
    }
}

fn precision_recall_f1([both, only_said, only_true]: &[f64; 3]) -> [f64; 3] {
    [
        both / (both + only_said),
        both / (both + only_true),
        2.0 * both / (2.0 * both + only_said + only_true),
    ]
}

/// A set of reports counted by study; scores, intervals and comparisons are sums over it.
#[derive(Debug, Clone)]
pub struct FindingEvaluation {
    studies: BTreeMap<String, FindingSums>,
    /// The classes that the macro average is taken over, in every draw.
    averaged: [bool; CLASSES],
}

impl FindingEvaluation {
    /// Counts `pairs`.
    pub fn new<'a>(pairs: impl IntoIterator<Item = &'a LabelledPair>, policies: Policies) -> Self {
        let mut studies: BTreeMap<String, FindingSums> = BTreeMap::new();
        for pair in pairs {
            let of_pair = FindingSums::of(pair, policies);
            studies
                .entry(pair.study.clone())
                .or_default()
                .add(&of_pair, 1.0);
        }
        let mut whole = FindingSums::default();
        studies.values().for_each(|study| whole.add(study, 1.0));
        Self {
            averaged: whole.occurring(),
            studies,
        }
    }

    fn weighted(&self, times: &[f64]) -> Vec<f64> {
        let mut sum = FindingSums::default();
        for (study, &weight) in self.studies.values().zip(times) {
            if weight > 0.0 {
                sum.add(study, weight);
            }
        }
        sum.values(&self.averaged)
    }

    /// The scores of `other` less those of this run, with the studies marked in `swapped` taken from each other.
    fn mixed(&self, other: &Self, swapped: &[bool]) -> Vec<f64> {
        let (mut first, mut second) = (FindingSums::default(), FindingSums::default());
        let pairs = self.studies.values().zip(other.studies.values());
        for ((a, b), swapped) in pairs.zip(swapped) {
            let (a, b) = if *swapped { (b, a) } else { (a, b) };
            first.add(a, 1.0);
            second.add(b, 1.0);
        }
        let (first, second) = (first.values(&self.averaged), second.values(&other.averaged));
        first
            .iter()
            .zip(second)
            .map(|(first, second)| second - first)
            .collect()
    }

    /// Every score with its interval, drawn by study, under the names of [`FindingSums::names`].
    ///
    /// # Errors
    /// As [`Bootstrap::intervals`].
    pub fn intervals(
        &self,
        bootstrap: &Bootstrap,
    ) -> Result<Vec<(String, Interval)>, EvaluateError> {
        let intervals = bootstrap.intervals(self.studies.len(), |times| self.weighted(times))?;
        Ok(FindingSums::names().into_iter().zip(intervals).collect())
    }

    /// Compares this run with `other`, made on the same studies: each score's difference is `other` less this.
    ///
    /// # Errors
    /// [`EvaluateError::DifferentStudies`] if the studies differ, else as [`Bootstrap::compare`].
    pub fn compare(
        &self,
        other: &Self,
        bootstrap: &Bootstrap,
    ) -> Result<Vec<(String, Comparison)>, EvaluateError> {
        let odd = |a: &Self, b: &Self| {
            a.studies
                .keys()
                .find(|s| !b.studies.contains_key(*s))
                .cloned()
        };
        if let Some(study) = odd(self, other).or_else(|| odd(other, self)) {
            return Err(EvaluateError::DifferentStudies { study });
        }
        let compared = bootstrap.compare(
            self.studies.len(),
            |times| self.weighted(times),
            |times| other.weighted(times),
            |swapped| self.mixed(other, swapped),
        )?;
        Ok(FindingSums::names().into_iter().zip(compared).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        labeler::Labeler,
        pair::UncertainPolicy,
        score::{StudyTexts, score},
    };
    use super::*;

    const TEXTS: [(&str, &str, Option<&str>); 6] = [
        ("左侧胸腔积液。", "右侧胸腔积液。", None),
        ("右侧气胸。", "心肺膈未见异常。", None),
        ("胸部未见异常。", "心影增大。", None),
        ("考虑肺炎。", "肺炎。", Some("未见肺炎。")),
        ("未见气胸。", "心肺膈未见异常。", None),
        ("左肺结节，心影增大。", "左肺结节。", Some("左肺结节。")),
    ];

    fn pairs() -> Vec<LabelledPair> {
        let read = |(at, (truth, prediction, thinking)): (usize, &(&str, &str, Option<&str>))| {
            LabelledPair::read(
                Labeler::openi(),
                &at.to_string(),
                truth,
                prediction,
                *thinking,
            )
        };
        TEXTS.iter().enumerate().map(read).collect()
    }

    #[test]
    fn the_sums_are_the_scores_counted_one_by_one() {
        let policy = UncertainPolicy::AsPresent;
        let texts: Vec<StudyTexts> = TEXTS
            .iter()
            .map(|(truth, prediction, thinking)| StudyTexts {
                truth,
                prediction,
                thinking: *thinking,
            })
            .collect();
        let scores = score(Labeler::openi(), &texts, policy);
        let intervals = FindingEvaluation::new(&pairs(), policy.into())
            .intervals(&Bootstrap::default())
            .expect("good");
        let value = |name: &str| {
            intervals
                .iter()
                .find(|(other, _)| other == name)
                .expect("a known name")
                .1
        };
        for (name, counted) in [
            ("micro.precision", Some(scores.micro.precision)),
            ("micro.f1", Some(scores.micro.f1)),
            ("macro.recall", Some(scores.macro_average.recall)),
            ("macro.f1", Some(scores.macro_average.f1)),
            ("false_normal", scores.false_normal.value()),
            ("invented", scores.invented.value()),
            ("laterality_errors", scores.laterality_errors.value()),
            ("contradictions", scores.contradictions.value()),
            (
                "cardiomegaly.f1",
                scores.by_finding[&Finding::Cardiomegaly].f1(),
            ),
        ] {
            let found = value(name);
            assert!(
                (found.value - counted.expect("cases")).abs() < 1e-12,
                "{name}"
            );
            assert!(
                found.low <= found.value && found.value <= found.high,
                "{name}"
            );
        }
        assert!(value("hernia.f1").value.is_nan());
    }

    #[test]
    fn a_class_that_a_draw_lacks_counts_nothing_in_its_macro_average() {
        let all = FindingEvaluation::new(&pairs(), UncertainPolicy::AsPresent.into());
        let classes = all.averaged.iter().filter(|averaged| **averaged).count() as f64;
        // Only the pneumonia, six times, its F1 1: the mean is over all classes of the sample.
        let values = all.weighted(&[0.0, 0.0, 0.0, 6.0, 0.0, 0.0]);
        let at = FindingSums::names()
            .iter()
            .position(|name| name == "macro.f1");
        assert!((values[at.expect("a name")] - 1.0 / classes).abs() < 1e-12);
    }

    #[test]
    fn runs_of_other_studies_are_refused() {
        let all = pairs();
        let policy = UncertainPolicy::AsPresent;
        let first = FindingEvaluation::new(&all, policy.into());
        let fewer = FindingEvaluation::new(&all[..5], policy.into());
        let refused = first.compare(&fewer, &Bootstrap::default());
        assert_eq!(
            refused.expect_err("a study is missing"),
            EvaluateError::DifferentStudies { study: "5".into() }
        );
        let same = first.compare(&first, &Bootstrap::default()).expect("same");
        // A share of nothing does not differ from itself either.
        let differs = |value: f64| !value.is_nan() && value != 0.0;
        assert!(!same.iter().any(|(_, c)| differs(c.difference.value)));
    }
}

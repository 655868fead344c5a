//! The averages that papers report, as sums over studies: CheXpert's fourteen and five classes, findings with side, with
//! side, degree and lobe, and the urgent ones.
//!
//! Averages over classes are those of scikit-learn's `classification_report` with `zero_division=0`, as
//! f1chexbert uses it: macro over all classes of the group, weighted by support, samples by report.

use super::{
    export::CHEXPERT,
    finding::Finding,
    labels::{FindingLabel, ReportLabels, Severity, Status},
    pair::{LabelledPair, Policies},
};

/// F1-5 of CheXbert: the classes of the CheXpert competition.
pub const CHEXPERT_5: [Finding; 5] = [
    Finding::Cardiomegaly,
    Finding::Edema,
    Finding::Consolidation,
    Finding::Atelectasis,
    Finding::PleuralEffusion,
];

/// What a doctor has to know at once, as keys of [`ReportLabels::others`].
const URGENT_OTHERS: [&str; 3] = ["free_gas", "pneumomediastinum", "tube_malposition"];

/// A group of labels that is averaged by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// The fourteen classes of CheXpert.
    Chexpert14,
    /// The five of [`CHEXPERT_5`].
    Chexpert5,
    /// All classes but *no finding*; right only on the side that the truth names.
    Side,
    /// As [`Self::Side`], with the truth's degree and lobe as well.
    Detail,
    /// Pneumothorax, effusion of a medium amount or more, free gas, air in the mediastinum, misplaced tubes.
    Urgent,
}

impl Group {
    /// In the order of the scores.
    pub const ALL: [Self; 5] = [
        Self::Chexpert14,
        Self::Chexpert5,
        Self::Side,
        Self::Detail,
        Self::Urgent,
    ];

    /// The name in files.
    pub fn key(self) -> &'static str {
        match self {
            Self::Chexpert14 => "chexpert_14",
            Self::Chexpert5 => "chexpert_5",
            Self::Side => "with_side",
            Self::Detail => "with_side_degree_lobe",
            Self::Urgent => "urgent",
        }
    }

    fn labels(self) -> usize {
        match self {
            Self::Chexpert14 => CHEXPERT.len(),
            Self::Chexpert5 => CHEXPERT_5.len(),
            Self::Side | Self::Detail => Finding::ALL.len() - 1,
            Self::Urgent => 2 + URGENT_OTHERS.len(),
        }
    }

    /// For each label: in the truth, in the answer, and whether they agree where both have it. `None` is left out.
    fn compare(self, pair: &LabelledPair, policies: Policies) -> Vec<Option<(bool, bool, bool)>> {
        let (truth, answer) = (&pair.truth, &pair.prediction);
        let class = |finding: Finding| {
            let in_truth = policies.truth.positive(finding, truth.status(finding))?;
            let in_answer = policies.answer.positive(finding, answer.status(finding))?;
            Some((in_truth, in_answer))
        };
        let plain = |finding: Finding| class(finding).map(|(a, b)| (a, b, true));
        match self {
            Self::Chexpert14 => CHEXPERT
                .iter()
                .map(|(_, finding)| plain(*finding))
                .collect(),
            Self::Chexpert5 => CHEXPERT_5.into_iter().map(plain).collect(),
            Self::Side | Self::Detail => Finding::ALL
                .into_iter()
                .filter(|finding| *finding != Finding::NoFinding)
                .map(|finding| {
                    let agree = match (truth.get(finding), answer.get(finding)) {
                        (Some(a), Some(b)) => agrees(a, b, self == Self::Detail),
                        _ => true,
                    };
                    class(finding).map(|(a, b)| (a, b, agree))
                })
                .collect(),
            Self::Urgent => {
                let other = |key: &str| {
                    let positive = |labels: &ReportLabels, policy: super::UncertainPolicy| {
                        let status = labels
                            .others
                            .get(key)
                            .map_or(Status::NotMentioned, |l| l.status);
                        policy.positive(Finding::Pneumothorax, status)
                    };
                    Some((
                        positive(truth, policies.truth)?,
                        positive(answer, policies.answer)?,
                        true,
                    ))
                };
                let large = |labels: &ReportLabels| {
                    let effusion = labels.get(Finding::PleuralEffusion);
                    effusion.is_some_and(|label| label.severity >= Some(Severity::Moderate))
                };
                let effusion = class(Finding::PleuralEffusion)
                    .map(|(a, b)| (a && large(truth), b && large(answer), true));
                [plain(Finding::Pneumothorax), effusion]
                    .into_iter()
                    .chain(URGENT_OTHERS.map(other))
                    .collect()
            }
        }
    }
}

/// Whether an answer gives what the truth gives: leaving a side out is as wrong as the other one.
fn agrees(truth: &FindingLabel, answer: &FindingLabel, detail: bool) -> bool {
    let side = truth.laterality.is_none() || truth.laterality == answer.laterality;
    let severity = truth.severity.is_none() || truth.severity == answer.severity;
    let zones = truth.zones.is_empty() || truth.zones == answer.zones;
    side && (!detail || (severity && zones))
}

/// Counts of one group, of one report or a weighted sum of many.
#[derive(Debug, Clone)]
struct GroupSums {
    /// True positives, false positives, false negatives by label.
    counts: Vec<[f64; 3]>,
    /// Sums over reports of precision, recall and F1.
    samples: [f64; 3],
}

/// Counts of all groups.
#[derive(Debug, Clone)]
pub(super) struct FieldSums {
    groups: Vec<GroupSums>,
    reports: f64,
}

impl Default for FieldSums {
    fn default() -> Self {
        let groups = Group::ALL.map(|group| GroupSums {
            counts: vec![[0.0; 3]; group.labels()],
            samples: [0.0; 3],
        });
        Self {
            groups: groups.to_vec(),
            reports: 0.0,
        }
    }
}

impl FieldSums {
    /// Counts one report.
    pub(super) fn of(pair: &LabelledPair, policies: Policies) -> Self {
        let groups = Group::ALL.map(|group| {
            let compared = group.compare(pair, policies);
            let counts: Vec<[f64; 3]> = compared
                .iter()
                .map(|label| match label {
                    Some((true, true, true)) => [1.0, 0.0, 0.0],
                    Some((true, true, false)) => [0.0, 1.0, 1.0],
                    Some((false, true, _)) => [0.0, 1.0, 0.0],
                    Some((true, false, _)) => [0.0, 0.0, 1.0],
                    _ => [0.0; 3],
                })
                .collect();
            let samples = ratios(&total(&counts));
            GroupSums { counts, samples }
        });
        Self {
            groups: groups.to_vec(),
            reports: 1.0,
        }
    }

    /// Adds `other`, taken `weight` times.
    pub(super) fn add(&mut self, other: &Self, weight: f64) {
        self.reports += weight * other.reports;
        for (sums, more) in self.groups.iter_mut().zip(&other.groups) {
            let counts = sums.counts.iter_mut().zip(&more.counts);
            let samples = std::iter::once((&mut sums.samples, &more.samples));
            for (sum, value) in counts.chain(samples).flat_map(|(a, b)| a.iter_mut().zip(b)) {
                *sum += weight * value;
            }
        }
    }

    /// Names such as `chexpert_14.macro.f1`, in the order of [`Self::values`].
    pub(super) fn names() -> Vec<String> {
        let kinds = ["micro", "macro", "weighted", "samples"];
        let of = |group: Group| {
            kinds.into_iter().flat_map(move |kind| {
                ["precision", "recall", "f1"].map(|what| format!("{}.{kind}.{what}", group.key()))
            })
        };
        Group::ALL.into_iter().flat_map(of).collect()
    }

    /// Every score, from 0 to 1.
    pub(super) fn values(&self) -> Vec<f64> {
        let mut values = Vec::with_capacity(Group::ALL.len() * 12);
        for group in &self.groups {
            if total(&group.counts).iter().all(|count| *count == 0.0) {
                // Nothing to find and nothing found: no score, rather than a bad one.
                values.extend([f64::NAN; 12]);
                continue;
            }
            let classes: Vec<[f64; 3]> = group.counts.iter().map(ratios).collect();
            let support: Vec<f64> = group.counts.iter().map(|c| c[0] + c[2]).collect();
            let all: f64 = support.iter().sum();
            let mean = |weights: &dyn Fn(usize) -> f64| -> [f64; 3] {
                let mut sum = [0.0; 3];
                for (n, class) in classes.iter().enumerate() {
                    for (sum, value) in sum.iter_mut().zip(class) {
                        *sum += weights(n) * value;
                    }
                }
                sum
            };
            values.extend(ratios(&total(&group.counts)));
            values.extend(mean(&|_| 1.0 / classes.len().max(1) as f64));
            values.extend(mean(&|n| if all > 0.0 { support[n] / all } else { 0.0 }));
            values.extend(
                group
                    .samples
                    .map(|sum| sum / self.reports.max(f64::MIN_POSITIVE)),
            );
        }
        values
    }
}

fn total(counts: &[[f64; 3]]) -> [f64; 3] {
    counts.iter().fold([0.0; 3], |sum, c| {
        [sum[0] + c[0], sum[1] + c[1], sum[2] + c[2]]
    })
}

/// Precision, recall and F1; 0 for a share of nothing.
fn ratios([both, only_said, only_true]: &[f64; 3]) -> [f64; 3] {
    let share = |part: f64, whole: f64| if whole > 0.0 { part / whole } else { 0.0 };
    [
        share(*both, both + only_said),
        share(*both, both + only_true),
        share(2.0 * both, 2.0 * both + only_said + only_true),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::eval::{
        bootstrap::Bootstrap,
        findings::{Labeler, UncertainPolicy, evaluation::FindingEvaluation},
    };

    fn score(pairs: &[(&str, &str)], policies: Policies, name: &str) -> f64 {
        let mut sums = FieldSums::default();
        for (truth, answer) in pairs {
            let pair = LabelledPair::read(Labeler::hospital(), "", truth, answer, None);
            sums.add(&FieldSums::of(&pair, policies), 1.0);
        }
        let at = FieldSums::names()
            .iter()
            .position(|n| n == name)
            .unwrap_or(usize::MAX);
        sums.values()[at]
    }

    #[test]
    fn a_side_left_out_costs_as_much_as_a_wrong_one() {
        let truth = "左侧胸腔积液。";
        let f1 = |answer| {
            score(
                &[(truth, answer)],
                Policies::default(),
                "with_side.micro.f1",
            )
        };
        assert_eq!(f1("左侧胸腔积液。"), 1.0);
        assert_eq!(f1("胸腔积液。"), 0.0);
        assert_eq!(f1("右侧胸腔积液。"), 0.0);
        let plain = score(
            &[(truth, "胸腔积液。")],
            Policies::default(),
            "chexpert_5.micro.f1",
        );
        assert_eq!(plain, 1.0);
    }

    #[test]
    fn degree_and_lobe_count_in_the_detailed_score() {
        let f1 = |answer| {
            let pairs = [("右肺下叶实变，左侧大量胸腔积液。", answer)];
            score(
                &pairs,
                Policies::default(),
                "with_side_degree_lobe.micro.f1",
            )
        };
        assert_eq!(f1("右肺下叶实变，左侧大量胸腔积液。"), 1.0);
        assert_eq!(f1("右肺上叶实变，左侧大量胸腔积液。"), 0.5);
        assert_eq!(f1("右肺下叶实变，左侧少量胸腔积液。"), 0.5);
    }

    #[test]
    fn hedging_costs_where_the_answer_has_a_policy_of_its_own() {
        let pairs = [("右侧气胸。", "右侧气胸不除外。")];
        let lenient = Policies::default();
        assert_eq!(score(&pairs, lenient, "chexpert_14.micro.f1"), 1.0);
        let strict = Policies {
            answer: UncertainPolicy::AsAbsent,
            ..lenient
        };
        assert_eq!(score(&pairs, strict, "urgent.micro.recall"), 0.0);
    }

    #[derive(serde::Deserialize)]
    struct Reference {
        truth: Vec<BTreeMap<Finding, Status>>,
        answer: Vec<BTreeMap<Finding, Status>>,
        other: Vec<BTreeMap<Finding, Status>>,
        scores: BTreeMap<String, f64>,
        randomisation: Randomisation,
    }

    #[derive(serde::Deserialize)]
    struct Randomisation {
        studies: usize,
        score: String,
        difference: f64,
        p: f64,
    }

    fn labels(statuses: &BTreeMap<Finding, Status>) -> ReportLabels {
        let label = |(finding, status): (&Finding, &Status)| {
            let label = FindingLabel {
                status: *status,
                ..Default::default()
            };
            (*finding, label)
        };
        ReportLabels {
            findings: statuses.iter().map(label).collect(),
            ..ReportLabels::join(Vec::new(), Vec::new(), 0)
        }
    }

    fn evaluation(
        truth: &[BTreeMap<Finding, Status>],
        answer: &[BTreeMap<Finding, Status>],
    ) -> FindingEvaluation {
        let pairs: Vec<LabelledPair> = truth
            .iter()
            .zip(answer)
            .enumerate()
            .map(|(at, (truth, answer))| LabelledPair {
                study: format!("{at:03}"),
                truth: labels(truth),
                prediction: labels(answer),
                thinking: None,
                is_empty: false,
            })
            .collect();
        FindingEvaluation::new(&pairs, Policies::default())
    }

    #[derive(serde::Deserialize)]
    struct EdgeCases {
        cases: Vec<EdgeCase>,
        pairs: Vec<EdgePair>,
    }

    #[derive(serde::Deserialize)]
    struct EdgeCase {
        name: String,
        truth: Vec<BTreeMap<Finding, Status>>,
        answer: Vec<BTreeMap<Finding, Status>>,
        scores: BTreeMap<String, f64>,
    }

    #[derive(serde::Deserialize)]
    struct EdgePair {
        name: String,
        truth: Vec<BTreeMap<Finding, Status>>,
        answer: Vec<BTreeMap<Finding, Status>>,
        other: Vec<BTreeMap<Finding, Status>>,
        score: String,
        difference: f64,
        p: f64,
    }

    #[test]
    fn scores_without_cases_and_of_equal_systems_equal_the_reference_implementations() {
        let text = include_str!("../../../tests/fixtures/metrics/findings_edges.json");
        let edges: EdgeCases = serde_json::from_str(text).expect("the fixture");
        let bootstrap = Bootstrap {
            resamples: 10,
            ..Bootstrap::default()
        };
        for case in &edges.cases {
            let scores = evaluation(&case.truth, &case.answer)
                .intervals(&bootstrap)
                .expect("there are studies");
            for (name, expected) in &case.scores {
                let found = scores.iter().find(|(other, _)| other == name);
                let value = found.map_or(f64::NAN, |(_, score)| score.value);
                // Where nothing counts, ours is no number and the reference's zero_division = 0 a nought.
                let nought = if value.is_nan() { 0.0 } else { value };
                assert!(
                    found.is_some() && (nought - expected).abs() < 1e-6,
                    "{}, {name}: {value}, expected {expected}",
                    case.name
                );
            }
        }
        for pair in &edges.pairs {
            let compared = evaluation(&pair.truth, &pair.answer)
                .compare(&evaluation(&pair.truth, &pair.other), &bootstrap)
                .expect("the same studies");
            let found = compared.iter().find(|(name, _)| *name == pair.score);
            let found = found.expect("the score").1;
            assert!(
                (found.difference.value - pair.difference).abs() < 1e-6
                    && (found.p - pair.p).abs() < 1e-6,
                "{}, {}: {found:?}, expected {} and p {}",
                pair.name,
                pair.score,
                pair.difference,
                pair.p
            );
        }
    }

    #[test]
    fn averages_and_randomisation_equal_the_reference_implementations() {
        let text = include_str!("../../../tests/fixtures/metrics/findings.json");
        let reference: Reference = serde_json::from_str(text).expect("the fixture");
        let bootstrap = Bootstrap {
            resamples: 10,
            ..Bootstrap::default()
        };
        let scores = evaluation(&reference.truth, &reference.answer)
            .intervals(&bootstrap)
            .expect("there are studies");
        for (name, expected) in &reference.scores {
            let found = scores.iter().find(|(other, _)| other == name);
            let value = found.map_or(f64::NAN, |(_, score)| score.value);
            assert!(
                (value - expected).abs() < 1e-6,
                "{name}: {value}, expected {expected}"
            );
        }
        let expected = &reference.randomisation;
        let first = |rows: &[BTreeMap<Finding, Status>]| {
            evaluation(
                &reference.truth[..expected.studies],
                &rows[..expected.studies],
            )
        };
        let compared = first(&reference.answer)
            .compare(&first(&reference.other), &bootstrap)
            .expect("the same studies");
        let found = compared.iter().find(|(name, _)| *name == expected.score);
        let found = found.expect("the score").1;
        assert!(
            (found.difference.value - expected.difference).abs() < 1e-6,
            "{found:?}"
        );
        assert!(
            (found.p - expected.p).abs() < 1e-6,
            "{found:?}, expected {}",
            expected.p
        );
    }
}

//! Probabilities beside the truth: scores by class and over all, before and after calibration.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    logit::sigmoid,
    metrics::{
        Ranked, ReliabilityBin, Surest, brier, coverage_at, coverage_curve,
        expected_calibration_error, reliability, thinned,
    },
    read::FindingRecord,
    thresholds::{Decided, Thresholds},
};
use crate::eval::{
    bootstrap::{Bootstrap, Interval},
    error::EvaluateError,
    findings::{Finding, LabelledPair, UncertainPolicy},
};

/// Fewer cases than this, with or without the class, say little.
pub const FEW: usize = 10;

/// Error at which coverage is reported.
pub const TARGET_ERROR: f64 = 0.05;

/// Coverages at which the error has an interval.
const BAND: usize = 20;

/// The probabilities of one case of the test set.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CaseProbabilities {
    /// Whether they are calibrated.
    pub calibrated: bool,
    /// By class; empty where the case has none.
    pub findings: BTreeMap<Finding, FindingRecord>,
}

/// How good one set of probabilities is.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Quality {
    /// Area under the ROC curve; not a number without both truths.
    pub auc: f64,
    /// Expected calibration error.
    pub ece: f64,
    /// Brier score.
    pub brier: f64,
    /// The largest share of cases that can be answered with an error of [`TARGET_ERROR`].
    pub coverage: f64,
    /// Ten bins of equal count.
    pub reliability: Vec<ReliabilityBin>,
    /// Coverage and error, the surest cases first; thinned.
    pub coverage_curve: Vec<(f64, f64)>,
}

impl Quality {
    fn of(cases: &[ScoredCase]) -> Option<Self> {
        if cases.is_empty() {
            return None;
        }
        let pairs: Vec<(f64, bool)> = cases.iter().map(|case| (case.0, case.1)).collect();
        let ranked = Ranked::new(cases.iter().map(|case| (case.0, case.1, 0)).collect());
        let bins = reliability(&pairs);
        let curve = coverage_curve(&pairs);
        Some(Self {
            auc: ranked.auc(&[1.0]),
            ece: expected_calibration_error(&bins),
            brier: brier(&pairs),
            coverage: coverage_at(&curve, TARGET_ERROR),
            reliability: bins,
            coverage_curve: thinned(&curve),
        })
    }
}

/// Scores of one class, or of several together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProbabilityScores {
    /// Cases that have it.
    pub positives: usize,
    /// Cases that do not.
    pub negatives: usize,
    /// Area under the ROC curve with its interval, drawn by study.
    pub auc: Interval,
    /// Of logits as they are.
    pub before: Option<Quality>,
    /// Calibrated.
    pub after: Option<Quality>,
    /// Decisions of calibrated probabilities, and wrong ones among them.
    pub decided: Option<Decided>,
    /// The share of cases that can be answered with an error of [`TARGET_ERROR`] where the model may abstain, with its
    /// interval: of calibrated probabilities where there are some.
    pub coverage: Interval,
    /// Error where the surest answers alone are given, by the share of answers, with its interval.
    pub abstention: Vec<CoveragePoint>,
    /// The thresholds that this set itself would choose, with at most [`TARGET_ERROR`] of errors on either side.
    pub thresholds: Thresholds,
}

/// The error among the surest answers.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct CoveragePoint {
    /// Share of answers that are given, at least.
    pub coverage: f64,
    /// Share of wrong ones among them.
    pub error: Interval,
}

impl ProbabilityScores {
    /// Whether there are too few cases of a truth to say much.
    pub fn is_few(&self) -> bool {
        self.positives.min(self.negatives) < FEW
    }
}

/// Everything about the probabilities of a test set.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProbabilityOutcome {
    /// Cases with probabilities.
    pub cases: usize,
    /// Cases without.
    pub missing: usize,
    /// Error at which coverage is reported.
    pub target_error: f64,
    /// Mean AUC over the classes that have both truths.
    pub macro_auc: Interval,
    /// All cases of the classes that have both truths, together.
    pub all: ProbabilityScores,
    /// By class, those that any case has a probability of.
    pub classes: BTreeMap<Finding, ProbabilityScores>,
}

/// Probability, truth, place of the study.
type ScoredCase = (f64, bool, usize);

/// What is known of one class.
#[derive(Default)]
struct ClassCases {
    ranked: Vec<ScoredCase>,
    before: Vec<ScoredCase>,
    after: Vec<ScoredCase>,
    decided: Option<Decided>,
}

impl ClassCases {
    fn add(&mut self, record: &FindingRecord, calibrated: bool, truth: bool, study: usize) {
        let before = match record.logit {
            Some(logit) => Some(sigmoid(logit)),
            None if !calibrated => Some(record.probability),
            None => None,
        };
        // Calibrated or not, the order inside a class is the same; logits have no ties at 0 and 1.
        let rank = record.logit.unwrap_or(record.probability);
        self.ranked.push((rank, truth, study));
        self.before.extend(before.map(|p| (p, truth, study)));
        if calibrated {
            self.after.push((record.probability, truth, study));
            if let Some(decision) = record.decision {
                self.decided.get_or_insert_default().add(decision, truth);
            }
        }
    }

    fn positives(&self) -> usize {
        self.ranked.iter().filter(|case| case.1).count()
    }

    fn has_both(&self) -> bool {
        let positives = self.positives();
        positives > 0 && positives < self.ranked.len()
    }

    /// Probabilities that are calibrated if any are: for an order over several classes.
    fn best(&self) -> &[ScoredCase] {
        if self.after.is_empty() {
            &self.before
        } else {
            &self.after
        }
    }

    /// `intervals` are those of [`statistics`].
    fn scores(&self, intervals: &[Interval]) -> ProbabilityScores {
        let positives = self.positives();
        let pairs: Vec<(f64, bool)> = self.best().iter().map(|case| (case.0, case.1)).collect();
        let errors = coverages().into_iter().zip(&intervals[2..]);
        ProbabilityScores {
            coverage: intervals[1],
            abstention: errors
                .map(|(coverage, error)| CoveragePoint {
                    coverage,
                    error: *error,
                })
                .collect(),
            thresholds: Thresholds::choose(&pairs, TARGET_ERROR),
            positives,
            negatives: self.ranked.len() - positives,
            auc: intervals[0],
            before: Quality::of(&self.before),
            after: Quality::of(&self.after),
            decided: self.decided,
        }
    }
}

/// The shares of answers at which the error is looked at.
fn coverages() -> Vec<f64> {
    (1..=BAND).map(|at| at as f64 / BAND as f64).collect()
}

/// AUC, coverage, and the errors at [`coverages`].
fn statistics(ranked: &Ranked, surest: &Surest, times: &[f64]) -> Vec<f64> {
    let mut values = vec![ranked.auc(times), surest.coverage(times, TARGET_ERROR)];
    values.extend(surest.errors(times, &coverages()));
    values
}

/// Statistics of one class.
const STATISTICS: usize = 2 + BAND;

/// Scores `found`, the probabilities of the reports whose truth is in `labels`; `None` if there are none.
///
/// # Errors
/// [`EvaluateError`] for settings of the bootstrap out of range.
///
/// # Panics
/// If there are not as many of both.
pub fn evaluate_probabilities(
    labels: &[LabelledPair],
    found: &[CaseProbabilities],
    policy: UncertainPolicy,
    bootstrap: &Bootstrap,
) -> Result<Option<ProbabilityOutcome>, EvaluateError> {
    assert_eq!(
        labels.len(),
        found.len(),
        "cases and probabilities disagree"
    );
    let mut studies: BTreeMap<&str, usize> = BTreeMap::new();
    let mut classes: BTreeMap<Finding, ClassCases> = BTreeMap::new();
    let mut cases = 0;
    for (pair, case) in labels.iter().zip(found) {
        if case.findings.is_empty() {
            continue;
        }
        cases += 1;
        let next = studies.len();
        let study = *studies.entry(&pair.study).or_insert(next);
        for (finding, record) in &case.findings {
            if let Some(truth) = policy.positive(*finding, pair.truth.status(*finding)) {
                let class = classes.entry(*finding).or_default();
                class.add(record, case.calibrated, truth, study);
            }
        }
    }
    if cases == 0 {
        return Ok(None);
    }
    let mut all = ClassCases::default();
    // That there is none follows from the others.
    let counts =
        |finding: &Finding, class: &ClassCases| *finding != Finding::NoFinding && class.has_both();
    for (_, class) in classes.iter().filter(|(f, class)| counts(f, class)) {
        all.ranked.extend(class.best());
        all.before.extend(&class.before);
        all.after.extend(&class.after);
        if let Some(decided) = class.decided {
            let sum = all.decided.get_or_insert_default();
            sum.cases += decided.cases;
            sum.decided += decided.decided;
            sum.errors += decided.errors;
        }
    }
    let sorted: Vec<(Ranked, Surest)> = classes
        .values()
        .chain([&all])
        .map(|class| {
            let ranked = Ranked::new(class.ranked.clone());
            (ranked, Surest::new(class.best()))
        })
        .collect();
    let both: Vec<bool> = classes.iter().map(|(f, class)| counts(f, class)).collect();
    let mut intervals = bootstrap.intervals(studies.len(), |times| {
        let sorted = sorted.iter();
        let mut values: Vec<f64> = sorted
            .flat_map(|(ranked, surest)| statistics(ranked, surest, times))
            .collect();
        // A draw that lacks a class takes the mean over the others.
        let of_classes = values.iter().step_by(STATISTICS).zip(&both);
        let counted: Vec<f64> = of_classes
            .filter(|(auc, both)| **both && !auc.is_nan())
            .map(|(auc, _)| *auc)
            .collect();
        values.push(counted.iter().sum::<f64>() / counted.len() as f64);
        values
    })?;
    let nothing = Interval {
        value: f64::NAN,
        low: f64::NAN,
        high: f64::NAN,
    };
    let macro_auc = intervals.pop().unwrap_or(nothing);
    let of_all = intervals.split_off(intervals.len() - STATISTICS);
    Ok(Some(ProbabilityOutcome {
        cases,
        missing: found.len() - cases,
        target_error: TARGET_ERROR,
        macro_auc,
        all: all.scores(&of_all),
        classes: classes
            .iter()
            .zip(intervals.chunks(STATISTICS))
            .map(|((finding, class), found)| (*finding, class.scores(found)))
            .collect(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{findings::Labeler, probability::thresholds::Decision};

    fn pair(study: usize, truth: &str) -> LabelledPair {
        LabelledPair::read(Labeler::hospital(), &study.to_string(), truth, "", None)
    }

    fn record(probability: f64, logit: f64, decision: Decision) -> FindingRecord {
        FindingRecord {
            probability,
            logit: Some(logit),
            decision: Some(decision),
            in_report: None,
            conflict: false,
        }
    }

    /// Forty reports, every fourth with a pneumothorax, whose probability is right but for one; nobody has an edema.
    fn outcome() -> ProbabilityOutcome {
        let (mut labels, mut found) = (Vec::new(), Vec::new());
        for at in 0..40 {
            let there = at % 4 == 0;
            labels.push(pair(
                at,
                if there {
                    "右侧气胸。"
                } else {
                    "未见气胸。"
                },
            ));
            let high = there != (at == 1);
            let (p, decision) = if high {
                (0.9, Decision::Present)
            } else {
                (0.1, Decision::Absent)
            };
            let logit = if high { 6.0 } else { -6.0 };
            found.push(CaseProbabilities {
                calibrated: true,
                findings: BTreeMap::from([
                    (Finding::Pneumothorax, record(p, logit, decision)),
                    (Finding::Edema, record(0.02, -9.0, Decision::Undecided)),
                ]),
            });
        }
        labels.push(pair(40, "未见气胸。"));
        found.push(CaseProbabilities::default());
        evaluate_probabilities(
            &labels,
            &found,
            UncertainPolicy::AsPresent,
            &Bootstrap::default(),
        )
        .expect("good settings")
        .expect("there are probabilities")
    }

    #[test]
    fn scores_by_class_before_and_after() {
        let outcome = outcome();
        assert_eq!((outcome.cases, outcome.missing), (40, 1));
        let one = &outcome.classes[&Finding::Pneumothorax];
        assert_eq!((one.positives, one.negatives), (10, 30));
        // Ten positives: above 29 negatives, level with one.
        assert!((one.auc.value - 29.5 / 30.0).abs() < 1e-12, "{:?}", one.auc);
        assert!(one.auc.low < one.auc.value && one.auc.high >= one.auc.value);
        let (before, after) = (one.before.as_ref().unwrap(), one.after.as_ref().unwrap());
        assert!((after.brier - (39.0 * 0.01 + 0.81) / 40.0).abs() < 1e-12);
        // 6 as a logit is 0.9975.
        assert!(before.ece != after.ece);
        assert_eq!(after.coverage, 1.0, "one error in forty");
        assert_eq!(one.coverage.value, 1.0);
        assert!(one.coverage.low <= 1.0 && one.coverage.high == 1.0);
        // All are equally sure: whatever is answered, one of forty is wrong.
        assert_eq!(one.abstention.len(), BAND);
        for point in &one.abstention {
            assert!((point.error.value - 1.0 / 40.0).abs() < 1e-12, "{point:?}");
            assert!(point.error.low <= point.error.value && point.error.value <= point.error.high);
        }
        assert_eq!(one.thresholds.present_from, None, "one of eleven is wrong");
        assert_eq!(one.thresholds.absent_to, Some(0.1));
        let decided = one.decided.unwrap();
        assert_eq!(
            (decided.cases, decided.decided, decided.errors),
            (40, 40, 1)
        );
    }

    #[test]
    fn a_class_that_nobody_has_is_in_no_sum() {
        let outcome = outcome();
        let edema = &outcome.classes[&Finding::Edema];
        assert!(edema.auc.value.is_nan() && edema.is_few());
        assert_eq!(outcome.all.positives + outcome.all.negatives, 40);
        let one = &outcome.classes[&Finding::Pneumothorax];
        assert_eq!(outcome.macro_auc.value, one.auc.value);
        assert!(serde_json::to_value(&outcome).is_ok());
    }

    #[test]
    fn without_probabilities_there_is_nothing_to_say() {
        let labels = [pair(0, "右侧气胸。")];
        let found = [CaseProbabilities::default()];
        let none = evaluate_probabilities(
            &labels,
            &found,
            UncertainPolicy::AsPresent,
            &Bootstrap::default(),
        );
        assert_eq!(none.expect("good settings"), None);
    }
}

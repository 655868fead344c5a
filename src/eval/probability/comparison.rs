//! The probabilities of two models about the same reports.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    evaluation::{CaseProbabilities, ProbabilityOutcome, TARGET_ERROR, evaluate_probabilities},
    metrics::{Ranked, Surest},
    read::FindingRecord,
};
use crate::eval::{
    bootstrap::{Bootstrap, Comparison, adjust},
    error::EvaluateError,
    findings::{Finding, LabelledPair, UncertainPolicy},
};

/// How two models differ in one class, or over several; the first is the other model, the second this one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct ProbabilityDifference {
    /// Area under the ROC curve.
    pub auc: Comparison,
    /// Share of answers that can be given with an error of [`TARGET_ERROR`].
    pub coverage: Comparison,
}

/// Two models.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ProbabilityComparison {
    /// Reports of which both have probabilities.
    pub cases: usize,
    /// The other model by itself.
    pub other: ProbabilityOutcome,
    /// All cases of the classes that have both truths, together.
    pub all: ProbabilityDifference,
    /// By class, those that have both truths. p values are corrected over all rows of both scores.
    pub classes: BTreeMap<Finding, ProbabilityDifference>,
}

/// One case of a class: truth, study, and what each model says.
type PairedCase = (bool, usize, [Said; 2]);

/// Place in the order of the class, and probability.
#[derive(Debug, Clone, Copy)]
struct Said {
    rank: f64,
    probability: f64,
}

/// Compares `found` with `other`; `None` where no report has probabilities of both.
///
/// # Errors
/// [`EvaluateError`] for settings of the bootstrap out of range.
///
/// # Panics
/// If there are not as many of each.
pub fn compare_probabilities(
    labels: &[LabelledPair],
    found: &[CaseProbabilities],
    other: &[CaseProbabilities],
    policy: UncertainPolicy,
    bootstrap: &Bootstrap,
) -> Result<Option<ProbabilityComparison>, EvaluateError> {
    assert_eq!(
        labels.len(),
        other.len(),
        "cases and probabilities disagree"
    );
    let Some(alone) = evaluate_probabilities(labels, other, policy, bootstrap)? else {
        return Ok(None);
    };
    let mut studies: BTreeMap<&str, usize> = BTreeMap::new();
    /// Whether it is there, the study, and what the two models say.
    type Judged<'a> = (bool, usize, [&'a FindingRecord; 2]);
    let mut classes: BTreeMap<Finding, Vec<Judged<'_>>> = BTreeMap::new();
    let mut cases = 0;
    for (pair, (this, other)) in labels.iter().zip(found.iter().zip(other)) {
        if this.findings.is_empty() || other.findings.is_empty() {
            continue;
        }
        cases += 1;
        let next = studies.len();
        let study = *studies.entry(&pair.study).or_insert(next);
        for (finding, record) in &this.findings {
            let truth = policy.positive(*finding, pair.truth.status(*finding));
            if let (Some(truth), Some(second)) = (truth, other.findings.get(finding)) {
                let class = classes.entry(*finding).or_default();
                class.push((truth, study, [second, record]));
            }
        }
    }
    classes.retain(|_, cases| {
        let positives = cases.iter().filter(|case| case.0).count();
        positives > 0 && positives < cases.len()
    });
    if classes.is_empty() {
        return Ok(None);
    }
    let (findings, mut paired): (Vec<Finding>, Vec<Vec<PairedCase>>) = classes
        .into_iter()
        .map(|(finding, cases)| (finding, ranked(&cases)))
        .unzip();
    // Over classes the order is that of the probabilities; that there is none follows from the others.
    let together = findings
        .iter()
        .zip(&paired)
        .filter(|(finding, _)| **finding != Finding::NoFinding)
        .flat_map(|(_, cases)| cases)
        .map(|(truth, study, said)| {
            let said = said.map(|one| Said {
                rank: one.probability,
                ..one
            });
            (*truth, *study, said)
        });
    paired.push(together.collect());
    let of = |model: usize| {
        let sorted: Vec<(Ranked, Surest)> = paired
            .iter()
            .map(|cases| sorted(cases, |_| model))
            .collect();
        move |times: &[f64]| -> Vec<f64> {
            let sorted = sorted.iter();
            sorted
                .flat_map(|(ranked, surest)| scores(ranked, surest, times))
                .collect()
        }
    };
    let ones = vec![1.0; studies.len()];
    let mixed = |swapped: &[bool]| -> Vec<f64> {
        let class = |cases: &Vec<PairedCase>| {
            let model = |model: usize| {
                let swap = |study: usize| if swapped[study] { 1 - model } else { model };
                let (ranked, surest) = sorted(cases, swap);
                scores(&ranked, &surest, &ones)
            };
            let [first, second] = [model(0), model(1)];
            [second[0] - first[0], second[1] - first[1]]
        };
        paired.iter().flat_map(class).collect()
    };
    let mut compared = bootstrap.compare(studies.len(), of(0), of(1), mixed)?;
    adjust(compared.iter_mut());
    let mut differences = compared
        .chunks(2)
        .map(|pair| ProbabilityDifference {
            auc: pair[0],
            coverage: pair[1],
        })
        .collect::<Vec<_>>();
    let Some(all) = differences.pop() else {
        return Ok(None);
    };
    Ok(Some(ProbabilityComparison {
        cases,
        other: alone,
        all,
        classes: findings.into_iter().zip(differences).collect(),
    }))
}

fn scores(ranked: &Ranked, surest: &Surest, times: &[f64]) -> [f64; 2] {
    [ranked.auc(times), surest.coverage(times, TARGET_ERROR)]
}

/// The cases of a class with one model's word each: `model` says whose, by study.
fn sorted(cases: &[PairedCase], model: impl Fn(usize) -> usize) -> (Ranked, Surest) {
    let said = |case: &PairedCase| case.2[model(case.1)];
    let ranks = cases.iter().map(|case| (said(case).rank, case.0, case.1));
    let probabilities: Vec<(f64, bool, usize)> = cases
        .iter()
        .map(|case| (said(case).probability, case.0, case.1))
        .collect();
    (Ranked::new(ranks.collect()), Surest::new(&probabilities))
}

/// Puts ranks in place of logits: those of two models are on two scales, and swapped cases have to be comparable. Ties
/// share the mean of their ranks.
///
/// Source: Bandos, Rockette, Gur: "A permutation test sensitive to differences in areas", Statistics in Medicine 2005.
fn ranked(cases: &[(bool, usize, [&FindingRecord; 2])]) -> Vec<PairedCase> {
    let ranks = [0, 1].map(|model: usize| {
        let score = |at: usize| {
            let record: &FindingRecord = cases[at].2[model];
            record.logit.unwrap_or(record.probability)
        };
        let mut order: Vec<usize> = (0..cases.len()).collect();
        order.sort_by(|a, b| score(*a).total_cmp(&score(*b)));
        let mut ranks = vec![0.0; cases.len()];
        let mut before = 0;
        for tied in order.chunk_by(|a, b| score(*a) == score(*b)) {
            let rank = before as f64 + (tied.len() as f64 - 1.0) / 2.0;
            tied.iter().for_each(|at| ranks[*at] = rank);
            before += tied.len();
        }
        ranks
    });
    let paired = cases.iter().enumerate();
    paired
        .map(|(at, (truth, study, records))| {
            let said = [0, 1].map(|model: usize| Said {
                rank: ranks[model][at],
                probability: records[model].probability,
            });
            (*truth, *study, said)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::findings::Labeler;

    fn case(probability: f64, logit: f64) -> CaseProbabilities {
        let record = FindingRecord {
            probability,
            logit: Some(logit),
            decision: None,
            in_report: None,
            conflict: false,
        };
        CaseProbabilities {
            calibrated: true,
            findings: BTreeMap::from([(Finding::Pneumothorax, record)]),
        }
    }

    /// Sixty reports, every third with a pneumothorax; one model sees it, the other does not. Logits are on two scales.
    #[test]
    fn a_model_that_sees_is_better_than_one_that_does_not() {
        let (mut labels, mut seeing, mut blind) = (Vec::new(), Vec::new(), Vec::new());
        for at in 0..60 {
            let there = at % 3 == 0;
            let text = if there {
                "右侧气胸。"
            } else {
                "未见气胸。"
            };
            let labeler = Labeler::hospital();
            labels.push(LabelledPair::read(labeler, &at.to_string(), text, "", None));
            let noise = f64::from(at * 37 % 60) / 60.0;
            let p = if there {
                0.7 + 0.3 * noise
            } else {
                0.4 * noise
            };
            seeing.push(case(p, 100.0 * p - 1000.0));
            blind.push(case(noise, noise));
        }
        let bootstrap = Bootstrap {
            resamples: 200,
            ..Bootstrap::default()
        };
        let compare = |this: &[CaseProbabilities], other: &[CaseProbabilities]| {
            let policy = UncertainPolicy::AsPresent;
            compare_probabilities(&labels, this, other, policy, &bootstrap)
                .expect("good settings")
                .expect("both have probabilities")
        };
        let better = compare(&seeing, &blind);
        let one = &better.classes[&Finding::Pneumothorax];
        assert_eq!((one.auc.second, one.coverage.second), (1.0, 1.0));
        assert!(
            one.auc.first < 0.7 && one.auc.difference.low > 0.2,
            "{one:?}"
        );
        // Four rows: AUC and coverage, of the class and together.
        assert!((one.auc.p - 1.0 / 10_001.0).abs() < 1e-12, "{one:?}");
        assert!(one.auc.p_adjusted >= 4.0 * one.auc.p - 1e-12 && one.auc.p_adjusted < 0.05);
        assert_eq!(better.cases, 60);
        assert_eq!(
            better.other.classes[&Finding::Pneumothorax].auc.value,
            one.auc.first
        );

        let same = compare(&seeing, &seeing);
        let one = &same.classes[&Finding::Pneumothorax];
        assert_eq!((one.auc.difference.value, one.auc.p), (0.0, 1.0));
        let none = vec![CaseProbabilities::default(); 60];
        let policy = UncertainPolicy::AsPresent;
        let nothing = compare_probabilities(&labels, &seeing, &none, policy, &bootstrap);
        assert_eq!(nothing.expect("good settings"), None);
    }
}

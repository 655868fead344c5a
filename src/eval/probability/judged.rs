//! From logits to what is said of a report: probability, decision and conflict of every class.

use std::collections::BTreeMap;

use super::{
    calibration::Calibration,
    evidence::ClassEvidence,
    logit::{ScoreForm, SentenceContext, sigmoid},
    read::FindingRecord,
    thresholds::Decision,
};
use crate::eval::findings::{Finding, RuleSet, Status, UncertainPolicy};

/// Code of the remark that probabilities are not calibrated.
pub const UNCALIBRATED: &str = "findings_not_calibrated";

/// Code of the remark that report and probability disagree.
pub const CONFLICT: &str = "finding_conflict";

/// Probabilities of all twenty classes beside what a report says.
#[derive(Debug, Clone, PartialEq)]
pub struct JudgedFindings {
    /// By class.
    pub findings: BTreeMap<Finding, FindingRecord>,
    /// Where report and probability disagree, as sentences.
    pub conflicts: Vec<String>,
    /// The table of words that the report was read with.
    pub rules: String,
}

/// How the model is asked, and after what sentences are put: as the calibration was made, or the default.
pub fn form_of(calibration: Option<&Calibration>) -> (ScoreForm, SentenceContext) {
    calibration.map_or_else(Default::default, |one| (one.model.form, one.model.context))
}

/// Makes probabilities and decisions of what the model says, asked as [`form_of`] says, and compares them with
/// `report`. Without a calibration nothing is decided; without `rules` they are guessed from the report.
pub fn judge(
    classes: &[ClassEvidence],
    calibration: Option<&Calibration>,
    report: &str,
    rules: Option<&RuleSet>,
) -> JudgedFindings {
    let guessed;
    let rules = match rules {
        Some(rules) => rules,
        None => {
            guessed = RuleSet::guess([report]);
            &guessed
        }
    };
    let labels = rules.label(report);
    let (form, context) = form_of(calibration);
    let policy = calibration.map_or(UncertainPolicy::AsPresent, |one| one.data.uncertain);
    let mut findings = BTreeMap::new();
    let mut conflicts = Vec::new();
    let mut add = |finding: Finding, logit: Option<f64>, probability: f64, decision: Decision| {
        let in_report = labels.status(finding);
        let conflict = is_conflict(in_report, decision);
        if conflict {
            conflicts.push(format!(
                "{} {finding}: the report says {}, the probability {probability:.2} decides {}",
                finding.chinese(),
                status_word(in_report),
                decision_word(decision)
            ));
        }
        findings.insert(
            finding,
            FindingRecord {
                probability: rounded(probability),
                logit: logit.map(rounded),
                decision: Some(decision),
                in_report: Some(in_report),
                conflict,
            },
        );
    };
    let mut found = Vec::with_capacity(classes.len());
    for class in classes {
        let logit = class.logit(form, context, policy);
        let (probability, decision) = match calibration {
            Some(calibration) => calibration.apply(class.finding, logit),
            None => (sigmoid(logit), Decision::Undecided),
        };
        add(class.finding, Some(logit), probability, decision);
        found.push((class.finding, probability, decision));
    }
    let (probability, decision) = no_finding(&found);
    add(Finding::NoFinding, None, probability, decision);
    JudgedFindings {
        findings,
        conflicts,
        rules: rules.name.clone(),
    }
}

/// That none of the others is there, devices aside, as reports are read: the product of their complements, as if they
/// were independent. It is decided by their decisions.
fn no_finding(found: &[(Finding, f64, Decision)]) -> (f64, Decision) {
    let found = || {
        let all = found.iter();
        all.filter(|(finding, ..)| *finding != Finding::SupportDevices)
    };
    let probability = found().map(|(_, p, _)| 1.0 - p).product();
    let decision = if found().any(|(.., decision)| *decision == Decision::Present) {
        Decision::Absent
    } else if found().all(|(.., decision)| *decision == Decision::Absent) {
        Decision::Present
    } else {
        Decision::Undecided
    };
    (probability, decision)
}

/// A millionth is less than any model knows.
fn rounded(value: f64) -> f64 {
    (value * 1e6).round() / 1e6
}

/// A finding that a report leaves out counts as denied, as in `eval`.
fn is_conflict(in_report: Status, decision: Decision) -> bool {
    match decision {
        Decision::Present => matches!(in_report, Status::Absent | Status::NotMentioned),
        Decision::Absent => in_report == Status::Present,
        Decision::Undecided => false,
    }
}

/// A status as sentences have it.
pub fn status_word(status: Status) -> &'static str {
    match status {
        Status::Present => "present",
        Status::Uncertain => "uncertain",
        Status::Absent => "absent",
        Status::NotMentioned => "nothing",
    }
}

/// A decision as sentences have it.
pub fn decision_word(decision: Decision) -> &'static str {
    match decision {
        Decision::Present => "present",
        Decision::Absent => "absent",
        Decision::Undecided => "undecided",
    }
}

#[cfg(test)]
mod tests {
    use super::{super::evidence::of_reports, *};
    use crate::eval::findings::Labeler;

    #[test]
    fn what_is_left_out_counts_as_denied() {
        use Decision::{Absent, Present, Undecided};
        assert!(is_conflict(Status::Absent, Present));
        assert!(is_conflict(Status::NotMentioned, Present));
        assert!(is_conflict(Status::Present, Absent));
        for (status, decision) in [
            (Status::Uncertain, Present),
            (Status::Uncertain, Absent),
            (Status::Present, Present),
            (Status::NotMentioned, Absent),
            (Status::Absent, Undecided),
            (Status::Present, Undecided),
        ] {
            assert!(!is_conflict(status, decision), "{status:?} {decision:?}");
        }
    }

    #[test]
    fn no_finding_follows_from_the_others_but_devices() {
        use Decision::{Absent, Present, Undecided};
        let of = |edema, devices| {
            no_finding(&[
                (Finding::Edema, 0.5, edema),
                (Finding::Hernia, 0.2, Absent),
                (Finding::SupportDevices, 0.9, devices),
            ])
        };
        assert!((of(Absent, Present).0 - 0.4).abs() < 1e-12);
        assert_eq!(of(Absent, Present).1, Present);
        assert_eq!(of(Present, Absent).1, Absent);
        assert_eq!(of(Undecided, Absent).1, Undecided);
    }

    #[test]
    fn without_a_calibration_all_twenty_are_there_and_nothing_is_decided() {
        let judged = judge(
            &of_reports(Labeler::hospital(), &[]),
            None,
            "右侧气胸。",
            None,
        );
        assert_eq!(judged.findings.len(), Finding::ALL.len());
        for (finding, one) in &judged.findings {
            assert_eq!(one.decision, Some(Decision::Undecided), "{finding}");
            assert!(!one.conflict && one.in_report.is_some());
            assert_eq!(one.logit.is_none(), *finding == Finding::NoFinding);
        }
        let there = &judged.findings[&Finding::Pneumothorax];
        assert_eq!(there.in_report, Some(Status::Present));
        assert!(judged.conflicts.is_empty());
    }
}

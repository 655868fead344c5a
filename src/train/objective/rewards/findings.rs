//! Rewards from what the labeler reads in answer and truth.

use std::{collections::BTreeSet, sync::Arc};

use super::{Answered, Reward};
use crate::eval::findings::{
    Finding, FindingLabel, Laterality, ReportLabels, RuleSet, Severity, Status, Zone,
};

/// F1 of findings, doubtful ones counted as present.
pub(super) struct FindingF1 {
    pub rules: Arc<RuleSet>,
    pub side: bool,
    pub zone: bool,
    pub severity: bool,
}

/// One statement that answer and truth can share.
type Item = (Finding, Option<Laterality>, Option<Zone>, Option<Severity>);

impl FindingF1 {
    /// What a report states: both sides, and each zone, as statements of their own.
    fn items(&self, labels: &ReportLabels) -> BTreeSet<String> {
        let stated = labels
            .findings
            .iter()
            .filter(|(finding, label)| match label.status {
                Status::Present => true,
                // A doubtful "nothing" means that something is doubtful.
                Status::Uncertain => **finding != Finding::NoFinding,
                _ => false,
            });
        let items = stated.flat_map(|(finding, label)| self.of(*finding, label));
        items.map(|item| format!("{item:?}")).collect()
    }

    fn of(&self, finding: Finding, label: &FindingLabel) -> Vec<Item> {
        let sides = match label.laterality.filter(|_| self.side) {
            None => vec![None],
            Some(Laterality::Bilateral) => vec![Some(Laterality::Left), Some(Laterality::Right)],
            side => vec![side],
        };
        let zones: Vec<Option<Zone>> = match self.zone && !label.zones.is_empty() {
            true => label.zones.iter().copied().map(Some).collect(),
            false => vec![None],
        };
        let severity = label.severity.filter(|_| self.severity);
        let items = sides.iter().flat_map(|side| {
            zones
                .iter()
                .map(move |zone| (finding, *side, *zone, severity))
        });
        items.collect()
    }
}

impl Reward for FindingF1 {
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String> {
        let values = answers.iter().map(|one| {
            if one.answer.trim().is_empty() {
                return 0.0;
            }
            let (truth, answer) = (self.rules.label(&one.truth), self.rules.label(&one.answer));
            let (wanted, stated) = (self.items(&truth), self.items(&answer));
            let shared = wanted.intersection(&stated).count() as f64;
            let all = (wanted.len() + stated.len()) as f64;
            let f1 = if all == 0.0 { 0.0 } else { 2.0 * shared / all };
            // Words of something abnormal that nobody can check earn nothing.
            f1 * (1.0 - answer.unread_share())
        });
        Ok(values.collect())
    }
}

/// 1 unless a comparison with an earlier film has no ground.
pub(super) struct Comparison(pub Arc<RuleSet>);

impl Reward for Comparison {
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String> {
        let values = answers.iter().map(|one| {
            let wrong = self.0.label(&one.answer).compares && !self.0.label(&one.truth).compares;
            f64::from(u8::from(!wrong && !one.answer.trim().is_empty()))
        });
        Ok(values.collect())
    }
}

/// 1 unless the answer contradicts itself, or its reasoning.
pub(super) struct Contradiction(pub Arc<RuleSet>);

impl Reward for Contradiction {
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String> {
        let values = answers.iter().map(|one| {
            let answer = self.0.label(&one.answer);
            let thinking = one.thinking.as_ref().map(|text| self.0.label(text));
            let opposed = thinking.is_some_and(|thinking| {
                Finding::ALL.into_iter().any(|finding| {
                    matches!(
                        (thinking.status(finding), answer.status(finding)),
                        (Status::Present, Status::Absent) | (Status::Absent, Status::Present)
                    )
                })
            });
            let wrong =
                opposed || !answer.contradictions.is_empty() || one.answer.trim().is_empty();
            f64::from(u8::from(!wrong))
        });
        Ok(values.collect())
    }
}

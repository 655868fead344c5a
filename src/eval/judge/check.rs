//! How well a judge finds errors: reports of phantoms with one error each, planted by rule, and reports without any.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::{
    ask::{Verdict, Verdicts},
    prompt::ErrorKind,
};
use crate::phantom::{Dialect, Finding, Side, write_report};

/// A pair whose errors are known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlantedPair {
    /// What is true.
    pub reference: String,
    /// What is judged.
    pub answer: String,
    /// The one error; `None` for the same findings in other words.
    pub kind: Option<ErrorKind>,
}

/// What a judge made of the planted errors of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct KindCheck {
    /// Pairs with this error.
    pub planted: usize,
    /// Of these, pairs in which the judge names it.
    pub found: usize,
    /// Pairs in which the judge names it, planted or not.
    pub named: usize,
    /// Found among planted; `None` without one.
    pub recall: Option<f64>,
    /// Found among named; `None` without one.
    pub precision: Option<f64>,
}

/// How well a judge finds planted errors.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CheckOutcome {
    /// Pairs that were judged.
    pub judged: usize,
    /// Pairs without an answer that can be read; an error in them counts as not found.
    pub unreadable: usize,
    /// Pairs without an error.
    pub clean: usize,
    /// Of these, pairs without an error in the judge's eyes.
    pub called_clean: usize,
    /// By kind of error.
    pub by_kind: BTreeMap<ErrorKind, KindCheck>,
}

const SIDES: [Side; 2] = Side::ALL;

/// `each` pairs of every kind of error, and as many without one. The same for the same `each`.
pub fn planted(each: usize) -> Vec<PlantedPair> {
    let zones = crate::phantom::Zone::ALL;
    let mut pairs = Vec::new();
    for n in 0..each {
        let side = SIDES[n % 2];
        let other = SIDES[(n + 1) % 2];
        let zone = zones[n % 3];
        let seed = n as u64;
        let effusion = Finding::PleuralEffusion(side);
        let base = match n % 3 {
            0 => vec![effusion, Finding::Cardiomegaly],
            1 => vec![effusion, Finding::Consolidation(other, zone)],
            _ => vec![effusion, Finding::Nodule(other, zone), Finding::Pacemaker],
        };
        let base: BTreeSet<Finding> = base.into_iter().collect();
        let write = |findings: &BTreeSet<Finding>| write_report(findings, Dialect::House, seed);
        let without = |finding: Finding| {
            let mut findings = base.clone();
            findings.remove(&finding);
            findings
        };
        let with = |mut findings: BTreeSet<Finding>, finding: Finding| {
            findings.insert(finding);
            findings
        };
        let reference = write(&base);
        let mut pair = |reference: String, answer: String, kind| {
            pairs.push(PlantedPair {
                reference,
                answer,
                kind,
            });
        };
        pair(
            reference.clone(),
            write_report(&base, Dialect::Terse, seed),
            None,
        );
        pair(
            reference.clone(),
            write(&with(base.clone(), Finding::Pneumothorax(other))),
            Some(ErrorKind::FalseFinding),
        );
        pair(
            reference.clone(),
            write(&without(effusion)),
            Some(ErrorKind::MissingFinding),
        );
        pair(
            reference.clone(),
            write(&with(without(effusion), Finding::PleuralEffusion(other))),
            Some(ErrorKind::WrongLocation),
        );
        let amount = |amount: &str| {
            let report = write_report(&base, Dialect::Terse, seed);
            report.replacen("胸腔积液", &format!("{amount}胸腔积液"), 1)
        };
        let (little, much) = if n % 2 == 0 {
            ("少量", "大量")
        } else {
            ("大量", "少量")
        };
        pair(amount(little), amount(much), Some(ErrorKind::WrongSeverity));
        let compared = format!("{reference}与前片比较，胸腔积液较前明显增多。");
        pair(
            reference.clone(),
            compared.clone(),
            Some(ErrorKind::InventedComparison),
        );
        pair(compared, reference, Some(ErrorKind::OmittedComparison));
    }
    pairs
}

impl CheckOutcome {
    /// Compares `verdicts` with what was planted, pair by pair.
    pub fn of(pairs: &[PlantedPair], verdicts: &Verdicts) -> Self {
        let mut outcome = Self {
            judged: 0,
            unreadable: 0,
            clean: 0,
            called_clean: 0,
            by_kind: ErrorKind::ALL
                .map(|kind| (kind, KindCheck::default()))
                .into_iter()
                .collect(),
        };
        for (pair, verdict) in pairs.iter().zip(&verdicts.pairs) {
            let judgement = match verdict {
                Verdict::Judged(judgement) => {
                    outcome.judged += 1;
                    Some(judgement)
                }
                Verdict::Unreadable(_) | Verdict::Failed(_) => {
                    outcome.unreadable += 1;
                    None
                }
            };
            let errors = judgement.map_or(&[][..], |judgement| &judgement.errors);
            if pair.kind.is_none() {
                outcome.clean += 1;
                outcome.called_clean += usize::from(judgement.is_some() && errors.is_empty());
            }
            for (kind, check) in &mut outcome.by_kind {
                let named = errors.iter().any(|error| error.kind == *kind);
                let planted = pair.kind == Some(*kind);
                check.planted += usize::from(planted);
                check.named += usize::from(named);
                check.found += usize::from(planted && named);
            }
        }
        for check in outcome.by_kind.values_mut() {
            let share = |of: usize| (of > 0).then(|| check.found as f64 / of as f64);
            (check.recall, check.precision) = (share(check.planted), share(check.named));
        }
        outcome
    }

    /// A few lines for a terminal.
    pub fn text(&self) -> String {
        let mut text = format!(
            "  planted errors: {} pairs judged, {} unreadable; {} of {} pairs without an error called so\n",
            self.judged, self.unreadable, self.called_clean, self.clean
        );
        let share = |share: Option<f64>| {
            share.map_or_else(|| "–".to_owned(), |share| format!("{:.1} %", 100.0 * share))
        };
        for (kind, check) in &self.by_kind {
            text.push_str(&format!(
                "    {:20} recall {:>7}  precision {:>7}  ({} of {} found, {} named)\n",
                kind.key(),
                share(check.recall),
                share(check.precision),
                check.found,
                check.planted,
                check.named
            ));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        eval::judge::{JudgedError, Judgement},
        phantom::findings_in_report,
    };

    #[test]
    fn each_pair_has_the_error_it_names() {
        let pairs = planted(6);
        assert_eq!(pairs.len(), 6 * 7);
        for pair in &pairs {
            let (truth, answer) = (
                findings_in_report(&pair.reference),
                findings_in_report(&pair.answer),
            );
            let (lost, added) = (
                truth.difference(&answer).count(),
                answer.difference(&truth).count(),
            );
            let expected = match pair.kind {
                Some(ErrorKind::FalseFinding) => (0, 1),
                Some(ErrorKind::MissingFinding) => (1, 0),
                Some(ErrorKind::WrongLocation) => (1, 1),
                _ => (0, 0),
            };
            assert_eq!((lost, added), expected, "{pair:?}");
            if pair.kind.is_some() {
                assert_ne!(pair.reference, pair.answer, "{pair:?}");
            }
            let compares = |text: &str| text.contains("较前");
            let kind = pair.kind;
            assert_eq!(
                compares(&pair.answer),
                kind == Some(ErrorKind::InventedComparison)
            );
            assert_eq!(
                compares(&pair.reference),
                kind == Some(ErrorKind::OmittedComparison)
            );
            let degree = pair.reference.contains("量胸腔积液");
            assert_eq!(degree, kind == Some(ErrorKind::WrongSeverity), "{pair:?}");
        }
    }

    #[test]
    fn a_perfect_judge_finds_all_and_a_silent_one_nothing() {
        let pairs = planted(3);
        let right = |pair: &PlantedPair| {
            Verdict::Judged(Judgement {
                errors: pair
                    .kind
                    .map(|kind| JudgedError {
                        kind,
                        significant: true,
                        text: String::new(),
                    })
                    .into_iter()
                    .collect(),
                matched: Vec::new(),
            })
        };
        let verdicts = Verdicts {
            pairs: pairs.iter().map(right).collect(),
            known: 0,
        };
        let check = CheckOutcome::of(&pairs, &verdicts);
        let all = check.by_kind.values();
        assert!(
            all.clone()
                .all(|kind| kind.recall == Some(1.0) && kind.precision == Some(1.0))
        );
        assert_eq!((check.clean, check.called_clean), (3, 3));
        let mut silent = verdicts;
        silent.pairs = pairs
            .iter()
            .map(|_| Verdict::Judged(Judgement::default()))
            .collect();
        silent.pairs[0] = Verdict::Unreadable("x".to_owned());
        let check = CheckOutcome::of(&pairs, &silent);
        assert!(
            check
                .by_kind
                .values()
                .all(|kind| kind.recall == Some(0.0) && kind.precision.is_none())
        );
        assert_eq!((check.unreadable, check.called_clean), (1, 2));
    }
}

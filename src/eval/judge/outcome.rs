//! What a judge said of a whole test set.

use std::collections::BTreeMap;

use serde::Serialize;

use super::{
    ask::{Verdict, Verdicts},
    check::CheckOutcome,
    error::JudgeError,
    prompt::{ErrorKind, Judgement},
};
use crate::eval::bootstrap::{Bootstrap, Interval};

/// Errors of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct KindCounts {
    /// That change what is done for the patient.
    pub significant: usize,
    /// That do not.
    pub insignificant: usize,
    /// Reports with at least one of them.
    pub reports: usize,
}

/// Scores of a judge.
#[derive(Debug, Clone, Serialize)]
pub struct JudgeOutcome {
    /// Where it was asked.
    pub url: String,
    /// Which model.
    pub model: String,
    /// Whether the server held the answers to a schema.
    pub schema: bool,
    /// Reports with a judgement that can be read; only these are scored.
    pub judged: usize,
    /// Answers that are not what was asked for.
    pub unreadable: usize,
    /// Reports without an answer.
    pub failed: usize,
    /// The first reason of [`Self::unreadable`] or [`Self::failed`].
    pub first_fault: Option<String>,
    /// Judgements known from an earlier run.
    pub known: usize,
    /// Mean GREEN with its interval by study; `None` without a judgement.
    pub green: Option<Interval>,
    /// Mean number of significant errors of a report.
    pub significant_errors: Option<f64>,
    /// By kind of error.
    pub by_kind: BTreeMap<ErrorKind, KindCounts>,
    /// By report, in the order of the test set; `None` where there is none.
    pub cases: Vec<Option<Judgement>>,
    /// How well it finds errors that were planted.
    pub check: Option<CheckOutcome>,
}

impl JudgeOutcome {
    /// Sums up `verdicts`, one for each of `studies`.
    ///
    /// # Errors
    /// [`JudgeError::Score`] for settings out of range.
    pub fn of(
        url: &str,
        model: &str,
        schema: bool,
        studies: &[&str],
        verdicts: Verdicts,
        bootstrap: &Bootstrap,
    ) -> Result<Self, JudgeError> {
        let mut by_study: BTreeMap<&str, (f64, f64)> = BTreeMap::new();
        let mut by_kind: BTreeMap<ErrorKind, KindCounts> = BTreeMap::new();
        for kind in ErrorKind::ALL {
            by_kind.insert(kind, KindCounts::default());
        }
        let (mut unreadable, mut failed, mut first_fault) = (0, 0, None);
        let (mut judged, mut significant) = (0, 0);
        let mut cases = Vec::with_capacity(verdicts.pairs.len());
        for (study, verdict) in studies.iter().zip(verdicts.pairs) {
            let judgement = match verdict {
                Verdict::Judged(judgement) => judgement,
                Verdict::Unreadable(reason) => {
                    unreadable += 1;
                    first_fault.get_or_insert(reason);
                    cases.push(None);
                    continue;
                }
                Verdict::Failed(reason) => {
                    failed += 1;
                    first_fault.get_or_insert(reason);
                    cases.push(None);
                    continue;
                }
            };
            judged += 1;
            let sums = by_study.entry(study).or_default();
            *sums = (sums.0 + judgement.green(), sums.1 + 1.0);
            for (kind, counts) in &mut by_kind {
                let of_kind = judgement.errors.iter().filter(|error| error.kind == *kind);
                let (mut all, mut grave) = (0, 0);
                for error in of_kind {
                    all += 1;
                    grave += usize::from(error.significant);
                }
                counts.significant += grave;
                counts.insignificant += all - grave;
                counts.reports += usize::from(all > 0);
                significant += grave;
            }
            cases.push(Some(judgement));
        }
        let studies: Vec<(f64, f64)> = by_study.into_values().collect();
        let green = match studies.len() {
            0 => None,
            count => {
                let mean = |times: &[f64]| {
                    let (mut sum, mut all) = (0.0, 0.0);
                    for ((green, reports), times) in studies.iter().zip(times) {
                        sum += times * green;
                        all += times * reports;
                    }
                    vec![sum / all]
                };
                bootstrap.intervals(count, mean)?.into_iter().next()
            }
        };
        Ok(Self {
            url: url.to_owned(),
            model: model.to_owned(),
            schema,
            judged,
            unreadable,
            failed,
            first_fault,
            known: verdicts.known,
            green,
            significant_errors: (judged > 0).then(|| significant as f64 / judged as f64),
            by_kind,
            cases,
            check: None,
        })
    }

    /// A few lines for a terminal.
    pub fn text(&self) -> String {
        let mut text = format!(
            "judge {} at {}: {} judged, {} unreadable, {} failed, {} known before\n",
            self.model, self.url, self.judged, self.unreadable, self.failed, self.known
        );
        if let (Some(green), Some(errors)) = (&self.green, self.significant_errors) {
            text.push_str(&format!(
                "  GREEN {:.3} [{:.3}, {:.3}], {errors:.2} significant errors a report\n",
                green.value, green.low, green.high
            ));
        }
        for (kind, counts) in &self.by_kind {
            text.push_str(&format!(
                "  {:20} {:>4} significant {:>4} others, in {} reports\n",
                kind.key(),
                counts.significant,
                counts.insignificant,
                counts.reports
            ));
        }
        if let Some(check) = &self.check {
            text.push_str(&check.text());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_counted_and_not_scored() {
        let good = Judgement {
            errors: vec![super::super::prompt::JudgedError {
                kind: ErrorKind::WrongLocation,
                significant: true,
                text: String::new(),
            }],
            matched: vec!["气胸".to_owned()],
        };
        let verdicts = Verdicts {
            pairs: vec![
                Verdict::Judged(good),
                Verdict::Unreadable("no JSON".to_owned()),
                Verdict::Failed("status 500".to_owned()),
            ],
            known: 0,
        };
        let bootstrap = Bootstrap {
            resamples: 20,
            ..Bootstrap::default()
        };
        let found = JudgeOutcome::of("u", "m", true, &["1", "2", "3"], verdicts, &bootstrap)
            .expect("an outcome");
        assert_eq!((found.judged, found.unreadable, found.failed), (1, 1, 1));
        assert_eq!(found.first_fault.as_deref(), Some("no JSON"));
        assert_eq!(found.green.map(|green| green.value), Some(0.5));
        assert_eq!(found.by_kind[&ErrorKind::WrongLocation].significant, 1);
        let none = JudgeOutcome::of("u", "m", true, &[], Verdicts::default(), &bootstrap);
        assert!(none.expect("an outcome").green.is_none());
    }
}

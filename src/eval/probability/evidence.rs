//! What a model says of one class, as it was asked, and the logit that this comes to.

use std::collections::BTreeMap;

use super::{
    logit::{ScoreForm, SentenceContext, class_logit, share_logit},
    wordings::WORDINGS,
};
use crate::eval::findings::{Finding, Labeler, Status, UncertainPolicy};

/// What a model says of one class.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassEvidence {
    /// The class.
    pub finding: Finding,
    said: Said,
}

#[derive(Debug, Clone, PartialEq)]
enum Said {
    /// Log-probabilities of the sentences that state and that deny it, token by token.
    Sentences {
        stated: Vec<Vec<f32>>,
        denied: Vec<Vec<f32>>,
    },
    /// How many drawn reports state it, how many doubt it, and how many there are.
    Drawn {
        present: usize,
        uncertain: usize,
        reports: usize,
    },
}

impl ClassEvidence {
    /// The logit of the class in `form`; a drawn report that doubts it counts by `policy`.
    ///
    /// # Panics
    /// If the model was asked in another form than `form`: sentences for drawn reports, or the reverse.
    pub fn logit(&self, form: ScoreForm, context: SentenceContext, policy: UncertainPolicy) -> f64 {
        match &self.said {
            Said::Sentences { stated, denied } => class_logit(form, context, stated, denied),
            Said::Drawn {
                present,
                uncertain,
                reports,
            } => {
                assert!(!form.is_of_sentences(), "drawn reports in the form {form}");
                let doubted = match policy {
                    UncertainPolicy::AsPresent => 1.0,
                    UncertainPolicy::AsAbsent => 0.0,
                    UncertainPolicy::LeaveOut => 0.5,
                };
                share_logit(*present as f64 + doubted * *uncertain as f64, *reports)
            }
        }
    }

    /// The forms that it can be given in.
    pub fn forms(&self) -> &'static [ScoreForm] {
        match self.said {
            Said::Sentences { .. } => &[ScoreForm::Sum, ScoreForm::Mean, ScoreForm::Stated],
            Said::Drawn { .. } => &[ScoreForm::Drawn],
        }
    }
}

/// Sorts log-probabilities, `[place][sentence][token]` with the sentences of
/// [`FindingSentences::tokens`](super::sentences::FindingSentences::tokens), by class.
pub fn of_sentences(places: Vec<Vec<Vec<f32>>>) -> Vec<ClassEvidence> {
    let none: [Vec<Vec<f32>>; 2] = Default::default();
    let mut classes = vec![none; WORDINGS.len()];
    for found in places {
        let mut found = found.into_iter();
        for ([stated, denied], wordings) in classes.iter_mut().zip(&WORDINGS) {
            stated.extend(found.by_ref().take(wordings.stated.len()));
            denied.extend(found.by_ref().take(wordings.denied.len()));
        }
    }
    let sorted = WORDINGS.iter().zip(classes);
    sorted
        .map(|(wordings, [stated, denied])| ClassEvidence {
            finding: wordings.finding,
            said: Said::Sentences { stated, denied },
        })
        .collect()
}

/// Counts by class what `reports`, which a model drew for one image, say.
pub fn of_reports(labeler: &Labeler, reports: &[String]) -> Vec<ClassEvidence> {
    let mut counts: BTreeMap<Finding, [usize; 2]> = BTreeMap::new();
    for report in reports {
        for (finding, label) in labeler.label(report).findings {
            let [present, uncertain] = counts.entry(finding).or_default();
            *present += usize::from(label.status == Status::Present);
            *uncertain += usize::from(label.status == Status::Uncertain);
        }
    }
    let classes = WORDINGS.iter().map(|class| class.finding);
    classes
        .map(|finding| {
            let [present, uncertain] = counts.get(&finding).copied().unwrap_or_default();
            let reports = reports.len();
            ClassEvidence {
                finding,
                said: Said::Drawn {
                    present,
                    uncertain,
                    reports,
                },
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_go_to_their_class() {
        let all: usize = WORDINGS
            .iter()
            .map(|class| class.stated.len() + class.denied.len())
            .sum();
        // The number of each sentence as its only log-probability.
        let numbered = (0..all).map(|at| vec![at as f32]).collect();
        let mut next = 0.0;
        for (class, wordings) in of_sentences(vec![numbered]).iter().zip(&WORDINGS) {
            assert_eq!(class.finding, wordings.finding);
            let Said::Sentences { stated, denied } = &class.said else {
                panic!("no sentences");
            };
            for found in stated.iter().chain(denied) {
                assert_eq!(found[0], next);
                next += 1.0;
            }
        }
        assert_eq!(next as usize, all);
    }

    #[test]
    fn the_share_of_drawn_reports_is_the_probability() {
        let reports = [
            "右侧气胸。",
            "右侧气胸，心影增大。",
            "未见气胸。",
            "气胸不除外。",
        ]
        .map(str::to_owned);
        let classes = of_reports(Labeler::hospital(), &reports);
        let logit = |finding, policy| {
            let class = classes.iter().find(|class| class.finding == finding);
            class.map_or(f64::NAN, |class| {
                class.logit(ScoreForm::Drawn, SentenceContext::Start, policy)
            })
        };
        use UncertainPolicy::{AsAbsent, AsPresent, LeaveOut};
        let air = Finding::Pneumothorax;
        // Half a report more on both sides: 3.5 to 1.5, 2.5 to 2.5, 3 to 2.
        for (policy, odds) in [(AsPresent, 3.5 / 1.5), (AsAbsent, 1.0), (LeaveOut, 1.5)] {
            let found: f64 = logit(air, policy);
            assert!((found.exp() - odds).abs() < 1e-9, "{policy:?}: {found}");
        }
        assert!(logit(Finding::Hernia, AsPresent) < logit(Finding::Cardiomegaly, AsPresent));
        assert_eq!(classes.len(), WORDINGS.len());
        assert_eq!(classes[0].forms(), [ScoreForm::Drawn]);
    }
}

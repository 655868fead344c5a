//! One report beside its truth: labels of both, and how they differ class by class.

use serde::{Deserialize, Serialize};

use super::{
    finding::Finding,
    labeler::Labeler,
    labels::{Laterality, ReportLabels, Status},
};

/// How many classes there are.
pub(super) const CLASSES: usize = Finding::ALL.len();

/// What a doubtful finding counts as, in truth and prediction alike.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UncertainPolicy {
    /// As there: 考虑肺炎 counts like 肺炎. The default, since a doubtful finding asks the reader to act.
    #[default]
    AsPresent,
    /// As not there.
    AsAbsent,
    /// A class that is uncertain on either side is left out for that study.
    LeaveOut,
}

/// What a doubtful finding counts as in the truth and in the answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policies {
    /// In the truth.
    pub truth: UncertainPolicy,
    /// In the answer: with another policy than the truth's, hedging costs.
    pub answer: UncertainPolicy,
}

impl From<UncertainPolicy> for Policies {
    fn from(both: UncertainPolicy) -> Self {
        Self {
            truth: both,
            answer: both,
        }
    }
}

impl UncertainPolicy {
    /// Whether `status` of `finding` counts as positive; `None` if it is left out.
    ///
    /// A doubtful [`Finding::NoFinding`] means that some finding is doubtful, so it counts the other way round.
    pub fn positive(self, finding: Finding, status: Status) -> Option<bool> {
        match (status, self) {
            (Status::Present, _) => Some(true),
            (Status::Uncertain, Self::AsPresent) => Some(finding != Finding::NoFinding),
            (Status::Uncertain, Self::AsAbsent) => Some(finding == Finding::NoFinding),
            (Status::Uncertain, Self::LeaveOut) => None,
            _ => Some(false),
        }
    }
}

/// Labels of one report and of its truth.
#[derive(Debug, Clone)]
pub struct LabelledPair {
    /// The study it belongs to; pairs of one study are drawn together.
    pub study: String,
    /// What the data set says.
    pub truth: ReportLabels,
    /// What the model wrote.
    pub prediction: ReportLabels,
    /// What it wrote before, if it did.
    pub thinking: Option<ReportLabels>,
    /// Whether the model wrote no answer at all.
    pub is_empty: bool,
}

impl LabelledPair {
    /// Reads the findings of one report and of its truth.
    pub fn read(
        labeler: &Labeler,
        study: &str,
        truth: &str,
        prediction: &str,
        thinking: Option<&str>,
    ) -> Self {
        Self {
            study: study.to_owned(),
            truth: labeler.label(truth),
            prediction: labeler.label(prediction),
            thinking: thinking.map(|thinking| labeler.label(thinking)),
            is_empty: prediction.trim().is_empty(),
        }
    }

    /// How answer and truth differ, with doubt counted as `policies` say.
    ///
    /// A report that names nothing at all is neither normal nor abnormal as truth, and misses what is there. An
    /// answer without text is neither.
    pub(in crate::eval) fn compare(&self, policies: Policies) -> PairComparison {
        let (truth, prediction) = (&self.truth, &self.prediction);
        let normal = truth.status(Finding::NoFinding) == Status::Present;
        let says_abnormal = (!self.is_empty).then(|| prediction.is_abnormal());
        PairComparison {
            classes: Finding::ALL.map(|finding| {
                let in_truth = policies.truth.positive(finding, truth.status(finding));
                let in_prediction = policies
                    .answer
                    .positive(finding, prediction.status(finding));
                let both = in_truth == Some(true) && in_prediction == Some(true);
                let sides = side_of(truth, finding).zip(side_of(prediction, finding));
                ClassComparison {
                    finding,
                    in_truth,
                    in_prediction,
                    wrong_side: sides.filter(|_| both).map(|(a, b)| a != b),
                }
            }),
            false_normal: says_abnormal
                .filter(|_| truth.is_abnormal())
                .map(|abnormal| !abnormal),
            invented: says_abnormal.filter(|_| normal),
            invented_comparison: (!self.is_empty && !truth.compares).then_some(prediction.compares),
            inner_contradiction: (!self.is_empty).then_some(!prediction.contradictions.is_empty()),
            contradiction: self
                .thinking
                .as_ref()
                .map(|thinking| contradict(thinking, prediction)),
        }
    }
}

/// How an answer differs from its truth; a field is `None` where the question does not arise.
pub(in crate::eval) struct PairComparison {
    /// In the order of [`Finding::ALL`].
    pub(in crate::eval) classes: [ClassComparison; CLASSES],
    /// The truth is abnormal: whether the answer is not.
    pub(in crate::eval) false_normal: Option<bool>,
    /// The truth is normal: whether the answer is not.
    pub(in crate::eval) invented: Option<bool>,
    /// The truth compares with no earlier film: whether the answer does.
    pub(in crate::eval) invented_comparison: Option<bool>,
    /// There is an answer: whether it states and denies one class.
    pub(in crate::eval) inner_contradiction: Option<bool>,
    /// There is reasoning: whether a class is present in it and absent in the answer, or the other way round.
    pub(in crate::eval) contradiction: Option<bool>,
}

/// One class in truth and answer; `None` where doubt leaves it out.
#[derive(Debug, Clone, Copy)]
pub(in crate::eval) struct ClassComparison {
    pub(in crate::eval) finding: Finding,
    pub(in crate::eval) in_truth: Option<bool>,
    pub(in crate::eval) in_prediction: Option<bool>,
    /// In both, and both give a side: whether the sides differ.
    pub(in crate::eval) wrong_side: Option<bool>,
}

/// Whether a class is present in one report and absent in the other.
fn contradict(a: &ReportLabels, b: &ReportLabels) -> bool {
    Finding::ALL.into_iter().any(|finding| {
        matches!(
            (a.status(finding), b.status(finding)),
            (Status::Present, Status::Absent) | (Status::Absent, Status::Present)
        )
    })
}

/// Side that a report gives a class.
fn side_of(labels: &ReportLabels, finding: Finding) -> Option<Laterality> {
    labels.get(finding).and_then(|label| label.laterality)
}

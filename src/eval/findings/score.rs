//! Scores between true and predicted reports, over the findings both state.
//!
//! A mistake of the labeler counts like a mistake of the model: the scores compare what the labeler reads in both
//! texts, not what a reader would.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::{
    finding::Finding,
    labeler::Labeler,
    pair::{LabelledPair, Policies},
};

/// One study to score.
#[derive(Debug, Clone, Copy)]
pub struct StudyTexts<'a> {
    /// The true report.
    pub truth: &'a str,
    /// The report to judge.
    pub prediction: &'a str,
    /// What the model wrote before its answer, if it did.
    pub thinking: Option<&'a str>,
}

/// Counts of a class, and what follows from them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClassCounts {
    /// In truth and prediction.
    pub true_positive: usize,
    /// In the prediction only.
    pub false_positive: usize,
    /// In the truth only.
    pub false_negative: usize,
}

impl ClassCounts {
    /// Adds one study; `None` leaves it out.
    pub fn add(&mut self, truth: Option<bool>, prediction: Option<bool>) {
        match (truth, prediction) {
            (Some(true), Some(true)) => self.true_positive += 1,
            (Some(false), Some(true)) => self.false_positive += 1,
            (Some(true), Some(false)) => self.false_negative += 1,
            _ => {}
        }
    }

    /// Studies with the class in the truth.
    pub fn support(&self) -> usize {
        self.true_positive + self.false_negative
    }

    /// Whether the class is in truth or prediction at all.
    pub fn occurs(&self) -> bool {
        self.support() + self.false_positive > 0
    }

    /// Share of the predicted that is true; `None` if nothing is predicted.
    pub fn precision(&self) -> Option<f64> {
        share(self.true_positive, self.true_positive + self.false_positive)
    }

    /// Share of the true that is predicted; `None` if nothing is true.
    pub fn recall(&self) -> Option<f64> {
        share(self.true_positive, self.support())
    }

    /// Harmonic mean of precision and recall; `None` if the class is in neither.
    pub fn f1(&self) -> Option<f64> {
        share(
            2 * self.true_positive,
            2 * self.true_positive + self.false_positive + self.false_negative,
        )
    }

    fn plus(self, other: Self) -> Self {
        Self {
            true_positive: self.true_positive + other.true_positive,
            false_positive: self.false_positive + other.false_positive,
            false_negative: self.false_negative + other.false_negative,
        }
    }
}

/// A count of cases among those where the question arises.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Cases.
    pub count: usize,
    /// Cases where the question arises.
    pub of: usize,
}

impl Rate {
    /// Counts a case; `None` where the question does not arise.
    fn add(&mut self, hit: Option<bool>) {
        self.count += usize::from(hit == Some(true));
        self.of += usize::from(hit.is_some());
    }

    /// From 0 to 1; `None` if the question never arises.
    pub fn value(&self) -> Option<f64> {
        share(self.count, self.of)
    }
}

fn share(part: usize, whole: usize) -> Option<f64> {
    (whole > 0).then(|| part as f64 / whole as f64)
}

/// A share as per cent; `–` where there is none.
pub fn percent(share: Option<f64>) -> String {
    share.map_or_else(|| "–".to_owned(), |share| format!("{:.1}", 100.0 * share))
}

/// Precision, recall and F1, from 0 to 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Average {
    /// Precision.
    pub precision: f64,
    /// Recall.
    pub recall: f64,
    /// F1.
    pub f1: f64,
}

/// All scores of a set of studies.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FindingScores {
    /// How doubt was counted.
    pub policies: Policies,
    /// Number of studies.
    pub studies: usize,
    /// Counts by class.
    pub by_finding: BTreeMap<Finding, ClassCounts>,
    /// From the counts of all classes together.
    pub micro: Average,
    /// Mean over [`Self::macro_classes`]; a ratio without cases counts 0.
    pub macro_average: Average,
    /// The classes in truth or prediction, which the macro average is taken over, as scikit-learn does.
    #[serde(default)]
    pub macro_classes: Vec<Finding>,
    /// Predictions without text: neither normal nor abnormal.
    #[serde(default)]
    pub empty_outputs: Rate,
    /// Mean share of the text of truths that no rule reads.
    #[serde(default)]
    pub unread_truth: f64,
    /// Mean share of the text of predictions that no rule reads.
    #[serde(default)]
    pub unread_prediction: f64,
    /// Among abnormal studies: the prediction says nothing abnormal.
    pub false_normal: Rate,
    /// Among normal studies: the prediction names an abnormality.
    pub invented: Rate,
    /// Among findings positive on both sides with a side in both: the sides differ.
    pub laterality_errors: Rate,
    /// Among studies with thinking text: a class is present in the one text and absent in the other.
    pub contradictions: Rate,
    /// Among studies whose truth compares with no earlier film: the prediction does.
    #[serde(default)]
    pub invented_comparisons: Rate,
    /// Among predictions with text: one place states what another denies.
    #[serde(default)]
    pub inner_contradictions: Rate,
    /// Predictions whose text is that of another study too.
    pub identical_outputs: Rate,
    /// Predictions equal to the most frequent text; 1 of `of` when all differ.
    pub most_frequent_output: Rate,
}

/// Labels and scores `studies`.
pub fn score(
    labeler: &Labeler,
    studies: &[StudyTexts<'_>],
    policies: impl Into<Policies>,
) -> FindingScores {
    let pairs: Vec<LabelledPair> = studies
        .iter()
        .map(|one| LabelledPair::read(labeler, "", one.truth, one.prediction, one.thinking))
        .collect();
    score_pairs(
        &pairs,
        studies.iter().map(|one| one.prediction),
        policies.into(),
    )
}

/// Scores labelled pairs; `outputs` are the texts of their predictions.
pub(in crate::eval) fn score_pairs<'a>(
    pairs: &[LabelledPair],
    outputs: impl IntoIterator<Item = &'a str>,
    policies: Policies,
) -> FindingScores {
    let mut by_finding: BTreeMap<Finding, ClassCounts> = Finding::ALL
        .into_iter()
        .map(|finding| (finding, ClassCounts::default()))
        .collect();
    let (mut false_normal, mut invented) = (Rate::default(), Rate::default());
    let (mut laterality_errors, mut contradictions) = (Rate::default(), Rate::default());
    let mut empty_outputs = Rate::default();
    let (mut invented_comparisons, mut inner_contradictions) = (Rate::default(), Rate::default());
    for pair in pairs {
        empty_outputs.add(Some(pair.is_empty));
        let compared = pair.compare(policies);
        for class in compared.classes {
            let counts = by_finding.entry(class.finding).or_default();
            counts.add(class.in_truth, class.in_prediction);
            laterality_errors.add(class.wrong_side);
        }
        false_normal.add(compared.false_normal);
        invented.add(compared.invented);
        contradictions.add(compared.contradiction);
        invented_comparisons.add(compared.invented_comparison);
        inner_contradictions.add(compared.inner_contradiction);
    }
    let mut times: HashMap<&str, usize> = HashMap::new();
    for output in outputs {
        *times.entry(output.trim()).or_default() += 1;
    }
    let of = pairs.len();
    let mean =
        |share: fn(&LabelledPair) -> f64| pairs.iter().map(share).sum::<f64>() / of.max(1) as f64;
    FindingScores {
        unread_truth: mean(|pair| pair.truth.unread_share()),
        unread_prediction: mean(|pair| pair.prediction.unread_share()),
        policies,
        studies: of,
        micro: micro(by_finding.values()),
        macro_average: macro_average(by_finding.values()),
        macro_classes: by_finding
            .iter()
            .filter(|(_, counts)| counts.occurs())
            .map(|(finding, _)| *finding)
            .collect(),
        empty_outputs,
        by_finding,
        false_normal,
        invented,
        laterality_errors,
        contradictions,
        invented_comparisons,
        inner_contradictions,
        identical_outputs: Rate {
            count: times.values().filter(|n| **n > 1).sum(),
            of,
        },
        most_frequent_output: Rate {
            count: times.values().copied().max().unwrap_or(0),
            of,
        },
    }
}

/// Average over the pooled counts.
pub fn micro<'a>(counts: impl IntoIterator<Item = &'a ClassCounts>) -> Average {
    average_of(
        &counts
            .into_iter()
            .fold(ClassCounts::default(), |sum, next| sum.plus(*next)),
    )
}

/// Mean over the classes in truth or prediction; a ratio without cases counts 0, as in scikit-learn.
pub fn macro_average<'a>(counts: impl IntoIterator<Item = &'a ClassCounts>) -> Average {
    let all: Vec<Average> = counts
        .into_iter()
        .filter(|counts| counts.occurs())
        .map(average_of)
        .collect();
    let mean =
        |value: fn(&Average) -> f64| all.iter().map(value).sum::<f64>() / all.len().max(1) as f64;
    Average {
        precision: mean(|a| a.precision),
        recall: mean(|a| a.recall),
        f1: mean(|a| a.f1),
    }
}

fn average_of(counts: &ClassCounts) -> Average {
    Average {
        precision: counts.precision().unwrap_or(0.0),
        recall: counts.recall().unwrap_or(0.0),
        f1: counts.f1().unwrap_or(0.0),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::pair::UncertainPolicy, *};

    fn study<'a>(truth: &'a str, prediction: &'a str) -> StudyTexts<'a> {
        StudyTexts {
            truth,
            prediction,
            thinking: None,
        }
    }

    #[test]
    fn hand_counted_scores() {
        let studies = [
            study("左侧胸腔积液。", "右侧胸腔积液。"),
            study("右侧气胸。", "心肺膈未见异常。"),
            study("胸部未见异常。", "心影增大。"),
            StudyTexts {
                truth: "考虑肺炎。",
                prediction: "肺炎。",
                thinking: Some("未见肺炎。"),
            },
            study("未见气胸。", "心肺膈未见异常。"),
        ];
        let scores = score(Labeler::openi(), &studies, UncertainPolicy::AsPresent);
        // The doubtful study is no normal one.
        let counts = |finding| scores.by_finding[&finding];
        assert_eq!(
            counts(Finding::PleuralEffusion),
            ClassCounts {
                true_positive: 1,
                ..Default::default()
            }
        );
        assert_eq!(
            counts(Finding::Pneumothorax),
            ClassCounts {
                false_negative: 1,
                ..Default::default()
            }
        );
        assert_eq!(
            counts(Finding::Cardiomegaly),
            ClassCounts {
                false_positive: 1,
                ..Default::default()
            }
        );
        assert_eq!(
            counts(Finding::NoFinding),
            ClassCounts {
                true_positive: 1,
                false_positive: 1,
                false_negative: 1
            }
        );
        assert_eq!(scores.laterality_errors, Rate { count: 1, of: 1 });
        assert_eq!(scores.false_normal, Rate { count: 1, of: 3 });
        assert_eq!(scores.invented, Rate { count: 1, of: 2 });
        assert_eq!(scores.contradictions, Rate { count: 1, of: 1 });
        assert_eq!(scores.identical_outputs, Rate { count: 2, of: 5 });
        assert_eq!(scores.most_frequent_output, Rate { count: 2, of: 5 });
        // 3 right, 2 too many, 2 missed, over all classes.
        assert!((scores.micro.f1 - 0.6).abs() < 1e-12, "{:?}", scores.micro);
    }

    #[test]
    fn the_policy_decides_on_doubt() {
        let studies = [study("考虑肺炎。", "肺炎。")];
        let pneumonia =
            |policy| score(Labeler::openi(), &studies, policy).by_finding[&Finding::Pneumonia];
        assert_eq!(pneumonia(UncertainPolicy::AsPresent).true_positive, 1);
        assert_eq!(pneumonia(UncertainPolicy::AsAbsent).false_positive, 1);
        assert_eq!(pneumonia(UncertainPolicy::LeaveOut), ClassCounts::default());
    }

    #[test]
    fn the_macro_average_counts_invented_classes_as_scikit_learn_does() {
        let studies = [study("左侧胸腔积液。", "左侧胸腔积液，心影增大。")];
        let scores = score(Labeler::openi(), &studies, UncertainPolicy::AsPresent);
        // F1 1 for the effusion, 0 for the heart that is only in the answer.
        assert_eq!(
            scores.macro_classes,
            [Finding::Cardiomegaly, Finding::PleuralEffusion]
        );
        assert!((scores.macro_average.f1 - 0.5).abs() < 1e-12, "{scores:?}");
    }

    #[test]
    fn an_empty_answer_is_neither_normal_nor_abnormal() {
        let studies = [
            study("右侧气胸。", " \n"),
            study("右侧气胸。", "胸部未见异常。"),
            study("胸部未见异常。", ""),
            study("胸部未见异常。", "胸部未见异常。"),
        ];
        let scores = score(Labeler::openi(), &studies, UncertainPolicy::AsPresent);
        assert_eq!(scores.empty_outputs, Rate { count: 2, of: 4 });
        assert_eq!(scores.false_normal, Rate { count: 1, of: 1 });
        assert_eq!(scores.invented, Rate { count: 0, of: 1 });
        // What an empty answer does not say is missed all the same.
        assert_eq!(scores.by_finding[&Finding::NoFinding].false_negative, 1);
        assert_eq!(scores.by_finding[&Finding::Pneumothorax].false_negative, 2);
    }

    #[test]
    fn no_studies_make_no_rate() {
        let scores = score(Labeler::openi(), &[], UncertainPolicy::default());
        assert_eq!(
            (scores.false_normal.value(), scores.macro_average.f1),
            (None, 0.0)
        );
    }
}

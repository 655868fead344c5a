//! One model's reports beside the truth, and beside what needs no model: scores with intervals, what is wrong in
//! which study, and the same as a table, as JSON and as a page.
//!
//! It puts [`crate::eval::text`] (texts) and [`crate::eval::findings`] together. Where the reports come from it does not know.

use std::collections::BTreeMap;

use rayon::prelude::*;
use serde::{Serialize, Serializer, ser::SerializeMap};

use crate::eval::{
    bootstrap::{Bootstrap, Comparison, FEWEST_FOR_INTERVAL, FEWEST_FOR_P, Interval},
    findings::{
        Finding, Labeler, Status,
        score::{FindingScores, StudyTexts, UncertainPolicy, score},
        tally::{FindingEvaluation, LabelledPair},
    },
    text::{EvaluateError, Evaluation, Pair, rouge::rouge_l, segment::characters},
};

pub mod baselines;
pub mod charts;
pub mod film;
pub mod names;
pub mod page;
pub mod table;

/// Something a reader must know before believing the numbers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    /// For Chinese readers.
    pub chinese: String,
    /// For English readers.
    pub english: String,
}

impl Remark {
    /// The same in both languages.
    pub fn new(chinese: impl Into<String>, english: impl Into<String>) -> Self {
        Self {
            chinese: chinese.into(),
            english: english.into(),
        }
    }
}

/// What `studies` studies are too few for, if for anything.
pub fn too_few(studies: usize, compares: bool) -> Option<Remark> {
    let least = format!(
        "2/2^{FEWEST_FOR_P} = {:.3}",
        f64::powf(2.0, 1.0 - FEWEST_FOR_P as f64)
    );
    if studies < FEWEST_FOR_INTERVAL {
        return Some(Remark::new(
            "只有 1 项检查：没有区间，也没有 p 值",
            "1 study: no interval and no p value",
        ));
    }
    (compares && studies < FEWEST_FOR_P).then(|| {
        Remark::new(
            format!("只有 {studies} 项检查，少于 {FEWEST_FOR_P} 项（符号翻转检验的最小 p 值为 {least}）：不给 p 值"),
            format!(
                "{studies} studies: no p value; at least {FEWEST_FOR_P} are needed (a sign-flip test of {FEWEST_FOR_P} gives {least} at best)"
            ),
        )
    })
}

/// One report of the test set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// The study it belongs to; cases of one study are drawn together.
    pub study: String,
    /// What it is called: its images.
    pub name: String,
    /// What was asked, where it is known.
    pub question: String,
    /// What the data set says.
    pub truth: String,
}

/// What a system wrote about one case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Written {
    /// The report.
    pub answer: String,
    /// The reasoning before it.
    pub thinking: Option<String>,
}

impl From<String> for Written {
    fn from(answer: String) -> Self {
        Self {
            answer,
            thinking: None,
        }
    }
}

/// Who wrote the reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum System {
    /// The model under test.
    Model,
    /// The same report for everyone: the one that fits the training reports best.
    Constant,
    /// Any report of the training set.
    Random,
    /// The report of the training image that looks most alike.
    Neighbour,
    /// The model under test, shown the images of other studies.
    Swapped,
}

impl System {
    /// The key used in files.
    pub fn key(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Constant => "constant",
            Self::Random => "random",
            Self::Neighbour => "neighbour",
            Self::Swapped => "swapped",
        }
    }

    /// Names for readers: Chinese, English.
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Model => ("模型", "model"),
            Self::Constant => ("最佳固定报告", "best constant report"),
            Self::Random => ("随机报告", "random report"),
            Self::Neighbour => ("最近邻影像的报告", "nearest image's report"),
            Self::Swapped => ("模型，影像互换", "model, images swapped"),
        }
    }
}

/// What one system wrote about all cases, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct SystemTexts {
    /// Who.
    pub system: System,
    /// How it came about, for the reader.
    pub note: String,
    /// One a case.
    pub texts: Vec<Written>,
}

/// How scores are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// Draws of the intervals.
    pub bootstrap: Bootstrap,
    /// What a doubtful finding counts as.
    pub policy: UncertainPolicy,
}

/// Named values that keep their order in JSON.
#[derive(Debug, Clone, PartialEq)]
pub struct Named<T>(pub Vec<(String, T)>);

impl<T> Named<T> {
    /// The value called `name`.
    pub fn get(&self, name: &str) -> Option<&T> {
        let found = self.0.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value)
    }
}

impl<T: Serialize> Serialize for Named<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.0.len()))?;
        for (name, value) in &self.0 {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

/// All scores of one system.
#[derive(Debug, Clone, Serialize)]
pub struct SystemScores {
    /// Who.
    pub system: System,
    /// How it came about.
    pub note: String,
    /// Text scores (per cent but for CIDEr-D) and, under `findings.`, shares from 0 to 1; each with its interval.
    pub scores: Named<Interval>,
    /// Counts of findings.
    pub findings: FindingScores,
}

/// How the statuses of truth and answer fall together: `[truth][answer]`, in the order of [`STATUSES`].
pub type Confusion = [[usize; 4]; 4];

/// Order of rows and columns of a [`Confusion`].
pub const STATUSES: [Status; 4] = [
    Status::Present,
    Status::Uncertain,
    Status::Absent,
    Status::NotMentioned,
];

/// How an answer differs from the truth in one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Difference {
    /// In the truth only.
    Missed,
    /// In the answer only.
    Invented,
    /// In both, on another side.
    Side,
}

/// What is wrong with one answer of the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Review {
    /// Place among the cases.
    pub case: usize,
    /// Classes that differ; the derived `no_finding` is not among them.
    pub differences: Vec<(Finding, Difference)>,
    /// There is no answer.
    pub empty: bool,
    /// The truth is abnormal, the answer is not.
    pub false_normal: bool,
    /// The truth is normal, the answer is not.
    pub invented: bool,
    /// A class is present in the reasoning and absent in the answer, or the other way round.
    pub contradiction: bool,
    /// ROUGE-L F1 on characters, from 0 to 1.
    pub rouge_l: f64,
}

/// Everything that was found out.
#[derive(Debug, Clone)]
pub struct Outcome {
    /// The test set.
    pub cases: Vec<Case>,
    /// What the first system wrote.
    pub texts: Vec<Written>,
    /// Labels of truth and answer of the first system.
    pub labels: Vec<LabelledPair>,
    /// Number of studies.
    pub studies: usize,
    /// Scores of all systems, in the order given.
    pub systems: Vec<SystemScores>,
    /// Statuses by class, of the first system.
    pub confusion: BTreeMap<Finding, Confusion>,
    /// The first system's cases, worst first.
    pub reviews: Vec<Review>,
    /// This run against another, if there is one.
    pub comparison: Option<Named<Comparison>>,
    /// How it was done.
    pub settings: Settings,
}

/// Scores the first of `systems` with all that stand beside it, and compares it with the run `other`.
///
/// # Errors
/// [`EvaluateError`]: nothing to evaluate, settings out of range.
///
/// # Panics
/// If there is no system, or a system has not one text a case.
pub fn evaluate(
    cases: Vec<Case>,
    systems: Vec<SystemTexts>,
    other: Option<&[Written]>,
    settings: Settings,
) -> Result<Outcome, EvaluateError> {
    assert!(!systems.is_empty(), "there is no system to evaluate");
    for texts in systems.iter().map(|system| &system.texts[..]).chain(other) {
        assert_eq!(texts.len(), cases.len(), "texts and cases disagree");
    }
    let scores: Vec<(SystemScores, Parts)> = systems
        .par_iter()
        .map(|system| system_scores(&cases, system, &settings))
        .collect::<Result<_, _>>()?;
    let (scores, mut parts): (Vec<SystemScores>, Vec<Parts>) = scores.into_iter().unzip();
    let model = parts.swap_remove(0);
    let comparison = other
        .map(|texts| {
            let other = Parts::of(&cases, texts, settings.policy)?;
            let mut all = other.texts.compare(&model.texts, &settings.bootstrap)?;
            let findings = other
                .findings
                .compare(&model.findings, &settings.bootstrap)?;
            all.extend(findings.into_iter().map(prefixed));
            Ok::<_, EvaluateError>(Named(all))
        })
        .transpose()?;
    let texts = systems
        .into_iter()
        .next()
        .map_or_else(Vec::new, |s| s.texts);
    let mut reviews: Vec<Review> = (0..cases.len())
        .map(|at| review(at, &cases[at], &texts[at], &model.labels[at], &settings))
        .collect();
    reviews.sort_by(|a, b| {
        let wrong = |r: &Review| (r.differences.len(), r.false_normal);
        wrong(b)
            .cmp(&wrong(a))
            .then(a.rouge_l.total_cmp(&b.rouge_l))
            .then(a.case.cmp(&b.case))
    });
    Ok(Outcome {
        studies: model.texts.studies(),
        confusion: confusion(&model.labels),
        labels: model.labels,
        cases,
        texts,
        systems: scores,
        reviews,
        comparison,
        settings,
    })
}

/// What the scores of one system are made of.
struct Parts {
    texts: Evaluation,
    labels: Vec<LabelledPair>,
    findings: FindingEvaluation,
}

impl Parts {
    fn of(
        cases: &[Case],
        texts: &[Written],
        policy: UncertainPolicy,
    ) -> Result<Self, EvaluateError> {
        let pairs: Vec<Pair> = cases
            .iter()
            .zip(texts)
            .map(|(case, text)| Pair {
                study: case.study.clone(),
                prediction: text.answer.clone(),
                reference: case.truth.clone(),
            })
            .collect();
        let labels: Vec<LabelledPair> = cases
            .iter()
            .zip(texts)
            .map(|(case, text)| {
                LabelledPair::read(
                    Labeler::built_in(),
                    &case.study,
                    &case.truth,
                    &text.answer,
                    text.thinking.as_deref(),
                )
            })
            .collect();
        Ok(Self {
            texts: Evaluation::new(&pairs)?,
            findings: FindingEvaluation::new(&labels, policy),
            labels,
        })
    }
}

fn prefixed<T>((name, value): (String, T)) -> (String, T) {
    (format!("findings.{name}"), value)
}

fn system_scores(
    cases: &[Case],
    system: &SystemTexts,
    settings: &Settings,
) -> Result<(SystemScores, Parts), EvaluateError> {
    let parts = Parts::of(cases, &system.texts, settings.policy)?;
    let mut scores = parts.texts.intervals(&settings.bootstrap)?;
    let findings = parts.findings.intervals(&settings.bootstrap)?;
    scores.extend(findings.into_iter().map(prefixed));
    let studies: Vec<StudyTexts<'_>> = cases
        .iter()
        .zip(&system.texts)
        .map(|(case, text)| StudyTexts {
            truth: &case.truth,
            prediction: &text.answer,
            thinking: text.thinking.as_deref(),
        })
        .collect();
    let scores = SystemScores {
        system: system.system,
        note: system.note.clone(),
        scores: Named(scores),
        findings: score(Labeler::built_in(), &studies, settings.policy),
    };
    Ok((scores, parts))
}

fn confusion(labels: &[LabelledPair]) -> BTreeMap<Finding, Confusion> {
    let place = |status: Status| STATUSES.iter().position(|s| *s == status).unwrap_or(3);
    let mut tables = BTreeMap::new();
    for finding in Finding::ALL {
        let mut table = Confusion::default();
        for pair in labels {
            let (truth, answer) = (pair.truth.status(finding), pair.prediction.status(finding));
            table[place(truth)][place(answer)] += 1;
        }
        tables.insert(finding, table);
    }
    tables
}

fn review(
    at: usize,
    case: &Case,
    text: &Written,
    pair: &LabelledPair,
    settings: &Settings,
) -> Review {
    let (truth, answer) = (&pair.truth, &pair.prediction);
    let difference = |finding: Finding| {
        let positive = |status| settings.policy.positive(finding, status);
        match (
            positive(truth.status(finding)),
            positive(answer.status(finding)),
        ) {
            (Some(true), Some(false)) => Some(Difference::Missed),
            (Some(false), Some(true)) => Some(Difference::Invented),
            (Some(true), Some(true)) => {
                let side = |labels: &crate::eval::findings::ReportLabels| {
                    labels.get(finding).and_then(|label| label.laterality)
                };
                let (a, b) = (side(truth), side(answer));
                (a.is_some() && b.is_some() && a != b).then_some(Difference::Side)
            }
            _ => None,
        }
    };
    let differences: Vec<(Finding, Difference)> = Finding::ALL
        .into_iter()
        .filter(|finding| *finding != Finding::NoFinding)
        .filter_map(|finding| Some((finding, difference(finding)?)))
        .collect();
    let normal = truth.status(Finding::NoFinding) == Status::Present;
    Review {
        case: at,
        differences,
        empty: pair.is_empty,
        false_normal: !pair.is_empty && truth.is_abnormal() && !answer.is_abnormal(),
        invented: normal && answer.is_abnormal(),
        contradiction: pair
            .thinking
            .as_ref()
            .is_some_and(|thinking| crate::eval::findings::score::contradict(thinking, answer)),
        rouge_l: rouge_l(&characters(&text.answer), &characters(&case.truth)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn case(study: &str, truth: &str) -> Case {
        Case {
            study: study.into(),
            name: format!("{study}_1.png"),
            question: String::new(),
            truth: truth.into(),
        }
    }

    fn outcome() -> Outcome {
        let cases = vec![
            case("1", "左侧胸腔积液。"),
            case("2", "右侧气胸，心影增大。"),
            case("3", "胸部未见异常。"),
        ];
        let texts = ["右侧胸腔积液。", "心肺未见异常。", "胸部未见异常。"];
        let texts: Vec<Written> = texts.map(|text| text.to_owned().into()).to_vec();
        let system = SystemTexts {
            system: System::Model,
            note: String::new(),
            texts: texts.clone(),
        };
        let settings = Settings {
            bootstrap: Bootstrap {
                resamples: 20,
                ..Bootstrap::default()
            },
            policy: UncertainPolicy::AsPresent,
        };
        evaluate(cases, vec![system], Some(&texts), settings).expect("there are cases")
    }

    #[test]
    fn the_worst_case_comes_first_and_says_what_is_wrong() {
        let outcome = outcome();
        let first = &outcome.reviews[0];
        assert_eq!(first.case, 1);
        assert!(first.false_normal && !first.invented);
        let expected = [
            (Finding::Cardiomegaly, Difference::Missed),
            (Finding::Pneumothorax, Difference::Missed),
        ];
        assert_eq!(first.differences, expected);
        let second = &outcome.reviews[1];
        assert_eq!(
            second.differences,
            [(Finding::PleuralEffusion, Difference::Side)]
        );
        assert_eq!(outcome.reviews[2].differences, []);
    }

    #[test]
    fn statuses_fall_where_they_belong() {
        let table = outcome().confusion[&Finding::Pneumothorax];
        assert_eq!(table.iter().flatten().sum::<usize>(), 3);
        // Present in the truth, not mentioned in the answer.
        assert_eq!(table[0][3], 1);
    }

    #[test]
    fn a_run_compared_with_itself_does_not_differ() {
        let comparison = outcome().comparison.expect("another run was given");
        let rouge = comparison.get("characters.rouge_l").expect("a score");
        assert_eq!(rouge.difference.value, 0.0);
        // Three studies are too few for a test.
        assert!(rouge.p.is_nan());
        let remark = too_few(3, true).expect("too few");
        assert!(
            remark
                .english
                .starts_with("3 studies: no p value; at least 6"),
            "{remark:?}"
        );
        assert_eq!(too_few(3, false), None);
        assert_eq!(too_few(6, true), None);
        assert!(too_few(1, false).is_some());
        assert!(comparison.get("findings.micro.f1").is_some());
    }
}

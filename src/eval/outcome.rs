//! What an evaluation finds out: scores of every system, the statuses by class, and the cases, worst first.

use std::collections::BTreeMap;

use serde::{Serialize, Serializer, ser::SerializeMap};

use super::{
    bootstrap::{Bootstrap, Comparison, Interval},
    cases::{Case, System, WrittenReport},
    findings::{Finding, LabelledPair, Policies, Status, score::FindingScores},
    judge::JudgeOutcome,
    probability::{comparison::ProbabilityComparison, evaluation::ProbabilityOutcome},
    text::TextLanguage,
};

/// How scores are made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EvalSettings {
    /// Draws of the intervals.
    pub bootstrap: Bootstrap,
    /// What a doubtful finding counts as.
    pub policies: Policies,
    /// What the words of the text scores are.
    pub language: TextLanguage,
}

/// Named values that keep their order in JSON.
#[derive(Debug, Clone, PartialEq)]
pub struct NamedValues<T>(pub Vec<(String, T)>);

impl<T> NamedValues<T> {
    /// The value called `name`.
    pub fn get(&self, name: &str) -> Option<&T> {
        let found = self.0.iter().find(|(other, _)| other == name);
        found.map(|(_, value)| value)
    }
}

impl<T: Serialize> Serialize for NamedValues<T> {
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
    pub scores: NamedValues<Interval>,
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
pub enum FindingDifference {
    /// In the truth only.
    Missed,
    /// In the answer only.
    Invented,
    /// In both, on another side.
    Side,
}

/// What is wrong with one answer of the model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseReview {
    /// Place among the cases.
    pub case: usize,
    /// Classes that differ; the derived `no_finding` is not among them.
    pub differences: Vec<(Finding, FindingDifference)>,
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

/// Another run on the same test set.
#[derive(Debug, Clone)]
pub struct OtherRun {
    /// Its scores.
    pub scores: SystemScores,
    /// What it wrote.
    pub texts: Vec<WrittenReport>,
    /// Labels of truth and answer.
    pub labels: Vec<LabelledPair>,
    /// Statuses by class.
    pub confusion: BTreeMap<Finding, Confusion>,
    /// Its cases, in the order of the test set.
    pub reviews: Vec<CaseReview>,
}

/// Scores of the groups of one key.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct SubgroupKey {
    /// The key of the rows.
    pub key: String,
    /// Whether it was guessed.
    pub guessed: bool,
    /// By value, in order; rows without the key last.
    pub groups: Vec<Subgroup>,
}

/// Reports that share a value.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Subgroup {
    /// The value; `None` for rows without the key.
    pub value: Option<String>,
    /// Reports.
    pub reports: usize,
    /// Studies.
    pub studies: usize,
    /// Fewer than ten reports: no intervals.
    pub few: bool,
    /// Scores of the model: under `findings.` shares from 0 to 1, `characters.rouge_l` in per cent.
    pub scores: NamedValues<Interval>,
    /// The same of the other run, where there is one.
    pub other: Option<NamedValues<Interval>>,
}

/// Everything that was found out.
#[derive(Debug, Clone)]
pub struct EvalOutcome {
    /// The test set.
    pub cases: Vec<Case>,
    /// What the first system wrote.
    pub texts: Vec<WrittenReport>,
    /// Labels of truth and answer of the first system.
    pub labels: Vec<LabelledPair>,
    /// Number of studies.
    pub studies: usize,
    /// Scores of all systems, in the order given.
    pub systems: Vec<SystemScores>,
    /// Statuses by class, of the first system.
    pub confusion: BTreeMap<Finding, Confusion>,
    /// The first system's cases, worst first.
    pub reviews: Vec<CaseReview>,
    /// This run against another, if there is one.
    pub comparison: Option<NamedValues<Comparison>>,
    /// The other run by itself.
    pub other: Option<OtherRun>,
    /// Probabilities of findings, if there are any.
    pub probabilities: Option<ProbabilityOutcome>,
    /// What a judge says of the first system, if one was asked.
    pub judge: Option<JudgeOutcome>,
    /// Those of this run against those of the other.
    pub probability_comparison: Option<ProbabilityComparison>,
    /// Scores of parts of the test set.
    pub subgroups: Vec<SubgroupKey>,
    /// The table that findings are read with, and whether the texts decided.
    pub rules: (String, bool),
    /// Chinese names of the abnormalities outside the twenty classes, by key.
    pub others: BTreeMap<String, String>,
    /// How it was done.
    pub settings: EvalSettings,
}

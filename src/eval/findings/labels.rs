//! What a report says of the classes: mentions, and the labels they are joined to.

use std::{collections::BTreeMap, ops::Range};

use serde::{Deserialize, Serialize};

use super::finding::Finding;

/// What a report says of a class. The order is the one by which mentions are joined: the larger wins.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// No word of it.
    #[default]
    NotMentioned,
    /// Denied, or said to be gone.
    Absent,
    /// Named with doubt.
    Uncertain,
    /// Named as there.
    Present,
}

/// Side of the patient, as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Laterality {
    /// 左.
    Left,
    /// 右.
    Right,
    /// 双侧, or both sides in turn.
    Bilateral,
}

/// Degree, as written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// 极少, 微量.
    Trace,
    /// 轻度, 少量.
    Mild,
    /// 中度, 中等量.
    Moderate,
    /// 重度, 大量.
    Severe,
}

/// One place where a report names something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mention {
    /// The class; `None` for an abnormality outside the twenty.
    pub finding: Option<Finding>,
    /// What is said of it here; never [`Status::NotMentioned`].
    pub status: Status,
    /// Side, where the class has one and the words give it.
    pub laterality: Option<Laterality>,
    /// Degree, where the words give it.
    pub severity: Option<Severity>,
    /// Bytes of the words in the report.
    pub span: Range<usize>,
}

/// What a whole report says of one class.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct FindingLabel {
    /// Joined over all mentions.
    pub status: Status,
    /// Side over the mentions of that status: left and right together are bilateral.
    pub laterality: Option<Laterality>,
    /// The highest degree over the mentions of that status.
    pub severity: Option<Severity>,
    /// Bytes of the first mention of that status, for highlighting.
    pub evidence: Option<Range<usize>>,
}

/// Labels of one report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReportLabels {
    /// One entry a class that is mentioned.
    pub findings: BTreeMap<Finding, FindingLabel>,
    /// Every mention, in text order: for highlighting, and to see why a label is what it is.
    pub mentions: Vec<Mention>,
}

impl ReportLabels {
    /// Status of `finding`.
    pub fn status(&self, finding: Finding) -> Status {
        self.findings
            .get(&finding)
            .map_or(Status::NotMentioned, |label| label.status)
    }

    /// Label of `finding`, if mentioned.
    pub fn get(&self, finding: Finding) -> Option<&FindingLabel> {
        self.findings.get(&finding)
    }

    /// Whether anything abnormal is present or uncertain; devices alone are not abnormal.
    pub fn is_abnormal(&self) -> bool {
        matches!(
            self.status(Finding::NoFinding),
            Status::Absent | Status::Uncertain
        )
    }

    /// Joins mentions, given in text order, to labels and derives [`Finding::NoFinding`].
    pub(super) fn from_mentions(mentions: Vec<Mention>) -> Self {
        let mut findings: BTreeMap<Finding, FindingLabel> = BTreeMap::new();
        let mut worst: Option<&Mention> = None;
        let mut first_normal: Option<&Mention> = None;
        for mention in &mentions {
            let normal = mention.finding == Some(Finding::NoFinding);
            let device = mention.finding == Some(Finding::SupportDevices);
            if normal || (mention.status == Status::Absent && !device) {
                first_normal = first_normal.or(Some(mention));
            } else if !device && worst.is_none_or(|seen| seen.status < mention.status) {
                worst = Some(mention);
            }
            if let Some(finding) = mention.finding.filter(|_| !normal) {
                join(findings.entry(finding).or_default(), mention);
            }
        }
        let no_finding = match (worst, first_normal) {
            (Some(seen), _) if seen.status == Status::Present => Some((Status::Absent, seen)),
            (Some(seen), _) => Some((Status::Uncertain, seen)),
            (None, Some(seen)) => Some((Status::Present, seen)),
            (None, None) => None,
        };
        if let Some((status, seen)) = no_finding {
            let evidence = Some(seen.span.clone());
            findings.insert(
                Finding::NoFinding,
                FindingLabel {
                    status,
                    evidence,
                    ..Default::default()
                },
            );
        }
        Self { findings, mentions }
    }
}

fn join(label: &mut FindingLabel, mention: &Mention) {
    if mention.status < label.status {
        return;
    }
    if mention.status > label.status {
        *label = FindingLabel {
            status: mention.status,
            laterality: mention.laterality,
            severity: mention.severity,
            evidence: Some(mention.span.clone()),
        };
        return;
    }
    label.severity = label.severity.max(mention.severity);
    label.laterality = match (label.laterality, mention.laterality) {
        (Some(a), Some(b)) if a != b => Some(Laterality::Bilateral),
        (a, b) => a.or(b),
    };
}

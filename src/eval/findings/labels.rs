//! What a report says of the classes: mentions, and the labels they are joined to.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use serde::{Deserialize, Serialize};

use super::{finding::Finding, sections::Section};

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

/// Zone of a lung, or its lobe.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Zone {
    /// 上叶, 上肺野, 肺尖.
    Upper,
    /// 中叶, 舌段, 中肺野.
    Middle,
    /// 下叶, 下肺野, 肺底.
    Lower,
}

/// One place where a report names something.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mention {
    /// The class; `None` for an abnormality outside the twenty.
    pub finding: Option<Finding>,
    /// Key of the abnormality outside the twenty, where the table names it.
    pub other: Option<String>,
    /// What is said of it here; never [`Status::NotMentioned`].
    pub status: Status,
    /// Side, where the class has one and the words give it.
    pub laterality: Option<Laterality>,
    /// Degree, where the words give it.
    pub severity: Option<Severity>,
    /// Zones of the lung that the words give.
    pub zones: BTreeSet<Zone>,
    /// The part of the report.
    pub section: Section,
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
    /// Zones over the mentions of that status.
    pub zones: BTreeSet<Zone>,
    /// Bytes of the first mention of that status, for highlighting.
    pub evidence: Option<Range<usize>>,
}

/// Labels of one report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ReportLabels {
    /// One entry a class that is mentioned.
    pub findings: BTreeMap<Finding, FindingLabel>,
    /// Abnormalities outside the twenty classes, by the key of the table.
    pub others: BTreeMap<String, FindingLabel>,
    /// Every mention, in text order: for highlighting, and to see why a label is what it is.
    pub mentions: Vec<Mention>,
    /// Clauses with words of something abnormal that no rule reads, as bytes of the report.
    pub unread: Vec<Range<usize>>,
    /// Classes that one place states and another denies, on the same side.
    pub contradictions: Vec<Finding>,
    /// Whether it compares with an earlier film.
    pub compares: bool,
    /// Bytes of the clauses that were looked at, for the share of [`Self::unread`].
    pub looked_at: usize,
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

    /// Share of the bytes looked at that are in clauses which went unread, from 0 to 1.
    pub fn unread_share(&self) -> f64 {
        let unread: usize = self.unread.iter().map(|span| span.len()).sum();
        unread as f64 / self.looked_at.max(1) as f64
    }

    /// Joins mentions, given in text order, to labels and derives [`Finding::NoFinding`].
    ///
    /// A report with clauses that went unread is not called normal.
    pub(super) fn join(
        mentions: Vec<Mention>,
        unread: Vec<Range<usize>>,
        looked_at: usize,
    ) -> Self {
        let mut findings: BTreeMap<Finding, FindingLabel> = BTreeMap::new();
        let mut others: BTreeMap<String, FindingLabel> = BTreeMap::new();
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
            if let Some(other) = &mention.other {
                join(others.entry(other.clone()).or_default(), mention);
            }
        }
        let no_finding = match (worst, first_normal) {
            (Some(seen), _) if seen.status == Status::Present => Some((Status::Absent, &seen.span)),
            (Some(seen), _) => Some((Status::Uncertain, &seen.span)),
            (None, Some(seen)) => Some(match unread.first() {
                Some(clause) => (Status::Uncertain, clause),
                None => (Status::Present, &seen.span),
            }),
            (None, None) => None,
        };
        if let Some((status, span)) = no_finding {
            let evidence = Some(span.clone());
            findings.insert(
                Finding::NoFinding,
                FindingLabel {
                    status,
                    evidence,
                    ..Default::default()
                },
            );
        }
        Self {
            findings,
            others,
            mentions,
            unread,
            contradictions: Vec::new(),
            compares: false,
            looked_at,
        }
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
            zones: mention.zones.clone(),
            evidence: Some(mention.span.clone()),
        };
        return;
    }
    label.severity = label.severity.max(mention.severity);
    label.zones.extend(&mention.zones);
    label.laterality = match (label.laterality, mention.laterality) {
        (Some(a), Some(b)) if a != b => Some(Laterality::Bilateral),
        (a, b) => a.or(b),
    };
}

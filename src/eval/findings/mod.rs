//! Reads findings out of Chinese chest X-ray reports by rules, and scores one report against another.
//!
//! The words are in a table (`rules.toml`), the reading of scope, doubt, side and degree in `engine`; `score`
//! compares truth and prediction, `mesh` compares with the Indiana labels. Nothing here knows the model.
//!
//! Classes: the fourteen of CheXpert (Irvin et al., 2019) and six more that chest reports often name. Each is
//! labelled by its own words only: a present edema does not make a lung opacity present. Decisions a reader
//! must know:
//! - *No finding* is derived: present when the report says or denies something and nothing is present or
//!   uncertain; devices do not count against it, an abnormality outside the twenty does.
//! - A blunted costophrenic angle is an uncertain effusion; pulmonary congestion and heart failure are edema,
//!   infection is pneumonia (as CheXpert); old fractures are present; a finding that is gone is absent.
//! - Several mentions of one class: present wins over uncertain, uncertain over absent.

use std::{collections::BTreeMap, fmt, ops::Range};

use serde::{Deserialize, Serialize};

mod engine;
pub mod mesh;
mod rules;
pub mod score;
pub mod tally;
#[cfg(test)]
mod tests;

pub use engine::Labeler;
pub use rules::FindingsError;

/// A class of finding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// Nothing abnormal; derived from the others.
    NoFinding,
    /// Wide mediastinum or cardiomediastinal silhouette.
    EnlargedCardiomediastinum,
    /// Large heart.
    Cardiomegaly,
    /// Opacity, infiltrate, airspace disease.
    LungOpacity,
    /// Nodule, mass, cavity.
    LungLesion,
    /// Pulmonary edema, congestion, heart failure.
    Edema,
    /// Consolidation.
    Consolidation,
    /// Pneumonia, infection.
    Pneumonia,
    /// Atelectasis, collapse.
    Atelectasis,
    /// Air in the pleural space.
    Pneumothorax,
    /// Fluid in the pleural space.
    PleuralEffusion,
    /// Pleural thickening, adhesion, plaque.
    PleuralOther,
    /// Fracture of any age.
    Fracture,
    /// Lines, tubes, pacemakers, clips, wires, implants.
    SupportDevices,
    /// Granuloma, granulomatous disease.
    Granuloma,
    /// Calcification of anything.
    Calcification,
    /// Degenerative change of the spine.
    DegenerativeSpine,
    /// Hiatal or diaphragmatic hernia.
    Hernia,
    /// Scoliosis.
    Scoliosis,
    /// Emphysema, hyperinflation, chronic obstructive disease.
    Emphysema,
}

impl Finding {
    /// All classes, in the order of [`ReportLabels`].
    pub const ALL: [Self; 20] = [
        Self::NoFinding,
        Self::EnlargedCardiomediastinum,
        Self::Cardiomegaly,
        Self::LungOpacity,
        Self::LungLesion,
        Self::Edema,
        Self::Consolidation,
        Self::Pneumonia,
        Self::Atelectasis,
        Self::Pneumothorax,
        Self::PleuralEffusion,
        Self::PleuralOther,
        Self::Fracture,
        Self::SupportDevices,
        Self::Granuloma,
        Self::Calcification,
        Self::DegenerativeSpine,
        Self::Hernia,
        Self::Scoliosis,
        Self::Emphysema,
    ];

    /// The key used in files: `pleural_effusion`.
    pub fn key(self) -> &'static str {
        self.names().0
    }

    /// The name shown to Chinese readers: `胸腔积液`.
    pub fn chinese(self) -> &'static str {
        self.names().1
    }

    /// Whether left and right mean something for this class.
    pub fn has_side(self) -> bool {
        !matches!(
            self,
            Self::NoFinding
                | Self::EnlargedCardiomediastinum
                | Self::Cardiomegaly
                | Self::DegenerativeSpine
                | Self::Hernia
                | Self::Scoliosis
        )
    }

    fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::NoFinding => ("no_finding", "未见异常"),
            Self::EnlargedCardiomediastinum => ("enlarged_cardiomediastinum", "纵隔增宽"),
            Self::Cardiomegaly => ("cardiomegaly", "心影增大"),
            Self::LungOpacity => ("lung_opacity", "肺部阴影"),
            Self::LungLesion => ("lung_lesion", "肺结节或肿块"),
            Self::Edema => ("edema", "肺水肿"),
            Self::Consolidation => ("consolidation", "实变"),
            Self::Pneumonia => ("pneumonia", "肺炎"),
            Self::Atelectasis => ("atelectasis", "肺不张"),
            Self::Pneumothorax => ("pneumothorax", "气胸"),
            Self::PleuralEffusion => ("pleural_effusion", "胸腔积液"),
            Self::PleuralOther => ("pleural_other", "其他胸膜病变"),
            Self::Fracture => ("fracture", "骨折"),
            Self::SupportDevices => ("support_devices", "支持装置"),
            Self::Granuloma => ("granuloma", "肉芽肿"),
            Self::Calcification => ("calcification", "钙化"),
            Self::DegenerativeSpine => ("degenerative_spine", "脊柱退行性变"),
            Self::Hernia => ("hernia", "疝"),
            Self::Scoliosis => ("scoliosis", "脊柱侧弯"),
            Self::Emphysema => ("emphysema", "肺气肿或过度充气"),
        }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

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
    pub(crate) fn from_mentions(mentions: Vec<Mention>) -> Self {
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

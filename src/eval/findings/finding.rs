//! The classes of finding, with their names.

use std::fmt;

use serde::{Deserialize, Serialize};

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
    /// All classes, in the order of [`ReportLabels`](super::ReportLabels).
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

/// An abnormality outside the twenty classes, as a table names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct OtherFinding {
    /// The key used in files: `free_gas`.
    pub key: String,
    /// The name shown to Chinese readers: `膈下游离气体`.
    pub chinese: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.key())
    }
}

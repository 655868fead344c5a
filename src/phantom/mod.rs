//! Synthetic chest radiographs ("phantoms") with known findings and Chinese reports.
//!
//! A phantom is a drawing, not a picture of a person: no patient data goes into it. It is small
//! enough (128×128) for a model of a few million parameters to learn, within minutes on a CPU, to
//! read findings off the film, which makes a real end-to-end test of training, inference and
//! scoring possible without a published checkpoint or a licensed data set.
//!
//! Everything is a pure function of `(seed, index)`. The drawing uses only the `f32` operations
//! that IEEE 754 defines exactly (`+ - * /` and `sqrt`; the two rotations use short polynomials),
//! and the randomness is ChaCha with eight rounds, so a pair gives the same bytes on every platform.
//!
//! Films follow the radiological convention: the patient's left is on the image's right.
//!
//! This module knows no tensor, no tokenizer and no model.

mod anatomy;
mod canvas;
mod dataset;
mod draws;
mod labels;
mod lesion;
mod report;

use std::collections::BTreeSet;

use image::GrayImage;

pub use anatomy::PHANTOM_SIZE;
pub use dataset::{
    PROMPTS, PhantomDatasetError, PhantomSample, PhantomStudies, Summary, write_dataset,
};
pub use labels::{FindingScore, finding_f1, findings_in_report};
pub use report::{Dialect, write_report};

use draws::{Draws, Purpose};

/// Side of the patient; the patient's left is on the image's right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Side {
    /// 左侧, on the right half of the image.
    Left,
    /// 右侧, on the left half of the image.
    Right,
}

impl Side {
    /// Both sides, in the order of the enum.
    pub const ALL: [Self; 2] = [Self::Left, Self::Right];

    /// The word used in reports: `左侧` or `右侧`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Left => "左侧",
            Self::Right => "右侧",
        }
    }
}

/// Third of a lung field, counted from the apex.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Zone {
    /// 上肺野.
    Upper,
    /// 中肺野.
    Middle,
    /// 下肺野.
    Lower,
}

impl Zone {
    /// The three zones from top to bottom.
    pub const ALL: [Self; 3] = [Self::Upper, Self::Middle, Self::Lower];

    /// The word used in reports: `上肺野`, `中肺野` or `下肺野`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Upper => "上肺野",
            Self::Middle => "中肺野",
            Self::Lower => "下肺野",
        }
    }
}

/// Something abnormal on a film, in the order in which a report names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Finding {
    /// 心影增大: the heart is wider than 0.55 of the thorax.
    Cardiomegaly,
    /// 结节: a bright disc of 4 to 7 pixels radius in a lung.
    Nodule(Side, Zone),
    /// 实变: a bright fuzzy patch of 14 to 26 pixels in a lung.
    Consolidation(Side, Zone),
    /// 胸腔积液: fluid with a meniscus in the costophrenic angle.
    PleuralEffusion(Side),
    /// 气胸: a dark rim outside a visible pleural line.
    Pneumothorax(Side),
    /// 起搏器: a generator in the left upper chest, with a lead to the heart.
    Pacemaker,
}

impl Finding {
    /// Every finding there is, once, in report order.
    pub fn all() -> Vec<Self> {
        let zoned = |make: fn(Side, Zone) -> Self| {
            Side::ALL
                .into_iter()
                .flat_map(move |side| Zone::ALL.map(|zone| make(side, zone)))
        };
        std::iter::once(Self::Cardiomegaly)
            .chain(zoned(Self::Nodule))
            .chain(zoned(Self::Consolidation))
            .chain(Side::ALL.map(Self::PleuralEffusion))
            .chain(Side::ALL.map(Self::Pneumothorax))
            .chain(std::iter::once(Self::Pacemaker))
            .collect()
    }

    /// The word of the finding's kind, without side and zone: `心影增大`, `结节`, `实变`,
    /// `胸腔积液`, `气胸` or `起搏器`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Cardiomegaly => "心影增大",
            Self::Nodule(..) => "结节",
            Self::Consolidation(..) => "实变",
            Self::PleuralEffusion(_) => "胸腔积液",
            Self::Pneumothorax(_) => "气胸",
            Self::Pacemaker => "起搏器",
        }
    }

    /// Whether both can be drawn on one film so that each stays plainly visible.
    ///
    /// One film holds each kind at most once; nothing sits where another finding would cover it.
    pub fn is_compatible_with(self, other: Self) -> bool {
        use Finding::{Cardiomegaly, Pacemaker, PleuralEffusion, Pneumothorax};
        if self.word() == other.word() {
            return false;
        }
        let place = |finding: Self| match finding {
            Self::Nodule(side, zone) | Self::Consolidation(side, zone) => Some((side, zone)),
            _ => None,
        };
        let hides = |cover: Self, below: Self| match (cover, place(below)) {
            (Cardiomegaly, Some(at)) => at == (Side::Left, Zone::Lower),
            (Pacemaker, Some(at)) => at == (Side::Left, Zone::Upper),
            (PleuralEffusion(side), Some(at)) => at == (side, Zone::Lower),
            (Pneumothorax(side), Some(at)) => at == (side, Zone::Upper),
            (PleuralEffusion(side), None) => below == Pneumothorax(side),
            (_, at @ Some(_)) => place(cover) == at,
            _ => false,
        };
        !hides(self, other) && !hides(other, self)
    }
}

/// One synthetic examination: the film and what is on it.
#[derive(Debug, Clone)]
pub struct Study {
    /// Place in the endless series of its seed.
    pub index: u64,
    /// What is drawn on the film; empty for a normal one.
    pub findings: BTreeSet<Finding>,
    /// The film, [`PHANTOM_SIZE`] pixels wide and high, black is air.
    pub image: GrayImage,
}

impl Study {
    /// Draws the study at `index` of the series of `seed`.
    ///
    /// About 35 % of the studies are normal, 40 % have one finding, 20 % two and 5 % three.
    pub fn new(seed: u64, index: u64) -> Self {
        Self::with_findings(seed, index, sample_findings(seed, index))
    }

    /// Draws a study with `findings` of the caller's choice; `(seed, index)` still choose the
    /// patient's shape, the position and the exposure.
    ///
    /// Findings that are not compatible are drawn all the same, and may hide each other.
    pub fn with_findings(seed: u64, index: u64, findings: BTreeSet<Finding>) -> Self {
        let mut draws = Draws::new(seed, index, Purpose::Drawing);
        let image = anatomy::draw_chest(&findings, &mut draws);
        Self {
            index,
            findings,
            image,
        }
    }
}

/// The findings of the study at `index`, without drawing it.
fn sample_findings(seed: u64, index: u64) -> BTreeSet<Finding> {
    let mut draws = Draws::new(seed, index, Purpose::Findings);
    let count = match draws.below(100) {
        0..35 => 0,
        35..75 => 1,
        75..95 => 2,
        _ => 3,
    };
    let mut findings = BTreeSet::new();
    // Every pair of compatible findings can be completed by a pacemaker, an enlarged heart or a
    // finding of the other lung, so this ends.
    while findings.len() < count {
        let side = draws.pick(&Side::ALL);
        let zone = draws.pick(&Zone::ALL);
        let finding = match draws.below(6) {
            0 => Finding::Cardiomegaly,
            1 => Finding::Nodule(side, zone),
            2 => Finding::Consolidation(side, zone),
            3 => Finding::PleuralEffusion(side),
            4 => Finding::Pneumothorax(side),
            _ => Finding::Pacemaker,
        };
        if findings
            .iter()
            .all(|&other| finding.is_compatible_with(other))
        {
            findings.insert(finding);
        }
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_eighteen_findings() {
        let all = Finding::all();
        assert_eq!(all.len(), 18);
        assert!(all.is_sorted());
    }

    #[test]
    fn compatibility_is_symmetric_and_excludes_cover() {
        for a in Finding::all() {
            for b in Finding::all() {
                assert_eq!(a.is_compatible_with(b), b.is_compatible_with(a));
            }
        }
        let (left, right) = (Side::Left, Side::Right);
        let effusion = Finding::PleuralEffusion(left);
        assert!(!effusion.is_compatible_with(Finding::Pneumothorax(left)));
        assert!(effusion.is_compatible_with(Finding::Pneumothorax(right)));
        assert!(!effusion.is_compatible_with(Finding::Nodule(left, Zone::Lower)));
        assert!(effusion.is_compatible_with(Finding::Nodule(left, Zone::Upper)));
        let nodule = Finding::Nodule(right, Zone::Middle);
        assert!(!nodule.is_compatible_with(Finding::Consolidation(right, Zone::Middle)));
        assert!(!nodule.is_compatible_with(Finding::Nodule(left, Zone::Middle)));
    }

    #[test]
    fn counts_follow_the_stated_shares() {
        let mut counts = [0usize; 4];
        let mut seen = BTreeSet::new();
        for index in 0..4000 {
            let findings = sample_findings(7, index);
            counts[findings.len()] += 1;
            seen.extend(findings);
        }
        for (count, share) in counts.into_iter().zip([0.35, 0.40, 0.20, 0.05]) {
            let measured = count as f64 / 4000.0;
            assert!((measured - share).abs() < 0.03, "{measured} for {share}");
        }
        assert_eq!(seen.len(), 18);
    }

    #[test]
    fn a_study_depends_on_seed_and_index_alone() {
        let first = Study::new(3, 41);
        let again = Study::new(3, 41);
        assert_eq!(first.findings, again.findings);
        assert_eq!(first.image, again.image);
        assert_ne!(first.image, Study::new(3, 42).image);
        assert_ne!(first.image, Study::new(4, 41).image);
    }
}

//! One phantom: its findings, drawn by seed and index, and its image.

use std::collections::BTreeSet;

use image::GrayImage;

use super::{
    draws::{Draws, Purpose},
    finding::{Finding, Side, Zone},
    radiograph::draw_chest,
};

/// One synthetic examination: the image and what it shows.
#[derive(Debug, Clone)]
pub struct Study {
    /// What is drawn; empty for a normal study.
    pub findings: BTreeSet<Finding>,
    /// The radiograph, [`PHANTOM_SIZE`](super::canvas::PHANTOM_SIZE) pixels wide and high, black is air.
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
        let image = draw_chest(&findings, &mut draws);
        Self { findings, image }
    }
}

/// The findings of the study at `index`, without drawing it.
pub(super) fn sample_findings(seed: u64, index: u64) -> BTreeSet<Finding> {
    let mut draws = Draws::new(seed, index, Purpose::Findings);
    let count = match draws.below(100) {
        0..35 => 0,
        35..75 => 1,
        75..95 => 2,
        _ => 3,
    };
    let mut findings = BTreeSet::new();
    // This loop ends: a pacemaker, an enlarged heart or a finding of the other lung fits every
    // compatible pair.
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

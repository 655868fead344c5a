//! The sentences that state a class and those that deny it, as Chinese reports write them.
//!
//! They have no full stop: a report that goes on with a comma and the finding's size has stated it as well.

use sha2::{Digest, Sha256};

use crate::eval::findings::Finding;

/// How reports state and deny one class.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wordings {
    /// The class.
    pub finding: Finding,
    /// Sentences that state it.
    pub stated: &'static [&'static str],
    /// Sentences that deny it.
    pub denied: &'static [&'static str],
}

const fn of(
    finding: Finding,
    stated: &'static [&'static str],
    denied: &'static [&'static str],
) -> Wordings {
    Wordings {
        finding,
        stated,
        denied,
    }
}

/// Every class but [`Finding::NoFinding`], which follows from the others.
pub const WORDINGS: [Wordings; 19] = [
    of(
        Finding::EnlargedCardiomediastinum,
        &["纵隔增宽", "纵隔影增宽", "可见纵隔增宽"],
        &["纵隔未见增宽", "纵隔不宽", "纵隔居中"],
    ),
    of(
        Finding::Cardiomegaly,
        &["心影增大", "心脏增大", "心影饱满"],
        &["心影大小正常", "心影不大", "心影未见增大"],
    ),
    of(
        Finding::LungOpacity,
        &[
            "右肺可见片状高密度影",
            "左肺可见片状高密度影",
            "双肺可见斑片影",
        ],
        &["双肺未见异常密度影", "双肺野清晰"],
    ),
    of(
        Finding::LungLesion,
        &[
            "右肺结节",
            "左肺结节",
            "右侧上肺野结节",
            "右侧中肺野结节",
            "右侧下肺野结节",
            "左侧上肺野结节",
            "左侧中肺野结节",
            "左侧下肺野结节",
            "可见结节影",
            "可见肿块影",
        ],
        &["未见结节", "未见结节及肿块", "双肺未见结节"],
    ),
    of(
        Finding::Edema,
        &["肺水肿", "双肺肺水肿", "可见肺水肿", "肺淤血"],
        &["未见肺水肿", "无肺水肿"],
    ),
    of(
        Finding::Consolidation,
        &[
            "右肺实变",
            "左肺实变",
            "双肺实变",
            "右侧上肺野实变",
            "右侧中肺野实变",
            "右侧下肺野实变",
            "左侧上肺野实变",
            "左侧中肺野实变",
            "左侧下肺野实变",
            "可见实变影",
        ],
        &["未见实变", "无实变", "双肺未见实变"],
    ),
    of(
        Finding::Pneumonia,
        &["右肺炎症", "左肺炎症", "双肺炎症", "考虑肺炎"],
        &["未见肺炎", "未见炎症"],
    ),
    of(
        Finding::Atelectasis,
        &["右肺不张", "左肺不张", "可见肺不张", "节段性肺不张"],
        &["未见肺不张", "无肺不张"],
    ),
    of(
        Finding::Pneumothorax,
        &["右侧气胸", "左侧气胸", "双侧气胸", "可见气胸"],
        &["未见气胸", "无气胸"],
    ),
    of(
        Finding::PleuralEffusion,
        &[
            "右侧胸腔积液",
            "左侧胸腔积液",
            "双侧胸腔积液",
            "可见胸腔积液",
        ],
        &["未见胸腔积液", "无胸腔积液", "双侧肋膈角锐利"],
    ),
    of(
        Finding::PleuralOther,
        &["右侧胸膜增厚", "左侧胸膜增厚", "双侧胸膜增厚", "胸膜粘连"],
        &["未见胸膜增厚", "胸膜未见异常"],
    ),
    of(
        Finding::Fracture,
        &["右侧肋骨骨折", "左侧肋骨骨折", "可见骨折", "陈旧性骨折"],
        &["未见骨折", "骨质未见异常"],
    ),
    of(
        Finding::SupportDevices,
        &["起搏器在位", "起搏器", "可见导管影", "可见内固定影"],
        &["无起搏器", "未见导管及起搏器"],
    ),
    of(
        Finding::Granuloma,
        &["右肺肉芽肿", "左肺肉芽肿", "可见钙化肉芽肿"],
        &["未见肉芽肿", "无肉芽肿"],
    ),
    of(
        Finding::Calcification,
        &["可见钙化", "主动脉钙化", "可见钙化灶"],
        &["未见钙化", "无钙化"],
    ),
    of(
        Finding::DegenerativeSpine,
        &["脊柱退行性变", "胸椎退行性变", "胸椎骨质增生"],
        &["脊柱未见异常", "胸椎未见退行性变"],
    ),
    of(
        Finding::Hernia,
        &["食管裂孔疝", "膈疝", "可见食管裂孔疝"],
        &["未见食管裂孔疝", "未见膈疝"],
    ),
    of(
        Finding::Scoliosis,
        &["脊柱侧弯", "胸椎侧弯", "脊柱轻度侧弯"],
        &["未见脊柱侧弯", "脊柱无侧弯"],
    ),
    of(
        Finding::Emphysema,
        &["肺气肿", "双肺气肿", "双肺过度充气"],
        &["未见肺气肿", "无肺气肿"],
    ),
];

/// Identifies the table: logits of other sentences cannot be calibrated with the same numbers.
pub fn fingerprint() -> String {
    let mut hash = Sha256::new();
    for wordings in &WORDINGS {
        hash.update(wordings.finding.key());
        for (mark, sentences) in [("+", wordings.stated), ("-", wordings.denied)] {
            for sentence in sentences {
                hash.update(mark);
                hash.update(sentence);
            }
        }
    }
    let hash = hash.finalize();
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::eval::findings::{Labeler, Status};

    #[test]
    fn the_labeler_reads_what_each_sentence_says() {
        let labeler = Labeler::hospital();
        for wordings in &WORDINGS {
            let read = |text: &str| labeler.label(text).status(wordings.finding);
            for text in wordings.stated {
                assert!(read(text) >= Status::Uncertain, "{text}: {:?}", read(text));
            }
            for text in wordings.denied {
                assert!(read(text) <= Status::Absent, "{text}: {:?}", read(text));
            }
        }
    }

    #[test]
    fn every_class_but_the_derived_one_is_there_once() {
        let classes: BTreeSet<Finding> = WORDINGS.iter().map(|one| one.finding).collect();
        assert_eq!(classes.len(), WORDINGS.len());
        assert_eq!(classes.len() + 1, Finding::ALL.len());
        assert!(!classes.contains(&Finding::NoFinding));
        assert_eq!(fingerprint().len(), 16);
    }
}

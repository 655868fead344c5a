//! What a phantom can show: the findings, each with its side and zone.

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

/// Something abnormal on a radiograph, in the order in which a report names it.
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
    #[cfg(test)]
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

    /// Whether both can be drawn on one radiograph so that each stays plainly visible.
    ///
    /// One radiograph holds each kind at most once; nothing sits where another finding would cover it.
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
}

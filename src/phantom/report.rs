//! Chinese reports of phantoms in several styles.
//!
//! All dialects name findings, sides and zones with the same words and share little else, so a
//! model that knows [`Dialect::Plain`] has the vocabulary of [`Dialect::House`] and not its style.

use std::collections::BTreeSet;

use super::{
    draws::{Draws, Purpose},
    finding::{Finding, Side},
};

/// Style of a report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// Short sentences in random order and wording, some of them negatives.
    Plain,
    /// The findings and nothing else, in fixed order and wording: every word is read off the picture.
    Terse,
    /// As [`Self::Terse`], by the rules of another hospital: sides are those of the image and not of the
    /// patient, and nodules and pneumothoraces are not reported. A model that learnt these reports has to
    /// learn sides and two findings anew, from images, before it can write [`Self::House`].
    Partial,
    /// The style of one department: full sentences in fixed order (heart and mediastinum, lungs,
    /// pleura, devices, impression), 40 to 90 characters, with a few choices of wording.
    House,
}

/// Writes the report of `findings`; `wording_seed` chooses among equivalent wordings.
///
/// [`findings_in_report`](super::findings_in_report) gives `findings` back, whatever the wording, in every
/// dialect but [`Dialect::Partial`].
pub fn write_report(findings: &BTreeSet<Finding>, dialect: Dialect, wording_seed: u64) -> String {
    let mut draws = Draws::new(wording_seed, 0, Purpose::Wording);
    match dialect {
        Dialect::Plain => plain_report(findings, &mut draws),
        Dialect::Terse => terse_report(findings),
        Dialect::Partial => terse_report(&findings.iter().filter_map(|&f| partial(f)).collect()),
        Dialect::House => house_report(findings, &mut draws),
    }
}

fn terse_report(findings: &BTreeSet<Finding>) -> String {
    if findings.is_empty() {
        return "未见异常。".to_owned();
    }
    findings
        .iter()
        .map(|&finding| format!("{}。", name(finding)))
        .collect()
}

/// The finding as [`Dialect::Partial`] reports it, `None` where it does not.
fn partial(finding: Finding) -> Option<Finding> {
    let other = |side| match side {
        Side::Left => Side::Right,
        Side::Right => Side::Left,
    };
    match finding {
        Finding::Nodule(..) | Finding::Pneumothorax(_) => None,
        Finding::Consolidation(side, zone) => Some(Finding::Consolidation(other(side), zone)),
        Finding::PleuralEffusion(side) => Some(Finding::PleuralEffusion(other(side))),
        Finding::Cardiomegaly | Finding::Pacemaker => Some(finding),
    }
}

/// The finding with its side and zone, as all dialects name it: `左侧上肺野结节`.
fn name(finding: Finding) -> String {
    let word = finding.word();
    match finding {
        Finding::Cardiomegaly | Finding::Pacemaker => word.to_owned(),
        Finding::PleuralEffusion(side) | Finding::Pneumothorax(side) => {
            format!("{}{word}", side.word())
        }
        Finding::Nodule(side, zone) | Finding::Consolidation(side, zone) => {
            format!("{}{}{word}", side.word(), zone.word())
        }
    }
}

fn plain_report(findings: &BTreeSet<Finding>, draws: &mut Draws) -> String {
    let mut sentences: Vec<String> = findings
        .iter()
        .map(|&finding| plain_sentence(finding, draws))
        .collect();
    let present = |word: &str| findings.iter().any(|finding| finding.word() == word);
    let mut normal: Vec<&str> = ["结节", "实变", "胸腔积液", "气胸", "起搏器"]
        .into_iter()
        .zip([
            "无结节。",
            "无实变。",
            "无胸腔积液。",
            "无气胸。",
            "无起搏器。",
        ])
        .filter_map(|(word, sentence)| (!present(word)).then_some(sentence))
        .collect();
    if !present("心影增大") {
        normal.push("心影正常。");
    }
    draws.shuffle(&mut normal);
    let negatives = if findings.is_empty() {
        sentences.push(draws.pick(&["胸片正常。", "无异常。"]).to_owned());
        1 + draws.below(3)
    } else {
        draws.below(3)
    };
    sentences.extend(normal.into_iter().take(negatives).map(str::to_owned));
    draws.shuffle(&mut sentences);
    let opening = draws.pick(&["", "所见：", "影像：", "检查："]);
    format!("{opening}{}", sentences.concat())
}

fn plain_sentence(finding: Finding, draws: &mut Draws) -> String {
    let word = finding.word();
    let place = name(finding);
    let place = place.trim_end_matches(word);
    match (finding, draws.below(3)) {
        (Finding::Cardiomegaly, 2) => "心影有增大。".to_owned(),
        (_, 0) => format!("{place}{word}。"),
        (_, 1) => format!("见{place}{word}。"),
        _ => format!("{place}有{word}。"),
    }
}

/// How the department words one finding.
struct HouseWording {
    /// Follows the finding's name in the description.
    first: [&'static str; 2],
    /// Follows `first` where the report has room.
    second: [&'static str; 2],
    /// Closes the impression of a report with this finding alone.
    advice: [&'static str; 2],
}

fn house_wording(finding: Finding) -> HouseWording {
    match finding {
        Finding::Cardiomegaly => HouseWording {
            first: ["轮廓向左膨出", "轮廓向左突出"],
            second: ["心胸比例超出正常范围", "心胸比例高出正常范围"],
            advice: ["建议心脏彩超检查", "请做心脏彩超检查"],
        },
        Finding::Nodule(..) => HouseWording {
            first: ["呈类圆形致密灶", "为类圆形致密灶"],
            second: ["边界锐利密度均匀", "边缘锐利密度均匀"],
            advice: ["建议薄层扫描随访", "请做薄层扫描随访"],
        },
        Finding::Consolidation(..) => HouseWording {
            first: ["呈大片云絮状影", "为大片云絮状影"],
            second: ["边界模糊伴支气管征", "边缘模糊伴支气管征"],
            advice: ["建议抗炎治疗后复查", "请于抗炎治疗后复查"],
        },
        Finding::PleuralEffusion(_) => HouseWording {
            first: ["肋膈角变钝消失", "肋膈角填充消失"],
            second: ["上缘弧线外高内低", "液面弧线外高内低"],
            advice: ["建议超声定位穿刺", "请行超声定位穿刺"],
        },
        Finding::Pneumothorax(_) => HouseWording {
            first: ["外带透亮度增加", "外带透亮区增加"],
            second: ["可见被压缩的肺边缘", "显示被压缩的肺边缘"],
            advice: ["建议立即外科处理", "请速联系外科处理"],
        },
        Finding::Pacemaker => HouseWording {
            first: ["位于胸壁皮下", "埋于胸壁皮下"],
            second: ["导线连续电极在位", "导线完整电极在位"],
            advice: ["建议定期程控随诊", "请按期程控随诊"],
        },
    }
}

fn house_report(findings: &BTreeSet<Finding>, draws: &mut Draws) -> String {
    if findings.is_empty() {
        let opening = draws.pick(&["胸廓对称，气管居中", "胸廓两侧对称，气管居中"]);
        let lungs = draws.pick(&["两肺纹理清晰，走行自然", "双肺纹理清晰，分布自然"]);
        let pleura = draws.pick(&["膈面光整", "膈面光滑"]);
        let end = draws.pick(&["心肺膈未见明显异常", "心肺膈未见异常"]);
        return format!(
            "{opening}，心影大小正常。{lungs}，未见结节或实变。{pleura}，未见胸腔积液或气胸。影像诊断：{end}。"
        );
    }
    // An image with three findings leaves room for one remark on each.
    let brief = findings.len() > 2;
    let mut text = String::new();
    for section in Section::ALL {
        let mut of_section = findings
            .iter()
            .filter(|&&finding| Section::of(finding) == section)
            .peekable();
        if of_section.peek().is_none() {
            text.push_str(draws.pick(&section.negatives()));
        }
        for &finding in of_section {
            let wording = house_wording(finding);
            text.push_str(&name(finding));
            text.push('，');
            text.push_str(draws.pick(&wording.first));
            if !brief {
                text.push('，');
                text.push_str(draws.pick(&wording.second));
            }
            text.push('。');
        }
    }
    let names: Vec<String> = findings.iter().map(|&finding| name(finding)).collect();
    text.push_str(draws.pick(&["综合印象：", "综合考虑："]));
    text.push_str(&names.join("、"));
    if let (Some(&finding), 1) = (findings.first(), findings.len()) {
        text.push('，');
        text.push_str(draws.pick(&house_wording(finding).advice));
    }
    text.push('。');
    text
}

/// Part of a house report; the order of [`Section::ALL`] is that of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Section {
    Heart,
    Lungs,
    Pleura,
    Devices,
}

impl Section {
    const ALL: [Self; 4] = [Self::Heart, Self::Lungs, Self::Pleura, Self::Devices];

    fn of(finding: Finding) -> Self {
        match finding {
            Finding::Cardiomegaly => Self::Heart,
            Finding::Nodule(..) | Finding::Consolidation(..) => Self::Lungs,
            Finding::PleuralEffusion(_) | Finding::Pneumothorax(_) => Self::Pleura,
            Finding::Pacemaker => Self::Devices,
        }
    }

    /// What an abnormal report says where this part is normal: less than a normal report does.
    fn negatives(self) -> [&'static str; 2] {
        match self {
            Self::Heart => ["心影大小正常。", "心影大小如常。"],
            Self::Lungs => ["双肺未见结节或实变。", "两肺未见结节或实变。"],
            Self::Pleura => ["未见胸腔积液或气胸。", "未见气胸或胸腔积液。"],
            Self::Devices => ["", ""],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::phantom::{
        dataset::PROMPTS, finding::Zone, labels::findings_in_report, study::sample_findings,
    };

    /// Character ROUGE-L F1 of two texts.
    fn rouge_l(a: &str, b: &str) -> f64 {
        let (a, b): (Vec<char>, Vec<char>) = (a.chars().collect(), b.chars().collect());
        let mut row = vec![0usize; b.len() + 1];
        for x in &a {
            let mut diagonal = 0;
            for (j, y) in b.iter().enumerate() {
                let above = row[j + 1];
                row[j + 1] = if x == y {
                    diagonal + 1
                } else {
                    above.max(row[j])
                };
                diagonal = above;
            }
        }
        2.0 * row[b.len()] as f64 / (a.len() + b.len()) as f64
    }

    #[test]
    fn every_report_gives_its_findings_back() {
        for index in 0..2000 {
            let findings = sample_findings(11, index);
            for dialect in [Dialect::Plain, Dialect::Terse, Dialect::House] {
                let report = write_report(&findings, dialect, index);
                assert_eq!(findings_in_report(&report), findings, "{report}");
            }
        }
    }

    #[test]
    fn partial_reports_swap_sides_and_leave_two_findings_out() {
        let findings = [
            Finding::Cardiomegaly,
            Finding::Nodule(Side::Left, Zone::Upper),
            Finding::Consolidation(Side::Left, Zone::Middle),
            Finding::PleuralEffusion(Side::Right),
            Finding::Pneumothorax(Side::Left),
        ];
        assert_eq!(
            write_report(&findings.into(), Dialect::Partial, 0),
            "心影增大。右侧中肺野实变。左侧胸腔积液。"
        );
        let only = BTreeSet::from([Finding::Pneumothorax(Side::Left)]);
        assert_eq!(write_report(&only, Dialect::Partial, 0), "未见异常。");
    }

    #[test]
    fn house_reports_keep_their_length() {
        for index in 0..2000 {
            let report = write_report(&sample_findings(12, index), Dialect::House, index);
            let length = report.chars().count();
            assert!((40..=90).contains(&length), "{length}: {report}");
        }
    }

    #[test]
    fn the_alphabet_is_small() {
        let mut alphabet: BTreeSet<char> = PROMPTS.iter().flat_map(|p| p.chars()).collect();
        for index in 0..2000 {
            let findings = sample_findings(13, index);
            for dialect in [Dialect::Plain, Dialect::Terse, Dialect::House] {
                alphabet.extend(write_report(&findings, dialect, index).chars());
            }
        }
        println!("{} distinct characters", alphabet.len());
        assert!(alphabet.len() < 250, "{}", alphabet.len());
    }

    #[test]
    fn house_wording_is_stable_and_a_constant_report_is_poor() {
        let studies: Vec<_> = (0..200).map(|index| sample_findings(14, index)).collect();
        let truth: Vec<_> = (0..)
            .zip(&studies)
            .map(|(seed, findings)| write_report(findings, Dialect::House, seed))
            .collect();
        let again = (1000..)
            .zip(&studies)
            .map(|(seed, findings)| write_report(findings, Dialect::House, seed));
        let mean = |scores: &mut dyn Iterator<Item = f64>| scores.sum::<f64>() / 200.0;
        let same = mean(&mut truth.iter().zip(again).map(|(a, b)| rouge_l(a, &b)));
        let constant = (0..400)
            .map(|index| write_report(&sample_findings(15, index), Dialect::House, index))
            .map(|guess| mean(&mut truth.iter().map(|report| rouge_l(report, &guess))))
            .fold(0.0, f64::max);
        let distinct: BTreeSet<_> = (0..100)
            .map(|seed| write_report(&BTreeSet::new(), Dialect::House, seed))
            .collect();
        println!(
            "same study twice {same:.3}, best constant report {constant:.3}, {} normal wordings",
            distinct.len()
        );
        assert!(same > 0.75, "{same}");
        assert!(same - constant > 0.3, "{same} against {constant}");
        assert!(distinct.len() > 4);
    }

    #[test]
    fn dialects_share_words_and_differ_in_style() {
        let scores: Vec<f64> = (0..200)
            .map(|index| {
                let findings = sample_findings(16, index);
                rouge_l(
                    &write_report(&findings, Dialect::Plain, index),
                    &write_report(&findings, Dialect::House, index),
                )
            })
            .collect();
        let mean = scores.iter().sum::<f64>() / 200.0;
        println!("plain against house {mean:.3}");
        assert!(mean < 0.4, "{mean}");
    }
}

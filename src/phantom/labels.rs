//! From report text back to findings, and the score of stated findings against true ones.

use std::collections::BTreeSet;

use super::finding::{Finding, Side, Zone};

/// Reads the findings a report states, in either dialect.
///
/// A finding counts where its word is in a clause with no negation (`未见`, `无`, `没有`)
/// before it; a negation holds over a list (`未见胸腔积液、气胸或结节`) up to the next comma.
/// Side and zone are the nearest ones before the word in the same sentence, `双侧` and `两侧`
/// being both sides. A mention without the side or zone its finding needs is no finding.
pub fn findings_in_report(report: &str) -> BTreeSet<Finding> {
    let mut findings = BTreeSet::new();
    for sentence in report.split(['。', '；', ';', '！', '\n']) {
        let mut clause_start = 0;
        let ends = sentence
            .match_indices(['，', ',', '：', ':'])
            .map(|(at, mark)| (at, at + mark.len()))
            .chain(std::iter::once((sentence.len(), sentence.len())));
        for (end, next) in ends {
            let clause = &sentence[clause_start..end];
            for (at, kind) in mentions(clause) {
                if !is_negated(&clause[..at]) {
                    add_mention(kind, &sentence[..clause_start + at], &mut findings);
                }
            }
            clause_start = next;
        }
    }
    findings
}

/// Kind of finding a word names, with side and zone still to be read.
#[derive(Debug, Clone, Copy)]
enum Mention {
    Bare(Finding),
    Sided(fn(Side) -> Finding),
    Zoned(fn(Side, Zone) -> Finding),
}

/// Byte offsets and kinds of the finding words in a clause.
fn mentions(clause: &str) -> Vec<(usize, Mention)> {
    let words = [
        ("结节", Mention::Zoned(Finding::Nodule)),
        ("实变", Mention::Zoned(Finding::Consolidation)),
        ("胸腔积液", Mention::Sided(Finding::PleuralEffusion)),
        ("气胸", Mention::Sided(Finding::Pneumothorax)),
        ("起搏器", Mention::Bare(Finding::Pacemaker)),
    ];
    let mut found: Vec<(usize, Mention)> = words
        .into_iter()
        .flat_map(|(word, mention)| clause.match_indices(word).map(move |(at, _)| (at, mention)))
        .collect();
    // `心影增大`, and with a word between as in `心影有增大` or `心影未见增大`.
    if let Some(heart) = clause.find("心影")
        && let Some(larger) = clause[heart..].find("增大")
    {
        found.push((heart + larger, Mention::Bare(Finding::Cardiomegaly)));
    }
    found
}

fn is_negated(before: &str) -> bool {
    ["未见", "无", "没有"].iter().any(|no| before.contains(no))
}

/// Adds the findings that `mention` means, given the sentence `before` it.
fn add_mention(mention: Mention, before: &str, findings: &mut BTreeSet<Finding>) {
    let (sides, after_side) = nearest_side(before);
    match mention {
        Mention::Bare(finding) => {
            findings.insert(finding);
        }
        Mention::Sided(make) => findings.extend(sides.iter().map(|&side| make(side))),
        Mention::Zoned(make) => {
            let zone = Zone::ALL
                .into_iter()
                .filter_map(|zone| Some((after_side.rfind(zone.word())?, zone)))
                .max_by_key(|&(at, _)| at);
            if let Some((_, zone)) = zone {
                findings.extend(sides.iter().map(|&side| make(side, zone)));
            }
        }
    }
}

/// The side named last in `text`, and the text from there on; no side where none is named.
fn nearest_side(text: &str) -> (&'static [Side], &str) {
    let marks: [(&str, &'static [Side]); 4] = [
        ("左", &[Side::Left]),
        ("右", &[Side::Right]),
        ("双", &Side::ALL),
        ("两", &Side::ALL),
    ];
    marks
        .into_iter()
        .flat_map(|(mark, sides)| text.match_indices(mark).map(move |(at, _)| (at, sides)))
        // `左心缘` and `右心室` are places in the heart, and say no side.
        .map(|(at, sides)| (at, sides, &text[at..]))
        .filter(|(_, _, rest)| {
            rest.chars()
                .nth(1)
                .is_none_or(|next| "侧肺上中下胸".contains(next))
        })
        .max_by_key(|&(at, _, _)| at)
        .map_or((&[], text), |(_, sides, rest)| (sides, rest))
}

/// Agreement of stated findings with true ones, counted over all studies together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FindingScore {
    /// Findings stated and true, side and zone included.
    pub true_positives: usize,
    /// Findings stated and not true.
    pub false_positives: usize,
    /// True findings not stated.
    pub false_negatives: usize,
}

impl FindingScore {
    /// Micro F1, 0 to 1; 1 where nothing was stated and nothing is true.
    pub fn f1(&self) -> f64 {
        share(
            2 * self.true_positives,
            self.false_positives + self.false_negatives,
        )
    }
}

fn share(good: usize, bad: usize) -> f64 {
    if good + bad == 0 {
        1.0
    } else {
        good as f64 / (good + bad) as f64
    }
}

/// Counts agreement over `(true findings, stated findings)` pairs, one pair a study.
pub fn finding_f1<'a, I>(pairs: I) -> FindingScore
where
    I: IntoIterator<Item = (&'a BTreeSet<Finding>, &'a BTreeSet<Finding>)>,
{
    let mut score = FindingScore::default();
    for (truth, stated) in pairs {
        let both = truth.intersection(stated).count();
        score.true_positives += both;
        score.false_positives += stated.len() - both;
        score.false_negatives += truth.len() - both;
    }
    score
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set<const N: usize>(findings: [Finding; N]) -> BTreeSet<Finding> {
        findings.into()
    }

    #[test]
    fn negation_holds_over_a_list_and_ends_at_a_comma() {
        let read = findings_in_report("未见右侧胸腔积液、左侧气胸或结节，左侧中肺野实变。");
        assert_eq!(
            read,
            set([Finding::Consolidation(Side::Left, Zone::Middle)])
        );
        assert!(findings_in_report("心影未见增大，无起搏器。").is_empty());
        assert!(findings_in_report("").is_empty());
    }

    #[test]
    fn side_and_zone_are_the_nearest_before_the_word() {
        assert_eq!(
            findings_in_report("左侧上肺野结节及实变，右侧气胸；双侧胸腔积液。右心缘：结节"),
            set([
                Finding::Nodule(Side::Left, Zone::Upper),
                Finding::Consolidation(Side::Left, Zone::Upper),
                Finding::Pneumothorax(Side::Right),
                Finding::PleuralEffusion(Side::Left),
                Finding::PleuralEffusion(Side::Right),
            ])
        );
        // The zone of another side does not carry over.
        assert_eq!(
            findings_in_report("左侧上肺野实变，右侧结节。"),
            set([Finding::Consolidation(Side::Left, Zone::Upper)])
        );
    }

    #[test]
    fn f1_counts_side_and_zone() {
        let truth = [
            set([Finding::Cardiomegaly, Finding::Pacemaker]),
            set([Finding::Nodule(Side::Left, Zone::Upper)]),
            set([]),
        ];
        let stated = [
            set([Finding::Cardiomegaly]),
            set([Finding::Nodule(Side::Right, Zone::Upper)]),
            set([]),
        ];
        let score = finding_f1(truth.iter().zip(&stated));
        assert_eq!(
            (
                score.true_positives,
                score.false_positives,
                score.false_negatives
            ),
            (1, 1, 2)
        );
        assert_eq!(score.f1(), 0.4);
        assert_eq!(finding_f1([(&set([]), &set([]))]).f1(), 1.0);
    }
}

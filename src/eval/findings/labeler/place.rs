//! Where a finding is and of what degree: side, zones of the lung, severity.

use std::{collections::BTreeSet, ops::Range};

use super::clauses::{Clause, Match};
use crate::eval::findings::{
    labels::{Laterality, Severity, Zone},
    rules::{Cue, WordTable},
};

impl WordTable {
    pub(super) fn side(
        &self,
        report: &str,
        clauses: &[Clause],
        all: &[Match],
        number: usize,
        span: &Range<usize>,
        area: &Range<usize>,
    ) -> Option<Laterality> {
        let clause = &clauses[number];
        let before = self.sides_in(&report[clause.span.start..span.end]);
        if let Some((last, side)) = before.last() {
            // 右上肺及左下肺: two places of one finding. Not when another finding is between them.
            let both = before.len() > 1 && {
                let (first, other) = &before[before.len() - 2];
                let between =
                    &report[clause.span.start + first.end..clause.span.start + last.start];
                // 右中叶及左舌叶炎症、不张: the second finding has both places of the first.
                let (from, to) = (
                    clause.span.start + first.end,
                    clause.span.start + last.start,
                );
                let separated = all.iter().any(|m| (from..to).contains(&m.span.start));
                let joined = match self.syntax.words {
                    true => self.syntax.list_word.is_match(between),
                    false => between.contains(['、', '及', '和', '与']),
                };
                joined
                    && between.chars().count() <= self.syntax.sides
                    && (clause.span.start + first.end >= area.start
                        || (clause.span.start + last.end <= area.start && !separated))
                    && other != side
            };
            // "Moderate left and small right effusions": the words of degree cut the clause.
            let split = self.syntax.words
                && clause.contrast
                && before.len() == 1
                && number.checked_sub(1).is_some_and(|n| {
                    let earlier = &clauses[n];
                    let named = all.iter().any(|m| earlier.span.contains(&m.span.start));
                    let sides = self.sides_in(&report[earlier.span.clone()]);
                    earlier.sentence == clause.sentence
                        && !named
                        && sides.last().is_some_and(|(_, other)| other != side)
                });
            return Some(match both || split {
                true => Laterality::Bilateral,
                false => *side,
            });
        }
        let after = report.get(span.end..area.end).unwrap_or_default();
        if let Some((_, side)) = self.sides_in(after).first() {
            return Some(*side);
        }
        let starts_with_doubt = clause.cues.first().is_some_and(|(cue, kind)| {
            *kind == Cue::Uncertain && report[clause.span.start..cue.start].chars().count() <= 2
        });
        let neighbour = |n: Option<usize>| {
            n.and_then(|n| clauses.get(n))
                .filter(|c| c.sentence == clause.sentence)
        };
        let inherits = self
            .reading
            .as_ref()
            .is_some_and(|reading| reading.inherit_side);
        if inherits && let Some(side) = self.side_of_sentence(report, clauses, number) {
            return Some(side);
        }
        if let Some(previous) = neighbour(number.checked_sub(1)).filter(|_| starts_with_doubt) {
            return self
                .sides_in(&report[previous.span.clone()])
                .last()
                .map(|(_, side)| *side);
        }
        let named = |c: &&Clause| all.iter().any(|m| c.span.contains(&m.span.start));
        let next = neighbour(Some(number + 1)).filter(|next| !named(next))?;
        let next = report[next.span.clone()].trim_end_matches(['，', '。']);
        let syntax = &self.syntax;
        if syntax.place.is_match(next) && next.chars().count() <= syntax.place_length {
            return self.sides_in(next).first().map(|(_, side)| *side);
        }
        None
    }

    /// The side that an earlier clause of the same sentence names, and this one goes on with.
    fn side_of_sentence(
        &self,
        report: &str,
        clauses: &[Clause],
        number: usize,
    ) -> Option<Laterality> {
        // 左下肺斑片影，结核？炎症？: one question after the other.
        let asks = |clause: &Clause| {
            report[clause.span.clone()]
                .trim_end()
                .ends_with(['？', '?'])
        };
        let mut sentence = clauses[number].sentence;
        let mut asked = asks(&clauses[number]);
        let before = clauses[..number].iter().rev();
        let sided: Vec<(bool, Laterality)> = before
            .take_while(|clause| {
                if clause.sentence + 1 == sentence && asked && asks(clause) {
                    sentence = clause.sentence;
                }
                asked &= clause.sentence == sentence;
                clause.sentence == sentence
            })
            .filter_map(|clause| {
                let text = &report[clause.span.clone()];
                let (_, side) = self.sides_in(text).pop()?;
                let emphasis = self.emphasis.as_ref();
                Some((emphasis.is_some_and(|words| words.is_match(text)), side))
            })
            .collect();
        // 双上肺结核，左侧为著，部分钙化: more of it on the left, and not only there.
        let of_both = sided.iter().find(|(emphasis, _)| !emphasis);
        match (sided.first(), of_both) {
            (Some((true, _)), Some((_, Laterality::Bilateral))) => Some(Laterality::Bilateral),
            (nearest, _) => nearest.map(|(_, side)| *side),
        }
    }

    /// Zones named before a finding in its clause, else after it.
    pub(super) fn zones(
        &self,
        report: &str,
        clause: &Clause,
        span: &Range<usize>,
    ) -> BTreeSet<Zone> {
        let before = report.get(clause.span.start..span.end).unwrap_or_default();
        let zones = self.zones_in(before);
        if zones.is_empty() {
            let after = report.get(span.end..clause.span.end).unwrap_or_default();
            return self.zones_in(after);
        }
        zones
    }

    pub(super) fn severity(
        &self,
        report: &str,
        span: &Range<usize>,
        area: &Range<usize>,
    ) -> Option<Severity> {
        let before = report
            .get(area.start..span.end.max(area.start))
            .unwrap_or_default();
        let skip = before
            .chars()
            .count()
            .saturating_sub(report[span.clone()].chars().count() + self.syntax.degree.0);
        let near: String = before.chars().skip(skip).collect();
        let degree = self.severities_in(&near).last();
        degree.or_else(|| {
            let after: String = report
                .get(span.end..area.end)
                .unwrap_or_default()
                .chars()
                .take(self.syntax.degree.1)
                .collect();
            self.severities_in(&after).next()
        })
    }
}

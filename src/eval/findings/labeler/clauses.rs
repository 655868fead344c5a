//! Matches of the rules, and the clauses of a report with the cues in them.

use std::ops::Range;

use crate::eval::findings::{
    labels::Status,
    rules::{Cue, FindingRule, WordTable},
};

/// A match of a rule, before its status is known.
pub(super) struct Match<'r> {
    pub(super) rule: &'r FindingRule,
    pub(super) span: Range<usize>,
}

/// A clause with the cues in it; byte ranges are those of the report.
pub(super) struct Clause {
    pub(super) span: Range<usize>,
    /// Number of the sentence.
    pub(super) sentence: usize,
    /// Whether a contrast word begins it.
    pub(super) contrast: bool,
    pub(super) cues: Vec<(Range<usize>, Cue)>,
}

impl WordTable {
    /// Matches of all rules, in text order; words taken by one rule are closed to the later ones.
    pub(super) fn matches(&self, report: &str, sentences: &[Range<usize>]) -> Vec<Match<'_>> {
        let mut taken: Vec<Range<usize>> = Vec::new();
        let mut matches: Vec<Match> = Vec::new();
        let candidates = self.prefilter.candidates(report);
        let rules = self.rules.iter().zip(candidates);
        for (rule, _) in rules.filter(|(_, may)| *may) {
            for found in rule.pattern.find_iter(report) {
                let span = found.range();
                let sentence = sentences
                    .iter()
                    .find(|s| s.contains(&span.start))
                    .cloned()
                    .unwrap_or(0..report.len());
                let after = &report[span.end..sentence.end.max(span.end)];
                if !rule.fits(&report[sentence.start..span.start], after) {
                    continue;
                }
                // Statements of normality span several words and take none.
                if rule.status.is_none() {
                    if taken
                        .iter()
                        .any(|t| t.start < span.end && span.start < t.end)
                    {
                        continue;
                    }
                    // A word that only counts when denied leaves its text to the next rule otherwise.
                    if !rule.only_negated {
                        taken.push(span.clone());
                    }
                }
                matches.push(Match { rule, span });
            }
        }
        matches.sort_by_key(|m| m.span.start);
        matches
    }

    pub(super) fn clauses(
        &self,
        report: &str,
        sentences: &[Range<usize>],
        matches: &[Match],
    ) -> Vec<Clause> {
        let mut clauses = Vec::new();
        for (sentence, span) in sentences.iter().enumerate() {
            let text = &report[span.clone()];
            let mut cuts: Vec<(usize, bool)> = vec![(0, false)];
            // 胸膜： is a heading of what follows, "Pneumothorax: none" is one thought.
            let words = self.syntax.words;
            let marks = text.match_indices(['，', ',', '：', ':']);
            let marks = marks.filter(|(_, mark)| !words || *mark != ":");
            cuts.extend(marks.map(|(at, mark)| (at + mark.len(), false)));
            // 排除了 is no 除了, 不但 no 但.
            let contrast = self.contrast.find_iter(text);
            let contrast = contrast
                .filter(|word| !text[..word.start()].ends_with(['排', '清', '消', '解', '不']));
            cuts.extend(contrast.map(|word| (word.start(), true)));
            cuts.sort_unstable();
            for (n, &(start, contrast)) in cuts.iter().enumerate() {
                let end = cuts.get(n + 1).map_or(text.len(), |next| next.0);
                let span = span.start + start..span.start + end;
                // A 无 inside a finding's own word (无气症) is no cue.
                let is_word = |cue: &Range<usize>| {
                    matches.iter().any(|m| {
                        m.rule.own_negation && m.span.start <= cue.start && cue.end <= m.span.end
                    })
                };
                let cues = self.cues_in(&report[span.clone()]).into_iter();
                let cues =
                    cues.map(|(cue, kind)| (span.start + cue.start..span.start + cue.end, kind));
                let cues = cues.filter(|(cue, _)| !is_word(cue)).collect();
                clauses.push(Clause {
                    span,
                    sentence,
                    contrast,
                    cues,
                });
            }
        }
        clauses
    }
}

/// What the cues of `clause` say of a finding that starts at `at`; `None` if they do not reach it.
pub(super) fn reach(report: &str, clause: &Clause, at: usize) -> Option<Status> {
    let mut negative: Option<Range<usize>> = None;
    let mut uncertain: Option<Range<usize>> = None;
    for (cue, kind) in clause.cues.iter().take_while(|(cue, _)| cue.end <= at) {
        let close = |other: &Range<usize>| report[other.end..cue.start].chars().count() <= 2;
        match kind {
            Cue::Pseudo => {}
            // 似乎没有 is a denial in polite words.
            Cue::Uncertain
                if report[cue.clone()] == *"似乎" && denies_next(report, clause, cue) => {}
            Cue::Uncertain => uncertain = Some(cue.clone()),
            // 可能没有: a doubt about an absence.
            Cue::Negative if uncertain.as_ref().is_some_and(close) => {}
            Cue::Negative => negative = Some(cue.clone()),
            Cue::Stop
                if report[cue.end..].starts_with('的') || negative.as_ref().is_some_and(close) => {
            }
            Cue::Stop => negative = None,
        }
    }
    match (negative, uncertain) {
        (Some(_), _) => Some(Status::Absent),
        (None, Some(_)) => Some(Status::Uncertain),
        (None, None) => None,
    }
}

fn denies_next(report: &str, clause: &Clause, cue: &Range<usize>) -> bool {
    clause.cues.iter().any(|(next, kind)| {
        *kind == Cue::Negative
            && next.start >= cue.end
            && report[cue.end..next.start].chars().count() <= 2
    })
}

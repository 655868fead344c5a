//! What a clause says of a finding: that it is there, denied, in doubt; and clauses that were not read.

use std::ops::Range;

use super::clauses::{Clause, Match, reach};
use crate::eval::findings::{
    labels::Status,
    rules::{Cue, WordTable},
};

impl WordTable {
    pub(super) fn status(
        &self,
        report: &str,
        clauses: &[Clause],
        number: usize,
        found: &Match,
        carried: Option<Status>,
        all: &[Match],
    ) -> Status {
        let clause = &clauses[number];
        let syntax = &self.syntax;
        let words = &report[found.span.clone()];
        if !found.rule.own_negation && syntax.inner_negation.is_match(words) {
            return Status::Absent;
        }
        if let Some(status) = carried {
            return status;
        }
        if let Some(status) = reach(report, clause, found.span.start) {
            return status;
        }
        let (start, end) = self.rest_of_list(report, clauses, number, found, all);
        let after = report[start..end]
            .trim_end_matches(['，', ',', '。', '；', ';', '\n', ' ', '？', '?', '.']);
        let persists = self.persists.as_ref();
        let persists = persists.is_some_and(|persists| persists.is_match(after));
        if !persists
            && let Some(cue) = self.negative_after.find(after)
            && syntax.leads_to(&after[..cue.start()], syntax.after)
        {
            return Status::Absent;
        }
        // 肺不张与肺炎难以鉴别: here 与 joins.
        if let Some(cue) = self.uncertain_after.find(after)
            && syntax.leads_to(&after[..cue.start()].replace('与', ""), syntax.after)
        {
            return Status::Uncertain;
        }
        // 肺不张（异物？）: the question is about what is in the brackets.
        let aside = after.find(['（', '(']).is_some_and(|at| {
            let inside = start + at..end;
            all.iter().any(|m| inside.contains(&m.span.start))
        });
        if !aside
            && report[start..end]
                .trim_end_matches('。')
                .ends_with(['？', '?'])
            && syntax.leads_to(after, syntax.question)
        {
            return Status::Uncertain;
        }
        let gone = !persists
            && clauses
                .get(number + 1)
                .filter(|next| next.sentence == clause.sentence)
                .is_some_and(|next| {
                    let empty = !all.iter().any(|m| next.span.contains(&m.span.start));
                    empty && self.gone.is_match(&report[next.span.clone()])
                });
        if gone {
            Status::Absent
        } else {
            Status::Present
        }
    }

    /// What is left of the clause after a finding, as start and end. In a language of words, where commas part the
    /// members of a list, after the last member, to the end of the thought: "effusion, edema and masses are not seen".
    fn rest_of_list(
        &self,
        report: &str,
        clauses: &[Clause],
        number: usize,
        found: &Match,
        all: &[Match],
    ) -> (usize, usize) {
        let clause = &clauses[number];
        let mut start = found.span.end;
        let mut end = clause.span.end.max(start);
        if !self.syntax.words {
            return (start, end);
        }
        let following = all.iter().filter(|m| m.span.start >= found.span.end);
        let thought = clauses[number + 1..]
            .iter()
            .take_while(|next| next.sentence == clause.sentence && !next.contrast);
        let last = thought.last().map_or(end, |next| next.span.end.max(end));
        for member in following.take_while(|m| m.span.end <= last) {
            let between = report.get(start..member.span.start).unwrap_or_default();
            if between.is_empty() || !self.syntax.between.is_match(between) {
                break;
            }
            start = member.span.end;
        }
        let holds = |next: &&Clause| next.span.contains(&start.saturating_sub(1));
        if let Some(of_last) = clauses[number..].iter().find(holds) {
            end = of_last.span.end.max(start);
        }
        (start, end)
    }

    /// What the clause before denied, or in a language of words doubted, where clause `number` goes on with its list.
    pub(super) fn goes_on(
        &self,
        report: &str,
        clauses: &[Clause],
        carried: &[Option<Status>],
        number: usize,
        inside: &[&Match],
    ) -> Option<Status> {
        let before = &clauses[number.checked_sub(1)?];
        let clause = &clauses[number];
        let syntax = &self.syntax;
        if before.sentence != clause.sentence || clause.contrast || inside.is_empty() {
            return None;
        }
        let said = carried[number - 1].or_else(|| reach(report, before, before.span.end))?;
        if said != Status::Absent && !syntax.words {
            return None;
        }
        let text = &report[clause.span.clone()];
        if self.continues.is_match(text) {
            return Some(said);
        }
        let following = clauses[number + 1..]
            .iter()
            .take_while(|next| next.sentence == clause.sentence && !next.contrast);
        // An "or" at the end of a list speaks for its members before.
        let ends_in_or = syntax.words
            && following
                .clone()
                .take(6)
                .any(|next| syntax.list_start.is_match(&report[next.span.clone()]));
        let is_listed_place =
            syntax.words && (ends_in_or || syntax.list_start.is_match(text.trim_start()));
        // "No effusion, opacity to suggest pneumonia, or": a word that is no cue after all ends no list.
        let is_cue = |kind: Cue| !syntax.words || kind != Cue::Pseudo;
        if clause.cues.iter().any(|(_, kind)| is_cue(*kind))
            || (!is_listed_place && !self.sides_in(text).is_empty())
        {
            return None;
        }
        let mut rest = String::new();
        let mut at = clause.span.start;
        for found in inside {
            rest.push_str(report.get(at..found.span.start).unwrap_or_default());
            at = at.max(found.span.end);
        }
        rest.push_str(report.get(at..clause.span.end).unwrap_or_default());
        let next = clauses.get(number + 1);
        let next_lists = next.is_some_and(|next| {
            next.sentence == clause.sentence
                && syntax.list_start.is_match(&report[next.span.clone()])
        });
        let listed = syntax.words || next_lists || syntax.list_word.is_match(&rest);
        let only = if is_listed_place {
            &syntax.between
        } else {
            &syntax.only_fillers
        };
        (listed && (only.is_match(&rest) || syntax.only_fillers.is_match(&rest))).then_some(said)
    }

    /// Whether a word of doubt is among the words of a finding, or 或 joins it to its neighbour.
    pub(super) fn is_doubted(
        &self,
        report: &str,
        clause: &Clause,
        inside: &[&Match],
        order: usize,
    ) -> bool {
        let span = &inside[order].span;
        let within = |cue: &Range<usize>| span.start < cue.start && cue.end <= span.end;
        let cues = &clause.cues;
        if cues
            .iter()
            .any(|(cue, kind)| *kind == Cue::Uncertain && within(cue))
        {
            return true;
        }
        let alternative = &self.syntax.alternative;
        let joined =
            |from: usize, to: usize| alternative.is_match(report.get(from..to).unwrap_or_default());
        let before = order.checked_sub(1).map(|n| &inside[n].span);
        let after = inside.get(order + 1).map(|next| &next.span);
        self.reading
            .as_ref()
            .is_some_and(|reading| reading.or_is_doubt)
            && (before.is_some_and(|before| joined(before.end, span.start))
                || after.is_some_and(|after| joined(span.end, after.start)))
    }

    /// Whether a class is denied in so many words: not by a statement of normality, and not of the rest alone.
    pub(super) fn is_denied(
        &self,
        report: &str,
        clause: &Clause,
        found: &Match,
        status: Status,
    ) -> bool {
        status == Status::Absent
            && found.rule.status.is_none()
            && !self.syntax.rest.is_match(&report[clause.span.clone()])
    }

    /// Whether `clause`, in which no rule found anything, has words of something abnormal.
    pub(super) fn is_unread(&self, report: &str, clause: &Clause) -> bool {
        let Some(reading) = &self.reading else {
            return false;
        };
        let marks = |c: char| {
            c.is_whitespace()
                || (c.is_ascii_punctuation() && c != '?')
                || "，。；：、！（）".contains(c)
        };
        let text = report[clause.span.clone()].trim_start();
        let text = match &self.sections {
            Some(headings) => headings.without_heading(text),
            None => text,
        };
        let text = text.trim_matches(marks);
        let text = text.trim_start_matches(|c: char| c.is_ascii_digit() || marks(c));
        !text.is_empty()
            && (reading.abnormal.is_match(text) || reading.seen.is_match(text))
            && !reading.neutral.is_match(text)
            && reach(report, clause, clause.span.end) != Some(Status::Absent)
    }
}

//! Reads a report with the table: clauses, scope of negation and doubt, side, degree.
//!
//! A sentence ends at 。；！？, a clause at a comma or a contrast word. A cue reaches forward to the end of its
//! clause, or to a stop word; over a comma only where the next clause merely goes on listing.

mod place;

use std::{collections::BTreeSet, ops::Range, sync::LazyLock};

use super::{
    error::FindingsError,
    finding::{Finding, OtherFinding},
    labels::{Laterality, Mention, ReportLabels, Status},
    rules::{Cue, FindingRule, WordTable},
    sections::Section,
    syntax::fold,
    text::{Normalised, sentences},
};

static OPENI: LazyLock<Labeler> = LazyLock::new(|| built_in(include_str!("tables/openi.toml")));
static HOSPITAL: LazyLock<Labeler> =
    LazyLock::new(|| built_in(include_str!("tables/hospital.toml")));
static ENGLISH: LazyLock<Labeler> = LazyLock::new(|| built_in(include_str!("tables/english.toml")));

fn built_in(table: &str) -> Labeler {
    Labeler::from_toml(table).expect("a test compiles the built-in tables")
}

/// Finds and labels what reports say, in the language of its table.
pub struct Labeler {
    table: WordTable,
}

/// A match of a rule, before its status is known.
struct Match<'r> {
    rule: &'r FindingRule,
    span: Range<usize>,
}

/// A clause with the cues in it; byte ranges are those of the report.
struct Clause {
    span: Range<usize>,
    /// Number of the sentence.
    sentence: usize,
    /// Whether a contrast word begins it.
    contrast: bool,
    cues: Vec<(Range<usize>, Cue)>,
}

impl Labeler {
    /// The labeler for the machine-translated corpus OpenI-zh.
    ///
    /// # Panics
    /// Never: a test compiles its table.
    pub fn openi() -> &'static Self {
        &OPENI
    }

    /// The labeler for reports as Chinese hospitals write them.
    ///
    /// # Panics
    /// Never: a test compiles its table.
    pub fn hospital() -> &'static Self {
        &HOSPITAL
    }

    /// The labeler for English reports.
    ///
    /// # Panics
    /// Never: a test compiles its table.
    pub fn english() -> &'static Self {
        &ENGLISH
    }

    /// The abnormalities outside the twenty classes that the table names.
    pub fn others(&self) -> Vec<&OtherFinding> {
        self.table.others()
    }

    /// A labeler with another table, of the form of `tables/hospital.toml`.
    ///
    /// # Errors
    /// [`FindingsError`] for a table that cannot be read, a pattern that cannot be compiled, an unknown class.
    pub fn from_toml(text: &str) -> Result<Self, FindingsError> {
        Ok(Self {
            table: WordTable::read(text)?,
        })
    }

    fn normalised<'t>(&self, report: &'t str) -> Normalised<'t> {
        Normalised::of(report, self.table.spelling.as_ref())
    }

    /// The sentences of `report`, without blank ones.
    pub fn sentences(&self, report: &str) -> Vec<String> {
        let normalised = self.normalised(report);
        let ranges = sentences(&normalised.text, &self.table.syntax).into_iter();
        let texts = ranges.map(|range| report[normalised.original(range)].trim().to_owned());
        texts.filter(|text| !text.is_empty()).collect()
    }

    /// The parts of `report` by its headings, which they begin with; the whole where there is none.
    pub fn sections(&self, report: &str) -> Vec<String> {
        let Some(headings) = &self.table.sections else {
            return vec![report.to_owned()];
        };
        let normalised = self.normalised(report);
        let ranges = headings.sections(&normalised.text).into_iter();
        let texts = ranges.map(|(range, _)| report[normalised.original(range)].trim().to_owned());
        texts.filter(|text| !text.is_empty()).collect()
    }

    /// The parts of `report` without their headings, each with its kind; the whole, unnamed, where there is none.
    pub fn named_sections(&self, report: &str) -> Vec<(Section, String)> {
        let Some(headings) = &self.table.sections else {
            return vec![(Section::Unnamed, report.trim().to_owned())];
        };
        let normalised = self.normalised(report);
        let ranges = headings.sections(&normalised.text).into_iter();
        let parts = ranges.map(|(range, section)| {
            let text = &normalised.text[range.clone()];
            let skipped = text.len() - headings.without_heading(text).len();
            let part = normalised.original(range.start + skipped..range.end);
            (section, report[part].trim().to_owned())
        });
        parts.filter(|(_, text)| !text.is_empty()).collect()
    }

    /// Labels `report`. Byte ranges in the answer are those of `report`.
    pub fn label(&self, report: &str) -> ReportLabels {
        let mut normalised = self.normalised(report);
        // Capitals tell a heading.
        let sections = match &self.table.sections {
            Some(headings) => headings.sections(&normalised.text),
            None => vec![(0..normalised.text.len(), Section::Unnamed)],
        };
        let ranges = sentences(&normalised.text, &self.table.syntax);
        if self.table.syntax.words {
            normalised.text = fold(normalised.text);
        }
        let (report, sentences) = (&*normalised.text, ranges);
        let section_at = |at: usize| {
            let found = sections.iter().find(|(range, _)| range.contains(&at));
            found.map_or(Section::Unnamed, |(_, section)| *section)
        };
        let mut matches = self.matches(report, &sentences);
        matches.retain(|found| section_at(found.span.start).is_read());
        let clauses = self.clauses(report, &sentences, &matches);
        let mut mentions: Vec<Mention> = Vec::new();
        let mut carried = vec![None; clauses.len()];
        let mut stated = Vec::new();
        let (mut unread, mut looked_at) = (Vec::new(), 0);
        for (number, clause) in clauses.iter().enumerate() {
            let inside: Vec<&Match> = matches
                .iter()
                .filter(|m| clause.span.contains(&m.span.start))
                .collect();
            carried[number] = self.goes_on(report, &clauses, &carried, number, &inside);
            if section_at(clause.span.start).is_read() {
                looked_at += normalised.original(clause.span.clone()).len();
                let covered = matches
                    .iter()
                    .any(|m| m.span.start < clause.span.end && clause.span.start < m.span.end);
                if !covered && self.is_unread(report, clause) {
                    unread.push(normalised.original(clause.span.clone()));
                }
            }
            for (order, found) in inside.iter().enumerate() {
                let mut status = match found.rule.status {
                    Some(status) => status,
                    None => self.status(report, &clauses, number, found, carried[number], &matches),
                };
                if status == Status::Present
                    && found.rule.status.is_none()
                    && (found.rule.doubtful || self.is_doubted(report, clause, &inside, order))
                {
                    status = Status::Uncertain;
                }
                if found.rule.only_negated && status != Status::Absent {
                    continue;
                }
                let previous_end = order
                    .checked_sub(1)
                    .map(|n| inside[n].span.end)
                    .filter(|end| *end <= found.span.start);
                let next_start = inside.get(order + 1).map(|next| next.span.start);
                let area = previous_end.unwrap_or(clause.span.start)
                    ..next_start.unwrap_or(clause.span.end);
                let is_there = status != Status::Absent;
                let sided =
                    |target: &Option<Finding>| is_there && target.is_none_or(Finding::has_side);
                for target in &found.rule.targets {
                    if let Some(finding) = target
                        && (status == Status::Present
                            || self.is_denied(report, clause, found, status))
                    {
                        let side =
                            self.side(report, &clauses, &matches, number, &found.span, &area);
                        let side = side.filter(|_| finding.has_side());
                        stated.push((*finding, status, side));
                    }
                    mentions.push(Mention {
                        finding: *target,
                        other: found
                            .rule
                            .other
                            .as_ref()
                            .filter(|_| target.is_none())
                            .map(|other| other.key.clone()),
                        status,
                        laterality: if sided(target) {
                            self.side(report, &clauses, &matches, number, &found.span, &area)
                        } else {
                            None
                        },
                        severity: if is_there {
                            self.severity(report, &found.span, &area)
                        } else {
                            None
                        },
                        zones: if sided(target) {
                            self.zones(report, clause, &found.span)
                        } else {
                            BTreeSet::new()
                        },
                        section: section_at(found.span.start),
                        span: normalised.original(found.span.clone()),
                    });
                }
            }
        }
        let comparison = self.table.comparison.as_ref();
        ReportLabels {
            contradictions: contradictions(&stated),
            compares: comparison.is_some_and(|words| words.is_match(report)),
            ..ReportLabels::join(drop_doubles(mentions), unread, looked_at)
        }
    }

    /// Whether a word of doubt is among the words of a finding, or 或 joins it to its neighbour.
    fn is_doubted(&self, report: &str, clause: &Clause, inside: &[&Match], order: usize) -> bool {
        let span = &inside[order].span;
        let within = |cue: &Range<usize>| span.start < cue.start && cue.end <= span.end;
        let cues = &clause.cues;
        if cues
            .iter()
            .any(|(cue, kind)| *kind == Cue::Uncertain && within(cue))
        {
            return true;
        }
        let alternative = &self.table.syntax.alternative;
        let joined =
            |from: usize, to: usize| alternative.is_match(report.get(from..to).unwrap_or_default());
        let before = order.checked_sub(1).map(|n| &inside[n].span);
        let after = inside.get(order + 1).map(|next| &next.span);
        self.table
            .reading
            .as_ref()
            .is_some_and(|reading| reading.or_is_doubt)
            && (before.is_some_and(|before| joined(before.end, span.start))
                || after.is_some_and(|after| joined(span.end, after.start)))
    }

    /// Whether `clause`, in which no rule found anything, has words of something abnormal.
    fn is_unread(&self, report: &str, clause: &Clause) -> bool {
        let Some(reading) = &self.table.reading else {
            return false;
        };
        let marks = |c: char| {
            c.is_whitespace()
                || (c.is_ascii_punctuation() && c != '?')
                || "，。；：、！（）".contains(c)
        };
        let text = report[clause.span.clone()].trim_start();
        let text = match &self.table.sections {
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

    /// Matches of all rules, in text order; words taken by one rule are closed to the later ones.
    fn matches(&self, report: &str, sentences: &[Range<usize>]) -> Vec<Match<'_>> {
        let mut taken: Vec<Range<usize>> = Vec::new();
        let mut matches: Vec<Match> = Vec::new();
        let candidates = self.table.prefilter.candidates(report);
        let rules = self.table.rules.iter().zip(candidates);
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

    fn clauses(&self, report: &str, sentences: &[Range<usize>], matches: &[Match]) -> Vec<Clause> {
        let mut clauses = Vec::new();
        for (sentence, span) in sentences.iter().enumerate() {
            let text = &report[span.clone()];
            let mut cuts: Vec<(usize, bool)> = vec![(0, false)];
            // 胸膜： is a heading of what follows, "Pneumothorax: none" is one thought.
            let words = self.table.syntax.words;
            let marks = text.match_indices(['，', ',', '：', ':']);
            let marks = marks.filter(|(_, mark)| !words || *mark != ":");
            cuts.extend(marks.map(|(at, mark)| (at + mark.len(), false)));
            // 排除了 is no 除了, 不但 no 但.
            let contrast = self.table.contrast.find_iter(text);
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
                let cues = self.table.cues_in(&report[span.clone()]).into_iter();
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

    fn status(
        &self,
        report: &str,
        clauses: &[Clause],
        number: usize,
        found: &Match,
        carried: Option<Status>,
        all: &[Match],
    ) -> Status {
        let clause = &clauses[number];
        let syntax = &self.table.syntax;
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
        let persists = self.table.persists.as_ref();
        let persists = persists.is_some_and(|persists| persists.is_match(after));
        if !persists
            && let Some(cue) = self.table.negative_after.find(after)
            && syntax.leads_to(&after[..cue.start()], syntax.after)
        {
            return Status::Absent;
        }
        // 肺不张与肺炎难以鉴别: here 与 joins.
        if let Some(cue) = self.table.uncertain_after.find(after)
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
                    empty && self.table.gone.is_match(&report[next.span.clone()])
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
        if !self.table.syntax.words {
            return (start, end);
        }
        let following = all.iter().filter(|m| m.span.start >= found.span.end);
        let thought = clauses[number + 1..]
            .iter()
            .take_while(|next| next.sentence == clause.sentence && !next.contrast);
        let last = thought.last().map_or(end, |next| next.span.end.max(end));
        for member in following.take_while(|m| m.span.end <= last) {
            let between = report.get(start..member.span.start).unwrap_or_default();
            if between.is_empty() || !self.table.syntax.between.is_match(between) {
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
    fn goes_on(
        &self,
        report: &str,
        clauses: &[Clause],
        carried: &[Option<Status>],
        number: usize,
        inside: &[&Match],
    ) -> Option<Status> {
        let before = &clauses[number.checked_sub(1)?];
        let clause = &clauses[number];
        let syntax = &self.table.syntax;
        if before.sentence != clause.sentence || clause.contrast || inside.is_empty() {
            return None;
        }
        let said = carried[number - 1].or_else(|| reach(report, before, before.span.end))?;
        if said != Status::Absent && !syntax.words {
            return None;
        }
        let text = &report[clause.span.clone()];
        if self.table.continues.is_match(text) {
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
            || (!is_listed_place && !self.table.sides_in(text).is_empty())
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

    /// Whether a class is denied in so many words: not by a statement of normality, and not of the rest alone.
    fn is_denied(&self, report: &str, clause: &Clause, found: &Match, status: Status) -> bool {
        status == Status::Absent
            && found.rule.status.is_none()
            && !self
                .table
                .syntax
                .rest
                .is_match(&report[clause.span.clone()])
    }
}

/// Classes that are stated and denied on the same side.
fn contradictions(stated: &[(Finding, Status, Option<Laterality>)]) -> Vec<Finding> {
    let apart = |a: Option<Laterality>, b: Option<Laterality>| {
        use Laterality::{Left, Right};
        matches!(
            (a, b),
            (Some(Left), Some(Right)) | (Some(Right), Some(Left))
        )
    };
    let contradicted = |finding: Finding| {
        let of = |status: Status| {
            stated
                .iter()
                .filter(move |(other, its, _)| *other == finding && *its == status)
        };
        of(Status::Present).any(|(_, _, a)| of(Status::Absent).any(|(_, _, b)| !apart(*a, *b)))
    };
    let classes = Finding::ALL.into_iter();
    classes
        .filter(|finding| *finding != Finding::NoFinding && contradicted(*finding))
        .collect()
}

/// What the cues of `clause` say of a finding that starts at `at`; `None` if they do not reach it.
fn reach(report: &str, clause: &Clause, at: usize) -> Option<Status> {
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

/// A rule that holds only when denied and the rule after it can both match: the first one stays.
fn drop_doubles(mentions: Vec<Mention>) -> Vec<Mention> {
    let mut kept: Vec<Mention> = Vec::with_capacity(mentions.len());
    for mention in mentions {
        let inside = |other: &Mention| {
            other.finding == Some(Finding::LungOpacity)
                && mention.finding == Some(Finding::Atelectasis)
                && other.span.start <= mention.span.start
                && mention.span.end <= other.span.end
        };
        if !kept.iter().any(inside) {
            kept.push(mention);
        }
    }
    kept
}

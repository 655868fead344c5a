//! Reads a report with the table: clauses, scope of negation and doubt, side, degree.
//!
//! A sentence ends at 。；！？, a clause at a comma or a contrast word. A cue reaches forward to the end of its
//! clause, or to a stop word; over a comma only where the next clause merely goes on listing.

mod clauses;
mod place;
mod status;

use std::{collections::BTreeSet, sync::LazyLock};

use super::{
    error::FindingsError,
    finding::{Finding, OtherFinding},
    labels::{Laterality, Mention, ReportLabels, Status},
    rules::WordTable,
    sections::Section,
    syntax::fold,
    text::{Normalised, sentences},
};

use clauses::Match;

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
        let mut matches = self.table.matches(report, &sentences);
        matches.retain(|found| section_at(found.span.start).is_read());
        let clauses = self.table.clauses(report, &sentences, &matches);
        let mut mentions: Vec<Mention> = Vec::new();
        let mut carried = vec![None; clauses.len()];
        let mut stated = Vec::new();
        let (mut unread, mut looked_at) = (Vec::new(), 0);
        for (number, clause) in clauses.iter().enumerate() {
            let inside: Vec<&Match> = matches
                .iter()
                .filter(|m| clause.span.contains(&m.span.start))
                .collect();
            carried[number] = self
                .table
                .goes_on(report, &clauses, &carried, number, &inside);
            if section_at(clause.span.start).is_read() {
                looked_at += normalised.original(clause.span.clone()).len();
                let covered = matches
                    .iter()
                    .any(|m| m.span.start < clause.span.end && clause.span.start < m.span.end);
                if !covered && self.table.is_unread(report, clause) {
                    unread.push(normalised.original(clause.span.clone()));
                }
            }
            for (order, found) in inside.iter().enumerate() {
                let mut status = match found.rule.status {
                    Some(status) => status,
                    None => self.table.status(
                        report,
                        &clauses,
                        number,
                        found,
                        carried[number],
                        &matches,
                    ),
                };
                if status == Status::Present
                    && found.rule.status.is_none()
                    && (found.rule.doubtful
                        || self.table.is_doubted(report, clause, &inside, order))
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
                            || self.table.is_denied(report, clause, found, status))
                    {
                        let side =
                            self.table
                                .side(report, &clauses, &matches, number, &found.span, &area);
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
                            self.table
                                .side(report, &clauses, &matches, number, &found.span, &area)
                        } else {
                            None
                        },
                        severity: if is_there {
                            self.table.severity(report, &found.span, &area)
                        } else {
                            None
                        },
                        zones: if sided(target) {
                            self.table.zones(report, clause, &found.span)
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

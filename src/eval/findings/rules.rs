//! The table of words: read from TOML, checked, compiled.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::Range,
};

use regex::Regex;
use serde::Deserialize;

use super::{
    error::FindingsError,
    finding::{Finding, OtherFinding},
    labels::{Laterality, Severity, Status, Zone},
    prefilter::Prefilter,
    sections::{Headings, SectionsFile},
    syntax::{Spelling, TableSyntax, TableSyntaxFile},
    text::WordSpelling,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TableFile {
    /// For a language that sets words apart by spaces.
    syntax: Option<TableSyntaxFile>,
    cues: CuesFile,
    sides: SidesFile,
    severities: SeveritiesFile,
    #[serde(default)]
    zones: ZonesFile,
    /// Misspelt words and what is meant.
    #[serde(default)]
    spelling: BTreeMap<String, String>,
    #[serde(default)]
    sections: SectionsFile,
    reading: Option<ReadingFile>,
    rule: Vec<RuleFile>,
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
struct ZonesFile {
    upper: Vec<String>,
    middle: Vec<String>,
    lower: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ReadingFile {
    abnormal: String,
    seen: String,
    neutral: Vec<String>,
    #[serde(default)]
    inherit_side: bool,
    #[serde(default)]
    or_is_doubt: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CuesFile {
    pseudo: Vec<String>,
    uncertain: Vec<String>,
    negative: Vec<String>,
    stop: Vec<String>,
    contrast: Vec<String>,
    negative_after: Vec<String>,
    uncertain_after: Vec<String>,
    gone: String,
    continues: String,
    persists: Option<String>,
    comparison: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SidesFile {
    bilateral: Vec<String>,
    left: Vec<String>,
    right: Vec<String>,
    ignored: Vec<String>,
    /// Says which side has more of what both have.
    emphasis: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SeveritiesFile {
    trace: Vec<String>,
    mild: Vec<String>,
    moderate: Vec<String>,
    severe: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    finding: Vec<String>,
    pattern: String,
    status: Option<Status>,
    #[serde(default)]
    own_negation: bool,
    #[serde(default)]
    only_negated: bool,
    /// What it finds is in doubt, unless it is denied.
    #[serde(default)]
    doubtful: bool,
    name: Option<String>,
    chinese: Option<String>,
    only_before: Option<String>,
    unless_before: Option<String>,
    only_after: Option<String>,
    unless_after: Option<String>,
    // For the readers of the table.
    #[serde(default, rename = "note")]
    _note: String,
}

/// What a cue does to the findings after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cue {
    Pseudo,
    Uncertain,
    Negative,
    Stop,
}

/// A compiled rule.
pub(super) struct FindingRule {
    /// `None` is an abnormality outside the twenty; empty for a mask.
    pub(super) targets: Vec<Option<Finding>>,
    /// What that abnormality is called.
    pub(super) other: Option<OtherFinding>,
    pub(super) pattern: Regex,
    pub(super) status: Option<Status>,
    pub(super) own_negation: bool,
    pub(super) only_negated: bool,
    pub(super) doubtful: bool,
    only_before: Option<Regex>,
    unless_before: Option<Regex>,
    only_after: Option<Regex>,
    unless_after: Option<Regex>,
}

impl FindingRule {
    /// Whether the words around a match allow it.
    pub(super) fn fits(&self, before: &str, after: &str) -> bool {
        let is = |pattern: &Option<Regex>, text, default| {
            pattern
                .as_ref()
                .map_or(default, |p: &Regex| p.is_match(text))
        };
        is(&self.only_before, before, true)
            && is(&self.only_after, after, true)
            && !is(&self.unless_before, before, false)
            && !is(&self.unless_after, after, false)
    }
}

/// The compiled table.
pub(super) struct WordTable {
    pub(super) syntax: TableSyntax,
    pub(super) rules: Vec<FindingRule>,
    /// Which of them can match a text.
    pub(super) prefilter: Prefilter,
    /// Cues before a finding; the group number says which, in the order pseudo, uncertain, negative, stop.
    pub(super) cues: Regex,
    pub(super) contrast: Regex,
    pub(super) negative_after: Regex,
    pub(super) uncertain_after: Regex,
    pub(super) gone: Regex,
    pub(super) continues: Regex,
    /// Groups: ignored, bilateral, left, right.
    pub(super) sides: Regex,
    /// Says which side has more of what both have.
    pub(super) emphasis: Option<Regex>,
    /// Groups: trace, mild, moderate, severe.
    pub(super) severities: Regex,
    /// Groups: none, upper, middle, lower; absent where the table names no zones.
    zones: Option<Regex>,
    pub(super) persists: Option<Regex>,
    pub(super) comparison: Option<Regex>,
    pub(super) spelling: Option<WordSpelling>,
    pub(super) sections: Option<Headings>,
    pub(super) reading: Option<Reading>,
}

/// Tells words that were read or need no reading from words that went unread.
pub(super) struct Reading {
    pub(super) abnormal: Regex,
    pub(super) seen: Regex,
    pub(super) neutral: Regex,
    /// A clause without a side has that of its sentence.
    pub(super) inherit_side: bool,
    /// Two findings joined by 或 are both in doubt.
    pub(super) or_is_doubt: bool,
}

impl WordTable {
    pub(super) fn read(text: &str) -> Result<Self, FindingsError> {
        let file: TableFile = toml::from_str(text)?;
        let spelling = match file.syntax {
            Some(_) => Spelling::WORDS,
            None => Spelling::CHARACTERS,
        };
        let compile = |pattern: &str, place: &str| spelling.compile(pattern, place);
        let groups = |lists, place| groups(spelling, lists, place);
        let cues = &file.cues;
        let sides = &file.sides;
        let degrees = &file.severities;
        let rules = file
            .rule
            .iter()
            .enumerate()
            .map(|(n, rule)| compile_rule(spelling, n + 1, rule))
            .collect::<Result<Vec<FindingRule>, _>>()?;
        // Chinese says them at the end of the clause; elsewhere the language's distance limits them.
        let after = |words: &[String], name| match spelling {
            Spelling::WORDS => compile(&spelling.any(words), name),
            _ => compile(&format!("(?:{})[的了。）)]*$", words.join("|")), name),
        };
        Ok(Self {
            syntax: TableSyntax::of(file.syntax.as_ref())?,
            prefilter: Prefilter::of(rules.iter().map(|rule| &rule.pattern)),
            rules,
            // At one place the first group wins: a doubt that holds a negation (不能排除) is no negation.
            cues: groups(
                [&cues.pseudo, &cues.uncertain, &cues.negative, &cues.stop],
                "`cues`",
            )?,
            contrast: compile(&spelling.any(&cues.contrast), "`cues.contrast`")?,
            negative_after: after(&cues.negative_after, "`cues.negative_after`")?,
            uncertain_after: after(&cues.uncertain_after, "`cues.uncertain_after`")?,
            gone: compile(&cues.gone, "`cues.gone`")?,
            continues: compile(&cues.continues, "`cues.continues`")?,
            sides: groups(
                [&sides.ignored, &sides.bilateral, &sides.left, &sides.right],
                "`sides`",
            )?,
            emphasis: sides
                .emphasis
                .as_deref()
                .map(|pattern| compile(pattern, "`sides.emphasis`"))
                .transpose()?,
            severities: groups(
                [
                    &degrees.trace,
                    &degrees.mild,
                    &degrees.moderate,
                    &degrees.severe,
                ],
                "`severities`",
            )?,
            zones: zones(spelling, &file.zones)?,
            persists: file
                .cues
                .persists
                .as_deref()
                .map(|pattern| compile(pattern, "`cues.persists`"))
                .transpose()?,
            comparison: file
                .cues
                .comparison
                .as_deref()
                .map(|pattern| compile(pattern, "`cues.comparison`"))
                .transpose()?,
            spelling: WordSpelling::of(&file.spelling)?,
            sections: Headings::of(&file.sections, spelling)?,
            reading: file
                .reading
                .as_ref()
                .map(|file| reading(spelling, file))
                .transpose()?,
        })
    }

    /// Zones of the lung named in `text`.
    pub(super) fn zones_in(&self, text: &str) -> BTreeSet<Zone> {
        const ZONES: [Zone; 3] = [Zone::Upper, Zone::Middle, Zone::Lower];
        let found = self.zones.iter().flat_map(|zones| grouped(zones, text));
        found
            .filter_map(|(_, group)| ZONES.get(group.checked_sub(1)?).copied())
            .collect()
    }

    /// The abnormalities outside the twenty classes, in the order of the table.
    pub(super) fn others(&self) -> Vec<&OtherFinding> {
        let mut seen = BTreeSet::new();
        let named = self.rules.iter().filter_map(|rule| rule.other.as_ref());
        named.filter(|other| seen.insert(&other.key)).collect()
    }

    /// The cues of `text` with their byte ranges.
    pub(super) fn cues_in(&self, text: &str) -> Vec<(Range<usize>, Cue)> {
        const KINDS: [Cue; 4] = [Cue::Pseudo, Cue::Uncertain, Cue::Negative, Cue::Stop];
        grouped(&self.cues, text)
            .map(|(span, group)| (span, KINDS[group]))
            .collect()
    }

    /// The side words of `text` with their byte ranges.
    pub(super) fn sides_in(&self, text: &str) -> Vec<(Range<usize>, Laterality)> {
        const SIDES: [Laterality; 3] = [Laterality::Bilateral, Laterality::Left, Laterality::Right];
        grouped(&self.sides, text)
            .filter_map(|(span, group)| group.checked_sub(1).map(|side| (span, SIDES[side])))
            .collect()
    }

    /// The degree words of `text`, in text order.
    pub(super) fn severities_in<'t>(
        &'t self,
        text: &'t str,
    ) -> impl Iterator<Item = Severity> + 't {
        const DEGREES: [Severity; 4] = [
            Severity::Trace,
            Severity::Mild,
            Severity::Moderate,
            Severity::Severe,
        ];
        grouped(&self.severities, text).map(|(_, group)| DEGREES[group])
    }
}

/// Names of the groups that [`groups`] makes.
const GROUPS: [&str; 4] = ["list0", "list1", "list2", "list3"];

/// Matches of a pattern made by [`groups`]: byte range and number of the list, from 0.
fn grouped<'t>(
    pattern: &'t Regex,
    text: &'t str,
) -> impl Iterator<Item = (Range<usize>, usize)> + 't {
    pattern.captures_iter(text).filter_map(|found| {
        (0..GROUPS.len())
            .find_map(|list| found.name(GROUPS[list]).map(|words| (words.range(), list)))
    })
}

/// One pattern of four lists; where several lists match at one place, the first one wins.
fn groups(spelling: Spelling, lists: [&[String]; 4], place: &str) -> Result<Regex, FindingsError> {
    let named = |(name, words): (&&str, &[String])| format!("(?P<{name}>{})", spelling.any(words));
    spelling.compile(
        &GROUPS
            .iter()
            .zip(lists)
            .map(named)
            .collect::<Vec<_>>()
            .join("|"),
        place,
    )
}

fn zones(spelling: Spelling, file: &ZonesFile) -> Result<Option<Regex>, FindingsError> {
    if file.upper.is_empty() && file.middle.is_empty() && file.lower.is_empty() {
        return Ok(None);
    }
    // A list without words would match everywhere.
    let nothing = ["[^\\s\\S]".to_owned()];
    let list = |words: &'_ [String]| {
        if words.is_empty() {
            nothing.to_vec()
        } else {
            words.to_vec()
        }
    };
    let lists = [&file.upper, &file.middle, &file.lower].map(|words| list(words));
    groups(
        spelling,
        [&nothing, &lists[0], &lists[1], &lists[2]],
        "`zones`",
    )
    .map(Some)
}

fn reading(spelling: Spelling, file: &ReadingFile) -> Result<Reading, FindingsError> {
    let between = match spelling {
        Spelling::WORDS => r"\W",
        _ => "[、及和与]",
    };
    Ok(Reading {
        abnormal: spelling.compile(&spelling.whole(&file.abnormal), "`reading.abnormal`")?,
        seen: spelling.compile(&file.seen, "`reading.seen`")?,
        neutral: spelling.compile(
            &format!("^(?:{}|{between})+$", spelling.any(&file.neutral)),
            "`reading.neutral`",
        )?,
        inherit_side: file.inherit_side,
        or_is_doubt: file.or_is_doubt,
    })
}

fn compile_rule(
    spelling: Spelling,
    number: usize,
    rule: &RuleFile,
) -> Result<FindingRule, FindingsError> {
    let place = format!("rule {number}");
    let optional = |pattern: &Option<String>| {
        pattern
            .as_deref()
            .map(|text| spelling.compile(text, &place))
            .transpose()
    };
    let mut targets = Vec::new();
    for name in &rule.finding {
        match name.as_str() {
            "mask" => {}
            "other" => targets.push(None),
            name => match Finding::ALL
                .into_iter()
                .find(|finding| finding.key() == name)
            {
                Some(finding) => targets.push(Some(finding)),
                None => {
                    return Err(FindingsError::UnknownFinding {
                        rule: number,
                        name: name.to_owned(),
                    });
                }
            },
        }
    }
    let other = rule.name.as_ref().map(|key| OtherFinding {
        key: key.clone(),
        chinese: rule.chinese.clone().unwrap_or_else(|| key.clone()),
    });
    Ok(FindingRule {
        targets,
        other,
        pattern: spelling.compile(&spelling.whole(&rule.pattern), &place)?,
        status: rule.status,
        own_negation: rule.own_negation,
        only_negated: rule.only_negated,
        doubtful: rule.doubtful,
        only_before: optional(&rule.only_before)?,
        unless_before: optional(&rule.unless_before)?,
        only_after: optional(&rule.only_after)?,
        unless_after: optional(&rule.unless_after)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "[cues]\npseudo=['x']\nuncertain=['可能']\nnegative=['无']\nstop=['伴']\ncontrast=['但']\n\
        negative_after=['未见']\nuncertain_after=['可能']\ngone='^已'\ncontinues='^如'\n\
        [sides]\nbilateral=['双']\nleft=['左']\nright=['右']\nignored=['左旋']\n\
        [severities]\ntrace=['极']\nmild=['轻']\nmoderate=['中']\nsevere=['重']\n";

    #[test]
    fn an_unknown_finding_is_named() {
        let text = format!("{HEAD}[[rule]]\nfinding=['stroke']\npattern='x'\n");
        let error = WordTable::read(&text)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(
            error.contains("`stroke`") && error.contains("rule 1"),
            "{error}"
        );
    }

    #[test]
    fn a_broken_pattern_is_named() {
        let text = format!("{HEAD}[[rule]]\nfinding=['other']\npattern='(?<!x)y'\n");
        let error = WordTable::read(&text)
            .err()
            .map(|e| e.to_string())
            .unwrap_or_default();
        assert!(error.contains("(?<!x)y"), "{error}");
    }

    #[test]
    fn an_ignored_word_is_no_side() {
        let table = WordTable::read(&format!("{HEAD}[[rule]]\nfinding=['other']\npattern='x'\n"))
            .expect("table");
        assert_eq!(
            table
                .sides_in("左旋，右")
                .iter()
                .map(|(_, side)| *side)
                .collect::<Vec<_>>(),
            [Laterality::Right]
        );
    }
}

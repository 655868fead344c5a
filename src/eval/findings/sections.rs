//! Parts of a report: what was asked, how it was taken, what is seen, what it means.

use std::ops::Range;

use regex::Regex;
use serde::{Deserialize, Serialize};

use super::{error::FindingsError, syntax::Spelling};

/// A part of a report.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Section {
    /// No heading before it.
    #[default]
    Unnamed,
    /// 影像所见, 描述.
    Findings,
    /// 印象, 诊断.
    Impression,
    /// 病史, 临床诊断: what was known before; nothing in it is a finding.
    History,
    /// 检查方法: nothing in it is a finding.
    Technique,
    /// 对比片: nothing in it is a finding.
    Comparison,
}

impl Section {
    const NAMED: [Self; 5] = [
        Self::Findings,
        Self::Impression,
        Self::History,
        Self::Technique,
        Self::Comparison,
    ];

    /// Whether its words say what this film shows.
    pub fn is_read(self) -> bool {
        matches!(self, Self::Unnamed | Self::Findings | Self::Impression)
    }
}

/// What the parts of a report are called.
#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub(super) struct SectionsFile {
    findings: Vec<String>,
    impression: Vec<String>,
    history: Vec<String>,
    technique: Vec<String>,
    comparison: Vec<String>,
    /// Begins a sentence about this film, after a history without another heading.
    begins: Option<String>,
}

/// The headings of a table, compiled.
pub(super) struct Headings {
    /// A group a section, in brackets or with a colon.
    pattern: Regex,
    begins: Option<Regex>,
    /// Of a language of words: full stops end a history, and capitals alone make a heading.
    words: bool,
}

impl Headings {
    /// `None` for a table without headings.
    ///
    /// # Errors
    /// [`FindingsError::Pattern`].
    pub(super) fn of(
        file: &SectionsFile,
        spelling: Spelling,
    ) -> Result<Option<Self>, FindingsError> {
        // Headings are looked for before a text is folded.
        let any_case = if spelling == Spelling::WORDS {
            "(?i)"
        } else {
            ""
        };
        let compile =
            |pattern: &str, place: &str| spelling.compile(&format!("{any_case}{pattern}"), place);
        let lists = [
            &file.findings,
            &file.impression,
            &file.history,
            &file.technique,
            &file.comparison,
        ];
        let named: Vec<String> = lists
            .iter()
            .enumerate()
            .filter(|(_, words)| !words.is_empty())
            .flat_map(|(n, words)| {
                let words = words.join("|");
                [
                    format!("[【\\[《<](?P<b{n}>{words})[】\\]》>]\\s*[:：]?"),
                    // A heading that was pasted twice is one.
                    format!("(?P<c{n}>(?:{words}){{1,2}})\\s*[:：]"),
                ]
            })
            .collect();
        if named.is_empty() {
            return Ok(None);
        }
        let pattern = compile(&named.join("|"), "`sections`")?;
        let begins = file
            .begins
            .as_ref()
            .map(|words| compile(&format!("[。；\\n]\\s*(?:{words})"), "`sections.begins`"));
        Ok(Some(Self {
            pattern,
            begins: begins.transpose()?,
            words: spelling == Spelling::WORDS,
        }))
    }

    /// `clause` without the heading it begins with.
    pub(super) fn without_heading<'t>(&self, clause: &'t str) -> &'t str {
        match self.pattern.find(clause) {
            Some(found) if found.start() == 0 => &clause[found.end()..],
            _ => clause,
        }
    }

    /// The sections of `report`, headings included, in text order and without gaps.
    pub(super) fn sections(&self, report: &str) -> Vec<(Range<usize>, Section)> {
        let mut starts = vec![(0, Section::Unnamed)];
        for found in self.pattern.captures_iter(report) {
            let Some(whole) = found.get(0) else { continue };
            let before = report[..whole.start()]
                .trim_end_matches(' ')
                .chars()
                .next_back();
            // 心影诊断： is no heading: it begins inside a clause.
            let capitals = self.words && !whole.as_str().chars().any(|c| c.is_ascii_lowercase());
            let in_brackets = whole.as_str().starts_with(['[', '【', '《', '<']);
            if !capitals && !in_brackets && before.is_some_and(|before| before.is_alphanumeric()) {
                continue;
            }
            let section = (0..Section::NAMED.len()).find(|n| {
                found.name(&format!("b{n}")).is_some() || found.name(&format!("c{n}")).is_some()
            });
            if let Some(section) = section {
                starts.push((whole.start(), Section::NAMED[section]));
            }
        }
        let mut ranges = Vec::with_capacity(starts.len());
        for (n, &(start, section)) in starts.iter().enumerate() {
            let end = starts.get(n + 1).map_or(report.len(), |next| next.0);
            // What comes after the sentence of a history without another heading is the report.
            let is_last = n + 1 == starts.len();
            let text = &report[start..end];
            let begins = self.begins.as_ref().and_then(|begins| begins.find(text));
            let stop = match begins {
                Some(found) => Some(found.start()),
                None if is_last && self.words => text.find(". ").or_else(|| text.find('\n')),
                None if is_last => text.find(['。', '\n']),
                None => None,
            };
            match stop {
                Some(at) if !section.is_read() => {
                    let stop = start + at;
                    ranges.push((start..stop, section));
                    ranges.push((stop..end, Section::Unnamed));
                }
                _ => ranges.push((start..end, section)),
            }
        }
        ranges.retain(|(range, _)| !range.is_empty());
        ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::findings::{Finding, Labeler, Status};

    #[test]
    fn a_history_is_no_finding() {
        let read = Labeler::hospital().label("临床诊断：肺炎？胸片示：左侧胸腔积液。");
        assert_eq!(read.status(Finding::Pneumonia), Status::NotMentioned);
        assert_eq!(read.status(Finding::PleuralEffusion), Status::Present);
        assert_eq!(read.mentions[0].section, Section::Findings);
    }

    #[test]
    fn a_history_without_another_heading_ends_with_its_sentence() {
        let read = Labeler::hospital().label("病史：气胸术后。右侧少量气胸。");
        assert_eq!(read.status(Finding::Pneumothorax), Status::Present);
        let read =
            Labeler::hospital().label("【临床】气胸术后 【影像表现】右侧胸腔积液 【结论】积液");
        assert_eq!(read.status(Finding::Pneumothorax), Status::NotMentioned);
        assert_eq!(read.status(Finding::PleuralEffusion), Status::Present);
        let read = Labeler::hospital().label("【病史】气胸。\n【诊断】心影增大。");
        assert_eq!(read.status(Finding::Pneumothorax), Status::NotMentioned);
        assert_eq!(read.mentions[0].section, Section::Impression);
    }
}

//! The table of reviewed terms: read from TOML, compiled, and looked for in reports.

use std::sync::LazyLock;

use regex::Regex;
use serde::Deserialize;

use super::{
    defects::{CorpusReport, Defect},
    error::CleanError,
};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TermsFile {
    term: Vec<TermFile>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TermFile {
    defect: String,
    pattern: String,
    replacement: Option<String>,
    only_before: Option<String>,
    unless_before: Option<String>,
    only_after: Option<String>,
    unless_after: Option<String>,
    only_source: Option<String>,
    unless_source: Option<String>,
    reason: String,
    // For the readers of the table; required, so that no term comes in unread.
    #[serde(rename = "reviewed")]
    _reviewed: String,
}

struct Term {
    defect: String,
    pattern: Regex,
    replacement: Option<String>,
    only_before: Option<Regex>,
    unless_before: Option<Regex>,
    only_after: Option<Regex>,
    unless_after: Option<Regex>,
    only_source: Option<Regex>,
    unless_source: Option<Regex>,
    reason: String,
}

/// A table of reviewed terms.
pub struct TermTable {
    terms: Vec<Term>,
}

static BUILT_IN: LazyLock<TermTable> = LazyLock::new(|| {
    TermTable::from_toml(include_str!("terms.toml"))
        .expect("the built-in terms are checked by a test")
});

impl TermTable {
    /// The table of this crate, for the OpenI-zh corpus.
    ///
    /// # Panics
    /// Never with the published table: a test compiles it.
    pub fn built_in() -> &'static Self {
        &BUILT_IN
    }

    /// Reads another table of the same form.
    ///
    /// # Errors
    /// [`CleanError::Table`] and [`CleanError::Pattern`].
    pub fn from_toml(text: &str) -> Result<Self, CleanError> {
        let file: TermsFile = toml::from_str(text)?;
        let terms = file
            .term
            .into_iter()
            .map(compile)
            .collect::<Result<_, _>>()?;
        Ok(Self { terms })
    }

    /// Names of the defects, in the order of the table; a name may come several times.
    pub fn defects(&self) -> impl Iterator<Item = &str> {
        self.terms.iter().map(|term| term.defect.as_str())
    }

    /// Every place of `rows` with a defect, by row, then by place.
    pub fn find_defects(&self, rows: &[CorpusReport]) -> Vec<Defect> {
        rows.iter().flat_map(|row| self.row_defects(row)).collect()
    }

    fn row_defects(&self, row: &CorpusReport) -> Vec<Defect> {
        let mut taken: Vec<(usize, usize)> = Vec::new();
        let mut defects = Vec::new();
        for term in self
            .terms
            .iter()
            .filter(|term| term.fits_source(row.source.as_deref()))
        {
            for found in term.pattern.find_iter(&row.text) {
                let (start, end) = (found.start(), found.end());
                let sentence = sentence_around(&row.text, start, end);
                if !term.fits(&row.text[sentence.0..start], &row.text[end..sentence.1])
                    || taken.iter().any(|&(from, to)| from < end && start < to)
                {
                    continue;
                }
                if term.replacement.is_some() {
                    taken.push((start, end));
                }
                defects.push(Defect {
                    file: row.file.clone(),
                    row: row.row,
                    id: row.id.clone(),
                    defect: term.defect.clone(),
                    start,
                    before: found.as_str().to_owned(),
                    after: term.replacement.clone(),
                    sentence: row.text[sentence.0..sentence.1].to_owned(),
                    reason: term.reason.clone(),
                });
            }
        }
        defects.sort_by_key(|defect| defect.start);
        defects
    }
}

impl Term {
    fn fits_source(&self, source: Option<&str>) -> bool {
        let wanted = |pattern: &Option<Regex>, want: bool| match (pattern, source) {
            (None, _) => true,
            (Some(pattern), Some(source)) => pattern.is_match(source) == want,
            (Some(_), None) => false,
        };
        wanted(&self.only_source, true) && wanted(&self.unless_source, false)
    }

    fn fits(&self, before: &str, after: &str) -> bool {
        let is = |pattern: &Option<Regex>, text, default| {
            pattern.as_ref().map_or(default, |p| p.is_match(text))
        };
        is(&self.only_before, before, true)
            && is(&self.only_after, after, true)
            && !is(&self.unless_before, before, false)
            && !is(&self.unless_after, after, false)
    }
}

fn compile(term: TermFile) -> Result<Term, CleanError> {
    let regex = |pattern: &str| {
        Regex::new(pattern).map_err(|cause| CleanError::Pattern {
            defect: term.defect.clone(),
            pattern: pattern.to_owned(),
            cause: Box::new(cause),
        })
    };
    let optional = |pattern: &Option<String>| pattern.as_deref().map(regex).transpose();
    Ok(Term {
        pattern: regex(&term.pattern)?,
        only_before: optional(&term.only_before)?,
        unless_before: optional(&term.unless_before)?,
        only_after: optional(&term.only_after)?,
        unless_after: optional(&term.unless_after)?,
        only_source: optional(&term.only_source)?,
        unless_source: optional(&term.unless_source)?,
        replacement: term.replacement,
        reason: term.reason,
        defect: term.defect,
    })
}

/// Byte range of the sentence around `start..end`, with its stop.
fn sentence_around(text: &str, start: usize, end: usize) -> (usize, usize) {
    let stops = ['。', '；', '！', '？', '\n'];
    let from = text[..start].rfind(stops).map_or(0, |at| {
        at + text[at..].chars().next().map_or(1, char::len_utf8)
    });
    let to = text[end..].find(stops).map_or(text.len(), |at| {
        end + at + text[end + at..].chars().next().map_or(1, char::len_utf8)
    });
    (from, to)
}

/// Every place of `rows` with a defect of the built-in table, by row, then by place.
pub fn find_defects(rows: &[CorpusReport]) -> Vec<Defect> {
    TermTable::built_in().find_defects(rows)
}

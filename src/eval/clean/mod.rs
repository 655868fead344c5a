//! Finds translation defects in a report corpus and proposes corrections; nothing is changed in silence.
//!
//! The reviewed terms are in `terms.toml`. [`find_defects`] lists every place with the words before and
//! after, [`apply`] changes only the places it is given, [`unified_diff`] shows what changed, and [`correct_json`]
//! writes a corrected copy of a corpus file.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::LazyLock,
};

use regex::Regex;
use serde::{Deserialize, Serialize};

mod files;
#[cfg(test)]
mod tests;

pub use files::{correct_json, read_rows, to_jsonl, unified_diff};

/// What can be wrong with terms, accepted defects or corpus files.
#[derive(Debug, thiserror::Error)]
pub enum CleanError {
    /// The term table is not TOML of the expected form.
    #[error(
        "cannot read the term table; expected `[[term]]` with `defect`, `pattern`, `reason` and `reviewed`"
    )]
    Table(#[from] toml::de::Error),
    /// A pattern is not a regular expression.
    #[error("pattern `{pattern}` of the defect `{defect}` is not a regular expression")]
    Pattern {
        /// Name of the defect.
        defect: String,
        /// The pattern.
        pattern: String,
        /// What the compiler of patterns says.
        #[source]
        cause: Box<regex::Error>,
    },
    /// An accepted defect names a row that is not there.
    #[error("`{file}` has no row {}; expected the rows the defects were found in", .row + 1)]
    NoSuchRow {
        /// File of the defect.
        file: String,
        /// Row of the defect.
        row: usize,
    },
    /// The text has changed since the defect was found.
    #[error(
        "`{file}` row {}: expected `{expected}` at byte {start}; hint: find the defects again", .row + 1
    )]
    TextChanged {
        /// File of the defect.
        file: String,
        /// Row of the defect.
        row: usize,
        /// Byte where the words were.
        start: usize,
        /// The words.
        expected: String,
    },
    /// Two accepted defects want the same bytes.
    #[error(
        "`{file}` row {}: two accepted defects overlap at byte {start}; hint: accept one of them", .row + 1
    )]
    Overlap {
        /// File of the defects.
        file: String,
        /// Row of the defects.
        row: usize,
        /// Byte where the second one starts.
        start: usize,
    },
    /// A corpus file is not JSON.
    #[error("`{file}` is not JSON")]
    Json {
        /// The file.
        file: String,
        /// What the reader says.
        #[source]
        cause: serde_json::Error,
    },
    /// A line of a corpus file is not JSON.
    #[error("`{file}` row {} is not JSON", .row + 1)]
    Line {
        /// The file.
        file: String,
        /// Row, from 0.
        row: usize,
        /// What the reader says.
        #[source]
        cause: serde_json::Error,
    },
    /// A corpus file lacks a row or its text.
    #[error(
        "`{file}` row {}: expected `label` and `img` in a list, `caption` and `image_id` in `annotations`, or `messages` with an answer at the end", .row + 1
    )]
    Schema {
        /// The file.
        file: String,
        /// Row, from 0.
        row: usize,
    },
}

/// One report of a corpus file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Name of the file, for messages.
    pub file: String,
    /// Row in the file, from 0.
    pub row: usize,
    /// Id of the picture, such as `162_1`.
    pub id: String,
    /// The Chinese report.
    pub text: String,
    /// The English text it was translated from, if known: some defects can only be seen with it.
    pub source: Option<String>,
}

/// One place with a defect.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defect {
    /// File of the row.
    pub file: String,
    /// Row in the file, from 0.
    pub row: usize,
    /// Id of the picture.
    pub id: String,
    /// Name of the defect, as in the term table.
    pub defect: String,
    /// First byte of the words in the text.
    pub start: usize,
    /// The words as they are.
    pub before: String,
    /// The proposed words; `None` where a reader must decide.
    pub after: Option<String>,
    /// The sentence, to judge by.
    pub sentence: String,
    /// What went wrong.
    pub reason: String,
}

/// A row that was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Correction {
    /// File of the row.
    pub file: String,
    /// Row in the file, from 0.
    pub row: usize,
    /// Id of the picture.
    pub id: String,
    /// Names of the defects corrected, in text order.
    pub defects: Vec<String>,
    /// The text before.
    pub before: String,
    /// The text after.
    pub after: String,
}

/// How often a defect occurs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct DefectCount {
    /// Places.
    pub places: usize,
    /// Rows with at least one.
    pub rows: usize,
    /// Studies with at least one: the id up to its first `_`.
    pub studies: usize,
}

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
    pub fn find_defects(&self, rows: &[Row]) -> Vec<Defect> {
        rows.iter().flat_map(|row| self.row_defects(row)).collect()
    }

    fn row_defects(&self, row: &Row) -> Vec<Defect> {
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
pub fn find_defects(rows: &[Row]) -> Vec<Defect> {
    TermTable::built_in().find_defects(rows)
}

/// Corrects the places in `accepted` and gives the rows that changed; those without a proposal stay.
///
/// # Errors
/// [`CleanError::NoSuchRow`], [`CleanError::TextChanged`] and [`CleanError::Overlap`] when `accepted` does not fit
/// `rows`.
pub fn apply(rows: &[Row], accepted: &[Defect]) -> Result<Vec<Correction>, CleanError> {
    let by_place: BTreeMap<(&str, usize), &Row> = rows
        .iter()
        .map(|row| ((row.file.as_str(), row.row), row))
        .collect();
    let mut wanted: BTreeMap<(&str, usize), Vec<&Defect>> = BTreeMap::new();
    for defect in accepted.iter().filter(|defect| defect.after.is_some()) {
        wanted
            .entry((&defect.file, defect.row))
            .or_default()
            .push(defect);
    }
    let mut corrections = Vec::new();
    for ((file, number), mut defects) in wanted {
        let missing = || CleanError::NoSuchRow {
            file: file.to_owned(),
            row: number,
        };
        let row = by_place.get(&(file, number)).ok_or_else(missing)?;
        defects.sort_by_key(|defect| defect.start);
        let mut after = String::with_capacity(row.text.len());
        let mut done = 0;
        for defect in &defects {
            if defect.start < done {
                return Err(CleanError::Overlap {
                    file: file.to_owned(),
                    row: number,
                    start: defect.start,
                });
            }
            let end = defect.start + defect.before.len();
            if row.text.get(defect.start..end) != Some(&defect.before) {
                return Err(CleanError::TextChanged {
                    file: file.to_owned(),
                    row: number,
                    start: defect.start,
                    expected: defect.before.clone(),
                });
            }
            after.push_str(&row.text[done..defect.start]);
            after.push_str(defect.after.as_deref().unwrap_or(&defect.before));
            done = end;
        }
        after.push_str(&row.text[done..]);
        corrections.push(Correction {
            file: file.to_owned(),
            row: number,
            id: row.id.clone(),
            defects: defects.iter().map(|defect| defect.defect.clone()).collect(),
            before: row.text.clone(),
            after,
        });
    }
    Ok(corrections)
}

/// Number of places, rows with one, studies with one.
type Places<'a> = (usize, BTreeSet<(&'a str, usize)>, BTreeSet<&'a str>);

/// How often each defect occurs.
pub fn count_defects(defects: &[Defect]) -> BTreeMap<String, DefectCount> {
    let mut seen: BTreeMap<&str, Places> = BTreeMap::new();
    for defect in defects {
        let (places, rows, studies) = seen.entry(&defect.defect).or_default();
        *places += 1;
        rows.insert((&defect.file, defect.row));
        studies.insert(defect.id.split('_').next().unwrap_or_default());
    }
    seen.into_iter()
        .map(|(name, (places, rows, studies))| {
            (
                name.to_owned(),
                DefectCount {
                    places,
                    rows: rows.len(),
                    studies: studies.len(),
                },
            )
        })
        .collect()
}

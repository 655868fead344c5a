//! Reports, the defects found in them, and the corrections of those that were accepted.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::error::CleanError;

/// One report of a corpus file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorpusReport {
    /// Name of the file, for messages.
    pub file: String,
    /// CorpusReport in the file, from 0.
    pub row: usize,
    /// Id of the image, such as `162_1`.
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
    /// CorpusReport in the file, from 0.
    pub row: usize,
    /// Id of the image.
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
    /// CorpusReport in the file, from 0.
    pub row: usize,
    /// Id of the image.
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

/// Corrects the places in `accepted` and gives the rows that changed; those without a proposal stay.
///
/// # Errors
/// [`CleanError::NoSuchRow`], [`CleanError::TextChanged`] and [`CleanError::Overlap`] when `accepted` does not fit
/// `rows`.
pub fn apply(rows: &[CorpusReport], accepted: &[Defect]) -> Result<Vec<Correction>, CleanError> {
    let by_place: BTreeMap<(&str, usize), &CorpusReport> = rows
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
type DefectPlaces<'a> = (usize, BTreeSet<(&'a str, usize)>, BTreeSet<&'a str>);

/// How often each defect occurs.
pub fn count_defects(defects: &[Defect]) -> BTreeMap<String, DefectCount> {
    let mut seen: BTreeMap<&str, DefectPlaces> = BTreeMap::new();
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

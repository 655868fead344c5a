//! Rows that say the same: inside one file, and between training and validation.

use std::collections::{HashMap, HashSet};
use std::path::Path;

use super::{DataFile, Finding, Kind, Row, Severity};

/// Rows that repeat an earlier one, and rows whose images had another answer before.
pub(super) fn duplicates(file: &Path, rows: &[Row]) -> Vec<Finding> {
    let mut said: HashMap<(&[String], &[u8; 32]), usize> = HashMap::new();
    let mut first: HashMap<&[String], &Row> = HashMap::new();
    let mut findings = Vec::new();
    for row in rows.iter().filter(|row| row.is_whole()) {
        let hashes = row.hashes.as_slice();
        if let Some(line) = said.get(&(hashes, &row.conversation)) {
            let message = format!("same images and same conversation as line {line}");
            let (error, kind) = (Severity::Error, Kind::Duplicate);
            findings.push(Finding::new(error, kind, file, row.line, message));
            continue;
        }
        said.insert((hashes, &row.conversation), row.line);
        if hashes.is_empty() || row.report().is_empty() {
            continue;
        }
        let earlier = *first.entry(hashes).or_insert(row);
        if earlier.report() != row.report() {
            let message = format!("same images as line {} with another answer", earlier.line);
            let (warning, kind) = (Severity::Warning, Kind::AnswersDiffer);
            findings.push(Finding::new(warning, kind, file, row.line, message));
        }
    }
    findings
}

/// The study an image is of, as far as its name tells: a number, or something with a digit in it
/// followed by `_` and a number.
fn study(path: &Path) -> Option<&str> {
    let stem = path.file_stem()?.to_str()?;
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let has_digit = |text: &str| text.bytes().any(|b| b.is_ascii_digit());
    match stem.rsplit_once('_') {
        Some((uid, view)) => (is_number(view) && has_digit(uid)).then_some(uid),
        None => is_number(stem).then_some(stem),
    }
}

/// Studies of a row; `None` if a name does not tell.
fn studies(row: &Row) -> Option<HashSet<&str>> {
    let studies: Option<HashSet<&str>> = row.paths.iter().map(|path| study(path)).collect();
    studies.filter(|studies| !studies.is_empty())
}

/// Training rows with one report.
struct SameReport<'a> {
    first: &'a Row,
    count: usize,
    /// A row whose images' names tell no study.
    unnamed: Option<&'a Row>,
    by_study: HashMap<&'a str, &'a Row>,
}

impl<'a> SameReport<'a> {
    fn new(first: &'a Row) -> Self {
        Self {
            first,
            count: 0,
            unnamed: None,
            by_study: HashMap::new(),
        }
    }

    fn add(&mut self, row: &'a Row) {
        self.count += 1;
        match studies(row) {
            None => self.unnamed = self.unnamed.or(Some(row)),
            Some(studies) => studies.into_iter().for_each(|study| {
                self.by_study.entry(study).or_insert(row);
            }),
        }
    }

    /// A training row that may be of the same study as `row`; `None` if the names of the images
    /// show that all are of others.
    fn of_same_study(&self, row: &Row) -> Option<&'a Row> {
        let Some(studies) = studies(row) else {
            return Some(self.first);
        };
        let named = studies.iter().find_map(|study| self.by_study.get(study));
        named.copied().or(self.unnamed)
    }
}

/// What validation shares with training.
pub(super) fn between(train: &DataFile, val: &DataFile) -> Vec<Finding> {
    let mut by_hash: HashMap<&str, &Row> = HashMap::new();
    let mut by_study: HashMap<(Option<&Path>, &str), &Row> = HashMap::new();
    let mut by_report: HashMap<&str, SameReport<'_>> = HashMap::new();
    for row in &train.rows {
        for hash in &row.hashes {
            by_hash.entry(hash).or_insert(row);
        }
        for path in &row.paths {
            if let Some(study) = study(path) {
                // The same number in another folder may be another collection's.
                by_study.entry((path.parent(), study)).or_insert(row);
            }
        }
        if !row.report().is_empty() {
            let same = by_report.entry(row.report());
            same.or_insert_with(|| SameReport::new(row)).add(row);
        }
    }
    let name = train.path.display();
    let mut findings = Vec::new();
    for row in &val.rows {
        let mut found = |severity, kind, message| {
            findings.push(Finding::new(severity, kind, &val.path, row.line, message));
        };
        if let Some(other) = row
            .hashes
            .iter()
            .find_map(|hash| by_hash.get(hash.as_str()))
        {
            let message = format!("the image is also in `{name}` line {}", other.line);
            found(Severity::Error, Kind::LeakImage, message);
        }
        let of_study = row.paths.iter().find_map(|path| {
            let study = study(path)?;
            Some((study, by_study.get(&(path.parent(), study))?))
        });
        if let Some((study, other)) = of_study {
            let message = format!("study `{study}` is also in `{name}` line {}", other.line);
            found(Severity::Error, Kind::LeakStudy, message);
        }
        let Some(same) = by_report.get(row.report()) else {
            continue;
        };
        match same.of_same_study(row) {
            Some(other) => {
                let message = format!("the report is also in `{name}` line {}", other.line);
                found(Severity::Error, Kind::LeakReport, message);
            }
            // Reports of healthy lungs are often alike to the letter.
            None => {
                let message = format!(
                    "the report is also in `{name}` line {}, about another study; {} rows there have it",
                    same.first.line, same.count
                );
                found(Severity::Warning, Kind::LeakReport, message);
            }
        }
    }
    findings
}

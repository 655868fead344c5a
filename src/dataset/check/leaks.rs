//! Rows with the same content: inside one file, and between training and validation.

use std::collections::HashMap;
use std::path::Path;

use super::data_file::{CheckedRow, DataFile};
use super::finding::{Finding, Kind, Severity};
use crate::study::{Studies, StudyError, StudyFacts, StudyRow, StudyRule, counted};

/// Rows that repeat an earlier one, and rows whose images had another answer before.
pub(super) fn duplicates(file: &Path, rows: &[CheckedRow]) -> Vec<Finding> {
    let mut seen: HashMap<(&[String], &[u8; 32]), usize> = HashMap::new();
    let mut first: HashMap<&[String], &CheckedRow> = HashMap::new();
    let mut findings = Vec::new();
    for row in rows.iter().filter(|row| row.is_whole()) {
        let hashes = row.hashes.as_slice();
        if let Some(line) = seen.get(&(hashes, &row.conversation)) {
            let message = format!("same images and same conversation as line {line}");
            let (error, kind) = (Severity::Error, Kind::Duplicate);
            findings.push(Finding::new(error, kind, file, row.line, message));
            continue;
        }
        seen.insert((hashes, &row.conversation), row.line);
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

/// Training rows with one report.
struct SameReport<'a> {
    first: &'a CheckedRow,
    count: usize,
    /// A row whose study is not known.
    unknown: Option<&'a CheckedRow>,
    by_study: HashMap<&'a str, &'a CheckedRow>,
}

/// A row and its study.
#[derive(Clone, Copy)]
struct InStudy<'a> {
    row: &'a CheckedRow,
    id: &'a str,
    patient: Option<&'a str>,
    certain: bool,
}

impl<'a> SameReport<'a> {
    fn new(first: &'a CheckedRow) -> Self {
        Self {
            first,
            count: 0,
            unknown: None,
            by_study: HashMap::new(),
        }
    }

    fn add(&mut self, one: InStudy<'a>) {
        self.count += 1;
        if one.certain {
            self.by_study.entry(one.id).or_insert(one.row);
        } else {
            self.unknown = self.unknown.or(Some(one.row));
        }
    }

    /// A training row that may be of the same study; `None` if all are of others.
    fn of_same_study(&self, one: InStudy<'_>) -> Option<&'a CheckedRow> {
        if !one.certain {
            return Some(self.first);
        }
        self.by_study.get(one.id).copied().or(self.unknown)
    }
}

/// Finds the studies of all files together, and adds what validation shares with training.
///
/// # Errors
/// [`StudyError`] if the rule does not fit a row.
pub(super) fn studies(
    files: &mut [DataFile],
    rule: &StudyRule,
) -> Result<Option<StudyFacts>, StudyError> {
    let rows: Vec<StudyRow> = files
        .iter()
        .flat_map(|file| {
            let folder = file.path.parent().unwrap_or(Path::new(""));
            file.rows.iter().map(move |row| StudyRow {
                name: format!("`{}` row {}", file.path.display(), row.line),
                keys: row.sample.keys.clone(),
                images: row.sample.images.clone(),
                folder: folder.to_string_lossy().into_owned(),
            })
        })
        .collect();
    if rows.is_empty() {
        return Ok(None);
    }
    let studies = rule.studies(&rows)?;
    if let [train, val] = files {
        let found = between(train, val, &studies);
        val.findings.extend(found);
    }
    if let Some(file) = files.first_mut() {
        let doubts = studies.doubts.iter().map(|doubt| {
            Finding::new(
                Severity::Warning,
                Kind::Studies,
                &file.path,
                0,
                doubt.english(),
            )
        });
        let doubts: Vec<Finding> = doubts.collect();
        file.findings.extend(doubts);
    }
    Ok(Some(studies.facts))
}

/// What validation shares with training.
fn between(train: &DataFile, val: &DataFile, studies: &Studies) -> Vec<Finding> {
    let in_study = |row, at: usize| InStudy {
        row,
        id: &studies.ids[at],
        patient: studies.patients[at].as_deref(),
        certain: studies.certain[at],
    };
    let mut by_hash: HashMap<&str, &CheckedRow> = HashMap::new();
    let mut by_study: HashMap<&str, &CheckedRow> = HashMap::new();
    let mut by_patient: HashMap<&str, &CheckedRow> = HashMap::new();
    let mut by_report: HashMap<&str, SameReport<'_>> = HashMap::new();
    for (at, row) in train.rows.iter().enumerate() {
        let one = in_study(row, at);
        for hash in &row.hashes {
            by_hash.entry(hash).or_insert(row);
        }
        by_study.entry(one.id).or_insert(row);
        if let Some(patient) = one.patient {
            by_patient.entry(patient).or_insert(row);
        }
        if !row.report().is_empty() {
            let same = by_report.entry(row.report());
            same.or_insert_with(|| SameReport::new(row)).add(one);
        }
    }
    let name = train.path.display();
    let mut findings = Vec::new();
    for (at, row) in val.rows.iter().enumerate() {
        let one = in_study(row, train.rows.len() + at);
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
        if let Some(other) = by_study.get(one.id) {
            let message = format!("study `{}` is also in `{name}` line {}", one.id, other.line);
            found(Severity::Error, Kind::LeakStudy, message);
        } else if let Some((patient, other)) = one
            .patient
            .and_then(|patient| Some((patient, by_patient.get(patient)?)))
        {
            let message = format!(
                "patient `{patient}` is also in `{name}` line {}",
                other.line
            );
            found(Severity::Error, Kind::LeakPatient, message);
        }
        let Some(same) = by_report.get(row.report()) else {
            continue;
        };
        match same.of_same_study(one) {
            Some(other) => {
                let message = format!("the report is also in `{name}` line {}", other.line);
                found(Severity::Error, Kind::LeakReport, message);
            }
            // Reports of healthy lungs are often alike to the letter.
            None => {
                let message = format!(
                    "the report is also in `{name}` line {}, about another study; {} there {} it",
                    same.first.line,
                    counted(same.count, "row", "rows"),
                    if same.count == 1 { "has" } else { "have" }
                );
                found(Severity::Warning, Kind::LeakReport, message);
            }
        }
    }
    findings
}

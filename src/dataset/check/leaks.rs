//! Rows with the same content: inside one file, and between training and validation.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use super::data_file::{CheckedRow, DataFile};
use super::finding::{Finding, Kind, Severity};
use crate::study::{Studies, StudyError, StudyFacts, StudyRow, StudyRule, counted};

/// A row and its file.
#[derive(Clone, Copy)]
struct Place<'a> {
    file: &'a Path,
    row: &'a CheckedRow,
}

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` line {}", self.file.display(), self.row.line)
    }
}

/// All rows of some files.
fn places(files: &[DataFile]) -> impl Iterator<Item = (usize, Place<'_>)> {
    files.iter().enumerate().flat_map(|(at, file)| {
        let place = move |row| Place {
            file: &file.path,
            row,
        };
        file.rows.iter().map(move |row| (at, place(row)))
    })
}

/// Adds to the files of one side which rows repeat an earlier one, and which have the images of an earlier one with
/// another answer.
pub(super) fn duplicates(files: &mut [DataFile]) {
    let mut seen: HashMap<(&[String], &[u8; 32]), Place<'_>> = HashMap::new();
    let mut first: HashMap<&[String], Place<'_>> = HashMap::new();
    let mut findings: Vec<(usize, Finding)> = Vec::new();
    for (at, place) in places(files).filter(|(_, place)| place.row.is_whole()) {
        let Place { file, row } = place;
        let named = |other: &Place<'_>| match other.file == file {
            true => format!("line {}", other.row.line),
            false => other.to_string(),
        };
        let hashes = row.hashes.as_slice();
        if let Some(other) = seen.get(&(hashes, &row.conversation)) {
            let message = format!("same images and same conversation as {}", named(other));
            let (error, kind) = (Severity::Error, Kind::Duplicate);
            findings.push((at, Finding::new(error, kind, file, row.line, message)));
            continue;
        }
        seen.insert((hashes, &row.conversation), place);
        if hashes.is_empty() || row.report().is_empty() {
            continue;
        }
        let earlier = *first.entry(hashes).or_insert(place);
        if earlier.row.report() != row.report() {
            let message = format!("same images as {} with another answer", named(&earlier));
            let (warning, kind) = (Severity::Warning, Kind::AnswersDiffer);
            findings.push((at, Finding::new(warning, kind, file, row.line, message)));
        }
    }
    for (at, finding) in findings {
        files[at].findings.push(finding);
    }
}

/// Training rows with one report.
struct SameReport<'a> {
    first: Place<'a>,
    count: usize,
    /// A row whose study is not known.
    unknown: Option<Place<'a>>,
    by_study: HashMap<&'a str, Place<'a>>,
}

/// A row and its study.
#[derive(Clone, Copy)]
struct InStudy<'a> {
    place: Place<'a>,
    id: &'a str,
    patient: Option<&'a str>,
    certain: bool,
}

impl<'a> SameReport<'a> {
    fn new(first: Place<'a>) -> Self {
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
            self.by_study.entry(one.id).or_insert(one.place);
        } else {
            self.unknown = self.unknown.or(Some(one.place));
        }
    }

    /// A training row that may be of the same study; `None` if all are of others.
    fn of_same_study(&self, one: InStudy<'_>) -> Option<Place<'a>> {
        if !one.certain {
            return Some(self.first);
        }
        self.by_study.get(one.id).copied().or(self.unknown)
    }
}

/// Finds the studies of all files together, and adds what validation shares with the first `training` files.
///
/// # Errors
/// [`StudyError`] if the rule does not fit a row.
pub(super) fn studies(
    files: &mut [DataFile],
    training: usize,
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
    let (train, val) = files.split_at_mut(training);
    for (at, finding) in between(train, val, &studies) {
        val[at].findings.push(finding);
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

/// What validation shares with training, each with the place of its file.
fn between(train: &[DataFile], val: &[DataFile], studies: &Studies) -> Vec<(usize, Finding)> {
    let in_study = |place, at: usize| InStudy {
        place,
        id: &studies.ids[at],
        patient: studies.patients[at].as_deref(),
        certain: studies.certain[at],
    };
    let mut by_hash: HashMap<&str, Place<'_>> = HashMap::new();
    let mut by_study: HashMap<&str, Place<'_>> = HashMap::new();
    let mut by_patient: HashMap<&str, Place<'_>> = HashMap::new();
    let mut by_report: HashMap<&str, SameReport<'_>> = HashMap::new();
    let mut trained = 0;
    for (_, place) in places(train) {
        let one = in_study(place, trained);
        trained += 1;
        for hash in &place.row.hashes {
            by_hash.entry(hash).or_insert(place);
        }
        by_study.entry(one.id).or_insert(place);
        if let Some(patient) = one.patient {
            by_patient.entry(patient).or_insert(place);
        }
        if !place.row.report().is_empty() {
            let same = by_report.entry(place.row.report());
            same.or_insert_with(|| SameReport::new(place)).add(one);
        }
    }
    let mut findings = Vec::new();
    for (at, (file, place)) in places(val).enumerate() {
        let row = place.row;
        let one = in_study(place, trained + at);
        let mut found = |severity, kind, message| {
            let finding = Finding::new(severity, kind, place.file, row.line, message);
            findings.push((file, finding));
        };
        if let Some(other) = row
            .hashes
            .iter()
            .find_map(|hash| by_hash.get(hash.as_str()))
        {
            let message = format!("the image is also in {other}");
            found(Severity::Error, Kind::LeakImage, message);
        }
        if let Some(other) = by_study.get(one.id) {
            let message = format!("study `{}` is also in {other}", one.id);
            found(Severity::Error, Kind::LeakStudy, message);
        } else if let Some((patient, other)) = one
            .patient
            .and_then(|patient| Some((patient, by_patient.get(patient)?)))
        {
            let message = format!("patient `{patient}` is also in {other}");
            found(Severity::Error, Kind::LeakPatient, message);
        }
        let Some(same) = by_report.get(row.report()) else {
            continue;
        };
        match same.of_same_study(one) {
            Some(other) => {
                let message = format!("the report is also in {other}");
                found(Severity::Error, Kind::LeakReport, message);
            }
            // Reports of healthy lungs are often alike to the letter.
            None => {
                let message = format!(
                    "the report is also in {}, about another study; {} there {} it",
                    same.first,
                    counted(same.count, "row", "rows"),
                    if same.count == 1 { "has" } else { "have" }
                );
                found(Severity::Warning, Kind::LeakReport, message);
            }
        }
    }
    findings
}

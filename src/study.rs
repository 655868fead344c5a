//! What a study is, and whose: the one rule for every command that splits, scores or compares by study.
//!
//! A row names its study under a key ([`STUDY_KEYS`], [`PATIENT_KEYS`]); else a rule of the user decides
//! ([`StudyRule`]); else it is guessed from the paths of the images, and the guess is reported with its count.
//! Knows no tensor, and opens no file.

mod doubt;
mod guess;
mod row;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use regex::Regex;
use serde::Serialize;

pub use doubt::StudyDoubt;
use guess::{GuessedStudy, PathForm, folder_and_stem, guesses, joined, views_apart};
pub use row::{PATIENT_KEYS, STUDY_KEYS, StudyRow, keys_of};

/// More reports of one study than this are a sign of a wrong rule: a study holds a few views.
const MANY_REPORTS: usize = 16;

/// A rule that does not fit the rows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StudyError {
    /// The expression is none, or has no group.
    #[error("`{regex}` cannot name a study: {reason}")]
    Regex {
        /// As given.
        regex: String,
        /// Why.
        reason: String,
    },
    /// A row lacks the key.
    #[error(
        "{row} has no key `{key}`, which names the study; expected a text or a number in every row"
    )]
    Key {
        /// What the row is called.
        row: String,
        /// The key that was named.
        key: String,
    },
    /// The expression does not match a path.
    #[error(
        "{row}: image `{image}` does not match `{regex}`, which names the study; expected a match in every path"
    )]
    NoMatch {
        /// What the row is called.
        row: String,
        /// The image as the row names it.
        image: String,
        /// As given.
        regex: String,
    },
}

/// How the study of a row is found where the row does not name it.
#[derive(Debug, Clone, Default)]
pub enum StudyRule {
    /// StudySource the paths of all images together.
    #[default]
    Guess,
    /// Under this key of the row, before all others.
    Key(String),
    /// What the group `study`, else the first group, matches in the path; a group `patient` names the patient.
    Regex(Regex),
    /// The folder of the image.
    Folder,
    /// What precedes the first `_` of the file name.
    Name,
    /// Every image is a study of its own.
    Image,
}

impl StudyRule {
    /// The rule of an expression.
    ///
    /// # Errors
    /// [`StudyError::Regex`] if it is none, or has no group.
    pub fn regex(text: &str) -> Result<Self, StudyError> {
        let wrong = |reason: String| StudyError::Regex {
            regex: text.to_owned(),
            reason,
        };
        let regex =
            Regex::new(text).map_err(|cause| wrong(cause.to_string().replace('\n', " ")))?;
        if regex.captures_len() < 2 {
            return Err(wrong(
                "it has no group; expected one around the study, such as `(p[0-9]+/s[0-9]+)/`"
                    .into(),
            ));
        }
        Ok(Self::Regex(regex))
    }

    /// Whether the user has named it.
    pub fn is_given(&self) -> bool {
        !matches!(self, Self::Guess)
    }
}

/// How the studies were found, for files.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct StudyFacts {
    /// Where the studies come from, in words.
    pub from: String,
    /// Whether any of them was guessed.
    pub guessed: bool,
    /// Number of reports.
    pub reports: usize,
    /// Number of studies.
    pub studies: usize,
    /// Number of patients; `None` if not every row's is known.
    pub patients: Option<usize>,
}

/// The studies of rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Studies {
    /// The study of each row; equal texts are one study.
    pub ids: Vec<String>,
    /// The study of each row without its folder: what is left where two files name the same images by other paths.
    pub names: Vec<String>,
    /// The patient of each row, where known.
    pub patients: Vec<Option<String>>,
    /// What a split must keep together, a number a row: the patient where known, else the study.
    pub groups: Vec<usize>,
    /// Whether the row, its rule or a known form of its name says which study it is. False for a name that merely
    /// differs.
    pub certain: Vec<bool>,
    /// How they were found.
    pub facts: StudyFacts,
    /// Reasons for the reader to look at them.
    pub doubts: Vec<StudyDoubt>,
}

/// The study of one row, before rows are joined.
struct RowStudy {
    ids: Vec<String>,
    name: String,
    patient: Option<String>,
    certain: bool,
    from: StudySource,
}

/// Where a study comes from.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum StudySource {
    Key(String),
    Rule,
    Guess(PathForm),
}

impl StudyRule {
    /// The studies of `rows`, which are looked at together: leave out none that are to be compared.
    ///
    /// # Errors
    /// [`StudyError`] names the row that a rule of the user does not fit.
    pub fn studies(&self, rows: &[StudyRow]) -> Result<Studies, StudyError> {
        let guessed = guesses(rows);
        let found: Vec<RowStudy> = rows
            .iter()
            .zip(&guessed)
            .enumerate()
            .map(|(at, (row, guess))| self.row_study(at, row, guess))
            .collect::<Result<_, _>>()?;
        Ok(join(self, rows, found))
    }

    /// The study of one row.
    fn row_study(
        &self,
        at: usize,
        row: &StudyRow,
        guess: &[GuessedStudy],
    ) -> Result<RowStudy, StudyError> {
        let under = |keys: &[&str]| {
            let found = keys.iter().find_map(|key| row.keys.get_key_value(*key));
            found.map(|(key, value)| (key.clone(), value.clone()))
        };
        let named = match self {
            Self::Key(key) => match row.keys.get_key_value(key) {
                Some((key, value)) => Some((key.clone(), value.clone())),
                None => {
                    return Err(StudyError::Key {
                        row: row.name.clone(),
                        key: key.clone(),
                    });
                }
            },
            _ => None,
        };
        let patient = under(&PATIENT_KEYS).map(|(_, patient)| patient);
        if let Some((key, study)) = named.or_else(|| under(&STUDY_KEYS)) {
            // Some archives number the studies of each patient from 1.
            let id = match &patient {
                Some(patient) => format!("{patient}/{study}"),
                None => study.clone(),
            };
            return Ok(RowStudy {
                ids: vec![id],
                name: study,
                patient: patient.or_else(|| guess.iter().find_map(|one| one.patient.clone())),
                certain: true,
                from: StudySource::Key(key),
            });
        }
        if row.images.is_empty() {
            let id = format!("row {}", at + 1);
            return Ok(RowStudy {
                ids: vec![id.clone()],
                name: id,
                patient,
                certain: false,
                from: StudySource::Guess(PathForm::Row),
            });
        }
        let given = self.given(row)?;
        let from = match (&given, guess.first()) {
            (None, Some(first)) => StudySource::Guess(first.form),
            _ => StudySource::Rule,
        };
        let found = given.as_deref().unwrap_or(guess);
        Ok(RowStudy {
            ids: found.iter().map(|one| one.id.clone()).collect(),
            name: found
                .first()
                .map_or_else(String::new, |one| one.name.clone()),
            patient: patient.or_else(|| found.iter().find_map(|one| one.patient.clone())),
            certain: found.iter().all(|one| one.certain),
            from,
        })
    }

    /// The study of each image by the rule of the user; `None` without one.
    fn given(&self, row: &StudyRow) -> Result<Option<Vec<GuessedStudy>>, StudyError> {
        let said = |id: &str, patient: Option<&str>| GuessedStudy {
            id: id.to_owned(),
            name: id.to_owned(),
            patient: patient.map(str::to_owned),
            form: PathForm::Row,
            certain: true,
        };
        let all = row.images.iter().map(|image| {
            let path = joined(&row.folder, image);
            let (folder, stem) = folder_and_stem(&path);
            Ok(match self {
                Self::Guess | Self::Key(_) => return Ok(None),
                Self::Regex(regex) => {
                    let image = image.replace('\\', "/");
                    let groups = regex.captures(&image).and_then(|groups| {
                        let study = groups.name("study").or_else(|| groups.get(1))?;
                        Some((study.as_str().to_owned(), groups))
                    });
                    let Some((study, groups)) = groups else {
                        return Err(StudyError::NoMatch {
                            row: row.name.clone(),
                            image,
                            regex: regex.to_string(),
                        });
                    };
                    Some(said(
                        &study,
                        groups.name("patient").map(|group| group.as_str()),
                    ))
                }
                Self::Folder => Some(said(folder, None)),
                Self::Name => {
                    let study = stem.split_once('_').map_or(stem, |(study, _)| study);
                    Some(said(if study.is_empty() { stem } else { study }, None))
                }
                Self::Image => Some(said(&path, None)),
            })
        });
        all.collect()
    }
}

/// Disjoint sets of names (union-find): names that belong together have one root number.
#[derive(Default)]
struct DisjointSets {
    numbers: BTreeMap<String, usize>,
    /// The number each number was joined to; itself for a root.
    parent: Vec<usize>,
}

impl DisjointSets {
    fn number(&mut self, name: String) -> usize {
        let next = self.parent.len();
        let number = *self.numbers.entry(name).or_insert(next);
        if number == next {
            self.parent.push(next);
        }
        self.root(number)
    }

    fn root(&self, mut number: usize) -> usize {
        while self.parent[number] != number {
            number = self.parent[number];
        }
        number
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        self.parent[a.max(b)] = a.min(b);
    }
}

fn join(rule: &StudyRule, rows: &[StudyRow], own: Vec<RowStudy>) -> Studies {
    let (mut studies, mut groups) = (DisjointSets::default(), DisjointSets::default());
    let mut first = Vec::with_capacity(own.len());
    for row in &own {
        let numbers: Vec<usize> = row
            .ids
            .iter()
            .map(|id| studies.number(id.clone()))
            .collect();
        let mut together: Vec<usize> = row
            .ids
            .iter()
            .map(|id| groups.number(format!("study {id}")))
            .collect();
        together.extend(
            row.patient
                .iter()
                .map(|patient| groups.number(format!("patient {patient}"))),
        );
        // Images of two studies in one row make them one.
        numbers
            .windows(2)
            .for_each(|pair| studies.join(pair[0], pair[1]));
        together
            .windows(2)
            .for_each(|pair| groups.join(pair[0], pair[1]));
        first.push((numbers[0], together[0]));
    }
    let mut id_of: BTreeMap<usize, String> = BTreeMap::new();
    for (row, (study, _)) in own.iter().zip(&first) {
        id_of
            .entry(studies.root(*study))
            .or_insert_with(|| row.ids[0].clone());
    }
    let ids: Vec<String> = first
        .iter()
        .map(|(study, _)| id_of[&studies.root(*study)].clone())
        .collect();
    let patients: Vec<Option<String>> = own.iter().map(|row| row.patient.clone()).collect();
    let all: Option<BTreeSet<&String>> = patients.iter().map(Option::as_ref).collect();
    let facts = StudyFacts {
        from: described(rule, &own),
        guessed: own
            .iter()
            .any(|row| matches!(row.from, StudySource::Guess(_))),
        reports: own.len(),
        studies: id_of.len(),
        patients: all.filter(|all| !all.is_empty()).map(|all| all.len()),
    };
    Studies {
        doubts: doubts(rule, rows, &own, &ids),
        names: own.iter().map(|row| row.name.clone()).collect(),
        certain: own.iter().map(|row| row.certain).collect(),
        groups: first.iter().map(|(_, group)| groups.root(*group)).collect(),
        ids,
        patients,
        facts,
    }
}

/// Where the studies come from, with the number of rows where there are several sources.
fn described(rule: &StudyRule, own: &[RowStudy]) -> String {
    let mut counts: BTreeMap<&StudySource, usize> = BTreeMap::new();
    for row in own {
        *counts.entry(&row.from).or_default() += 1;
    }
    let several = counts.len() > 1;
    let parts: Vec<String> = counts
        .iter()
        .map(|(from, count)| {
            let words = match from {
                StudySource::Key(key) => format!("the key `{key}`"),
                StudySource::Guess(form) => format!("a guess by {}", form.words()),
                StudySource::Rule => match rule {
                    StudyRule::Regex(regex) => format!("`--study-regex {regex}`"),
                    StudyRule::Folder => "`--study-from folder`".into(),
                    StudyRule::Name => "`--study-from name`".into(),
                    _ => "`--study-from image`".into(),
                },
            };
            if several {
                format!("{words} ({})", counted(*count, "row", "rows"))
            } else {
                words
            }
        })
        .collect();
    parts.join(", ")
}

fn doubts(
    rule: &StudyRule,
    rows: &[StudyRow],
    own: &[RowStudy],
    ids: &[String],
) -> Vec<StudyDoubt> {
    let mut doubts = Vec::new();
    let named = own
        .iter()
        .filter(|row| matches!(row.from, StudySource::Key(_)))
        .count();
    if named > 0 && named < own.len() {
        doubts.push(StudyDoubt::Mixed {
            named,
            rows: own.len(),
        });
    }
    if named == own.len() && rule.is_given() && !matches!(rule, StudyRule::Key(_)) && named > 0 {
        doubts.push(StudyDoubt::Unused);
    }
    let mut reports: BTreeMap<&String, usize> = BTreeMap::new();
    for id in ids {
        *reports.entry(id).or_default() += 1;
    }
    if reports.len() == 1 && ids.len() > 1 {
        doubts.push(StudyDoubt::One { reports: ids.len() });
    } else if let Some((study, count)) = reports.iter().max_by_key(|(_, count)| **count)
        && *count > MANY_REPORTS
    {
        doubts.push(StudyDoubt::Many {
            study: (*study).clone(),
            reports: *count,
        });
    }
    if reports.len() == ids.len() && named == 0 && !rule.is_given() {
        let images = rows.iter().filter(|row| row.images.len() == 1);
        let images: Vec<&str> = images.map(|row| row.images[0].as_str()).collect();
        doubts.extend(views_apart(&images).map(|names| StudyDoubt::ViewsApart { names }));
    }
    doubts
}

/// A number with its noun: `1 study`, `2 studies`.
pub fn counted(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}

impl StudyFacts {
    /// One sentence: where the studies come from, and how many there are.
    pub fn english(&self) -> String {
        let patients = self.patients.map_or_else(String::new, |patients| {
            format!(" of {}", counted(patients, "patient", "patients"))
        });
        format!(
            "studies from {}: {} of {}{patients}",
            self.from,
            counted(self.reports, "report", "reports"),
            counted(self.studies, "study", "studies")
        )
    }
}

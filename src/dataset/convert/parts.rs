//! Which part each row goes to, and the folder that the parts are written to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::corpora::Corpus;
use super::error::ConvertError;
use super::line::UsableRow;
use super::options::{ConvertOptions, Split, VAL_RATIO};
use super::selection::Part;
use super::summary::{PartCount, Summary};
use crate::base::files::{FileError, is_same_file};
use crate::dataset::{python_random::PythonRandom, split};
use crate::study::Studies;

/// Parts with the names of their files.
pub(super) const FILES: [(Part, &str); 3] = [
    (Part::Train, "train.jsonl"),
    (Part::Val, "val.jsonl"),
    (Part::Test, "test.jsonl"),
];

/// What a conversion writes beside the parts.
const OTHERS: [&str; 6] = [
    "missing.txt",
    "summary.json",
    "characters.svg",
    "answer-tokens.svg",
    "row-tokens.svg",
    "vision-tokens.svg",
];

/// Makes the output folder, and gives its canonical path. It is empty, or holds what an earlier conversion left when it
/// failed; with `overwrite` the files of an earlier conversion go.
pub(super) fn prepare_output(options: &ConvertOptions) -> Result<PathBuf, ConvertError> {
    let failed = |cause| FileError::write(&options.output, cause);
    let entries = match fs::read_dir(&options.output) {
        Ok(entries) => entries.filter_map(Result::ok).collect(),
        Err(_) if options.output.exists() => {
            return Err(ConvertError::Exists(options.output.clone()));
        }
        Err(_) => Vec::new(),
    };
    let holds_something = entries
        .iter()
        .any(|entry| entry.file_name() != "missing.txt");
    if holds_something && !options.overwrite {
        return Err(ConvertError::Exists(options.output.clone()));
    }
    let written = || FILES.iter().map(|(_, name)| name).chain(&OTHERS);
    for name in written() {
        let path = options.output.join(name);
        if options.inputs().any(|input| is_same_file(&path, input)) {
            return Err(ConvertError::OverInput(path));
        }
    }
    // What this conversion does not write would be taken for its own.
    for name in written() {
        let path = options.output.join(name);
        if path.is_file() {
            fs::remove_file(&path).map_err(|cause| FileError::write(&path, cause))?;
        }
    }
    fs::create_dir_all(&options.output).map_err(failed)?;
    Ok(options.output.canonicalize().map_err(failed)?)
}

/// The split that is made: the one wanted, else the corpus' own, else by study.
pub(super) fn split_of(options: &ConvertOptions, corpus: &Corpus) -> Result<Split, ConvertError> {
    match options.split {
        Some(Split::Official) if !corpus.has_split => {
            Err(ConvertError::NoSplit(corpus.main.to_path_buf()))
        }
        Some(split) => Ok(split),
        None if corpus.has_split => Ok(Split::Official),
        None => Ok(Split::Uid),
    }
}

/// The part of each row; fills in what there is to say about it.
pub(super) fn parts(
    options: &ConvertOptions,
    random: &mut PythonRandom,
    usable: &[UsableRow],
    groups: &[usize],
    summary: &mut Summary,
) -> Result<Vec<Part>, ConvertError> {
    let ratio = options.val_ratio.unwrap_or(VAL_RATIO);
    let drawn = |chosen: Vec<bool>| -> Vec<Part> {
        let part = |val| if val { Part::Val } else { Part::Train };
        chosen.into_iter().map(part).collect()
    };
    let chosen = match summary.split {
        Split::Uid => split::hold_out(groups, ratio, random).map(drawn),
        Split::Image => split::wanted(groups.len(), ratio)
            .map(|wanted| drawn((0..groups.len()).map(|row| row < wanted).collect())),
        Split::Official => {
            let mut parts: Vec<Part> = usable.iter().map(UsableRow::part).collect();
            if parts.contains(&Part::Val) {
                summary.val_ratio = None;
                if let Some(ratio) = options.val_ratio {
                    summary.warnings.push(format!(
                        "the corpus has a validation part of its own, so `--val-ratio {ratio}` was not used; `--split uid` draws one"
                    ));
                }
                return Ok(parts);
            }
            let train: Vec<usize> = (0..parts.len())
                .filter(|row| parts[*row] == Part::Train)
                .collect();
            let of_train: Vec<usize> = train.iter().map(|row| groups[*row]).collect();
            if train.is_empty() {
                return Ok(parts);
            }
            split::hold_out(&of_train, ratio, random).map(|chosen| {
                if ratio > 0.0 {
                    summary.remarks.push(
                        "the corpus' own split has no validation part that is left, so one was drawn from its training part, by study".into(),
                    );
                }
                for (row, val) in train.iter().zip(chosen) {
                    if val {
                        parts[*row] = Part::Val;
                    }
                }
                parts
            })
        }
    };
    chosen.map_err(ConvertError::CannotSplit)
}

/// Fills in the studies and patients of each part.
pub(super) fn count_studies(
    summary: &mut Summary,
    studies: Studies,
    parts: &[Part],
    study_rule: Option<&str>,
) {
    let mut rows: BTreeMap<Part, usize> = BTreeMap::new();
    let mut parts_of_study: BTreeMap<&str, BTreeSet<Part>> = BTreeMap::new();
    let mut parts_of_patient: BTreeMap<&str, BTreeSet<Part>> = BTreeMap::new();
    for (row, part) in parts.iter().enumerate() {
        *rows.entry(*part).or_default() += 1;
        let study = studies.ids[row].as_str();
        parts_of_study.entry(study).or_default().insert(*part);
        if let Some(patient) = &studies.patients[row] {
            parts_of_patient.entry(patient).or_default().insert(*part);
        }
    }
    let count = |part| PartCount {
        rows: rows.get(&part).copied().unwrap_or_default(),
        studies: parts_of_study
            .values()
            .filter(|parts| parts.contains(&part))
            .count(),
    };
    summary.train = count(Part::Train);
    summary.val = count(Part::Val);
    summary.test = rows.contains_key(&Part::Test).then(|| count(Part::Test));
    let several = |parts: &BTreeMap<&str, BTreeSet<Part>>| {
        parts.values().filter(|parts| parts.len() > 1).count()
    };
    summary.studies_in_both = several(&parts_of_study);
    summary.patients_in_both = several(&parts_of_patient);
    summary
        .warnings
        .extend(studies.doubts.iter().map(|doubt| doubt.english()));
    summary.study = studies.facts;
    if let Some(rule) = study_rule {
        summary.study.from = rule.to_owned();
    }
}

/// The name of a path in a summary.
pub(super) fn shown(path: &Path) -> String {
    path.display().to_string()
}

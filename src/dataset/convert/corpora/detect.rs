//! Which corpus a file or a folder is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use super::super::error::ConvertError;
use super::super::files::is_folder;
use super::super::form::CorpusForm;
use super::{mimic, named, parquet, table};
use crate::base::files::expect_file;

/// Folders so deep below the root may hold the files of a corpus.
const DEPTH: usize = 4;

/// Most entries that are looked at: folders of films hold very many.
const MOST_ENTRIES: usize = 1_000_000;

/// With more files than this that may hold rows, only those are looked at whose names are known.
const MOST_READ: usize = 500;

/// A corpus, and the files that hold its rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Detected {
    pub(super) form: CorpusForm,
    pub(super) files: Vec<PathBuf>,
}

/// The corpus that `path` is, a file or a folder. What an earlier conversion left in `output` is none.
///
/// # Errors
/// [`ConvertError`] says what was looked for, or which corpora were found where there are several.
pub(super) fn detect(
    path: &Path,
    wanted: Option<CorpusForm>,
    output: &Path,
) -> Result<Detected, ConvertError> {
    if !path.is_dir() {
        if let Err(cause) = fs::metadata(path) {
            let path = path.to_owned();
            return Err(ConvertError::Read { path, cause });
        }
        // A pipe would be waited for, and a device may never end.
        expect_file(path)?;
        let form = wanted.or_else(|| of_file(path)).unwrap_or(CorpusForm::Rows);
        let files = vec![path.to_owned()];
        return Ok(Detected { form, files });
    }
    let mut found: BTreeMap<CorpusForm, Vec<PathBuf>> = BTreeMap::new();
    let mut others: BTreeMap<CorpusForm, Vec<PathBuf>> = BTreeMap::new();
    let files = files_of(path, output);
    let many = files.len() > MOST_READ;
    for file in files {
        if let Some(form) = by_name(&file) {
            found.entry(form).or_default().push(file);
        } else if let Some(form) = (!many).then(|| by_content(&file)).flatten() {
            let by_name = !matches!(
                form,
                CorpusForm::Rows | CorpusForm::Table | CorpusForm::Messages
            );
            let list = if by_name { &mut found } else { &mut others };
            list.entry(form).or_default().push(file);
        }
    }
    if mimic::has_tree(path) || below_has_tree(path) {
        found.entry(CorpusForm::MimicCxr).or_default();
    }
    // Labels and other tables beside the corpus proper are none of their own.
    let mut found = if found.is_empty() { others } else { found };
    if let Some(wanted) = wanted {
        let files = found.remove(&wanted);
        let files = match (files, wanted) {
            (Some(files), _) => files,
            // The same file may be read in another form.
            (
                None,
                CorpusForm::Rows | CorpusForm::Table | CorpusForm::Messages | CorpusForm::Keys,
            ) => found.into_values().flatten().collect(),
            (None, _) => Vec::new(),
        };
        if files.is_empty() && wanted != CorpusForm::MimicCxr {
            return Err(ConvertError::NoCorpus {
                path: path.to_owned(),
                wanted: Some(wanted),
            });
        }
        return chosen(path, wanted, files);
    }
    match found.len() {
        0 => Err(ConvertError::NoCorpus {
            path: path.to_owned(),
            wanted: None,
        }),
        1 => {
            let (form, files) = found.pop_first().unwrap_or((CorpusForm::Rows, Vec::new()));
            chosen(path, form, files)
        }
        _ => Err(ConvertError::SeveralCorpora {
            path: path.to_owned(),
            found: found
                .iter()
                .map(|(form, files)| {
                    let first = files.first().map_or("files/p10", |file| {
                        file.strip_prefix(path)
                            .unwrap_or(file)
                            .to_str()
                            .unwrap_or_default()
                    });
                    format!("{} (`{first}`)", form.name())
                })
                .collect::<Vec<_>>()
                .join(", "),
        }),
    }
}

/// The files of a corpus that are read: all where each is a part, else the one there is.
fn chosen(
    path: &Path,
    form: CorpusForm,
    mut files: Vec<PathBuf>,
) -> Result<Detected, ConvertError> {
    files.sort();
    match form {
        CorpusForm::MimicCxr => files = vec![path.to_owned()],
        CorpusForm::Roco => {
            // A table and the list that it was made of say the same.
            let tables = files
                .iter()
                .filter(|file| file.extension().is_none_or(|ending| ending != "txt"));
            let tables: Vec<PathBuf> = tables.cloned().collect();
            if !tables.is_empty() {
                files = tables;
            }
        }
        CorpusForm::VindrCxr => {}
        CorpusForm::Indiana => files.retain(|file| {
            let name = file.file_name().and_then(|name| name.to_str());
            !name.is_some_and(|name| name.contains("projections"))
                || !file
                    .with_file_name(name.unwrap_or_default().replace("projections", "reports"))
                    .is_file()
        }),
        _ => {}
    }
    // Tables of one data set on the Hugging Face hub.
    let is_parquet = |file: &PathBuf| file.extension().is_some_and(|ending| ending == "parquet");
    let of_parts = matches!(form, CorpusForm::Roco | CorpusForm::VindrCxr)
        || form == CorpusForm::Rows && files.iter().all(is_parquet);
    if files.len() > 1 && !of_parts {
        let names: Vec<String> = files
            .iter()
            .take(6)
            .map(|file| format!("`{}`", file.strip_prefix(path).unwrap_or(file).display()))
            .collect();
        return Err(ConvertError::SeveralFiles {
            path: path.to_owned(),
            corpus: form.name(),
            files: names.join(", "),
        });
    }
    Ok(Detected { form, files })
}

/// MIMIC-CXR with its tree in a folder of its own: `mimic-cxr-jpg/files/p10`.
fn below_has_tree(path: &Path) -> bool {
    let Ok(entries) = fs::read_dir(path) else {
        return false;
    };
    let mut entries = entries.filter_map(Result::ok);
    entries.any(|entry| is_folder(&entry) && mimic::has_tree(&entry.path()))
}

/// Files below `root` that may hold rows.
fn files_of(root: &Path, output: &Path) -> Vec<PathBuf> {
    let output = output.canonicalize().ok();
    let mut found = Vec::new();
    let mut level = vec![root.to_owned()];
    let mut entries_left = MOST_ENTRIES;
    // Links may lead in a circle.
    let mut seen = BTreeSet::new();
    for _ in 0..DEPTH {
        let mut below = Vec::new();
        for folder in level {
            if !folder.canonicalize().is_ok_and(|real| seen.insert(real)) {
                continue;
            }
            if folder != root && output.is_some() && folder.canonicalize().ok() == output {
                continue;
            }
            let Ok(entries) = fs::read_dir(&folder) else {
                continue;
            };
            for entry in entries.filter_map(Result::ok) {
                if entries_left == 0 {
                    return found;
                }
                entries_left -= 1;
                let name = entry.file_name();
                let Some(name) = name.to_str().filter(|name| !name.starts_with('.')) else {
                    continue;
                };
                if ending(name).is_some() {
                    found.push(entry.path());
                } else if name != "files" && is_folder(&entry) {
                    // The tree of MIMIC-CXR, `files`, has half a million files.
                    below.push(entry.path());
                }
            }
        }
        below.sort();
        level = below;
    }
    found.retain(|path| path.is_file());
    found.sort();
    found
}

/// The ending of a file that may hold rows, without .gz.
fn ending(name: &str) -> Option<&str> {
    let name = name.strip_suffix(".gz").unwrap_or(name);
    let (_, ending) = name.rsplit_once('.')?;
    ["json", "jsonl", "ndjson", "csv", "tsv", "txt", "parquet"]
        .contains(&ending)
        .then_some(ending)
}

/// The corpus whose files are named like this.
fn by_name(path: &Path) -> Option<CorpusForm> {
    let name = path.file_name()?.to_str()?.to_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    let is = |start: &str, end: &str| name.starts_with(start) && name.ends_with(end);
    if mimic::is_table(name, "metadata") || mimic::is_table(name, "split") {
        Some(CorpusForm::MimicCxr)
    } else if is("df_chexpert_plus", ".csv") {
        Some(CorpusForm::ChexpertPlus)
    } else if is("padchest", ".csv") && name.contains("labels") {
        Some(CorpusForm::Padchest)
    } else if is("indiana_", ".csv") && (name.contains("reports") || name.contains("projections")) {
        Some(CorpusForm::Indiana)
    } else if name == "captions.txt" || name.ends_with("_captions.csv") {
        Some(CorpusForm::Roco)
    } else {
        None
    }
}

/// The corpus that a file is by its columns or keys.
fn by_content(path: &Path) -> Option<CorpusForm> {
    let name = path.file_name()?.to_str()?;
    match ending(name)? {
        "csv" | "tsv" => by_columns(&table::columns_of(path)?),
        "txt" => None,
        "parquet" => {
            let columns = parquet::columns_of(path)?;
            if columns.iter().any(|column| column == "messages") {
                Some(CorpusForm::Messages)
            } else {
                named::are_known(columns.iter()).then_some(CorpusForm::Rows)
            }
        }
        _ => by_keys(&table::start_of(path)?),
    }
}

fn by_columns(columns: &[String]) -> Option<CorpusForm> {
    let has = |names: &[&str]| {
        names.iter().all(|name| {
            columns
                .iter()
                .any(|column| column.eq_ignore_ascii_case(name))
        })
    };
    if has(&["path_to_image", "section_impression"]) || has(&["path_to_image", "section_findings"])
    {
        Some(CorpusForm::ChexpertPlus)
    } else if has(&["ImageID", "StudyID", "PatientID", "Report"]) {
        Some(CorpusForm::Padchest)
    } else if has(&["image_id", "class_name", "x_min", "y_max"]) {
        Some(CorpusForm::VindrCxr)
    } else if has(&["uid", "MeSH", "findings", "impression"])
        || has(&["uid", "filename", "projection"])
    {
        Some(CorpusForm::Indiana)
    } else if has(&["dicom_id", "subject_id", "study_id"])
        && (has(&["split"]) || has(&["ViewPosition"]))
    {
        Some(CorpusForm::MimicCxr)
    } else if has(&["id", "name", "caption"]) || (has(&["id", "caption"]) && columns.len() == 2) {
        Some(CorpusForm::Roco)
    } else if named::are_known(columns.iter()) {
        Some(CorpusForm::Table)
    } else {
        None
    }
}

/// The form of a JSON file by the keys near its start.
fn by_keys(start: &str) -> Option<CorpusForm> {
    let has = |key: &str| start.contains(&format!("\"{key}\""));
    if has("annotations") && has("image_id") && has("caption") {
        Some(CorpusForm::Annotations)
    } else if has("messages") {
        Some(CorpusForm::Messages)
    } else if has("img") && has("label") {
        Some(CorpusForm::Prompts)
    } else if ["train", "val", "test"]
        .iter()
        .any(|part| start.trim_start().starts_with('{') && has(part))
        && has("image_path")
    {
        Some(CorpusForm::R2gen)
    } else {
        let keys: Vec<String> = start
            .split('"')
            .skip(1)
            .step_by(2)
            .take(200)
            .map(str::to_owned)
            .collect();
        named::are_known(keys.iter()).then_some(CorpusForm::Rows)
    }
}

/// The corpus that a file is which the user named.
fn of_file(path: &Path) -> Option<CorpusForm> {
    if let Some(form) = by_name(path) {
        return Some(form);
    }
    let name = path.file_name()?.to_str()?;
    match ending(name) {
        Some("csv" | "tsv") => Some(
            by_columns(&table::columns_of(path).unwrap_or_default()).unwrap_or(CorpusForm::Table),
        ),
        Some("txt") => Some(CorpusForm::Roco),
        // JSON says itself what it is, whatever the file is called.
        _ => None,
    }
}

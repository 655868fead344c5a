//! MIMIC-CXR and MIMIC-CXR-JPG: a tree of reports and images, and tables of views and of the split.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use super::super::corpus::stem_of;
use super::super::error::ConvertError;
use super::super::selection::Part;
use super::mimic_sections;
use super::record::{Picture, Projection, Record, Records, Report, View};
use super::table::{Table, text_of};

/// Longest report that is read; the published ones have a few thousand characters.
const LONGEST_REPORT: u64 = 1 << 20;

/// Whether `folder` holds the tree of the corpus: `files/p10`.
pub(super) fn has_tree(folder: &Path) -> bool {
    !tree(&folder.join("files")).is_empty()
}

/// Folders `p10` … `p19` of `files`.
fn tree(files: &Path) -> Vec<PathBuf> {
    folders(files, |name| {
        name.len() == 3 && name.starts_with('p') && name[1..].bytes().all(|b| b.is_ascii_digit())
    })
}

/// Folders in `folder` whose names are as wanted, sorted.
fn folders(folder: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
    let mut found: Vec<PathBuf> = paths
        .filter(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            name.is_some_and(&wanted) && path.is_dir()
        })
        .collect();
    found.sort();
    found
}

/// A table of the corpus below `folder` or in a folder of it: `mimic-cxr-2.0.0-metadata.csv`, perhaps .gz.
fn table(folder: &Path, kind: &str) -> Option<PathBuf> {
    let below = folders(folder, |name| !name.starts_with('p') && name != "files");
    std::iter::once(folder.to_owned())
        .chain(below)
        .find_map(|folder| {
            let entries = fs::read_dir(folder).ok()?;
            let paths = entries.filter_map(Result::ok).map(|entry| entry.path());
            paths.into_iter().find(|path| {
                let name = path.file_name().and_then(|name| name.to_str());
                name.is_some_and(|name| is_table(name, kind))
            })
        })
}

/// Whether `name` is that of a table of this kind.
pub(super) fn is_table(name: &str, kind: &str) -> bool {
    let name = name.strip_suffix(".gz").unwrap_or(name);
    name.starts_with("mimic-cxr-") && name.ends_with(&format!("-{kind}.csv"))
}

/// One image of the tables or the tree.
struct Image {
    number: usize,
    dicom: String,
    subject: String,
    study: String,
    view: Option<String>,
}

/// Reads the corpus in `root`.
pub(super) fn read(root: &Path) -> Result<Records, ConvertError> {
    let mut found = Records {
        study_rule: Some("folders `pN/sN` of MIMIC-CXR"),
        ..Records::default()
    };
    let roots = report_folders(root);
    let (metadata, split) = (table(root, "metadata"), table(root, "split"));
    let mut parts = HashMap::new();
    let split = split.map(|path| Table::read(&path)).transpose()?;
    if let Some(split) = &split {
        let (dicom, part) = (split.needed("dicom_id")?, split.needed("split")?);
        for row in split.rows() {
            if let (Some(dicom), Some(part)) = (row.get(Some(dicom)), row.get(Some(part))) {
                parts.insert(dicom.to_owned(), Part::of(part));
            }
        }
    }
    let (file, images) = match (metadata.map(|path| Table::read(&path)).transpose()?, &split) {
        (Some(table), _) => (table.path.clone(), of_table(&table)?),
        (None, Some(table)) => {
            found.remarks.push(
                "there is no `mimic-cxr-2.0.0-metadata.csv`, so the views of the images are not known".into(),
            );
            (table.path.clone(), of_table(table)?)
        }
        (None, None) => {
            found.remarks.push(
                "there is neither `mimic-cxr-2.0.0-metadata.csv` nor `-split.csv`: the images are those of the folders, without views and without the official split".into(),
            );
            (root.into(), of_tree(&roots))
        }
    };
    if roots.is_empty() {
        return Err(ConvertError::Lacks {
            path: root.to_owned(),
            corpus: "mimic-cxr",
            lacks: "the reports, `files/p10/p…/s….txt` (mimic-cxr-reports.zip, unpacked here)"
                .into(),
        });
    }
    if file.as_ref() != root {
        found.files.push(file.clone());
    }
    if let Some(split) = &split
        && split.path != file
    {
        found.files.push(split.path.clone());
    }
    let mut reports: BTreeMap<String, Report> = BTreeMap::new();
    let mut without_text = 0;
    for image in images {
        let folder = format!(
            "p{}/p{}",
            image.subject.get(..2).unwrap_or_default(),
            image.subject
        );
        if !reports.contains_key(&image.study) {
            let report = match text(&roots, &format!("{folder}/s{}.txt", image.study))? {
                Some(text) => {
                    mimic_sections::report(&text, image.study.parse().unwrap_or_default())
                }
                None => {
                    without_text += 1;
                    Report::default()
                }
            };
            reports.insert(image.study.clone(), report);
        }
        let mut record = Record::new(&file);
        record.report = reports.get(&image.study).cloned().unwrap_or_default();
        record.part = parts.get(&image.dicom).copied().flatten();
        record.views.push(View {
            number: image.number,
            picture: Picture::Path(format!(
                "files/{folder}/s{}/{}.jpg",
                image.study, image.dicom
            )),
            projection: Projection::of(image.view.as_deref()),
        });
        record.study = Some(format!("s{}", image.study));
        record.patient = Some(format!("p{}", image.subject));
        found.records.push(record);
    }
    if without_text > 0 {
        found.remarks.push(format!(
            "{without_text} studies of the table have no report in the folders"
        ));
    }
    Ok(found.by_study())
}

/// The folders `files` below `root` that hold the tree.
fn report_folders(root: &Path) -> Vec<PathBuf> {
    let below = folders(root, |name| name != "files");
    let deeper = below
        .iter()
        .flat_map(|folder| folders(folder, |name| name != "files" && !name.starts_with('p')));
    let all = std::iter::once(root.to_owned())
        .chain(below.iter().cloned())
        .chain(deeper);
    let mut found: Vec<PathBuf> = all
        .map(|folder| folder.join("files"))
        .filter(|files| !tree(files).is_empty())
        .collect();
    if found.is_empty() && !tree(root).is_empty() {
        found.push(root.to_owned());
    }
    found
}

fn text(roots: &[PathBuf], path: &str) -> Result<Option<String>, ConvertError> {
    for root in roots {
        let path = root.join(path);
        let Ok(facts) = fs::metadata(&path) else {
            continue;
        };
        if !facts.is_file() || facts.len() > LONGEST_REPORT {
            return Err(ConvertError::Form {
                path,
                row: 1,
                what: "the report".into(),
                expected: "a text file of less than 1 MiB".into(),
            });
        }
        return text_of(&path).map(Some);
    }
    Ok(None)
}

fn of_table(table: &Table) -> Result<Vec<Image>, ConvertError> {
    let (dicom, subject, study) = (
        table.needed("dicom_id")?,
        table.needed("subject_id")?,
        table.needed("study_id")?,
    );
    let view = table.column(&["ViewPosition"]);
    let wrong = |row, what: &str| ConvertError::Form {
        path: table.path.to_path_buf(),
        row,
        what: format!("`{what}`"),
        expected: "a number, as in the published table".into(),
    };
    let images = table.rows().map(|row| {
        let number = |column, name| {
            let text = row.get(Some(column));
            // A number that went through pandas with gaps.
            let text = text.map(|text| text.trim_end_matches(".0"));
            text.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()))
                .map(str::to_owned)
                .ok_or_else(|| wrong(row.number, name))
        };
        Ok(Image {
            number: row.number,
            dicom: row
                .get(Some(dicom))
                .filter(|name| !name.contains(['/', '\\']))
                .ok_or_else(|| wrong(row.number, "dicom_id"))?
                .to_owned(),
            subject: number(subject, "subject_id")?,
            study: number(study, "study_id")?,
            view: row.get(view).map(str::to_owned),
        })
    });
    images.collect()
}

/// The images of the folders, in the order of their names.
fn of_tree(roots: &[PathBuf]) -> Vec<Image> {
    let numbered = |letter: char| {
        move |name: &str| {
            let digits = name.strip_prefix(letter);
            digits.is_some_and(|digits| {
                !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit())
            })
        }
    };
    let name = |path: &Path| {
        path.file_name()
            .and_then(|name| name.to_str())
            .unwrap_or_default()
            .to_owned()
    };
    let mut found: BTreeMap<(String, String, String), ()> = BTreeMap::new();
    let groups = roots.iter().flat_map(|root| tree(root));
    for patient in groups.flat_map(|group| folders(&group, numbered('p'))) {
        for study in folders(&patient, numbered('s')) {
            let Ok(entries) = fs::read_dir(&study) else {
                continue;
            };
            for entry in entries.filter_map(Result::ok) {
                let file = name(&entry.path());
                if stem_of(&file) != file {
                    let key = (
                        name(&patient)[1..].to_owned(),
                        name(&study)[1..].to_owned(),
                        stem_of(&file).to_owned(),
                    );
                    found.insert(key, ());
                }
            }
        }
    }
    let found = found.into_keys().enumerate();
    found
        .map(|(at, (subject, study, dicom))| Image {
            number: at + 1,
            dicom,
            subject,
            study,
            view: None,
        })
        .collect()
}

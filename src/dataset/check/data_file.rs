//! A data file to check: its rows, and the lines that are no sample.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::error::CheckError;
use super::finding::{Finding, Kind, Severity};
use crate::dataset::error::DatasetError;
use crate::dataset::reader::{ColumnsSeen, DataOptions, Plain, read_file};
use crate::dataset::unused_keys::UnusedKeys;
use crate::processor::sample::{RowFault, Sample};
use crate::study::counted;

/// A row that could be read.
pub(super) struct CheckedRow {
    pub(super) line: usize,
    pub(super) sample: Sample,
    /// Where its images are.
    pub(super) paths: Vec<PathBuf>,
    /// Hashes of its images; shorter than `paths` if one cannot be used.
    pub(super) hashes: Vec<String>,
    /// Says whether two conversations are equal.
    pub(super) conversation: [u8; 32],
}

impl CheckedRow {
    /// The words after the reasoning, as two reports are compared.
    pub(super) fn report(&self) -> &str {
        let answer = self.sample.conversation.last_answer().unwrap_or_default();
        let report = match answer.split_once("</think>") {
            Some((_, report)) => report,
            None => answer,
        };
        report.trim()
    }

    /// Whether every image could be used.
    pub(super) fn is_whole(&self) -> bool {
        self.hashes.len() == self.paths.len()
    }
}

/// A data file: its rows and what was found.
pub(super) struct DataFile {
    pub(super) path: PathBuf,
    pub(super) lines: usize,
    pub(super) rows: Vec<CheckedRow>,
    pub(super) findings: Vec<Finding>,
    columns: ColumnsSeen,
}

/// Reads the data files of one side; a column of another name has to be in one of them.
pub(super) fn read_all(
    paths: &[PathBuf],
    options: &DataOptions,
) -> Result<Vec<DataFile>, CheckError> {
    let mut files = Vec::new();
    for path in paths {
        files.push(read(path, options)?);
    }
    let mut columns = ColumnsSeen::default();
    files.iter().for_each(|file| columns.add(&file.columns));
    if let Some(first) = files.iter_mut().find(|file| file.lines > 0)
        && let Err(error) = columns.expect_all(&options.columns, &first.path)
    {
        let (severity, kind) = (Severity::Error, Kind::Json);
        let finding = Finding::new(severity, kind, &first.path, error.line, error.reason);
        first.findings.push(finding);
    }
    Ok(files)
}

/// Reads a data file, row by row; what is no sample becomes a finding.
fn read(path: &Path, options: &DataOptions) -> Result<DataFile, CheckError> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut file = DataFile {
        path: path.to_owned(),
        lines: 0,
        rows: Vec::new(),
        findings: Vec::new(),
        columns: ColumnsSeen::default(),
    };
    let found = match read_file(path, options, Plain::Drop, false) {
        Ok(found) => found,
        Err(DatasetError::Rows(error)) => {
            file.lines = 1;
            let (severity, kind) = (Severity::Error, Kind::Json);
            let finding = Finding::new(severity, kind, path, error.line, error.reason);
            file.findings.push(finding);
            return Ok(file);
        }
        Err(error) => return Err(CheckError::Data(Box::new(error))),
    };
    file.columns = found.columns;
    for remark in found.remarks {
        let finding = Finding::new(Severity::Warning, Kind::File, path, 0, remark);
        file.findings.push(finding);
    }
    let mut folders = HashMap::new();
    let mut unused = UnusedKeys::default();
    for (line, row) in found.rows {
        let mut found = |severity, kind, message| {
            let finding = Finding::new(severity, kind, path, line, message);
            file.findings.push(finding);
        };
        file.lines += 1;
        let mut sample = match row {
            Ok((sample, _)) => sample,
            Err(fault) => {
                found(Severity::Error, kind_of(&fault), fault.to_string());
                continue;
            }
        };
        let (images, marks) = (sample.images.len(), sample.marks);
        if marks != images {
            let message = format!(
                "{} for {}; images without a mark go before the first question",
                counted(marks, "`<image>` mark", "`<image>` marks"),
                counted(images, "image", "images"),
            );
            found(Severity::Warning, Kind::ImageMarks, message);
        }
        if !sample.conversation.has_question() {
            let message = "the row has no question; its answer is learnt without one".to_owned();
            found(Severity::Warning, Kind::NoQuestion, message);
        }
        if images == 0 {
            let message = "the row has no image".to_owned();
            found(Severity::Warning, Kind::NoImage, message);
        }
        unused.add(line, std::mem::take(&mut sample.unknown_keys));
        let conversation = format!("{:?}", sample.conversation);
        file.rows.push(CheckedRow {
            line,
            paths: sample
                .image_paths(folder)
                .into_iter()
                .map(|path| real_path(path, &mut folders))
                .collect(),
            hashes: Vec::new(),
            conversation: Sha256::digest(conversation).into(),
            sample,
        });
    }
    for (line, message) in unused.sentences() {
        let finding = Finding::new(Severity::Warning, Kind::UnknownKey, path, line, message);
        file.findings.push(finding);
    }
    if file.lines == 0 {
        let message = "the file holds no sample".to_owned();
        let finding = Finding::new(Severity::Error, Kind::Empty, path, 0, message);
        file.findings.push(finding);
    }
    Ok(file)
}

/// `path` with the true folder, so that one image has one path in all files; the name stays, because it
/// says the study even where it is a link.
fn real_path(path: PathBuf, folders: &mut HashMap<PathBuf, PathBuf>) -> PathBuf {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return path;
    };
    let real = folders.entry(folder.to_owned()).or_insert_with(|| {
        let folder = if folder.as_os_str().is_empty() {
            Path::new(".")
        } else {
            folder
        };
        // If the folder does not exist, the image is missing, which is reported for its row.
        folder.canonicalize().unwrap_or_else(|_| folder.to_owned())
    });
    real.join(name)
}

/// What kind of fault makes a line no sample.
fn kind_of(fault: &RowFault) -> Kind {
    match fault {
        RowFault::Json(_) | RowFault::Table(_) => Kind::Json,
        RowFault::Form { .. } | RowFault::Key { .. } | RowFault::Limits(_) => Kind::Form,
        RowFault::EmptyAnswer { .. } => Kind::NoAnswer,
        RowFault::Refused { .. } | RowFault::Slip { .. } => Kind::RefusedKey,
        RowFault::Tag { .. } | RowFault::Placeholders { .. } => Kind::ImageMarks,
    }
}

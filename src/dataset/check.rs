//! Checks data files before a model is loaded: every bad row, with file, line and reason.
//!
//! Each image is decoded once, in a few threads; each row is encoded as training will encode it.
//! Nothing is repaired, cut or skipped. This module knows no tensor and no weights.

mod finding;
mod leaks;
#[cfg(test)]
mod tests;
mod thinking;

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;
use sha2::{Digest, Sha256};

use super::{UnusedKeys, in_words, rows::rows};
use crate::{
    base::files::sha256_file,
    processor::{
        chat::{ChatError, ImageGrid, refuse_control_tokens},
        patches::ImageProcessor,
        sample::{Conversation, RowFault, Sample, parse_line},
        supervised::{SupervisedError, encode_supervised},
        tokenizer::Tokenizer,
    },
    study::{StudyError, StudyRule, counted},
};

pub use finding::{CheckReport, FileCount, Finding, Kind, Severity};

/// Most threads that decode images: each holds a whole picture.
const MAX_THREADS: usize = 8;

/// Why a check could not be made at all.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// A data file cannot be read.
    #[error(
        "cannot read `{}`: {cause}; expected a JSONL file in ms-swift's form", .path.display()
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// A rule for studies does not fit.
    #[error(transparent)]
    Study(#[from] StudyError),
    /// The threads could not be started.
    #[error("cannot start the threads of the check: {0}")]
    Threads(#[from] rayon::ThreadPoolBuildError),
}

/// What to check, and against what.
pub struct Check<'a> {
    /// Counts tokens; the one of the model to be trained.
    pub tokenizer: &'a Tokenizer,
    /// Sizes and limits of images.
    pub processor: &'a ImageProcessor,
    /// Most tokens of a row, image tokens included.
    pub max_length: usize,
    /// Whether the chat template of the model opens a `<think>` block; `None` if it brings none.
    pub opens_thinking: Option<bool>,
    /// What a study is, where rows do not name theirs.
    pub studies: StudyRule,
}

/// An image file that was looked at.
#[derive(Debug, Clone)]
struct Seen {
    sha256: String,
    /// Width and height in pixels, as it is shown.
    size: (usize, usize),
    /// Doubts about the picture, with its name.
    remarks: Vec<String>,
}

/// A row that could be read.
struct Row {
    line: usize,
    sample: Sample,
    /// Where its images are.
    paths: Vec<PathBuf>,
    /// Hashes of its images; shorter than `paths` if one cannot be used.
    hashes: Vec<String>,
    /// Says whether two conversations are equal.
    conversation: [u8; 32],
}

impl Row {
    /// The words after the reasoning, as two reports are compared.
    fn report(&self) -> &str {
        let answer = self.sample.conversation.last_answer().unwrap_or_default();
        let report = match answer.split_once("</think>") {
            Some((_, report)) => report,
            None => answer,
        };
        report.trim()
    }

    /// Whether every image could be used.
    fn is_whole(&self) -> bool {
        self.hashes.len() == self.paths.len()
    }
}

/// A data file: its rows and what was found.
struct DataFile {
    path: PathBuf,
    lines: usize,
    rows: Vec<Row>,
    findings: Vec<Finding>,
}

impl Check<'_> {
    /// Checks the file `train`, and with `val` also whether validation is independent of it.
    ///
    /// `progress` is told how many of how many image files are done, from several threads.
    ///
    /// # Errors
    /// [`CheckError`] if a data file cannot be read; whatever is wrong inside is a [`Finding`].
    pub fn run(
        &self,
        train: &Path,
        val: Option<&Path>,
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<CheckReport, CheckError> {
        let mut files = Vec::new();
        for path in [Some(train), val].into_iter().flatten() {
            files.push(read(path)?);
        }
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.min(MAX_THREADS))
            .build()?;
        let images = pool.install(|| self.look_at_images(&files, progress));
        let mut row_tokens = Vec::new();
        for file in &mut files {
            let DataFile {
                path,
                rows,
                findings,
                ..
            } = file;
            let checked: Vec<_> = pool.install(|| {
                rows.par_iter_mut()
                    .map(|row| self.check_row(path, row, &images))
                    .collect()
            });
            for (found, tokens) in checked {
                findings.extend(found);
                row_tokens.extend(tokens);
            }
            findings.extend(leaks::duplicates(path, rows));
            findings.extend(thinking::disagreement(path, rows, self.opens_thinking));
        }
        let study = leaks::studies(&mut files, &self.studies)?;
        let mut findings = Vec::new();
        let mut counts = Vec::new();
        for mut file in files {
            file.findings.sort_by_key(|finding| finding.line);
            findings.extend(file.findings);
            counts.push(FileCount {
                file: file.path,
                rows: file.lines,
            });
        }
        Ok(CheckReport::new(
            counts,
            images.len(),
            &row_tokens,
            study,
            findings,
        ))
    }

    /// Decodes each image of the files once.
    fn look_at_images(
        &self,
        files: &[DataFile],
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> HashMap<PathBuf, Result<Seen, String>> {
        let rows = files.iter().flat_map(|file| &file.rows);
        let mut paths: Vec<&PathBuf> = rows.flat_map(|row| &row.paths).collect();
        paths.sort_unstable();
        paths.dedup();
        let (done, total) = (AtomicUsize::new(0), paths.len());
        paths
            .into_par_iter()
            .map(|path| {
                let seen = self.look_at(path);
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, total);
                (path.clone(), seen)
            })
            .collect()
    }

    fn look_at(&self, path: &Path) -> Result<Seen, String> {
        let reading = self
            .processor
            .read(path, None)
            .map_err(|error| in_words(&error))?;
        let (width, height) = (reading.picture.width(), reading.picture.height());
        self.processor
            .grid_for(height, width)
            .map_err(|error| in_words(&error))?;
        // What a file merely leaves unsaid would be a warning on every row of some archives.
        let remarks = reading
            .remarks
            .iter()
            .filter(|remark| !remark.is_said_once());
        let remarks = remarks.map(|remark| format!("image `{}`: {remark}", path.display()));
        let sha256 = sha256_file(path).map_err(|error| error.to_string())?;
        Ok(Seen {
            sha256,
            size: (width, height),
            remarks: remarks.collect(),
        })
    }

    /// The conversation with its boxes, and the grids of the images at the row's own pixel limits.
    fn placed<'s>(
        &self,
        sample: &'s Sample,
        sizes: &[(usize, usize)],
    ) -> Result<(Cow<'s, Conversation>, Vec<ImageGrid>), String> {
        let conversation = sample.placed(sizes).map_err(|fault| fault.to_string())?;
        let processor = self.processor.with_pixels(sample.limits);
        let processor =
            processor.map_err(|cause| RowFault::Limits(cause.to_string()).to_string())?;
        let grids = sizes.iter().map(|(width, height)| {
            let grid = processor.grid_for(*height, *width);
            grid.map_err(|error| in_words(&error))
        });
        Ok((conversation, grids.collect::<Result<_, _>>()?))
    }

    /// Findings of one row, and its length in tokens if it could be encoded.
    fn check_row(
        &self,
        file: &Path,
        row: &mut Row,
        images: &HashMap<PathBuf, Result<Seen, String>>,
    ) -> (Vec<Finding>, Option<usize>) {
        let line = row.line;
        let mut findings = Vec::new();
        for path in &row.paths {
            if let Some(Ok(seen)) = images.get(path) {
                let warning = |remark: &String| {
                    Finding::new(Severity::Warning, Kind::Image, file, line, remark.clone())
                };
                findings.extend(seen.remarks.iter().map(warning));
            }
        }
        let mut error = |kind, message: String| {
            findings.push(Finding::new(Severity::Error, kind, file, line, message));
        };
        let mut sizes = Vec::new();
        for path in &row.paths {
            match images.get(path) {
                Some(Ok(seen)) => {
                    row.hashes.push(seen.sha256.clone());
                    sizes.push(seen.size);
                }
                Some(Err(reason)) => error(Kind::Image, reason.clone()),
                None => {}
            }
        }
        let conversation = &row.sample.conversation;
        if conversation.last_answer().is_none() {
            let message = "the last question has no answer; expected a message of `assistant`";
            error(Kind::NoAnswer, message.to_owned());
        }
        if let Err(cause) = refuse_control_tokens(self.tokenizer, &conversation.messages()) {
            error(Kind::ControlToken, cause.to_string());
            return (findings, None);
        }
        if !row.is_whole() || conversation.last_answer().is_none() {
            return (findings, None);
        }
        let (conversation, grids) = match self.placed(&row.sample, &sizes) {
            Ok(placed) => placed,
            Err(reason) => {
                error(Kind::Form, reason);
                return (findings, None);
            }
        };
        let merge_size = self.processor.config().merge_size;
        match encode_supervised(self.tokenizer, &conversation, &grids, merge_size) {
            Ok(ids) => {
                let tokens = ids.input_ids.len();
                let image: usize = grids
                    .iter()
                    .map(|grid| self.processor.num_tokens(*grid))
                    .sum();
                if tokens > self.max_length {
                    let text = tokens - image;
                    let limit = self.max_length;
                    error(
                        Kind::TooLong,
                        format!(
                            "{tokens} tokens ({text} text, {image} image), more than max_length {limit}; hint: raise max_length, lower max_pixels or shorten the text"
                        ),
                    );
                }
                (findings, Some(tokens))
            }
            Err(cause) => {
                let kind = match cause {
                    SupervisedError::NoAnswer { .. } => Kind::NoAnswer,
                    SupervisedError::Chat(ChatError::Control { .. }) => Kind::ControlToken,
                    _ => Kind::Encode,
                };
                error(kind, cause.to_string());
                (findings, None)
            }
        }
    }
}

/// Reads a data file, line by line; what is no sample becomes a finding.
fn read(path: &Path) -> Result<DataFile, CheckError> {
    let bytes = fs::read(path).map_err(|cause| CheckError::Read {
        path: path.to_owned(),
        cause,
    })?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut file = DataFile {
        path: path.to_owned(),
        lines: 0,
        rows: Vec::new(),
        findings: Vec::new(),
    };
    let rows = match rows(path, &bytes) {
        Ok(rows) => rows,
        Err(error) => {
            file.lines = 1;
            let (severity, kind) = (Severity::Error, Kind::Json);
            let finding = Finding::new(severity, kind, path, error.line, error.reason);
            file.findings.push(finding);
            return Ok(file);
        }
    };
    let mut folders = HashMap::new();
    let mut unused = UnusedKeys::default();
    for (line, text) in rows {
        let mut found = |severity, kind, message| {
            let finding = Finding::new(severity, kind, path, line, message);
            file.findings.push(finding);
        };
        file.lines += 1;
        let mut sample = match parse_line(text, path, line) {
            Ok(sample) => sample,
            Err(error) => {
                found(
                    Severity::Error,
                    kind_of(&error.fault),
                    error.fault.to_string(),
                );
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
        if images == 0 {
            let message = "the row has no image".to_owned();
            found(Severity::Warning, Kind::NoImage, message);
        }
        unused.add(line, std::mem::take(&mut sample.unknown_keys));
        let conversation = format!("{:?}", sample.conversation);
        file.rows.push(Row {
            line,
            paths: sample
                .images
                .iter()
                .map(|name| real_path(folder.join(name), &mut folders))
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

/// `path` with the true folder, so that one image has one path in all files; the name stays, for it
/// tells the study even where it is a link.
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
        // Of a folder that is not there, the image is missing, which is told in its place.
        folder.canonicalize().unwrap_or_else(|_| folder.to_owned())
    });
    real.join(name)
}

/// What kind of fault makes a line no sample.
fn kind_of(fault: &RowFault) -> Kind {
    match fault {
        RowFault::Json(_) => Kind::Json,
        RowFault::Form { .. } | RowFault::Key { .. } | RowFault::Limits(_) => Kind::Form,
        RowFault::EmptyAnswer { .. } => Kind::NoAnswer,
        RowFault::Refused { .. } | RowFault::Slip { .. } => Kind::RefusedKey,
        RowFault::Tag { .. } | RowFault::Placeholders { .. } => Kind::ImageMarks,
    }
}

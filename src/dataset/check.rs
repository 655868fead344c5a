//! Checks data files before a model is loaded: every bad row, with file, line and reason.
//!
//! Each image is decoded once, in a few threads; each row is encoded as training will encode it.
//! Nothing is repaired, cut or skipped. This module knows no tensor and no weights.

mod data_file;
mod error;
mod finding;
mod leaks;
#[cfg(test)]
mod tests;
mod thinking;

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::error::in_words;
use super::reader::DataOptions;
use crate::{
    base::files::sha256_file,
    processor::{
        chat::{ChatError, ImageGrid, refuse_control_tokens},
        patches::ImageProcessor,
        sample::{Conversation, RowFault, Sample},
        supervised::{SupervisedError, encode_supervised},
        tokenizer::Tokenizer,
    },
    study::StudyRule,
};

use data_file::{CheckedRow, DataFile, read_all};
pub use error::CheckError;
pub use finding::{CheckReport, FileCount, Finding, Kind, Severity};

/// Most threads that decode images: each holds a whole image.
const MAX_THREADS: usize = 8;

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
    /// How the data files are read.
    pub options: DataOptions,
}

/// An image file that was decoded.
#[derive(Debug, Clone)]
struct DecodedImage {
    sha256: String,
    /// Width and height in pixels, as it is shown.
    size: (usize, usize),
    /// Remarks on the image, with its name.
    remarks: Vec<String>,
}

impl Check<'_> {
    /// Checks the files of `train`, and whether those of `val` are independent of them.
    ///
    /// `progress` is called from several threads with the number of image files done and of all.
    ///
    /// # Errors
    /// [`CheckError`] if a data file cannot be read; whatever is wrong inside is a [`Finding`].
    pub fn run(
        &self,
        train: &[PathBuf],
        val: &[PathBuf],
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> Result<CheckReport, CheckError> {
        let mut files = read_all(train, &self.options)?;
        files.extend(read_all(val, &self.options)?);
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads.min(MAX_THREADS))
            .build()?;
        let images = pool.install(|| self.decode_images(&files, progress));
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
            findings.extend(thinking::disagreement(path, rows, self.opens_thinking));
        }
        let (of_train, of_val) = files.split_at_mut(train.len());
        leaks::duplicates(of_train);
        leaks::duplicates(of_val);
        let study = leaks::studies(&mut files, train.len(), &self.studies)?;
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
    fn decode_images(
        &self,
        files: &[DataFile],
        progress: &(dyn Fn(usize, usize) + Sync),
    ) -> HashMap<PathBuf, Result<DecodedImage, String>> {
        let rows = files.iter().flat_map(|file| &file.rows);
        let mut paths: Vec<&PathBuf> = rows.flat_map(|row| &row.paths).collect();
        paths.sort_unstable();
        paths.dedup();
        let (done, total) = (AtomicUsize::new(0), paths.len());
        paths
            .into_par_iter()
            .map(|path| {
                let seen = self.decode(path);
                progress(done.fetch_add(1, Ordering::Relaxed) + 1, total);
                (path.clone(), seen)
            })
            .collect()
    }

    fn decode(&self, path: &Path) -> Result<DecodedImage, String> {
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
        Ok(DecodedImage {
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
        row: &mut CheckedRow,
        images: &HashMap<PathBuf, Result<DecodedImage, String>>,
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

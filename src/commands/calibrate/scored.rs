//! What `calibrate` has computed so far, in a file beside the calibration: a run that was killed goes on from there.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions, remove_file},
    io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    eval::{
        findings::{Finding, UncertainPolicy},
        probability::{
            calibration::AskedModel,
            evidence::ClassEvidence,
            logit::{ScoreForm, SentenceContext},
        },
    },
    processor::image::RgbImage,
};

/// Layout number.
const FORMAT: u32 = 2;

/// What the logits of a file depend on; its first line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScoredHeader {
    format: u32,
    /// Model, adapter, prompt and formats; of the forms of sentences no particular one, since the scores of all are stored.
    model: AskedModel,
    /// What a drawn report that doubts a finding counts as.
    uncertain: UncertainPolicy,
    /// Type of the weights.
    dtype: String,
    /// Hash of the data set, or the generator's name.
    data: String,
}

impl ScoredHeader {
    pub(super) fn new(
        model: &AskedModel,
        uncertain: UncertainPolicy,
        dtype: String,
        data: &str,
    ) -> Self {
        Self {
            format: FORMAT,
            uncertain,
            model: AskedModel {
                form: match model.form.is_of_sentences() {
                    true => ScoreForm::Sum,
                    false => model.form,
                },
                ..model.clone()
            },
            dtype,
            data: data.to_owned(),
        }
    }

    /// In what this run differs from that of a file.
    fn differences(&self, here: &Self) -> Vec<String> {
        let mut all = self.model.differences(&here.model);
        for (what, there, here) in [
            ("data set", &self.data, &here.data),
            ("--dtype", &self.dtype, &here.dtype),
        ] {
            if there != here {
                all.push(format!("{what} {here} instead of {there}"));
            }
        }
        if self.uncertain != here.uncertain {
            all.push("--uncertain".to_owned());
        }
        all
    }
}

/// The logits of one class in all forms that what was asked has.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ClassLogits {
    pub(super) finding: Finding,
    logits: BTreeMap<ScoreForm, f64>,
}

impl ClassLogits {
    pub(super) fn of(
        class: &ClassEvidence,
        context: SentenceContext,
        policy: UncertainPolicy,
    ) -> Self {
        let forms = class.forms().iter();
        Self {
            finding: class.finding,
            logits: forms
                .map(|form| (*form, class.logit(*form, context, policy)))
                .collect(),
        }
    }

    /// The logit in a form that was asked for.
    pub(super) fn logit(&self, form: ScoreForm) -> Option<f64> {
        self.logits.get(&form).copied()
    }
}

/// One row of the data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ScoredRow {
    row: usize,
    /// Hash of the pixels of its images.
    images: String,
    /// By class; none of a row without an image.
    logits: Option<Vec<ClassLogits>>,
}

/// Identifies the pixels of some images.
pub(super) fn hash_of(images: &[RgbImage]) -> String {
    let mut hash = Sha256::new();
    for image in images {
        hash.update((image.width() as u64).to_le_bytes());
        hash.update((image.height() as u64).to_le_bytes());
        hash.update(image.pixels());
    }
    let hash = hash.finalize();
    hash[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// The file, open for more rows.
pub(super) struct ScoredFile {
    path: PathBuf,
    file: File,
    /// Rows that were there.
    there: Vec<ScoredRow>,
}

impl ScoredFile {
    /// Opens the file that belongs to the calibration `output`, or makes it.
    ///
    /// # Errors
    /// A file of another model, data set or setting, one that is damaged before its last line, or one that cannot be
    /// written.
    pub(super) fn open(output: &Path, header: &ScoredHeader) -> Result<Self> {
        let mut name = output.file_name().unwrap_or_default().to_owned();
        name.push(".partial.jsonl");
        let path = output.with_file_name(name);
        let failed = || format!("cannot write `{}`", path.display());
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .with_context(failed)?;
        let (there, whole) = read(&path, &file, header)?;
        // What a kill left of its last line goes.
        file.set_len(whole).with_context(failed)?;
        file.seek(SeekFrom::End(0)).with_context(failed)?;
        let mut this = Self { path, file, there };
        if whole == 0 {
            this.write(header)?;
        }
        Ok(this)
    }

    /// Rows that were there, in the order of the data set.
    pub(super) fn rows(&self) -> usize {
        self.there.len()
    }

    /// The logits of row `row` as they were found before; `None` where it was not reached or has other images now.
    pub(super) fn found(&self, row: usize, images: &str) -> Option<&Option<Vec<ClassLogits>>> {
        let there = self.there.iter().rev().find(|one| one.row == row)?;
        (there.images == images).then_some(&there.logits)
    }

    /// Appends a row.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub(super) fn add(
        &mut self,
        row: usize,
        images: String,
        logits: Option<Vec<ClassLogits>>,
    ) -> Result<()> {
        self.write(&ScoredRow {
            row,
            images,
            logits,
        })
    }

    fn write(&mut self, line: &impl Serialize) -> Result<()> {
        let mut text = serde_json::to_string(line)?;
        text.push('\n');
        // One call a line: a kill leaves at most the last one in part.
        let written = self.file.write_all(text.as_bytes());
        written.with_context(|| format!("cannot write `{}`", self.path.display()))
    }

    /// Removes the file: its calibration is written.
    pub(super) fn remove(self) {
        drop(self.file);
        if let Err(cause) = remove_file(&self.path)
            && cause.kind() != ErrorKind::NotFound
        {
            eprintln!("note: `{}` cannot be removed: {cause}", self.path.display());
        }
    }
}

/// Rows of a file, and how many of its bytes are whole lines.
fn read(path: &Path, file: &File, header: &ScoredHeader) -> Result<(Vec<ScoredRow>, u64)> {
    let mut reader = BufReader::new(file);
    let mut whole = 0;
    let mut rows = Vec::new();
    let mut line = String::new();
    for number in 1.. {
        line.clear();
        let read = reader
            .read_line(&mut line)
            .with_context(|| format!("cannot read `{}`", path.display()))?;
        if !line.ends_with('\n') {
            break;
        }
        whole += read as u64;
        let damaged = || {
            format!(
                "`{}` line {number} is none that `calibrate` writes; remove the file to begin anew",
                path.display()
            )
        };
        if number == 1 {
            let found: ScoredHeader = serde_json::from_str(&line).with_context(damaged)?;
            let differences = found.differences(header);
            if found.format != FORMAT || !differences.is_empty() {
                bail!(
                    "`{}` is of a run that did not end, of something else: here {}; remove it to begin anew, or name another file with --output",
                    path.display(),
                    if differences.is_empty() {
                        format!("layout {FORMAT} instead of {}", found.format)
                    } else {
                        differences.join(", ")
                    }
                );
            }
        } else {
            rows.push(serde_json::from_str(&line).with_context(damaged)?);
        }
    }
    Ok((rows, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(data: &str) -> ScoredHeader {
        let policy = UncertainPolicy::AsPresent;
        ScoredHeader::new(&AskedModel::default(), policy, "f32".into(), data)
    }

    fn logits(sum: f64) -> Option<Vec<ClassLogits>> {
        let finding = Finding::Edema;
        let logits = [(ScoreForm::Sum, sum), (ScoreForm::Mean, sum / 3.0)];
        let logits = logits.into();
        Some(vec![ClassLogits { finding, logits }])
    }

    #[test]
    fn rows_of_a_killed_run_are_there_bit_by_bit_and_half_a_line_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("c.json");
        let path = folder.path().join("c.json.partial.jsonl");
        let mut file = ScoredFile::open(&output, &header("a")).unwrap();
        file.add(0, "x".into(), logits(0.1 + 0.2)).unwrap();
        file.add(1, "y".into(), None).unwrap();
        drop(file);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{text}{{\"row\":2,\"ima")).unwrap();

        let mut again = ScoredFile::open(&output, &header("a")).unwrap();
        assert_eq!(again.rows(), 2);
        assert_eq!(again.found(0, "x"), Some(&logits(0.1 + 0.2)));
        assert_eq!(again.found(1, "y"), Some(&None));
        assert_eq!(again.found(0, "other pixels"), None);
        assert_eq!(again.found(2, "z"), None);
        // The image was another one then.
        again.add(0, "new".into(), logits(7.0)).unwrap();
        drop(again);
        let last = ScoredFile::open(&output, &header("a")).unwrap();
        assert_eq!(last.found(0, "new"), Some(&logits(7.0)));

        let error = ScoredFile::open(&output, &header("b")).err().unwrap();
        assert!(
            error.to_string().contains("data set b instead of a"),
            "{error}"
        );
        last.remove();
        assert!(!path.exists());
    }

    #[test]
    fn a_file_of_something_else_is_not_written_over() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("c.json");
        let path = folder.path().join("c.json.partial.jsonl");
        std::fs::write(&path, "notes\n").unwrap();
        let error = ScoredFile::open(&output, &header("a")).err().unwrap();
        assert!(error.to_string().contains("line 1"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "notes\n");
    }
}

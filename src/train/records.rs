//! `metrics.jsonl`: what a run measured, one JSON object a line, in the order of the steps.
//!
//! Rows carry their number of finished optimizer steps under `step`; the other keys are the
//! caller's. A row is on its way to the disk when [`MetricsLog::append`] returns, so a kill costs
//! at most the row being written.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::words::counted;
use crate::base::files::{FileError, write_atomic};

/// The file's name, in a run's folder and in its checkpoints.
pub const METRICS: &str = "metrics.jsonl";

/// One line of `metrics.jsonl`.
pub type Row = Map<String, Value>;

/// `metrics.jsonl` cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordsError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// A row that is not an object with a whole number `step`.
    #[error("cannot record `{0}`: expected an object with a whole number under `step`")]
    NoStep(String),
    /// A row that JSON cannot express.
    #[error("cannot write a row of `{}` as JSON: {cause}", .path.display())]
    Encode {
        /// The file.
        path: PathBuf,
        /// What is in the way.
        cause: serde_json::Error,
    },
}

/// What was read from a `metrics.jsonl`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Rows {
    /// The rows, in file order.
    pub rows: Vec<Row>,
    /// Lines skipped because they are no object with a `step`, counted from 1. A torn last
    /// line, as a kill leaves it, is not among them.
    pub bad_lines: Vec<usize>,
    /// Whether the last line was torn and skipped.
    pub torn: bool,
}

/// Reads the rows of `path`; a missing file has none.
///
/// # Errors
/// [`RecordsError::File`]. Damaged lines are no error: they are named in the result.
pub fn read_rows(path: &Path) -> Result<Rows, RecordsError> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(Rows::default()),
        Err(cause) => return Err(FileError::read(path, cause).into()),
    };
    let mut result = Rows::default();
    let mut lines = bytes.split(|&byte| byte == b'\n').enumerate().peekable();
    while let Some((index, line)) = lines.next() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let row: Option<Row> = serde_json::from_slice(line).ok();
        match row.filter(|row| step_of(row).is_some()) {
            Some(row) => result.rows.push(row),
            // Without a line feed at its end, the line was still being written.
            None if lines.peek().is_none() => result.torn = true,
            None => result.bad_lines.push(index + 1),
        }
    }
    Ok(result)
}

/// What [`MetricsLog::resume`] did to the file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ResumeSummary {
    /// Rows kept.
    pub kept: usize,
    /// Rows dropped because they are later than the resumed step.
    pub dropped: usize,
    /// Damaged lines dropped, counted from 1.
    pub bad_lines: Vec<usize>,
    /// Whether a torn last line was dropped.
    pub torn: bool,
    /// Rows taken from the checkpoint, which the file had lost.
    pub restored: usize,
}

impl ResumeSummary {
    /// What a person should know of it; `None` where nothing was lost but the row being written.
    pub fn warning(&self, path: &Path, copy: &Path) -> Option<String> {
        if self.bad_lines.is_empty() && self.restored == 0 {
            return None;
        }
        let lines: Vec<String> = self.bad_lines.iter().map(usize::to_string).collect();
        let damage = match lines.as_slice() {
            [] => "rows are missing".to_string(),
            [line] => format!("line {line} is damaged"),
            lines => format!("lines {} are damaged", lines.join(", ")),
        };
        let cure = match (self.restored, copy.is_file()) {
            (0, true) => "all rows of the steps gone on from are there".to_string(),
            (0, false) => format!(
                "what they held is lost, as there is no copy `{}`",
                copy.display()
            ),
            (rows, _) => format!(
                "{} restored from `{}`",
                counted(rows, "row was", "rows were"),
                copy.display()
            ),
        };
        Some(format!("`{}`: {damage}; {cure}", path.display()))
    }
}

/// Appends rows to `metrics.jsonl`.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    /// Length in bytes up to the last whole row.
    length: u64,
}

impl MetricsLog {
    /// Starts a new file; one that exists is replaced.
    ///
    /// # Errors
    /// [`RecordsError::File`].
    pub fn create(path: &Path) -> Result<Self, RecordsError> {
        write_atomic(path, |_| Ok(()))?;
        Self::open(path)
    }

    /// Goes on after `step` finished optimizer steps: rows of later steps are dropped, as those
    /// steps are about to be taken again, and so are damaged lines. A missing file is created. What the
    /// file has lost is taken from `copy`, the one in the checkpoint, if that is there.
    ///
    /// # Errors
    /// [`RecordsError::File`]; the file then still has its old content.
    pub fn resume(
        path: &Path,
        step: u64,
        copy: &Path,
    ) -> Result<(Self, ResumeSummary), RecordsError> {
        let Rows {
            mut rows,
            bad_lines,
            torn,
        } = read_rows(path)?;
        let before = rows.len();
        rows.retain(|row| step_of(row).is_some_and(|found| found <= step));
        let dropped = before - rows.len();
        let saved = read_rows(copy)?;
        let mut restored = 0;
        if !saved.rows.is_empty() && saved.bad_lines.is_empty() {
            // The checkpoint's rows are whole: its marker holds their hash.
            restored = saved.rows.iter().filter(|row| !rows.contains(row)).count();
            rows = saved.rows;
        }
        write_atomic(path, |out| {
            for row in &rows {
                serde_json::to_writer(&mut *out, row)?;
                out.write_all(b"\n")?;
            }
            Ok(())
        })?;
        let summary = ResumeSummary {
            kept: rows.len(),
            dropped,
            bad_lines,
            torn,
            restored,
        };
        Ok((Self::open(path)?, summary))
    }

    fn open(path: &Path) -> Result<Self, RecordsError> {
        let failed = |cause| FileError::write(path, cause);
        let file = File::options().append(true).open(path).map_err(failed)?;
        let length = file.metadata().map_err(failed)?.len();
        Ok(Self {
            path: path.to_path_buf(),
            file,
            length,
        })
    }

    /// Appends one row, an object with a whole number under `step`. Numbers that are not finite
    /// become `null`, as JSON has no word for them.
    ///
    /// # Errors
    /// [`RecordsError`]; the file then ends with the last whole row as before.
    pub fn append(&mut self, row: &impl Serialize) -> Result<(), RecordsError> {
        let path = &self.path;
        let value = serde_json::to_value(row).map_err(|cause| RecordsError::Encode {
            path: path.clone(),
            cause,
        })?;
        if value.as_object().and_then(step_of).is_none() {
            return Err(RecordsError::NoStep(value.to_string()));
        }
        let line = format!("{value}\n");
        if let Err(cause) = self
            .file
            .write_all(line.as_bytes())
            .and_then(|()| self.file.flush())
        {
            // A half row would swallow the next one.
            let _ = self.file.set_len(self.length);
            return Err(FileError::write(path, cause).into());
        }
        self.length += line.len() as u64;
        Ok(())
    }
}

fn step_of(row: &Row) -> Option<u64> {
    row.get("step")?.as_u64()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn steps(path: &Path) -> Vec<u64> {
        read_rows(path)
            .unwrap()
            .rows
            .iter()
            .filter_map(step_of)
            .collect()
    }

    #[test]
    fn each_row_is_in_the_file_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        log.append(&json!({"step": 1, "loss": 2.5})).unwrap();
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            "{\"step\":1,\"loss\":2.5}\n"
        );
        log.append(&json!({"step": 2, "loss": f64::NAN})).unwrap();
        assert_eq!(steps(&path), [1, 2]);
        assert_eq!(read_rows(&path).unwrap().rows[1]["loss"], Value::Null);
    }

    #[test]
    fn resuming_drops_later_steps_and_a_torn_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let text = "{\"step\":1}\n{\"step\":2}\n{\"step\":2,\"eval_loss\":1}\nnonsense\n\
                    {\"step\":3}\n{\"step\":4,\"lo";
        fs::write(&path, text).unwrap();
        let (mut log, summary) = MetricsLog::resume(&path, 2, &dir.path().join("none")).unwrap();
        let expected = ResumeSummary {
            kept: 3,
            dropped: 1,
            bad_lines: vec![4],
            torn: true,
            restored: 0,
        };
        assert_eq!(summary, expected);
        let warning = summary.warning(&path, &dir.path().join("none")).unwrap();
        assert!(
            warning.contains("line 4 is damaged; what they held is lost"),
            "{warning}"
        );
        log.append(&json!({"step": 3, "loss": 0.5})).unwrap();
        assert_eq!(steps(&path), [1, 2, 2, 3]);
    }

    /// Rows after the damage up to the checkpoint's step are neither lost nor lost in silence.
    #[test]
    fn what_damage_has_taken_comes_back_from_the_checkpoint() {
        let dir = tempfile::tempdir().unwrap();
        let (path, copy) = (
            dir.path().join("metrics.jsonl"),
            dir.path().join("copy.jsonl"),
        );
        let row = |step: u64| format!("{{\"step\":{step},\"loss\":{step}.5}}\n");
        fs::write(&copy, (1..=4).map(row).collect::<String>()).unwrap();
        let damaged = format!("{}\0\0\0\n{}{}", row(1), row(4), row(5));
        fs::write(&path, damaged).unwrap();
        let (_, summary) = MetricsLog::resume(&path, 4, &copy).unwrap();
        assert_eq!(steps(&path), [1, 2, 3, 4]);
        assert_eq!((summary.restored, summary.dropped), (2, 1));
        let warning = summary.warning(&path, &copy).unwrap();
        assert!(
            warning.contains("line 2 is damaged; 2 rows were restored from"),
            "{warning}"
        );
        // Whole, nothing is said.
        let (_, summary) = MetricsLog::resume(&path, 4, &copy).unwrap();
        assert_eq!((summary.kept, summary.warning(&path, &copy)), (4, None));
    }

    #[test]
    fn a_whole_last_row_without_a_line_feed_is_kept_and_ended() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, "{\"step\":1}\n{\"step\":2}").unwrap();
        let (mut log, summary) = MetricsLog::resume(&path, 5, &dir.path().join("none")).unwrap();
        assert_eq!((summary.kept, summary.torn), (2, false));
        log.append(&json!({"step": 6})).unwrap();
        assert_eq!(steps(&path), [1, 2, 6]);
    }

    #[test]
    fn a_missing_file_resumes_empty_and_a_torn_character_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let (_, summary) = MetricsLog::resume(&path, 9, &dir.path().join("none")).unwrap();
        assert_eq!(summary, ResumeSummary::default());
        fs::write(&path, b"{\"step\":1}\n{\"note\":\"\xe8\x82").unwrap();
        let rows = read_rows(&path).unwrap();
        assert_eq!((rows.rows.len(), rows.torn), (1, true));
    }

    #[test]
    fn rows_without_a_step_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        for row in [json!({"loss": 1}), json!({"step": -1}), json!([1])] {
            assert!(matches!(log.append(&row), Err(RecordsError::NoStep(_))));
        }
        assert!(fs::read(&path).unwrap().is_empty());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_named() {
        let mut log = MetricsLog::open(Path::new("/dev/full")).unwrap();
        let error = log.append(&json!({"step": 1})).unwrap_err();
        assert!(
            matches!(error, RecordsError::File(FileError::DiskFull { .. })),
            "{error}"
        );
    }
}

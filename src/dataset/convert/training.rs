//! Rows that training reads as they are, taken as a corpus: of any file that `train` and `check` read.

use std::path::Path;
use std::sync::Arc;

use super::corpus::{CorpusRow, messages_row};
use super::error::ConvertError;
use crate::dataset::reader::{DataOptions, Plain, read_rows};
use crate::dataset::rows::DataFile;
use crate::processor::sample::{SampleError, is_training_form};

/// Rows that are looked at to tell what a file holds.
const LOOKED_AT: usize = 50;

/// The rows of a file that holds conversations, or questions and answers; `None` for reports without a question.
///
/// # Errors
/// [`ConvertError`]: the file or a row cannot be read.
pub(super) fn training_rows(
    path: &Path,
    reading: &DataOptions,
) -> Result<Option<Vec<CorpusRow>>, ConvertError> {
    let file = DataFile::read(path)?;
    let mut broken = None;
    let mut is_training = None;
    for (number, row) in file.rows()?.take(LOOKED_AT) {
        let row = row.and_then(|mut row| reading.columns.rename(&mut row).map(|()| row));
        match row {
            Ok(row) => {
                is_training = Some(is_training_form(&row));
                break;
            }
            Err(fault) => broken = broken.or(Some((number, fault))),
        }
    }
    let file_path = path.to_owned();
    let wrong = |row, fault| {
        ConvertError::Sample(SampleError {
            file: file_path.clone(),
            row,
            fault,
        })
    };
    match (is_training, broken) {
        (Some(true), _) => {}
        (Some(false), _) => return Ok(None),
        (None, None) => return Err(ConvertError::Empty(path.to_owned())),
        (None, Some((row, fault))) => return Err(wrong(row, fault)),
    }
    let read = read_rows(&file, reading, Plain::Keep, true)?;
    if read.rows.iter().all(|(_, row)| row.is_ok()) {
        read.columns.expect_all(&reading.columns, path)?;
    }
    let path: Arc<Path> = path.into();
    let rows = read.rows.into_iter().map(|(number, row)| {
        let (sample, row) = row.map_err(|fault| wrong(number, fault))?;
        messages_row(&path, number, sample, row)
    });
    rows.collect::<Result<_, _>>().map(Some)
}

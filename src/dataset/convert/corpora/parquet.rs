//! Reports in Parquet, as mirrors of corpora on the Hugging Face hub have them, mostly with the images inside.

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use super::super::error::ConvertError;
use super::super::form::{CorpusForm, CorpusKeys};
use super::super::selection::Part;
use super::named::{KeyNames, are_known, record};
use super::record::Records;
use crate::dataset::image_store::ImageStore;
use crate::dataset::rows::DataFile;
use crate::processor::sample::SampleError;

/// Reads the tables of one corpus; `train-00000-of-00002.parquet` is of the part `train`.
///
/// # Errors
/// [`ConvertError`]: a file cannot be read, or its columns are not known and not named.
pub(super) fn read(
    files: &[impl AsRef<Path>],
    keys: Option<&CorpusKeys>,
    store: &ImageStore,
) -> Result<(CorpusForm, Records), ConvertError> {
    let (form, names) = match keys {
        Some(keys) => (
            CorpusForm::Keys,
            KeyNames::Given {
                image: &keys.image,
                report: &keys.report,
            },
        ),
        None => (CorpusForm::Rows, KeyNames::Known),
    };
    let mut found = Records::default();
    for path in files {
        let path: Arc<Path> = path.as_ref().into();
        let part = part_of(&path);
        for (number, row) in DataFile::read(&path)?.rows()? {
            let row = row.map_err(|fault| SampleError {
                file: path.to_path_buf(),
                row: number,
                fault,
            })?;
            if keys.is_none() && !are_known(row.keys()) {
                let columns: Vec<&str> = row.keys().map(String::as_str).collect();
                return Err(ConvertError::Form {
                    path: path.to_path_buf(),
                    row: number,
                    what: format!("the columns `{}`", columns.join(",")),
                    expected: form.files().to_owned(),
                });
            }
            let row = Value::Object(row);
            let record = record(&path, number, &row, names, part, form, store)?;
            found.records.push(record);
        }
        found.files.push(path);
    }
    Ok((form, found))
}

/// The part that the name of a file begins with.
fn part_of(path: &Path) -> Option<Part> {
    let stem = path.file_stem()?.to_str()?;
    Part::of(stem.split(['-', '_', '.']).next()?)
}

/// Names of the columns; `None` where the file has no row that can be read.
pub(super) fn columns_of(path: &Path) -> Option<Vec<String>> {
    let file = DataFile::read(path).ok()?;
    let (_, row) = file.rows().ok()?.next()?;
    Some(row.ok()?.keys().cloned().collect())
}

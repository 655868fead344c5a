//! The one reader of data files: file → rows → samples, with the images that are no files kept as files.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value};

use super::columns::Columns;
use super::error::DatasetError;
use super::image_store::ImageStore;
use super::rows::{DataFile, RowsError};
use crate::processor::sample::{ImageSource, RowFault, Sample, parse_fields};
use crate::study::counted;

/// How data files are read, beside what is in them.
#[derive(Debug, Clone, Default)]
pub struct DataOptions {
    /// Columns under other names.
    pub columns: Columns,
    /// Whether no row need have them: they are those of other data of the same run.
    pub columns_may_be_absent: bool,
    /// Whether images are fetched from addresses on the web.
    pub allow_image_urls: bool,
    /// Whether rows are pairs of a chosen and a rejected answer.
    pub pairs: bool,
    /// Draws rows where a data set counts with a part of them.
    pub seed: u64,
    /// Where images are kept that are in rows or on the web.
    pub store: ImageStore,
}

impl DataOptions {
    /// What of these options decides what is read, as a part of a fingerprint; empty by default.
    pub(super) fn fingerprint(&self) -> String {
        if self.columns.is_empty() {
            String::new()
        } else {
            format!(" columns {}", self.columns)
        }
    }
}

/// A row that was read, and the row itself in the plain form.
pub(super) type ReadRow = (Sample, Map<String, Value>);

/// A data file whose rows were read.
pub(super) struct ReadFile {
    /// The rows with their numbers, and what is wrong with the others.
    pub(super) rows: Vec<(usize, Result<ReadRow, RowFault>)>,
    /// SHA-256 of the file.
    pub(super) sha256: String,
    /// What a reader of a result should know.
    pub(super) remarks: Vec<String>,
    /// Columns of another name that any row had.
    pub(super) columns: ColumnsSeen,
}

/// Whether the row in its plain form is needed after its sample was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Plain {
    Keep,
    Drop,
}

/// Reads all rows of a file. With `stop`, the first row that is no sample is the last one.
///
/// # Errors
/// [`DatasetError`] if the file cannot be read or an image cannot be kept; a row that is no sample is in its place.
pub(super) fn read_file(
    path: &Path,
    options: &DataOptions,
    plain: Plain,
    stop: bool,
) -> Result<ReadFile, DatasetError> {
    let file = DataFile::read(path)?;
    read_rows(&file, options, plain, stop)
}

/// As [`read_file`], of a file that is open.
pub(super) fn read_rows(
    file: &DataFile,
    options: &DataOptions,
    plain: Plain,
    stop: bool,
) -> Result<ReadFile, DatasetError> {
    read_rows_as(file, options, plain, stop, &parse_fields)
}

/// As [`read_rows`], each row by way of `parse`.
pub(super) fn read_rows_as(
    file: &DataFile,
    options: &DataOptions,
    plain: Plain,
    stop: bool,
    parse: &dyn Fn(Map<String, Value>) -> Result<ReadRow, RowFault>,
) -> Result<ReadFile, DatasetError> {
    let mut rows = Vec::new();
    let mut columns = ColumnsSeen::default();
    let (mut kept, mut addresses) = (0_usize, BTreeSet::new());
    for (number, row) in file.rows()? {
        let row = row.and_then(|mut row| {
            columns.note(&row, &options.columns);
            options.columns.rename(&mut row)?;
            let (mut sample, mut row) = parse(row)?;
            if plain == Plain::Drop {
                row = Map::new();
            }
            if !options.allow_image_urls {
                refuse_addresses(&sample)?;
            }
            for source in sample.sources.values_mut() {
                match source {
                    ImageSource::Address(address) => {
                        addresses.insert(address.clone());
                    }
                    ImageSource::Bytes(_) | ImageSource::Kept(_) => {}
                }
            }
            Ok((sample, row))
        });
        let row = match row {
            Err(fault) => Err(fault),
            Ok((mut sample, row)) => {
                for source in sample.sources.values_mut() {
                    if let ImageSource::Bytes(bytes) = source {
                        *source = ImageSource::Kept(options.store.keep(bytes)?);
                        kept += 1;
                    }
                }
                Ok((sample, row))
            }
        };
        let failed = row.is_err();
        rows.push((number, row));
        if failed && stop {
            break;
        }
    }
    let mut remarks = file.remarks.clone();
    let folder = options.store.folder().display();
    if kept > 0 {
        remarks.push(format!(
            "{} in the rows and kept in `{folder}`",
            counted(kept, "image is", "images are"),
        ));
    }
    if !addresses.is_empty() {
        let found = options.store.fetch(&addresses)?;
        for (_, row) in &mut rows {
            if let Ok((sample, _)) = row
                && let Err(fault) = place_fetched(sample, &found)
            {
                *row = Err(fault);
            }
        }
        remarks.push(format!(
            "{} from addresses on the web, fetched once into `{folder}`",
            counted(addresses.len(), "image is", "images are"),
        ));
    }
    Ok(ReadFile {
        rows,
        sha256: file.sha256.clone(),
        remarks,
        columns,
    })
}

/// An address without its query, which may hold a key.
fn shown(address: &str) -> String {
    let plain = address.split(['?', '#']).next().unwrap_or(address);
    let mut shown: String = plain.chars().take(120).collect();
    if shown.len() < address.len() {
        shown.push('…');
    }
    shown
}

fn refuse_addresses(sample: &Sample) -> Result<(), RowFault> {
    for (index, source) in &sample.sources {
        if let ImageSource::Address(address) = source {
            return Err(RowFault::Key {
                key: format!("images[{index}]"),
                found: format!("an address (`{}`)", shown(address)),
                expected: "a file; hint: `--allow-image-urls` (in a config `allow_image_urls = true`) fetches images from public addresses, once, into a cache folder".to_owned(),
            });
        }
    }
    Ok(())
}

fn place_fetched(
    sample: &mut Sample,
    found: &BTreeMap<String, Result<std::path::PathBuf, String>>,
) -> Result<(), RowFault> {
    for (index, source) in &mut sample.sources {
        let ImageSource::Address(address) = source else {
            continue;
        };
        *source = match found.get(address) {
            Some(Ok(path)) => ImageSource::Kept(path.clone()),
            failed => {
                let reason = match failed {
                    Some(Err(reason)) => reason.as_str(),
                    _ => "was not fetched",
                };
                return Err(RowFault::Key {
                    key: format!("images[{index}]"),
                    found: format!("`{}`, which {reason}", shown(address)),
                    expected: "an address that gives an image".to_owned(),
                });
            }
        };
    }
    Ok(())
}

/// Which columns of another name were in any row, and which keys there were.
#[derive(Debug, Default)]
pub(super) struct ColumnsSeen {
    seen: BTreeSet<String>,
    keys: BTreeSet<String>,
}

impl ColumnsSeen {
    fn note(&mut self, row: &Map<String, Value>, columns: &Columns) {
        const MOST_KEYS: usize = 20;
        if columns.is_empty() {
            return;
        }
        for (_, theirs) in columns.theirs() {
            if row.contains_key(theirs) && !self.seen.contains(theirs) {
                self.seen.insert(theirs.to_owned());
            }
        }
        if self.keys.len() < MOST_KEYS {
            self.keys.extend(row.keys().take(MOST_KEYS).cloned());
        }
    }

    /// Adds those of another file of the same data.
    pub(super) fn add(&mut self, other: &Self) {
        self.seen.extend(other.seen.iter().cloned());
        self.keys.extend(other.keys.iter().cloned());
    }

    /// Refuses a name that no row of `path` has.
    ///
    /// # Errors
    /// [`RowsError`].
    pub(super) fn expect_all(&self, columns: &Columns, path: &Path) -> Result<(), RowsError> {
        let mut theirs = columns.theirs();
        let Some((ours, theirs)) = theirs.find(|(_, theirs)| !self.seen.contains(*theirs)) else {
            return Ok(());
        };
        let keys: Vec<String> = self.keys.iter().map(|key| format!("`{key}`")).collect();
        Err(RowsError {
            path: path.to_owned(),
            line: 0,
            reason: format!(
                "no row has `{theirs}`, which `columns` names for `{ours}`; there are {}",
                keys.join(", ")
            ),
        })
    }
}

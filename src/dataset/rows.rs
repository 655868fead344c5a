//! The rows of a data file, whatever file it is: JSON lines, one JSON list, objects over several lines, CSV, TSV or
//! Parquet; plain or packed with gzip; UTF-8, UTF-16 or GB18030.
//!
//! What a file is decides its content, not its name, except that a table of text is known by `.csv` or `.tsv`.
//! A file that is none of these is one error with what to do.

use std::fs::File;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::folder;
pub use super::table::Rows;
use super::table::{csv_rows, delimited, parquet_rows};
use crate::base::files::{sha256_bytes, sha256_file};
use crate::base::text_file::{TextFileError, decode, is_gzip, read_limited, unpack};
use crate::processor::sample::{fields_of, is_training_form, object_of};
use crate::processor::strict_json;

/// Most bytes of a data file of text, packed and unpacked.
const MAX_BYTES: u64 = 8 << 30;

/// How many times its size a packed file may unpack to, and bytes that any may.
const MOST_PACKED: u64 = 100;
const SMALL: u64 = 256 << 20;

/// Lines that are looked at to tell JSON lines from one value over several lines.
const LOOKED_AT: usize = 50;

/// Keys under which a file holds its rows as one list.
const LISTS: [&str; 6] = ["data", "rows", "samples", "examples", "items", "instances"];

/// Why a file holds no rows that can be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}`{}: {reason}", .path.display(), match .line {
    0 => String::new(),
    line => format!(" row {line}"),
})]
pub struct RowsError {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// What is wrong, and what to do.
    pub reason: String,
}

/// Why a data file could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DataFileError {
    /// The system cannot read it.
    #[error("cannot read `{}`: {cause}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: std::io::Error,
    },
    /// It holds no rows that can be read.
    #[error(transparent)]
    Rows(#[from] RowsError),
}

/// A data file, read as far as its rows are.
#[derive(Debug)]
pub struct DataFile {
    path: PathBuf,
    content: Content,
    /// SHA-256 of the file as it is, in lower-case digits.
    pub sha256: String,
    /// What a reader of a result should know of the file.
    pub remarks: Vec<String>,
}

#[derive(Debug)]
enum Content {
    /// One JSON object a line.
    Lines(String),
    Values(Vec<(usize, Value)>),
    Table(String),
    Parquet,
}

impl DataFile {
    /// Reads a file.
    ///
    /// # Errors
    /// [`DataFileError`].
    pub fn read(path: &Path) -> Result<Self, DataFileError> {
        Self::read_limited(path, MAX_BYTES)
    }

    fn read_limited(path: &Path, limit: u64) -> Result<Self, DataFileError> {
        let failed = |error| text_error(path, error);
        if path.is_dir() {
            return Err(DataFileError::Rows(RowsError {
                path: path.to_owned(),
                line: 0,
                reason: folder::describe(path),
            }));
        }
        if starts_as_parquet(path) {
            let mut file = Self {
                path: path.to_owned(),
                content: Content::Parquet,
                sha256: String::new(),
                remarks: Vec::new(),
            };
            // A file that cannot be read is one error, not one of its first row.
            drop(file.rows()?);
            file.sha256 = sha256_file(path).map_err(|error| DataFileError::Read {
                path: path.to_owned(),
                cause: std::io::Error::other(error.to_string()),
            })?;
            return Ok(file);
        }
        let raw = read_limited(path, limit).map_err(|error| {
            let error = text_error(path, error);
            match (error, path.exists()) {
                (DataFileError::Read { path, cause }, false) => DataFileError::Read {
                    cause: match folder::absent(&path) {
                        Some(hint) => std::io::Error::new(
                            cause.kind(),
                            format!("there is no such file; {hint}"),
                        ),
                        None => cause,
                    },
                    path,
                },
                (error, _) => error,
            }
        })?;
        let sha256 = sha256_bytes(&raw);
        let packed = is_gzip(&raw);
        // Rows pack to a tenth; what unpacks to a thousand times its size is no data file.
        let unpacked = (raw.len() as u64).saturating_mul(MOST_PACKED);
        let limit = limit.min(unpacked.max(SMALL));
        let bytes = unpack(path, raw, limit).map_err(failed)?;
        if packed && bytes.starts_with(b"PAR1") {
            return Err(DataFileError::Rows(RowsError {
                path: path.to_owned(),
                line: 0,
                reason: "is a Parquet table inside gzip; hint: unpack it first, `gunzip FILE` (Parquet is packed inside)".to_owned(),
            }));
        }
        let (text, _) = decode(path, bytes).map_err(failed)?;
        let mut remarks = Vec::new();
        let content = content(path, text, &mut remarks).map_err(|(line, reason)| {
            DataFileError::Rows(RowsError {
                path: path.to_owned(),
                line,
                reason,
            })
        })?;
        Ok(Self {
            path: path.to_owned(),
            content,
            sha256,
            remarks,
        })
    }

    /// The rows; blank lines are passed over.
    ///
    /// # Errors
    /// [`RowsError`] if the header of a table cannot be used.
    pub fn rows(&self) -> Result<Rows<'_>, RowsError> {
        let failed = |line, reason| RowsError {
            path: self.path.clone(),
            line,
            reason,
        };
        Ok(match &self.content {
            Content::Lines(text) => Box::new(
                text.split('\n')
                    .enumerate()
                    .map(|(index, line)| (index + 1, line.trim()))
                    .filter(|(_, line)| !line.is_empty())
                    .map(|(number, line)| (number, fields_of(line))),
            ),
            Content::Values(values) => Box::new(
                values
                    .iter()
                    .map(|(number, value)| (*number, object_of(value.clone()))),
            ),
            Content::Table(text) => {
                let (skipped, delimiter, table) = delimited(text);
                let rows = csv_rows(table, delimiter).map_err(|why| failed(1 + skipped, why))?;
                Box::new(rows.map(move |(line, row)| (line + skipped, row)))
            }
            Content::Parquet => {
                let file = File::open(&self.path).map_err(|cause| failed(0, cause.to_string()))?;
                parquet_rows(file).map_err(|reason| failed(0, reason))?
            }
        })
    }
}

/// Whether a file begins as Parquet does; one that cannot be read is named when it is read.
pub(super) fn starts_as_parquet(path: &Path) -> bool {
    use std::io::Read;
    // A pipe would lose what is read here.
    if !path.is_file() {
        return false;
    }
    let mut magic = [0; 4];
    File::open(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok()) && magic == *b"PAR1"
}

pub(super) fn text_error(path: &Path, error: TextFileError) -> DataFileError {
    let (line, reason) = match error {
        TextFileError::Read { path, cause } => return DataFileError::Read { path, cause },
        TextFileError::Characters { line, reason, .. } => (line, reason),
        TextFileError::NotText { found, cure, .. } => {
            (0, format!("is {found} and not text; hint: {cure}"))
        }
        TextFileError::Gzip { cause, .. } => (
            0,
            format!(
                "its gzip data cannot be unpacked ({cause}); hint: was it copied whole? `gzip -t FILE` tells"
            ),
        ),
        TextFileError::TooLarge {
            limit, unpacked, ..
        } => (
            0,
            format!(
                "holds {}more than {} MiB; hint: split it into several files, or write it as Parquet",
                if unpacked { "(unpacked) " } else { "" },
                limit >> 20
            ),
        ),
    };
    DataFileError::Rows(RowsError {
        path: path.to_owned(),
        line,
        reason,
    })
}

/// Whether the name says that the file is a table of text.
fn is_named_table(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    let name = name.unwrap_or_default().to_lowercase();
    let name = name.strip_suffix(".gz").unwrap_or(&name);
    [".csv", ".tsv", ".tab"]
        .iter()
        .any(|ending| name.ends_with(ending))
}

fn is_object(line: &str) -> bool {
    line.trim_start().starts_with('{')
        && serde_json::from_str::<serde::de::IgnoredAny>(line).is_ok()
}

/// What a text is; the error is a line and a reason.
fn content(
    path: &Path,
    text: String,
    remarks: &mut Vec<String>,
) -> Result<Content, (usize, String)> {
    // Lines of old Macs; in JSON a bare CR is white space.
    let text = if text.contains('\r') && !text.contains('\n') {
        text.replace('\r', "\n")
    } else {
        text
    };
    let mut lines = text
        .split('\n')
        .enumerate()
        .map(|(index, line)| (index + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty());
    let Some((number, first)) = lines.next() else {
        return Ok(Content::Lines(text));
    };
    let is_only = lines.next().is_none();
    if !first.starts_with(['{', '[']) {
        if is_named_table(path) {
            return Ok(Content::Table(text));
        }
        let mut begin = text.lines().take(LOOKED_AT);
        if first.contains([',', '\t']) && !begin.any(is_object) {
            let columns: String = first.chars().take(80).collect();
            return Err((
                number,
                format!(
                    "is no JSON, and may be a table (columns `{columns}`); hint: a table is read from a file whose name ends in .csv or .tsv"
                ),
            ));
        }
        return Ok(Content::Lines(text));
    }
    if is_object(first) && !is_only {
        return Ok(Content::Lines(text));
    }
    match strict_json::parse_all(&text) {
        Ok(values) => values_of(values, text, remarks).map_err(|reason| (number, reason)),
        // A row that is broken is named with its line, beside others that are whole.
        Err(_) if is_only || text.lines().take(LOOKED_AT).any(is_object) => {
            Ok(Content::Lines(text))
        }
        Err(_) if first.ends_with("},") && is_object(&first[..first.len() - 1]) => Err((
            number,
            "not JSON: a comma follows the row; hint: `sed -i 's/,[[:space:]]*$//' FILE` takes such commas away"
                .to_owned(),
        )),
        Err(reason) => Err((number, format!("not JSON: {reason}"))),
    }
}

/// The rows that the values of a whole text are.
fn values_of(
    mut values: Vec<Value>,
    text: String,
    remarks: &mut Vec<String>,
) -> Result<Content, String> {
    if values.len() == 1 {
        match values.remove(0) {
            Value::Array(rows) => return Ok(numbered(rows)),
            Value::Object(mut fields) if !is_training_form(&fields) => {
                let mut lists = LISTS
                    .iter()
                    .filter(|key| fields.get(**key).is_some_and(Value::is_array));
                if let (Some(key), None) = (lists.next(), lists.next())
                    && let Some(Value::Array(rows)) = fields.shift_remove(*key)
                {
                    if !fields.is_empty() {
                        let others = fields.keys().take(5).map(|key| format!("`{key}`"));
                        remarks.push(format!(
                            "read are the rows under `{key}`; the keys beside it are not used: {}",
                            others.collect::<Vec<_>>().join(", ")
                        ));
                    }
                    return Ok(numbered(rows.into_iter().map(unwrapped).collect()));
                }
                values.push(Value::Object(fields));
            }
            value => values.push(value),
        }
    }
    if values.iter().any(Value::is_array) {
        return Err(format!(
            "holds {} JSON values with lists among them; expected one list of rows, or one row a line; hint: `jq -c '.[]' FILE` writes the rows of all lists, one a line",
            values.len()
        ));
    }
    // One row on one line is numbered by its line.
    if values.len() == 1 && text.trim().lines().count() == 1 {
        return Ok(Content::Lines(text));
    }
    Ok(numbered(values))
}

/// A row as the viewer of Hugging Face's hub wraps it.
fn unwrapped(value: Value) -> Value {
    match value {
        Value::Object(mut fields) if fields.contains_key("row_idx") => {
            fields.shift_remove("row").unwrap_or_default()
        }
        value => value,
    }
}

fn numbered(rows: Vec<Value>) -> Content {
    let rows = rows.into_iter().enumerate();
    Content::Values(rows.map(|(index, row)| (index + 1, row)).collect())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const ROW: &str =
        r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;

    fn open(name: &str, bytes: &[u8]) -> Result<DataFile, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, bytes).unwrap();
        let error = |error: DataFileError| {
            let place = format!("{}/", folder.path().display());
            error.to_string().replace(&place, "")
        };
        DataFile::read(&path).map_err(error)
    }

    /// Numbers of the rows, and how many are whole.
    fn numbers(name: &str, bytes: &[u8]) -> (Vec<usize>, usize) {
        let file = open(name, bytes).unwrap();
        let rows: Vec<_> = file.rows().unwrap().collect();
        let whole = rows.iter().filter(|(_, row)| row.is_ok()).count();
        (rows.into_iter().map(|(number, _)| number).collect(), whole)
    }

    #[test]
    fn rows_are_found_in_every_kind_of_file() {
        let pretty = serde_json::to_string_pretty(&serde_json::from_str::<Value>(ROW).unwrap());
        let pretty = pretty.unwrap();
        for (name, text, rows, whole) in [
            (
                "a.jsonl",
                format!("\u{feff}\r\n{ROW}\r\n\n  \n{ROW}"),
                vec![2, 5],
                2,
            ),
            ("a.jsonl", String::new(), vec![], 0),
            ("a.jsonl", "{bad\n{}".to_owned(), vec![1, 2], 1),
            ("a.jsonl", format!("// x\n{ROW}"), vec![1, 2], 1),
            ("a.jsonl", format!("{ROW},"), vec![1], 0),
            ("a.jsonl", format!("[{ROW},\n{ROW}]"), vec![1, 2], 2),
            ("a.json", format!("[{ROW},{ROW}]"), vec![1, 2], 2),
            ("a.json", format!("[1,{ROW}]"), vec![1, 2], 1),
            (
                "a.csv",
                "\u{feff}sep=;\r\nquery;response\r\nq,q;a\r\n".to_owned(),
                vec![3],
                1,
            ),
            (
                "a.json",
                format!("{{\"data\":[{ROW}],\"version\":1}}"),
                vec![1],
                1,
            ),
            ("a.json", format!("{ROW}\n{ROW}\n"), vec![1, 2], 2),
            ("a.json", pretty.clone(), vec![1], 1),
            ("a.json", format!("{pretty}\n{pretty}"), vec![1, 2], 2),
            ("a.jsonl", format!("{ROW}\r{ROW}"), vec![1, 2], 2),
            ("a.csv", "query,response\n\"a\",b\n".to_owned(), vec![2], 1),
            ("a.tsv", "query\tresponse\na\tb\n".to_owned(), vec![2], 1),
            (
                "a.csv",
                "query,response\r\na,b\r\n\r\nc\r\nd,e\r\n".to_owned(),
                vec![2, 4, 5],
                2,
            ),
            ("a.csv", ROW.to_owned(), vec![1], 1),
        ] {
            assert_eq!(
                numbers(name, text.as_bytes()),
                (rows, whole),
                "{name}: {text}"
            );
        }
        let wrapped = open(
            "a.json",
            format!("{{\"data\":[{ROW}],\"version\":1}}").as_bytes(),
        );
        assert!(wrapped.unwrap().remarks[0].contains("`version`"));
    }

    #[test]
    fn a_file_of_no_rows_is_one_error_with_its_cure() {
        for (name, bytes, words) in [
            (
                "a.txt",
                b"query,response\na,b\n".to_vec(),
                &["`query,response`", ".csv"][..],
            ),
            (
                "a.json",
                b"[\n{\"a\":\n1,\n}]".to_vec(),
                &["row 1: not JSON", "line 4"],
            ),
            (
                "a.json",
                format!("[{ROW}]\n[{ROW}]").into_bytes(),
                &["lists among them", "jq"],
            ),
            ("a.zip", b"PK\x03\x04..".to_vec(), &["zip", "unzip"]),
            ("a.arrow", b"ARROW1..".to_vec(), &["Arrow", "to_parquet"]),
            (
                "a.parquet",
                b"PAR1 no table PAR1".to_vec(),
                &["cannot be read as Parquet"],
            ),
            (
                "a.jsonl",
                b"{}\n{\"a\": \"\xd5\"}".to_vec(),
                &["row 2: is not UTF-8"],
            ),
            ("a.csv", b"a,a\n1,2\n".to_vec(), &["two columns `a`"]),
        ] {
            let error = match open(name, &bytes) {
                Err(error) => error,
                Ok(file) => file.rows().err().unwrap().to_string(),
            };
            for word in words {
                assert!(error.contains(word), "{word}: {error}");
            }
        }
        let error = DataFile::read(Path::new("no-such-file")).unwrap_err();
        assert!(matches!(error, DataFileError::Read { .. }));
    }
}

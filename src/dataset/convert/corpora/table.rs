//! Tables: comma, tab or semicolon between fields, perhaps compressed with gzip.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use csv::StringRecord;
use encoding_rs::{GB18030, UTF_16BE, UTF_16LE};
use flate2::read::MultiGzDecoder;

use super::super::error::ConvertError;
use crate::base::text_file;

/// Most bytes of text that a corpus file may have, unpacked.
const MOST_BYTES: u64 = 4 << 30;

/// A table with a row of names at its top.
#[derive(Debug)]
pub(super) struct Table {
    pub(super) path: Arc<Path>,
    pub(super) columns: Vec<String>,
    /// Each with the line it begins in.
    rows: Vec<(usize, StringRecord)>,
}

/// One row of a table.
#[derive(Debug, Clone, Copy)]
pub(super) struct TableRow<'a> {
    /// Line in the file, from 1.
    pub(super) number: usize,
    fields: &'a StringRecord,
}

impl TableRow<'_> {
    /// The field of a column, without spaces around it; `None` if the column is absent or the field is empty, or is what
    /// pandas writes for nothing.
    pub(super) fn get(&self, column: Option<usize>) -> Option<&str> {
        let text = self.fields.get(column?)?.trim();
        (!text.is_empty() && !["nan", "null", "none"].contains(&text.to_lowercase().as_str()))
            .then_some(text)
    }
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> std::io::Result<usize> {
    let mut found = 0;
    while found < buffer.len() {
        match file.read(&mut buffer[found..])? {
            0 => break,
            more => found += more,
        }
    }
    Ok(found)
}

/// The text of a file of a corpus.
///
/// # Errors
/// [`ConvertError::Text`]; a file of more than 4 GiB is refused.
pub(in crate::dataset::convert) fn text_of(path: &Path) -> Result<String, ConvertError> {
    Ok(text_file::read_text(path, MOST_BYTES)?.text)
}

/// What is between the fields of a table with this first line.
fn delimiter(first: &str) -> u8 {
    let count = |mark: char| first.matches(mark).count();
    let (commas, tabs, semicolons) = (count(','), count('\t'), count(';'));
    if tabs > commas && tabs >= semicolons {
        b'\t'
    } else if semicolons > commas {
        b';'
    } else {
        b','
    }
}

impl Table {
    /// Reads a whole table.
    ///
    /// # Errors
    /// [`ConvertError`] names the row that is damaged.
    pub(super) fn read(path: &Path) -> Result<Self, ConvertError> {
        Self::parse(path, &text_of(path)?)
    }

    /// As [`Self::read`], of the text of a table.
    pub(super) fn parse(path: &Path, text: &str) -> Result<Self, ConvertError> {
        let text = text.trim_start_matches(['\u{feff}', '\r', '\n']);
        let first = text.lines().next().unwrap_or_default();
        let mut reader = csv::ReaderBuilder::new()
            .delimiter(delimiter(first))
            .from_reader(text.as_bytes());
        let wrong = |cause: csv::Error| {
            let row = cause.position().map_or(1, |place| place.line() as usize);
            ConvertError::Form {
                path: path.to_owned(),
                row,
                what: format!("the row ({cause})"),
                expected: "as many fields as there are columns, and texts with line ends or commas in quotes"
                    .into(),
            }
        };
        let columns = reader.headers().map_err(wrong)?;
        let columns = columns.iter().map(|name| name.trim().to_owned()).collect();
        let mut rows = Vec::new();
        for record in reader.records() {
            let record = record.map_err(wrong)?;
            let line = record.position().map_or(rows.len() + 2, |place| {
                // The reader stops between CR and LF.
                let between = text.as_bytes().get(place.byte() as usize) == Some(&b'\n');
                place.line() as usize + usize::from(between)
            });
            rows.push((line, record));
        }
        Ok(Self {
            path: path.into(),
            columns,
            rows,
        })
    }

    /// The place of the first of these columns that is there; upper and lower case are the same.
    pub(super) fn column(&self, names: &[&str]) -> Option<usize> {
        names.iter().find_map(|name| {
            let mut columns = self.columns.iter();
            columns.position(|column| column.eq_ignore_ascii_case(name))
        })
    }

    /// The place of a column that has to be there.
    pub(super) fn needed(&self, name: &str) -> Result<usize, ConvertError> {
        self.column(&[name]).ok_or_else(|| ConvertError::Form {
            path: self.path.to_path_buf(),
            row: 1,
            what: format!("the columns `{}`", self.columns.join(",")),
            expected: format!("a column `{name}`"),
        })
    }

    /// All rows.
    pub(super) fn rows(&self) -> impl Iterator<Item = TableRow<'_>> {
        self.rows.iter().map(|(number, fields)| TableRow {
            number: *number,
            fields,
        })
    }
}

/// The names of the columns of a table, of which only the start is read.
pub(super) fn columns_of(path: &Path) -> Option<Vec<String>> {
    let text = start_of(path)?;
    let line = text
        .trim_start_matches(['\u{feff}', '\r', '\n'])
        .lines()
        .next()?;
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter(line))
        .has_headers(false)
        .from_reader(line.as_bytes());
    let record = reader.records().next()?.ok()?;
    Some(record.iter().map(|name| name.trim().to_owned()).collect())
}

/// The text that a file starts with; `None` if it cannot be read.
pub(super) fn start_of(path: &Path) -> Option<String> {
    if !path.is_file() {
        return None;
    }
    let mut file = File::open(path).ok()?;
    let mut start = vec![0; 1 << 16];
    let found = read_up_to(&mut file, &mut start).ok()?;
    start.truncate(found);
    if start.starts_with(&[0x1f, 0x8b]) {
        let mut text = vec![0; 1 << 16];
        let mut decoder = MultiGzDecoder::new(&start[..]);
        let mut found = 0;
        while found < text.len() {
            // The start of a packed file ends in its middle.
            match decoder.read(&mut text[found..]) {
                Ok(0) | Err(_) => break,
                Ok(more) => found += more,
            }
        }
        text.truncate(found);
        start = text;
    }
    Some(decoded_start(&start))
}

/// The text of the first bytes of a file, which may end in the middle of a character.
pub(super) fn decoded_start(bytes: &[u8]) -> String {
    let wide = match bytes {
        [0xff, 0xfe, ..] | [_, 0, ..] => Some(UTF_16LE),
        [0xfe, 0xff, ..] | [0, _, ..] => Some(UTF_16BE),
        _ => None,
    };
    if let Some(wide) = wide {
        return wide.decode(bytes).0.into_owned();
    }
    let end = bytes.iter().rposition(|byte| *byte == b'\n');
    let lines = &bytes[..end.map_or(bytes.len(), |end| end + 1)];
    match std::str::from_utf8(lines) {
        Ok(text) => text.to_owned(),
        Err(_) => GB18030.decode(lines).0.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn tables_are_read_whatever_divides_them() {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("a.csv", "\u{feff}Name, Text\n1,\"a, b\nc\"\n2,nan\n"),
            ("a.tsv", "Name\tText\n1\t\"a, b\nc\"\n2\t\n"),
            ("a.txt", "Name;Text\r\n1;\"a, b\nc\"\r\n2;None\r\n"),
        ] {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            let packed = dir.path().join(format!("{name}.gz"));
            let mut out = flate2::write::GzEncoder::new(
                File::create(&packed).unwrap(),
                flate2::Compression::fast(),
            );
            out.write_all(text.as_bytes()).unwrap();
            out.finish().unwrap();
            for path in [path, packed] {
                let table = Table::read(&path).unwrap();
                assert_eq!(table.columns, ["Name", "Text"]);
                assert_eq!(columns_of(&path).unwrap(), ["Name", "Text"]);
                let column = table.column(&["caption", "TEXT"]);
                let rows: Vec<_> = table
                    .rows()
                    .map(|row| (row.number, row.get(column).map(str::to_owned)))
                    .collect();
                assert_eq!(rows, [(2, Some("a, b\nc".into())), (4, None)]);
            }
        }
        let path = dir.path().join("bad.csv");
        std::fs::write(&path, "a,b\n1,2\n3\n").unwrap();
        let error = Table::read(&path).unwrap_err().to_string();
        assert!(error.contains("bad.csv` row 3"), "{error}");
        let error = Table::parse(&path, "a,b\n")
            .unwrap()
            .needed("c")
            .unwrap_err()
            .to_string();
        assert!(error.contains("a column `c`"), "{error}");
    }
}

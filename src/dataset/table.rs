//! Rows of a table: CSV and TSV, and Parquet as the Hugging Face hub and data frames write it.

use base64::{Engine, engine::general_purpose::STANDARD};
use parquet::{
    file::reader::{ChunkReader, SerializedFileReader},
    record::{Field, Row, reader::RowIter},
};
use serde_json::{Map, Number, Value};

use crate::base::panics::quietly;
use crate::processor::sample::RowFault;

/// Rows with their numbers, from 1: the line of JSON lines and of a table, else the place.
pub type Rows<'a> = Box<dyn Iterator<Item = (usize, Result<Map<String, Value>, RowFault>)> + 'a>;

/// Keys whose cells are numbers or truth values in a table of text.
const SCALARS: [&str; 4] = ["loss", "loss_scale", "min_pixels", "max_pixels"];

/// A table without the line `sep=;` that Excel reads in front of one, and the delimiter: the one named there, else the most
/// frequent of tab, comma and semicolon in the first line. The number is that of lines left out.
pub(super) fn delimited(text: &str) -> (usize, u8, &str) {
    let (first, rest) = text.split_once('\n').unwrap_or((text, ""));
    let line = first.trim().trim_matches('"').to_ascii_lowercase();
    match line.strip_prefix("sep=").map(str::as_bytes) {
        Some([named]) => (1, *named, rest),
        // A tab is trimmed.
        Some([]) => (1, b'\t', rest),
        _ => (0, delimiter(first), text),
    }
}

/// The delimiter of a table by its first line: of tab, comma and semicolon the most frequent one.
fn delimiter(first: &str) -> u8 {
    let count = |delimiter: char| first.matches(delimiter).count();
    // Of several that are as frequent, the last one here.
    let found = [(';', b';'), ('\t', b'\t'), (',', b',')];
    let most = found.into_iter().max_by_key(|(c, _)| count(*c));
    most.map_or(b',', |(_, byte)| byte)
}

/// The rows of a table of text with the line each begins in, from 1; empty cells are left out.
///
/// # Errors
/// What is wrong with the header.
pub(super) fn csv_rows(text: &str, delimiter: u8) -> Result<Rows<'_>, String> {
    let mut reader = csv::ReaderBuilder::new()
        .delimiter(delimiter)
        .from_reader(text.as_bytes());
    let columns = reader.headers().map_err(|error| in_words(&error))?;
    let columns: Vec<String> = columns.iter().map(|name| name.trim().to_owned()).collect();
    let mut sorted: Vec<&String> = columns.iter().filter(|name| !name.is_empty()).collect();
    sorted.sort_unstable();
    if let Some(pair) = sorted.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("has two columns `{}`; rename one", pair[0]));
    }
    Ok(Box::new(reader.into_records().enumerate().map(
        move |(index, record)| {
            let record = match record {
                Ok(record) => record,
                Err(error) => {
                    let line = error.position().map_or(index + 2, |at| line_of(text, at));
                    return (line, Err(RowFault::Table(in_words(&error))));
                }
            };
            let line = record.position().map_or(index + 2, |at| line_of(text, at));
            let mut row = Map::new();
            for (name, cell) in columns.iter().zip(&record) {
                // A column without a name is the index that pandas writes.
                if name.is_empty() || cell.trim().is_empty() {
                    continue;
                }
                let is_scalar = SCALARS.contains(&name.as_str());
                let scalar = is_scalar
                    .then(|| serde_json::from_str(&cell.trim().to_lowercase()).ok())
                    .flatten();
                row.insert(name.clone(), scalar.unwrap_or_else(|| cell.into()));
            }
            (line, Ok(row))
        },
    )))
}

/// The line in which a record begins: the reader places it before the line feed of the CR LF that ends the one before it.
fn line_of(text: &str, at: &csv::Position) -> usize {
    let rest = &text.as_bytes()[(at.byte() as usize).min(text.len())..];
    let ends = rest.iter().take_while(|byte| matches!(byte, b'\r' | b'\n'));
    at.line() as usize + ends.filter(|byte| **byte == b'\n').count()
}

fn in_words(error: &csv::Error) -> String {
    match error.kind() {
        csv::ErrorKind::UnequalLengths {
            expected_len, len, ..
        } => format!(
            "has {len} cells, expected {expected_len} as in the header; hint: a text that holds the delimiter, a quote or a line end is put in `\"…\"`"
        ),
        _ => error.to_string(),
    }
}

/// The rows of a Parquet file with their numbers, from 1.
///
/// # Errors
/// Why it is no Parquet file that can be read.
pub(super) fn parquet_rows(file: impl ChunkReader + 'static) -> Result<Rows<'static>, String> {
    let damaged = |reason: String| {
        format!("cannot be read as Parquet ({reason}); hint: was the file copied whole?")
    };
    let open = || SerializedFileReader::new(file).map_err(|error| error.to_string());
    let reader = quietly(open).and_then(|reader| reader).map_err(damaged)?;
    let mut rows = RowIter::from_file_into(Box::new(reader));
    let mut number = 0;
    let mut failed = false;
    Ok(Box::new(std::iter::from_fn(move || {
        // After damage the reader cannot tell where the next row begins.
        if failed {
            return None;
        }
        number += 1;
        // The decoder ends with a panic on some damage.
        let row = match quietly(|| rows.next()) {
            Ok(row) => row?.map_err(|error| error.to_string()),
            Err(panic) => Err(panic),
        };
        let row = row.map_err(damaged).and_then(fields);
        failed = row.is_err();
        Some((number, row.map_err(RowFault::Table)))
    })))
}

fn fields(row: Row) -> Result<Map<String, Value>, String> {
    let mut fields = Map::new();
    for (name, field) in row.into_columns() {
        let value = value(field).map_err(|kind| {
            format!(
                "the column `{name}` holds {kind}; expected texts, numbers, lists, structs or the bytes of images"
            )
        })?;
        fields.insert(name, value);
    }
    Ok(fields)
}

/// A value as JSON has it; bytes become base64, which is how rows hold images.
fn value(field: Field) -> Result<Value, &'static str> {
    let float = |number: f64| Number::from_f64(number).map_or(Value::Null, Value::Number);
    Ok(match field {
        Field::Null => Value::Null,
        Field::Bool(value) => value.into(),
        Field::Byte(value) => value.into(),
        Field::Short(value) => value.into(),
        Field::Int(value) | Field::Date(value) | Field::TimeMillis(value) => value.into(),
        Field::Long(value)
        | Field::TimeMicros(value)
        | Field::TimestampMillis(value)
        | Field::TimestampMicros(value) => value.into(),
        Field::UByte(value) => value.into(),
        Field::UShort(value) => value.into(),
        Field::UInt(value) => value.into(),
        Field::ULong(value) => value.into(),
        Field::Float16(value) => float(f64::from(value)),
        Field::Float(value) => float(value.into()),
        Field::Double(value) => float(value),
        Field::Decimal(_) => return Err("decimal numbers"),
        Field::Str(text) => text.into(),
        Field::Bytes(bytes) => STANDARD.encode(bytes.data()).into(),
        Field::Group(row) => {
            let mut fields = Map::new();
            for (name, field) in row.into_columns() {
                fields.insert(name, value(field)?);
            }
            fields.into()
        }
        Field::ListInternal(list) => {
            let entries = list.elements().iter().cloned().map(value);
            Value::Array(entries.collect::<Result<_, _>>()?)
        }
        Field::MapInternal(_) => return Err("maps"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_text_is_read_with_its_lines() {
        let text = "query,response,loss\n\"问,一\",\"答\n二\",FALSE\n,只有答,\n";
        let rows: Vec<_> = csv_rows(text, b',').unwrap().collect();
        let shown = |row: &Result<Map<String, Value>, RowFault>| match row {
            Ok(row) => serde_json::to_string(row).unwrap(),
            Err(_) => "broken".to_owned(),
        };
        assert_eq!(rows[0].0, 2);
        assert_eq!(
            shown(&rows[0].1),
            r#"{"query":"问,一","response":"答\n二","loss":false}"#
        );
        assert_eq!(
            (rows[1].0, shown(&rows[1].1).as_str()),
            (4, r#"{"response":"只有答"}"#)
        );
        for (first, wanted) in [
            ("a\tb,c\td", b'\t'),
            ("a;b", b';'),
            ("a", b','),
            ("a,b;c,d", b','),
        ] {
            assert_eq!(delimiter(first), wanted, "{first}");
        }
        let short: Vec<_> = csv_rows("a,b\n1\n", b',').unwrap().collect();
        assert!(short[0].1.is_err());
        assert!(csv_rows("a,a\n1,2\n", b',').is_err());
    }

    #[test]
    fn damage_of_a_parquet_file_is_an_error_and_no_panic() {
        let path = "tests/fixtures/found/forms/hf_images.parquet";
        let whole = std::fs::read(path).unwrap();
        let read = |bytes: &[u8]| -> Result<usize, String> {
            let rows = parquet_rows(bytes::Bytes::copy_from_slice(bytes))?;
            let rows = rows.map(|(_, row)| row.map_err(|fault| fault.to_string()));
            Ok(rows.collect::<Result<Vec<_>, _>>()?.len())
        };
        assert_eq!(read(&whole), Ok(2));
        let mut refused = 0;
        let places = (0..whole.len()).step_by(29);
        for at in places.chain(whole.len() - 900..whole.len()) {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x5a;
            refused += usize::from(read(&bytes).is_err());
        }
        for length in [0, 3, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
            assert!(read(&whole[..length]).is_err(), "{length}");
        }
        assert!(refused > 100, "{refused}");
    }
}

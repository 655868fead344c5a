//! The rows of a data file: its lines, or why it is no file of lines.
//!
//! Training and `check` read one row a line. Whatever else a file is (compressed, in another encoding,
//! one list, rows spread over lines, a table) is said once for the file, with what to do.

use std::path::{Path, PathBuf};

use serde_json::{Deserializer, Value};

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

/// The text of a file, a byte order mark left out.
///
/// # Errors
/// [`RowsError`] if the file is not UTF-8.
pub fn text<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a str, RowsError> {
    let fail = |line, reason: String| RowsError {
        path: path.to_owned(),
        line,
        reason,
    };
    if let Some(reason) = not_text(bytes) {
        return Err(fail(0, reason));
    }
    let text = std::str::from_utf8(bytes).map_err(|cause| {
        let good = &bytes[..cause.valid_up_to()];
        let line = good.iter().filter(|byte| **byte == b'\n').count() + 1;
        fail(
            line,
            "is not UTF-8; hint: save the file as UTF-8, for example with `iconv -f GB18030 -t UTF-8 FILE`"
                .to_owned(),
        )
    })?;
    Ok(text.trim_start_matches('\u{feff}'))
}

/// The rows of a file with their lines, from 1; blank lines and a byte order mark are passed over.
///
/// # Errors
/// [`RowsError`] if the file is not text of one JSON object a line.
pub fn rows<'a>(path: &Path, bytes: &'a [u8]) -> Result<Vec<(usize, &'a str)>, RowsError> {
    let text = text(path, bytes)?;
    let lines = text.split('\n').enumerate();
    let rows: Vec<(usize, &str)> = lines
        .map(|(index, line)| (index + 1, line.trim()))
        .filter(|(_, line)| !line.is_empty())
        .collect();
    if let Some((line, first)) = rows.first()
        && let Some(reason) = not_lines(path, text, first)
    {
        return Err(RowsError {
            path: path.to_owned(),
            line: *line,
            reason,
        });
    }
    Ok(rows)
}

/// What a file is that holds no UTF-8 text at all.
fn not_text(bytes: &[u8]) -> Option<String> {
    let packed = [
        (&b"\x1f\x8b"[..], "gzip", "`gunzip FILE`"),
        (b"PK\x03\x04", "zip", "`unzip FILE`"),
        (b"\x28\xb5\x2f\xfd", "zstd", "`unzstd FILE`"),
        (b"BZh", "bzip2", "`bunzip2 FILE`"),
        (b"\xfd7zXZ", "xz", "`unxz FILE`"),
    ];
    for (magic, name, cure) in packed {
        if bytes.starts_with(magic) {
            return Some(format!(
                "is compressed ({name}) and not UTF-8 text; hint: unpack it first, {cure}"
            ));
        }
    }
    if bytes.starts_with(b"PAR1") || bytes.starts_with(b"ARROW1") {
        let hint = "hint: write it as one JSON object a line, in pandas `to_json(FILE, orient=\"records\", lines=True, force_ascii=False)`";
        return Some(format!(
            "is a Parquet or Arrow table and not UTF-8 text; {hint}"
        ));
    }
    let half = bytes.len().min(1000);
    let marked = bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff");
    if marked || bytes[..half].contains(&0) {
        return Some(
            "is UTF-16 or binary and not UTF-8; hint: save the file as UTF-8, for example with `iconv -f UTF-16 -t UTF-8 FILE`"
                .to_owned(),
        );
    }
    None
}

/// What a text is that is not one JSON object a line; `None` if its first line is one, or is
/// broken in a way of its own.
fn not_lines(path: &Path, text: &str, first: &str) -> Option<String> {
    let convert = "`convert` reads it, or `jq -c '.[]' FILE` writes it so";
    match serde_json::from_str(first) {
        Ok(Value::Object(_)) => return None,
        Ok(Value::Array(rows)) => return Some(list(&rows, convert)),
        _ => {}
    }
    if !text.contains('\n') && text.trim().contains('\r') {
        return Some(
            "its lines end with CR alone, as on old Macs; expected LF; hint: `tr '\\r' '\\n' < FILE`"
                .to_owned(),
        );
    }
    let whole: Result<Vec<Value>, _> = Deserializer::from_str(text).into_iter().collect();
    match whole.as_deref() {
        Ok([Value::Array(rows)]) => return Some(list(rows, convert)),
        Ok([Value::Object(row)]) if !row.contains_key("messages") => {
            let keys: Vec<String> = row.keys().take(5).map(|key| format!("`{key}`")).collect();
            let cure = if row.contains_key("annotations") {
                "; hint: `convert` reads it"
            } else {
                ""
            };
            return Some(format!(
                "is one object ({}) over several lines; expected one row with `messages` a line{cure}",
                keys.join(", ")
            ));
        }
        Ok(values) => {
            let count = values.len();
            let rows = if count == 1 { "row is" } else { "rows are" };
            return Some(format!(
                "{count} {rows} spread over several lines; expected one row a line; hint: `jq -c . FILE` writes them so"
            ));
        }
        Err(_) => {}
    }
    let ending = path.extension().and_then(|ending| ending.to_str());
    let is_table = matches!(ending, Some("csv" | "tsv" | "xlsx" | "xls"));
    if is_table || (!first.contains(['{', '[']) && first.contains([',', '\t'])) {
        let columns: String = first.chars().take(80).collect();
        return Some(format!(
            "is a table (columns `{columns}`); expected one JSON object with `messages` and `images` a line"
        ));
    }
    None
}

fn list(rows: &[Value], convert: &str) -> String {
    let count = rows.len();
    let words = if count == 1 { "row" } else { "rows" };
    let has = |key: &str| rows.first().is_some_and(|row| row.get(key).is_some());
    let cure = if has("messages") {
        convert.to_owned()
    } else if has("img") && has("label") {
        "`convert` reads it, with `--images DIR` and `--output OUT`".to_owned()
    } else if has("image_id") && has("caption") {
        "`convert` reads it, with `--image-key image_id` and `--report-key caption`".to_owned()
    } else {
        "write each row as `{\"messages\": […], \"images\": […]}` on a line of its own, or let `convert` do it, with `--image-key` and `--report-key`".to_owned()
    };
    format!("is one JSON list of {count} {words}; expected one row a line; hint: {cure}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROW: &str =
        r#"{"messages":[{"role":"user","content":"q"},{"role":"assistant","content":"a"}]}"#;

    fn reason(name: &str, bytes: &[u8]) -> String {
        rows(Path::new(name), bytes).unwrap_err().to_string()
    }

    #[test]
    fn lines_are_rows_whatever_ends_them() {
        let text = format!("\u{feff}\r\n{ROW}\r\n\n  \n{ROW}");
        let found = rows(Path::new("a.jsonl"), text.as_bytes()).unwrap();
        assert_eq!(found, [(2, ROW), (5, ROW)]);
        assert_eq!(rows(Path::new("a"), b"").unwrap(), []);
        // A broken line is an error of its row, reported there.
        assert_eq!(rows(Path::new("a"), b"{bad\n{}").unwrap().len(), 2);
    }

    #[test]
    fn a_file_of_another_form_is_one_error_with_its_cure() {
        let pretty = serde_json::to_string_pretty(&serde_json::from_str::<Value>(ROW).unwrap());
        let pretty = pretty.unwrap();
        let utf16: Vec<u8> = ROW.encode_utf16().flat_map(u16::to_le_bytes).collect();
        for (name, bytes, words) in [
            (
                "a.jsonl",
                format!("[{ROW},\n{ROW}]").into_bytes(),
                &["one JSON list of 2 rows", "`convert`"][..],
            ),
            (
                "a.jsonl",
                pretty.clone().into_bytes(),
                &["1 row is spread", "jq -c"],
            ),
            (
                "a.jsonl",
                format!("{pretty}\n{pretty}").into_bytes(),
                &["2 rows are spread"],
            ),
            ("a.gz", b"\x1f\x8b\x08\x00".to_vec(), &["gzip", "gunzip"]),
            ("a.jsonl", utf16, &["UTF-16", "iconv"]),
            (
                "a.jsonl",
                b"{}\n{\"a\": \"\xd5\xe2\"}".to_vec(),
                &["row 2: is not UTF-8", "GB18030"],
            ),
            (
                "a.jsonl",
                format!("{ROW}\r{ROW}").into_bytes(),
                &["CR alone"],
            ),
            (
                "a.csv",
                b"query,response\n\"a\",b\n".to_vec(),
                &["a table (columns `query,response`)"],
            ),
            (
                "a.json",
                b"{\n \"annotations\": []\n}".to_vec(),
                &["one object (`annotations`)", "`convert`"],
            ),
        ] {
            let reason = reason(name, &bytes);
            for word in words {
                assert!(reason.contains(word), "{word}: {reason}");
            }
        }
    }
}

//! Text files as people have them: UTF-8 with or without a byte order mark, UTF-16 of either byte order, or
//! GB18030 (GBK, GB2312), plain or packed with gzip.
//!
//! What cannot be known with certainty is an error and no guess: a UTF-8 file with a damaged byte would also
//! decode as GB18030, into other words.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use encoding_rs::{Encoding, GB18030, UTF_16BE, UTF_16LE};
use flate2::read::MultiGzDecoder;

use super::files::other_kind;

/// How the text of a file is written as bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Charset {
    /// UTF-8, with or without a byte order mark.
    Utf8,
    /// UTF-16, the low byte first.
    Utf16Le,
    /// UTF-16, the high byte first.
    Utf16Be,
    /// GB18030, which GBK and GB2312 are parts of.
    Gb18030,
}

impl Charset {
    /// The name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Utf8 => "UTF-8",
            Self::Utf16Le => "UTF-16LE",
            Self::Utf16Be => "UTF-16BE",
            Self::Gb18030 => "GB18030",
        }
    }
}

/// Why a file is no text that can be read.
#[derive(Debug, thiserror::Error)]
pub enum TextFileError {
    /// The system cannot read it.
    #[error("cannot read `{}`: {cause}", .path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        cause: io::Error,
    },
    /// It holds more than is read.
    #[error(
        "`{}` holds {}more than {} MiB; hint: split it into several files", .path.display(),
        if *.unpacked { "(unpacked) " } else { "" }, .limit >> 20
    )]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// Most bytes that are read.
        limit: u64,
        /// Whether the bytes are those after unpacking.
        unpacked: bool,
    },
    /// It is packed, and damaged.
    #[error(
        "`{}`: its gzip data cannot be unpacked ({cause}); hint: was it copied whole? `gzip -t FILE` tells", .path.display()
    )]
    Gzip {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        cause: io::Error,
    },
    /// It is something else than text.
    #[error("`{}` is {found} and not text; hint: {cure}", .path.display())]
    NotText {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: &'static str,
        /// What to do.
        cure: &'static str,
    },
    /// Its bytes are no characters.
    #[error("`{}` row {line}: {reason}", .path.display())]
    Characters {
        /// The file.
        path: PathBuf,
        /// Line of the first bad byte, from 1.
        line: usize,
        /// What is wrong, and what to do.
        reason: String,
    },
}

/// The text of a file, and how it was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextFile {
    /// The text without a byte order mark.
    pub text: String,
    /// How it was written.
    pub charset: Charset,
    /// Whether it was packed with gzip.
    pub gzip: bool,
}

/// Reads a text file of any [`Charset`], plain or packed with gzip, of at most `limit` bytes packed and unpacked.
///
/// # Errors
/// [`TextFileError`] names the file, what it is, and what to do.
pub fn read_text(path: &Path, limit: u64) -> Result<TextFile, TextFileError> {
    let raw = read_limited(path, limit)?;
    let gzip = is_gzip(&raw);
    let (text, charset) = decode(path, unpack(path, raw, limit)?)?;
    Ok(TextFile {
        text,
        charset,
        gzip,
    })
}

/// The bytes of a file as they are, at most `limit`.
///
/// # Errors
/// [`TextFileError::Read`] or [`TextFileError::TooLarge`].
pub fn read_limited(path: &Path, limit: u64) -> Result<Vec<u8>, TextFileError> {
    let fail = |cause| TextFileError::Read {
        path: path.to_owned(),
        cause,
    };
    if other_kind(path) == Some("folder") {
        return Err(fail(io::Error::from(io::ErrorKind::IsADirectory)));
    }
    let file = File::open(path).map_err(fail)?;
    let size = file.metadata().map_or(0, |data| data.len());
    let too_large = || TextFileError::TooLarge {
        path: path.to_owned(),
        limit,
        unpacked: false,
    };
    if size > limit {
        return Err(too_large());
    }
    let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
    // A pipe has no size, and a file may grow meanwhile.
    let read = file.take(limit.saturating_add(1)).read_to_end(&mut bytes);
    if read.map_err(fail)? as u64 > limit {
        return Err(too_large());
    }
    Ok(bytes)
}

/// Whether bytes begin as gzip does.
pub fn is_gzip(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x1f\x8b")
}

/// `bytes`, or what they hold if they are packed with gzip: at most `limit` bytes.
///
/// # Errors
/// [`TextFileError::Gzip`] or [`TextFileError::TooLarge`].
pub fn unpack(path: &Path, bytes: Vec<u8>, limit: u64) -> Result<Vec<u8>, TextFileError> {
    if !is_gzip(&bytes) {
        return Ok(bytes);
    }
    let mut unpacked = Vec::new();
    let decoder = MultiGzDecoder::new(bytes.as_slice());
    let read = decoder
        .take(limit.saturating_add(1))
        .read_to_end(&mut unpacked)
        .map_err(|cause| TextFileError::Gzip {
            path: path.to_owned(),
            cause,
        })?;
    if read as u64 > limit {
        return Err(TextFileError::TooLarge {
            path: path.to_owned(),
            limit,
            unpacked: true,
        });
    }
    Ok(unpacked)
}

/// The text of bytes that are not packed; `path` only serves the errors.
///
/// # Errors
/// [`TextFileError::NotText`] or [`TextFileError::Characters`].
pub fn decode(path: &Path, bytes: Vec<u8>) -> Result<(String, Charset), TextFileError> {
    if let Some((found, cure)) = other_format(&bytes) {
        return Err(TextFileError::NotText {
            path: path.to_owned(),
            found,
            cure,
        });
    }
    if let Some((charset, encoding)) = utf16(&bytes) {
        let (text, damaged) = encoding.decode_with_bom_removal(&bytes);
        if damaged || bytes.len() % 2 == 1 {
            let (name, good) = (charset.name(), text.split('\u{fffd}').next());
            return Err(TextFileError::Characters {
                path: path.to_owned(),
                line: good.map_or(1, |good| good.matches('\n').count() + 1),
                reason: format!(
                    "is not {name}, although the file begins as {name} does; hint: save the file as UTF-8"
                ),
            });
        }
        return Ok((text.into_owned(), charset));
    }
    if bytes[..bytes.len().min(4096)].contains(&0) {
        return Err(TextFileError::NotText {
            path: path.to_owned(),
            found: "binary data",
            cure: "name a text file, or a table as Parquet",
        });
    }
    let cause = match String::from_utf8(bytes) {
        Ok(text) => {
            let bare = text.trim_start_matches('\u{feff}');
            let text = if bare.len() == text.len() {
                text
            } else {
                bare.to_owned()
            };
            return Ok((text, Charset::Utf8));
        }
        Err(cause) => cause,
    };
    let valid = cause.utf8_error().valid_up_to();
    let bytes = cause.into_bytes();
    if looks_like_gb18030(&bytes) {
        let (text, _, damaged) = GB18030.decode(&bytes);
        if !damaged {
            return Ok((text.into_owned(), Charset::Gb18030));
        }
    }
    let line = bytes[..valid].iter().filter(|byte| **byte == b'\n').count() + 1;
    Err(TextFileError::Characters {
        path: path.to_owned(),
        line,
        reason: "is not UTF-8, and the file is neither UTF-16 nor GB18030; hint: mend the bytes there, or save the file as UTF-8, for example with `iconv -f BIG5 -t UTF-8 FILE`".to_owned(),
    })
}

/// What bytes are that are no text whatever the encoding, and what to do.
fn other_format(bytes: &[u8]) -> Option<(&'static str, &'static str)> {
    if bytes.starts_with(b"PK\x03\x04") {
        return Some(zip_format(bytes));
    }
    if bytes.get(257..262) == Some(b"ustar") {
        return Some((
            "a tar archive (a shard of WebDataset?)",
            "unpack it (`tar -xf FILE -C DIR`) and write a line a sample that names its picture and holds its text: `{\"image\": \"000.png\", \"report\": \"…\"}`, which `convert` reads",
        ));
    }
    let start = bytes.trim_ascii_start();
    let start = start[..start.len().min(15)].to_ascii_lowercase();
    if start.starts_with(b"<!doctype html") || start.starts_with(b"<html") {
        return Some((
            "a page of the web (HTML)",
            "download the file itself, not the page about it: on a hub by its link `resolve` and not `blob`",
        ));
    }
    let formats: [(&[u8], &str, &str); 19] = [
        (
            b"version https://git-lfs",
            "a pointer of git-lfs",
            "the data are still on the server: fetch them with `git lfs pull`, or download the file from the hub",
        ),
        (
            b"\x80\x04\x95",
            "a Python pickle",
            "write its rows as JSON lines in Python, `json.dumps(row, ensure_ascii=False)` a line: a pickle can run anything when it is read",
        ),
        (
            b"\x80\x05\x95",
            "a Python pickle",
            "write its rows as JSON lines in Python, `json.dumps(row, ensure_ascii=False)` a line: a pickle can run anything when it is read",
        ),
        (
            b"\x89HDF\r\n",
            "an HDF5 file",
            "write its pictures as PNG files and its texts as JSON lines that name them",
        ),
        (
            b"\x93NUMPY",
            "a NumPy array",
            "write its pictures as PNG files and their texts as JSON lines that name them",
        ),
        (
            b"%PDF",
            "a PDF document",
            "write its texts as JSON lines, or as a table in CSV",
        ),
        (
            b"\xff\xd8\xff",
            "a JPEG image",
            "name the file that lists the images",
        ),
        (
            b"{\\rtf",
            "a document in rich text",
            "save its texts as a table in CSV",
        ),
        (
            b"\x28\xb5\x2f\xfd",
            "packed (zstd)",
            "unpack it first: `unzstd FILE`",
        ),
        (b"BZh", "packed (bzip2)", "unpack it first: `bunzip2 FILE`"),
        (b"\xfd7zXZ", "packed (xz)", "unpack it first: `unxz FILE`"),
        (b"7z\xbc\xaf\x27\x1c", "packed (7z)", "unpack it first"),
        (
            b"\x1f\x8b",
            "packed twice (gzip)",
            "unpack it first: `gunzip FILE`",
        ),
        (
            b"PAR1",
            "a Parquet table",
            "name it where a data file is taken",
        ),
        (
            b"ARROW1",
            "an Arrow table",
            "write it as Parquet, in Python `datasets.load_from_disk(…).to_parquet(FILE)`",
        ),
        (
            b"\xff\xff\xff\xff",
            "an Arrow stream (a data set saved by `datasets`)",
            "write it as Parquet, in Python `datasets.load_from_disk(FOLDER).to_parquet(FILE)`",
        ),
        (
            b"\xd0\xcf\x11\xe0",
            "a table of an old spreadsheet (.xls)",
            "save it as CSV in UTF-8 (in Excel and WPS under Save As), a study a row with its columns' names in the first; `convert` reads that",
        ),
        (
            b"SQLite format 3\0",
            "a SQLite database",
            "export its table as CSV",
        ),
        (
            b"\x89PNG",
            "a PNG image",
            "name the file that lists the images",
        ),
    ];
    formats
        .into_iter()
        .find(|(magic, ..)| bytes.starts_with(magic))
        .map(|(_, found, cure)| (found, cure))
}

/// What a zip archive is: the tables and documents of offices are some.
fn zip_format(bytes: &[u8]) -> (&'static str, &'static str) {
    // Names of the entries are in the directory at the end, and before each entry.
    let holds = |name: &[u8]| bytes.windows(name.len()).any(|part| part == name);
    if holds(b"xl/workbook") || holds(b"opendocument.spreadsheet") {
        (
            "a table of a spreadsheet (.xlsx, .ods)",
            "save it as CSV in UTF-8 (in Excel and WPS under Save As), a study a row with its columns' names in the first; `convert` reads that",
        )
    } else if holds(b"word/document") {
        ("a document (.docx)", "save its texts as a table in CSV")
    } else {
        ("packed (zip)", "unpack it first: `unzip FILE`")
    }
}

/// UTF-16 by its byte order mark, else by the zero bytes that each ASCII character has: all of them in
/// even or all in odd places.
fn utf16(bytes: &[u8]) -> Option<(Charset, &'static Encoding)> {
    let little = (Charset::Utf16Le, UTF_16LE);
    let big = (Charset::Utf16Be, UTF_16BE);
    if bytes.starts_with(b"\xff\xfe") {
        return Some(little);
    }
    if bytes.starts_with(b"\xfe\xff") {
        return Some(big);
    }
    let head = &bytes[..bytes.len().min(4096)];
    let zeros = |parity: usize| {
        let places = head.iter().skip(parity).step_by(2);
        places.filter(|byte| **byte == 0).count()
    };
    match (zeros(0), zeros(1)) {
        (0, odd) if odd > 0 => Some(little),
        (even, 0) if even > 0 => Some(big),
        _ => None,
    }
}

/// Whether bytes that are not UTF-8 are Chinese text in GB18030, and not UTF-8 with a damaged byte or another
/// old encoding: nearly all its pairs are in the zone of GB2312.
fn looks_like_gb18030(bytes: &[u8]) -> bool {
    let (mut characters, mut bad) = (0_usize, 0_usize);
    for chunk in bytes.utf8_chunks() {
        characters += chunk.valid().chars().filter(|c| !c.is_ascii()).count();
        bad += chunk.invalid().len();
    }
    if characters > bad {
        return false;
    }
    let (mut pairs, mut common) = (0_usize, 0_usize);
    let mut rest = bytes;
    while let [lead, tail @ ..] = rest {
        rest = tail;
        if *lead < 0x80 {
            continue;
        }
        pairs += 1;
        if let [trail, tail @ ..] = tail {
            let in_zone = matches!(lead, 0xa1..=0xa9 | 0xb0..=0xf7) && *trail >= 0xa1;
            common += usize::from(in_zone);
            rest = tail;
        }
    }
    common * 10 >= pairs * 9
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const TEXT: &str = "{\"报告\": \"双肺纹理清晰，未见明显异常。\"}\n第二行，心影不大。\n";

    fn read(bytes: &[u8]) -> Result<(String, Charset), TextFileError> {
        decode(Path::new("a.jsonl"), bytes.to_vec())
    }

    fn utf16(text: &str, big: bool) -> Vec<u8> {
        let bytes = |unit: u16| {
            if big {
                unit.to_be_bytes()
            } else {
                unit.to_le_bytes()
            }
        };
        text.encode_utf16().flat_map(bytes).collect()
    }

    #[test]
    fn a_text_is_the_same_in_every_encoding() {
        let marked = |text: &str, big| utf16(&format!("\u{feff}{text}"), big);
        for (bytes, charset) in [
            (TEXT.as_bytes().to_vec(), Charset::Utf8),
            (format!("\u{feff}{TEXT}").into_bytes(), Charset::Utf8),
            (utf16(TEXT, false), Charset::Utf16Le),
            (marked(TEXT, false), Charset::Utf16Le),
            (utf16(TEXT, true), Charset::Utf16Be),
            (marked(TEXT, true), Charset::Utf16Be),
            (GB18030.encode(TEXT).0.into_owned(), Charset::Gb18030),
        ] {
            assert_eq!(read(&bytes).unwrap(), (TEXT.to_owned(), charset));
        }
        assert_eq!(read(b"").unwrap().0, "");
    }

    #[test]
    fn damage_is_no_other_encoding() {
        // One byte of UTF-8 lost: the rest would decode as GB18030, into other words.
        let mut damaged = TEXT.as_bytes().to_vec();
        damaged.remove(TEXT.find("双").unwrap() + 1);
        let error = read(&damaged).unwrap_err().to_string();
        assert!(error.contains("row 1: is not UTF-8"), "{error}");
        let latin = b"na\xefve caf\xe9 \xe0 la carte\n";
        let error = read(latin).unwrap_err().to_string();
        assert!(error.contains("neither UTF-16 nor GB18030"), "{error}");
        let mut odd = utf16(TEXT, false);
        odd.pop();
        let error = read(&odd).unwrap_err().to_string();
        assert!(error.contains("is not UTF-16LE"), "{error}");
        let error = read(b"\x01\0\0\x02binary").unwrap_err().to_string();
        assert!(error.contains("binary data"), "{error}");
    }

    #[test]
    fn gzip_is_unpacked_up_to_a_limit() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl.gz");
        let pack = |text: &[u8]| {
            let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
            packer.write_all(text).unwrap();
            packer.finish().unwrap()
        };
        // Two members: `cat a.gz b.gz`.
        let (first, second) = TEXT.split_at(TEXT.find('第').unwrap());
        let packed = [pack(first.as_bytes()), pack(second.as_bytes())].concat();
        std::fs::write(&path, &packed).unwrap();
        let read = read_text(&path, 1 << 20).unwrap();
        assert_eq!((read.text.as_str(), read.gzip), (TEXT, true));
        std::fs::write(&path, &packed[..packed.len() - 9]).unwrap();
        let error = read_text(&path, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("cannot be unpacked"), "{error}");
        std::fs::write(&path, pack(&vec![b' '; 3 << 20])).unwrap();
        let error = read_text(&path, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("(unpacked) more than 1 MiB"), "{error}");
        std::fs::write(&path, vec![b' '; 2 << 20]).unwrap();
        let error = read_text(&path, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("holds more than 1 MiB"), "{error}");
    }
}

//! TensorBoard event files with scalar curves.
//!
//! A file is a sequence of records: length (`u64`), masked CRC-32C of the length, data, masked
//! CRC-32C of the data, all little-endian; the data is an `Event` in protobuf encoding, written
//! here without a protobuf library, as only four of its fields are needed.
//!
//! Source: `record_writer.cc`, `event.proto` and `summary.proto`, TensorFlow.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::base::files::FileError;

/// Writes scalars to one event file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
    length: u64,
}

impl EventWriter {
    /// Starts a new event file in `folder`, which is created if missing.
    ///
    /// When a run goes on after `resumed_step` finished steps, a marker makes TensorBoard forget the
    /// later points of the folder's older files, so that no step appears twice.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn create(folder: &Path, resumed_step: Option<u64>) -> Result<Self, FileError> {
        fs::create_dir_all(folder).map_err(|cause| FileError::write(folder, cause))?;
        let now = wall_time();
        let (path, file) = new_file(folder, now as u64)?;
        let mut writer = Self {
            path,
            file,
            length: 0,
        };
        writer.write_event(&encode_file_version(now))?;
        if let Some(step) = resumed_step {
            writer.write_event(&encode_session_start(now, step.saturating_add(1)))?;
        }
        Ok(writer)
    }

    /// The file being written.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends the values at `step` as one event, at the present time.
    ///
    /// # Errors
    /// [`FileError`]; the file then ends with the last whole record as before.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f32)]) -> Result<(), FileError> {
        self.write_event(&encode_scalars(wall_time(), step, values))
    }

    fn write_event(&mut self, event: &[u8]) -> Result<(), FileError> {
        let record = frame(event);
        if let Err(cause) = self
            .file
            .write_all(&record)
            .and_then(|()| self.file.flush())
        {
            // A reader stops for good at a torn record in the middle.
            let _ = self.file.set_len(self.length);
            return Err(FileError::write(&self.path, cause));
        }
        self.length += record.len() as u64;
        Ok(())
    }
}

/// Opens a file that did not exist: TensorBoard reads a folder's files in order of their names, so
/// the time comes first and a count keeps restarts within a second apart.
fn new_file(folder: &Path, seconds: u64) -> Result<(PathBuf, File), FileError> {
    let process = std::process::id();
    let mut count = 0_u64;
    loop {
        let name = format!("events.out.tfevents.{seconds:010}.xray-qwen3vl.{process}.{count}");
        let path = folder.join(name);
        match File::options().append(true).create_new(true).open(&path) {
            Ok(file) => return Ok((path, file)),
            Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => count += 1,
            Err(cause) => return Err(FileError::write(&path, cause)),
        }
    }
}

/// Seconds since 1970; 0 on a clock before that.
fn wall_time() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |since| since.as_secs_f64())
}

/// `Event { wall_time = 1, file_version = 3 }`, the first event of a file.
fn encode_file_version(wall_time: f64) -> Vec<u8> {
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time);
    put_bytes(&mut event, 3, b"brain.Event:2");
    event
}

/// `Event { wall_time = 1, step = 2, session_log = 7 { status = 1: START } }`: drops the points of
/// `step` and later from the files before.
fn encode_session_start(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time);
    put_uint(&mut event, 2, step);
    let mut session_log = Vec::new();
    put_uint(&mut session_log, 1, 1);
    put_bytes(&mut event, 7, &session_log);
    event
}

/// `Event { wall_time = 1, step = 2, summary = 5 { value = 1 { tag = 1, simple_value = 2 } … } }`.
fn encode_scalars(wall_time: f64, step: u64, values: &[(&str, f32)]) -> Vec<u8> {
    let mut summary = Vec::new();
    for (tag, simple_value) in values {
        let mut value = Vec::new();
        put_bytes(&mut value, 1, tag.as_bytes());
        put_varint(&mut value, 2 << 3 | FIXED_32);
        value.extend(simple_value.to_le_bytes());
        put_bytes(&mut summary, 1, &value);
    }
    let mut event = Vec::new();
    put_double(&mut event, 1, wall_time);
    put_uint(&mut event, 2, step);
    put_bytes(&mut event, 5, &summary);
    event
}

const VARINT: u64 = 0;
const FIXED_64: u64 = 1;
const LENGTH_DELIMITED: u64 = 2;
const FIXED_32: u64 = 5;

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_uint(out: &mut Vec<u8>, field: u64, value: u64) {
    put_varint(out, field << 3 | VARINT);
    put_varint(out, value);
}

fn put_double(out: &mut Vec<u8>, field: u64, value: f64) {
    put_varint(out, field << 3 | FIXED_64);
    out.extend(value.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    put_varint(out, field << 3 | LENGTH_DELIMITED);
    put_varint(out, bytes.len() as u64);
    out.extend(bytes);
}

fn frame(data: &[u8]) -> Vec<u8> {
    let length = (data.len() as u64).to_le_bytes();
    let mut record = Vec::with_capacity(data.len() + 16);
    record.extend(length);
    record.extend(masked_crc32c(&length).to_le_bytes());
    record.extend(data);
    record.extend(masked_crc32c(data).to_le_bytes());
    record
}

/// Masked so that a CRC over data that holds CRCs stays meaningful.
fn masked_crc32c(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8)
}

/// CRC-32C (Castagnoli), reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    const TABLE: [u32; 256] = crc32c_table();
    !bytes.iter().fold(!0, |crc, &byte| {
        TABLE[((crc ^ u32::from(byte)) & 0xff) as usize] ^ crc >> 8
    })
}

const fn crc32c_table() -> [u32; 256] {
    let mut table = [0; 256];
    let mut index = 0;
    while index < 256 {
        let mut crc = index as u32;
        let mut bit = 0;
        while bit < 8 {
            crc = if crc & 1 == 1 {
                crc >> 1 ^ 0x82f6_3b78
            } else {
                crc >> 1
            };
            bit += 1;
        }
        table[index] = crc;
        index += 1;
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A field of a protobuf message: number, and its integer or bytes.
    #[derive(Debug, PartialEq)]
    enum Field<'a> {
        Uint(u64, u64),
        Bytes(u64, &'a [u8]),
    }

    fn take_varint(bytes: &mut &[u8]) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes[0];
            *bytes = &bytes[1..];
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                break;
            }
        }
        value
    }

    fn fields(mut bytes: &[u8]) -> Vec<Field<'_>> {
        let mut result = Vec::new();
        while !bytes.is_empty() {
            let key = take_varint(&mut bytes);
            let length = match key & 7 {
                0 => {
                    result.push(Field::Uint(key >> 3, take_varint(&mut bytes)));
                    continue;
                }
                1 => 8,
                2 => take_varint(&mut bytes) as usize,
                5 => 4,
                other => panic!("wire type {other}"),
            };
            let (value, rest) = bytes.split_at(length);
            bytes = rest;
            result.push(Field::Bytes(key >> 3, value));
        }
        result
    }

    /// Splits a file into its records' data, with the check sums computed bit by bit.
    fn records(mut bytes: &[u8]) -> Vec<Vec<u8>> {
        let sum = |data: &[u8]| {
            let mut crc = u32::MAX;
            for bit in data
                .iter()
                .flat_map(|&byte| (0..8).map(move |i| u32::from(byte >> i & 1)))
            {
                let odd = (crc ^ bit) & 1;
                crc = (crc >> 1) ^ (0x82f6_3b78 * odd);
            }
            crc = !crc;
            crc.rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
        };
        let mut result = Vec::new();
        while !bytes.is_empty() {
            let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            assert_eq!(bytes[8..12], sum(&bytes[..8]));
            let data = &bytes[12..12 + length];
            assert_eq!(bytes[12 + length..16 + length], sum(data));
            result.push(data.to_vec());
            bytes = &bytes[16 + length..];
        }
        result
    }

    #[test]
    fn check_sums_match_the_published_vectors() {
        // RFC 3720, B.4, and the customary check value.
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(&[0xff; 32]), 0x62a8_ab43);
        let rising: Vec<u8> = (0..32).collect();
        assert_eq!(crc32c(&rising), 0x46dd_794e);
    }

    #[test]
    fn a_file_decodes_to_what_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("runs");
        let mut writer = EventWriter::create(&folder, Some(299)).unwrap();
        writer
            .scalars(300, &[("train/loss", 0.25), ("train/准确率", f32::NAN)])
            .unwrap();
        let records = records(&fs::read(writer.path()).unwrap());
        assert_eq!(records.len(), 3);

        let version = fields(&records[0]);
        assert!(matches!(version[0], Field::Bytes(1, time) if time.len() == 8));
        assert_eq!(version[1], Field::Bytes(3, b"brain.Event:2"));

        let start = fields(&records[1]);
        assert_eq!(start[1..], [Field::Uint(2, 300), Field::Bytes(7, &[8, 1])]);

        let event = fields(&records[2]);
        assert_eq!(event[1], Field::Uint(2, 300));
        let Field::Bytes(5, summary) = event[2] else {
            panic!("no summary")
        };
        let values: Vec<_> = fields(summary)
            .into_iter()
            .map(|value| match value {
                Field::Bytes(1, value) => fields(value),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(values[0][0], Field::Bytes(1, b"train/loss"));
        assert_eq!(values[0][1], Field::Bytes(2, &0.25_f32.to_le_bytes()));
        assert_eq!(values[1][0], Field::Bytes(1, "train/准确率".as_bytes()));
        assert_eq!(values[1][1], Field::Bytes(2, &f32::NAN.to_le_bytes()));
    }

    #[test]
    fn each_start_has_a_file_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let first = EventWriter::create(dir.path(), None).unwrap();
        let second = EventWriter::create(dir.path(), None).unwrap();
        assert_ne!(first.path(), second.path());
        assert!(first.path() < second.path());
    }
}

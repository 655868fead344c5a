//! The container: a zip whose entries are stored as they are.
//!
//! Source: PKWARE's APPNOTE 6.3, sections 4.3 and 4.5.3.

use std::{collections::BTreeMap, ops::Range};

use super::Problem;

/// Entries that an archive may have; a state dict has one a tensor.
const ENTRIES: usize = 200_000;

/// Sizes of records without what varies.
const LOCAL: usize = 30;
const CENTRAL: usize = 46;
const END: usize = 22;
const END64: usize = 56;
const LOCATOR: usize = 20;

/// The entries of an archive.
#[derive(Debug)]
pub(super) struct Archive<'a> {
    entries: BTreeMap<&'a str, Range<usize>>,
    /// What the names of all entries begin with.
    prefix: String,
    /// Whether any entry is compressed; its range then holds other bytes than its own.
    pub(super) compressed: bool,
}

fn damaged<T>(reason: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Damaged(reason.into()))
}

/// Bytes from `at` on; an error beyond the end.
fn part(bytes: &[u8], at: usize, length: usize) -> Result<&[u8], Problem> {
    match at.checked_add(length).and_then(|end| bytes.get(at..end)) {
        Some(part) => Ok(part),
        None => damaged("a record of the zip reaches beyond the end of the file"),
    }
}

/// A number of `length` bytes, at most eight.
fn number(bytes: &[u8], at: usize, length: usize) -> Result<u64, Problem> {
    let part = part(bytes, at, length)?;
    Ok(part
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte)))
}

/// A number that is a place or a size in memory.
fn size(bytes: &[u8], at: usize, length: usize) -> Result<usize, Problem> {
    match usize::try_from(number(bytes, at, length)?) {
        Ok(size) => Ok(size),
        Err(_) => damaged("a size is larger than memory can be"),
    }
}

/// Place and length of the directory, and how many entries it has.
struct Directory {
    at: usize,
    length: usize,
    count: usize,
}

impl Directory {
    /// Reads the records at the end of the file, which have to touch the directory and each other.
    fn find(bytes: &[u8]) -> Result<Self, Problem> {
        let Some(end) = bytes
            .len()
            .checked_sub(END)
            .filter(|end| bytes[*end..].starts_with(b"PK\x05\x06"))
        else {
            return damaged(
                "it does not end with the directory of a zip, as a file that was cut short",
            );
        };
        let locator = end
            .checked_sub(LOCATOR)
            .filter(|at| bytes[*at..].starts_with(b"PK\x06\x07"));
        let (directory, touches) = match locator {
            None => (
                Self {
                    at: size(bytes, end + 16, 4)?,
                    length: size(bytes, end + 12, 4)?,
                    count: size(bytes, end + 10, 2)?,
                },
                end,
            ),
            Some(locator) => {
                let at = size(bytes, locator + 8, 8)?;
                if !part(bytes, at, END64)?.starts_with(b"PK\x06\x06")
                    || size(bytes, at + 4, 8)?
                        .checked_add(at)
                        .and_then(|end| end.checked_add(12))
                        != Some(locator)
                {
                    return damaged("the records at the end of the zip do not fit together");
                }
                (
                    Self {
                        at: size(bytes, at + 48, 8)?,
                        length: size(bytes, at + 40, 8)?,
                        count: size(bytes, at + 32, 8)?,
                    },
                    at,
                )
            }
        };
        if directory.at.checked_add(directory.length) != Some(touches) {
            return damaged(format!(
                "the directory of the zip should take {} bytes from byte {} on, which is not where the file ends",
                directory.length, directory.at
            ));
        }
        if directory.count > ENTRIES {
            return damaged(format!(
                "the zip has {} entries, more than {ENTRIES}",
                directory.count
            ));
        }
        Ok(directory)
    }
}

/// An entry of the directory.
struct Record<'a> {
    name: &'a str,
    compressed: bool,
    /// Where its local header begins.
    at: usize,
    length: usize,
    /// Bytes of the record itself.
    bytes: usize,
}

impl<'a> Record<'a> {
    fn read(bytes: &'a [u8], at: usize) -> Result<Self, Problem> {
        let fixed = part(bytes, at, CENTRAL)?;
        if !fixed.starts_with(b"PK\x01\x02") {
            return damaged("the directory of the zip holds something else than entries");
        }
        let [name_length, extra_length, comment_length] = [28, 30, 32]
            .map(|place| usize::from(u16::from_le_bytes([fixed[place], fixed[place + 1]])));
        let Ok(name) = std::str::from_utf8(part(bytes, at + CENTRAL, name_length)?) else {
            return damaged("the name of an entry is not UTF-8");
        };
        if number(fixed, 8, 2)? & 1 != 0 {
            return damaged(format!("the entry `{name}` is encrypted"));
        }
        let (mut stored, mut length) = (number(fixed, 20, 4)?, number(fixed, 24, 4)?);
        let mut local = number(fixed, 42, 4)?;
        // Of the values that do not fit, the large ones in this order.
        let extra = part(bytes, at + CENTRAL + name_length, extra_length)?;
        let mut wide = zip64(extra)?;
        for value in [&mut length, &mut stored, &mut local] {
            if *value == u64::from(u32::MAX) {
                let Some((now, after)) = wide.split_first_chunk() else {
                    return damaged(format!("the entry `{name}` lacks its size in 64 bits"));
                };
                *value = u64::from_le_bytes(*now);
                wide = after;
            }
        }
        let compressed = number(fixed, 10, 2)? != 0;
        if !compressed && stored != length {
            return damaged(format!("the entry `{name}` has two sizes"));
        }
        let (Ok(at), Ok(length)) = (usize::try_from(local), usize::try_from(stored)) else {
            return damaged(format!("the entry `{name}` is larger than memory can be"));
        };
        Ok(Self {
            name,
            compressed,
            at,
            length,
            bytes: CENTRAL + name_length + extra_length + comment_length,
        })
    }

    /// The bytes of the entry, after its local header, which has to name it as well.
    fn data(&self, bytes: &[u8], directory: usize) -> Result<Range<usize>, Problem> {
        let fixed = part(bytes, self.at, LOCAL)?;
        let name_length = size(fixed, 26, 2)?;
        let extra_length = size(fixed, 28, 2)?;
        if !fixed.starts_with(b"PK\x03\x04")
            || part(bytes, self.at + LOCAL, name_length)? != self.name.as_bytes()
            || (number(fixed, 8, 2)? != 0) != self.compressed
        {
            return damaged(format!(
                "the entry `{}` is not where the directory says",
                self.name
            ));
        }
        let start = self.at + LOCAL + name_length + extra_length;
        match start.checked_add(self.length) {
            Some(end) if end <= directory => Ok(start..end),
            _ => damaged(format!(
                "the entry `{}` has {} bytes from byte {start} on, more than the file",
                self.name, self.length
            )),
        }
    }
}

/// The field of an entry that holds values in 64 bits; empty without one.
fn zip64(mut extra: &[u8]) -> Result<&[u8], Problem> {
    while !extra.is_empty() {
        let (kind, length) = (number(extra, 0, 2)?, size(extra, 2, 2)?);
        let field = part(extra, 4, length)?;
        if kind == 1 {
            return Ok(field);
        }
        extra = &extra[4 + length..];
    }
    Ok(&[])
}

impl<'a> Archive<'a> {
    /// Reads the directory; entries are between the start of the file and the directory, and none overlaps
    /// another.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, Problem> {
        let directory = Directory::find(bytes)?;
        let end = directory.at + directory.length;
        let mut archive = Self {
            entries: BTreeMap::new(),
            prefix: String::new(),
            compressed: false,
        };
        let (mut at, mut taken) = (directory.at, Vec::new());
        for _ in 0..directory.count {
            let record = Record::read(&bytes[..end], at)?;
            at += record.bytes;
            let data = record.data(bytes, directory.at)?;
            taken.push((record.at, data.end));
            archive.compressed |= record.compressed;
            if archive.entries.insert(record.name, data).is_some() {
                return damaged(format!("the entry `{}` is there twice", record.name));
            }
        }
        if at != end {
            return damaged("the directory of the zip has another length than its entries");
        }
        taken.sort_unstable();
        if taken.windows(2).any(|pair| pair[0].1 > pair[1].0) {
            return damaged("entries of the zip overlap");
        }
        // `archive/`, or the name of the file.
        let mut pickles = archive
            .entries
            .keys()
            .filter_map(|name| name.strip_suffix("data.pkl"))
            .filter(|prefix| prefix.ends_with('/') && prefix.matches('/').count() == 1);
        let prefix = pickles.next().map(str::to_owned);
        if pickles.next().is_some() {
            return damaged("it holds several `data.pkl`");
        }
        archive.prefix = prefix.unwrap_or_default();
        Ok(archive)
    }

    /// The bytes of an entry.
    pub(super) fn get(&self, name: &str) -> Option<Range<usize>> {
        let name = format!("{}{name}", self.prefix);
        self.entries.get(name.as_str()).cloned()
    }

    /// Whether the archive holds a program of TorchScript.
    pub(super) fn is_script(&self) -> bool {
        let code = format!("{}code/", self.prefix);
        self.get("constants.pkl").is_some()
            || self.entries.keys().any(|name| name.starts_with(&code))
    }
}

//! The container: metadata and the places of tensors, read with bounds.
//!
//! Source: `docs/gguf.md` of ggml.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
};

use memmap2::Mmap;

use super::blocks::Kind;
use crate::qwen3_vl::weights::{WeightsError, mapped};

/// Elements that a list of metadata may have; a vocabulary has some 150,000, its merges as many.
const LIST: u64 = 8_000_000;

/// A value of the metadata.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Meta {
    /// A whole number, or false and true as 0 and 1.
    Whole(i64),
    /// A float of 32 or 64 bits, as short as it can be written.
    Float(f64),
    /// A text.
    Text(String),
    /// A list of texts.
    Texts(Vec<String>),
    /// A list of numbers.
    Numbers(Vec<f64>),
}

/// A tensor's place and type.
#[derive(Debug, Clone)]
pub(super) struct Info {
    /// Row-major: the last size is that of neighbours.
    pub(super) shape: Vec<usize>,
    /// Type of its blocks.
    pub(super) kind: Kind,
    /// First byte and the one after the last.
    pub(super) range: (usize, usize),
}

/// An open GGUF file, its header read.
#[derive(Debug)]
pub(in super::super) struct GgufFile {
    /// Where it is.
    pub(super) path: PathBuf,
    /// Its bytes.
    pub(super) map: Arc<Mmap>,
    /// Metadata by key.
    pub(super) meta: BTreeMap<String, Meta>,
    /// Tensors by name.
    pub(super) tensors: BTreeMap<String, Info>,
}

/// What is left of the header.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// Why a header cannot be read.
type Problem = String;

impl<'a> Reader<'a> {
    fn take(&mut self, count: u64) -> Result<&'a [u8], Problem> {
        let end = usize::try_from(count)
            .ok()
            .and_then(|count| self.at.checked_add(count))
            .filter(|end| *end <= self.bytes.len())
            .ok_or_else(|| {
                format!(
                    "the header ends at byte {} inside a value",
                    self.bytes.len()
                )
            })?;
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Problem> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, Problem> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Problem> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn text(&mut self) -> Result<String, Problem> {
        let length = self.u64()?;
        let bytes = self.take(length)?;
        String::from_utf8(bytes.to_vec()).map_err(|_| "a text is not UTF-8".to_string())
    }

    /// A value that is no list; `None` for a type that is none.
    fn scalar(&mut self, kind: u32) -> Result<Meta, Problem> {
        let shortest = |value: f32| value.to_string().parse().unwrap_or(f64::from(value));
        Ok(match kind {
            0 | 7 => Meta::Whole(i64::from(self.array::<1>()?[0])),
            1 => Meta::Whole(i64::from(i8::from_le_bytes(self.array()?))),
            2 => Meta::Whole(i64::from(u16::from_le_bytes(self.array()?))),
            3 => Meta::Whole(i64::from(i16::from_le_bytes(self.array()?))),
            4 => Meta::Whole(i64::from(self.u32()?)),
            5 => Meta::Whole(i64::from(i32::from_le_bytes(self.array()?))),
            6 => Meta::Float(shortest(f32::from_le_bytes(self.array()?))),
            8 => Meta::Text(self.text()?),
            10 => Meta::Whole(i64::try_from(self.u64()?).unwrap_or(i64::MAX)),
            11 => Meta::Whole(i64::from_le_bytes(self.array()?)),
            12 => Meta::Float(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("type {other} of a value is not known")),
        })
    }

    fn value(&mut self) -> Result<Meta, Problem> {
        let kind = self.u32()?;
        if kind != 9 {
            return self.scalar(kind);
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        let smallest = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            _ => 8,
        };
        let left = (self.bytes.len() - self.at) as u64;
        if count > LIST || count.saturating_mul(smallest) > left {
            return Err(format!(
                "a list of {count} values is longer than the file, or than {LIST}"
            ));
        }
        if kind == 8 {
            let texts: Result<_, Problem> = (0..count).map(|_| self.text()).collect();
            return Ok(Meta::Texts(texts?));
        }
        let numbers: Result<_, Problem> = (0..count)
            .map(|_| match self.scalar(kind)? {
                Meta::Whole(whole) => Ok(whole as f64),
                Meta::Float(float) => Ok(float),
                _ => Err("a list of lists".to_string()),
            })
            .collect();
        Ok(Meta::Numbers(numbers?))
    }

    /// Name, shape, type and offset of a tensor.
    fn info(&mut self) -> Result<(String, Vec<usize>, u32, u64), Problem> {
        let name = self.text()?;
        let rank = self.u32()?;
        if rank > 4 {
            return Err(format!(
                "tensor `{name}` has {rank} sizes, expected at most 4"
            ));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            let size = self.u64()?;
            shape.push(usize::try_from(size).map_err(|_| format!("tensor `{name}` is immense"))?);
        }
        shape.reverse();
        Ok((name, shape, self.u32()?, self.u64()?))
    }
}

impl GgufFile {
    /// Maps a file and reads its header.
    ///
    /// # Errors
    /// [`WeightsError::Read`], [`WeightsError::Gguf`].
    pub(super) fn open(path: &Path) -> Result<Self, WeightsError> {
        let (_, map) = mapped(path)?;
        let (meta, tensors) = parse(&map).map_err(|reason| WeightsError::Gguf {
            path: path.to_path_buf(),
            reason,
        })?;
        Ok(Self {
            path: path.to_path_buf(),
            map,
            meta,
            tensors,
        })
    }

    /// The error of this file.
    pub(super) fn refuse(&self, reason: impl Into<String>) -> WeightsError {
        WeightsError::Gguf {
            path: self.path.clone(),
            reason: reason.into(),
        }
    }

    /// A text of the metadata.
    pub(super) fn text(&self, key: &str) -> Option<&str> {
        match self.meta.get(key) {
            Some(Meta::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// A list of texts of the metadata.
    pub(super) fn texts(&self, key: &str) -> Option<&[String]> {
        match self.meta.get(key) {
            Some(Meta::Texts(texts)) => Some(texts),
            _ => None,
        }
    }

    /// A list of numbers of the metadata.
    pub(super) fn numbers(&self, key: &str) -> Option<&[f64]> {
        match self.meta.get(key) {
            Some(Meta::Numbers(numbers)) => Some(numbers),
            _ => None,
        }
    }

    /// A whole number that is not negative.
    pub(super) fn whole(&self, key: &str) -> Option<u64> {
        match self.meta.get(key) {
            Some(Meta::Whole(number)) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// Any number.
    pub(super) fn number(&self, key: &str) -> Option<f64> {
        match self.meta.get(key) {
            Some(Meta::Whole(number)) => Some(*number as f64),
            Some(Meta::Float(number)) => Some(*number),
            _ => None,
        }
    }

    /// Which part of how many this file is, from 0; `None` where the model is in one file.
    pub(super) fn part(&self) -> Option<(u64, u64)> {
        let count = self.whole("split.count").filter(|count| *count > 1)?;
        Some((self.whole("split.no").unwrap_or(0), count))
    }

    /// The other parts of a model in several files, of which this is the first.
    ///
    /// # Errors
    /// [`WeightsError::Gguf`]: this is not the first part, a part is missing or of another model, or a tensor is in two.
    pub(super) fn other_parts(&self) -> Result<Vec<Self>, WeightsError> {
        let Some((number, count)) = self.part() else {
            return Ok(Vec::new());
        };
        let name = self
            .path
            .file_stem()
            .map(|stem| stem.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        let named = |part: u64| format!("-{:05}-of-{count:05}", part + 1);
        if number != 0 {
            return Err(self.refuse(format!(
                "this is part {} of {count} of a model in several files; name the first one, which ends in `{}.gguf`",
                number + 1,
                named(0)
            )));
        }
        let Some(stem) = name.strip_suffix(&named(0)) else {
            return Err(self.refuse(format!(
                "this is the first of {count} parts, and the others are found by name: expected a name that ends in `{}.gguf`",
                named(0)
            )));
        };
        let mut parts: Vec<Self> = Vec::new();
        for part in 1..count {
            let path = self
                .path
                .with_file_name(format!("{stem}{}.gguf", named(part)));
            if !path.is_file() {
                return Err(self.refuse(format!(
                    "part {} of {count} is missing: there is no `{}`; download all parts into one folder",
                    part + 1,
                    path.display()
                )));
            }
            let found = Self::open(&path)?;
            if found.part() != Some((part, count)) {
                return Err(found.refuse(format!(
                    "its metadata does not say that it is part {} of {count}; download the file again",
                    part + 1
                )));
            }
            let before = || std::iter::once(self).chain(&parts);
            let again = |name: &&String| before().any(|part| part.tensors.contains_key(*name));
            if let Some(name) = found.tensors.keys().find(again) {
                return Err(found.refuse(format!("tensor `{name}` is in an earlier part too")));
            }
            parts.push(found);
        }
        let tensors: usize = std::iter::once(self)
            .chain(&parts)
            .map(|part| part.tensors.len())
            .sum();
        match self.whole("split.tensors.count") {
            Some(expected) if expected != tensors as u64 => Err(self.refuse(format!(
                "its parts hold {tensors} tensors, expected {expected}; download all of them again"
            ))),
            _ => Ok(parts),
        }
    }

    /// `general.architecture`.
    pub(super) fn architecture(&self) -> &str {
        self.text("general.architecture").unwrap_or("")
    }
}

type Header = (BTreeMap<String, Meta>, BTreeMap<String, Info>);

fn parse(bytes: &[u8]) -> Result<Header, Problem> {
    let mut reader = Reader { bytes, at: 0 };
    if bytes.starts_with(b"version https://git-lfs") {
        return Err(
            "it is a pointer of Git LFS and not the weights (`git lfs pull` brings them)".into(),
        );
    }
    if reader.take(4).ok() != Some(b"GGUF") {
        return Err("it does not begin with `GGUF`".into());
    }
    match reader.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() <= 3 => {
            return Err("it is written for big-endian machines".into());
        }
        version => return Err(format!("version {version} of the format, expected 2 or 3")),
    }
    let (tensors, pairs) = (reader.u64()?, reader.u64()?);
    // The least that an entry takes.
    if tensors
        .saturating_mul(24)
        .saturating_add(pairs.saturating_mul(13))
        > bytes.len() as u64
    {
        return Err(format!(
            "{tensors} tensors and {pairs} keys are more than the file has room for"
        ));
    }
    let mut meta = BTreeMap::new();
    for _ in 0..pairs {
        let key = reader.text()?;
        let value = reader
            .value()
            .map_err(|reason| format!("key `{key}`: {reason}"))?;
        meta.insert(key, value);
    }
    let mut infos = Vec::new();
    for _ in 0..tensors {
        infos.push(reader.info()?);
    }
    let alignment = match meta.get("general.alignment") {
        None => 32,
        Some(Meta::Whole(size @ 1..=65536)) if size & (size - 1) == 0 => *size as usize,
        Some(other) => {
            return Err(format!(
                "key `general.alignment` is {other:?}, expected a power of two"
            ));
        }
    };
    let start = reader.at.next_multiple_of(alignment);
    let mut found = BTreeMap::new();
    for (name, shape, kind, offset) in infos {
        let kind = Kind::new(kind).map_err(|kind| {
            format!("tensor `{name}` is of type {kind}, which is not read here; take a file in F16, BF16, Q8_0, Q6_K, Q5_K_M, Q4_K_M or IQ4_XS")
        })?;
        let range = (|| {
            let elements = shape
                .iter()
                .try_fold(1usize, |product, size| product.checked_mul(*size))?;
            let columns = shape.last().copied().unwrap_or(1);
            if columns == 0 || columns % kind.block() != 0 {
                return None;
            }
            let size = (elements / kind.block()).checked_mul(kind.bytes())?;
            let from = start.checked_add(usize::try_from(offset).ok()?)?;
            let to = from.checked_add(size)?;
            (to <= bytes.len()).then_some((from, to))
        })();
        let Some(range) = range else {
            return Err(format!(
                "tensor `{name}` {shape:?} reaches beyond the end of the file, or is not of whole blocks; download the file again"
            ));
        };
        if found
            .insert(name.clone(), Info { shape, kind, range })
            .is_some()
        {
            return Err(format!("tensor `{name}` is there twice"));
        }
    }
    Ok((meta, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small file: one key, one tensor of two floats.
    fn small() -> Vec<u8> {
        let mut bytes = b"GGUF".to_vec();
        bytes.extend(3u32.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        bytes.extend(1u64.to_le_bytes());
        let text = |bytes: &mut Vec<u8>, text: &str| {
            bytes.extend((text.len() as u64).to_le_bytes());
            bytes.extend(text.as_bytes());
        };
        text(&mut bytes, "general.architecture");
        bytes.extend(8u32.to_le_bytes());
        text(&mut bytes, "qwen3vl");
        text(&mut bytes, "a.weight");
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(2u64.to_le_bytes());
        bytes.extend(0u32.to_le_bytes());
        bytes.extend(0u64.to_le_bytes());
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(1.5f32.to_le_bytes());
        bytes.extend((-2f32).to_le_bytes());
        bytes
    }

    #[test]
    fn a_small_file_reads() {
        let (meta, tensors) = parse(&small()).unwrap();
        assert_eq!(meta["general.architecture"], Meta::Text("qwen3vl".into()));
        assert_eq!(tensors["a.weight"].shape, [2]);
    }

    /// Every cut and every changed byte gives an error or another file, never a panic.
    #[test]
    fn damaged_files_are_errors() {
        let bytes = small();
        for cut in 0..bytes.len() {
            assert!(parse(&bytes[..cut]).is_err(), "{cut}");
        }
        for at in 0..bytes.len() {
            for value in [0, 1, 0x7f, 0x80, 0xff] {
                let mut changed = bytes.clone();
                changed[at] = value;
                let _ = parse(&changed);
            }
        }
    }
}

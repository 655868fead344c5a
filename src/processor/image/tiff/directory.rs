//! The directories of a TIFF file: its pages, and the values of their tags.

use std::collections::HashSet;
use std::ops::Range;

/// Tags of a directory.
///
/// Source: TIFF 6.0, sections 8, 10, 11, 14, 15, 17 to 22; Adobe's TIFF Technical Notes for JPEG.
pub(super) mod tag {
    pub(in super::super) const NEW_SUBFILE_TYPE: u16 = 254;
    pub(in super::super) const IMAGE_WIDTH: u16 = 256;
    pub(in super::super) const IMAGE_LENGTH: u16 = 257;
    pub(in super::super) const BITS_PER_SAMPLE: u16 = 258;
    pub(in super::super) const COMPRESSION: u16 = 259;
    pub(in super::super) const PHOTOMETRIC_INTERPRETATION: u16 = 262;
    pub(in super::super) const FILL_ORDER: u16 = 266;
    pub(in super::super) const STRIP_OFFSETS: u16 = 273;
    pub(in super::super) const ORIENTATION: u16 = 274;
    pub(in super::super) const SAMPLES_PER_PIXEL: u16 = 277;
    pub(in super::super) const ROWS_PER_STRIP: u16 = 278;
    pub(in super::super) const STRIP_BYTE_COUNTS: u16 = 279;
    pub(in super::super) const PLANAR_CONFIGURATION: u16 = 284;
    pub(in super::super) const T4_OPTIONS: u16 = 292;
    pub(in super::super) const PREDICTOR: u16 = 317;
    pub(in super::super) const COLOR_MAP: u16 = 320;
    pub(in super::super) const TILE_WIDTH: u16 = 322;
    pub(in super::super) const TILE_LENGTH: u16 = 323;
    pub(in super::super) const TILE_OFFSETS: u16 = 324;
    pub(in super::super) const TILE_BYTE_COUNTS: u16 = 325;
    pub(in super::super) const EXTRA_SAMPLES: u16 = 338;
    pub(in super::super) const SAMPLE_FORMAT: u16 = 339;
    pub(in super::super) const JPEG_TABLES: u16 = 347;
    pub(in super::super) const JPEG_INTERCHANGE_FORMAT: u16 = 513;
    pub(in super::super) const JPEG_INTERCHANGE_FORMAT_LENGTH: u16 = 514;
    pub(in super::super) const JPEG_RESTART_INTERVAL: u16 = 515;
    pub(in super::super) const JPEG_Q_TABLES: u16 = 519;
    pub(in super::super) const JPEG_DC_TABLES: u16 = 520;
    pub(in super::super) const JPEG_AC_TABLES: u16 = 521;
    pub(in super::super) const YCBCR_COEFFICIENTS: u16 = 529;
    pub(in super::super) const YCBCR_SUB_SAMPLING: u16 = 530;
    pub(in super::super) const REFERENCE_BLACK_WHITE: u16 = 532;
}

/// A TIFF or BigTIFF file.
pub(in super::super) struct Tiff<'a> {
    pub(super) bytes: &'a [u8],
    pub(super) big_endian: bool,
    /// BigTIFF: offsets and counts of 8 bytes.
    is_big: bool,
}

/// One directory, which describes one page.
pub(super) struct Directory {
    /// Of a tag that is there twice, the first counts.
    entries: Vec<Entry>,
    /// How many there are in all.
    count: u64,
    /// 0 after the last.
    next: u64,
}

/// More tags than any writer puts into a directory.
const MOST_ENTRIES: u64 = 4096;

struct Entry {
    tag: u16,
    kind: u16,
    count: u64,
    value_at: usize,
}

impl<'a> Tiff<'a> {
    /// `None` if `bytes` do not begin as a TIFF file.
    pub(in super::super) fn new(bytes: &'a [u8]) -> Option<Self> {
        let big_endian = match bytes.get(..2)? {
            b"II" => false,
            b"MM" => true,
            _ => return None,
        };
        let file = Self {
            bytes,
            big_endian,
            is_big: false,
        };
        match file.number(2, 2)? {
            42 => Some(file),
            43 => Some(Self {
                is_big: true,
                ..file
            }),
            _ => None,
        }
    }

    /// The number in `size` bytes at `at`.
    fn number(&self, at: usize, size: usize) -> Option<u64> {
        let bytes = self.bytes.get(at..at.checked_add(size)?)?;
        Some(self.join(bytes))
    }

    /// Where the header says where the first directory is.
    fn first_at(&self) -> Range<usize> {
        if self.is_big { 8..16 } else { 4..8 }
    }

    fn directory(&self, offset: u64) -> Option<Directory> {
        let (count_size, size) = if self.is_big { (8, 8) } else { (2, 4) };
        let mut at = usize::try_from(offset).ok()?;
        let count = self.number(at, count_size)?;
        at += count_size;
        let entry_size = 4 + 2 * size;
        // A count that the file cannot hold is not worked through, nor one that no writer needs.
        if count > ((self.bytes.len() / entry_size) as u64).min(MOST_ENTRIES) {
            return None;
        }
        let mut entries: Vec<Entry> = Vec::new();
        for _ in 0..count {
            let entry = Entry {
                tag: self.number(at, 2)? as u16,
                kind: self.number(at + 2, 2)? as u16,
                count: self.number(at + 4, size)?,
                value_at: at + 4 + size,
            };
            at += entry_size;
            entries.push(entry);
        }
        Some(Directory {
            entries,
            count,
            next: self.number(at, size).unwrap_or(0),
        })
    }

    /// The bytes of a tag's value, and the size of one of its numbers.
    fn value_bytes(&self, directory: &Directory, tag: u16) -> Option<(&'a [u8], u16, usize)> {
        let entry = directory.entries.iter().find(|entry| entry.tag == tag)?;
        let size = match entry.kind {
            1 | 2 | 6 | 7 => 1,
            3 | 8 => 2,
            4 | 9 | 11 | 13 => 4,
            5 | 10 | 12 | 16..=18 => 8,
            _ => return None,
        };
        let inline = if self.is_big { 8 } else { 4 };
        let length = usize::try_from(entry.count).ok()?.checked_mul(size)?;
        let at = if length <= inline {
            entry.value_at
        } else {
            usize::try_from(self.number(entry.value_at, inline)?).ok()?
        };
        let bytes = self.bytes.get(at..at.checked_add(length)?)?;
        Some((bytes, entry.kind, size))
    }

    /// The number in all of `bytes`.
    pub(super) fn join(&self, bytes: &[u8]) -> u64 {
        let join = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        if self.big_endian {
            bytes.iter().fold(0, join)
        } else {
            bytes.iter().rev().fold(0, join)
        }
    }

    /// The values of a tag of whole numbers, or `None` if it is absent or cut off.
    pub(super) fn values(&self, directory: &Directory, tag: u16) -> Option<Vec<u64>> {
        let (bytes, kind, size) = self.value_bytes(directory, tag)?;
        matches!(kind, 1 | 3 | 4 | 13 | 16 | 18)
            .then(|| bytes.chunks_exact(size).map(|b| self.join(b)).collect())
    }

    /// The first value of a tag of whole numbers.
    pub(super) fn value(&self, directory: &Directory, tag: u16) -> Option<u64> {
        self.values(directory, tag)?.first().copied()
    }

    /// The values of a tag of fractions.
    pub(super) fn fractions(&self, directory: &Directory, tag: u16) -> Option<Vec<f64>> {
        let (bytes, kind, size) = self.value_bytes(directory, tag)?;
        let number = |bytes: &[u8]| match kind {
            5 => self.join(&bytes[..4]) as f64 / self.join(&bytes[4..]) as f64,
            11 => f64::from(f32::from_bits(self.join(bytes) as u32)),
            12 => f64::from_bits(self.join(bytes)),
            _ => self.join(bytes) as f64,
        };
        let numbers: Vec<f64> = bytes.chunks_exact(size).map(number).collect();
        numbers
            .iter()
            .all(|number| number.is_finite())
            .then_some(numbers)
    }

    /// The bytes of a tag of bytes.
    pub(super) fn raw(&self, directory: &Directory, tag: u16) -> Option<&'a [u8]> {
        self.value_bytes(directory, tag).map(|(bytes, ..)| bytes)
    }

    /// The directories of the pages in order; smaller copies and masks of them do not count.
    pub(super) fn pages(&self) -> Vec<Directory> {
        const SMALLER_COPY: u64 = 1;
        const MASK: u64 = 4;
        let mut pages = Vec::new();
        let mut seen = HashSet::new();
        let first = self.first_at();
        let mut offset = self.number(first.start, first.len()).unwrap_or(0);
        // Directories that overlap, as only made-up files have them, would cost without bound.
        let mut room = self.bytes.len() as u64;
        while offset != 0 && seen.insert(offset) {
            let Some(directory) = self.directory(offset) else {
                break;
            };
            offset = directory.next;
            let Some(left) = room.checked_sub(12 * directory.count + 6) else {
                break;
            };
            room = left;
            let kind = self.value(&directory, tag::NEW_SUBFILE_TYPE).unwrap_or(0);
            if pages.is_empty() || kind & (SMALLER_COPY | MASK) == 0 {
                pages.push(directory);
            }
        }
        pages
    }
}

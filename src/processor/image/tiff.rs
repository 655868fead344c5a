//! What the decoder of TIFF does not look at: the pages of a file, and the order of its bits.

use std::borrow::Cow;
use std::collections::HashSet;
use std::ops::Range;

/// Tags of a directory; TIFF 6.0, section 8.
mod tag {
    pub(super) const NEW_SUBFILE_TYPE: u16 = 254;
    pub(super) const COMPRESSION: u16 = 259;
    pub(super) const PHOTOMETRIC_INTERPRETATION: u16 = 262;
    pub(super) const FILL_ORDER: u16 = 266;
    pub(super) const STRIP_OFFSETS: u16 = 273;
    pub(super) const STRIP_BYTE_COUNTS: u16 = 279;
    pub(super) const TILE_OFFSETS: u16 = 324;
    pub(super) const TILE_BYTE_COUNTS: u16 = 325;
    pub(super) const WANTED: [u16; 8] = [
        NEW_SUBFILE_TYPE,
        COMPRESSION,
        PHOTOMETRIC_INTERPRETATION,
        FILL_ORDER,
        STRIP_OFFSETS,
        STRIP_BYTE_COUNTS,
        TILE_OFFSETS,
        TILE_BYTE_COUNTS,
    ];
}

/// A TIFF or BigTIFF file.
pub(super) struct Tiff<'a> {
    bytes: &'a [u8],
    big_endian: bool,
    /// BigTIFF: offsets and counts of 8 bytes.
    is_big: bool,
}

/// One directory, which describes one page.
struct Directory {
    offset: u64,
    /// Those that are wanted, each once.
    entries: Vec<Entry>,
    /// How many there are in all.
    count: u64,
    /// 0 after the last.
    next: u64,
}

struct Entry {
    tag: u16,
    kind: u16,
    count: u64,
    value_at: usize,
}

/// Why the bits of a page cannot be put in the usual order.
pub(super) enum BitOrder {
    /// Its compression has an order of its own.
    Compression,
    /// Its strips or tiles are not stated, or not inside the file.
    Strips,
}

impl<'a> Tiff<'a> {
    /// `None` if `bytes` do not begin as a TIFF file.
    pub(super) fn new(bytes: &'a [u8]) -> Option<Self> {
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
        let join = |sum: u64, byte: &u8| sum << 8 | u64::from(*byte);
        Some(if self.big_endian {
            bytes.iter().fold(0, join)
        } else {
            bytes.iter().rev().fold(0, join)
        })
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
        // A count that the file cannot hold is not worked through.
        if count > (self.bytes.len() / entry_size) as u64 {
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
            if tag::WANTED.contains(&entry.tag) && entries.iter().all(|one| one.tag != entry.tag) {
                entries.push(entry);
            }
        }
        Some(Directory {
            offset,
            entries,
            count,
            next: self.number(at, size).unwrap_or(0),
        })
    }

    /// The values of a tag of whole numbers, or `None` if it is absent or cut off.
    fn values(&self, directory: &Directory, tag: u16) -> Option<Vec<u64>> {
        let entry = directory.entries.iter().find(|entry| entry.tag == tag)?;
        let size = match entry.kind {
            1 => 1,
            3 => 2,
            4 | 13 => 4,
            16 | 18 => 8,
            _ => return None,
        };
        let inline = if self.is_big { 8 } else { 4 };
        let count = usize::try_from(entry.count).ok()?;
        let length = count.checked_mul(size)?;
        if length > self.bytes.len() {
            return None;
        }
        let at = if length <= inline {
            entry.value_at
        } else {
            usize::try_from(self.number(entry.value_at, inline)?).ok()?
        };
        (0..count)
            .map(|index| self.number(at.checked_add(index * size)?, size))
            .collect()
    }

    fn value(&self, directory: &Directory, tag: u16) -> Option<u64> {
        self.values(directory, tag)?.first().copied()
    }

    /// The directories of the pages in order; smaller copies and masks of them do not count.
    fn pages(&self) -> Vec<Directory> {
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

    /// How many pages there are, 1 at least.
    pub(super) fn page_count(&self) -> usize {
        self.pages().len().max(1)
    }

    /// The file with page `page`, counted from 0, as its first, and its bits in the usual order; and
    /// whether the lowest level of that page is white.
    ///
    /// # Errors
    /// [`BitOrder`] for a page whose bits are in the other order and stay so.
    pub(super) fn page(&self, page: usize) -> Result<(Cow<'a, [u8]>, bool), BitOrder> {
        const WHITE_IS_ZERO: u64 = 0;
        const LOWEST_BIT_FIRST: u64 = 2;
        let mut bytes = Cow::Borrowed(self.bytes);
        let Some(directory) = self.pages().into_iter().nth(page) else {
            return Ok((bytes, false));
        };
        if page > 0 {
            let at = self.first_at();
            let offset = directory.offset.to_be_bytes();
            let offset = &offset[offset.len() - at.len()..];
            let target = &mut bytes.to_mut()[at];
            target.copy_from_slice(offset);
            if !self.big_endian {
                target.reverse();
            }
        }
        if self.value(&directory, tag::FILL_ORDER) == Some(LOWEST_BIT_FIRST) {
            for strip in self.strips(&directory)? {
                for byte in &mut bytes.to_mut()[strip] {
                    *byte = byte.reverse_bits();
                }
            }
        }
        let photometric = self.value(&directory, tag::PHOTOMETRIC_INTERPRETATION);
        Ok((bytes, photometric == Some(WHITE_IS_ZERO)))
    }

    /// Where the pixels of a page are.
    fn strips(&self, directory: &Directory) -> Result<Vec<Range<usize>>, BitOrder> {
        // None, LZW, both numbers of deflate, PackBits: where libtiff reverses the bits before decoding.
        if !matches!(
            self.value(directory, tag::COMPRESSION),
            None | Some(1 | 5 | 8 | 32946 | 32773)
        ) {
            return Err(BitOrder::Compression);
        }
        let values = |strip, tile| {
            let values = self.values(directory, strip);
            values.or_else(|| self.values(directory, tile))
        };
        let offsets = values(tag::STRIP_OFFSETS, tag::TILE_OFFSETS);
        let lengths = values(tag::STRIP_BYTE_COUNTS, tag::TILE_BYTE_COUNTS);
        let (Some(offsets), Some(lengths)) = (offsets, lengths) else {
            return Err(BitOrder::Strips);
        };
        // More bytes than the file has are strips that overlap, or a bomb.
        let total = lengths
            .iter()
            .fold(0, |sum: u64, length| sum.saturating_add(*length));
        if offsets.len() != lengths.len() || total > self.bytes.len() as u64 {
            return Err(BitOrder::Strips);
        }
        let range = |(offset, length): (u64, u64)| {
            let (from, length) = (usize::try_from(offset).ok()?, usize::try_from(length).ok()?);
            let range = from..from.checked_add(length)?;
            (range.end <= self.bytes.len()).then_some(range)
        };
        let ranges: Option<Vec<_>> = offsets.into_iter().zip(lengths).map(range).collect();
        ranges.ok_or(BitOrder::Strips)
    }
}

//! CCITT's codes of black and white rows: Huffman runs, Group 3 and Group 4.
//!
//! The code tables are the `fax` crate's; rows are put together here, since it reads neither Huffman runs
//! without end marks nor rows of Group 3 that refer to the one above.
//!
//! Source: ITU-T T.4 and T.6; TIFF 6.0, sections 10 and 11.

use fax::BitReader;
use fax::maps::{Mode, black, mode, white};

use super::super::refusal::Refusal;
use super::layout::Compression;

/// Decodes `rows` rows of `width` pixels, a bit each, rows padded to whole bytes; black is 1.
///
/// # Errors
/// A truncated or damaged stream, or one with uncompressed stretches.
pub(super) fn decode(
    data: &[u8],
    kind: Compression,
    width: usize,
    rows: usize,
) -> Result<Vec<u8>, Refusal> {
    let mut reader = Reader { data, at: 0 };
    let row_bytes = width.div_ceil(8);
    let mut bytes = vec![0; row_bytes * rows];
    let mut above = Row::default();
    let mut row = Row::default();
    for line in bytes.chunks_exact_mut(row_bytes) {
        row.changes.clear();
        let is_whole = match kind {
            Compression::Huffman(pad) => {
                reader.runs(width, &mut row)?;
                reader.at = reader.at.next_multiple_of(pad);
                true
            }
            Compression::Group3 { two_dimensional } => {
                reader.skip_end_of_line();
                if two_dimensional && !reader.take_bit() {
                    reader.differences(width, &above, &mut row)?
                } else {
                    reader.runs(width, &mut row)?;
                    true
                }
            }
            _ => reader.differences(width, &above, &mut row)?,
        };
        // The end mark comes early where an encoder leaves out white rows at the end.
        if !is_whole {
            break;
        }
        row.draw(width, line);
        std::mem::swap(&mut row, &mut above);
    }
    Ok(bytes)
}

/// Where colours change in a row: to black, to white, to black and so on.
#[derive(Default)]
struct Row {
    changes: Vec<usize>,
}

impl Row {
    fn push(&mut self, change: usize, width: usize) -> Result<(), Refusal> {
        // Runs of no pixel may come, but not without end.
        if self.changes.len() > 2 * width + 2 {
            return Err(Refusal::damaged("a row has more runs than pixels"));
        }
        self.changes.push(change.min(width));
        Ok(())
    }

    fn draw(&self, width: usize, line: &mut [u8]) {
        for run in self.changes.chunks(2) {
            let to = run.get(1).copied().unwrap_or(width);
            for at in run[0]..to {
                line[at / 8] |= 0x80 >> (at % 8);
            }
        }
    }
}

/// Bits, the highest of a byte first; zeros after the last.
struct Reader<'a> {
    data: &'a [u8],
    /// Place in bits.
    at: usize,
}

impl BitReader for Reader<'_> {
    type Error = Refusal;

    fn peek(&self, bits: u8) -> Option<u16> {
        let first = self.at / 8;
        let byte = |at: usize| u32::from(self.data.get(at).copied().unwrap_or(0));
        let three = byte(first) << 16 | byte(first + 1) << 8 | byte(first + 2);
        let shift = 24_u32.checked_sub(self.at as u32 % 8 + u32::from(bits))?;
        Some((three >> shift) as u16 & (u16::MAX >> (16 - bits.min(16))))
    }

    fn consume(&mut self, bits: u8) -> Result<(), Refusal> {
        self.at += usize::from(bits);
        if self.at > self.data.len() * 8 {
            return Err(Refusal::Truncated);
        }
        Ok(())
    }

    fn bits_to_byte_boundary(&self) -> u8 {
        (self.at.next_multiple_of(8) - self.at) as u8
    }
}

impl Reader<'_> {
    fn is_at_end(&self) -> bool {
        self.at >= self.data.len() * 8
    }

    fn take_bit(&mut self) -> bool {
        let bit = self.peek(1) == Some(1);
        self.at += 1;
        bit
    }

    /// Skips the mark that ends a row, and what fills a byte before it.
    fn skip_end_of_line(&mut self) {
        const ZEROS: u8 = 11;
        // No run begins with so many.
        while self.peek(ZEROS) == Some(0) && !self.is_at_end() {
            while !self.is_at_end() && !self.take_bit() {}
        }
    }

    /// What is wrong where no code was found.
    fn no_code(&self) -> Refusal {
        if self.at + 13 >= self.data.len() * 8 {
            Refusal::Truncated
        } else {
            Refusal::damaged("a run has no code")
        }
    }

    /// The length of a run.
    fn run(&mut self, is_black: bool) -> Result<usize, Refusal> {
        const LONGEST: usize = 1 << 24;
        let mut length = 0;
        loop {
            let part = if is_black {
                black::decode(self)
            } else {
                white::decode(self)
            };
            let part = usize::from(part.ok_or_else(|| self.no_code())?);
            length += part;
            if part < 64 {
                return Ok(length);
            }
            if length > LONGEST {
                return Err(Refusal::damaged("a run is longer than any row"));
            }
        }
    }

    /// A row of runs.
    fn runs(&mut self, width: usize, row: &mut Row) -> Result<(), Refusal> {
        let (mut at, mut is_black) = (0, false);
        while at < width {
            at += self.run(is_black)?;
            row.push(at, width)?;
            is_black = !is_black;
        }
        Ok(())
    }

    /// A row of differences to the one above; `false` at the end mark.
    fn differences(&mut self, width: usize, above: &Row, row: &mut Row) -> Result<bool, Refusal> {
        let (mut at, mut is_black, mut is_start) = (0, false, true);
        // The change above that is sought next.
        let mut next = 0;
        while at < width {
            // The first change above, to the right, to the other colour.
            let is_right = |change: &usize| *change > at || (is_start && *change == 0);
            next = next.max(2) - 2;
            next = next - next % 2 + usize::from(is_black);
            while above.changes.get(next).is_some_and(|c| !is_right(c)) {
                next += 2;
            }
            let found = above.changes.get(next).copied().unwrap_or(width);
            match mode::decode(self).ok_or_else(|| self.no_code())? {
                Mode::Pass => {
                    at = above.changes.get(next + 1).copied().unwrap_or(width);
                }
                Mode::Horizontal => {
                    at += self.run(is_black)?;
                    row.push(at, width)?;
                    at += self.run(!is_black)?;
                    row.push(at, width)?;
                }
                Mode::Vertical(by) => {
                    let change = found as i64 + i64::from(by);
                    let change = usize::try_from(change).ok().filter(|change| *change >= at);
                    at = change.ok_or_else(|| Refusal::damaged("a run ends before it begins"))?;
                    row.push(at, width)?;
                    is_black = !is_black;
                }
                Mode::Extension => return Err(Refusal::unsupported("uncompressed CCITT rows")),
                Mode::EOF if is_start => return Ok(false),
                Mode::EOF => return Err(Refusal::damaged("the end mark is inside a row")),
            }
            is_start = false;
        }
        Ok(true)
    }
}

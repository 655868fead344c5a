//! Places in a table of colours to colours.
//!
//! Source: PS3.3, C.7.6.3.1.5 and C.7.9.2; `apply_color_lut` of pydicom.

use dicom_core::Tag;
use dicom_dictionary_std::tags;

use super::error::DicomError;
use super::header::Header;
use super::native::level_of_bits;
use super::reader::DataSet;

/// Descriptor, table and segmented table of a colour.
type Tags = (Tag, Tag, Tag);

const COLOURS: [Tags; 3] = [
    (
        tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
        tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DATA,
        tags::SEGMENTED_RED_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    ),
    (
        tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
        tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DATA,
        tags::SEGMENTED_GREEN_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    ),
    (
        tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
        tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DATA,
        tags::SEGMENTED_BLUE_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    ),
];

/// The colours of `numbers`, `[rows, columns, 3]`.
///
/// # Errors
/// A table that is missing, too short, or in indirect segments.
pub(super) fn colours(
    header: &Header,
    set: &DataSet<'_>,
    numbers: &[u16],
) -> Result<Vec<u8>, DicomError> {
    let mut pixels = vec![0; numbers.len() * 3];
    for (channel, tags) in COLOURS.into_iter().enumerate() {
        let table = Table::new(set, tags, header.signed)?;
        // Each number that there can be.
        let levels: Vec<u8> = (0..=header.mask())
            .map(|number| table.level(i64::from(number), header))
            .collect();
        for (pixel, number) in pixels.as_chunks_mut::<3>().0.iter_mut().zip(numbers) {
            pixel[channel] = levels[usize::from(*number)];
        }
    }
    Ok(pixels)
}

/// The levels of one colour.
struct Table {
    first: i64,
    levels: Vec<u8>,
}

impl Table {
    fn new(
        set: &DataSet<'_>,
        (descriptor, data, segmented): Tags,
        signed: bool,
    ) -> Result<Self, DicomError> {
        const LACKING: DicomError = DicomError::Missing {
            attribute: "Palette Color Lookup Table (0028,1101 to 0028,1203)",
        };
        let descriptor = set.words(descriptor).unwrap_or_default();
        let [count, first, bits] = descriptor[..] else {
            return Err(LACKING);
        };
        // 65,536 does not fit into the field.
        let count = if count == 0 {
            1 << 16
        } else {
            usize::from(count)
        };
        let first = if signed {
            i64::from(first as i16)
        } else {
            first.into()
        };
        let bytes = set.bytes(data);
        let entries: Vec<u16> = if !bytes.is_empty() {
            // Entries of 8 bits may be packed, or have 16 each.
            if bytes.len() >= 2 * count {
                let words = bytes.as_chunks::<2>().0.iter();
                words.map(|word| set.encoding.u16(*word)).collect()
            } else {
                bytes.iter().map(|byte| u16::from(*byte)).collect()
            }
        } else {
            let bytes = set.bytes(segmented);
            if bytes.is_empty() {
                return Err(LACKING);
            }
            if bits == 8 {
                expand(
                    &bytes
                        .iter()
                        .map(|byte| u16::from(*byte))
                        .collect::<Vec<_>>(),
                    count,
                )?
            } else {
                let words = bytes.as_chunks::<2>().0.iter();
                expand(
                    &words
                        .map(|word| set.encoding.u16(*word))
                        .collect::<Vec<_>>(),
                    count,
                )?
            }
        };
        let entries = entries
            .get(..count)
            .ok_or_else(|| DicomError::damaged("a table of colours is shorter than it says"))?;
        // Old writers say 16 bits of levels that have 8.
        let deep = bits > 8 && entries.iter().any(|entry| *entry > 255);
        let level = |entry: &u16| match deep {
            true => level_of_bits((*entry).into(), bits.clamp(9, 16).into()),
            false => (*entry).min(255) as u8,
        };
        Ok(Self {
            first,
            levels: entries.iter().map(level).collect(),
        })
    }

    /// The level of a stored number, the nearest one outside the table.
    fn level(&self, number: i64, header: &Header) -> u8 {
        let number = if header.signed && number >> (header.stored - 1) != 0 {
            number - (1 << header.stored)
        } else {
            number
        };
        let last = self.levels.len() as i64 - 1;
        self.levels[(number - self.first).clamp(0, last) as usize]
    }
}

/// The entries of a segmented table, `count` at most.
///
/// Source: PS3.3, C.7.9.2.
fn expand(words: &[u16], count: usize) -> Result<Vec<u16>, DicomError> {
    const DISCRETE: u16 = 0;
    const LINEAR: u16 = 1;
    let mut entries: Vec<u16> = Vec::new();
    let mut rest = words;
    while let [kind, length, after @ ..] = rest
        && entries.len() < count
    {
        let length = usize::from(*length);
        match (*kind, after) {
            (DISCRETE, after) => {
                let values = after.get(..length).ok_or(DicomError::Truncated)?;
                entries.extend(values);
                rest = &after[length..];
            }
            (LINEAR, [end, after @ ..]) => {
                let start = entries.last().copied();
                let start =
                    start.ok_or_else(|| DicomError::damaged("a table begins with a slope"))?;
                let (start, end) = (f64::from(start), f64::from(*end));
                let step = (end - start) / length.max(1) as f64;
                // Halves to even, as numpy rounds them.
                let entry = |place: usize| (start + step * place as f64).round_ties_even() as u16;
                entries.extend((1..=length).map(entry));
                rest = after;
            }
            (2, _) => {
                return Err(DicomError::Value {
                    attribute: "Segmented Palette Color Lookup Table Data (0028,1221)",
                    found: "of indirect segments".to_owned(),
                    expected: "discrete and linear segments",
                });
            }
            // Padding.
            _ => break,
        }
    }
    Ok(entries)
}

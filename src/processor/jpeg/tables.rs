//! Tables that may change between the scans of a JPEG.

use super::{
    error::{JpegError, damaged},
    frame::ZIGZAG,
    huffman::HuffmanTable,
};

/// The tables in force.
#[derive(Default)]
pub(super) struct Tables {
    pub(super) quantization: [Option<[u16; 64]>; 4],
    pub(super) dc: [Option<HuffmanTable>; 4],
    pub(super) ac: [Option<HuffmanTable>; 4],
    pub(super) restart_interval: usize,
}

impl Tables {
    /// Takes the Huffman tables of a segment.
    pub(super) fn huffman(&mut self, mut segment: &[u8]) -> Result<(), JpegError> {
        const CLASSES: usize = 2;
        while let Some((&head, after)) = segment.split_first() {
            let (counts, after) = after
                .split_first_chunk::<16>()
                .ok_or_else(|| damaged("a Huffman table is cut off"))?;
            let count: usize = counts.iter().map(|count| usize::from(*count)).sum();
            let values = after
                .get(..count)
                .ok_or_else(|| damaged("a Huffman table is cut off"))?;
            segment = &after[count..];
            let (class, place) = (usize::from(head >> 4), usize::from(head & 15));
            if class >= CLASSES || place >= self.dc.len() {
                return Err(damaged("a Huffman table has no place"));
            }
            let table = HuffmanTable::new(counts, values)
                .ok_or_else(|| damaged("a Huffman table has too many codes"))?;
            let of_class = if class == 0 {
                &mut self.dc
            } else {
                &mut self.ac
            };
            of_class[place] = Some(table);
        }
        Ok(())
    }

    /// Takes the quantization tables of a segment.
    pub(super) fn quantization(&mut self, mut segment: &[u8]) -> Result<(), JpegError> {
        let cut = || damaged("a quantization table is cut off");
        while let Some((&head, after)) = segment.split_first() {
            let size = if head >> 4 == 0 { 1 } else { 2 };
            let values = after.get(..64 * size).ok_or_else(cut)?;
            segment = &after[64 * size..];
            let mut table = [0; 64];
            for (place, value) in ZIGZAG.iter().zip(values.chunks_exact(size)) {
                table[usize::from(*place)] = value
                    .iter()
                    .fold(0, |sum: u16, byte| sum << 8 | u16::from(*byte));
            }
            *self
                .quantization
                .get_mut(usize::from(head & 15))
                .ok_or_else(|| damaged("a quantization table has no place"))? = Some(table);
        }
        Ok(())
    }
}

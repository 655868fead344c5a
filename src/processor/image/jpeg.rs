//! Where a JPEG ends.

/// Whether the marker that ends a JPEG follows its first scan.
///
/// Compressed data never holds the marker's two bytes, a thumbnail in the header may.
pub(in crate::processor) fn jpeg_has_end(bytes: &[u8]) -> bool {
    const START_OF_SCAN: u8 = 0xda;
    const END_OF_IMAGE: [u8; 2] = [0xff, 0xd9];
    let mut rest = &bytes[2..];
    loop {
        match rest {
            [0xff, START_OF_SCAN, scan @ ..] => {
                return scan.windows(2).rev().any(|pair| pair == END_OF_IMAGE);
            }
            [0xff, 0xff, ..] => rest = &rest[1..],
            [0xff, 0x01 | 0xd0..=0xd9, after @ ..] => rest = after,
            [0xff, _, high, low, ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                match rest.get(2 + length..) {
                    Some(after) => rest = after,
                    None => return false,
                }
            }
            // Not at a marker: the decoder knows better what is wrong.
            [_, _, ..] => return true,
            _ => return false,
        }
    }
}

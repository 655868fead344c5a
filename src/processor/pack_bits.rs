//! Run lengths of bytes, as TIFF calls them PackBits and DICOM its RLE segments.

/// `length` bytes out of runs and literal stretches; `None` if `packed` ends before.
///
/// Source: TIFF 6.0, section 9; PS3.5, annex G.
pub(super) fn unpack(mut packed: &[u8], length: usize) -> Option<Vec<u8>> {
    // Two bytes make 128 at most.
    if packed.len().saturating_mul(64) < length {
        return None;
    }
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        match packed {
            [count @ 0..=127, rest @ ..] => {
                let stretch = usize::from(*count) + 1;
                bytes.extend(rest.get(..stretch)?);
                packed = &rest[stretch..];
            }
            [128, rest @ ..] => packed = rest,
            [count, value, rest @ ..] => {
                bytes.resize(bytes.len() + 257 - usize::from(*count), *value);
                packed = rest;
            }
            _ => return None,
        }
    }
    // An encoder may pad the last run.
    bytes.truncate(length);
    Some(bytes)
}

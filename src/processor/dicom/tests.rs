//! Against pydicom on fixtures, and on files written here to be wrong.

mod found;
mod goldens;
mod hostile;
mod written;

use super::*;

/// The grey levels of a decoded file, upright or not, and its remarks.
fn levels(bytes: &[u8]) -> Result<Vec<u8>, DicomError> {
    frame_levels(bytes, None)
}

fn frame_levels(bytes: &[u8], frame: Option<usize>) -> Result<Vec<u8>, DicomError> {
    Ok(decode(bytes, frame, &DecodeLimits::default())?
        .picture
        .into_bytes())
}

//! How many frames an animation has.

use super::format::PictureFormat;
use super::gif;

/// Frames of the picture in `bytes`, of which the decoder gives the first; 1 for a still one.
pub(super) fn animation_frames(format: PictureFormat, bytes: &[u8]) -> usize {
    match format {
        PictureFormat::Png => png_frames(bytes),
        PictureFormat::WebP => webp_frames(bytes),
        PictureFormat::Gif => gif::frames(bytes),
        _ => None,
    }
    .unwrap_or(1)
    .max(1)
}

/// The number in a PNG's animation control, which is before the pixels.
fn png_frames(bytes: &[u8]) -> Option<usize> {
    const SIGNATURE: usize = 8;
    let mut rest = bytes.get(SIGNATURE..)?;
    loop {
        let (length, after) = rest.split_first_chunk::<4>()?;
        let length = u32::from_be_bytes(*length) as usize;
        let (kind, content) = after.split_first_chunk::<4>()?;
        match kind {
            b"acTL" => {
                let count = content.first_chunk::<4>()?;
                return Some(u32::from_be_bytes(*count) as usize);
            }
            b"IDAT" => return None,
            // Content and check sum.
            _ => rest = content.get(length.checked_add(4)?..)?,
        }
    }
}

/// The frames of an animated WebP, counted.
fn webp_frames(bytes: &[u8]) -> Option<usize> {
    const HEADER: usize = 12;
    let mut rest = bytes.get(HEADER..)?;
    let mut frames = 0;
    while let Some((kind, after)) = rest.split_first_chunk::<4>() {
        frames += usize::from(kind == b"ANMF");
        let Some((length, content)) = after.split_first_chunk::<4>() else {
            break;
        };
        // Chunks begin at even places.
        let length = u64::from(u32::from_le_bytes(*length)).next_multiple_of(2);
        match content.get(usize::try_from(length).ok()?..) {
            Some(next) => rest = next,
            None => break,
        }
    }
    Some(frames)
}

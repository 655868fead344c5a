//! The first frame of a GIF, on its canvas, with the colours of its palette.
//!
//! As in Pillow's `convert("RGB")`, a transparent index keeps its colour; around a frame that is smaller than
//! the canvas is the background.

use std::io::Cursor;

use gif::{ColorOutput, DecodeOptions, Decoder, DecodingError, MemoryLimit};
use image::{DynamicImage, RgbImage};

use super::refusal::{Refusal, checked_size};
use crate::processor::decode_limits::DecodeLimits;

fn refused(cause: DecodingError) -> Refusal {
    match cause {
        DecodingError::Io(cause) if cause.kind() == std::io::ErrorKind::UnexpectedEof => {
            Refusal::Truncated
        }
        other => Refusal::damaged(other),
    }
}

/// A decoder at the first frame, and width and height of its canvas.
type Opened<'a> = (Decoder<Cursor<&'a [u8]>>, usize, usize);

fn open<'a>(bytes: &'a [u8], limits: &DecodeLimits) -> Result<Opened<'a>, Refusal> {
    let mut options = DecodeOptions::new();
    options.set_color_output(ColorOutput::Indexed);
    options.check_frame_consistency(true);
    let most = limits.max_decoded_bytes.max(1).try_into();
    options.set_memory_limit(most.map_or(MemoryLimit::Unlimited, MemoryLimit::Bytes));
    let decoder = options.read_info(Cursor::new(bytes)).map_err(refused)?;
    let (width, height) = (decoder.width().into(), decoder.height().into());
    // Indices and colours.
    let (width, height) = checked_size(width, height, 4, limits)?;
    Ok((decoder, width, height))
}

/// Width and height of the canvas, checked against the limits.
///
/// # Errors
/// A header that is cut off or damaged, or one of the limits.
pub(super) fn size(bytes: &[u8], limits: &DecodeLimits) -> Result<(usize, usize), Refusal> {
    let (_, width, height) = open(bytes, limits)?;
    Ok((width, height))
}

/// Decodes the first frame.
///
/// # Errors
/// Any [`Refusal`] but those of frames.
pub(super) fn decode(bytes: &[u8], limits: &DecodeLimits) -> Result<DynamicImage, Refusal> {
    let (mut decoder, width, height) = open(bytes, limits)?;
    let background = decoder.bg_color();
    let global = decoder.global_palette().map(<[u8]>::to_vec);
    let frame = decoder.read_next_frame().map_err(refused)?;
    let frame = frame.ok_or(Refusal::Truncated)?;
    let palette = frame.palette.as_ref().or(global.as_ref());
    let palette = palette.ok_or_else(|| Refusal::damaged("it has no palette"))?;
    let palette = palette.as_chunks::<3>().0;
    let colour = |index: usize| palette.get(index).copied().unwrap_or_default();
    let mut pixels = colour(background.unwrap_or(0)).repeat(width * height);
    let (across, left, top) = (
        usize::from(frame.width),
        usize::from(frame.left),
        usize::from(frame.top),
    );
    if across == 0 {
        return Err(Refusal::damaged("its first frame has no width"));
    }
    for (row, indices) in frame.buffer.chunks_exact(across).enumerate() {
        let first = ((top + row) * width + left) * 3;
        let targets = pixels.get_mut(first..first + across * 3);
        let targets = targets.ok_or_else(|| Refusal::damaged("its frame is outside its canvas"))?;
        for (pixel, index) in targets.as_chunks_mut::<3>().0.iter_mut().zip(indices) {
            *pixel = colour(usize::from(*index));
        }
    }
    let picture = RgbImage::from_raw(width as u32, height as u32, pixels);
    picture
        .map(DynamicImage::ImageRgb8)
        .ok_or(Refusal::Truncated)
}

/// The frames of a GIF, counted by its blocks.
pub(super) fn frames(bytes: &[u8]) -> Option<usize> {
    const HEADER: usize = 13;
    let palette = |flags: u8| match flags & 0x80 {
        0 => 0,
        _ => 3 << ((flags & 7) + 1),
    };
    let mut rest = bytes.get(HEADER + palette(*bytes.get(10)?)..)?;
    let mut frames = 0;
    loop {
        match rest {
            [b'!', _, blocks @ ..] => rest = blocks,
            [b',', place @ ..] => {
                let flags = *place.get(8)?;
                frames += 1;
                // The size of a code comes before the blocks.
                match place.get(9 + palette(flags) + 1..) {
                    Some(blocks) => rest = blocks,
                    None => return Some(frames),
                }
            }
            _ => return Some(frames),
        }
        while let [length @ 1..=u8::MAX, after @ ..] = rest {
            match after.get(usize::from(*length)..) {
                Some(next) => rest = next,
                None => return Some(frames),
            }
        }
        match rest {
            [0, next @ ..] => rest = next,
            _ => return Some(frames),
        }
    }
}

//! JPEG 2000 streams, bare or in a JP2 file, to numbers: Part 1, and Part 15 (high throughput, HTJ2K).
//!
//! Each part has a crate of its own; the decoders of both take a stream that is cut off for a whole one of
//! less quality, so its tile-parts are counted here first.
//!
//! Source: ISO/IEC 15444-1, annexes A and I.

use super::jpeg::JpegError;

/// What the main header of a stream says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Jpeg2000Header {
    pub(super) width: u32,
    pub(super) height: u32,
    /// Channels, before a palette is resolved.
    pub(super) channels: usize,
    /// Bits of a number of the first channel.
    pub(super) bits: u32,
    /// Whether numbers of the first channel have a sign.
    pub(super) signed: bool,
    /// Whether it is coded by Part 15.
    is_high_throughput: bool,
}

/// What channels mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Colours {
    Gray,
    Rgb,
    Cmyk,
    /// Not stated, or in another way.
    Unknown,
}

/// One channel of a picture.
pub(super) struct Channel {
    pub(super) bits: u32,
    /// Row by row; numbers with a sign are lifted by half their range.
    pub(super) samples: Vec<f32>,
}

/// A decoded stream.
pub(super) struct DecodedJpeg2000 {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) channels: Vec<Channel>,
    pub(super) colours: Colours,
    /// Whether the last channel is an alpha channel.
    pub(super) has_alpha: bool,
}

/// Bytes of memory that decoding a number takes, about: coefficients and two stages of the wavelet transform,
/// and the number itself.
pub(super) const WORKING_BYTES: u64 = 16;

const START: [u8; 4] = [0xff, 0x4f, 0xff, 0x51];
const BOXES: &[u8] = b"\0\0\0\x0cjP  ";

/// Whether `bytes` begin as a stream or a JP2 file does.
pub(super) fn is_jpeg_2000(bytes: &[u8]) -> bool {
    bytes.starts_with(&START) || bytes.starts_with(BOXES)
}

/// The stream inside a JP2 file, or the stream itself.
fn code_stream(bytes: &[u8]) -> Result<&[u8], JpegError> {
    if bytes.starts_with(&START) {
        return Ok(bytes);
    }
    let damaged = |reason: &str| JpegError::Damaged(reason.to_owned());
    if !bytes.starts_with(BOXES) {
        return Err(damaged("it does not begin as JPEG 2000"));
    }
    let mut rest = bytes;
    loop {
        let Some((&[l0, l1, l2, l3, kind @ ..], _)) = rest.split_first_chunk::<8>() else {
            return Err(JpegError::Truncated);
        };
        let (length, header) = match u32::from_be_bytes([l0, l1, l2, l3]) {
            // To the end of the file.
            0 => (rest.len() as u64, 8),
            1 => {
                let long = rest.get(8..16).and_then(|bytes| bytes.try_into().ok());
                (long.map_or(0, u64::from_be_bytes), 16)
            }
            length => (length.into(), 8),
        };
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if length < header {
            return Err(damaged("a box has no length"));
        }
        if &kind == b"jp2c" {
            let content = rest.get(header..).ok_or(JpegError::Truncated)?;
            return Ok(content.get(..length - header).unwrap_or(content));
        }
        rest = rest.get(length..).ok_or(JpegError::Truncated)?;
    }
}

/// The main header of a stream or JP2 file.
///
/// # Errors
/// A header that is cut off or damaged.
pub(super) fn header(bytes: &[u8]) -> Result<Jpeg2000Header, JpegError> {
    let stream = code_stream(bytes)?;
    if !stream.starts_with(&START) {
        return Err(JpegError::Damaged("its stream has no size".to_owned()));
    }
    let number = |at: usize| {
        let bytes = stream
            .get(at..at + 4)
            .and_then(|bytes| bytes.try_into().ok());
        bytes.map(u32::from_be_bytes).ok_or(JpegError::Truncated)
    };
    let (right, below, left, above) = (number(8)?, number(12)?, number(16)?, number(20)?);
    let (width, height) = (right.saturating_sub(left), below.saturating_sub(above));
    let Some(&[high, low, first]) = stream
        .get(40..43)
        .and_then(|bytes| bytes.first_chunk::<3>())
    else {
        return Err(JpegError::Truncated);
    };
    let channels = usize::from(u16::from_be_bytes([high, low]));
    if width == 0 || height == 0 || channels == 0 {
        return Err(JpegError::Damaged(format!(
            "its size is {width} × {height}"
        )));
    }
    Ok(Jpeg2000Header {
        width,
        height,
        channels,
        bits: u32::from(first & 0x7f) + 1,
        signed: first & 0x80 != 0,
        // Bit 14 of the capabilities.
        is_high_throughput: stream[6] & 0x40 != 0,
    })
}

/// Refuses a stream whose tile-parts are not all there.
fn check_whole(stream: &[u8]) -> Result<(), JpegError> {
    const START_OF_TILE_PART: [u8; 2] = [0xff, 0x90];
    const END: [u8; 2] = [0xff, 0xd9];
    let mut rest = stream.get(2..).unwrap_or_default();
    loop {
        match rest {
            [0xff, 0x90, ..] => {
                // Length of the segment and index of the tile come before.
                let length = rest.get(6..10).and_then(|bytes| bytes.try_into().ok());
                let length = length.map_or(0, u32::from_be_bytes) as usize;
                if length == 0 {
                    // To the end mark.
                    let has_end = rest.windows(2).rev().take(64).any(|pair| pair == END);
                    return if has_end {
                        Ok(())
                    } else {
                        Err(JpegError::Truncated)
                    };
                }
                if length < 12 {
                    return Err(JpegError::Damaged("a tile-part has no length".to_owned()));
                }
                rest = rest.get(length..).ok_or(JpegError::Truncated)?;
                if rest.get(..2) == Some(&END) {
                    return Ok(());
                }
                if rest.get(..2) != Some(&START_OF_TILE_PART) {
                    return Err(JpegError::Truncated);
                }
            }
            [0xff, _, high, low, ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                rest = rest.get(2 + length..).ok_or(JpegError::Truncated)?;
            }
            [_, _, _, _, ..] => {
                return Err(JpegError::Damaged(
                    "a marker is expected and not there".to_owned(),
                ));
            }
            _ => return Err(JpegError::Truncated),
        }
    }
}

/// Decodes a stream or JP2 file, whose size has been checked against the limits by [`header`]; indices of a
/// palette become its colours where `resolves_palette`.
///
/// # Errors
/// A stream that is cut off, damaged, or of a kind that is not read.
pub(super) fn decode(bytes: &[u8], resolves_palette: bool) -> Result<DecodedJpeg2000, JpegError> {
    let damaged = |cause: &dyn std::fmt::Display| JpegError::Damaged(cause.to_string());
    let found = header(bytes)?;
    check_whole(code_stream(bytes)?)?;
    if found.is_high_throughput {
        return high_throughput(bytes, &found);
    }
    let settings = hayro_jpeg2000::DecodeSettings {
        resolve_palette_indices: resolves_palette,
        ..Default::default()
    };
    let image = hayro_jpeg2000::Image::new(bytes, &settings).map_err(|cause| damaged(&cause))?;
    let colours = match (image.color_space(), bytes.starts_with(&START)) {
        (hayro_jpeg2000::ColorSpace::Gray, _) => Colours::Gray,
        (hayro_jpeg2000::ColorSpace::RGB, _) => Colours::Rgb,
        // A bare stream says nothing of its colours.
        (hayro_jpeg2000::ColorSpace::CMYK, true) => Colours::Unknown,
        (hayro_jpeg2000::ColorSpace::CMYK, false) => Colours::Cmyk,
        (space, _) => match space.num_channels() {
            1 => Colours::Gray,
            3 => Colours::Rgb,
            4 => Colours::Cmyk,
            _ => Colours::Unknown,
        },
    };
    let has_alpha = image.has_alpha();
    let mut context = hayro_jpeg2000::DecoderContext::default();
    let decoded = image
        .decode(&mut context)
        .map_err(|cause| damaged(&cause))?;
    let channels = decoded.components().iter().map(|component| Channel {
        bits: component.bit_depth().into(),
        samples: component.samples().to_vec(),
    });
    checked(DecodedJpeg2000 {
        width: image.width(),
        height: image.height(),
        channels: channels.collect(),
        colours,
        has_alpha,
    })
}

fn high_throughput(bytes: &[u8], found: &Jpeg2000Header) -> Result<DecodedJpeg2000, JpegError> {
    use dicom_toolkit_jpeg2000::{ColorSpace, DecodeSettings, Image};
    let damaged = |cause: &dyn std::fmt::Display| JpegError::Damaged(cause.to_string());
    let image = Image::new(bytes, &DecodeSettings::default()).map_err(|cause| damaged(&cause))?;
    if (image.width(), image.height()) != (found.width, found.height) {
        return Err(JpegError::Damaged(
            "its size is not that of its header".to_owned(),
        ));
    }
    let colours = match image.color_space() {
        ColorSpace::Gray => Colours::Gray,
        ColorSpace::RGB => Colours::Rgb,
        _ => Colours::Unknown,
    };
    let has_alpha = image.has_alpha();
    let raw = image.decode_native().map_err(|cause| damaged(&cause))?;
    let count = usize::from(raw.num_components);
    let channel = |index: usize| {
        let samples = if raw.bytes_per_sample == 1 {
            let bytes = raw.data.iter().skip(index).step_by(count);
            bytes.map(|byte| f32::from(*byte)).collect()
        } else {
            let words = raw
                .data
                .as_chunks::<2>()
                .0
                .iter()
                .skip(index)
                .step_by(count);
            words
                .map(|word| f32::from(u16::from_le_bytes(*word)))
                .collect()
        };
        Channel {
            bits: raw.bit_depth.into(),
            samples,
        }
    };
    checked(DecodedJpeg2000 {
        width: raw.width,
        height: raw.height,
        channels: (0..count).map(channel).collect(),
        colours,
        has_alpha,
    })
}

/// Refuses channels of other sizes than the picture's, or of more bits than are read.
fn checked(decoded: DecodedJpeg2000) -> Result<DecodedJpeg2000, JpegError> {
    let pixels = decoded.width as usize * decoded.height as usize;
    for channel in &decoded.channels {
        if channel.samples.len() != pixels {
            return Err(JpegError::Truncated);
        }
        if !(1..=16).contains(&channel.bits) {
            return Err(JpegError::Unsupported("numbers of more than 16 bits"));
        }
    }
    if decoded.channels.is_empty() {
        return Err(JpegError::Damaged("it has no channel".to_owned()));
    }
    Ok(decoded)
}

//! JPEG-LS to numbers: grey and colours, lossless and near-lossless, in planes, lines or samples.
//!
//! The crates that read JPEG-LS in Rust take one channel, or leave out samples that are interleaved, which is
//! how DICOM stores colours; hence this one. Not read are mapping tables, restart intervals, point transforms
//! and colour transforms of Hewlett-Packard's encoder, each refused by name.
//!
//! Source: ITU-T T.87.

mod scan;

use super::jpeg::JpegError;
use scan::{Coding, Component, decode_scan};

/// What the header of a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct JpegLsHeader {
    pub(super) width: usize,
    pub(super) height: usize,
    /// Bits of a number, 2 to 16.
    pub(super) precision: u32,
    /// Channels, 1 to 4.
    pub(super) channels: usize,
}

/// A decoded JPEG-LS stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DecodedJpegLs {
    pub(super) header: JpegLsHeader,
    /// `[height, width, channels]`.
    pub(super) numbers: Vec<u16>,
}

const START_OF_IMAGE: [u8; 2] = [0xff, 0xd8];
const END_OF_IMAGE: u8 = 0xd9;
const START_OF_SCAN: u8 = 0xda;
const RESTART_INTERVAL: u8 = 0xdd;
const FRAME: u8 = 0xf7;
const PRESET: u8 = 0xf8;

/// Whether `bytes` begin as a JPEG whose first segment with a length belongs to JPEG-LS.
///
/// Between start and frame only application data and comments may come.
pub(super) fn is_jpeg_ls(bytes: &[u8]) -> bool {
    let mut segments = Segments(bytes.get(2..).unwrap_or_default());
    bytes.starts_with(&START_OF_IMAGE)
        && loop {
            match segments.next() {
                Ok((FRAME | PRESET, _)) => break true,
                Ok((0xe0..=0xef | 0xfe, _)) => {}
                _ => {
                    // The head of a file may end inside a segment.
                    break matches!(segments.0, [0xff, FRAME, ..]);
                }
            }
        }
}

/// Segments of a stream, up to the next scan's data.
struct Segments<'a>(&'a [u8]);

impl<'a> Segments<'a> {
    /// The next marker and its content.
    fn next(&mut self) -> Result<(u8, &'a [u8]), JpegError> {
        let damaged = || JpegError::Damaged("a marker is expected and not there".to_owned());
        let marker = loop {
            match self.0 {
                [0xff, 0xff, ..] => self.0 = &self.0[1..],
                [0xff, marker, ..] => break *marker,
                [_, _, ..] => return Err(damaged()),
                _ => return Err(JpegError::Truncated),
            }
        };
        if marker == END_OF_IMAGE {
            self.0 = &self.0[2..];
            return Ok((marker, &[]));
        }
        let Some([high, low]) = self.0.get(2..4) else {
            return Err(JpegError::Truncated);
        };
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        if length < 2 {
            return Err(damaged());
        }
        let content = self.0.get(4..2 + length).ok_or(JpegError::Truncated)?;
        self.0 = &self.0[2 + length..];
        Ok((marker, content))
    }

    /// The data of a scan, up to the marker after it.
    fn scan_data(&mut self) -> &'a [u8] {
        // A byte after 0xff begins with a stuffed zero.
        let end = self.0.windows(2);
        let end = end
            .into_iter()
            .position(|pair| pair[0] == 0xff && pair[1] >= 0x80);
        let (data, rest) = self.0.split_at(end.unwrap_or(self.0.len()));
        self.0 = rest;
        data
    }
}

/// The header of a frame.
fn frame(content: &[u8]) -> Result<(JpegLsHeader, Vec<u8>), JpegError> {
    let Some((&[precision, h1, h0, w1, w0, channels], specs)) = content.split_first_chunk::<6>()
    else {
        return Err(JpegError::Damaged("its frame is cut off".to_owned()));
    };
    let specs = specs.as_chunks::<3>().0;
    let header = JpegLsHeader {
        width: u16::from_be_bytes([w1, w0]).into(),
        height: u16::from_be_bytes([h1, h0]).into(),
        precision: precision.into(),
        channels: channels.into(),
    };
    if !(2..=16).contains(&precision) || specs.len() < header.channels {
        return Err(JpegError::Damaged(format!(
            "its frame has numbers of {precision} bits in {channels} channels"
        )));
    }
    if !(1..=4).contains(&channels) {
        return Err(JpegError::Unsupported("more than four channels"));
    }
    if header.width == 0 || header.height == 0 {
        return Err(JpegError::Unsupported("a size after the frame"));
    }
    if specs.iter().any(|spec| spec[1] != 0x11) {
        return Err(JpegError::Unsupported("channels of different size"));
    }
    let ids = specs.iter().map(|spec| spec[0]).take(header.channels);
    Ok((header, ids.collect()))
}

/// The header of the first frame, without decoding anything.
///
/// # Errors
/// A stream that is cut off, damaged, or of a kind that is not read.
pub(super) fn header(bytes: &[u8]) -> Result<JpegLsHeader, JpegError> {
    let mut segments = start(bytes)?;
    loop {
        match segments.next()? {
            (FRAME, content) => return Ok(frame(content)?.0),
            (START_OF_SCAN | END_OF_IMAGE, _) => {
                return Err(JpegError::Damaged("it has no frame".to_owned()));
            }
            _ => {}
        }
    }
}

fn start(bytes: &[u8]) -> Result<Segments<'_>, JpegError> {
    let rest = bytes.strip_prefix(&START_OF_IMAGE);
    let no_start = || JpegError::Damaged("it does not begin as a JPEG".to_owned());
    Ok(Segments(rest.ok_or_else(no_start)?))
}

/// Decodes the stream in `bytes`; its size has been checked against the limits by [`header`].
///
/// # Errors
/// A stream that is cut off, damaged, or of a kind that is not read.
pub(super) fn decode(bytes: &[u8]) -> Result<DecodedJpegLs, JpegError> {
    let mut segments = start(bytes)?;
    let mut found: Option<(JpegLsHeader, Vec<u8>)> = None;
    let mut preset = None;
    let mut numbers = Vec::new();
    let mut missing = 0;
    loop {
        match segments.next()? {
            (END_OF_IMAGE, _) => break,
            (FRAME, _) if found.is_some() => {
                return Err(JpegError::Damaged("it has two frames".to_owned()));
            }
            (FRAME, content) => {
                let (header, ids) = frame(content)?;
                missing = ids.len();
                numbers = vec![0; header.width * header.height * header.channels];
                found = Some((header, ids));
            }
            (PRESET, [1, content @ ..]) => {
                let values = content.first_chunk::<10>();
                let values = values.ok_or_else(|| JpegError::Damaged("LSE".to_owned()))?;
                let value =
                    |at: usize| i32::from(u16::from_be_bytes([values[2 * at], values[2 * at + 1]]));
                preset = Some([0, 1, 2, 3, 4].map(value));
            }
            (PRESET, [2 | 3, ..]) => return Err(JpegError::Unsupported("a mapping table")),
            (PRESET, _) => return Err(JpegError::Unsupported("a size beyond 65,535")),
            (RESTART_INTERVAL, content) if content.iter().any(|byte| *byte != 0) => {
                return Err(JpegError::Unsupported("restart intervals"));
            }
            (0xe8, content) if content.starts_with(b"mrfx") && content.get(4) != Some(&0) => {
                return Err(JpegError::Unsupported("a colour transform"));
            }
            (START_OF_SCAN, content) => {
                let (header, ids) = found
                    .as_ref()
                    .ok_or_else(|| JpegError::Damaged("a scan is before the frame".to_owned()))?;
                let (components, coding) = scan_header(content, header, ids, preset)?;
                missing = missing.saturating_sub(components.len());
                let data = segments.scan_data();
                decode_scan(data, header, &components, &coding, &mut numbers)?;
            }
            _ => {}
        }
        if missing == 0 && found.is_some() {
            // What follows the last scan is an end mark, or a pad byte before it.
            break;
        }
    }
    match found {
        Some((header, _)) if missing == 0 => Ok(DecodedJpegLs { header, numbers }),
        Some(_) => Err(JpegError::Damaged("a channel has no scan".to_owned())),
        None => Err(JpegError::Damaged("it has no frame".to_owned())),
    }
}

/// The channels of a scan and how they are coded.
fn scan_header(
    content: &[u8],
    header: &JpegLsHeader,
    ids: &[u8],
    preset: Option<[i32; 5]>,
) -> Result<(Vec<Component>, Coding), JpegError> {
    let cut = || JpegError::Damaged("the header of a scan is cut off".to_owned());
    let (&count, specs) = content.split_first().ok_or_else(cut)?;
    let (specs, after) = specs
        .split_at_checked(usize::from(count) * 2)
        .ok_or_else(cut)?;
    let &[near, interleave, transform] = after.first_chunk::<3>().ok_or_else(cut)?;
    let mut components = Vec::new();
    for [id, table] in specs.as_chunks::<2>().0 {
        let index = ids.iter().position(|known| known == id);
        let index =
            index.ok_or_else(|| JpegError::Damaged("a scan is of no channel".to_owned()))?;
        if *table != 0 {
            return Err(JpegError::Unsupported("a mapping table"));
        }
        if components.iter().any(|one: &Component| one.index == index) {
            return Err(JpegError::Damaged("a scan has a channel twice".to_owned()));
        }
        components.push(Component { index });
    }
    if components.is_empty() || interleave > 2 || (interleave == 0 && components.len() != 1) {
        return Err(JpegError::Damaged(
            "a scan has no order of its channels".to_owned(),
        ));
    }
    if transform & 15 != 0 {
        return Err(JpegError::Unsupported("a point transform"));
    }
    let coding = Coding::new(header.precision, near.into(), preset, interleave == 2)
        .ok_or_else(|| JpegError::Damaged("its coding parameters are none".to_owned()))?;
    Ok((components, coding))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A grey picture in which flat stretches and edges come, of the highest number `top`.
    fn picture(width: u32, height: u32, top: u16) -> Vec<u16> {
        let pixel = |x: u32, y: u32| match (x / 5 + y / 3) % 4 {
            0 => 0,
            1 => top,
            2 => (x * 37 + y * 91) as u16 % (top + 1).max(2),
            _ => top / 2,
        };
        (0..height)
            .flat_map(|y| (0..width).map(move |x| pixel(x, y)))
            .collect()
    }

    #[test]
    fn grey_of_any_precision_comes_back() {
        for (bits, top) in [
            (2, 3),
            (7, 127),
            (8, 255),
            (10, 1023),
            (12, 4095),
            (16, 65534),
        ] {
            for (width, height) in [(1, 1), (1, 9), (31, 1), (40, 23)] {
                let numbers = picture(width, height, top);
                let mut options = jpegls::EncodeOptions::default();
                options.precision = Some(bits);
                let mut data = Vec::new();
                jpegls::encode_with_options(&numbers, width, height, &options, &mut data).unwrap();
                assert!(is_jpeg_ls(&data));
                let decoded = decode(&data).unwrap();
                assert_eq!(decoded.header, header(&data).unwrap());
                assert_eq!(decoded.header.precision, u32::from(bits));
                assert!(
                    decoded.numbers == numbers,
                    "{bits} bits, {width} × {height}"
                );
                // Cut anywhere, it is refused.
                for end in [3, data.len() / 2, data.len().saturating_sub(5)] {
                    assert!(decode(&data[..end]).is_err(), "{bits} bits cut at {end}");
                }
            }
        }
    }

    #[test]
    fn near_lossless_stays_within_its_bound() {
        let numbers = picture(40, 23, 4095);
        let mut options = jpegls::EncodeOptions::default();
        (options.near, options.precision) = (3, Some(12));
        let mut data = Vec::new();
        jpegls::encode_with_options(&numbers, 40, 23, &options, &mut data).unwrap();
        let decoded = decode(&data).unwrap().numbers;
        assert!(
            decoded
                .iter()
                .zip(&numbers)
                .all(|(a, b)| a.abs_diff(*b) <= 3)
        );
        assert!(decoded != numbers);
    }
}

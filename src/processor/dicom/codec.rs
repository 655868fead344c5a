//! One frame of stored pixels to numbers.

use std::borrow::Cow;

use dicom_core::VR;
use hayro_jpeg2000::{DecodeSettings, DecoderContext, Image};
use jpeg_decoder::{ColorTransform, Decoder, Error as LosslessError, PixelFormat};

use super::encoding::Encoding;
use super::error::DicomError;
use super::header::{Header, Photometric};
use super::reader::{DataSet, PixelData};
use super::syntax::{Codec, Syntax};
use crate::processor::jpeg::{self, Colour, JpegError};
use crate::processor::remark::{Remark, RemarkKind};

/// The numbers of a frame, row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Samples {
    /// `[rows, columns]`: the stored bits of each pixel, the others zero; the sign is not applied.
    Gray(Vec<u16>),
    /// `[rows, columns, 3]`: red, green, blue.
    Rgb(Vec<u8>),
}

/// Decodes frame `frame`, counted from 0. Remarks on it are added to `remarks`.
///
/// # Errors
/// [`DicomError::TransferSyntax`] for a kind of compression that is not read, and damaged, cut off or
/// wrongly announced pixels.
pub(super) fn decode(
    header: &Header,
    set: &DataSet<'_>,
    syntax: &Syntax,
    frame: usize,
    remarks: &mut Vec<Remark>,
) -> Result<Samples, DicomError> {
    let codec = syntax.codec()?;
    match (&set.pixels, codec) {
        (PixelData::None, _) => Err(DicomError::NoPixels),
        (PixelData::Cut, _) => Err(DicomError::Truncated),
        (PixelData::Native { vr, bytes }, Codec::Native) => {
            native(header, *vr, bytes, set.encoding, frame)
        }
        (PixelData::Fragments { offsets, fragments }, codec) if codec != Codec::Native => {
            let data = frame_data(header, offsets, fragments, frame)?;
            match codec {
                Codec::Jpeg => jpeg(header, &data, syntax, remarks),
                Codec::JpegLs => jpeg_ls(header, &data, syntax),
                Codec::Jpeg2000 => jpeg_2000(header, &data),
                _ => rle(header, &data),
            }
        }
        (PixelData::Native { .. }, _) => Err(DicomError::damaged(
            "its pixels are not compressed, against its transfer syntax",
        )),
        (PixelData::Fragments { .. }, _) => Err(DicomError::damaged(
            "its pixels are compressed, against its transfer syntax",
        )),
    }
}

/// Plain numbers.
fn native(
    header: &Header,
    vr: VR,
    bytes: &[u8],
    encoding: Encoding,
    frame: usize,
) -> Result<Samples, DicomError> {
    let full = header.pixels() * header.samples * (header.allocated as usize / 8);
    let subsampled = header.pixels() * 2;
    let frames = header.frames as u64;
    let holds = |length: usize| bytes.len() as u64 >= frames.saturating_mul(length as u64);
    // Some writers say YBR_FULL_422 of pixels that have all their numbers.
    let is_subsampled = header.subsampled && header.columns.is_multiple_of(2) && !holds(full);
    let length = if is_subsampled { subsampled } else { full };
    let from = frame.checked_mul(length).ok_or(DicomError::Truncated)?;
    let to = from.checked_add(length).ok_or(DicomError::Truncated)?;
    let bytes = if header.allocated == 8 && encoding == Encoding::ExplicitBig && vr == VR::OW {
        // Pairs of 8-bit numbers were written as one of 16 bits; a frame may begin inside a pair.
        let pairs = bytes.get(from & !1..to.next_multiple_of(2));
        let mut pairs = pairs.ok_or(DicomError::Truncated)?.to_vec();
        for pair in pairs.as_chunks_mut::<2>().0 {
            pair.swap(0, 1);
        }
        Cow::Owned(pairs[from & 1..][..length].to_vec())
    } else {
        Cow::Borrowed(bytes.get(from..to).ok_or(DicomError::Truncated)?)
    };
    if is_subsampled {
        // Two luminances, then the colour differences of both.
        let pairs = bytes.as_chunks::<4>().0.iter();
        let pixels = pairs
            .flat_map(|[first, second, blue, red]| [*first, *blue, *red, *second, *blue, *red]);
        return Ok(colour(header, pixels.collect(), false));
    }
    if !header.photometric.is_gray() {
        return Ok(colour(header, bytes.into_owned(), header.planar));
    }
    Ok(gray(
        header,
        if header.allocated == 8 {
            bytes.iter().map(|byte| u16::from(*byte)).collect()
        } else {
            let words = bytes.as_chunks::<2>().0;
            words.iter().map(|word| encoding.u16(*word)).collect()
        },
    ))
}

/// Moves the bits that count down and clears the others, which may hold overlays.
fn gray(header: &Header, mut numbers: Vec<u16>) -> Samples {
    let shift = header.high + 1 - header.stored;
    let mask = mask(header.stored);
    for number in &mut numbers {
        *number = (*number >> shift) & mask;
    }
    Samples::Gray(numbers)
}

fn mask(bits: u32) -> u16 {
    u16::MAX >> (16 - bits)
}

/// Colour numbers of any order as red, green, blue, pixel by pixel.
fn colour(header: &Header, numbers: Vec<u8>, planar: bool) -> Samples {
    let mut pixels = if planar {
        let mut pixels = vec![0; numbers.len()];
        for (channel, plane) in numbers.chunks_exact(header.pixels()).enumerate() {
            for (pixel, value) in pixels.as_chunks_mut::<3>().0.iter_mut().zip(plane) {
                pixel[channel] = *value;
            }
        }
        pixels
    } else {
        numbers
    };
    if header.photometric == Photometric::YbrFull {
        pixels
            .as_chunks_mut::<3>()
            .0
            .iter_mut()
            .for_each(|pixel| *pixel = ybr_to_rgb(*pixel));
    }
    Samples::Rgb(pixels)
}

/// Source: PS3.3, C.7.6.3.1.2, solved for red, green and blue.
fn ybr_to_rgb([y, blue, red]: [u8; 3]) -> [u8; 3] {
    let (y, blue, red) = (
        f32::from(y),
        f32::from(blue) - 128.0,
        f32::from(red) - 128.0,
    );
    [
        y + 1.402 * red,
        y - 0.344_136 * blue - 0.714_136 * red,
        y + 1.772 * blue,
    ]
    .map(|value| value.round() as u8)
}

/// The compressed bytes of one frame.
fn frame_data<'a>(
    header: &Header,
    offsets: &[u32],
    fragments: &[&'a [u8]],
    frame: usize,
) -> Result<Cow<'a, [u8]>, DicomError> {
    let own: Vec<&[u8]> = if header.frames == 1 {
        fragments.to_vec()
    } else if header.frames == fragments.len() {
        fragments.get(frame).into_iter().copied().collect()
    } else if header.frames == offsets.len() {
        let from = u64::from(offsets[frame]);
        let to = offsets.get(frame + 1).map_or(u64::MAX, |to| u64::from(*to));
        let mut at = 0;
        let mut own = Vec::new();
        for fragment in fragments {
            if (from..to).contains(&at) {
                own.push(*fragment);
            }
            // Offsets count the header of each piece.
            at += fragment.len() as u64 + 8;
        }
        own
    } else if let Some(begins) = frame_starts(fragments).filter(|b| b.len() == header.frames) {
        let to = begins.get(frame + 1).copied().unwrap_or(fragments.len());
        fragments[begins[frame]..to].to_vec()
    } else {
        return Err(DicomError::damaged(
            "nothing says where one compressed frame ends and the next begins",
        ));
    };
    match own.as_slice() {
        [] => Err(DicomError::Truncated),
        [one] => Ok(Cow::Borrowed(one)),
        several => Ok(Cow::Owned(several.concat())),
    }
}

/// The fragments that begin as a JPEG, JPEG-LS or JPEG 2000 stream does; `None` if the first does not.
fn frame_starts(fragments: &[&[u8]]) -> Option<Vec<usize>> {
    /// Start of image, and start of code stream.
    const STARTS: [[u8; 3]; 2] = [[0xff, 0xd8, 0xff], [0xff, 0x4f, 0xff]];
    let begins = |fragment: &[u8]| STARTS.iter().any(|start| fragment.starts_with(start));
    begins(fragments.first()?).then(|| {
        let all = fragments.iter().enumerate();
        all.filter(|(_, fragment)| begins(fragment))
            .map(|(at, _)| at)
            .collect()
    })
}

/// Source: PS3.5, annex G.
fn rle(header: &Header, data: &[u8]) -> Result<Samples, DicomError> {
    const OFFSETS: usize = 15;
    let bytes_a_number = header.allocated as usize / 8;
    let expected = header.samples * bytes_a_number;
    let words = data.as_chunks::<4>().0;
    let Some([count, offsets @ ..]) = words.get(..=OFFSETS) else {
        return Err(DicomError::Truncated);
    };
    if u32::from_le_bytes(*count) as usize != expected {
        return Err(DicomError::Damaged(format!(
            "its run lengths have {} segments, expected {expected}",
            u32::from_le_bytes(*count)
        )));
    }
    let mut planes = Vec::with_capacity(expected);
    for (segment, start) in offsets.iter().enumerate().take(expected) {
        let start = u32::from_le_bytes(*start) as usize;
        let end = match offsets.get(segment + 1) {
            Some(next) if segment + 1 < expected => u32::from_le_bytes(*next) as usize,
            _ => data.len(),
        };
        let bytes = data.get(start..end).ok_or(DicomError::Truncated)?;
        planes.push(unpack(bytes, header.pixels())?);
    }
    if !header.photometric.is_gray() {
        return Ok(colour(header, planes.concat(), true));
    }
    let numbers = match planes.as_slice() {
        [low] => low.iter().map(|low| u16::from(*low)).collect(),
        [high, low] => {
            let pairs = high.iter().zip(low);
            pairs
                .map(|(high, low)| u16::from_be_bytes([*high, *low]))
                .collect()
        }
        _ => {
            return Err(DicomError::damaged(
                "its run lengths hold too many segments",
            ));
        }
    };
    Ok(gray(header, numbers))
}

/// `length` bytes out of runs and literal stretches.
fn unpack(mut packed: &[u8], length: usize) -> Result<Vec<u8>, DicomError> {
    // Two bytes make 128 at most.
    if packed.len().saturating_mul(64) < length {
        return Err(DicomError::Truncated);
    }
    let mut bytes = Vec::with_capacity(length);
    while bytes.len() < length {
        match packed {
            [count @ 0..=127, rest @ ..] => {
                let stretch = usize::from(*count) + 1;
                bytes.extend(rest.get(..stretch).ok_or(DicomError::Truncated)?);
                packed = &rest[stretch..];
            }
            [128, rest @ ..] => packed = rest,
            [count, value, rest @ ..] => {
                bytes.resize(bytes.len() + 257 - usize::from(*count), *value);
                packed = rest;
            }
            _ => return Err(DicomError::Truncated),
        }
    }
    // An encoder may pad the last run.
    bytes.truncate(length);
    Ok(bytes)
}

fn check_size(header: &Header, columns: u32, rows: u32) -> Result<(), DicomError> {
    if (columns as usize, rows as usize) == (header.columns, header.rows) {
        return Ok(());
    }
    Err(DicomError::Damaged(format!(
        "its compressed picture is {columns} × {rows} pixels, its header says {} × {}",
        header.columns, header.rows
    )))
}

fn check_channels(header: &Header, found: usize) -> Result<(), DicomError> {
    if found == header.samples {
        return Ok(());
    }
    Err(DicomError::Damaged(format!(
        "its compressed picture has {found} channels, its header says {}",
        header.samples
    )))
}

fn jpeg(
    header: &Header,
    data: &[u8],
    syntax: &Syntax,
    remarks: &mut Vec<Remark>,
) -> Result<Samples, DicomError> {
    if !data.starts_with(&[0xff, 0xd8]) {
        return Err(DicomError::damaged("its JPEG data do not begin as such"));
    }
    if !jpeg::jpeg_has_end(data) {
        return Err(DicomError::Truncated);
    }
    let found = jpeg::frame_header(data)
        .ok_or_else(|| DicomError::damaged("its JPEG data have no header"))?;
    check_size(header, found.width.into(), found.height.into())?;
    if found.is_lossless {
        return jpeg_lossless(header, data, syntax);
    }
    let tag = match header.photometric {
        Photometric::Rgb => Colour::Rgb,
        _ => Colour::YCbCr,
    };
    // The header's size has passed the limits, and the stream's is the same.
    let decoded = jpeg::decode(data, Some(tag), u64::MAX);
    let refused = |cause| match cause {
        JpegError::Truncated => DicomError::Truncated,
        JpegError::Damaged(reason) => DicomError::Damaged(reason),
        JpegError::Unsupported(_) => syntax.refused(),
        JpegError::TooMuchMemory => DicomError::TooMuchMemory,
    };
    let decoded = decoded.map_err(refused)?;
    remarks.extend(decoded.damage.remark().map_err(refused)?);
    match decoded.pixels {
        jpeg::JpegPixels::Gray(numbers) => {
            check_channels(header, 1)?;
            gray_of(header, numbers)
        }
        jpeg::JpegPixels::Rgb(pixels) => {
            check_channels(header, 3)?;
            if let Some(marked) = decoded.marked.filter(|marked| *marked != tag) {
                let name = |colour| match colour {
                    Colour::Rgb => "RGB",
                    Colour::YCbCr => "YBR_FULL",
                };
                remarks.push(Remark::new(
                    RemarkKind::ColourTag,
                    format!(
                        "its header says {}, its JPEG stream is marked as {}; the stream is followed",
                        name(tag),
                        name(marked)
                    ),
                ));
            }
            rgb_of(header, pixels)
        }
    }
}

fn jpeg_lossless(header: &Header, data: &[u8], syntax: &Syntax) -> Result<Samples, DicomError> {
    let refused = |cause| match cause {
        LosslessError::Unsupported(_) => syntax.refused(),
        LosslessError::Io(cause) if cause.kind() == std::io::ErrorKind::UnexpectedEof => {
            DicomError::Truncated
        }
        other => DicomError::damaged(other),
    };
    let mut decoder = Decoder::new(data);
    decoder.read_info().map_err(refused)?;
    let info = decoder
        .info()
        .ok_or_else(|| DicomError::damaged("its JPEG data have no header"))?;
    decoder.set_color_transform(match header.photometric {
        Photometric::Rgb => ColorTransform::RGB,
        Photometric::YbrFull => ColorTransform::YCbCr,
        _ => ColorTransform::Grayscale,
    });
    decoder.set_max_decoding_buffer_size(header.pixels() * header.samples * 2);
    let bytes = decoder.decode().map_err(refused)?;
    match info.pixel_format {
        PixelFormat::L8 => {
            check_channels(header, 1)?;
            let numbers = bytes.iter().map(|byte| u16::from(*byte)).collect();
            gray_of(header, numbers)
        }
        PixelFormat::L16 => {
            check_channels(header, 1)?;
            let words = bytes.as_chunks::<2>().0;
            gray_of(
                header,
                words.iter().map(|word| u16::from_ne_bytes(*word)).collect(),
            )
        }
        PixelFormat::RGB24 => {
            check_channels(header, 3)?;
            // The colour transform was undone by the decoder.
            rgb_of(header, bytes)
        }
        PixelFormat::CMYK32 => check_channels(header, 4).map(|()| Samples::Rgb(Vec::new())),
    }
}

/// Numbers of a codec, which does not know the place of the highest bit.
fn gray_of(header: &Header, mut numbers: Vec<u16>) -> Result<Samples, DicomError> {
    if numbers.len() != header.pixels() {
        return Err(DicomError::Truncated);
    }
    let mask = mask(header.stored);
    for number in &mut numbers {
        *number &= mask;
    }
    Ok(Samples::Gray(numbers))
}

fn rgb_of(header: &Header, bytes: Vec<u8>) -> Result<Samples, DicomError> {
    if bytes.len() != header.pixels() * 3 {
        return Err(DicomError::Truncated);
    }
    Ok(Samples::Rgb(bytes))
}

fn jpeg_ls(header: &Header, data: &[u8], syntax: &Syntax) -> Result<Samples, DicomError> {
    if header.samples != 1 {
        return Err(syntax.refused());
    }
    let (columns, rows) = (header.columns as u32, header.rows as u32);
    // A frame of odd length is padded after its end mark, or by some writers before it.
    let decoded = jpegls::decode(data, columns, rows).or_else(|error| {
        let without = without_pad(data).ok_or(error)?;
        jpegls::decode(&without, columns, rows)
    });
    match decoded {
        Ok((numbers, _, _)) => gray_of(header, numbers),
        Err(jpegls::CodecError::Unsupported(_)) => Err(syntax.refused()),
        Err(other) => Err(DicomError::damaged(other)),
    }
}

/// The stream without a zero before its end mark; `None` if there is none.
fn without_pad(data: &[u8]) -> Option<Vec<u8>> {
    const PADDED_END: [u8; 3] = [0, 0xff, 0xd9];
    let at = data.windows(3).rposition(|bytes| bytes == PADDED_END)?;
    // A zero after 0xff is a stuffed bit of the picture.
    (at > 0 && data[at - 1] != 0xff).then(|| [&data[..at], &data[at + 1..]].concat())
}

fn jpeg_2000(header: &Header, data: &[u8]) -> Result<Samples, DicomError> {
    let settings = DecodeSettings {
        resolve_palette_indices: false,
        ..DecodeSettings::default()
    };
    let image = Image::new(data, &settings).map_err(DicomError::damaged)?;
    check_size(header, image.width(), image.height())?;
    let (channels, signed) = jpeg_2000_channels(data).ok_or(DicomError::Truncated)?;
    // Before the decoder makes room for each of them.
    check_channels(header, channels)?;
    let mut context = DecoderContext::default();
    let decoded = image.decode(&mut context).map_err(DicomError::damaged)?;
    let components = decoded.components();
    check_channels(header, components.len())?;
    let short = components
        .iter()
        .any(|component| component.samples().len() != header.pixels());
    if short {
        return Err(DicomError::Truncated);
    }
    if let [component] = components {
        let bits = component.bit_depth();
        if !(1..=16).contains(&bits) {
            return Err(DicomError::Damaged(format!(
                "its compressed numbers have {bits} bits, expected 1 to 16"
            )));
        }
        let highest = mask(bits.into());
        // The decoder lifts numbers with a sign by half their range.
        let lift = if signed { 1 << (bits - 1) } else { 0 };
        let number = |value: &f32| {
            // Loss may carry a number past the ends of its range; a cast from fractions clips at 0.
            let number = (value.round() as u16).min(highest);
            number.wrapping_sub(lift)
        };
        return gray_of(header, component.samples().iter().map(number).collect());
    }
    let mut pixels = vec![0; header.pixels() * 3];
    for (channel, component) in components.iter().enumerate() {
        let targets = pixels.as_chunks_mut::<3>().0.iter_mut();
        for (pixel, value) in targets.zip(component.samples()) {
            pixel[channel] = value.round() as u8;
        }
    }
    Ok(colour(header, pixels, false))
}

/// How many channels a code stream has, and whether the first has a sign.
fn jpeg_2000_channels(data: &[u8]) -> Option<(usize, bool)> {
    const START_AND_SIZE: [u8; 4] = [0xff, 0x4f, 0xff, 0x51];
    /// Number of channels, then bits and sign of the first, counted from the start of the stream.
    const CHANNELS: std::ops::Range<usize> = 40..43;
    let start = data.windows(4).position(|mark| mark == START_AND_SIZE)?;
    match *data[start..].get(CHANNELS)? {
        [high, low, first] => Some((
            usize::from(u16::from_be_bytes([high, low])),
            first & 0x80 != 0,
        )),
        _ => None,
    }
}

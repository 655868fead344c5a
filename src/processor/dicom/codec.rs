//! One frame of stored pixels to numbers.

use std::borrow::Cow;
use std::io::Read;

use dicom_core::VR;
use jpeg_decoder::ColorTransform;

use super::encoding::Encoding;
use super::error::DicomError;
use super::header::{Header, Photometric};
use super::native::{colour, level_of_bits, native, rle};
use super::reader::{DataSet, PixelData};
use super::samples::Samples;
use super::syntax::{Codec, Syntax};
use crate::processor::jpeg::{self, Colour, JpegError};
use crate::processor::jpeg_2000;
use crate::processor::jpeg_lossless::{self, LosslessPixels};
use crate::processor::jpeg_ls;
use crate::processor::remark::{Remark, RemarkKind};

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
            native(header, *vr, bytes, set.encoding, (frame, header.frames))
        }
        (PixelData::Fragments { offsets, fragments }, codec) if codec != Codec::Native => {
            let data = frame_data(header, offsets, fragments, frame)?;
            match codec {
                Codec::Jpeg => jpeg(header, &data, syntax, remarks),
                Codec::JpegLs => jpeg_ls(header, &data, syntax),
                Codec::Jpeg2000 => jpeg_2000(header, &data, syntax),
                Codec::Deflate => deflated(header, &data),
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
    let refused = |cause| refused(cause, syntax);
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

/// The error of a codec, which has no words for the transfer syntax.
fn refused(cause: JpegError, syntax: &Syntax) -> DicomError {
    match cause {
        JpegError::Truncated => DicomError::Truncated,
        JpegError::Damaged(reason) => DicomError::Damaged(reason),
        JpegError::Unsupported(_) => syntax.refused(),
        JpegError::TooMuchMemory => DicomError::TooMuchMemory,
    }
}

fn jpeg_lossless(header: &Header, data: &[u8], syntax: &Syntax) -> Result<Samples, DicomError> {
    let meaning = match header.photometric {
        Photometric::Rgb => ColorTransform::RGB,
        Photometric::YbrFull => ColorTransform::YCbCr,
        _ => ColorTransform::Grayscale,
    };
    let most = header.pixels() * header.samples * 2;
    let decoded = jpeg_lossless::decode(data, meaning, most);
    match decoded.map_err(|cause| refused(cause, syntax))? {
        LosslessPixels::Gray(numbers) => {
            check_channels(header, 1)?;
            gray_of(header, numbers)
        }
        LosslessPixels::Rgb(levels) => {
            check_channels(header, 3)?;
            // The colour transform was undone by the decoder.
            rgb_of(header, levels)
        }
    }
}

/// Numbers of a codec, which does not know the place of the highest bit.
fn gray_of(header: &Header, mut numbers: Vec<u16>) -> Result<Samples, DicomError> {
    if numbers.len() != header.pixels() {
        return Err(DicomError::Truncated);
    }
    let mask = header.mask() as u16;
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
    let refused = |cause| refused(cause, syntax);
    let found = jpeg_ls::header(data).map_err(refused)?;
    check_size(header, found.width as u32, found.height as u32)?;
    check_channels(header, found.channels)?;
    let decoded = jpeg_ls::decode(data).map_err(refused)?;
    if header.samples == 1 {
        return gray_of(header, decoded.numbers);
    }
    let level = |number: u16| level_of_bits(number.into(), found.precision);
    let levels = decoded.numbers.into_iter().map(level).collect();
    Ok(colour(header, levels, false))
}

fn jpeg_2000(header: &Header, data: &[u8], syntax: &Syntax) -> Result<Samples, DicomError> {
    let refused = |cause| refused(cause, syntax);
    let found = jpeg_2000::header(data).map_err(refused)?;
    check_size(header, found.width, found.height)?;
    // Before the decoder makes room for each of them.
    check_channels(header, found.channels)?;
    let decoded = jpeg_2000::decode(data, false).map_err(refused)?;
    check_channels(header, decoded.channels.len())?;
    if let [channel] = &decoded.channels[..] {
        let highest = u16::MAX >> (16 - channel.bits);
        // The decoder lifts numbers with a sign by half their range.
        let lift = if found.signed {
            1 << (channel.bits - 1)
        } else {
            0
        };
        let number = |value: &f32| {
            // Loss may carry a number past the ends of its range; a cast from fractions clips at 0.
            let number = (value.round() as u16).min(highest);
            number.wrapping_sub(lift)
        };
        return gray_of(header, channel.samples.iter().map(number).collect());
    }
    let mut pixels = vec![0; header.pixels() * 3];
    for (place, channel) in decoded.channels.iter().enumerate() {
        let targets = pixels.as_chunks_mut::<3>().0.iter_mut();
        for (pixel, value) in targets.zip(&channel.samples) {
            pixel[place] = level_of_bits(value.round() as u32, channel.bits);
        }
    }
    Ok(colour(header, pixels, false))
}

/// A frame that is deflated by itself.
///
/// Source: PS3.5, A.4.13.
fn deflated(header: &Header, data: &[u8]) -> Result<Samples, DicomError> {
    let bits = header.pixels() * header.samples * header.allocated as usize;
    let mut bytes = Vec::new();
    flate2::read::DeflateDecoder::new(data)
        .take(bits.div_ceil(8) as u64)
        .read_to_end(&mut bytes)
        .map_err(|_| DicomError::damaged("its deflated data cannot be inflated"))?;
    native(header, VR::OB, &bytes, Encoding::ExplicitLittle, (0, 1))
}

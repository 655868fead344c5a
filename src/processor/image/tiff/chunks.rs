//! Strips and tiles to numbers: decompressed, predictors undone, bits unpacked, put in their places.

use std::borrow::Cow;
use std::io::Read;

use half::f16;
use weezl::{BitOrder, LzwStatus, decode::Decoder};

use super::super::refusal::Refusal;
use super::directory::{Directory, Tiff, tag};
use super::layout::{Compression, Layout, Photometric, SampleFormat};
use super::{fax, old_jpeg};
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::jpeg::{self, Colour, JpegError, JpegPixels};
use crate::processor::pack_bits::unpack;
use crate::processor::remark::Remark;

/// The numbers of a page.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum PageValues {
    /// `[height, width, samples]`: whole numbers of 16 bits at most; JPEG of colours as red, green, blue.
    Levels(Vec<u16>),
    /// `[height, width]`: the first sample of each pixel, with a sign or a fraction.
    Measured(Vec<f64>),
}

/// A strip or tile: its place, and how much of it is inside the picture.
struct Chunk {
    plane: usize,
    left: usize,
    top: usize,
    /// Rows that are stored.
    rows: usize,
}

/// Decodes all strips or tiles.
///
/// # Errors
/// Any [`Refusal`].
pub(super) fn numbers(
    tiff: &Tiff<'_>,
    directory: &Directory,
    layout: &Layout,
    limits: &DecodeLimits,
    remarks: &mut Vec<Remark>,
) -> Result<PageValues, Refusal> {
    if layout.compression == Compression::OldJpeg
        && let Some(stream) = old_jpeg::stream(tiff, directory, layout)?
    {
        let mut target = Target::new(layout);
        let whole = Chunk {
            plane: 0,
            left: 0,
            top: 0,
            rows: layout.height,
        };
        target.put_jpeg(&stream, &whole, limits, remarks)?;
        return Ok(target.numbers);
    }
    let (across, down) = (
        layout.width.div_ceil(layout.chunk.0),
        layout.height.div_ceil(layout.chunk.1),
    );
    // Of numbers that are measured only the first sample is shown.
    let planes = if layout.planar && !layout.is_measured() {
        layout.samples
    } else {
        1
    };
    let values = |strip, tile| {
        let values = tiff.values(directory, if layout.is_tiled { tile } else { strip });
        // Some writers state tiles by the tags of strips.
        values.or_else(|| tiff.values(directory, strip))
    };
    let offsets = values(tag::STRIP_OFFSETS, tag::TILE_OFFSETS)
        .ok_or_else(|| Refusal::damaged("it does not say where its strips or tiles are"))?;
    let lengths = values(tag::STRIP_BYTE_COUNTS, tag::TILE_BYTE_COUNTS);
    if offsets.len() / planes < across.saturating_mul(down) {
        return Err(Refusal::damaged(
            "it has fewer strips or tiles than its size takes",
        ));
    }
    let mut target = Target::new(layout);
    let tables = tiff.raw(directory, tag::JPEG_TABLES);
    for plane in 0..planes {
        for place in 0..across * down {
            let index = plane * across * down + place;
            let (left, top) = (
                place % across * layout.chunk.0,
                place / across * layout.chunk.1,
            );
            let rows = if layout.is_tiled {
                layout.chunk.1
            } else {
                layout.chunk.1.min(layout.height - top)
            };
            let chunk = Chunk {
                plane,
                left,
                top,
                rows,
            };
            let length = lengths.as_ref().and_then(|lengths| lengths.get(index));
            let data = slice(tiff.bytes, offsets[index], length.copied())?;
            if layout.compression.is_jpeg() {
                target.put_jpeg(&with_tables(tables, data), &chunk, limits, remarks)?;
            } else {
                target.put(tiff, data, &chunk)?;
            }
        }
    }
    Ok(target.numbers)
}

/// The bytes of a strip; to the end of the file where its length is not stated.
fn slice(bytes: &[u8], offset: u64, length: Option<u64>) -> Result<&[u8], Refusal> {
    let from = usize::try_from(offset).map_err(|_| Refusal::Truncated)?;
    let rest = bytes.get(from..).ok_or(Refusal::Truncated)?;
    match length {
        None => Ok(rest),
        Some(length) => usize::try_from(length)
            .ok()
            .and_then(|length| rest.get(..length))
            .ok_or(Refusal::Truncated),
    }
}

/// A JPEG stream with the tables that all strips share before its own segments.
fn with_tables<'a>(tables: Option<&[u8]>, data: &'a [u8]) -> Cow<'a, [u8]> {
    const START: [u8; 2] = [0xff, 0xd8];
    const END: [u8; 2] = [0xff, 0xd9];
    let tables = tables.map(|tables| tables.strip_suffix(&END).unwrap_or(tables));
    match (tables, data.strip_prefix(&START)) {
        (Some(tables), Some(rest)) if tables.starts_with(&START) => {
            Cow::Owned([tables, rest].concat())
        }
        _ => Cow::Borrowed(data),
    }
}

/// The numbers of a page while its chunks are put in.
struct Target<'a> {
    layout: &'a Layout,
    numbers: PageValues,
}

impl<'a> Target<'a> {
    fn new(layout: &'a Layout) -> Self {
        let pixels = layout.width * layout.height;
        let numbers = if layout.is_measured() {
            PageValues::Measured(vec![0.0; pixels])
        } else {
            PageValues::Levels(vec![0; pixels * layout.samples])
        };
        Self { layout, numbers }
    }

    /// Decodes a JPEG stream into its place.
    fn put_jpeg(
        &mut self,
        stream: &[u8],
        chunk: &Chunk,
        limits: &DecodeLimits,
        remarks: &mut Vec<Remark>,
    ) -> Result<(), Refusal> {
        let layout = self.layout;
        if !stream.starts_with(&[0xff, 0xd8]) {
            return Err(Refusal::damaged("its JPEG data do not begin as such"));
        }
        let tag = match layout.photometric {
            Photometric::Rgb => Colour::Rgb,
            _ => Colour::YCbCr,
        };
        // Coefficients and planes of three channels, and whole units beyond the edges.
        let place = if layout.compression == Compression::OldJpeg {
            (layout.width, layout.height)
        } else {
            layout.chunk
        };
        let most = 16 * (place.0 as u64 + 64) * (place.1 as u64 + 64);
        let decoded = jpeg::decode(stream, Some(tag), most.min(limits.max_decoded_bytes));
        let decoded = decoded.map_err(|cause| match cause {
            JpegError::TooMuchMemory => {
                Refusal::damaged("its JPEG data are larger than their place")
            }
            cause => cause.into(),
        })?;
        let damage = decoded.damage.remark()?;
        remarks.extend(damage.filter(|remark| !remarks.contains(remark)));
        let (samples, pixels): (usize, Vec<u16>) = match decoded.pixels {
            JpegPixels::Gray(levels) => (1, levels),
            JpegPixels::Rgb(levels) => (3, levels.into_iter().map(u16::from).collect()),
        };
        let rows = chunk.rows.min(layout.height - chunk.top);
        let columns = layout.chunk_width().min(layout.width - chunk.left);
        if samples != layout.samples_together() {
            return Err(Refusal::Damaged(format!(
                "its JPEG data have {samples} samples a pixel, expected {}",
                layout.samples_together()
            )));
        }
        if decoded.width < columns || decoded.height < rows {
            return Err(Refusal::damaged(
                "its JPEG data are smaller than their place",
            ));
        }
        for (row, line) in pixels
            .chunks_exact(decoded.width * samples)
            .take(rows)
            .enumerate()
        {
            self.put_line(chunk, row, line[..columns * samples].iter().copied());
        }
        Ok(())
    }

    /// Decompresses `data` and puts its numbers in their places.
    fn put(&mut self, tiff: &Tiff<'_>, data: &[u8], chunk: &Chunk) -> Result<(), Refusal> {
        let layout = self.layout;
        let width = layout.chunk_width();
        let (across, down) = layout.subsampling();
        let samples = layout.samples_together();
        let (row_bytes, stored_rows) = if (across, down) == (1, 1) {
            let bits = width * samples * layout.bits as usize;
            (bits.div_ceil(8), chunk.rows)
        } else {
            let unit = across * down + 2;
            (width.div_ceil(across) * unit, chunk.rows.div_ceil(down))
        };
        let expected = row_bytes * stored_rows;
        let data = if layout.reversed_bits {
            Cow::Owned(data.iter().map(|byte| byte.reverse_bits()).collect())
        } else {
            Cow::Borrowed(data)
        };
        let mut bytes = match layout.compression {
            Compression::None => data,
            Compression::Lzw => Cow::Owned(lzw(&data, expected)?),
            Compression::Deflate => Cow::Owned(inflate(&data, expected)?),
            Compression::PackBits => Cow::Owned(unpack(&data, expected).ok_or(Refusal::Truncated)?),
            kind => Cow::Owned(fax::decode(&data, kind, width, chunk.rows)?),
        };
        if bytes.len() < expected {
            return Err(Refusal::Truncated);
        }
        let predicts = !layout.compression.is_fax() && layout.predictor != 1;
        let rows = chunk.rows.min(layout.height - chunk.top);
        if predicts {
            let bytes = bytes.to_mut();
            for line in bytes.chunks_exact_mut(row_bytes).take(rows) {
                undo_prediction(line, layout, samples, tiff.big_endian);
            }
        }
        let columns = width.min(layout.width - chunk.left);
        if (across, down) != (1, 1) {
            self.put_units(chunk, &bytes, (across, down), (rows, columns), row_bytes);
            return Ok(());
        }
        for (row, line) in bytes.chunks_exact(row_bytes).take(rows).enumerate() {
            self.put_row(tiff, chunk, row, line, columns);
        }
        Ok(())
    }

    /// Unpacks the numbers of a row.
    fn put_row(&mut self, tiff: &Tiff<'_>, chunk: &Chunk, row: usize, line: &[u8], columns: usize) {
        let layout = self.layout;
        let samples = layout.samples_together();
        let size = layout.bits as usize / 8;
        if let PageValues::Measured(values) = &mut self.numbers {
            let first = (chunk.top + row) * layout.width + chunk.left;
            let targets = &mut values[first..first + columns];
            if layout.bits < 8 || !layout.bits.is_multiple_of(8) {
                let mut bits = Bits::new(line);
                for target in targets {
                    *target = with_sign(bits.take(layout.bits).into(), layout.bits);
                    (1..samples).for_each(|_| _ = bits.take(layout.bits));
                }
                return;
            }
            for (target, pixel) in targets.iter_mut().zip(line.chunks_exact(size * samples)) {
                *target = measured(tiff.join(&pixel[..size]), layout);
            }
            return;
        }
        let count = columns * samples;
        match layout.bits {
            8 => self.put_line(chunk, row, line[..count].iter().map(|b| u16::from(*b))),
            16 => {
                let words = line.as_chunks::<2>().0[..count].iter();
                let word = |word: &[u8; 2]| tiff.join(word) as u16;
                self.put_line(chunk, row, words.map(word));
            }
            bits => {
                let mut reader = Bits::new(line);
                self.put_line(chunk, row, (0..count).map(|_| reader.take(bits)));
            }
        }
    }

    /// Puts the numbers of a row of a chunk in their places.
    fn put_line(&mut self, chunk: &Chunk, row: usize, line: impl Iterator<Item = u16>) {
        let layout = self.layout;
        let PageValues::Levels(levels) = &mut self.numbers else {
            return;
        };
        let first = (chunk.top + row) * layout.width + chunk.left;
        if layout.planar {
            let targets = levels[first * layout.samples + chunk.plane..].iter_mut();
            for (target, number) in targets.step_by(layout.samples).zip(line) {
                *target = number;
            }
        } else {
            let targets = levels[first * layout.samples..].iter_mut();
            for (target, number) in targets.zip(line) {
                *target = number;
            }
        }
    }

    /// Puts units of several luminances and two colour differences in their places.
    fn put_units(
        &mut self,
        chunk: &Chunk,
        bytes: &[u8],
        (across, down): (usize, usize),
        (rows, columns): (usize, usize),
        row_bytes: usize,
    ) {
        let PageValues::Levels(levels) = &mut self.numbers else {
            return;
        };
        let (width, samples) = (self.layout.width, self.layout.samples);
        for row in 0..rows {
            let line = &bytes[row / down * row_bytes..][..row_bytes];
            let first = ((chunk.top + row) * width + chunk.left) * samples;
            for column in 0..columns {
                let unit = &line[column / across * (across * down + 2)..][..across * down + 2];
                let pixel = [
                    unit[row % down * across + column % across],
                    unit[across * down],
                    unit[across * down + 1],
                ];
                for (target, number) in levels[first + column * samples..].iter_mut().zip(pixel) {
                    *target = number.into();
                }
            }
        }
    }
}

impl Layout {
    fn chunk_width(&self) -> usize {
        self.chunk.0
    }
}

/// A number of 8 to 64 bits that has a sign or is a fraction.
fn measured(number: u64, layout: &Layout) -> f64 {
    match (layout.format, layout.bits) {
        (SampleFormat::Fraction, 16) => f16::from_bits(number as u16).to_f64(),
        (SampleFormat::Fraction, 32) => f32::from_bits(number as u32).into(),
        (SampleFormat::Fraction, _) => f64::from_bits(number),
        (SampleFormat::Signed, bits) => with_sign(number, bits),
        (SampleFormat::Unsigned, _) => number as f64,
    }
}

fn with_sign(number: u64, bits: u32) -> f64 {
    let shift = u64::BITS - bits;
    (((number << shift) as i64) >> shift) as f64
}

/// Numbers of up to 16 bits one after another, the highest bit first.
struct Bits<'a> {
    bytes: std::slice::Iter<'a, u8>,
    held: u32,
    count: u32,
}

impl<'a> Bits<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        Self {
            bytes: bytes.iter(),
            held: 0,
            count: 0,
        }
    }

    /// The next number; the line is as long as its numbers take.
    fn take(&mut self, bits: u32) -> u16 {
        while self.count < bits {
            self.held = self.held << 8 | u32::from(self.bytes.next().copied().unwrap_or(0));
            self.count += 8;
        }
        self.count -= bits;
        let number = self.held >> self.count;
        self.held &= (1 << self.count) - 1;
        number as u16
    }
}

/// Source: TIFF 6.0, section 13; the order of old writers is told by their first code.
fn lzw(data: &[u8], expected: usize) -> Result<Vec<u8>, Refusal> {
    let mut decoder = match data {
        // The code that empties the table, lowest bit first.
        [0, second, ..] if second & 1 != 0 => Decoder::new(BitOrder::Lsb, 8),
        _ => Decoder::with_tiff_size_switch(BitOrder::Msb, 8),
    };
    let mut bytes = vec![0; expected];
    let (mut read, mut written) = (0, 0);
    while written < expected {
        let result = decoder.decode_bytes(&data[read..], &mut bytes[written..]);
        read += result.consumed_in;
        written += result.consumed_out;
        match result.status {
            Ok(LzwStatus::Ok) if result.consumed_in + result.consumed_out > 0 => {}
            Ok(_) => break,
            Err(cause) => return Err(Refusal::damaged(cause)),
        }
    }
    bytes.truncate(written);
    Ok(bytes)
}

fn inflate(data: &[u8], expected: usize) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    let mut reader = flate2::read::ZlibDecoder::new(data).take(expected as u64);
    match reader.read_to_end(&mut bytes) {
        Ok(_) => Ok(bytes),
        Err(cause) if cause.kind() == std::io::ErrorKind::UnexpectedEof => Err(Refusal::Truncated),
        Err(cause) => Err(Refusal::damaged(cause)),
    }
}

/// Numbers out of differences to the number on the left, in place.
///
/// Source: TIFF 6.0, section 14; Adobe Photoshop TIFF Technical Note 3 for fractions.
fn undo_prediction(line: &mut [u8], layout: &Layout, samples: usize, big_endian: bool) {
    let size = layout.bits as usize / 8;
    if layout.predictor == 3 {
        for at in samples..line.len() {
            line[at] = line[at].wrapping_add(line[at - samples]);
        }
        // All first bytes, then all second ones, the highest first.
        let planes = line.to_vec();
        let count = line.len() / size;
        for (value, bytes) in line.chunks_exact_mut(size).enumerate() {
            for (place, byte) in bytes.iter_mut().enumerate() {
                let significance = if big_endian { place } else { size - 1 - place };
                *byte = planes[significance * count + value];
            }
        }
        return;
    }
    let step = samples * size;
    if size == 1 {
        for at in step..line.len() {
            line[at] = line[at].wrapping_add(line[at - step]);
        }
        return;
    }
    for at in (step..line.len() / size * size).step_by(size) {
        let mut carry = 0;
        for place in 0..size {
            let place = if big_endian { size - 1 - place } else { place };
            let sum = u16::from(line[at + place]) + u16::from(line[at + place - step]) + carry;
            line[at + place] = sum as u8;
            carry = sum >> 8;
        }
    }
}

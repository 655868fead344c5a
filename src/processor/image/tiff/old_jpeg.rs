//! JPEG as TIFF 6.0 first had it, with its tables in tags: put together as one stream.
//!
//! Source: TIFF 6.0, section 22; `tif_ojpeg.c`, libtiff.

use super::super::refusal::Refusal;
use super::directory::{Directory, Tiff, tag};
use super::layout::{Layout, Photometric};

/// The whole page as one JPEG stream; `None` if each strip is a stream of its own.
///
/// # Errors
/// Tables or strips that are not where the directory says.
pub(super) fn stream(
    tiff: &Tiff<'_>,
    directory: &Directory,
    layout: &Layout,
) -> Result<Option<Vec<u8>>, Refusal> {
    const START: [u8; 2] = [0xff, 0xd8];
    let at = |offset: u64| {
        let offset = usize::try_from(offset).map_err(|_| Refusal::Truncated)?;
        tiff.bytes.get(offset..).ok_or(Refusal::Truncated)
    };
    let strips = tiff.values(directory, tag::STRIP_OFFSETS);
    let strips = strips.or_else(|| tiff.values(directory, tag::TILE_OFFSETS));
    let strips = strips.ok_or_else(|| Refusal::damaged("it does not say where its strips are"))?;
    let lengths = tiff.values(directory, tag::STRIP_BYTE_COUNTS);
    let lengths = lengths.or_else(|| tiff.values(directory, tag::TILE_BYTE_COUNTS));
    // A stream with its header, of which the strips are parts.
    if let Some(offset) = tiff.value(directory, tag::JPEG_INTERCHANGE_FORMAT)
        && let Ok(stream) = at(offset)
        && stream.starts_with(&START)
    {
        let length = tiff.value(directory, tag::JPEG_INTERCHANGE_FORMAT_LENGTH);
        let length = length.and_then(|length| usize::try_from(length).ok());
        let stated = length.and_then(|length| stream.get(..length));
        // Some writers state the length of the header alone.
        let whole = stated.filter(|stated| has_scan_and_end(stated));
        return Ok(Some(whole.unwrap_or(stream).to_vec()));
    }
    let first = strips.first().copied().unwrap_or(0);
    if at(first)?.starts_with(&START) {
        return Ok(None);
    }
    let mut stream = START.to_vec();
    let tables = |tag| {
        tiff.values(directory, tag)
            .filter(|tables| (1..=4).contains(&tables.len()))
            .ok_or_else(|| Refusal::damaged("its JPEG tables are not stated"))
    };
    for (place, offset) in tables(tag::JPEG_Q_TABLES)?.into_iter().enumerate() {
        let table = at(offset)?.get(..64).ok_or(Refusal::Truncated)?;
        segment(&mut stream, 0xdb, &[&[place as u8], table].concat());
    }
    for (class, tag) in [(0, tag::JPEG_DC_TABLES), (0x10, tag::JPEG_AC_TABLES)] {
        for (place, offset) in tables(tag)?.into_iter().enumerate() {
            let table = at(offset)?;
            let counts = table.get(..16).ok_or(Refusal::Truncated)?;
            let codes: usize = counts.iter().map(|count| usize::from(*count)).sum();
            let table = table.get(..16 + codes).ok_or(Refusal::Truncated)?;
            segment(&mut stream, 0xc4, &[&[class | place as u8], table].concat());
        }
    }
    let (across, down) = match tiff.values(directory, tag::YCBCR_SUB_SAMPLING).as_deref() {
        _ if !matches!(layout.photometric, Photometric::YCbCr { .. }) => (1, 1),
        Some([across @ (1 | 2 | 4), down @ (1 | 2 | 4), ..]) => (*across as usize, *down as usize),
        _ => (2, 2),
    };
    let sides = [layout.height, layout.width].map(u16::try_from);
    let [Ok(height), Ok(width)] = sides else {
        return Err(Refusal::damaged("it is larger than a JPEG can be"));
    };
    let samples = layout.samples;
    if layout.planar || layout.is_tiled || samples > 3 {
        return Err(Refusal::unsupported("old JPEG in planes or tiles"));
    }
    let mut frame = vec![8];
    frame.extend(height.to_be_bytes());
    frame.extend(width.to_be_bytes());
    frame.push(samples as u8);
    let mut scan = vec![samples as u8];
    let table_of = |tag, sample: usize| {
        let count = tiff.values(directory, tag).map_or(1, |tables| tables.len());
        sample.min(count - 1) as u8
    };
    for sample in 0..samples {
        let factors = if sample == 0 {
            (across << 4 | down) as u8
        } else {
            0x11
        };
        let id = sample as u8 + 1;
        frame.extend([id, factors, table_of(tag::JPEG_Q_TABLES, sample)]);
        let (dc, ac) = (
            table_of(tag::JPEG_DC_TABLES, sample),
            table_of(tag::JPEG_AC_TABLES, sample),
        );
        scan.extend([id, dc << 4 | ac]);
    }
    segment(&mut stream, 0xc0, &frame);
    // Each strip begins anew, as after a restart mark.
    let units = layout.width.div_ceil(8 * across) * layout.chunk.1.div_ceil(8 * down);
    let stated = tiff
        .value(directory, tag::JPEG_RESTART_INTERVAL)
        .unwrap_or(0);
    let interval = if strips.len() > 1 {
        units as u64
    } else {
        stated
    };
    if interval > 0 {
        let interval = u16::try_from(interval)
            .map_err(|_| Refusal::unsupported("old JPEG of very large strips"))?;
        segment(&mut stream, 0xdd, &interval.to_be_bytes());
    }
    scan.extend([0, 63, 0]);
    segment(&mut stream, 0xda, &scan);
    let room = tiff.bytes.len();
    for (index, offset) in strips.iter().enumerate() {
        let rest = at(*offset)?;
        let length = lengths.as_ref().and_then(|lengths| lengths.get(index));
        let length = length.and_then(|length| usize::try_from(*length).ok());
        let data = match length {
            Some(length) => rest.get(..length).ok_or(Refusal::Truncated)?,
            None => rest,
        };
        if stream.len() + data.len() > 2 * room + 4096 {
            return Err(Refusal::damaged("its strips overlap"));
        }
        if index > 0 {
            stream.extend([0xff, 0xd0 + ((index - 1) % 8) as u8]);
        }
        stream.extend(data);
    }
    stream.extend([0xff, 0xd9]);
    Ok(Some(stream))
}

fn has_scan_and_end(stream: &[u8]) -> bool {
    stream.windows(2).any(|pair| pair == [0xff, 0xda])
        && stream
            .windows(2)
            .rev()
            .take(64)
            .any(|pair| pair == [0xff, 0xd9])
}

fn segment(stream: &mut Vec<u8>, marker: u8, content: &[u8]) {
    stream.extend([0xff, marker]);
    stream.extend((content.len() as u16 + 2).to_be_bytes());
    stream.extend(content);
}

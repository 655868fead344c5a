//! JPEG to pixels as libjpeg-turbo gives them, and how much of a damaged one is lost.
//!
//! The reference reads JPEG through Pillow, so through libjpeg-turbo with its defaults: exact
//! integer inverse DCT, "fancy" upsampling, integer colour conversion. Decoders that are available
//! in Rust round in other ways and fill what is damaged without an error, hence this one: sequential and progressive Huffman coding, 8 or 12 bits, grey or three colours. What
//! else there is (lossless, arithmetic coding, four colours) is [`JpegError::Unsupported`].
//!
//! Source: ITU-T T.81; `jdhuff.c`, `jdphuff.c`, `jidctint.c`, `jdsample.c` and `jdcolor.c` of
//! libjpeg-turbo for how values are rounded.

mod entropy;
mod error;
mod frame;
mod huffman;
mod idct;
mod sample;
mod tables;

use crate::processor::remark::{Remark, RemarkKind};
use entropy::{Scan, ScanComponent};
pub(in crate::processor) use error::JpegError;
use error::damaged;
use frame::Frame;
pub(in crate::processor) use sample::Colour;
use sample::Plane;
use tables::Tables;

/// Pixels row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::processor) enum JpegPixels {
    /// Grey, of 8 or 12 bits.
    Gray(Vec<u16>),
    /// Red, green, blue.
    Rgb(Vec<u8>),
}

/// A decoded JPEG.
#[derive(Debug, Clone)]
pub(in crate::processor) struct DecodedJpeg {
    pub(in crate::processor) width: usize,
    pub(in crate::processor) height: usize,
    pub(in crate::processor) pixels: JpegPixels,
    /// What the stream itself says of its three channels, by a JFIF or Adobe mark or their names.
    pub(in crate::processor) marked: Option<Colour>,
    pub(in crate::processor) damage: Damage,
}

/// What could not be decoded.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(in crate::processor) struct Damage {
    /// Share of the blocks of the worst scan, 0 to 1, that cannot be trusted.
    pub(in crate::processor) share: f64,
    /// Whether scans that refine the picture are missing.
    pub(in crate::processor) is_coarse: bool,
}

impl Damage {
    /// A remark on damage that leaves nearly all of the picture.
    ///
    /// # Errors
    /// [`JpegError::Damaged`] where more is lost.
    pub(in crate::processor) fn remark(self) -> Result<Option<Remark>, JpegError> {
        /// Share of the blocks; a twentieth may hide an apex or an angle.
        const MOST: f64 = 0.05;
        let Self { share, is_coarse } = self;
        let lost = format!("{:.1} % of its blocks cannot be trusted", share * 100.0);
        if share > MOST {
            return Err(JpegError::Damaged(lost));
        }
        let text = if share > 0.0 {
            format!("it is damaged: {lost}")
        } else if is_coarse {
            "it is damaged: the scans with its finer detail are missing".to_owned()
        } else {
            return Ok(None);
        };
        Ok(Some(Remark::new(RemarkKind::Damaged, text)))
    }
}

/// What the header of the first frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::processor) struct FrameHeader {
    /// Lossless, by whatever coding.
    pub(in crate::processor) is_lossless: bool,
    pub(in crate::processor) precision: u8,
    pub(in crate::processor) width: u16,
    pub(in crate::processor) height: u16,
}

/// The header of the first frame, or `None` if there is no whole one.
pub(in crate::processor) fn frame_header(bytes: &[u8]) -> Option<FrameHeader> {
    let mut rest = bytes.get(2..)?;
    loop {
        match rest {
            [0xff, 0xff, ..] => rest = &rest[1..],
            // Huffman tables, tables of arithmetic coding and a reserved mark are among the frames'.
            [0xff, 0xc4 | 0xc8 | 0xcc, high, low, ..]
            | [0xff, 0x02..=0xbf | 0xdb..=0xfe, high, low, ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                rest = rest.get(2 + length..)?;
            }
            [
                0xff,
                kind @ 0xc0..=0xcf,
                _,
                _,
                precision,
                h1,
                h0,
                w1,
                w0,
                ..,
            ] => {
                return Some(FrameHeader {
                    is_lossless: matches!(kind, 0xc3 | 0xc7 | 0xcb | 0xcf),
                    precision: *precision,
                    width: u16::from_be_bytes([*w1, *w0]),
                    height: u16::from_be_bytes([*h1, *h0]),
                });
            }
            _ => return None,
        }
    }
}

/// Decodes the JPEG in `bytes`. `tag` says what three channels mean where the stream does not, which
/// libjpeg takes for luminance and colour differences.
///
/// # Errors
/// Any [`JpegError`]; damage inside the compressed data is none but [`Damage`].
pub(in crate::processor) fn decode(
    bytes: &[u8],
    tag: Option<Colour>,
    max_bytes: u64,
) -> Result<DecodedJpeg, JpegError> {
    /// More than any picture has, few enough for a made-up one to cost little.
    const MOST_SCANS: usize = 256;
    let mut tables = Tables::default();
    let mut frame: Option<Frame> = None;
    let mut marks = Marks::default();
    let mut damage = Damage::default();
    let mut scans = 0;
    let mut rest = bytes.get(2..).ok_or(JpegError::Truncated)?;
    loop {
        // Between segments libjpeg passes over whatever is no marker.
        let at = rest
            .windows(2)
            .position(|pair| pair[0] == 0xff && !matches!(pair[1], 0 | 0xff));
        let Some(at) = at else {
            return Err(JpegError::Truncated);
        };
        let marker = rest[at + 1];
        rest = &rest[at + 2..];
        match marker {
            END_OF_IMAGE => break,
            // A start, restarts and a private mark have no segment.
            0x01 | 0xd0..=0xd8 => continue,
            _ => {}
        }
        let length = rest.first_chunk::<2>().ok_or(JpegError::Truncated)?;
        let length = usize::from(u16::from_be_bytes(*length));
        if length < 2 {
            return Err(damaged("a segment has no length"));
        }
        let segment = rest.get(2..length).ok_or(JpegError::Truncated)?;
        rest = &rest[length..];
        match marker {
            0xc4 => tables.huffman(segment)?,
            0xdb => tables.quantization(segment)?,
            0xdd => {
                let interval = segment.first_chunk::<2>().ok_or_else(|| damaged("DRI"))?;
                tables.restart_interval = u16::from_be_bytes(*interval).into();
            }
            0xc0..=0xc2 if frame.is_some() => return Err(damaged("it has two frames")),
            0xc0..=0xc2 => frame = Some(Frame::new(segment, marker == 0xc2, max_bytes)?),
            0xc3 => return Err(JpegError::Unsupported("lossless JPEG")),
            0xc9..=0xcb | 0xcd..=0xcf => {
                return Err(JpegError::Unsupported("arithmetic coding"));
            }
            0xc5..=0xc7 | 0xde => return Err(JpegError::Unsupported("hierarchical JPEG")),
            START_OF_SCAN => {
                let frame = frame
                    .as_mut()
                    .ok_or_else(|| damaged("a scan is before the frame"))?;
                scans += 1;
                if scans > MOST_SCANS {
                    return Err(damaged("it has too many scans"));
                }
                let share = scan(frame, segment, &tables, &mut rest)?;
                damage.share = damage.share.max(share);
            }
            _ => marks.read(marker, segment),
        }
    }
    let mut frame = frame.ok_or_else(|| damaged("it has no frame"))?;
    damage.is_coarse = frame.is_coarse()?;
    let marked = marks.colour(&frame);
    let colour = marked.or(tag).unwrap_or(Colour::YCbCr);
    Ok(DecodedJpeg {
        width: frame.width,
        height: frame.height,
        pixels: pixels(&mut frame, colour)?,
        marked: marked.filter(|_| frame.components.len() == 3),
        damage,
    })
}

const START_OF_SCAN: u8 = 0xda;
const END_OF_IMAGE: u8 = 0xd9;

/// Marks of programs that say what colours mean.
#[derive(Default)]
struct Marks {
    jfif: bool,
    /// Adobe's transform.
    adobe: Option<u8>,
}

impl Marks {
    fn read(&mut self, marker: u8, segment: &[u8]) {
        match marker {
            0xe0 => self.jfif |= segment.starts_with(b"JFIF\0"),
            0xee if segment.len() >= 12 && segment.starts_with(b"Adobe") => {
                self.adobe = Some(segment[11]);
            }
            _ => {}
        }
    }

    /// Source: `default_decompress_parms`, libjpeg-turbo, `jdapimin.c`.
    fn colour(&self, frame: &Frame) -> Option<Colour> {
        let ids: Vec<u8> = frame.components.iter().map(|c| c.id).collect();
        match (self.jfif, self.adobe) {
            (true, _) | (_, Some(1)) => Some(Colour::YCbCr),
            (_, Some(0)) => Some(Colour::Rgb),
            _ if ids == *b"RGB" => Some(Colour::Rgb),
            _ => None,
        }
    }
}

/// Decodes a scan and skips its data; gives the share of its blocks that are damaged.
fn scan(
    frame: &mut Frame,
    segment: &[u8],
    tables: &Tables,
    rest: &mut &[u8],
) -> Result<f64, JpegError> {
    let cut = || damaged("the header of a scan is cut off");
    let (&count, specs) = segment.split_first().ok_or_else(cut)?;
    let count = usize::from(count);
    let (specs, &[from, to, bits]) = specs
        .split_at_checked(count * 2)
        .and_then(|(specs, after)| Some((specs, after.first_chunk::<3>()?)))
        .ok_or_else(cut)?;
    let mut own = Vec::with_capacity(count);
    for [id, places] in specs.as_chunks::<2>().0 {
        let index = frame.components.iter().position(|c| c.id == *id);
        let index = index.ok_or_else(|| damaged("a scan is of no component"))?;
        if own.iter().any(|c: &ScanComponent<'_>| c.index == index) {
            return Err(damaged("a scan has a component twice"));
        }
        let dc = tables.dc.get(usize::from(places >> 4));
        let ac = tables.ac.get(usize::from(places & 15));
        let component = &mut frame.components[index];
        if component.quantization.is_none() {
            let table = tables.quantization.get(component.table);
            component.quantization = table.copied().flatten();
        }
        let step = component.quantization.map_or(1, |table| table[0]);
        own.push(ScanComponent {
            index,
            dc: dc.and_then(Option::as_ref),
            ac: ac.and_then(Option::as_ref),
            highest_dc: frame.highest_dc(step),
        });
    }
    let (high, low) = (bits >> 4, bits & 15);
    let scan = if frame.progressive {
        let is_dc = from == 0 && to == 0;
        if from > to || to > 63 || low > 13 || (from == 0) != is_dc || (!is_dc && count != 1) {
            return Err(damaged("a scan of coefficients that are none"));
        }
        Scan::progressive(own, (from, to), high, low)
    } else {
        Scan::sequential(own)
    };
    let scan = scan
        .filter(|_| count > 0)
        .ok_or_else(|| damaged("a scan names a Huffman table that is not there"))?;
    for component in &scan.components {
        let bits = if frame.progressive { low } else { 0 };
        let (from, to) = scan.range();
        frame.components[component.index].missing_bits[from..=to].fill(bits);
    }
    let length = entropy::data_length(rest);
    let (data, after) = rest.split_at(length);
    *rest = after;
    Ok(scan.decode(frame, data, tables.restart_interval))
}

/// The pixels of a frame whose scans are all read.
fn pixels(frame: &mut Frame, colour: Colour) -> Result<JpegPixels, JpegError> {
    let most = frame.most();
    let (width, height, precision) = (frame.width, frame.height, frame.precision);
    let mut planes = Vec::with_capacity(frame.components.len());
    for component in &mut frame.components {
        let table = component.quantization;
        let table = table.ok_or_else(|| damaged("a quantization table is not there"))?;
        let (most_h, most_v) = most;
        let size = (
            (width * component.horizontal).div_ceil(most_h),
            (height * component.vertical).div_ceil(most_v),
        );
        let coefficients = std::mem::take(&mut component.coefficients);
        let levels = idct::plane(&coefficients, component.stride, size, &table, precision);
        planes.push(Plane {
            width: size.0,
            height: size.1,
            across: most_h
                .is_multiple_of(component.horizontal)
                .then(|| most_h / component.horizontal),
            down: most_v
                .is_multiple_of(component.vertical)
                .then(|| most_v / component.vertical),
            levels,
        });
    }
    if let [plane] = &mut planes[..] {
        return Ok(JpegPixels::Gray(std::mem::take(&mut plane.levels)));
    }
    sample::rgb(&planes, width, height, colour)
        .map(JpegPixels::Rgb)
        .ok_or(JpegError::Unsupported(
            "sampling factors that do not divide",
        ))
}

/// Whether the marker that ends a JPEG follows its first scan.
///
/// Compressed data never holds the marker's two bytes, a thumbnail in the header may.
pub(in crate::processor) fn jpeg_has_end(bytes: &[u8]) -> bool {
    let mut rest = &bytes[2..];
    loop {
        match rest {
            [0xff, START_OF_SCAN, scan @ ..] => {
                return scan
                    .windows(2)
                    .rev()
                    .any(|pair| pair == [0xff, END_OF_IMAGE]);
            }
            [0xff, 0xff, ..] => rest = &rest[1..],
            [0xff, 0x01 | 0xd0..=0xd9, after @ ..] => rest = after,
            [0xff, _, high, low, ..] => {
                let length = usize::from(u16::from_be_bytes([*high, *low]));
                match rest.get(2 + length..) {
                    Some(after) => rest = after,
                    None => return false,
                }
            }
            // Not at a marker: the decoder knows better what is wrong.
            [_, _, ..] => return true,
            _ => return false,
        }
    }
}

//! JPEG to pixels as libjpeg-turbo gives them, and how much of a damaged one is lost.
//!
//! The reference reads JPEG through Pillow, so through libjpeg-turbo with its defaults: exact
//! integer inverse DCT, "fancy" upsampling, integer colour conversion. Decoders that are available
//! in Rust round in other ways and fill what is damaged without a word, so this one is of the
//! project: sequential and progressive Huffman coding, 8 or 12 bits, grey or three colours. What
//! else there is (lossless, arithmetic coding, four colours) is [`JpegError::Unsupported`].
//!
//! Source: ITU-T T.81; `jdhuff.c`, `jdphuff.c`, `jidctint.c`, `jdsample.c` and `jdcolor.c` of
//! libjpeg-turbo for how values are rounded.

mod entropy;
mod idct;
mod sample;

use crate::processor::remark::{Remark, RemarkKind};
use entropy::{HuffmanTable, Scan, ScanComponent};
use sample::Plane;

/// Why a JPEG gave no pixels.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::processor) enum JpegError {
    /// It ends before its end mark.
    Truncated,
    /// It breaks the rules.
    Damaged(String),
    /// It is of a kind that is not read here.
    Unsupported(&'static str),
    /// Its coefficients and planes take more than the limit.
    TooMuchMemory,
}

/// What the three channels of a JPEG mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::processor) enum Colour {
    Rgb,
    YCbCr,
}

/// Pixels row by row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::processor) enum Pixels {
    /// Grey, of 8 or 12 bits.
    Gray(Vec<u16>),
    /// Red, green, blue.
    Rgb(Vec<u8>),
}

/// A decoded JPEG.
#[derive(Debug, Clone)]
pub(in crate::processor) struct Decoded {
    pub(in crate::processor) width: usize,
    pub(in crate::processor) height: usize,
    pub(in crate::processor) pixels: Pixels,
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

/// One channel.
struct Component {
    id: u8,
    horizontal: usize,
    vertical: usize,
    table: usize,
    /// The table as it is at the component's first scan; later ones are of other components.
    quantization: Option<[u16; 64]>,
    /// Blocks that hold pixels.
    blocks: (usize, usize),
    /// Blocks of a row in `coefficients`, whole units.
    stride: usize,
    coefficients: Vec<i16>,
    /// Bits of each coefficient that have not come yet; all at first.
    missing_bits: [u8; 64],
}

/// Bits of a coefficient of which nothing has come.
const NOTHING_YET: u8 = u8::MAX;

struct Frame {
    width: usize,
    height: usize,
    precision: u8,
    progressive: bool,
    components: Vec<Component>,
}

/// Tables and marks that may change between scans.
#[derive(Default)]
struct Tables {
    quantization: [Option<[u16; 64]>; 4],
    dc: [Option<HuffmanTable>; 4],
    ac: [Option<HuffmanTable>; 4],
    restart_interval: usize,
}

/// Places of coefficients as they come, and 16 more for runs past the end.
pub(super) const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// Decodes the JPEG in `bytes`. `tag` says what three channels mean where the stream does not, which
/// libjpeg takes for luminance and colour differences.
///
/// # Errors
/// Any [`JpegError`]; damage inside the compressed data is none but [`Damage`].
pub(in crate::processor) fn decode(
    bytes: &[u8],
    tag: Option<Colour>,
    max_bytes: u64,
) -> Result<Decoded, JpegError> {
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
            // A start, restarts and a private mark stand alone.
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
                let share = frame.scan(segment, &tables, &mut rest)?;
                damage.share = damage.share.max(share);
            }
            _ => marks.read(marker, segment),
        }
    }
    let mut frame = frame.ok_or_else(|| damaged("it has no frame"))?;
    damage.is_coarse = frame.is_coarse()?;
    let marked = marks.colour(&frame);
    let colour = marked.or(tag).unwrap_or(Colour::YCbCr);
    Ok(Decoded {
        width: frame.width,
        height: frame.height,
        pixels: frame.pixels(colour)?,
        marked: marked.filter(|_| frame.components.len() == 3),
        damage,
    })
}

const START_OF_SCAN: u8 = 0xda;
const END_OF_IMAGE: u8 = 0xd9;

fn damaged(reason: impl ToString) -> JpegError {
    JpegError::Damaged(reason.to_string())
}

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

impl Tables {
    fn huffman(&mut self, mut segment: &[u8]) -> Result<(), JpegError> {
        const CLASSES: usize = 2;
        while let Some((&head, after)) = segment.split_first() {
            let (counts, after) = after
                .split_first_chunk::<16>()
                .ok_or_else(|| damaged("a Huffman table is cut off"))?;
            let count: usize = counts.iter().map(|count| usize::from(*count)).sum();
            let values = after
                .get(..count)
                .ok_or_else(|| damaged("a Huffman table is cut off"))?;
            segment = &after[count..];
            let (class, place) = (usize::from(head >> 4), usize::from(head & 15));
            if class >= CLASSES || place >= self.dc.len() {
                return Err(damaged("a Huffman table has no place"));
            }
            let table = HuffmanTable::new(counts, values)
                .ok_or_else(|| damaged("a Huffman table has too many codes"))?;
            let of_class = if class == 0 {
                &mut self.dc
            } else {
                &mut self.ac
            };
            of_class[place] = Some(table);
        }
        Ok(())
    }

    fn quantization(&mut self, mut segment: &[u8]) -> Result<(), JpegError> {
        let cut = || damaged("a quantization table is cut off");
        while let Some((&head, after)) = segment.split_first() {
            let size = if head >> 4 == 0 { 1 } else { 2 };
            let values = after.get(..64 * size).ok_or_else(cut)?;
            segment = &after[64 * size..];
            let mut table = [0; 64];
            for (place, value) in ZIGZAG.iter().zip(values.chunks_exact(size)) {
                table[usize::from(*place)] = value
                    .iter()
                    .fold(0, |sum: u16, byte| sum << 8 | u16::from(*byte));
            }
            *self
                .quantization
                .get_mut(usize::from(head & 15))
                .ok_or_else(|| damaged("a quantization table has no place"))? = Some(table);
        }
        Ok(())
    }
}

impl Frame {
    fn new(segment: &[u8], progressive: bool, max_bytes: u64) -> Result<Self, JpegError> {
        let Some((&[precision, h1, h0, w1, w0, count], specs)) = segment.split_first_chunk::<6>()
        else {
            return Err(damaged("its frame is cut off"));
        };
        let height = usize::from(u16::from_be_bytes([h1, h0]));
        let width = usize::from(u16::from_be_bytes([w1, w0]));
        let specs = specs.as_chunks::<3>().0;
        if height == 0 {
            return Err(JpegError::Unsupported("a height after the pixels, DNL"));
        }
        match (precision, count) {
            (8, 1 | 3) | (12, 1) => {}
            (8, _) => return Err(JpegError::Unsupported("colours other than grey and three")),
            _ => return Err(JpegError::Unsupported("levels of other than 8 bits")),
        }
        if width == 0 || specs.len() != usize::from(count) {
            return Err(damaged("its frame has no width or wrong components"));
        }
        let factors = |spec: &[u8; 3]| (usize::from(spec[1] >> 4), usize::from(spec[1] & 15));
        let known = |factor| (1..=4).contains(&factor);
        if specs
            .iter()
            .map(factors)
            .any(|(h, v)| !known(h) || !known(v))
        {
            return Err(damaged("its sampling factors are none"));
        }
        let most = |factor: fn((usize, usize)) -> usize| {
            let factors = specs.iter().map(|spec| factor(factors(spec)));
            factors.max().unwrap_or(1)
        };
        let (most_h, most_v) = (most(|(h, _)| h), most(|(_, v)| v));
        let units = (width.div_ceil(8 * most_h), height.div_ceil(8 * most_v));
        // Coefficients of two bytes and a plane of two.
        let bytes = specs
            .iter()
            .map(factors)
            .map(|(h, v)| (units.0 * units.1 * h * v * 64) as u64 * 4);
        if bytes.sum::<u64>() > max_bytes {
            return Err(JpegError::TooMuchMemory);
        }
        let component = |spec: &[u8; 3]| {
            let (horizontal, vertical) = factors(spec);
            let size = (
                (width * horizontal).div_ceil(most_h),
                (height * vertical).div_ceil(most_v),
            );
            Component {
                id: spec[0],
                horizontal,
                vertical,
                table: spec[2].into(),
                quantization: None,
                blocks: (size.0.div_ceil(8), size.1.div_ceil(8)),
                stride: units.0 * horizontal,
                coefficients: vec![0; units.0 * units.1 * horizontal * vertical * 64],
                missing_bits: [NOTHING_YET; 64],
            }
        };
        Ok(Self {
            width,
            height,
            precision,
            progressive,
            components: specs.iter().map(component).collect(),
        })
    }

    /// Largest sampling factors.
    fn most(&self) -> (usize, usize) {
        let most = |factor: fn(&Component) -> usize| self.components.iter().map(factor).max();
        let horizontal = most(|c| c.horizontal).unwrap_or(1);
        (horizontal, most(|c| c.vertical).unwrap_or(1))
    }

    /// Decodes a scan and steps over its data; gives the share of its blocks that are damaged.
    fn scan(
        &mut self,
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
            let index = self.components.iter().position(|c| c.id == *id);
            let index = index.ok_or_else(|| damaged("a scan is of no component"))?;
            if own.iter().any(|c: &ScanComponent<'_>| c.index == index) {
                return Err(damaged("a scan has a component twice"));
            }
            let dc = tables.dc.get(usize::from(places >> 4));
            let ac = tables.ac.get(usize::from(places & 15));
            let component = &mut self.components[index];
            if component.quantization.is_none() {
                let table = tables.quantization.get(component.table);
                component.quantization = table.copied().flatten();
            }
            let step = component.quantization.map_or(1, |table| table[0]);
            own.push(ScanComponent {
                index,
                dc: dc.and_then(Option::as_ref),
                ac: ac.and_then(Option::as_ref),
                highest_mean: self.highest_mean(step),
            });
        }
        let (high, low) = (bits >> 4, bits & 15);
        let scan = if self.progressive {
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
            let bits = if self.progressive { low } else { 0 };
            let (from, to) = scan.range();
            self.components[component.index].missing_bits[from..=to].fill(bits);
        }
        let length = entropy::data_length(rest);
        let (data, after) = rest.split_at(length);
        *rest = after;
        Ok(scan.decode(self, data, tables.restart_interval))
    }

    /// The highest coefficient of a mean level that pixels can give, in steps of the quantization.
    ///
    /// It is eight times the level's distance from the middle; an eighth more is let pass.
    fn highest_mean(&self, step: u16) -> i32 {
        let highest = 9 << (self.precision - 1);
        highest / i32::from(step.max(1)) + 1
    }

    /// Whether parts of coefficients never came.
    ///
    /// # Errors
    /// A picture of which nothing came.
    fn is_coarse(&self) -> Result<bool, JpegError> {
        let missing = |c: &Component| c.missing_bits[0] == NOTHING_YET;
        if self.components.iter().any(missing) {
            return Err(damaged("a component has no data"));
        }
        Ok(self.progressive
            && self
                .components
                .iter()
                .any(|c| c.missing_bits.iter().any(|bits| *bits > 0)))
    }

    fn pixels(&mut self, colour: Colour) -> Result<Pixels, JpegError> {
        let most = self.most();
        let (width, height, precision) = (self.width, self.height, self.precision);
        let mut planes = Vec::with_capacity(self.components.len());
        for component in &mut self.components {
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
            return Ok(Pixels::Gray(std::mem::take(&mut plane.levels)));
        }
        sample::rgb(&planes, width, height, colour)
            .map(Pixels::Rgb)
            .ok_or(JpegError::Unsupported(
                "sampling factors that do not divide",
            ))
    }
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

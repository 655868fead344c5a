//! A frame of a JPEG: its size, its components, and their coefficients as far as they were read.

use super::error::{JpegError, damaged};

/// The place in a block of each coefficient of the stream.
pub(super) const ZIGZAG: [u8; 64] = [
    0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20,
    13, 6, 7, 14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59,
    52, 45, 38, 31, 39, 46, 53, 60, 61, 54, 47, 55, 62, 63,
];

/// One channel.
pub(super) struct Component {
    pub(super) id: u8,
    pub(super) horizontal: usize,
    pub(super) vertical: usize,
    pub(super) table: usize,
    /// The table as it is at the component's first scan; later ones are of other components.
    pub(super) quantization: Option<[u16; 64]>,
    /// Blocks that hold pixels.
    pub(super) blocks: (usize, usize),
    /// Blocks of a row in `coefficients`, whole units.
    pub(super) stride: usize,
    pub(super) coefficients: Vec<i16>,
    /// Bits of each coefficient that no scan has given yet; all at first.
    pub(super) missing_bits: [u8; 64],
}

/// `missing_bits` of a coefficient that no scan has given.
const NOTHING_YET: u8 = u8::MAX;

pub(super) struct Frame {
    pub(super) width: usize,
    pub(super) height: usize,
    pub(super) precision: u8,
    pub(super) progressive: bool,
    pub(super) components: Vec<Component>,
}

impl Frame {
    /// Reads a frame header.
    ///
    /// # Errors
    /// Any [`JpegError`] but a truncated stream.
    pub(super) fn new(
        segment: &[u8],
        progressive: bool,
        max_bytes: u64,
    ) -> Result<Self, JpegError> {
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
    pub(super) fn most(&self) -> (usize, usize) {
        let most = |factor: fn(&Component) -> usize| self.components.iter().map(factor).max();
        let horizontal = most(|c| c.horizontal).unwrap_or(1);
        (horizontal, most(|c| c.vertical).unwrap_or(1))
    }

    /// The highest DC coefficient that pixels can give, in steps of the quantization.
    ///
    /// It is eight times the level's distance from the middle; an eighth more is let pass.
    pub(super) fn highest_dc(&self, step: u16) -> i32 {
        let highest = 9 << (self.precision - 1);
        highest / i32::from(step.max(1)) + 1
    }

    /// Whether no scan gave some bits of a coefficient.
    ///
    /// # Errors
    /// A component without data.
    pub(super) fn is_coarse(&self) -> Result<bool, JpegError> {
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
}

//! How the pixels of a page are stored, read from its directory and checked before any is decoded.

use super::super::refusal::{Refusal, checked_size};
use super::directory::{Directory, Tiff, tag};
use crate::processor::decode_limits::DecodeLimits;

/// How strips and tiles are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Compression {
    None,
    Lzw,
    Deflate,
    PackBits,
    /// CCITT's one-dimensional codes without end marks, rows padded to this many bits.
    Huffman(usize),
    /// CCITT Group 3; rows may refer to the one above.
    Group3 {
        two_dimensional: bool,
    },
    Group4,
    Jpeg,
    OldJpeg,
}

impl Compression {
    fn new(tiff: &Tiff<'_>, directory: &Directory) -> Result<Self, Refusal> {
        Ok(match tiff.value(directory, tag::COMPRESSION).unwrap_or(1) {
            1 => Self::None,
            2 => Self::Huffman(8),
            32771 => Self::Huffman(16),
            3 => Self::Group3 {
                two_dimensional: tiff.value(directory, tag::T4_OPTIONS).unwrap_or(0) & 1 != 0,
            },
            4 => Self::Group4,
            5 => Self::Lzw,
            6 => Self::OldJpeg,
            7 => Self::Jpeg,
            8 | 32946 => Self::Deflate,
            32773 => Self::PackBits,
            other => {
                let name = match other {
                    32809 => "ThunderScan",
                    34676 | 34677 => "SGI Log",
                    34712 => "JPEG 2000",
                    34887 => "LERC",
                    34892 => "lossy JPEG of DNG",
                    34925 => "LZMA",
                    50000 => "Zstandard",
                    50001 => "WebP",
                    50002 | 52546 => "JPEG XL",
                    _ => "unknown",
                };
                return Err(Refusal::Unsupported(format!("compression {other}, {name}")));
            }
        })
    }

    pub(super) fn is_fax(self) -> bool {
        matches!(self, Self::Huffman(_) | Self::Group3 { .. } | Self::Group4)
    }

    pub(super) fn is_jpeg(self) -> bool {
        matches!(self, Self::Jpeg | Self::OldJpeg)
    }
}

/// What a sample is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum SampleFormat {
    Unsigned,
    Signed,
    Fraction,
}

/// What the samples of a pixel mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Photometric {
    WhiteIsZero,
    BlackIsZero,
    Rgb,
    Palette,
    Cmyk,
    /// Luminance and two colour differences, shared by this many pixels across and down.
    YCbCr {
        across: usize,
        down: usize,
    },
    CieLab,
}

impl Photometric {
    fn new(tiff: &Tiff<'_>, directory: &Directory, is_jpeg: bool) -> Result<Self, Refusal> {
        let found = tiff.value(directory, tag::PHOTOMETRIC_INTERPRETATION);
        Ok(match found {
            Some(0) => Self::WhiteIsZero,
            Some(1) => Self::BlackIsZero,
            Some(2) => Self::Rgb,
            Some(3) => Self::Palette,
            Some(5) => Self::Cmyk,
            // The stream of a JPEG has factors of its own.
            Some(6) if is_jpeg => Self::YCbCr { across: 1, down: 1 },
            Some(6) => {
                let factors = tiff.values(directory, tag::YCBCR_SUB_SAMPLING);
                let (across, down) = match factors.as_deref() {
                    None => (2, 2),
                    Some([across @ (1 | 2 | 4), down @ (1 | 2 | 4), ..]) => (*across, *down),
                    Some(_) => return Err(Refusal::damaged("its YCbCrSubSampling is none")),
                };
                Self::YCbCr {
                    across: across as usize,
                    down: down as usize,
                }
            }
            Some(8) => Self::CieLab,
            None => return Err(Refusal::damaged("it has no PhotometricInterpretation")),
            Some(other) => {
                let name = match other {
                    4 => "mask",
                    9 => "ICCLab",
                    10 => "ITULab",
                    32803 => "colour filter array",
                    32844 | 32845 => "SGI Log",
                    34892 => "linear raw",
                    _ => "unknown",
                };
                return Err(Refusal::Unsupported(format!(
                    "PhotometricInterpretation {other}, {name}"
                )));
            }
        })
    }

    /// Samples of a pixel that are no extra ones.
    fn colours(self) -> usize {
        match self {
            Self::WhiteIsZero | Self::BlackIsZero | Self::Palette => 1,
            Self::Rgb | Self::YCbCr { .. } | Self::CieLab => 3,
            Self::Cmyk => 4,
        }
    }
}

/// What the first extra sample of a pixel is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Alpha {
    /// There is none, or it is something else.
    None,
    /// Colours were multiplied by it.
    Associated,
    Unassociated,
}

/// How the pixels of a page are stored.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    pub(super) width: usize,
    pub(super) height: usize,
    /// Samples of a pixel, extra ones included.
    pub(super) samples: usize,
    pub(super) bits: u32,
    pub(super) format: SampleFormat,
    pub(super) photometric: Photometric,
    pub(super) alpha: Alpha,
    pub(super) compression: Compression,
    /// 1: none, 2: difference to the pixel on the left, 3: the same of the bytes of fractions.
    pub(super) predictor: u64,
    /// Whether each sample has strips or tiles of its own.
    pub(super) planar: bool,
    /// Width and height of a strip or tile, in pixels.
    pub(super) chunk: (usize, usize),
    pub(super) is_tiled: bool,
    /// Whether the lowest bit of a byte is the first.
    pub(super) reversed_bits: bool,
}

impl Layout {
    /// Reads the directory and checks it.
    ///
    /// # Errors
    /// A page of a kind that is not read, or one of the limits.
    pub(super) fn new(
        tiff: &Tiff<'_>,
        directory: &Directory,
        limits: &DecodeLimits,
    ) -> Result<Self, Refusal> {
        /// Far more than any picture that people look at has.
        const MOST_SAMPLES: u64 = 16;
        let value = |tag| tiff.value(directory, tag);
        let side = |tag| value(tag).ok_or_else(|| Refusal::damaged("it does not say its size"));
        let (width, height) = (side(tag::IMAGE_WIDTH)?, side(tag::IMAGE_LENGTH)?);
        let samples = value(tag::SAMPLES_PER_PIXEL).unwrap_or(1);
        if !(1..=MOST_SAMPLES).contains(&samples) {
            return Err(Refusal::Unsupported(format!("{samples} samples a pixel")));
        }
        let compression = Compression::new(tiff, directory)?;
        let photometric = Photometric::new(tiff, directory, compression.is_jpeg())?;
        let samples = samples as usize;
        if samples < photometric.colours() {
            return Err(Refusal::Damaged(format!(
                "it has {samples} samples a pixel, expected {}",
                photometric.colours()
            )));
        }
        let all_bits = tiff.values(directory, tag::BITS_PER_SAMPLE);
        let all_bits = all_bits.unwrap_or_else(|| vec![1]);
        let bits = all_bits.first().copied().unwrap_or(1);
        if all_bits.iter().any(|one| *one != bits) {
            return Err(Refusal::Unsupported(format!(
                "samples of {all_bits:?} bits"
            )));
        }
        let format = match tiff.value(directory, tag::SAMPLE_FORMAT).unwrap_or(1) {
            // Undefined is taken for whole numbers, as by libtiff.
            1 | 4 => SampleFormat::Unsigned,
            2 => SampleFormat::Signed,
            3 => SampleFormat::Fraction,
            _ => return Err(Refusal::unsupported("complex numbers")),
        };
        let known = match format {
            SampleFormat::Fraction => matches!(bits, 16 | 32 | 64),
            _ => matches!(bits, 1..=16 | 32 | 64),
        };
        if !known || (compression.is_fax() && (bits, samples) != (1, 1)) {
            return Err(Refusal::Unsupported(format!("samples of {bits} bits")));
        }
        if compression.is_jpeg() && bits != 8 && bits != 12 {
            return Err(Refusal::Unsupported(format!("JPEG of {bits} bits")));
        }
        let mut layout = Self {
            width: 0,
            height: 0,
            samples,
            bits: bits as u32,
            format,
            photometric,
            alpha: alpha(tiff, directory, photometric, samples),
            compression,
            predictor: value(tag::PREDICTOR).unwrap_or(1),
            planar: value(tag::PLANAR_CONFIGURATION) == Some(2) && samples > 1,
            chunk: (0, 0),
            is_tiled: value(tag::TILE_WIDTH).is_some(),
            reversed_bits: value(tag::FILL_ORDER) == Some(2),
        };
        layout.check_combinations()?;
        (layout.width, layout.height) =
            checked_size(width, height, layout.bytes_a_pixel(), limits)?;
        let (across, down) = if layout.is_tiled {
            let side = |tag| value(tag).unwrap_or(0);
            (side(tag::TILE_WIDTH), side(tag::TILE_LENGTH))
        } else {
            let rows = value(tag::ROWS_PER_STRIP).unwrap_or(height);
            (width, rows.min(height))
        };
        layout.chunk = match checked_size(across, down, layout.bytes_a_pixel(), limits) {
            Err(Refusal::TooManyPixels(..)) => Err(Refusal::TooMuchMemory),
            Err(Refusal::Damaged(_)) => Err(Refusal::damaged("its strips or tiles have no size")),
            checked => checked,
        }?;
        Ok(layout)
    }

    /// Refuses what no writer makes together, or what is not read.
    fn check_combinations(&self) -> Result<(), Refusal> {
        let known = match self.predictor {
            1 => true,
            2 => matches!(self.bits, 8 | 16 | 32 | 64),
            3 => self.format == SampleFormat::Fraction,
            _ => false,
        };
        let predicts = matches!(
            self.compression,
            Compression::None | Compression::Lzw | Compression::Deflate | Compression::PackBits
        );
        if !known && predicts {
            let Self {
                predictor, bits, ..
            } = self;
            return Err(Refusal::Unsupported(format!(
                "predictor {predictor} of {bits} bits"
            )));
        }
        let whole = self.format == SampleFormat::Unsigned;
        let eight = whole && self.bits == 8;
        let fits = match self.photometric {
            Photometric::WhiteIsZero | Photometric::BlackIsZero => true,
            Photometric::Rgb => whole && self.bits <= 16,
            Photometric::Palette => whole && self.bits <= 8,
            Photometric::Cmyk => whole && matches!(self.bits, 8 | 16),
            Photometric::YCbCr { .. } => eight && !(self.planar && self.subsampling() != (1, 1)),
            Photometric::CieLab => eight,
        };
        if !fits {
            return Err(Refusal::Unsupported(format!(
                "{:?} of {} bits, {:?}",
                self.photometric, self.bits, self.format
            )));
        }
        Ok(())
    }

    /// Pixels across and down that share their colour differences.
    pub(super) fn subsampling(&self) -> (usize, usize) {
        match self.photometric {
            Photometric::YCbCr { across, down } => (across, down),
            _ => (1, 1),
        }
    }

    pub(super) fn white_is_zero(&self) -> bool {
        self.photometric == Photometric::WhiteIsZero
    }

    /// Whether samples are numbers without a range of their own.
    pub(super) fn is_measured(&self) -> bool {
        self.format != SampleFormat::Unsigned || self.bits > 16
    }

    /// Samples of a pixel in one strip or tile.
    pub(super) fn samples_together(&self) -> usize {
        if self.planar { 1 } else { self.samples }
    }

    /// Bytes of a pixel while it is decoded: samples as numbers, a chunk of them as stored, the picture.
    fn bytes_a_pixel(&self) -> u64 {
        let samples = self.samples as u64;
        let working = match self.compression.is_jpeg() {
            // Coefficients and planes of two bytes.
            true => 4,
            false => u64::from(self.bits.div_ceil(8)),
        };
        if self.is_measured() {
            // Only the first is kept, and sorted in a copy.
            17 + working * samples
        } else {
            samples * (2 + working) + 3
        }
    }

    /// Bytes that decoding the page holds, about.
    pub(super) fn bytes_needed(&self) -> u64 {
        self.bytes_a_pixel() * (self.width * self.height) as u64
    }
}

/// Source: `OPEN_INFO`, Pillow, `TiffImagePlugin.py`: RGB with a fourth sample of no stated kind has an
/// alpha channel.
fn alpha(
    tiff: &Tiff<'_>,
    directory: &Directory,
    photometric: Photometric,
    samples: usize,
) -> Alpha {
    if samples == photometric.colours() {
        return Alpha::None;
    }
    match tiff.value(directory, tag::EXTRA_SAMPLES) {
        Some(1) => Alpha::Associated,
        Some(2) => Alpha::Unassociated,
        None | Some(999) if photometric == Photometric::Rgb && samples == 4 => Alpha::Unassociated,
        _ => Alpha::None,
    }
}

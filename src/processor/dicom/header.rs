//! What the attributes say about the pixels, checked before any is decoded.

use dicom_dictionary_std::tags;

use super::error::DicomError;
use super::reader::{DataSet, PixelData};
use super::syntax::Codec;
use crate::processor::decode_limits::DecodeLimits;
use crate::processor::jpeg_2000::WORKING_BYTES;

/// What the numbers of a pixel mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Photometric {
    /// Grey; the lowest value is white.
    Monochrome1,
    /// Grey; the lowest value is black.
    Monochrome2,
    /// Red, green, blue; also where a codec undoes its own colour transform.
    Rgb,
    /// Luminance and two colour differences, all at full range.
    YbrFull,
    /// Places in a table of colours.
    Palette,
}

impl Photometric {
    /// Whether a pixel has one number.
    pub(super) fn is_one_sample(self) -> bool {
        matches!(self, Self::Monochrome1 | Self::Monochrome2 | Self::Palette)
    }
}

/// Size and storage of the pixels.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) frames: usize,
    /// Numbers of a pixel: 1 or 3.
    pub(super) samples: usize,
    pub(super) photometric: Photometric,
    /// Whether the file says what its numbers mean.
    pub(super) photometric_is_stated: bool,
    /// Bits a number takes: 1, 8, 16 or 32.
    pub(super) allocated: u32,
    /// Bits of these that count.
    pub(super) stored: u32,
    /// Place of the highest of these.
    pub(super) high: u32,
    pub(super) signed: bool,
    /// Whether a colour picture is stored plane by plane.
    pub(super) planar: bool,
    /// Whether two pixels of a row share their colour differences.
    pub(super) subsampled: bool,
}

impl Header {
    /// Width and height, checked against `limits`.
    ///
    /// # Errors
    /// A missing or zero side, or one of the limits.
    pub(super) fn size(set: &DataSet<'_>, limits: &DecodeLimits) -> Result<(u16, u16), DicomError> {
        if set.has(tags::FLOAT_PIXEL_DATA) || set.has(tags::DOUBLE_FLOAT_PIXEL_DATA) {
            return Err(DicomError::Value {
                attribute: "Pixel Data",
                found: "of fractions".to_owned(),
                expected: "whole numbers",
            });
        }
        if matches!(set.pixels, PixelData::None) {
            return Err(DicomError::NoPixels);
        }
        let columns = required(set, tags::COLUMNS, "Columns (0028,0011)")?;
        let rows = required(set, tags::ROWS, "Rows (0028,0010)")?;
        if columns == 0 || rows == 0 {
            return Err(DicomError::Damaged(format!(
                "its size is {columns} × {rows}"
            )));
        }
        let pixels = u64::from(columns) * u64::from(rows);
        if pixels > limits.max_decoded_pixels {
            return Err(DicomError::TooManyPixels {
                columns: columns.into(),
                rows: rows.into(),
            });
        }
        Ok((columns, rows))
    }

    /// Reads and checks everything about the pixels.
    ///
    /// # Errors
    /// An attribute that is missing or of no use, or one of the limits.
    pub(super) fn new(
        set: &DataSet<'_>,
        codec: Codec,
        limits: &DecodeLimits,
    ) -> Result<Self, DicomError> {
        let (columns, rows) = Self::size(set, limits)?;
        let samples = set.word(tags::SAMPLES_PER_PIXEL).unwrap_or(1);
        let (photometric, subsampled) = photometric(set, samples)?;
        let allocated = required(set, tags::BITS_ALLOCATED, "Bits Allocated (0028,0100)")?;
        let high = set.word(tags::HIGH_BIT);
        let stored = set.word(tags::BITS_STORED);
        let stored = stored.or(high.map(|high| high.saturating_add(1)));
        let stored = stored.unwrap_or(allocated);
        let high = high.unwrap_or(stored.saturating_sub(1));
        let value = |attribute, found: u16, expected| {
            Err(DicomError::Value {
                attribute,
                found: found.to_string(),
                expected,
            })
        };
        let one_sample = photometric.is_one_sample();
        match (allocated, photometric) {
            (8 | 16, _) => {}
            (_, Photometric::Palette) => {
                return value("Bits Allocated (0028,0100)", allocated, "8 or 16");
            }
            (1, _) if one_sample => {}
            (32, _) => {}
            _ if one_sample => {
                return value("Bits Allocated (0028,0100)", allocated, "1, 8, 16 or 32");
            }
            _ => return value("Bits Allocated (0028,0100)", allocated, "8, 16 or 32"),
        }
        if !(1..=allocated).contains(&stored) {
            return value("Bits Stored (0028,0101)", stored, "1 to Bits Allocated");
        }
        if !(stored - 1..allocated).contains(&high) {
            return value("High Bit (0028,0102)", high, "Bits Stored - 1");
        }
        let representation = set.word(tags::PIXEL_REPRESENTATION).unwrap_or(0);
        if representation > 1 {
            return value("Pixel Representation (0028,0103)", representation, "0 or 1");
        }
        let header = Self {
            rows: rows.into(),
            columns: columns.into(),
            frames: frames(set)?,
            samples: samples.into(),
            photometric,
            photometric_is_stated: set.has(tags::PHOTOMETRIC_INTERPRETATION),
            allocated: allocated.into(),
            stored: stored.into(),
            high: high.into(),
            signed: representation == 1,
            planar: set.word(tags::PLANAR_CONFIGURATION) == Some(1),
            subsampled,
        };
        if header.bytes_needed(codec) > limits.max_decoded_bytes {
            return Err(DicomError::TooMuchMemory);
        }
        Ok(header)
    }

    /// Pixels of a frame.
    pub(super) fn pixels(&self) -> usize {
        self.rows * self.columns
    }

    /// The bits of a stored number.
    pub(super) fn mask(&self) -> u32 {
        u32::MAX >> (u32::BITS - self.stored)
    }

    /// The most bytes that decoding a frame holds at once, about.
    fn bytes_needed(&self, codec: Codec) -> u64 {
        /// A number of more than 16 bits, sorted, measured and counted.
        const WIDE: u64 = 36;
        let samples = self.samples as u64;
        let working = match codec {
            Codec::Native | Codec::Rle => 0,
            Codec::Jpeg | Codec::JpegLs => 4 * samples,
            Codec::Jpeg2000 => WORKING_BYTES * samples,
            Codec::Deflate => samples * u64::from(self.allocated.div_ceil(8)),
        };
        let wide = if self.allocated > 16 { WIDE } else { 0 };
        // Two bytes a number as decoded, and three of 8-bit colour.
        self.pixels() as u64 * (2 * samples + working + wide + 3)
    }
}

fn required(
    set: &DataSet<'_>,
    tag: dicom_core::Tag,
    attribute: &'static str,
) -> Result<u16, DicomError> {
    set.word(tag).ok_or(DicomError::Missing { attribute })
}

/// How many frames the file says it has; 1 if it says nothing.
pub(super) fn frames(set: &DataSet<'_>) -> Result<usize, DicomError> {
    match set.texts(tags::NUMBER_OF_FRAMES).first() {
        None | Some(&"") => Ok(1),
        Some(text) => match text.parse() {
            Ok(frames) if frames > 0 => Ok(frames),
            _ => Err(DicomError::damaged("its number of frames is none")),
        },
    }
}

/// What the numbers mean, and whether two pixels of a row share their colour differences.
fn photometric(set: &DataSet<'_>, samples: u16) -> Result<(Photometric, bool), DicomError> {
    const ATTRIBUTE: &str = "Photometric Interpretation (0028,0004)";
    let found = set.texts(tags::PHOTOMETRIC_INTERPRETATION);
    // Some writers use lower case.
    let found = found.first().map(|text| text.to_ascii_uppercase());
    match (found.as_deref(), samples) {
        (Some("MONOCHROME1"), 1) => Ok((Photometric::Monochrome1, false)),
        (Some("MONOCHROME2"), 1) => Ok((Photometric::Monochrome2, false)),
        (Some("RGB" | "YBR_RCT" | "YBR_ICT"), 3) => Ok((Photometric::Rgb, false)),
        (Some("YBR_FULL"), 3) => Ok((Photometric::YbrFull, false)),
        (Some("YBR_FULL_422"), 3) => Ok((Photometric::YbrFull, true)),
        (Some("PALETTE COLOR"), 1) => Ok((Photometric::Palette, false)),
        // The caller remarks on it.
        (None, 1) => Ok((Photometric::Monochrome2, false)),
        (None, 3) => Ok((Photometric::Rgb, false)),
        (Some(_), 0 | 2 | 4..) => Err(DicomError::Value {
            attribute: "Samples per Pixel (0028,0002)",
            found: samples.to_string(),
            expected: "1 or 3",
        }),
        (Some(found), _) => Err(DicomError::Value {
            attribute: ATTRIBUTE,
            found: match found {
                "PALETTE COLOR" | "ARGB" | "HSV" | "CMYK" | "YBR_PARTIAL_420"
                | "YBR_PARTIAL_422" | "YBR_FULL_422" | "YBR_FULL" | "RGB" | "MONOCHROME1"
                | "MONOCHROME2" | "YBR_RCT" | "YBR_ICT" => {
                    format!("{found} with {samples} sample(s) a pixel")
                }
                // Only known words are repeated.
                _ => "of an unknown kind".to_owned(),
            },
            expected: "MONOCHROME1, MONOCHROME2 or PALETTE COLOR (1 sample), or RGB or YBR_FULL (3 samples)",
        }),
        (None, _) => Err(DicomError::Missing {
            attribute: ATTRIBUTE,
        }),
    }
}

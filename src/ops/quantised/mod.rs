//! Quantised weights of 8 or 4 bits: formats, quantisation, and the matmuls with them in plain Burn.
//!
//! A matrix `[out, in]` is stored quantised everywhere, in files, in host memory and on the device; the
//! matmuls read it so. Values are whole numbers times a scale:
//!
//! - int8: one f32 scale a row (output channel), values -127 to 127;
//! - int4: one f16 scale for 32, 64 or 128 neighbours of a row, values -8 to 7;
//! - int4 with zero points: values 0 to 15 less a zero point that is 0 to 15 itself, an f16 beside each
//!   scale. It holds what AWQ and GPTQ publish without a change; plain int4 is as exact where this
//!   program chooses the numbers, smaller, and faster.
//!
//! A 32-bit word holds neighbours of a row, the first in its lowest bits, each plus 128 or 8, or as it is
//! with zero points. This is the order of `pack-quantized` in compressed-tensors. Rows are padded to whole groups, so that
//! reads of 16 bytes never leave a row; padding is zero and no part of the matrix.
//!
//! Linear layers of both towers take the chosen format. The table of token vectors and the head are
//! int8 in either case: together they are a sixth of the 8B's parameters, and in 16 bits would not
//! leave room for the rest on a card of 8 GB. Norms, biases, patch embedding and position table stay.

pub mod cache;
mod fragments;
pub(crate) mod matmul;
pub mod pack;
pub(super) mod training;
pub mod weight;

use std::{fmt, str::FromStr};

pub use weight::QuantisedWeight;

/// Groups that int4 can have, in inputs of a row.
pub const GROUPS: [usize; 3] = [32, 64, 128];

/// Format of one quantised matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 8 bits, a scale a row.
    Int8,
    /// 4 bits, a scale for each `group` neighbours of a row, symmetric about zero.
    Int4 {
        /// One of [`GROUPS`].
        group: usize,
    },
    /// 4 bits, a scale and a zero point for each `group` neighbours of a row.
    Int4Zeros {
        /// One of [`GROUPS`].
        group: usize,
    },
}

impl Format {
    /// Bits of a value.
    pub fn bits(self) -> usize {
        match self {
            Self::Int8 => 8,
            Self::Int4 { .. } | Self::Int4Zeros { .. } => 4,
        }
    }

    /// Whether the values are symmetric about zero, with no zero points stored. Kernels that read the words cover
    /// these forms only.
    pub fn is_symmetric(self) -> bool {
        !matches!(self, Self::Int4Zeros { .. })
    }

    /// Whether a group's size is one that is supported; formats without groups are.
    pub fn is_supported(self) -> bool {
        match self {
            Self::Int8 => true,
            Self::Int4 { group } | Self::Int4Zeros { group } => GROUPS.contains(&group),
        }
    }

    /// Values in a 32-bit word.
    pub fn per_word(self) -> usize {
        32 / self.bits()
    }

    /// What is added to a value of a symmetric form so that it is stored without a sign.
    pub fn offset(self) -> i32 {
        1 << (self.bits() - 1)
    }

    /// Inputs of a row in stored form: `d_input` and the padding.
    pub fn padded(self, d_input: usize) -> usize {
        match self {
            Self::Int8 => d_input.next_multiple_of(16),
            Self::Int4 { group } | Self::Int4Zeros { group } => d_input.next_multiple_of(group),
        }
    }

    /// Words of a row.
    pub fn words(self, d_input: usize) -> usize {
        self.padded(d_input) / self.per_word()
    }

    /// Inputs that share a scale, padding included.
    pub fn group(self, d_input: usize) -> usize {
        match self {
            Self::Int8 => self.padded(d_input),
            Self::Int4 { group } | Self::Int4Zeros { group } => group,
        }
    }

    /// Scales of a row; as many zero points, where there are some.
    pub fn scales(self, d_input: usize) -> usize {
        self.padded(d_input) / self.group(d_input)
    }

    /// Type the scales are stored in: a row's single scale can afford f32.
    pub fn scale_dtype(self) -> burn::tensor::DType {
        match self {
            Self::Int8 => burn::tensor::DType::F32,
            Self::Int4 { .. } | Self::Int4Zeros { .. } => burn::tensor::DType::F16,
        }
    }

    /// Bytes of a matrix `[rows, d_input]` in stored form.
    pub fn bytes(self, rows: usize, d_input: usize) -> usize {
        let of_group = match self.is_symmetric() {
            true => self.scale_dtype().size(),
            false => 2 * self.scale_dtype().size(),
        };
        rows * (self.words(d_input) * 4 + self.scales(d_input) * of_group)
    }

    /// As it is typed: `int8`, `int4:64`, `int4:64:zero`.
    pub fn spelling(self) -> String {
        match self {
            Self::Int8 => "int8".to_string(),
            Self::Int4 { group } => format!("int4:{group}"),
            Self::Int4Zeros { group } => format!("int4:{group}:zero"),
        }
    }
}

/// `int8`, `int4` (groups of 64), `int4:32`, `int4:64`, `int4:128`, with zero points `int4:64:zero`.
impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            format!(
                "`{text}` is not a format; expected int8, int4 or int4:32, int4:64, int4:128, with zero points int4:64:zero"
            )
        };
        let mut pieces = text.split(':');
        let bits = match pieces.next() {
            Some("int8") => 8,
            Some("int4") => 4,
            _ => return Err(expected()),
        };
        let group = match pieces.next() {
            Some(group) => Some(group.parse().map_err(|_| expected())?),
            None => None,
        };
        let zeros = match pieces.next() {
            Some("zero") => true,
            Some(_) => return Err(expected()),
            None => false,
        };
        match pieces.next() {
            None => Self::new(bits, group, zeros),
            Some(_) => Err(expected()),
        }
    }
}

impl Format {
    /// Chooses the format by number of bits; `group` is for 4 bits, 64 when absent, and so are zero points.
    ///
    /// # Errors
    /// What cannot be meant, as a sentence.
    pub fn new(bits: usize, group: Option<usize>, zeros: bool) -> Result<Self, String> {
        let format = match (bits, group, zeros) {
            (8, None, false) => Self::Int8,
            (8, Some(group), _) => {
                return Err(format!(
                    "8 bits have one scale a row and no groups; leave out the group of {group}"
                ));
            }
            (8, None, true) => {
                return Err("8 bits are symmetric; zero points are for 4 bits".to_string());
            }
            (4, group, false) => Self::Int4 {
                group: group.unwrap_or(64),
            },
            (4, group, true) => Self::Int4Zeros {
                group: group.unwrap_or(64),
            },
            (bits, ..) => return Err(format!("{bits} bits are not supported; expected 8 or 4")),
        };
        match format.is_supported() {
            true => Ok(format),
            false => Err(format!(
                "groups of {} are not supported; expected 32, 64 or 128",
                group.unwrap_or(0)
            )),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int8 => f.write_str("int8"),
            Self::Int4 { group } => write!(f, "int4, groups of {group}"),
            Self::Int4Zeros { group } => write!(f, "int4, groups of {group} with zero points"),
        }
    }
}

/// How a model is quantised: the format of its linear layers. Table and head are [`Format::Int8`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quantization {
    /// Of the linear layers.
    pub layers: Format,
}

impl Quantization {
    /// Chooses the format by number of bits; `group` is for 4 bits, 64 when absent.
    ///
    /// # Errors
    /// What cannot be meant, as a sentence.
    pub fn new(bits: usize, group: Option<usize>) -> Result<Self, String> {
        Format::new(bits, group, false).map(|layers| Self { layers })
    }
}

/// As [`Format`].
impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse().map(|layers| Self { layers })
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.layers.fmt(f)
    }
}

/// How the weights of a checkpoint are quantised while they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Packing {
    /// All matrices in the formats of a quantised model.
    To(Quantization),
    /// The matrices that another tool quantised stay as they are where a format holds them exactly, and
    /// nothing else is quantised.
    Keep,
}

impl From<Quantization> for Packing {
    fn from(quantization: Quantization) -> Self {
        Self::To(quantization)
    }
}

/// As [`Format`], or `keep`.
impl FromStr for Packing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "keep" => Ok(Self::Keep),
            text => match text.parse() {
                Ok(quantization) => Ok(Self::To(quantization)),
                Err(reason) => Err(format!("{reason}, or keep")),
            },
        }
    }
}

impl fmt::Display for Packing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::To(quantization) => quantization.fmt(f),
            Self::Keep => f.write_str("kept as another tool quantised them"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_read_from_what_is_typed() {
        let read = |text: &str| text.parse::<Quantization>().map(|q| q.layers);
        assert_eq!(read("int8"), Ok(Format::Int8));
        assert_eq!(read("int4"), Ok(Format::Int4 { group: 64 }));
        assert_eq!(read("int4:32"), Ok(Format::Int4 { group: 32 }));
        assert_eq!(read("int4:128"), Ok(Format::Int4 { group: 128 }));
        assert_eq!(read("int4:64:zero"), Ok(Format::Int4Zeros { group: 64 }));
        for bad in [
            "int5",
            "int8:64",
            "int4:48",
            "int4:x",
            "",
            "int8:zero",
            "int4:zero",
            "int4:64:one",
            "int4:64:zero:",
        ] {
            assert!(read(bad).is_err(), "{bad}");
        }
        for group in GROUPS {
            for format in [Format::Int4 { group }, Format::Int4Zeros { group }] {
                assert_eq!(read(&format.spelling()), Ok(format));
            }
        }
        assert_eq!("keep".parse(), Ok(Packing::Keep));
    }

    #[test]
    fn sizes_of_a_row_are_whole_groups() {
        // 4,304 is the vision tower's inner width: 134.5 groups of 32.
        let int4 = Format::Int4 { group: 64 };
        assert_eq!(
            (int4.padded(4304), int4.words(4304), int4.scales(4304)),
            (4352, 544, 68)
        );
        assert_eq!(
            (Format::Int8.padded(4304), Format::Int8.words(4304)),
            (4304, 1076)
        );
        assert_eq!((Format::Int8.padded(20), Format::Int8.scales(20)), (32, 1));
        assert_eq!(Format::Int4 { group: 32 }.bytes(3, 40), 3 * (32 + 2 * 2));
        assert_eq!(Format::Int8.bytes(2, 16), 2 * (16 + 4));
        let zeros = Format::Int4Zeros { group: 32 };
        assert_eq!(zeros.bytes(3, 40), 3 * (32 + 2 * 2 * 2));
    }
}

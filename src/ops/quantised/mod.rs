//! Quantised weights of 8 or 4 bits: formats, quantisation, and the matmuls with them in plain Burn.
//!
//! A matrix `[out, in]` is stored quantised everywhere, in files, in host memory and on the device; the
//! matmuls read it so. Values are whole numbers times a scale, symmetric about zero:
//!
//! - int8: one f32 scale a row (output channel), values -127 to 127;
//! - int4: one f16 scale for 32 or 64 neighbours of a row, values -8 to 7.
//!
//! A 32-bit word holds neighbours of a row, the first in its lowest bits, each plus 128 or 8. This is
//! the order of `pack-quantized` in compressed-tensors. Rows are padded to whole groups, so that
//! reads of 16 bytes never leave a row; padding is zero and no part of the matrix.
//!
//! Linear layers of both towers take the chosen format. The table of token vectors and the head are
//! int8 in either case: together they are a sixth of the 8B's parameters, and in 16 bits would not
//! leave room for the rest on a card of 8 GB. Norms, biases, patch embedding and position table stay.

pub mod cache;
mod fragments;
pub mod pack;
pub mod weight;

use std::{fmt, str::FromStr};

pub use weight::QuantisedWeight;

/// Groups that int4 can have, in inputs of a row.
pub const GROUPS: [usize; 2] = [32, 64];

/// Format of one quantised matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// 8 bits, a scale a row.
    Int8,
    /// 4 bits, a scale for each `group` neighbours of a row.
    Int4 {
        /// 32 or 64.
        group: usize,
    },
}

impl Format {
    /// Bits of a value.
    pub fn bits(self) -> usize {
        match self {
            Self::Int8 => 8,
            Self::Int4 { .. } => 4,
        }
    }

    /// Values in a 32-bit word.
    pub fn per_word(self) -> usize {
        32 / self.bits()
    }

    /// What is added to a value so that it is stored without a sign.
    pub fn offset(self) -> i32 {
        1 << (self.bits() - 1)
    }

    /// Inputs of a row in stored form: `d_input` and the padding.
    pub fn padded(self, d_input: usize) -> usize {
        match self {
            Self::Int8 => d_input.next_multiple_of(16),
            Self::Int4 { group } => d_input.next_multiple_of(group),
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
            Self::Int4 { group } => group,
        }
    }

    /// Scales of a row.
    pub fn scales(self, d_input: usize) -> usize {
        self.padded(d_input) / self.group(d_input)
    }

    /// Type the scales are stored in: a row's single scale can afford f32.
    pub fn scale_dtype(self) -> burn::tensor::DType {
        match self {
            Self::Int8 => burn::tensor::DType::F32,
            Self::Int4 { .. } => burn::tensor::DType::F16,
        }
    }

    /// Bytes of a matrix `[rows, d_input]` in stored form.
    pub fn bytes(self, rows: usize, d_input: usize) -> usize {
        rows * (self.words(d_input) * 4 + self.scales(d_input) * self.scale_dtype().size())
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Int8 => f.write_str("int8"),
            Self::Int4 { group } => write!(f, "int4, groups of {group}"),
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
        let layers = match (bits, group) {
            (8, None) => Format::Int8,
            (8, Some(group)) => {
                return Err(format!(
                    "8 bits have one scale a row and no groups; leave out the group of {group}"
                ));
            }
            (4, group) => Format::Int4 {
                group: group.unwrap_or(64),
            },
            (bits, _) => return Err(format!("{bits} bits are not supported; expected 8 or 4")),
        };
        match layers {
            Format::Int4 { group } if !GROUPS.contains(&group) => Err(format!(
                "groups of {group} are not supported; expected 32 or 64"
            )),
            layers => Ok(Self { layers }),
        }
    }
}

/// `int8`, `int4` (groups of 64) or `int4:32`.
impl FromStr for Quantization {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || format!("`{text}` is not a format; expected int8, int4 or int4:32");
        let (name, group) = match text.split_once(':') {
            Some((name, group)) => (name, Some(group.parse().map_err(|_| expected())?)),
            None => (text, None),
        };
        match name {
            "int8" => Self::new(8, group),
            "int4" => Self::new(4, group),
            _ => Err(expected()),
        }
    }
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.layers.fmt(f)
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
        for bad in ["int5", "int8:64", "int4:48", "int4:x", ""] {
            assert!(read(bad).is_err(), "{bad}");
        }
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
    }
}

//! Stored numbers: bytes of a mapped file as floats, small floats, bit fields.

use std::{ops::Range, sync::Arc};

use half::{bf16, f16, slice::HalfFloatSliceExt};
use memmap2::Mmap;
use safetensors::Dtype;

use super::super::stored::RawTensor;

/// Bytes of a mapped file.
#[derive(Clone)]
pub(in super::super) struct Slice {
    map: Arc<Mmap>,
    range: Range<usize>,
}

impl Slice {
    /// The bytes `range` of `map`; `None` where the file ends before.
    pub(in super::super) fn new(map: &Arc<Mmap>, range: Range<usize>) -> Option<Self> {
        map.get(range.clone())?;
        Some(Self {
            map: map.clone(),
            range,
        })
    }

    /// Of a tensor.
    pub(super) fn of(tensor: &RawTensor) -> Option<Self> {
        let entry = tensor.file.entry(&tensor.key).ok()?;
        Self::new(&tensor.file.map, entry.bytes.clone())
    }

    /// All of them.
    pub(in super::super) fn bytes(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

    /// 32-bit words, `count` of them from one on.
    pub(super) fn words(&self, first: usize, count: usize) -> impl Iterator<Item = u32> + '_ {
        let bytes = self.bytes()[4 * first..4 * (first + count)].chunks_exact(4);
        bytes.map(|bytes| u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }

    /// A 32-bit word, by its number.
    pub(super) fn word(&self, at: usize) -> u32 {
        let bytes = &self.bytes()[4 * at..4 * at + 4];
        u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
    }
}

/// Stored floats, read one at a time.
#[derive(Clone)]
pub(super) struct Floats {
    slice: Slice,
    kind: FloatKind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FloatKind {
    F32,
    F16,
    BF16,
    /// A power of two, its exponent plus 127 (`float8_e8m0fnu`).
    E8M0,
}

impl Floats {
    /// Of a tensor of floats.
    pub(super) fn of(tensor: &RawTensor) -> Option<Self> {
        let kind = match tensor.file.entry(&tensor.key).ok()?.dtype {
            Dtype::F32 => FloatKind::F32,
            Dtype::F16 => FloatKind::F16,
            Dtype::BF16 => FloatKind::BF16,
            Dtype::F8_E8M0 => FloatKind::E8M0,
            _ => return None,
        };
        Some(Self {
            slice: Slice::of(tensor)?,
            kind,
        })
    }

    /// One of them.
    pub(super) fn get(&self, at: usize) -> f32 {
        let bytes = self.slice.bytes();
        match self.kind {
            FloatKind::F32 => f32::from_bits(self.slice.word(at)),
            FloatKind::F16 => f16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
            FloatKind::BF16 => bf16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]]).to_f32(),
            FloatKind::E8M0 => match bytes[at] {
                // 2⁻¹²⁷ is below the normal numbers.
                0 => f32::from_bits(0x0040_0000),
                0xff => f32::NAN,
                exponent => f32::from_bits(u32::from(exponent) << 23),
            },
        }
    }

    /// Whether all of them are numbers that f16 holds.
    pub(super) fn fit_f16(&self) -> bool {
        let size = match self.kind {
            FloatKind::F16 => return true,
            FloatKind::F32 => 4,
            FloatKind::BF16 => 2,
            FloatKind::E8M0 => 1,
        };
        (0..self.slice.bytes().len() / size).all(|at| {
            let value = self.get(at);
            f16::from_f32(value).to_f32() == value
        })
    }

    /// How torch rounds what it computes in this type.
    pub(super) fn rounding(&self) -> Round {
        match self.kind {
            FloatKind::F32 | FloatKind::E8M0 => Round::F32,
            FloatKind::F16 => Round::F16,
            FloatKind::BF16 => Round::BF16,
        }
    }
}

/// The type that the reference implementation computes in: its results are rounded to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Round {
    /// Not below f32.
    F32,
    /// float16.
    F16,
    /// bfloat16.
    BF16,
}

impl Round {
    /// The nearest number of the type.
    pub(super) fn apply(self, value: f32) -> f32 {
        match self {
            Self::F32 => value,
            Self::F16 => f16::from_f32(value).to_f32(),
            Self::BF16 => bf16::from_f32(value).to_f32(),
        }
    }

    /// The nearest numbers of the type, many at a time.
    pub(super) fn all(self, values: &mut [f32]) {
        match self {
            Self::F32 => {}
            Self::F16 => {
                let mut halves = [f16::ZERO; 128];
                for values in values.chunks_mut(halves.len()) {
                    let halves = &mut halves[..values.len()];
                    halves.convert_from_f32_slice(values);
                    halves.convert_to_f32_slice(values);
                }
            }
            Self::BF16 => {
                for value in values {
                    *value = bf16::from_f32(*value).to_f32();
                }
            }
        }
    }
}

/// Field of `bits` bits that starts at bit `at` of words `stride` apart, the first being `first`.
///
/// Fields follow each other without gaps and may cross from one word into the next.
pub(super) fn field(words: &Slice, first: usize, stride: usize, at: usize, bits: usize) -> u32 {
    let (word, shift) = (at / 32, at % 32);
    let low = words.word(first + word * stride) >> shift;
    let value = if shift + bits > 32 {
        low | words.word(first + (word + 1) * stride) << (32 - shift)
    } else {
        low
    };
    value & ((1u32 << bits) - 1)
}

/// The 256 values of `float8_e4m3fn`: 4 bits of exponent, 3 of mantissa, no infinity.
pub(super) fn e4m3() -> [f32; 256] {
    std::array::from_fn(|byte| {
        let (exponent, mantissa) = ((byte >> 3) & 15, (byte & 7) as f32);
        let size = match (exponent, byte & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa * 2f32.powi(-9),
            _ => (8.0 + mantissa) * 2f32.powi(exponent as i32 - 10),
        };
        if byte & 0x80 == 0 { size } else { -size }
    })
}

/// The 256 values of `float8_e5m2`: the upper half of float16.
pub(super) fn e5m2() -> [f32; 256] {
    std::array::from_fn(|byte| f16::from_bits((byte as u16) << 8).to_f32())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_floats_have_the_values_of_their_definition() {
        let table = e4m3();
        assert_eq!(table[0x7e], 448.0);
        assert_eq!(table[0x01], 2f32.powi(-9));
        assert_eq!(table[0x08], 2f32.powi(-6));
        assert_eq!(table[0x38], 1.0);
        assert_eq!(table[0xb9], -1.125);
        assert!(table[0x7f].is_nan() && table[0xff].is_nan());
        let table = e5m2();
        assert_eq!((table[0x3c], table[0x7b]), (1.0, 57344.0));
        assert!(table[0x7c].is_infinite());
    }

    #[test]
    fn fields_cross_words() {
        let mut file = tempfile::tempfile().unwrap();
        let bits: u64 = 0b101_011_110 << 30;
        std::io::Write::write_all(&mut file, &bits.to_le_bytes()).unwrap();
        // Safety: the file is this test's own.
        #[allow(unsafe_code)]
        let map = Arc::new(unsafe { Mmap::map(&file) }.unwrap());
        let slice = Slice::new(&map, 0..8).unwrap();
        let fields = [30, 33, 36].map(|at| field(&slice, 0, 1, at, 3));
        assert_eq!(fields, [0b110, 0b011, 0b101]);
        assert!(Slice::new(&map, 4..9).is_none());
    }
}

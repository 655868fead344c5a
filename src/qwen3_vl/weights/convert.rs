//! Converts stored floats to another type and checks them for NaN and infinity.
//!
//! Written so that the compiler can use vectors: a check folds a whole block before it branches.

use burn::tensor::DType;
use half::{bf16, f16};
use safetensors::Dtype;

/// Elements checked together.
const BLOCK: usize = 4096;

/// What is wrong with stored elements.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Problem {
    /// Not a supported float type.
    Dtype,
    /// NaN or infinity at this element.
    NotFinite(usize),
    /// More than f16 holds at this element.
    TooLarge(usize),
}

/// Bytes of a stored element; `None` for types that are not supported.
pub(super) fn stored_size(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::BF16 | Dtype::F16 => Some(2),
        Dtype::F32 => Some(4),
        _ => None,
    }
}

/// Whether stored elements are those wanted, bit for bit.
pub(super) fn is_same(from: Dtype, to: DType) -> bool {
    matches!(
        (from, to),
        (Dtype::BF16, DType::BF16) | (Dtype::F16, DType::F16) | (Dtype::F32, DType::F32)
    )
}

/// Looks for NaN and infinity: their exponent bits, and no others, are all ones.
pub(super) fn check(bytes: &[u8], from: Dtype) -> Result<(), Problem> {
    let at = match from {
        Dtype::BF16 => halves(bytes, 0x7f80),
        Dtype::F16 => halves(bytes, 0x7c00),
        Dtype::F32 => words(bytes),
        _ => return Err(Problem::Dtype),
    };
    at.map_or(Ok(()), |at| Err(Problem::NotFinite(at)))
}

fn halves(bytes: &[u8], exponent: i16) -> Option<usize> {
    let bits = |pair: &[u8]| i16::from_le_bytes([pair[0], pair[1]]) & exponent;
    bytes
        .chunks(2 * BLOCK)
        .position(|block| block.chunks_exact(2).map(bits).fold(0, i16::max) == exponent)
        .and_then(|block| {
            let start = block * BLOCK;
            let inside = bytes[2 * start..].chunks_exact(2);
            inside
                .map(bits)
                .position(|found| found == exponent)
                .map(|at| start + at)
        })
}

fn words(bytes: &[u8]) -> Option<usize> {
    const EXPONENT: i32 = 0x7f80_0000;
    let bits = |quad: &[u8]| i32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]]) & EXPONENT;
    bytes
        .chunks(4 * BLOCK)
        .position(|block| block.chunks_exact(4).map(bits).fold(0, i32::max) == EXPONENT)
        .and_then(|block| {
            let start = block * BLOCK;
            let inside = bytes[4 * start..].chunks_exact(4);
            inside
                .map(bits)
                .position(|found| found == EXPONENT)
                .map(|at| start + at)
        })
}

/// Converts checked elements; `out` has room for as many of type `to`.
pub(super) fn convert(bytes: &[u8], from: Dtype, to: DType, out: &mut [u8]) -> Result<(), Problem> {
    match from {
        _ if is_same(from, to) => {
            out.copy_from_slice(bytes);
            Ok(())
        }
        Dtype::BF16 => write(
            bytes.chunks_exact(2).map(|pair| {
                f32::from_bits(u32::from(u16::from_le_bytes([pair[0], pair[1]])) << 16)
            }),
            to,
            out,
        ),
        Dtype::F16 => write(
            bytes
                .chunks_exact(2)
                .map(|pair| f16::from_le_bytes([pair[0], pair[1]]).to_f32()),
            to,
            out,
        ),
        Dtype::F32 => write(
            bytes
                .chunks_exact(4)
                .map(|quad| f32::from_le_bytes([quad[0], quad[1], quad[2], quad[3]])),
            to,
            out,
        ),
        _ => Err(Problem::Dtype),
    }
}

fn write(values: impl Iterator<Item = f32>, to: DType, out: &mut [u8]) -> Result<(), Problem> {
    match to {
        DType::F32 => {
            for (value, out) in values.zip(out.chunks_exact_mut(4)) {
                out.copy_from_slice(&value.to_le_bytes());
            }
        }
        DType::BF16 => {
            for (value, out) in values.zip(out.chunks_exact_mut(2)) {
                out.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
            }
        }
        DType::F16 => {
            for (index, (value, out)) in values.zip(out.chunks_exact_mut(2)).enumerate() {
                let half = f16::from_f32(value);
                if !half.is_finite() {
                    return Err(Problem::TooLarge(index));
                }
                out.copy_from_slice(&half.to_le_bytes());
            }
        }
        _ => return Err(Problem::Dtype),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first bad element is found wherever it is; large and tiny numbers are none.
    #[test]
    fn what_is_not_finite_is_found() {
        let count = 3 * BLOCK + 17;
        for at in [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 5, count - 1] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = vec![-1.5f32; count];
                values[count / 2] = 3.0e38;
                values[count / 3] = f32::MIN_POSITIVE / 2.0;
                let bytes = |values: &[f32], dtype: Dtype| -> Vec<u8> {
                    let half = |v: &f32| match dtype {
                        Dtype::BF16 => bf16::from_f32(*v).to_le_bytes(),
                        // f16 has less range: the large one would be infinite.
                        _ => f16::from_f32(if *v == 3.0e38 { 65504.0 } else { *v }).to_le_bytes(),
                    };
                    match dtype {
                        Dtype::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                        _ => values.iter().flat_map(half).collect(),
                    }
                };
                for dtype in [Dtype::BF16, Dtype::F16, Dtype::F32] {
                    assert_eq!(check(&bytes(&values, dtype), dtype), Ok(()));
                    let mut with = values.clone();
                    with[at] = bad;
                    // A second one after it is not the one named.
                    with[count - 1] = bad;
                    assert_eq!(
                        check(&bytes(&with, dtype), dtype),
                        Err(Problem::NotFinite(at)),
                        "{dtype:?}"
                    );
                }
            }
        }
        assert_eq!(check(&[0; 8], Dtype::I64), Err(Problem::Dtype));
    }

    #[test]
    fn conversions_round_as_the_types_do() {
        let values = [0.0f32, -0.1, 1.0 + 1.0 / 256.0, 6.1e-5, 65504.0, -3.25];
        let stored: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let mut out = vec![0; 2 * values.len()];
        convert(&stored, Dtype::F32, DType::BF16, &mut out).unwrap();
        let mut back = vec![0; 4 * values.len()];
        convert(&out, Dtype::BF16, DType::F32, &mut back).unwrap();
        for (value, bytes) in values.iter().zip(back.chunks_exact(4)) {
            let back = f32::from_le_bytes(bytes.try_into().unwrap());
            assert_eq!(back, bf16::from_f32(*value).to_f32());
        }
        convert(&stored, Dtype::F32, DType::F16, &mut out).unwrap();
        convert(&out, Dtype::F16, DType::F32, &mut back).unwrap();
        for (value, bytes) in values.iter().zip(back.chunks_exact(4)) {
            let back = f32::from_le_bytes(bytes.try_into().unwrap());
            assert_eq!(back, f16::from_f32(*value).to_f32());
        }
        let large = 70000f32.to_le_bytes();
        let both = [1f32.to_le_bytes(), large].concat();
        assert_eq!(
            convert(&both, Dtype::F32, DType::F16, &mut out[..4]),
            Err(Problem::TooLarge(1))
        );
    }
}

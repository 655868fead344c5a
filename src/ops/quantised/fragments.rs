//! Quantised matrices in the order of tensor cores' fragments, back to rows, in plain Burn.
//!
//! A kernel that multiplies few rows by quantised weights at the speed of memory wants a lane's share of
//! 16 rows of the matrix in one read of 16 bytes. The order is that of `accelerate/cuda/fragments/fragments.cuh`, which
//! explains it: pieces of 16 rows and 64 columns (4 bits) or 32 (8 bits), `[out / 16][pieces][8 rows][4][16 bytes]`. Whole
//! tiles of 16 rows take the place that they take row by row, so the shapes are the same.

use burn::prelude::*;

use super::Format;

/// Words `[out, words of a row]` row by row.
pub(super) fn words_by_rows<B: Backend>(
    words: Tensor<B, 2, Int>,
    format: Format,
) -> Tensor<B, 2, Int> {
    let [rows, width] = words.dims();
    let (tiles, pieces) = (rows / 16, width / 8);
    // Bits of the fields, and where a field of the row-major word is: for 8 bits bytes of two words, for 4 bits nibbles
    // of two words as well.
    let halves = [0, 1].map(|half| match format {
        Format::Int8 => eights(words.clone(), [tiles, pieces], half),
        _ => fours(words.clone(), [tiles, pieces], half),
    });
    // [tile, half, 8 rows, piece, 8 words]
    let words: Tensor<B, 5, Int> = Tensor::stack::<5>(halves.to_vec(), 1);
    words.reshape([rows, width])
}

/// `count` bits of each word from bit `from` on, moved to bit `to`.
fn field<B: Backend, const D: usize>(
    words: &Tensor<B, D, Int>,
    from: usize,
    count: usize,
    to: usize,
) -> Tensor<B, D, Int> {
    let mask = (1i32 << count) - 1;
    words
        .clone()
        .bitwise_right_shift_scalar((from as i32).elem())
        .bitwise_and_scalar(mask.elem())
        .bitwise_left_shift_scalar((to as i32).elem())
}

fn joined<B: Backend, const D: usize>(
    fields: impl Iterator<Item = Tensor<B, D, Int>>,
) -> Tensor<B, D, Int> {
    fields
        .reduce(Tensor::bitwise_or)
        .expect("a word has fields")
}

/// 8 bits: rows `8 half + g` of each tile, `[tiles, 8, pieces, 8]`.
fn eights<B: Backend>(
    words: Tensor<B, 2, Int>,
    [tiles, pieces]: [usize; 2],
    half: usize,
) -> Tensor<B, 4, Int> {
    // Word 2 j + h of a lane (g, t) holds columns 8 t + 4 j + 2 h and the next, which are bytes 2 h and
    // 2 h + 1 of word 2 t + j of the row.
    let words: Tensor<B, 6, Int> = words.reshape([tiles, pieces, 8, 4, 2, 2]);
    let fields = (0..2).flat_map(|h| {
        let word = words.clone().narrow(5, h, 1);
        (0..2).map(move |e| field(&word, 8 * (half + 2 * e), 8, 8 * (2 * h + e)))
    });
    let joined: Tensor<B, 6, Int> =
        joined(fields).bitwise_xor_scalar(0x8080_8080u32.cast_signed().elem());
    let joined: Tensor<B, 4, Int> = joined.reshape([tiles, pieces, 8, 8]);
    joined.swap_dims(1, 2)
}

/// 4 bits: as [`eights`].
fn fours<B: Backend>(
    words: Tensor<B, 2, Int>,
    [tiles, pieces]: [usize; 2],
    half: usize,
) -> Tensor<B, 4, Int> {
    // Word j of a lane (g, t) holds columns 32 (j / 2) + 8 t + 4 (j % 2) and the next three, which are
    // nibbles 4 (j % 2) and on of word 4 (j / 2) + t of the row.
    let words: Tensor<B, 6, Int> = words.reshape([tiles, pieces, 8, 4, 2, 2]);
    let fields = (0..2).flat_map(|j| {
        let word = words.clone().narrow(5, j, 1);
        let places = (0..2).flat_map(|h| (0..2).map(move |e| (h, e)));
        places.map(move |(h, e)| {
            field(
                &word,
                4 * (half + 2 * h) + 16 * e,
                4,
                4 * (4 * j + 2 * h + e),
            )
        })
    });
    // [tiles, pieces, g, t, j / 2, 1] to [tiles, g, pieces, j / 2, t].
    let joined: Tensor<B, 5, Int> = joined(fields).reshape([tiles, pieces, 8, 4, 2]);
    joined
        .permute([0, 2, 1, 4, 3])
        .reshape([tiles, 8, pieces, 8])
}

/// Scales `[out, scales of a row]` row by row: those of int8 are so, those of int4 are pairs of rows g and g + 8.
pub(super) fn scales_by_rows<B: Backend>(scales: Tensor<B, 2>, format: Format) -> Tensor<B, 2> {
    let [rows, groups] = scales.dims();
    if format == Format::Int8 {
        return scales;
    }
    let scales: Tensor<B, 4> = scales.reshape([rows / 16, groups, 8, 2]);
    scales.permute([0, 3, 2, 1]).reshape([rows, groups])
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::tensor::{DType, TensorData};
    use burn_flex::Flex;

    use super::{
        super::{QuantisedWeight, pack::pack},
        *,
    };

    /// A level of a fragment-ordered matrix, found as `fragments.cuh` says.
    fn level(words: &[i32], format: Format, d_input: usize, row: usize, column: usize) -> u32 {
        let (tile, g, half) = (row / 16, row % 8, row % 16 / 8);
        let (j, h, e) = (column % 8 / 4, column % 4 / 2, column % 2);
        let t = column % 32 / 8;
        let columns = if format == Format::Int8 { 32 } else { 64 };
        let piece = tile * (d_input / columns) + column / columns;
        let lane = &words[(piece * 32 + g * 4 + t) * 4..][..4];
        match format {
            Format::Int8 => (lane[2 * j + h] as u32 >> (8 * (half + 2 * e)) & 255) ^ 128,
            _ => lane[2 * (column % 64 / 32) + j] as u32 >> (4 * (half + 2 * h) + 16 * e) & 15,
        }
    }

    /// Row-major words in fragment order, on the host.
    fn arranged(words: &[i32], format: Format, [rows, d_input]: [usize; 2]) -> Vec<i32> {
        // The inverse by search: where each level of the result comes from.
        let mut out = vec![0u32; words.len()];
        let per_word = format.per_word();
        for row in 0..rows {
            for column in 0..d_input {
                let word = words[row * format.words(d_input) + column / per_word] as u32;
                let value =
                    word >> (column % per_word * format.bits()) & ((1 << format.bits()) - 1);
                let (g, half, t) = (row % 8, row % 16 / 8, column % 32 / 8);
                let (j, h, e) = (column % 8 / 4, column % 4 / 2, column % 2);
                let columns = if format == Format::Int8 { 32 } else { 64 };
                let piece = row / 16 * (d_input / columns) + column / columns;
                let lane = (piece * 32 + g * 4 + t) * 4;
                match format {
                    Format::Int8 => out[lane + 2 * j + h] |= (value ^ 128) << (8 * (half + 2 * e)),
                    _ => {
                        out[lane + 2 * (column % 64 / 32) + j] |=
                            value << (4 * (half + 2 * h) + 16 * e);
                    }
                }
            }
        }
        out.into_iter().map(|word| word as i32).collect()
    }

    #[test]
    fn an_arranged_matrix_has_the_values_of_its_rows() {
        let device = Default::default();
        let dims = [48, 192];
        let [rows, d_input] = dims;
        for format in [
            Format::Int8,
            Format::Int4 { group: 32 },
            Format::Int4 { group: 64 },
        ] {
            let matrix = pack::<()>(rows, d_input, format, |row, out| {
                for (at, value) in out.iter_mut().enumerate() {
                    *value = ((row * 131 + at * 37) as f32 * 0.11).sin() * (1.0 + (at / 32) as f32);
                }
                Ok(())
            });
            let matrix = matrix.unwrap();
            let weight = QuantisedWeight::<Flex>::upload(
                matrix.clone(),
                rows,
                d_input,
                format,
                DType::F32,
                &device,
            );
            let want = weight.unpack(DType::F32).into_data();
            let held = arranged(&matrix.words, format, dims);
            let first = matrix.words[0] as u32 & ((1 << format.bits()) - 1);
            assert_eq!(level(&held, format, d_input, 0, 0), first);
            let fragments = weight.clone().arrange(|words, scales| {
                let shape = words.dims();
                let words = Tensor::from_data(TensorData::new(held, shape), (&device, DType::I32));
                let [rows, groups] = scales.dims();
                let scales = if format == Format::Int8 {
                    scales
                } else {
                    let pairs: Tensor<Flex, 4> = scales.reshape([rows / 16, 2, 8, groups]);
                    pairs.permute([0, 3, 2, 1]).reshape([rows, groups])
                };
                (words, scales)
            });
            assert!(fragments.is_arranged());
            assert_eq!(fragments.unpack(DType::F32).into_data(), want, "{format}");
            assert_eq!(
                fragments.rows(5, 20).unpack(DType::F32).into_data(),
                weight.rows(5, 20).unpack(DType::F32).into_data()
            );
            let indices = || Tensor::from_ints([47, 3, 3], &device);
            assert_eq!(
                fragments.select(indices()).unpack(DType::F32).into_data(),
                weight.select(indices()).unpack(DType::F32).into_data()
            );
            assert!(crate::base::panics::quietly(|| fragments.words().dims()).is_err());
        }
    }
}

//! Quantises rows of floats to words and scales, and back, on the host.

use half::f16;
use rayon::prelude::*;

use super::Format;

/// A quantised matrix on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantisedMatrix {
    /// `[rows, words]`, row-major.
    pub words: Vec<i32>,
    /// `[rows, scales]`, row-major; representable in the type they are stored in.
    pub scales: Vec<f32>,
}

/// Scales that int4 tries for each group, as shares of the one that just holds the largest value.
///
/// A smaller scale cuts the largest value and is finer for all others. On normal weights in groups of
/// 64 the relative error is 10.8 % with -7 to 7 as published by most, 9.5 % when the largest value
/// takes the side with eight steps, and 9.1 % with the best of these four, as much as a zero point of
/// its own for each group gives (9.1 %), which would cost bytes and work in every matmul.
const SHARES: [f32; 4] = [1.0, 0.925, 0.85, 0.775];

/// Rounds to the nearest whole number, halves to even; exact below 2²².
///
/// `f32::round` is a call for each value on x86-64 without SSE4.1.
fn nearest(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0;
    (x + SHIFT) - SHIFT
}

fn inverse(scale: f32) -> f32 {
    if scale == 0.0 { 0.0 } else { 1.0 / scale }
}

/// The value as a whole number of scales.
fn level(value: f32, inverse: f32, least: f32, most: f32) -> f32 {
    nearest((value * inverse).clamp(least, most))
}

/// Scale of an int8 row.
fn row_scale(row: &[f32]) -> f32 {
    row.iter().fold(0.0f32, |most, v| most.max(v.abs())) / 127.0
}

/// Scale of an int4 group, as f16 holds it: the one of [`SHARES`] with the least square error.
fn group_scale(group: &[f32]) -> f32 {
    let largest = group.iter().fold(
        0.0f32,
        |most, v| if v.abs() > most.abs() { *v } else { most },
    );
    let mut best = (f32::INFINITY, 0.0);
    for share in SHARES {
        // The sign puts the largest value at -8, which has no counterpart on the other side.
        let scale = f16::from_f32(largest / -8.0 * share).to_f32();
        let inverse = inverse(scale);
        let error: f32 = group
            .iter()
            .map(|v| {
                let difference = level(*v, inverse, -8.0, 7.0) * scale - v;
                difference * difference
            })
            .sum();
        if error < best.0 {
            best = (error, scale);
        }
    }
    best.1
}

fn pack_levels(values: &[f32], scale: f32, format: Format, words: &mut [i32]) {
    let inverse = inverse(scale);
    let (least, most) = match format {
        Format::Int8 => (-127.0, 127.0),
        Format::Int4 { .. } => (-8.0, 7.0),
    };
    for (word, values) in words.iter_mut().zip(values.chunks(format.per_word())) {
        let mut bits = 0u32;
        for (place, value) in values.iter().enumerate() {
            let level = level(*value, inverse, least, most) as i32 + format.offset();
            bits |= (level as u32) << (place * format.bits());
        }
        *word = bits as i32;
    }
}

/// Quantises one row; `row` has the padded length, `words` and `scales` those of a row.
fn pack_row(row: &[f32], format: Format, words: &mut [i32], scales: &mut [f32]) {
    let group = row.len() / scales.len();
    for ((values, scale), words) in row
        .chunks(group)
        .zip(scales)
        .zip(words.chunks_mut(group / format.per_word()))
    {
        *scale = match format {
            Format::Int8 => row_scale(values),
            Format::Int4 { .. } => group_scale(values),
        };
        pack_levels(values, *scale, format, words);
    }
}

/// Quantises `rows` rows of `d_input` values; `read` fills a row, in any order and from several threads.
///
/// # Errors
/// The first error of `read` that a thread met.
pub fn pack<E: Send>(
    rows: usize,
    d_input: usize,
    format: Format,
    read: impl Fn(usize, &mut [f32]) -> Result<(), E> + Sync,
) -> Result<QuantisedMatrix, E> {
    let (words_row, scales_row) = (format.words(d_input), format.scales(d_input));
    let mut words = vec![0; rows * words_row];
    let mut scales = vec![0.0; rows * scales_row];
    words
        .par_chunks_mut(words_row)
        .zip(scales.par_chunks_mut(scales_row))
        .enumerate()
        .try_for_each_init(
            || vec![0.0; format.padded(d_input)],
            |values, (row, (words, scales))| {
                read(row, &mut values[..d_input])?;
                pack_row(values, format, words, scales);
                Ok(())
            },
        )?;
    Ok(QuantisedMatrix { words, scales })
}

/// Dequantises rows to floats, `[rows, d_input]`.
pub fn unpack(packed: &QuantisedMatrix, d_input: usize, format: Format) -> Vec<f32> {
    let (words_row, scales_row) = (format.words(d_input), format.scales(d_input));
    let group = format.group(d_input);
    let mask = (1u32 << format.bits()) - 1;
    let rows = packed
        .words
        .chunks(words_row)
        .zip(packed.scales.chunks(scales_row));
    rows.flat_map(|(words, scales)| {
        (0..d_input).map(move |input| {
            let word = words[input / format.per_word()] as u32;
            let place = input % format.per_word();
            let level = ((word >> (place * format.bits())) & mask) as i32 - format.offset();
            level as f32 * scales[input / group]
        })
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    fn packed(values: &[f32], rows: usize, format: Format) -> QuantisedMatrix {
        let d_input = values.len() / rows;
        let done = pack::<()>(rows, d_input, format, |row, out| {
            out.copy_from_slice(&values[row * d_input..][..d_input]);
            Ok(())
        });
        done.unwrap()
    }

    fn normal(count: usize) -> Vec<f32> {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        // A sum of twelve uniform draws is normal as far as rounding errors show.
        let mut one = || {
            (0..12)
                .map(|_| random.random_range(-0.5f32..0.5))
                .sum::<f32>()
        };
        (0..count).map(|_| one() * 0.02).collect()
    }

    fn error(values: &[f32], rows: usize, format: Format) -> f64 {
        let back = unpack(&packed(values, rows, format), values.len() / rows, format);
        let square = |x: f32| f64::from(x) * f64::from(x);
        let wrong: f64 = back.iter().zip(values).map(|(a, b)| square(a - b)).sum();
        (wrong / values.iter().map(|v| square(*v)).sum::<f64>()).sqrt()
    }

    #[test]
    fn halves_go_to_the_even_neighbour() {
        for (x, want) in [
            (0.5, 0.0),
            (1.5, 2.0),
            (-0.5, 0.0),
            (-2.5, -2.0),
            (2.6, 3.0),
        ] {
            assert_eq!(nearest(x), want, "{x}");
        }
    }

    #[test]
    fn an_int8_row_is_quantised_to_the_expected_words() {
        // Scale 2.54 / 127 = 0.02: levels 127, -127, 1, 0 (0.4 rounded), then padding.
        let matrix = packed(&[2.54, -2.54, 0.02, 0.008], 1, Format::Int8);
        assert_eq!(matrix.scales, [2.54 / 127.0]);
        assert_eq!(matrix.words.len(), 4);
        assert_eq!(matrix.words[0] as u32, 0x80_81_01_ff);
        assert_eq!(matrix.words[1] as u32, 0x80_80_80_80);
    }

    #[test]
    fn an_int4_group_is_quantised_to_the_expected_words() {
        // The largest value takes level -8, so with largest 4 the scale is -0.5 and exact for all.
        let mut values = [0.0; 32];
        values[..9].copy_from_slice(&[4.0, 0.5, -0.5, 1.0, -3.5, 0.0, 2.0, -1.0, 3.5]);
        let format = Format::Int4 { group: 32 };
        let matrix = packed(&values, 1, format);
        assert_eq!(matrix.scales, [-0.5]);
        // Levels -8 -1 1 -2 7 0 -4 2, then -7, each plus 8, first in the lowest bits.
        assert_eq!(matrix.words[0] as u32, 0xa4_8f_69_70);
        assert_eq!(matrix.words[1] as u32, 0x88_88_88_81);
        assert_eq!(unpack(&matrix, 32, format), values);
    }

    #[test]
    fn rows_that_are_no_whole_groups_are_padded() {
        let values = normal(3 * 40);
        for format in [
            Format::Int8,
            Format::Int4 { group: 32 },
            Format::Int4 { group: 64 },
        ] {
            let matrix = packed(&values, 3, format);
            assert_eq!(matrix.words.len(), 3 * format.words(40));
            assert_eq!(matrix.scales.len(), 3 * format.scales(40));
            assert!(error(&values, 3, format) < 0.11);
        }
    }

    #[test]
    fn zero_rows_stay_zero() {
        for format in [Format::Int8, Format::Int4 { group: 64 }] {
            let matrix = packed(&[0.0; 64], 1, format);
            assert_eq!(unpack(&matrix, 64, format), [0.0; 64]);
        }
    }

    #[test]
    fn errors_on_normal_weights_are_those_the_formats_were_chosen_by() {
        let values = normal(256 * 1024);
        let int8 = error(&values, 256, Format::Int8);
        let int4_64 = error(&values, 256, Format::Int4 { group: 64 });
        let int4_32 = error(&values, 256, Format::Int4 { group: 32 });
        // Step 2·max/254 with max about 3.3 sigma: 0.026 / sqrt(12).
        assert!((0.006..0.009).contains(&int8), "{int8}");
        assert!((0.088..0.094).contains(&int4_64), "{int4_64}");
        assert!((0.080..0.086).contains(&int4_32), "{int4_32}");
    }

    #[test]
    fn an_error_of_reading_is_passed_on() {
        let result = pack(4, 16, Format::Int8, |row, _| {
            if row == 2 { Err(row) } else { Ok(()) }
        });
        assert_eq!(result, Err(2));
    }
}

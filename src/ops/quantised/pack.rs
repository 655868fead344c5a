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
    /// `[rows, scales]`, row-major: whole numbers 0 to 15; empty where the format is symmetric.
    pub zeros: Vec<f32>,
}

impl QuantisedMatrix {
    /// A matrix without rows, with room for `rows`.
    pub fn with_capacity(rows: usize, d_input: usize, format: Format) -> Self {
        let scales = rows * format.scales(d_input);
        Self {
            words: Vec::with_capacity(rows * format.words(d_input)),
            scales: Vec::with_capacity(scales),
            zeros: Vec::with_capacity(if format.is_symmetric() { 0 } else { scales }),
        }
    }

    /// Appends the rows of another.
    pub fn extend(&mut self, rows: Self) {
        self.words.extend(rows.words);
        self.scales.extend(rows.scales);
        self.zeros.extend(rows.zeros);
    }

    /// Of `rows` rows, each written by `write`: its levels as they are stored, for `d_input` inputs, its scales
    /// and its zero points (none where the format is symmetric), in any order and from several threads.
    pub fn from_levels(
        rows: usize,
        d_input: usize,
        format: Format,
        write: impl Fn(usize, &mut [u32], &mut [f32], &mut [f32]) + Sync,
    ) -> Self {
        let (words_row, scales_row) = (format.words(d_input), format.scales(d_input));
        let zeros_row = if format.is_symmetric() { 0 } else { scales_row };
        let made: Vec<_> = (0..rows)
            .into_par_iter()
            .map(|row| {
                let mut levels = vec![0; format.padded(d_input)];
                let (mut scales, mut zeros) = (vec![0.0; scales_row], vec![0.0; zeros_row]);
                write(row, &mut levels[..d_input], &mut scales, &mut zeros);
                // Padding has the value zero.
                let padding = match zeros.last() {
                    Some(zero) => *zero as u32,
                    None => format.offset() as u32,
                };
                levels[d_input..].fill(padding);
                let mut words = vec![0; words_row];
                join_levels(&levels, format, &mut words);
                (words, scales, zeros)
            })
            .collect();
        let mut matrix = Self::with_capacity(rows, d_input, format);
        for (words, scales, zeros) in made {
            matrix.words.extend(words);
            matrix.scales.extend(scales);
            matrix.zeros.extend(zeros);
        }
        matrix
    }
}

/// Puts the levels of a row into its words.
fn join_levels(levels: &[u32], format: Format, words: &mut [i32]) {
    let bits = format.bits();
    for (word, levels) in words.iter_mut().zip(levels.chunks(format.per_word())) {
        let join = |word, (place, level): (usize, &u32)| word | level << (place * bits);
        *word = levels.iter().enumerate().fold(0u32, join) as i32;
    }
}

/// The values that a group can have: `scale · (level - zero)`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grid {
    /// Distance of neighbouring values.
    pub scale: f32,
    /// The level of value zero.
    pub zero: f32,
    inverse: f32,
    least: f32,
    most: f32,
}

impl Grid {
    /// Of a group of `format`; `zero` counts where it has zero points.
    pub fn new(format: Format, scale: f32, zero: f32) -> Self {
        let (least, most) = match format {
            Format::Int8 => (-127.0, 127.0),
            Format::Int4 { .. } => (-8.0, 7.0),
            Format::Int4Zeros { .. } => (-zero, 15.0 - zero),
        };
        Self {
            scale,
            zero: match format.is_symmetric() {
                true => format.offset() as f32,
                false => zero,
            },
            inverse: inverse(scale),
            least,
            most,
        }
    }

    /// The same grid with the scale as the format stores it.
    pub fn stored(self, format: Format) -> Self {
        match format {
            Format::Int8 => self,
            Format::Int4 { .. } | Format::Int4Zeros { .. } => {
                Self::new(format, f16::from_f32(self.scale).to_f32(), self.zero)
            }
        }
    }

    /// The number of scales nearest to a value.
    pub fn steps(&self, value: f32) -> f32 {
        level(value, self.inverse, self.least, self.most)
    }

    /// The nearest value that the group can have.
    pub fn nearest(&self, value: f32) -> f32 {
        self.steps(value) * self.scale
    }

    /// The level of the nearest value, as it is stored.
    pub fn level(&self, value: f32) -> u32 {
        (self.steps(value) + self.zero) as u32
    }

    /// Sum of the squared errors of some values.
    pub fn error(&self, values: &[f32]) -> f32 {
        values
            .iter()
            .map(|v| {
                let difference = self.nearest(*v) - v;
                difference * difference
            })
            .sum()
    }

    /// The grid that just holds all values, shrunk to `share` of its width.
    pub fn around(values: &[f32], format: Format, share: f32) -> Self {
        match format {
            Format::Int8 => Self::new(format, row_scale(values) * share, 0.0),
            Format::Int4 { .. } => {
                let largest =
                    values.iter().fold(
                        0.0f32,
                        |most, v| if v.abs() > most.abs() { *v } else { most },
                    );
                // The sign puts the largest value at -8, which has no counterpart on the other side.
                let scale = f16::from_f32(largest / -8.0 * share).to_f32();
                Self::new(format, scale, 0.0)
            }
            Format::Int4Zeros { .. } => {
                let (least, most) = values.iter().fold((0.0f32, 0.0f32), |(least, most), v| {
                    (least.min(*v), most.max(*v))
                });
                let scale = f16::from_f32((most - least) / 15.0 * share).to_f32();
                let zero = nearest(-least * share * inverse(scale)).clamp(0.0, 15.0);
                Self::new(format, scale, zero)
            }
        }
    }

    /// The grid of a group by round-to-nearest: of int4 the one of `SHARES` with the least square error.
    pub fn of(values: &[f32], format: Format) -> Self {
        if format == Format::Int8 {
            return Self::around(values, format, 1.0);
        }
        let grids = SHARES.map(|share| Self::around(values, format, share));
        let mut best = (f32::INFINITY, grids[0]);
        for grid in grids {
            let error = grid.error(values);
            if error < best.0 {
                best = (error, grid);
            }
        }
        best.1
    }
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
    let group = format.group(d_input);
    let mut words = vec![0; rows * words_row];
    let mut grids = vec![Grid::new(format, 0.0, 0.0); rows * scales_row];
    words
        .par_chunks_mut(words_row)
        .zip(grids.par_chunks_mut(scales_row))
        .enumerate()
        .try_for_each_init(
            || (vec![0.0; format.padded(d_input)], vec![0; group]),
            |(values, levels), (row, (words, grids))| {
                read(row, &mut values[..d_input])?;
                for ((values, grid), words) in values
                    .chunks(group)
                    .zip(grids)
                    .zip(words.chunks_mut(group / format.per_word()))
                {
                    *grid = Grid::of(values, format);
                    for (level, value) in levels.iter_mut().zip(values) {
                        *level = grid.level(*value);
                    }
                    join_levels(levels, format, words);
                }
                Ok(())
            },
        )?;
    let zeros = match format.is_symmetric() {
        true => Vec::new(),
        false => grids.iter().map(|grid| grid.zero).collect(),
    };
    Ok(QuantisedMatrix {
        words,
        scales: grids.iter().map(|grid| grid.scale).collect(),
        zeros,
    })
}

/// Dequantises rows to floats, `[rows, d_input]`.
pub fn unpack(packed: &QuantisedMatrix, d_input: usize, format: Format) -> Vec<f32> {
    let (words_row, scales_row) = (format.words(d_input), format.scales(d_input));
    let group = format.group(d_input);
    let mask = (1u32 << format.bits()) - 1;
    let rows = packed.words.chunks(words_row).enumerate();
    rows.flat_map(|(row, words)| {
        (0..d_input).map(move |input| {
            let word = words[input / format.per_word()] as u32;
            let place = input % format.per_word();
            let level = ((word >> (place * format.bits())) & mask) as f32;
            let at = row * scales_row + input / group;
            let zero = match format.is_symmetric() {
                true => format.offset() as f32,
                false => packed.zeros[at],
            };
            (level - zero) * packed.scales[at]
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

    #[test]
    fn a_group_with_a_zero_point_is_quantised_to_the_expected_words() {
        // -1 to 6.5 in steps of 0.5: zero is at level 2, and all are exact.
        let mut values = [0.0; 32];
        values[..8].copy_from_slice(&[-1.0, 6.5, 0.0, 0.5, -0.5, 3.0, 6.0, 1.0]);
        let format = Format::Int4Zeros { group: 32 };
        let matrix = packed(&values, 1, format);
        assert_eq!((&matrix.scales, &matrix.zeros), (&vec![0.5], &vec![2.0]));
        assert_eq!(matrix.words[0] as u32, 0x4e_81_32_f0);
        assert_eq!(matrix.words[1] as u32, 0x22_22_22_22);
        assert_eq!(unpack(&matrix, 32, format), values);
        // Values that are all positive still have a zero among them.
        let matrix = packed(&[3.0; 32], 1, format);
        assert_eq!(matrix.zeros, [0.0]);
        assert!((unpack(&matrix, 32, format)[5] - 3.0).abs() < 2e-3);
    }

    #[test]
    fn levels_that_are_given_are_those_that_come_back() {
        for format in [
            Format::Int8,
            Format::Int4 { group: 32 },
            Format::Int4Zeros { group: 32 },
        ] {
            let most = 1 << format.bits();
            let level = |row: usize, at: usize| ((7 * at + 3 * row) % most) as u32;
            let matrix =
                QuantisedMatrix::from_levels(3, 40, format, |row, levels, scales, zeros| {
                    for (at, out) in levels.iter_mut().enumerate() {
                        *out = level(row, at);
                    }
                    scales.fill(0.5 + row as f32);
                    zeros.fill(row as f32);
                });
            assert_eq!(matrix.zeros.is_empty(), format.is_symmetric());
            let zero = |row: usize| match format.is_symmetric() {
                true => format.offset() as f32,
                false => row as f32,
            };
            for (at, value) in unpack(&matrix, 40, format).into_iter().enumerate() {
                let (row, at) = (at / 40, at % 40);
                let want = (level(row, at) as f32 - zero(row)) * (0.5 + row as f32);
                assert_eq!(value, want, "{format} {row} {at}");
            }
        }
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
            Format::Int4Zeros { group: 64 },
        ] {
            let matrix = packed(&values, 3, format);
            assert_eq!(matrix.words.len(), 3 * format.words(40));
            assert_eq!(matrix.scales.len(), 3 * format.scales(40));
            assert!(error(&values, 3, format) < 0.11);
        }
    }

    #[test]
    fn zero_rows_stay_zero() {
        for format in [
            Format::Int8,
            Format::Int4 { group: 64 },
            Format::Int4Zeros { group: 64 },
        ] {
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

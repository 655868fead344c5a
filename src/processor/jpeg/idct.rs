//! Coefficients to levels by the exact integer inverse DCT of libjpeg.
//!
//! Source: `jpeg_idct_islow`, libjpeg-turbo, `jidctint.c`, after Loeffler, Ligtenberg and Moschytz.

/// Bits after the point of the constants.
const CONST_BITS: u32 = 13;

const FIX_0_298631336: i64 = 2446;
const FIX_0_390180644: i64 = 3196;
const FIX_0_541196100: i64 = 4433;
const FIX_0_765366865: i64 = 6270;
const FIX_0_899976223: i64 = 7373;
const FIX_1_175875602: i64 = 9633;
const FIX_1_501321110: i64 = 12299;
const FIX_1_847759065: i64 = 15137;
const FIX_1_961570560: i64 = 16069;
const FIX_2_053119869: i64 = 16819;
const FIX_2_562915447: i64 = 20995;
const FIX_3_072711026: i64 = 25172;

/// Levels `[height, width]` of a component of `(width, height)` pixels, whose blocks come in rows of
/// `stride`.
pub(super) fn plane(
    coefficients: &[i16],
    stride: usize,
    (width, height): (usize, usize),
    quantization: &[u16; 64],
    precision: u8,
) -> Vec<u16> {
    let mut levels = vec![0; width * height];
    let blocks = coefficients.as_chunks::<64>().0;
    for (row, lines) in levels.chunks_mut(8 * width).enumerate() {
        for column in 0..width.div_ceil(8) {
            let block = block(&blocks[row * stride + column], quantization, precision);
            let from = 8 * column;
            let count = (width - from).min(8);
            for (line, values) in lines.chunks_mut(width).zip(block.as_chunks::<8>().0) {
                line[from..from + count].copy_from_slice(&values[..count]);
            }
        }
    }
    levels
}

fn block(coefficients: &[i16; 64], quantization: &[u16; 64], precision: u8) -> [u16; 64] {
    // Bits kept between the two passes.
    let pass_bits = if precision == 8 { 2 } else { 1 };
    let mut values: [i64; 64] =
        std::array::from_fn(|at| i64::from(coefficients[at]) * i64::from(quantization[at]));
    for column in 0..8 {
        let line = std::array::from_fn(|row| values[row * 8 + column]);
        let line = pass(line, CONST_BITS - pass_bits);
        for (row, value) in line.into_iter().enumerate() {
            values[row * 8 + column] = value;
        }
    }
    let top = (1_i64 << precision) - 1;
    let center = 1_i64 << (precision - 1);
    let mut levels = [0; 64];
    for (line, target) in values
        .as_chunks::<8>()
        .0
        .iter()
        .zip(levels.as_chunks_mut::<8>().0)
    {
        let line = pass(*line, CONST_BITS + pass_bits + 3);
        *target = line.map(|value| (value + center).clamp(0, top) as u16);
    }
    levels
}

/// Eight values through the inverse DCT, rounded by `shift` bits.
fn pass(x: [i64; 8], shift: u32) -> [i64; 8] {
    let z1 = (x[2] + x[6]) * FIX_0_541196100;
    let even2 = z1 - x[6] * FIX_1_847759065;
    let even3 = z1 + x[2] * FIX_0_765366865;
    let even0 = (x[0] + x[4]) << CONST_BITS;
    let even1 = (x[0] - x[4]) << CONST_BITS;
    let even = [even0 + even3, even1 + even2, even1 - even2, even0 - even3];
    let z5 = (x[7] + x[3] + x[5] + x[1]) * FIX_1_175875602;
    let z1 = -(x[7] + x[1]) * FIX_0_899976223;
    let z2 = -(x[5] + x[3]) * FIX_2_562915447;
    let z3 = -(x[7] + x[3]) * FIX_1_961570560 + z5;
    let z4 = -(x[5] + x[1]) * FIX_0_390180644 + z5;
    let odd = [
        x[1] * FIX_1_501321110 + z1 + z4,
        x[3] * FIX_3_072711026 + z2 + z3,
        x[5] * FIX_2_053119869 + z2 + z4,
        x[7] * FIX_0_298631336 + z1 + z3,
    ];
    let round = |value: i64| (value + (1 << (shift - 1))) >> shift;
    std::array::from_fn(|at| {
        if at < 4 {
            round(even[at] + odd[at])
        } else {
            round(even[7 - at] - odd[7 - at])
        }
    })
}

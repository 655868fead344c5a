//! Dequantised rows as floats, and rows padded as quantised ones are.

use cubecl::prelude::*;

/// Rows of a matrix as floats: a unit a word. `y` `[rows, in]`, `in` a multiple of four.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn unpack<F: Float, S: Numeric>(
    words: &Array<u32>,
    scales: &Array<S>,
    y: &mut Array<Vector<F, Const<4>>>,
    start: usize,
    count: usize,
    words_row: usize,
    group_words: usize,
    d_input: usize,
    #[comptime] bits: u32,
    #[define(F, S)] _types: [StorageType; 2],
) {
    let per_word = comptime!(32 / bits as usize);
    let row = ABSOLUTE_POS / words_row;
    let at = ABSOLUTE_POS % words_row;
    if row < count {
        let source = row + start;
        let word = words[source * words_row + at];
        let groups = words_row / group_words;
        let scale = f32::cast_from(scales[source * groups + at / group_words]);
        #[unroll]
        for quad in 0..comptime!(per_word / 4) {
            let input = at * per_word + comptime!(4 * quad);
            if input < d_input {
                let mut values = Vector::<F, Const<4>>::empty();
                #[unroll]
                for c in 0..4usize {
                    let shift = comptime!(bits * (4 * quad + c) as u32);
                    let level = (word >> shift) & comptime!((1u32 << bits) - 1);
                    let level = f32::cast_from(level) - comptime!((1u32 << (bits - 1)) as f32);
                    values[c] = F::cast_from(level * scale);
                }
                y[(row * d_input + input) / 4] = values;
            }
        }
    }
}

/// Rows of `d_input` elements followed by zeros up to `padded`: a unit an element of `y`.
#[cube(launch_unchecked)]
pub(super) fn pad_rows<F: Numeric>(
    x: &Array<F>,
    y: &mut Array<F>,
    d_input: usize,
    padded: usize,
    count: usize,
    #[define(F)] _type: StorageType,
) {
    if ABSOLUTE_POS < count {
        let row = ABSOLUTE_POS / padded;
        let input = ABSOLUTE_POS % padded;
        let mut value = F::from_int(0);
        if input < d_input {
            value = x[row * d_input + input];
        }
        y[ABSOLUTE_POS] = value;
    }
}

//! The kernels behind [`super::quantized`].

use cubecl::prelude::*;

/// What a kernel over packed words is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// Bits of a value.
    pub(super) bits: u32,
    /// Rows of the input.
    pub(super) rows: u32,
    /// Output channels of a plane.
    pub(super) outputs: u32,
    /// What is added: a bias `[out]`,
    pub(super) bias: bool,
    /// Of `[rows, out]`.
    pub(super) residual: bool,
    /// Of a rank.
    pub(super) adapter: bool,
    /// Whether results end at the largest finite f16.
    pub(super) saturate: bool,
}

/// `y = x Wᵀ (+ bias) (+ residual) (+ low Bᵀ)`.
///
/// `x` `[rows, in]`, `words` `[out, vectors]`, `scales` `[out, groups]`, `bias` `[out]`, `residual` and
/// `y` `[rows, out]`, `low` `[rows, rank]` scaled already, `up` `[out, rank]`. All are compact.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn product<F: Float, S: Float, O: Float>(
    x: &Array<Vector<F, Const<4>>>,
    words: &Array<Vector<u32, Const<4>>>,
    scales: &Array<S>,
    bias: &Array<F>,
    residual: &Array<F>,
    low: &Array<f32>,
    up: &Array<f32>,
    y: &mut Array<O>,
    out: u32,
    vectors: u32,
    group_vectors: u32,
    rank: u32,
    #[comptime] shape: Shape,
    #[define(F, S, O)] _dtypes: [StorageType; 3],
) {
    let outputs = comptime!(shape.outputs as usize);
    let rows = comptime!(shape.rows as usize);
    let per_word = comptime!(32 / shape.bits as usize);
    let quads = comptime!(32 / shape.bits as usize / 4);
    let mask = comptime!((1u32 << shape.bits) - 1);
    let offset = comptime!((1u32 << (shape.bits - 1)) as f32);

    let out = out as usize;
    let vectors = vectors as usize;
    let groups = vectors / group_vectors as usize;
    let planes = (CUBE_DIM / PLANE_DIM) as usize;
    let lane = UNIT_POS_PLANE as usize;
    let stride = CUBE_COUNT * planes * outputs;
    let mut first = (CUBE_POS * planes + PLANE_POS as usize) * outputs;

    while first < out {
        let mut sums = Array::<f32>::new(comptime!(rows * outputs));
        #[unroll]
        for i in 0..comptime!(rows * outputs) {
            sums[i] = 0.0f32;
        }
        for at in range_stepped(lane, vectors, PLANE_DIM as usize) {
            let mut packed = Array::<Vector<u32, Const<4>>>::new(outputs);
            let mut dots = Array::<f32>::new(comptime!(rows * outputs));
            let mut totals = Array::<f32>::new(rows);
            #[unroll]
            for o in 0..outputs {
                packed[o] = words[clamp_max(first + o, out - 1) * vectors + at];
            }
            #[unroll]
            for i in 0..comptime!(rows * outputs) {
                dots[i] = 0.0f32;
            }
            #[unroll]
            for row in 0..rows {
                totals[row] = 0.0f32;
            }
            #[unroll]
            for word in 0..4usize {
                let mut levels = Array::<f32>::new(comptime!(outputs * per_word));
                #[unroll]
                for o in 0..outputs {
                    #[unroll]
                    for place in 0..per_word {
                        let place_mask = comptime!(mask << (shape.bits * place as u32));
                        levels[comptime!(o * per_word + place)] =
                            f32::cast_from(packed[o][word] & place_mask);
                    }
                }
                #[unroll]
                for row in 0..rows {
                    #[unroll]
                    for quad in 0..quads {
                        let values = x[(row * vectors + at) * comptime!(4 * quads)
                            + comptime!(word * quads + quad)];
                        #[unroll]
                        for c in 0..4usize {
                            let place = comptime!(4 * quad + c);
                            let value = f32::cast_from(values[c]);
                            totals[row] += value;
                            let shrink =
                                comptime!((-((shape.bits as usize * place) as f32)).exp2());
                            let value = value * shrink;
                            #[unroll]
                            for o in 0..outputs {
                                let sum = comptime!(row * outputs + o);
                                dots[sum] =
                                    fma(value, levels[comptime!(o * per_word + place)], dots[sum]);
                            }
                        }
                    }
                }
            }
            #[unroll]
            for o in 0..outputs {
                let group = clamp_max(first + o, out - 1) * groups + at / group_vectors as usize;
                let scale = f32::cast_from(scales[group]);
                #[unroll]
                for row in 0..rows {
                    let sum = comptime!(row * outputs + o);
                    sums[sum] += scale * (dots[sum] - offset * totals[row]);
                }
            }
        }
        if comptime!(shape.adapter) {
            for r in range_stepped(lane, rank as usize, PLANE_DIM as usize) {
                #[unroll]
                for o in 0..outputs {
                    let factor = up[clamp_max(first + o, out - 1) * rank as usize + r];
                    #[unroll]
                    for row in 0..rows {
                        sums[comptime!(row * outputs + o)] += factor * low[row * rank as usize + r];
                    }
                }
            }
        }
        #[unroll]
        for o in 0..outputs {
            #[unroll]
            for row in 0..rows {
                let mut sum = plane_sum(sums[comptime!(row * outputs + o)]);
                let channel = first + o;
                if lane == 0 && channel < out {
                    if comptime!(shape.bias) {
                        sum += f32::cast_from(bias[channel]);
                    }
                    if comptime!(shape.residual) {
                        sum += f32::cast_from(residual[row * out + channel]);
                    }
                    if comptime!(shape.saturate) {
                        sum = clamp(sum, -65504.0f32, 65504.0f32);
                    }
                    y[row * out + channel] = O::cast_from(sum);
                }
            }
        }
        first += stride;
    }
}

/// `low = scaling · x Aᵀ`: `x` `[rows, in]`, `a` `[rank, in]`, `low` `[rows, rank]`; a plane a rank.
#[cube(launch_unchecked)]
pub(super) fn low_rank<F: Float>(
    x: &Array<Vector<F, Const<4>>>,
    a: &Array<Vector<f32, Const<4>>>,
    low: &mut Array<f32>,
    rank: u32,
    quads: u32,
    scaling: f32,
    #[comptime] rows: u32,
    #[define(F)] _dtype: StorageType,
) {
    let quads = quads as usize;
    let rank = rank as usize;
    let rows = comptime!(rows as usize);
    let planes = (CUBE_DIM / PLANE_DIM) as usize;
    let lane = UNIT_POS_PLANE as usize;
    let mut r = CUBE_POS * planes + PLANE_POS as usize;
    while r < rank {
        let mut sums = Array::<f32>::new(rows);
        #[unroll]
        for row in 0..rows {
            sums[row] = 0.0f32;
        }
        for at in range_stepped(lane, quads, PLANE_DIM as usize) {
            let factors = a[r * quads + at];
            #[unroll]
            for row in 0..rows {
                let values = x[row * quads + at];
                #[unroll]
                for c in 0..4usize {
                    sums[row] = fma(f32::cast_from(values[c]), factors[c], sums[row]);
                }
            }
        }
        #[unroll]
        for row in 0..rows {
            let sum = plane_sum(sums[row]);
            if lane == 0 {
                low[row * rank + r] = sum * scaling;
            }
        }
        r += CUBE_COUNT * planes;
    }
}

/// Rows of a matrix as floats: a unit a word. `y` `[rows, in]`, `in` a multiple of four.
#[cube(launch_unchecked)]
pub(super) fn unpack<F: Float, S: Float>(
    words: &Array<u32>,
    scales: &Array<S>,
    y: &mut Array<Vector<F, Const<4>>>,
    start: u32,
    count: u32,
    words_row: u32,
    group_words: u32,
    d_input: u32,
    #[comptime] bits: u32,
    #[define(F, S)] _dtypes: [StorageType; 2],
) {
    let per_word = comptime!(32 / bits as usize);
    let words_row = words_row as usize;
    let d_input = d_input as usize;
    let row = ABSOLUTE_POS / words_row;
    let at = ABSOLUTE_POS % words_row;
    if row < count as usize {
        let source = row + start as usize;
        let word = words[source * words_row + at];
        let groups = words_row / group_words as usize;
        let scale = f32::cast_from(scales[source * groups + at / group_words as usize]);
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

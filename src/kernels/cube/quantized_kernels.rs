//! The kernels behind [`super::quantized`].

use cubecl::prelude::*;

use super::{
    sums::{Group, group_sum},
    words::{Packing, Piece, pair, within},
};

/// What a kernel over packed words is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// Bits of a value.
    pub bits: usize,
    /// Rows of the input.
    pub rows: usize,
    /// Outputs of a group of units.
    pub outputs: usize,
    /// Loads in flight of each row of the matrix.
    pub ahead: usize,
    /// Sixteen-byte pieces of a row of the matrix.
    pub vectors: usize,
    /// Pieces that share a scale.
    pub group_vectors: usize,
    /// Units that work on some outputs together.
    pub group: Group,
    /// Groups of a cube.
    pub groups: usize,
    /// How the input is stored.
    pub packing: Packing,
    /// Whether a norm comes before the product.
    pub norm: bool,
    /// Whether a bias is added.
    pub bias: bool,
    /// Whether a residual is added.
    pub residual: bool,
    /// Whether a low-rank share is added.
    pub adapter: bool,
}

impl Form {
    /// Pieces of the input that a piece of the matrix is multiplied with.
    pub(super) fn pieces(&self) -> usize {
        128 / self.bits / self.packing.piece()
    }

    /// Scales of a row of the matrix.
    fn scales(&self) -> usize {
        self.vectors / self.group_vectors
    }

    /// Where a value of a piece of the matrix stands: its word, and its lowest bit there.
    fn place(&self, value: usize) -> (usize, usize) {
        let per_word = 32 / self.bits;
        (value / per_word, value % per_word * self.bits)
    }

    /// The bits of a value that stands there.
    fn mask(&self, value: usize) -> u32 {
        ((1 << self.bits) - 1) << self.place(value).1
    }

    /// What takes the place of shifting the value down.
    fn shrink(&self, value: usize) -> f32 {
        (-(self.place(value).1 as f32)).exp2()
    }

    /// What levels are stored with.
    fn offset(&self) -> f32 {
        (1 << (self.bits - 1)) as f32
    }
}

/// Adds the products of one step of the group: `ahead` pieces of each row, the first at `at`.
///
/// A level masked out where it stands is `2^bit` times itself, so the input is scaled by `2^-bit`; the
/// offset of the levels is taken off by one product with the sum of the inputs.
#[cube]
#[allow(clippy::too_many_arguments)]
fn add_step<S: Numeric>(
    x: &Array<Piece>,
    norm: &Array<Piece>,
    words: &Array<Piece>,
    scales: &Array<S>,
    channels: &Array<usize>,
    at: usize,
    sums: &mut Array<f32>,
    squares: &mut Array<f32>,
    #[comptime] ahead: usize,
    #[comptime] form: Form,
) {
    let lanes = comptime!(form.group.lanes);
    let outputs = comptime!(form.outputs);
    let pieces = comptime!(form.pieces());
    let width = comptime!(form.packing.piece());
    let mut loaded = Array::<Piece>::new(comptime!(ahead * form.outputs));
    let mut factors = Array::<f32>::new(comptime!(ahead * form.outputs));
    #[unroll]
    for step in 0..ahead {
        let place = at + step * lanes;
        #[unroll]
        for output in 0..outputs {
            let channel = channels[output];
            loaded[step * outputs + output] = words[channel * form.vectors + place];
            let group = channel * comptime!(form.scales()) + place / form.group_vectors;
            factors[step * outputs + output] = f32::cast_from(scales[group]);
        }
    }
    #[unroll]
    for step in 0..ahead {
        let place = at + step * lanes;
        let mut dots = Array::<f32>::new(comptime!(form.rows * form.outputs));
        let mut totals = Array::<f32>::new(comptime!(form.rows));
        #[unroll]
        for row in 0..form.rows {
            totals[row] = 0.0f32;
            #[unroll]
            for output in 0..outputs {
                dots[row * outputs + output] = 0.0f32;
            }
        }
        #[unroll]
        for piece in 0..pieces {
            let mut levels = Array::<f32>::new(comptime!(form.outputs * form.packing.piece()));
            #[unroll]
            for output in 0..outputs {
                #[unroll]
                for index in 0..width {
                    let word = comptime!(form.place(piece * width + index).0);
                    let mask = comptime!(form.mask(piece * width + index));
                    levels[output * width + index] =
                        f32::cast_from(loaded[step * outputs + output][word] & mask);
                }
            }
            #[unroll]
            for row in 0..form.rows {
                let from = (row * form.vectors + place) * pieces + piece;
                let values = x[from];
                #[unroll]
                for index in 0..form.packing.pairs() {
                    let mut value = pair(values, index, form.packing);
                    if form.norm {
                        squares[row] = fma(value[0], value[0], squares[row]);
                        squares[row] = fma(value[1], value[1], squares[row]);
                        value *= pair(norm[place * pieces + piece], index, form.packing);
                    }
                    #[unroll]
                    for half in 0..2usize {
                        totals[row] += value[half];
                        let shrink = comptime!(form.shrink(piece * width + 2 * index + half));
                        let shrunk = value[half] * shrink;
                        #[unroll]
                        for output in 0..outputs {
                            let dot = dots[row * outputs + output];
                            let level = levels[output * width + 2 * index + half];
                            dots[row * outputs + output] = fma(shrunk, level, dot);
                        }
                    }
                }
            }
        }
        #[unroll]
        for row in 0..form.rows {
            let below = comptime!(form.offset()) * totals[row];
            #[unroll]
            for output in 0..outputs {
                let sum = sums[row * outputs + output];
                let dot = dots[row * outputs + output] - below;
                sums[row * outputs + output] = fma(factors[step * outputs + output], dot, sum);
            }
        }
    }
}

/// The group's products with the outputs from `first` on. Each unit gets one: that of row
/// `lane / outputs` and output `first + lane % outputs`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn products<S: Numeric>(
    x: &Array<Piece>,
    norm: &Array<Piece>,
    words: &Array<Piece>,
    scales: &Array<S>,
    low: &Array<f32>,
    up: &Array<f32>,
    first: usize,
    width: usize,
    rank: usize,
    epsilon: f32,
    #[comptime] form: Form,
) -> f32 {
    let lanes = comptime!(form.group.lanes);
    let outputs = comptime!(form.outputs);
    let lane = UNIT_POS as usize % lanes;
    let mut sums = Array::<f32>::new(comptime!(form.rows * form.outputs));
    let mut squares = Array::<f32>::new(comptime!(form.rows));
    let mut channels = Array::<usize>::new(outputs);
    #[unroll]
    for output in 0..outputs {
        // Outputs behind the last repeat it; nobody writes them.
        channels[output] = min(first + output, width - 1);
    }
    #[unroll]
    for row in 0..form.rows {
        squares[row] = 0.0f32;
        #[unroll]
        for output in 0..outputs {
            sums[row * outputs + output] = 0.0f32;
        }
    }
    let step = comptime!(form.ahead * form.group.lanes);
    let whole = comptime!(form.vectors / step * step);
    for round in 0..comptime!(form.vectors / step) {
        add_step(
            x,
            norm,
            words,
            scales,
            &channels,
            round * step + lane,
            &mut sums,
            &mut squares,
            form.ahead,
            form,
        );
    }
    #[unroll]
    for rest in 0..comptime!((form.vectors - whole).div_ceil(form.group.lanes)) {
        let at = whole + rest * lanes + lane;
        if at < form.vectors {
            add_step(
                x,
                norm,
                words,
                scales,
                &channels,
                at,
                &mut sums,
                &mut squares,
                1usize,
                form,
            );
        }
    }
    if form.adapter {
        for r in range_stepped(lane, rank, lanes) {
            #[unroll]
            for output in 0..outputs {
                let factor = up[channels[output] * rank + r];
                #[unroll]
                for row in 0..form.rows {
                    let sum = sums[row * outputs + output];
                    sums[row * outputs + output] = fma(factor, low[row * rank + r], sum);
                }
            }
        }
    }
    let mut mine = 0.0f32;
    #[unroll]
    for row in 0..form.rows {
        let mut root = 1.0f32;
        if form.norm {
            let count = comptime!((form.vectors * 128 / form.bits) as f32);
            let mean = group_sum(squares[row], form.group) / count;
            root = 1.0f32 / (mean + epsilon).sqrt();
        }
        #[unroll]
        for output in 0..outputs {
            let sum = group_sum(sums[row * outputs + output], form.group) * root;
            mine = select(lane == row * outputs + output, sum, mine);
        }
    }
    mine
}

/// The first output of this unit's group.
#[cube]
fn first_output(#[comptime] form: Form) -> usize {
    let group = UNIT_POS as usize / comptime!(form.group.lanes);
    (CUBE_POS * form.groups + group) * form.outputs
}

/// `y = norm(x) Wᵀ (+ bias) (+ residual) (+ low Bᵀ)`; `low` `[rows, rank]` scaled already, `up` `[out, rank]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn one_matrix<S: Numeric, O: Numeric>(
    x: &Array<Piece>,
    norm: &Array<Piece>,
    words: &Array<Piece>,
    scales: &Array<S>,
    bias: &Array<O>,
    residual: &Array<O>,
    low: &Array<f32>,
    up: &Array<f32>,
    y: &mut Array<O>,
    width: usize,
    rank: usize,
    epsilon: f32,
    #[comptime] form: Form,
    #[comptime] out: Packing,
    #[define(S, O)] _types: [StorageType; 2],
) {
    let first = first_output(form);
    let mut value = products(
        x, norm, words, scales, low, up, first, width, rank, epsilon, form,
    );
    let lane = UNIT_POS as usize % comptime!(form.group.lanes);
    let column = first + lane % form.outputs;
    if lane < comptime!(form.rows * form.outputs) && column < width {
        let at = lane / form.outputs * width + column;
        if form.bias {
            value += f32::cast_from(bias[column]);
        }
        if form.residual {
            value += f32::cast_from(residual[at]);
        }
        y[at] = O::cast_from(within(value, out));
    }
}

/// Three products of one normed input side by side.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn three_matrices<S: Numeric, O: Numeric>(
    x: &Array<Piece>,
    norm: &Array<Piece>,
    first_words: &Array<Piece>,
    first_scales: &Array<S>,
    second_words: &Array<Piece>,
    second_scales: &Array<S>,
    third_words: &Array<Piece>,
    third_scales: &Array<S>,
    none: &Array<f32>,
    y: &mut Array<O>,
    first_width: usize,
    second_width: usize,
    third_width: usize,
    epsilon: f32,
    #[comptime] form: Form,
    #[define(S, O)] _types: [StorageType; 2],
) {
    let width = first_width + second_width + third_width;
    let first = first_output(form);
    // The widths are multiples of a group's outputs, so a group has one matrix.
    let value = if first < first_width {
        products(
            x,
            norm,
            first_words,
            first_scales,
            none,
            none,
            first,
            first_width,
            0usize,
            epsilon,
            form,
        )
    } else if first < first_width + second_width {
        products(
            x,
            norm,
            second_words,
            second_scales,
            none,
            none,
            first - first_width,
            second_width,
            0usize,
            epsilon,
            form,
        )
    } else {
        products(
            x,
            norm,
            third_words,
            third_scales,
            none,
            none,
            first - first_width - second_width,
            third_width,
            0usize,
            epsilon,
            form,
        )
    };
    let lane = UNIT_POS as usize % comptime!(form.group.lanes);
    let column = first + lane % form.outputs;
    if lane < comptime!(form.rows * form.outputs) && column < width {
        let at = lane / form.outputs * width + column;
        y[at] = O::cast_from(within(value, form.packing));
    }
}

/// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn gated_matrices<S: Numeric, O: Numeric>(
    x: &Array<Piece>,
    norm: &Array<Piece>,
    gate_words: &Array<Piece>,
    gate_scales: &Array<S>,
    up_words: &Array<Piece>,
    up_scales: &Array<S>,
    none: &Array<f32>,
    y: &mut Array<O>,
    width: usize,
    epsilon: f32,
    #[comptime] form: Form,
    #[define(S, O)] _types: [StorageType; 2],
) {
    let first = first_output(form);
    let gate = products(
        x,
        norm,
        gate_words,
        gate_scales,
        none,
        none,
        first,
        width,
        0usize,
        epsilon,
        form,
    );
    let up = products(
        x, norm, up_words, up_scales, none, none, first, width, 0usize, epsilon, form,
    );
    let lane = UNIT_POS as usize % comptime!(form.group.lanes);
    let column = first + lane % form.outputs;
    if lane < comptime!(form.rows * form.outputs) && column < width {
        let value = gate / (1.0f32 + (-gate).exp()) * up;
        y[lane / form.outputs * width + column] = O::cast_from(within(value, form.packing));
    }
}

/// `low = scaling · x Aᵀ`: `x` `[rows, in]`, `a` `[rank, in]`, `low` `[rows, rank]`; a group of units a
/// rank. `in` is a multiple of a piece of the input.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn low_rank(
    x: &Array<Piece>,
    a: &Array<Vector<f32, Const<4>>>,
    low: &mut Array<f32>,
    rank: usize,
    pieces: usize,
    scaling: f32,
    #[comptime] rows: usize,
    #[comptime] group: Group,
    #[comptime] groups: usize,
    #[comptime] packing: Packing,
) {
    let lanes = comptime!(group.lanes);
    let lane = UNIT_POS as usize % lanes;
    let r = CUBE_POS * groups + UNIT_POS as usize / lanes;
    let from = min(r, rank - 1);
    let quads = comptime!(packing.piece() / 4);
    let mut sums = Array::<f32>::new(rows);
    #[unroll]
    for row in 0..rows {
        sums[row] = 0.0f32;
    }
    for at in range_stepped(lane, pieces, lanes) {
        #[unroll]
        for row in 0..rows {
            let values = x[row * pieces + at];
            #[unroll]
            for index in 0..packing.pairs() {
                let value = pair(values, index, packing);
                let factors = a[(from * pieces + at) * quads + comptime!(index / 2)];
                #[unroll]
                for half in 0..2usize {
                    let factor = factors[comptime!(index % 2 * 2 + half)];
                    sums[row] = fma(value[half], factor, sums[row]);
                }
            }
        }
    }
    #[unroll]
    for row in 0..rows {
        let sum = group_sum(sums[row], group);
        if lane == 0 && r < rank {
            low[row * rank + r] = sum * scaling;
        }
    }
}

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

/// Rows of `d_input` elements with zeros behind them up to `padded`: a unit an element of `y`.
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

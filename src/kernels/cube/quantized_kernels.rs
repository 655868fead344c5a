//! The kernels behind [`super::quantized`].

use cubecl::prelude::*;

use super::{
    sums::{Group, group_sum},
    words::{Packing, Piece, pair, within},
};

/// Four inputs, as they are stored.
pub(super) type Quad<F> = Vector<F, Const<4>>;

/// Where the outputs of a group of units come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Matrices {
    /// One matrix.
    One,
    /// The first half from one matrix, the second half, of the same columns, from another.
    Pair,
    /// One of three that stand side by side.
    Three,
}

/// What a kernel over packed words is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Form {
    /// Bits of a value.
    pub bits: usize,
    /// Rows of the input.
    pub rows: usize,
    /// Matrices of the product.
    pub matrices: Matrices,
    /// Outputs of a group of units, of all its matrices.
    pub outputs: usize,
    /// Sixteen-byte pieces of a row of the matrix.
    pub vectors: usize,
    /// Pieces that share a scale.
    pub group_vectors: usize,
    /// Units that work on some outputs together.
    pub group: Group,
    /// Groups of a cube.
    pub groups: usize,
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
    /// Columns of the result that a group of units works out.
    pub(super) fn columns(&self) -> usize {
        match self.matrices {
            Matrices::Pair => self.outputs / 2,
            Matrices::One | Matrices::Three => self.outputs,
        }
    }

    /// Quads of the input that a piece of the matrix is multiplied with.
    fn quads(&self) -> usize {
        128 / self.bits / 4
    }

    /// Scales of a row of the matrix.
    fn scales(&self) -> usize {
        self.vectors / self.group_vectors
    }

    /// Word of a piece in which the values of a quad stand.
    fn word(&self, quad: usize) -> usize {
        4 * quad * self.bits / 32
    }

    /// Lowest bit of a value of a quad there.
    fn bit(&self, quad: usize, value: usize) -> usize {
        (4 * quad + value) * self.bits % 32
    }

    /// The bits of a value of a quad there.
    fn mask(&self, quad: usize, value: usize) -> u32 {
        ((1 << self.bits) - 1) << self.bit(quad, value)
    }

    /// What takes the place of shifting the value down.
    fn shrink(&self, quad: usize, value: usize) -> f32 {
        (-(self.bit(quad, value) as f32)).exp2()
    }

    /// What levels are stored with.
    fn offset(&self) -> f32 {
        (1 << (self.bits - 1)) as f32
    }
}

/// Loads piece number `at` and its scale for the outputs from `from` up to `to`.
#[cube]
#[allow(clippy::too_many_arguments)]
fn load<S: Numeric>(
    words: &Array<Piece>,
    scales: &Array<S>,
    channels: &Array<usize>,
    at: usize,
    loaded: &mut Array<Piece>,
    factors: &mut Array<f32>,
    #[comptime] from: usize,
    #[comptime] to: usize,
    #[comptime] form: Form,
) {
    #[unroll]
    for output in from..to {
        let channel = channels[output];
        loaded[output] = words[channel * form.vectors + at];
        let group = channel * comptime!(form.scales()) + at / form.group_vectors;
        factors[output] = f32::cast_from(scales[group]);
    }
}

/// Adds the products with piece number `at` of each row.
///
/// A level masked out where it stands is `2^bit` times itself, so the input is scaled by `2^-bit`; the
/// offset of the levels is taken off by one product with the sum of the inputs. Operations are on four
/// values each and the code is there once, whatever the matrices: drivers take seconds over long kernels,
/// and loads further ahead were not faster.
#[cube]
#[allow(clippy::too_many_arguments)]
fn add_step<S: Numeric, F: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
    words: &Array<Piece>,
    scales: &Array<S>,
    second_words: &Array<Piece>,
    second_scales: &Array<S>,
    third_words: &Array<Piece>,
    third_scales: &Array<S>,
    matrix: usize,
    channels: &Array<usize>,
    at: usize,
    sums: &mut Array<f32>,
    squares: &mut Array<f32>,
    #[comptime] form: Form,
) {
    let outputs = comptime!(form.outputs);
    let half = comptime!(form.outputs / 2);
    let mut loaded = Array::<Piece>::new(outputs);
    let mut factors = Array::<f32>::new(outputs);
    let (l, f) = (&mut loaded, &mut factors);
    if comptime!(form.matrices == Matrices::One) {
        load(words, scales, channels, at, l, f, 0usize, outputs, form);
    } else if comptime!(form.matrices == Matrices::Pair) {
        load(words, scales, channels, at, l, f, 0usize, half, form);
        load(
            second_words,
            second_scales,
            channels,
            at,
            l,
            f,
            half,
            outputs,
            form,
        );
    } else if matrix == 0 {
        load(words, scales, channels, at, l, f, 0usize, outputs, form);
    } else if matrix == 1 {
        load(
            second_words,
            second_scales,
            channels,
            at,
            l,
            f,
            0usize,
            outputs,
            form,
        );
    } else {
        load(
            third_words,
            third_scales,
            channels,
            at,
            l,
            f,
            0usize,
            outputs,
            form,
        );
    }
    let ones = Vector::<f32, Const<4>>::new(1.0f32);
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
    for quad in 0..form.quads() {
        let mut mask = Vector::<u32, Const<4>>::empty();
        let mut shrink = Vector::<f32, Const<4>>::empty();
        #[unroll]
        for value in 0..4usize {
            mask[value] = comptime!(form.mask(quad, value));
            shrink[value] = comptime!(form.shrink(quad, value));
        }
        let mut levels = Array::<Vector<f32, Const<4>>>::new(outputs);
        #[unroll]
        for output in 0..outputs {
            let word = loaded[output][comptime!(form.word(quad))];
            let masked = Vector::<u32, Const<4>>::new(word) & mask;
            levels[output] = Vector::<f32, Const<4>>::cast_from(masked);
        }
        #[unroll]
        for row in 0..form.rows {
            let from = (row * form.vectors + at) * comptime!(form.quads()) + quad;
            let mut values = Vector::<f32, Const<4>>::cast_from(x[from]);
            if form.norm {
                squares[row] += values.dot(values);
                values *=
                    Vector::<f32, Const<4>>::cast_from(norm[at * comptime!(form.quads()) + quad]);
            }
            totals[row] += values.dot(ones);
            let shrunk = values * shrink;
            #[unroll]
            for output in 0..outputs {
                dots[row * outputs + output] += shrunk.dot(levels[output]);
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
            sums[row * outputs + output] = fma(factors[output], dot, sum);
        }
    }
}

/// The group's products with the columns from `first` on of matrix number `matrix`. Each unit gets that
/// of row `lane / columns` and column `first + lane % columns`, and where there are two matrices, the
/// second's behind it.
#[cube]
#[allow(clippy::too_many_arguments)]
fn products<S: Numeric, F: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
    words: &Array<Piece>,
    scales: &Array<S>,
    second_words: &Array<Piece>,
    second_scales: &Array<S>,
    third_words: &Array<Piece>,
    third_scales: &Array<S>,
    low: &Array<f32>,
    up: &Array<f32>,
    matrix: usize,
    first: usize,
    width: usize,
    rank: usize,
    epsilon: f32,
    #[comptime] form: Form,
) -> Vector<f32, Const<2>> {
    let lanes = comptime!(form.group.lanes);
    let outputs = comptime!(form.outputs);
    let columns = comptime!(form.columns());
    let lane = UNIT_POS as usize % lanes;
    let mut sums = Array::<f32>::new(comptime!(form.rows * form.outputs));
    let mut squares = Array::<f32>::new(comptime!(form.rows));
    let mut channels = Array::<usize>::new(outputs);
    #[unroll]
    for output in 0..outputs {
        // Columns behind the last repeat it; nobody writes them.
        channels[output] = min(first + comptime!(output % columns), width - 1);
    }
    #[unroll]
    for row in 0..form.rows {
        squares[row] = 0.0f32;
        #[unroll]
        for output in 0..outputs {
            sums[row * outputs + output] = 0.0f32;
        }
    }
    for at in range_stepped(lane, form.vectors, lanes) {
        add_step(
            x,
            norm,
            words,
            scales,
            second_words,
            second_scales,
            third_words,
            third_scales,
            matrix,
            &channels,
            at,
            &mut sums,
            &mut squares,
            form,
        );
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
    let mut mine = Vector::<f32, Const<2>>::new(0.0f32);
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
            let place = comptime!(output / columns);
            let is_mine = lane == comptime!(row * columns + output % columns);
            mine[place] = select(is_mine, sum, mine[place]);
        }
    }
    mine
}

/// The first column of this unit's group.
#[cube]
fn first_column(#[comptime] form: Form) -> usize {
    let group = UNIT_POS as usize / comptime!(form.group.lanes);
    (CUBE_POS * form.groups + group) * comptime!(form.columns())
}

/// `y = norm(x) Wᵀ (+ bias) (+ residual) (+ low Bᵀ)`; `low` `[rows, rank]` scaled already, `up` `[out, rank]`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn one_matrix<S: Numeric, F: Numeric, O: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
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
    #[define(S, F, O)] _types: [StorageType; 3],
) {
    let first = first_column(form);
    let sums = products(
        x, norm, words, scales, words, scales, words, scales, low, up, 0usize, first, width, rank,
        epsilon, form,
    );
    let mut value = sums[0];
    let lane = UNIT_POS as usize % comptime!(form.group.lanes);
    let column = first + lane % form.columns();
    if lane < comptime!(form.rows * form.columns()) && column < width {
        let at = lane / form.columns() * width + column;
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
pub(super) fn three_matrices<S: Numeric, F: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
    first_words: &Array<Piece>,
    first_scales: &Array<S>,
    second_words: &Array<Piece>,
    second_scales: &Array<S>,
    third_words: &Array<Piece>,
    third_scales: &Array<S>,
    none: &Array<f32>,
    y: &mut Array<F>,
    first_width: usize,
    second_width: usize,
    third_width: usize,
    epsilon: f32,
    #[comptime] form: Form,
    #[comptime] out: Packing,
    #[define(S, F)] _types: [StorageType; 2],
) {
    let width = first_width + second_width + third_width;
    let first = first_column(form);
    // The widths are multiples of a group's columns, so a group has one matrix.
    let mut matrix = 0usize;
    let mut before = 0usize;
    let mut own_width = first_width;
    if first >= first_width + second_width {
        matrix = 2usize;
        before = first_width + second_width;
        own_width = third_width;
    } else if first >= first_width {
        matrix = 1usize;
        before = first_width;
        own_width = second_width;
    }
    let sums = products(
        x,
        norm,
        first_words,
        first_scales,
        second_words,
        second_scales,
        third_words,
        third_scales,
        none,
        none,
        matrix,
        first - before,
        own_width,
        0usize,
        epsilon,
        form,
    );
    let lane = UNIT_POS as usize % comptime!(form.group.lanes);
    let column = first + lane % form.columns();
    if lane < comptime!(form.rows * form.columns()) && column < width {
        let at = lane / form.columns() * width + column;
        y[at] = F::cast_from(within(sums[0], out));
    }
}

/// `silu(norm(x) Gᵀ) · (norm(x) Uᵀ)`.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
pub(super) fn gated_matrices<S: Numeric, F: Numeric>(
    x: &Array<Quad<F>>,
    norm: &Array<Quad<F>>,
    gate_words: &Array<Piece>,
    gate_scales: &Array<S>,
    up_words: &Array<Piece>,
    up_scales: &Array<S>,
    none: &Array<f32>,
    y: &mut Array<F>,
    width: usize,
    epsilon: f32,
    #[comptime] form: Form,
    #[comptime] out: Packing,
    #[define(S, F)] _types: [StorageType; 2],
) {
    let first = first_column(form);
    let sums = products(
        x,
        norm,
        gate_words,
        gate_scales,
        up_words,
        up_scales,
        gate_words,
        gate_scales,
        none,
        none,
        0usize,
        first,
        width,
        0usize,
        epsilon,
        form,
    );
    let lane = UNIT_POS as usize % comptime!(form.group.lanes);
    let column = first + lane % form.columns();
    if lane < comptime!(form.rows * form.columns()) && column < width {
        let value = sums[0] / (1.0f32 + (-sums[0]).exp()) * sums[1];
        y[lane / form.columns() * width + column] = F::cast_from(within(value, out));
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

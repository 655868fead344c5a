//! Attention of many f16 queries in tiles: scores and sums of values by cooperative matrices.
//!
//! A cube has some queries of one head and goes over their keys twice. First it finds each query's largest
//! score; then it computes the scores anew, whose weights are final at once, and adds up the values. So sums
//! stay in cooperative matrices, whose elements no unit can scale, and no score leaves the cube.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use cubecl::{cmma, prelude::*};
use half::f16;

use super::{
    launch::{Buffer, Cache, cubes, elements, empty, pieces},
    tile_config::{AREA, HALVES, LANES, PLANES, SIDE, UNITS, cooperative},
    words::{Packing, Piece, within},
};

/// Queries of a tile.
const ROWS: usize = 32;

/// Keys of a tile.
const KEYS: usize = 64;

/// Widest head: more would not fit into the shared memory that every device has.
const WIDEST: usize = 128;

/// Fewest queries that a tile is worth.
const FEWEST: usize = 9;

/// Planes that have the same rows of a tile.
const ACROSS: usize = PLANES * SIDE / ROWS;

/// Units that have the same row of a tile of scores, eight keys each.
const SHARES: usize = KEYS / HALVES;

/// Pieces of shared memory from the weights of a query to those of the next.
const WEIGHT_STRIDE: usize = SHARES + 1;

/// A score no visible key has; finite, so that differences stay numbers.
const HIDDEN: f32 = -1e30;

/// The comptime configuration of the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct TileAttention {
    head_dim: usize,
}

impl TileAttention {
    /// Pieces of a head.
    const fn pieces(&self) -> usize {
        self.head_dim / HALVES
    }

    /// Cooperative matrices along a head, the last one filled up with zeros.
    const fn steps(&self) -> usize {
        self.head_dim.div_ceil(SIDE)
    }

    /// Pieces of a head in shared memory.
    const fn padded(&self) -> usize {
        self.steps() * (SIDE / HALVES)
    }

    /// Pieces of shared memory from a row to the next: one more than a row has, so that the same columns of
    /// neighbouring rows are in different banks.
    const fn stride(&self) -> usize {
        self.padded() + 1
    }

    /// Pieces of a tile of keys or values that a unit loads.
    const fn loads(&self) -> usize {
        (KEYS * self.padded()).div_ceil(UNITS)
    }

    /// Cooperative matrices of the result that a plane has.
    const fn wide(&self) -> usize {
        self.steps().div_ceil(ACROSS)
    }
}

/// Copies keys or values from `tile` on into shared memory; zeros from `to` on, where nothing may be read.
#[cube]
fn copy_tile(
    from: &Array<Piece>,
    shared: &mut SharedMemory<Piece>,
    source: usize,
    row_stride: usize,
    tile: usize,
    to: usize,
    #[comptime] config: TileAttention,
) {
    let padded = comptime!(config.padded());
    let mut loaded = Array::<Piece>::new(comptime!(config.loads()));
    #[unroll]
    for index in 0..config.loads() {
        let task = UNIT_POS as usize + comptime!(index * UNITS);
        let key = tile + task / padded;
        let piece = task % padded;
        let mut value = Piece::new(0u32);
        if key < to
            && task < comptime!(KEYS * config.padded())
            && piece < comptime!(config.pieces())
        {
            value = from[source + key * row_stride + piece];
        }
        loaded[index] = value;
    }
    #[unroll]
    for index in 0..config.loads() {
        let task = UNIT_POS as usize + comptime!(index * UNITS);
        if task < comptime!(KEYS * config.padded()) {
            shared[task / padded * comptime!(config.stride()) + task % padded] = loaded[index];
        }
    }
}

/// The scores of a tile of keys, unscaled: each plane's sixteen queries and sixteen keys after those of the
/// plane before.
#[cube]
#[allow(unsafe_code)]
fn find_scores(
    query: &SharedMemory<Piece>,
    keys: &SharedMemory<Piece>,
    scores: &mut SharedMemory<f32>,
    #[comptime] config: TileAttention,
) {
    let stride = comptime!(config.stride());
    let plane = UNIT_POS as usize / LANES;
    let row = plane / ACROSS * SIDE;
    let key = plane % ACROSS * SIDE;
    let words = comptime!((config.stride() * 4) as u32);
    let sum = cmma::Matrix::<f32>::from_value(
        cmma::MatrixIdent::Accumulator,
        SIDE,
        SIDE,
        SIDE,
        cmma::MatrixLayout::Undefined,
        0.0f32,
    );
    #[unroll]
    for step in 0..config.steps() {
        let at = comptime!(step * SIDE / HALVES);
        // SAFETY: both are loaded before they are read.
        let (a, b) = unsafe {
            (
                cmma::Matrix::<f16>::uninitialized(
                    cmma::MatrixIdent::A,
                    SIDE,
                    SIDE,
                    SIDE,
                    cmma::MatrixLayout::RowMajor,
                ),
                cmma::Matrix::<f16>::uninitialized(
                    cmma::MatrixIdent::B,
                    SIDE,
                    SIDE,
                    SIDE,
                    cmma::MatrixLayout::ColMajor,
                ),
            )
        };
        let from = row * stride + at;
        cmma::load(&a, &query.slice(from, from + SIDE * stride), words);
        let from = key * stride + at;
        cmma::load(&b, &keys.slice(from, from + SIDE * stride), words);
        cmma::execute::<f16, f16, f32, f32>(&a, &b, &sum, &sum);
    }
    cmma::store(
        &mut scores.slice_mut(plane * AREA, (plane + 1) * AREA),
        &sum,
        comptime!(SIDE as u32),
        cmma::MatrixLayout::RowMajor,
    );
}

/// Adds a tile's values times their weights to this plane's matrices.
#[cube]
#[allow(unsafe_code)]
fn add_values(
    weights: &SharedMemory<Piece>,
    values: &SharedMemory<Piece>,
    sums: &Sequence<cmma::Matrix<f32>>,
    #[comptime] config: TileAttention,
) {
    let stride = comptime!(config.stride());
    let plane = UNIT_POS as usize / LANES;
    let row = plane / ACROSS * SIDE;
    #[unroll]
    for step in 0..comptime!(KEYS / SIDE) {
        // SAFETY: it is loaded before it is read.
        let a = unsafe {
            cmma::Matrix::<f16>::uninitialized(
                cmma::MatrixIdent::A,
                SIDE,
                SIDE,
                SIDE,
                cmma::MatrixLayout::RowMajor,
            )
        };
        let from = row * WEIGHT_STRIDE + comptime!(step * SIDE / HALVES);
        let words = comptime!((WEIGHT_STRIDE * 4) as u32);
        cmma::load(
            &a,
            &weights.slice(from, from + comptime!(SIDE * WEIGHT_STRIDE)),
            words,
        );
        #[unroll]
        for index in 0..config.wide() {
            // Planes past the last column repeat it.
            let column = min(
                plane % ACROSS + comptime!(index * ACROSS),
                comptime!(config.steps() - 1),
            );
            // SAFETY: as above.
            let b = unsafe {
                cmma::Matrix::<f16>::uninitialized(
                    cmma::MatrixIdent::B,
                    SIDE,
                    SIDE,
                    SIDE,
                    cmma::MatrixLayout::RowMajor,
                )
            };
            let from = comptime!(step * SIDE * config.stride()) + column * (SIDE / HALVES);
            let words = comptime!((config.stride() * 4) as u32);
            cmma::load(&b, &values.slice(from, from + SIDE * stride), words);
            let sum = sums.index(index);
            cmma::execute::<f16, f16, f32, f32>(&a, &b, sum, sum);
        }
    }
}

/// `y` `[b, queries, h, d]`; strides in pieces.
#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn attend_in_tiles(
    q: &Array<Piece>,
    keys: &Array<Piece>,
    values: &Array<Piece>,
    first: &Array<i32>,
    end: &Array<i32>,
    y: &mut Array<f16>,
    heads: usize,
    group: usize,
    queries: usize,
    count: usize,
    held: usize,
    q_batch_stride: usize,
    q_head_stride: usize,
    q_row_stride: usize,
    batch_stride: usize,
    head_stride: usize,
    row_stride: usize,
    scale: f32,
    #[comptime] config: TileAttention,
) {
    let unit = UNIT_POS as usize;
    let lane = unit % LANES;
    let plane = unit / LANES;
    let stride = comptime!(config.stride());
    let padded = comptime!(config.padded());

    // Cubes past the last repeat its work, so that all reach the barriers.
    let place = min(CUBE_POS, count - 1);
    let head = place % heads;
    let tile = place / heads;
    let tiles = queries.div_ceil(ROWS);
    let sequence = tile / tiles;
    let query_from = tile % tiles * ROWS;
    let source = sequence * batch_stride + head / group * head_stride;

    let mut query = SharedMemory::<Piece>::new(comptime!(ROWS * config.stride()));
    let mut shared = SharedMemory::<Piece>::new(comptime!(KEYS * config.stride()));
    let mut weights = SharedMemory::<Piece>::new(comptime!(ROWS * WEIGHT_STRIDE));
    let mut scores = SharedMemory::<f32>::new(comptime!(PLANES * AREA));
    let mut shares = SharedMemory::<f32>::new(UNITS);
    let mut totals = SharedMemory::<f32>::new(ROWS);
    let mut bounds = SharedMemory::<u32>::new(comptime!(2 * ROWS));

    if unit < ROWS {
        let at = sequence * queries + min(query_from + unit, queries - 1);
        bounds[unit] = first[at] as u32;
        bounds[ROWS + unit] = min(end[at] as u32, held as u32);
    }
    for task in range_stepped(unit, comptime!(ROWS * config.padded()), UNITS) {
        // Queries past the last repeat it.
        let index = min(query_from + task / padded, queries - 1);
        let piece = task % padded;
        let mut value = Piece::new(0u32);
        if piece < comptime!(config.pieces()) {
            let from = sequence * q_batch_stride + head * q_head_stride + index * q_row_stride;
            value = q[from + piece];
        }
        query[task / padded * stride + piece] = value;
    }
    sync_cube();
    let mut all_from = held;
    let mut all_to = 0usize.runtime();
    for row in 0..ROWS {
        all_from = min(all_from, bounds[row] as usize);
        all_to = max(all_to, bounds[ROWS + row] as usize);
    }
    all_from = min(all_from, all_to);

    // This unit's eight keys of a tile for one query, and where their scores are.
    let row = unit / SHARES;
    let share = unit % SHARES;
    let see_from = bounds[row] as usize;
    let see_to = bounds[ROWS + row] as usize;
    let block = row / SIDE * ACROSS + share * HALVES / SIDE;
    let score_at = block * AREA + row % SIDE * SIDE + share * HALVES % SIDE;

    let mut most = HIDDEN.runtime();
    for tile in range_stepped(all_from, all_to, KEYS) {
        copy_tile(keys, &mut shared, source, row_stride, tile, all_to, config);
        sync_cube();
        find_scores(&query, &shared, &mut scores, config);
        sync_cube();
        #[unroll]
        for element in 0..HALVES {
            let key = tile + share * HALVES + element;
            let score = scores[score_at + element] * scale;
            let seen = key >= see_from && key < see_to;
            most = max(most, select(seen, score, HIDDEN));
        }
    }
    shares[unit] = most;
    sync_cube();
    #[unroll]
    for other in 0..SHARES {
        most = max(most, shares[row * SHARES + other]);
    }
    sync_cube();

    let mut sums = Sequence::<cmma::Matrix<f32>>::new();
    #[unroll]
    for _ in 0..config.wide() {
        sums.push(cmma::Matrix::<f32>::from_value(
            cmma::MatrixIdent::Accumulator,
            SIDE,
            SIDE,
            SIDE,
            cmma::MatrixLayout::Undefined,
            0.0f32,
        ));
    }
    let mut total = 0.0f32;
    for tile in range_stepped(all_from, all_to, KEYS) {
        copy_tile(keys, &mut shared, source, row_stride, tile, all_to, config);
        sync_cube();
        find_scores(&query, &shared, &mut scores, config);
        sync_cube();
        let mut own = Piece::empty();
        #[unroll]
        for word in 0..comptime!(HALVES / 2) {
            let mut both = Vector::<f16, Const<2>>::empty();
            #[unroll]
            for half in 0..2usize {
                let element = comptime!(2 * word + half);
                let key = tile + share * HALVES + element;
                let score = scores[score_at + element] * scale;
                let seen = key >= see_from && key < see_to;
                // A masked key has weight zero, even where no key is visible.
                let weight = select(seen, (score - most).exp(), 0.0f32);
                total += weight;
                both[half] = f16::cast_from(weight);
            }
            own[word] = u32::reinterpret(both);
        }
        weights[row * WEIGHT_STRIDE + share] = own;
        copy_tile(
            values,
            &mut shared,
            source,
            row_stride,
            tile,
            all_to,
            config,
        );
        sync_cube();
        add_values(&weights, &shared, &sums, config);
        sync_cube();
    }
    shares[unit] = total;
    sync_cube();
    if unit < ROWS {
        let mut sum = 0.0f32;
        #[unroll]
        for other in 0..SHARES {
            sum += shares[unit * SHARES + other];
        }
        totals[unit] = max(sum, 1e-30f32);
    }

    #[unroll]
    for index in 0..config.wide() {
        cmma::store(
            &mut scores.slice_mut(plane * AREA, (plane + 1) * AREA),
            sums.index(index),
            comptime!(SIDE as u32),
            cmma::MatrixLayout::RowMajor,
        );
        sync_cube();
        let step = plane % ACROSS + comptime!(index * ACROSS);
        #[unroll]
        for element in 0..comptime!(AREA / LANES) {
            let element_at = lane + element * LANES;
            let own_row = plane / ACROSS * SIDE + element_at / SIDE;
            let column = step * SIDE + element_at % SIDE;
            let index = query_from + own_row;
            if index < queries && column < comptime!(config.head_dim) {
                let value = scores[plane * AREA + element_at] / totals[own_row];
                let out = (sequence * queries + index) * heads + head;
                y[out * comptime!(config.head_dim) + column] =
                    f16::cast_from(within(value, Packing::F16));
            }
        }
        sync_cube();
    }
}

/// Whether the kernel covers these queries and this cache.
pub(super) fn covers<R: CubeRuntime>(q: &Buffer<R>, cache: &Cache<'_, R>) -> bool {
    let [_, _, queries, head_dim] = q.meta.shape().dims();
    let whole = |buffer: &Buffer<R>| {
        let strides = buffer.meta.strides();
        buffer.dtype == DType::F16 && strides[..3].iter().all(|one| one.is_multiple_of(HALVES))
    };
    queries >= FEWEST
        && head_dim.is_multiple_of(HALVES)
        && head_dim <= WIDEST
        && [q, cache.keys, cache.values].into_iter().all(whole)
        && cooperative(&q.client)
}

/// Attention output `[b, queries, h, d]` of `q` `[b, h, queries, d]`: each query over keys `[first, end)` as far
/// as there are `keys`.
pub(super) fn attended<R: CubeRuntime>(
    q: &Buffer<R>,
    cache: &Cache<'_, R>,
    [first, end]: [&Buffer<R>; 2],
    keys: usize,
) -> Buffer<R> {
    let [batch, heads, queries, head_dim] = q.meta.shape().dims();
    let group = heads / cache.keys.meta.shape()[1];
    let config = TileAttention { head_dim };
    let y = empty(q, [batch, queries, heads, head_dim], q.dtype);
    let count = batch * queries.div_ceil(ROWS) * heads;
    let strides = |buffer: &Buffer<R>| {
        let strides = buffer.meta.strides();
        [0, 1, 2].map(|axis| strides[axis] / HALVES)
    };
    let (q_strides, strides) = (strides(q), strides(cache.keys));
    // SAFETY: the strides are those of the buffers, and ranges end at the number of keys.
    #[allow(unsafe_code)]
    unsafe {
        attend_in_tiles::launch_unchecked::<R>(
            &q.client,
            cubes(count),
            CubeDim::new_1d(UNITS as u32),
            pieces(q),
            pieces(cache.keys),
            pieces(cache.values),
            elements(first),
            elements(end),
            elements(&y),
            heads,
            group,
            queries,
            count,
            keys,
            q_strides[0],
            q_strides[1],
            q_strides[2],
            strides[0],
            strides[1],
            strides[2],
            (head_dim as f32).powf(-0.5),
            config,
        );
    }
    y
}

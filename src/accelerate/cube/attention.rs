//! Flash attention over ranges of keys: scores and softmax in f32, no matrix of scores in memory.
//!
//! A cube takes the query heads that share a key head, for one query or a few neighbours. In tiles of as
//! many keys as it has units, a unit first computes the scores of its own key, then a piece of the values
//! of many keys. Where there is one query, long ranges are split between cubes, and a second launch merges
//! their partial results.

use burn::tensor::{DType, Tensor};
use burn_cubecl::{CubeRuntime, kernel::into_contiguous};
use cubecl::prelude::*;

use super::{
    launch::{
        Buffer, Cache, Cube, array, cubes, elements, empty, pieces, tensor, with_contiguous_heads,
    },
    sums::cube_sum,
    tile_attention,
    words::{Packing, Piece, pair, within},
};
use crate::ops::AttentionSpans;

/// Units of a cube, and keys of a tile.
const UNITS: usize = 256;

/// Most rows (queries times heads) of a cube, as the units' registers hold them.
const ROWS: usize = 8;

/// Keys of a range that is worth a cube of its own: one row has eight key heads, and a large card 132 multiprocessors.
const RANGE: usize = 64;

/// Cubes of a launch up to which ranges are split.
const MOST_CUBES: usize = 512;

/// Most pieces that a unit loads before it uses the first: with one load after another, a decode step waits for
/// memory most of the time.
const TOGETHER: usize = 4;

/// Parts in which a tile is searched for its largest score.
const SHARES: usize = 16;

/// A score no visible key has; finite, so that differences stay numbers.
const HIDDEN: f32 = -1e30;

/// The comptime configuration of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct AttentionConfig {
    units: usize,
    head_dim: usize,
    /// Query heads that share a key head.
    group: usize,
    /// Queries of a cube.
    queries: usize,
    packing: Packing,
    /// Whether the range is split: sums are written as they are.
    split: bool,
    /// Whether the device knows the number of keys: the step's place and one.
    stepped: bool,
}

impl AttentionConfig {
    /// Rows of a cube.
    const fn rows(&self) -> usize {
        self.group * self.queries
    }

    /// Pieces of a head.
    const fn pieces(&self) -> usize {
        self.head_dim / self.packing.piece()
    }

    /// Pieces of a key that a unit reads at once.
    fn together(&self) -> usize {
        (1..=TOGETHER)
            .rev()
            .find(|pieces| self.pieces().is_multiple_of(*pieces))
            .unwrap_or(1)
    }

    /// Keys whose values are read at once.
    const fn lanes(&self) -> usize {
        self.units / self.pieces()
    }
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn attend<F: Numeric>(
    q: &Array<F>,
    keys: &Array<Piece>,
    values: &Array<Piece>,
    first: &Array<i32>,
    end: &Array<i32>,
    step: &Array<u32>,
    y: &mut Array<F>,
    sums: &mut Array<f32>,
    key_value_heads: usize,
    queries: usize,
    splits: usize,
    count: usize,
    known: usize,
    q_batch_stride: usize,
    q_head_stride: usize,
    q_row_stride: usize,
    batch_stride: usize,
    head_stride: usize,
    row_stride: usize,
    scale: f32,
    #[comptime] config: AttentionConfig,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(config.units);
    let group = comptime!(config.group);
    let rows = comptime!(config.rows());
    let head_dim = comptime!(config.head_dim);
    let packing = comptime!(config.packing);
    let piece = comptime!(config.packing.piece());
    let pairs = comptime!(config.packing.pairs());
    let row_pieces = comptime!(config.pieces());
    let lanes = comptime!(config.lanes());
    let unit = UNIT_POS as usize;
    let mut held = known;
    if config.stepped {
        held = step[0] as usize + 1;
    }

    // Cubes past the last repeat its work, so that all reach the barriers.
    let place = min(CUBE_POS, count - 1);
    let split = place % splits;
    let key_head = place / splits % key_value_heads;
    let tile = place / splits / key_value_heads;
    let tiles = queries.div_ceil(config.queries);
    let sequence = tile / tiles;
    let query_from = tile % tiles * config.queries;

    // Keys that each query sees, and all that any of them does. Queries past the last repeat it.
    let mut see_from = Array::<usize>::new(comptime!(config.queries));
    let mut see_to = Array::<usize>::new(comptime!(config.queries));
    let mut all_from = held;
    let mut all_to = 0usize.runtime();
    #[unroll]
    for index in 0..config.queries {
        let at = sequence * queries + min(query_from + index, queries - 1);
        see_from[index] = first[at] as usize;
        see_to[index] = min(end[at] as usize, held);
        all_from = min(all_from, see_from[index]);
        all_to = max(all_to, see_to[index]);
    }
    all_from = min(all_from, all_to);
    let range = (all_to - all_from).div_ceil(splits);
    let from = all_from + split * range;
    let to = min(from + range, all_to);
    let source = sequence * batch_stride + key_head * head_stride;

    let mut query = SharedMemory::<f32>::new(comptime!(config.rows() * config.head_dim));
    let mut scores = SharedMemory::<f32>::new(comptime!(config.rows() * config.units));
    let mut largest = SharedMemory::<f32>::new(comptime!(config.rows() * SHARES));
    for at in range_stepped(unit, comptime!(config.rows() * config.head_dim), units) {
        let row = at / head_dim;
        let head = key_head * group + row % group;
        let index = min(query_from + row / group, queries - 1);
        let start = sequence * q_batch_stride + head * q_head_stride + index * q_row_stride;
        query[at] = f32::cast_from(q[start + at % head_dim]) * scale;
    }
    sync_cube();

    let mut most = Array::<f32>::new(rows);
    let mut total = Array::<f32>::new(rows);
    let mut score = Array::<f32>::new(rows);
    let mut taken = Array::<f32>::new(comptime!(config.rows() * config.packing.piece()));
    let mut loaded = Array::<Piece>::new(TOGETHER);
    let together = comptime!(config.together());
    #[unroll]
    for row in 0..rows {
        most[row] = HIDDEN;
        total[row] = 0.0f32;
        #[unroll]
        for element in 0..piece {
            taken[row * piece + element] = 0.0f32;
        }
    }
    let value_piece = unit % row_pieces;
    let lane = unit / row_pieces;

    for tile in range_stepped(from, to, units) {
        let key = tile + unit;
        #[unroll]
        for row in 0..rows {
            score[row] = 0.0f32;
        }
        if key < to {
            let start = (source + key * row_stride) / piece;
            for step in 0..comptime!(config.pieces() / config.together()) {
                let from = step * together;
                #[unroll]
                for at in 0..together {
                    loaded[at] = keys[start + from + at];
                }
                #[unroll]
                for at in 0..together {
                    #[unroll]
                    for index in 0..pairs {
                        let factor = pair(loaded[at], index, packing);
                        #[unroll]
                        for row in 0..rows {
                            let place = row * head_dim + (from + at) * piece + 2 * index;
                            let sum = fma(query[place], factor[0], score[row]);
                            score[row] = fma(query[place + 1], factor[1], sum);
                        }
                    }
                }
            }
        }
        #[unroll]
        for row in 0..rows {
            let index = row / group;
            let seen = key < to && key >= see_from[index] && key < see_to[index];
            score[row] = select(seen, score[row], HIDDEN);
            scores[row * units + unit] = score[row];
        }
        sync_cube();
        for at in range_stepped(unit, comptime!(config.rows() * SHARES), units) {
            let width = comptime!(config.units / SHARES);
            let mut found = HIDDEN.runtime();
            for index in 0..width {
                found = max(found, scores[at * width + index]);
            }
            largest[at] = found;
        }
        sync_cube();
        #[unroll]
        for row in 0..rows {
            let before = most[row];
            let mut now = before;
            #[unroll]
            for share in 0..SHARES {
                now = max(now, largest[row * SHARES + share]);
            }
            let shrunk = (before - now).exp();
            // A masked key has weight zero, even where no key was visible yet.
            let weight = select(score[row] > HIDDEN, (score[row] - now).exp(), 0.0f32);
            most[row] = now;
            total[row] = fma(total[row], shrunk, weight);
            scores[row * units + unit] = weight;
            #[unroll]
            for element in 0..piece {
                taken[row * piece + element] *= shrunk;
            }
        }
        sync_cube();
        let tile_keys = min(to - tile, units);
        if lane < lanes {
            for from in range_stepped(lane, tile_keys, comptime!(TOGETHER * config.lanes())) {
                #[unroll]
                for at in 0..TOGETHER {
                    // Past the last key: its values again, which are not added.
                    let index = min(from + at * lanes, tile_keys - 1);
                    let row_at = source + (tile + index) * row_stride;
                    loaded[at] = values[row_at / piece + value_piece];
                }
                #[unroll]
                for at in 0..TOGETHER {
                    let index = from + at * lanes;
                    if index < tile_keys {
                        #[unroll]
                        for part in 0..pairs {
                            let value = pair(loaded[at], part, packing);
                            #[unroll]
                            for row in 0..rows {
                                let weight = scores[row * units + index];
                                let place = row * piece + 2 * part;
                                taken[place] = fma(weight, value[0], taken[place]);
                                taken[place + 1] = fma(weight, value[1], taken[place + 1]);
                            }
                        }
                    }
                }
            }
        }
        sync_cube();
    }

    let mut parts = SharedMemory::<f32>::new(comptime!(config.units * config.packing.piece()));
    #[unroll]
    for row in 0..rows {
        let sum = cube_sum(total[row], units);
        #[unroll]
        for element in 0..piece {
            parts[unit * piece + element] = taken[row * piece + element];
        }
        sync_cube();
        let head = key_head * group + row % group;
        let index = query_from + row / group;
        let out = (sequence * queries + index) * key_value_heads * group + head;
        if index < queries {
            for element in range_stepped(unit, head_dim, units) {
                let mut value = 0.0f32;
                for lane in 0..lanes {
                    value += parts[lane * head_dim + element];
                }
                if config.split {
                    let place = (out * splits + split) * (head_dim + 2);
                    sums[place + element] = value;
                    sums[place + head_dim] = most[row];
                    sums[place + head_dim + 1] = sum;
                } else {
                    let value = value / max(sum, 1e-30f32);
                    y[out * head_dim + element] = F::cast_from(within(value, packing));
                }
            }
        }
        sync_cube();
    }
}

/// Merges the partial results of the cubes of one query head: `[splits, d + 2]`, sums, largest score, sum of weights.
#[cube(launch_unchecked)]
fn join<F: Numeric>(
    sums: &Array<f32>,
    y: &mut Array<F>,
    count: usize,
    splits: usize,
    #[comptime] head_dim: usize,
    #[comptime] packing: Packing,
    #[define(F)] _dtype: StorageType,
) {
    if ABSOLUTE_POS < count {
        let head = ABSOLUTE_POS / head_dim;
        let element = ABSOLUTE_POS % head_dim;
        let width = comptime!(head_dim + 2);
        let mut most = HIDDEN.runtime();
        for split in 0..splits {
            most = max(most, sums[(head * splits + split) * width + head_dim]);
        }
        let mut value = 0.0f32;
        let mut total = 0.0f32;
        for split in 0..splits {
            let place = (head * splits + split) * width;
            let weight = (sums[place + head_dim] - most).exp();
            value = fma(weight, sums[place + element], value);
            total = fma(weight, sums[place + head_dim + 1], total);
        }
        y[ABSOLUTE_POS] = F::cast_from(within(value / max(total, 1e-30f32), packing));
    }
}

/// [`ForwardOps::span_attention`](crate::ops::ForwardOps::span_attention).
pub(super) fn span_attention<R: CubeRuntime>(
    q: &Tensor<Cube<R>, 4>,
    k: &Tensor<Cube<R>, 4>,
    v: &Tensor<Cube<R>, 4>,
    spans: &AttentionSpans<Cube<R>>,
) -> Option<Tensor<Cube<R>, 4>> {
    let [_, heads, _, head_dim] = q.dims();
    let [_, key_value_heads, keys, _] = k.dims();
    let piece = Packing::of(q.dtype())?.piece();
    let covered = [k.dtype(), v.dtype()] == [q.dtype(); 2]
        && head_dim.is_multiple_of(piece)
        && head_dim <= 256
        && heads / key_value_heads <= ROWS;
    if !covered {
        return None;
    }
    let [q, mut k, mut v] = [q, k, v].map(|x| with_contiguous_heads(x.clone()));
    let strides = k.meta.strides();
    let whole = strides[..3].iter().all(|one| one.is_multiple_of(piece));
    if !whole || strides != v.meta.strides() {
        [k, v] = [k, v].map(into_contiguous);
    }
    let cache = Cache {
        keys: &k,
        values: &v,
    };
    let [first, end] = spans.ranges().clone().map(|range| range.into_primitive());
    let y = attended(&q, &cache, [&first, &end], (keys, None), false);
    Some(tensor::<R, 4>(y).swap_dims(1, 2))
}

/// Attention output `[b, queries, h, d]` of `q` `[b, h, queries, d]`: each query over keys `[first, end)` as
/// far as there are `keys`; with the place of a step on the device, as far as that, which is never more. Of
/// `one_sequence` all of the batch read the first sequence's keys.
pub(super) fn attended<R: CubeRuntime>(
    q: &Buffer<R>,
    cache: &Cache<'_, R>,
    [first, end]: [&Buffer<R>; 2],
    (keys, step): (usize, Option<&Buffer<R>>),
    one_sequence: bool,
) -> Buffer<R> {
    let [batch, heads, queries, head_dim] = q.meta.shape().dims();
    if !one_sequence && tile_attention::covers(q, cache) {
        return tile_attention::attended(q, cache, [first, end], keys);
    }
    let key_value_heads = cache.keys.meta.shape()[1];
    let group = heads / key_value_heads;
    let packing = Packing::of(q.dtype).expect("the kernel covers the type");
    let splits = if queries == 1 {
        let cubes = (batch * key_value_heads).max(1);
        (keys / RANGE).min(MOST_CUBES / cubes).clamp(1, 16)
    } else {
        1
    };
    let units = UNITS.min(q.client.properties().hardware.max_units_per_cube as usize);
    let config = AttentionConfig {
        units,
        head_dim,
        group,
        queries: if queries == 1 { 1 } else { ROWS / group },
        packing,
        split: splits > 1,
        stepped: step.is_some(),
    };
    let y = empty(q, [batch, queries, heads, head_dim], q.dtype);
    let sums = if config.split {
        empty(q, [batch * heads, splits, head_dim + 2], DType::F32)
    } else {
        y.clone()
    };
    let (q_strides, strides) = (q.meta.strides(), cache.keys.meta.strides());
    let batch_stride = if one_sequence { 0 } else { strides[0] };
    let count = batch * queries.div_ceil(config.queries) * key_value_heads * splits;
    // SAFETY: the strides are those of the buffers, and ranges end at the number of keys; sums are
    // written where the range is split only, and are of their own then.
    #[allow(unsafe_code)]
    unsafe {
        attend::launch_unchecked::<R>(
            &q.client,
            cubes(count),
            CubeDim::new_1d(units as u32),
            elements(q),
            pieces(cache.keys),
            pieces(cache.values),
            elements(first),
            elements(end),
            array(step.unwrap_or(end), 4),
            elements(&y),
            elements(&sums),
            key_value_heads,
            queries,
            splits,
            count,
            keys,
            q_strides[0],
            q_strides[1],
            q_strides[2],
            batch_stride,
            strides[1],
            strides[2],
            (head_dim as f32).powf(-0.5),
            config,
            q.dtype.into(),
        );
        if config.split {
            let count = batch * heads * head_dim;
            join::launch_unchecked::<R>(
                &q.client,
                cubes(count.div_ceil(units)),
                CubeDim::new_1d(units as u32),
                elements(&sums),
                elements(&y),
                count,
                splits,
                head_dim,
                packing,
                q.dtype.into(),
            );
        }
    }
    y
}

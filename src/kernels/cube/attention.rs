//! Attention of one query a sequence over a cache.
//!
//! A cube takes the query heads that share a key head, and a range of keys. In tiles of as many keys as
//! it has units, a unit first works out the scores of its own key, then a piece of the values of many
//! keys. Long ranges are split between cubes, and a second launch joins what they found.

use burn::tensor::DType;
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::{
    launch::{Buffer, cubes, elements, empty, pieces},
    sums::{Group, group_sum},
    words::{Packing, Piece, pair, within},
};

/// Units of a cube, and keys of a tile.
const UNITS: usize = 256;

/// Keys of a range that is worth a cube of its own.
const RANGE: usize = 512;

/// Shares in which the largest score of a tile is looked for.
const SHARES: usize = 16;

/// A score no visible key has; finite, so that differences stay numbers.
const HIDDEN: f32 = -1e30;

/// What a kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Form {
    units: usize,
    head_dim: usize,
    /// Query heads that share a key head.
    group: usize,
    packing: Packing,
    /// Whether the range is split: sums are written as they are.
    split: bool,
}

impl Form {
    /// Pieces of a head.
    const fn pieces(&self) -> usize {
        self.head_dim / self.packing.piece()
    }

    /// Keys whose values are read at once.
    const fn lanes(&self) -> usize {
        self.units / self.pieces()
    }
}

/// Keys and values, `[b, key_value_heads, keys, d]`, heads dense, both laid out alike.
pub(super) struct Cache<'a, R: CubeRuntime> {
    pub keys: &'a Buffer<R>,
    pub values: &'a Buffer<R>,
}

/// Whether the kernel covers one query of these heads over such a cache.
pub(super) fn covers<R: CubeRuntime>(q: &Buffer<R>, cache: &Cache<'_, R>) -> bool {
    let [_, heads, queries, head_dim] = q.meta.shape().dims();
    let (keys, values) = (&cache.keys.meta, &cache.values.meta);
    let one_type = q.dtype == cache.keys.dtype && q.dtype == cache.values.dtype;
    let Some(packing) = Packing::of(q.dtype).filter(|_| one_type) else {
        return false;
    };
    let piece = packing.piece();
    let group = heads / keys.shape()[1];
    queries == 1
        && head_dim.is_multiple_of(piece)
        && head_dim <= 256
        && group <= 8
        && keys.strides() == values.strides()
        && keys.strides()[3] == 1
        && q.meta.strides()[3] == 1
        && keys.strides()[..3]
            .iter()
            .all(|stride| stride.is_multiple_of(piece))
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn attend<F: Numeric>(
    q: &Array<F>,
    keys: &Array<Piece>,
    values: &Array<Piece>,
    first: &Array<i32>,
    end: &Array<i32>,
    y: &mut Array<F>,
    sums: &mut Array<f32>,
    key_value_heads: usize,
    splits: usize,
    count: usize,
    held: usize,
    q_batch_stride: usize,
    q_head_stride: usize,
    batch_stride: usize,
    head_stride: usize,
    row_stride: usize,
    scale: f32,
    #[comptime] form: Form,
    #[define(F)] _dtype: StorageType,
) {
    let units = comptime!(form.units);
    let group = comptime!(form.group);
    let head_dim = comptime!(form.head_dim);
    let packing = comptime!(form.packing);
    let piece = comptime!(form.packing.piece());
    let pairs = comptime!(form.packing.pairs());
    let row_pieces = comptime!(form.pieces());
    let lanes = comptime!(form.lanes());
    let unit = UNIT_POS as usize;

    let place = min(CUBE_POS, count - 1);
    let split = place % splits;
    let key_head = place / splits % key_value_heads;
    let row = place / splits / key_value_heads;
    let visible_from = first[row] as usize;
    let visible_to = min(end[row] as usize, held);
    let range = (visible_to - visible_from).div_ceil(splits);
    let from = visible_from + split * range;
    let to = min(from + range, visible_to);
    let source = row * batch_stride + key_head * head_stride;

    let mut query = SharedMemory::<f32>::new(comptime!(form.group * form.head_dim));
    let mut scores = SharedMemory::<f32>::new(comptime!(form.group * form.units));
    let mut largest = SharedMemory::<f32>::new(comptime!(form.group * SHARES));
    for at in range_stepped(unit, comptime!(form.group * form.head_dim), units) {
        let head = key_head * group + at / head_dim;
        let value = q[row * q_batch_stride + head * q_head_stride + at % head_dim];
        query[at] = f32::cast_from(value) * scale;
    }
    sync_cube();

    let mut most = Array::<f32>::new(group);
    let mut total = Array::<f32>::new(group);
    let mut score = Array::<f32>::new(group);
    let mut taken = Array::<f32>::new(comptime!(form.group * form.packing.piece()));
    #[unroll]
    for head in 0..group {
        most[head] = HIDDEN;
        total[head] = 0.0f32;
        #[unroll]
        for element in 0..piece {
            taken[head * piece + element] = 0.0f32;
        }
    }
    let value_piece = unit % row_pieces;
    let lane = unit / row_pieces;

    for tile in range_stepped(from, to, units) {
        let key = tile + unit;
        let seen = key < to;
        #[unroll]
        for head in 0..group {
            score[head] = 0.0f32;
        }
        if seen {
            let start = (source + key * row_stride) / piece;
            for at in 0..row_pieces {
                let words = keys[start + at];
                #[unroll]
                for index in 0..pairs {
                    let factor = pair(words, index, packing);
                    #[unroll]
                    for head in 0..group {
                        let place = head * head_dim + at * piece + 2 * index;
                        let sum = fma(query[place], factor[0], score[head]);
                        score[head] = fma(query[place + 1], factor[1], sum);
                    }
                }
            }
        }
        #[unroll]
        for head in 0..group {
            scores[head * units + unit] = select(seen, score[head], HIDDEN);
        }
        sync_cube();
        for at in range_stepped(unit, comptime!(form.group * SHARES), units) {
            let width = comptime!(form.units / SHARES);
            let mut found = HIDDEN.runtime();
            for index in 0..width {
                found = max(found, scores[at * width + index]);
            }
            largest[at] = found;
        }
        sync_cube();
        #[unroll]
        for head in 0..group {
            let before = most[head];
            let mut now = before;
            #[unroll]
            for share in 0..SHARES {
                now = max(now, largest[head * SHARES + share]);
            }
            let shrunk = (before - now).exp();
            let weight = select(seen, (score[head] - now).exp(), 0.0f32);
            most[head] = now;
            total[head] = fma(total[head], shrunk, weight);
            scores[head * units + unit] = weight;
            #[unroll]
            for element in 0..piece {
                taken[head * piece + element] *= shrunk;
            }
        }
        sync_cube();
        let tile_keys = min(to - tile, units);
        if lane < lanes {
            for index in range_stepped(lane, tile_keys, lanes) {
                let words = values[(source + (tile + index) * row_stride) / piece + value_piece];
                #[unroll]
                for part in 0..pairs {
                    let value = pair(words, part, packing);
                    #[unroll]
                    for head in 0..group {
                        let weight = scores[head * units + index];
                        let at = head * piece + 2 * part;
                        taken[at] = fma(weight, value[0], taken[at]);
                        taken[at + 1] = fma(weight, value[1], taken[at + 1]);
                    }
                }
            }
        }
        sync_cube();
    }

    let mut parts = SharedMemory::<f32>::new(comptime!(form.units * form.packing.piece()));
    #[unroll]
    for head in 0..group {
        let sum = group_sum(total[head], comptime!(Group::cube(form.units)));
        #[unroll]
        for element in 0..piece {
            parts[unit * piece + element] = taken[head * piece + element];
        }
        sync_cube();
        let query_head = (row * key_value_heads + key_head) * group + head;
        for element in range_stepped(unit, head_dim, units) {
            let mut value = 0.0f32;
            for lane in 0..lanes {
                value += parts[lane * head_dim + element];
            }
            if form.split {
                let place = (query_head * splits + split) * (head_dim + 2);
                sums[place + element] = value;
                sums[place + head_dim] = most[head];
                sums[place + head_dim + 1] = sum;
            } else {
                let value = value / max(sum, 1e-30f32);
                y[query_head * head_dim + element] = F::cast_from(within(value, packing));
            }
        }
        sync_cube();
    }
}

/// Joins what the cubes of one query head found: `[splits, d + 2]`, sums, largest score, sum of weights.
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

/// One query a sequence, `q` `[b, h, 1, d]`, over keys `[first, end)` of its row as far as there are
/// `keys`; gives `[b, h · d]`.
pub(super) fn one_query<R: CubeRuntime>(
    q: &Buffer<R>,
    cache: &Cache<'_, R>,
    first: &Buffer<R>,
    end: &Buffer<R>,
    keys: usize,
) -> Buffer<R> {
    let [batch, heads, _, head_dim] = q.meta.shape().dims();
    let key_value_heads = cache.keys.meta.shape()[1];
    let packing = Packing::of(q.dtype).expect("`covers` was asked");
    let splits = (keys / RANGE).clamp(1, 16);
    let units = UNITS.min(q.client.properties().hardware.max_units_per_cube as usize);
    let form = Form {
        units,
        head_dim,
        group: heads / key_value_heads,
        packing,
        split: splits > 1,
    };
    let y = empty(q, [batch, heads * head_dim], q.dtype);
    let sums = if form.split {
        empty(q, [batch * heads, splits, head_dim + 2], DType::F32)
    } else {
        y.clone()
    };
    let (q_strides, strides) = (q.meta.strides(), cache.keys.meta.strides());
    let count = batch * key_value_heads * splits;
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
            elements(&y),
            elements(&sums),
            key_value_heads,
            splits,
            count,
            keys,
            q_strides[0],
            q_strides[1],
            strides[0],
            strides[1],
            strides[2],
            (head_dim as f32).powf(-0.5),
            form,
            q.dtype.into(),
        );
        if form.split {
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

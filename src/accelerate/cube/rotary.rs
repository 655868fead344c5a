//! Norm and rotation of heads: a cube a head, a unit a pair of elements half a head apart.

use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::{
    launch::{
        Buffer, Cube, array, contiguous, cubes, elements, empty, tensor, with_contiguous_heads,
    },
    sums::cube_sum,
    words::{Packing, within},
};
use crate::ops::HeadNorm;

/// The comptime configuration of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct RotaryConfig {
    half: usize,
    units: usize,
    packing: Packing,
    norm: bool,
}

impl RotaryConfig {
    /// `None` where the kernels do not cover heads of this width and type.
    fn new(head_dim: usize, dtype: DType, norm: bool) -> Option<Self> {
        let covered = head_dim.is_multiple_of(2) && (2..=512).contains(&head_dim);
        Some(Self {
            half: head_dim / 2,
            units: (head_dim / 2).next_power_of_two(),
            packing: Packing::of(dtype).filter(|_| covered)?,
            norm,
        })
    }
}

/// Both elements of this unit, normalised where there is a norm.
#[cube]
fn head_pair<F: Numeric>(
    x: &Array<F>,
    weight: &Array<F>,
    start: usize,
    unit: usize,
    epsilon: f32,
    #[comptime] config: RotaryConfig,
) -> (f32, f32) {
    let half = comptime!(config.half);
    let mut first = 0.0f32;
    let mut second = 0.0f32;
    if unit < half {
        first = f32::cast_from(x[start + unit]);
        second = f32::cast_from(x[start + half + unit]);
    }
    if config.norm {
        let squares = cube_sum(first * first + second * second, config.units);
        let mean = squares / comptime!(2.0 * config.half as f32);
        let root = 1.0f32 / (mean + epsilon).sqrt();
        if unit < half {
            first = first * root * f32::cast_from(weight[unit]);
            second = second * root * f32::cast_from(weight[half + unit]);
        }
    }
    (first, second)
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate_heads<F: Numeric>(
    x: &Array<F>,
    weight: &Array<F>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    y: &mut Array<F>,
    count: usize,
    heads: usize,
    token_stride: usize,
    head_stride: usize,
    epsilon: f32,
    #[comptime] config: RotaryConfig,
    #[define(F)] _dtype: StorageType,
) {
    let half = comptime!(config.half);
    let unit = UNIT_POS as usize;
    // Cubes past the last head compute it again, so that all reach the barrier of the sum.
    let place = min(CUBE_POS, count - 1);
    let token = place / heads;
    let start = token * token_stride + place % heads * head_stride;
    let (first, second) = head_pair(x, weight, start, unit, epsilon, config);
    if unit < half {
        let angle = token * 2 * half + unit;
        let (c, s) = (cos[angle], sin[angle]);
        let out = place * 2 * half + unit;
        y[out] = F::cast_from(within(first * c - second * s, config.packing));
        y[out + half] = F::cast_from(within(second * c + first * s, config.packing));
    }
}

/// Rotates `x` `[tokens, heads, d]` (RoPE).
pub(super) fn rotate<R: CubeRuntime>(
    x: &Tensor<Cube<R>, 3>,
    norm: Option<&HeadNorm<Cube<R>>>,
    cos: &Tensor<Cube<R>, 2>,
    sin: &Tensor<Cube<R>, 2>,
) -> Option<Tensor<Cube<R>, 3>> {
    let [tokens, heads, head_dim] = x.dims();
    let config = RotaryConfig::new(head_dim, x.dtype(), norm.is_some())?;
    if norm.is_some_and(|norm| norm.weight.dtype() != x.dtype()) {
        return None;
    }
    let x = with_contiguous_heads(x.clone());
    let weight = norm.map(|norm| contiguous(norm.weight.clone()));
    let (cos, sin) = (contiguous(cos.clone()), contiguous(sin.clone()));
    let y = empty(&x, [tokens, heads, head_dim], x.dtype);
    let strides = x.meta.strides();
    // SAFETY: the strides are those of the buffer; without a norm the weight is not read.
    #[allow(unsafe_code)]
    unsafe {
        rotate_heads::launch_unchecked::<R>(
            &x.client,
            cubes(tokens * heads),
            CubeDim::new_1d(config.units as u32),
            elements(&x),
            elements(weight.as_ref().unwrap_or(&x)),
            elements(&cos),
            elements(&sin),
            elements(&y),
            tokens * heads,
            heads,
            strides[0],
            strides[1],
            norm.map_or(0.0, |norm| norm.epsilon as f32),
            config,
            x.dtype.into(),
        );
    }
    Some(tensor(y))
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn split_heads<F: Numeric>(
    qkv: &Array<F>,
    cos: &Array<f32>,
    sin: &Array<f32>,
    q: &mut Array<F>,
    k: &mut Array<F>,
    v: &mut Array<F>,
    count: usize,
    width: usize,
    #[comptime] config: RotaryConfig,
    #[define(F)] _dtype: StorageType,
) {
    // A unit a pair of elements of queries, keys and values each.
    let half = comptime!(config.half);
    if ABSOLUTE_POS < count {
        let place = ABSOLUTE_POS / half;
        let unit = ABSOLUTE_POS % half;
        let heads = width / (2 * half);
        let token = place / heads;
        let start = token * 3 * width + place % heads * 2 * half + unit;
        let out = place * 2 * half + unit;
        let angle = token * 2 * half + unit;
        let (c, s) = (cos[angle], sin[angle]);
        let (first, second) = (
            f32::cast_from(qkv[start]),
            f32::cast_from(qkv[start + half]),
        );
        q[out] = F::cast_from(within(first * c - second * s, config.packing));
        q[out + half] = F::cast_from(within(second * c + first * s, config.packing));
        let start = start + width;
        let (first, second) = (
            f32::cast_from(qkv[start]),
            f32::cast_from(qkv[start + half]),
        );
        k[out] = F::cast_from(within(first * c - second * s, config.packing));
        k[out + half] = F::cast_from(within(second * c + first * s, config.packing));
        let start = start + width;
        v[out] = qkv[start];
        v[out + half] = qkv[start + half];
    }
}

/// Queries and keys rotated (RoPE), values unchanged, out of a fused projection `[tokens, 3 · heads · d]`.
pub(super) fn split_and_rotate<R: CubeRuntime>(
    qkv: &Tensor<Cube<R>, 2>,
    heads: usize,
    cos: &Tensor<Cube<R>, 2>,
    sin: &Tensor<Cube<R>, 2>,
) -> Option<[Tensor<Cube<R>, 3>; 3]> {
    const UNITS: usize = 64;
    let [tokens, width] = qkv.dims();
    let width = width / 3;
    let config = RotaryConfig::new(width / heads, qkv.dtype(), false)?;
    let [qkv, cos, sin] = [qkv, cos, sin].map(|x| contiguous(x.clone()));
    let out = [(); 3].map(|()| empty(&qkv, [tokens, heads, width / heads], qkv.dtype));
    let count = tokens * width / 2;
    // SAFETY: the arrays are as long as tokens and width say.
    #[allow(unsafe_code)]
    unsafe {
        split_heads::launch_unchecked::<R>(
            &qkv.client,
            cubes(count.div_ceil(UNITS)),
            CubeDim::new_1d(UNITS as u32),
            elements(&qkv),
            elements(&cos),
            elements(&sin),
            elements(&out[0]),
            elements(&out[1]),
            elements(&out[2]),
            count,
            width,
            config,
            qkv.dtype.into(),
        );
    }
    Some(out.map(tensor))
}

#[cube(launch_unchecked)]
#[allow(clippy::too_many_arguments)]
fn rotate_heads_into_cache<F: Numeric>(
    qkv: &Array<F>,
    q_weight: &Array<F>,
    k_weight: &Array<F>,
    tables: &Array<f32>,
    q: &mut Array<F>,
    keys: &mut Array<F>,
    values: &mut Array<F>,
    step: &Array<u32>,
    heads: usize,
    key_value_heads: usize,
    capacity: usize,
    known_at: usize,
    row_step: usize,
    known_cos: usize,
    table: usize,
    q_epsilon: f32,
    k_epsilon: f32,
    #[comptime] config: RotaryConfig,
    #[comptime] stepped: bool,
    #[define(F)] _dtype: StorageType,
) {
    let half = comptime!(config.half);
    let unit = UNIT_POS as usize;
    let mut at = known_at;
    let mut cos = known_cos;
    if stepped {
        at = step[0] as usize;
        cos = step[1] as usize;
    }
    let sin = cos + table;
    let all = heads + 2 * key_value_heads;
    let row = CUBE_POS / all;
    let head = CUBE_POS % all;
    let start = CUBE_POS * 2 * half;
    let angle = row * 2 * half + unit;
    if head < heads {
        let (first, second) = head_pair(qkv, q_weight, start, unit, q_epsilon, config);
        if unit < half {
            let (c, s) = (tables[cos + angle], tables[sin + angle]);
            let out = (row * heads + head) * 2 * half + unit;
            q[out] = F::cast_from(within(first * c - second * s, config.packing));
            q[out + half] = F::cast_from(within(second * c + first * s, config.packing));
        }
    } else if head < heads + key_value_heads {
        let (first, second) = head_pair(qkv, k_weight, start, unit, k_epsilon, config);
        if unit < half {
            let (c, s) = (tables[cos + angle], tables[sin + angle]);
            let slot = (head - heads) * capacity + row * row_step + at;
            let out = slot * 2 * half + unit;
            keys[out] = F::cast_from(within(first * c - second * s, config.packing));
            keys[out + half] = F::cast_from(within(second * c + first * s, config.packing));
        }
    } else if unit < half {
        let slot = (head - heads - key_value_heads) * capacity + row * row_step + at;
        let out = slot * 2 * half + unit;
        values[out] = qkv[start + unit];
        values[out + half] = qkv[start + half + unit];
    }
}

/// The norms of query and key heads, `[d]` each.
#[derive(Debug, Clone)]
pub(super) struct HeadNorms<R: CubeRuntime> {
    pub q: Buffer<R>,
    pub q_epsilon: f64,
    pub k: Buffer<R>,
    pub k_epsilon: f64,
}

/// Where a decode step is: tokens in the cache before its own, and where its cosines start in the tables.
#[derive(Debug)]
pub(super) enum Place<'a, R: CubeRuntime> {
    /// As the host knows.
    Known {
        /// Tokens in the cache.
        at: usize,
        /// Where the cosines start.
        cosines: usize,
    },
    /// Both on the device, u32 `[2]`.
    OnDevice(&'a Buffer<R>),
}

/// One token a row: queries normalised and rotated into `[rows, heads · d]`, keys likewise and values
/// unchanged into the place of the step in the cache `[rows, key_value_heads, capacity, d]`; of `one_sequence`, into places
/// from there on of the first sequence.
///
/// `qkv` is `[rows, (heads + 2 · key_value_heads) · d]`; in the tables, sines come after the cosines `[rows, d]`.
/// On the device a place must be within cache and tables.
pub(super) fn rotate_into_cache<R: CubeRuntime>(
    qkv: &Buffer<R>,
    norms: &HeadNorms<R>,
    tables: &Buffer<R>,
    place: &Place<'_, R>,
    [keys, values]: [&Buffer<R>; 2],
    one_sequence: bool,
) -> Buffer<R> {
    let [rows, width] = qkv.meta.shape().dims();
    let [_, key_value_heads, capacity, head_dim] = keys.meta.shape().dims();
    let heads = width / head_dim - 2 * key_value_heads;
    let (at, cosines, step) = match place {
        Place::Known { at, cosines } => (*at, *cosines, None),
        Place::OnDevice(step) => (0, 0, Some(*step)),
    };
    let (last, row_step) = match one_sequence {
        true => (at + rows - 1, 1),
        false => (at, key_value_heads * capacity),
    };
    assert!(
        last < capacity,
        "token {last} does not fit a cache of {capacity}"
    );
    let config = RotaryConfig::new(head_dim, qkv.dtype, true)
        .expect("the decoder starts with heads that are covered");
    let q = empty(qkv, [rows, heads * head_dim], qkv.dtype);
    let count = (rows * (heads + 2 * key_value_heads)) as u32;
    // SAFETY: a cube a head of `qkv`; the place in the cache was checked.
    #[allow(unsafe_code)]
    unsafe {
        rotate_heads_into_cache::launch_unchecked::<R>(
            &qkv.client,
            CubeCount::Static(count, 1, 1),
            CubeDim::new_1d(config.units as u32),
            elements(qkv),
            elements(&norms.q),
            elements(&norms.k),
            elements(tables),
            elements(&q),
            elements(keys),
            elements(values),
            array(step.unwrap_or(tables), 4),
            heads,
            key_value_heads,
            capacity,
            at,
            row_step,
            cosines,
            rows * head_dim,
            norms.q_epsilon as f32,
            norms.k_epsilon as f32,
            config,
            step.is_some(),
            qkv.dtype.into(),
        );
    }
    q
}

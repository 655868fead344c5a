//! Flash attention, forward and backward: `attention_forward.cu`, `attention_backward.cu`.

use burn::{prelude::*, tensor::DType};

use super::{
    launch::{
        Backend, Buffer, Defines, Kernel, Parameters, empty, float_bits, launch, strided, tensor,
    },
    operand::Operand,
    plan::card,
};
use crate::ops::AttentionSpans;

const COMMON: &str = include_str!("attention_common.cuh");
const FORWARD: &[&str] = &[
    include_str!("common.cuh"),
    COMMON,
    include_str!("attention_forward.cu"),
];
const BACKWARD: &[&str] = &[
    include_str!("common.cuh"),
    COMMON,
    include_str!("attention_backward.cu"),
];

/// Keys of a tile of the backward pass.
const TILE: usize = 64;

/// Whether the attention kernels cover heads of this width on a device.
pub(super) fn covers(device: usize, head_dim: usize, dtype: DType) -> bool {
    card(device).is_supported()
        && dtype == DType::BF16
        && head_dim.is_multiple_of(8)
        && (16..=128).contains(&head_dim)
}

fn kernel(
    name: &'static str,
    sources: &'static [&'static str],
    mut defines: Defines,
    head_dim: usize,
    threads: usize,
) -> Kernel {
    defines.push(("HEAD_DIM", head_dim as i64));
    Kernel::new(name, sources, defines, threads as u32).with_entry_macro("ATTN_NAME")
}

/// Bytes of a padded row in shared memory, as `ROW_BYTES` of `attention_common.cuh`.
fn row_bytes(head_dim: usize) -> usize {
    let chunks = head_dim.div_ceil(16) * 2;
    chunks * 16 + if chunks.is_multiple_of(8) { 0 } else { 16 }
}

/// Heads with contiguous elements that start at multiples of 16 bytes.
pub(super) fn with_contiguous_heads(x: Tensor<Backend, 4>) -> Buffer {
    let buffer = strided(x);
    let strides = buffer.meta.strides();
    // The stride of an axis of one element does not matter.
    let fits = |axis: usize| strides[axis].is_multiple_of(8) || buffer.meta.shape()[axis] == 1;
    if strides[3] == 1 && (0..3).all(fits) {
        buffer
    } else {
        burn_cubecl::kernel::into_contiguous(buffer)
    }
}

/// Strides of batch, head and row.
pub(super) fn strides(buffer: &Buffer) -> [u64; 3] {
    [0, 1, 2].map(|axis| buffer.meta.strides()[axis] as u64)
}

/// A new `[batch, heads, rows, head_dim]` tensor whose memory is `[batch, rows, heads, head_dim]`.
fn rows_first(like: &Buffer, [batch, heads, rows, head_dim]: [usize; 4]) -> Tensor<Backend, 4> {
    let buffer = empty(like, [batch, rows, heads, head_dim], like.dtype);
    tensor::<4>(buffer).swap_dims(1, 2)
}

/// Blocks that keep all processors of a card busy, two on each.
fn full(device: usize) -> usize {
    2 * card(device).processors
}

fn scale(head_dim: usize) -> f64 {
    (head_dim as f64).powf(-0.5)
}

fn ranges(pair: &[Tensor<Backend, 1, Int>; 2]) -> [Buffer; 2] {
    pair.clone().map(|values| values.into_primitive())
}

/// Attention output, and its log-sum-exp statistics where the backward pass needs them.
pub(super) fn forward(
    q: &Tensor<Backend, 4>,
    k: &Tensor<Backend, 4>,
    v: &Tensor<Backend, 4>,
    spans: &AttentionSpans<Backend>,
    with_statistics: bool,
) -> Option<(Tensor<Backend, 4>, Option<Tensor<Backend, 3>>)> {
    let [batch, heads, queries, head_dim] = q.dims();
    let one_type = [k.dtype(), v.dtype()] == [q.dtype(); 2];
    if !one_type || !covers(q.device().index, head_dim, q.dtype()) {
        return None;
    }
    let [_, kv_heads, keys, _] = k.dims();
    assert_eq!(
        spans.dims(),
        [batch, queries, keys],
        "the mask belongs to other tokens"
    );
    assert!(
        heads.is_multiple_of(kv_heads),
        "{heads} query heads over {kv_heads} key heads"
    );
    let [q, k, v] = [q, k, v].map(|x| with_contiguous_heads(x.clone()));
    // Smaller tiles where the large ones would leave processors idle.
    let tile = if queries.div_ceil(128) * heads * batch >= full(q.device.index) {
        128
    } else {
        64
    };
    let kernel = kernel(
        "attention_forward",
        FORWARD,
        vec![
            ("TILE_Q", tile as i64),
            ("WITH_LSE", i64::from(with_statistics)),
        ],
        head_dim,
        tile * 2,
    )
    .with_shared((tile + 256) * row_bytes(head_dim));
    let out = rows_first(&q, [batch, heads, queries, head_dim]);
    let out_buffer = strided(out.clone());
    let statistics = with_statistics.then(|| empty(&q, [batch, heads, queries], DType::F32));
    let mut parameters: Parameters = [&q, &k, &v, &out_buffer]
        .into_iter()
        .flat_map(strides)
        .collect();
    parameters.extend([heads, kv_heads, queries, keys].map(|size| size as u64));
    parameters.push(float_bits(scale(head_dim)));
    let [first, end] = ranges(spans.ranges());
    let values =
        |x, heads, rows| Operand::contiguous_rows(x, DType::BF16, [batch, heads, rows, head_dim]);
    let range = |x| Operand::contiguous(x, DType::I32, [batch * queries]);
    launch(
        &q.client,
        kernel,
        [queries.div_ceil(tile), heads, batch],
        &[
            values(&q, heads, queries),
            values(&k, kv_heads, keys),
            values(&v, kv_heads, keys),
            values(&out_buffer, heads, queries),
            statistics.as_ref().map_or_else(
                || Operand::unused(&out_buffer),
                |x| Operand::contiguous(x, DType::F32, [batch, heads, queries]),
            ),
            range(&first),
            range(&end),
        ],
        parameters,
    );
    Some((out, statistics.map(tensor)))
}

/// Compiles the forward kernels that sequences of any length may get, for heads of one width.
pub(super) fn prepare(head_dim: usize, device: &Device<Backend>) {
    let spans = AttentionSpans::blocks(&[1], device);
    // Few heads get the small tile, many the large one.
    for heads in [1, full(device.index)] {
        let x = Tensor::<Backend, 4>::empty([1, heads, 1, head_dim], (device, DType::BF16));
        let _ = forward(&x, &x, &x, &spans, false);
    }
}

/// Gradients of queries, keys and values, where [`forward`] made the statistics.
pub(super) fn backward(
    [q, k, v, y, dy]: [&Tensor<Backend, 4>; 5],
    statistics: Option<&Tensor<Backend, 3>>,
    spans: &AttentionSpans<Backend>,
) -> Option<[Tensor<Backend, 4>; 3]> {
    let statistics = super::launch::contiguous(statistics?.clone());
    let [batch, heads, queries, head_dim] = q.dims();
    let [_, kv_heads, keys, _] = k.dims();
    let [q, k, v, y, dy] = [q, k, v, y, dy].map(|x| with_contiguous_heads(x.clone()));
    let dq = rows_first(&q, [batch, heads, queries, head_dim]);
    let dk = rows_first(&q, [batch, kv_heads, keys, head_dim]);
    let dv = rows_first(&q, [batch, kv_heads, keys, head_dim]);
    let [dq_buffer, dk_buffer, dv_buffer] = [&dq, &dk, &dv].map(|x| strided(x.clone()));
    let row_sums = empty(&q, [batch, heads, queries], DType::F32);
    let mut parameters: Parameters = [&q, &k, &v, &y, &dy, &dq_buffer, &dk_buffer, &dv_buffer]
        .into_iter()
        .flat_map(strides)
        .collect();
    parameters.extend([batch, heads, kv_heads, queries, keys].map(|size| size as u64));
    parameters.push(float_bits(scale(head_dim)));
    let part = |part: i64| {
        let defines = vec![("PART", part), ("DQ_SUMS", 0)];
        kernel("attention_backward", BACKWARD, defines, head_dim, 128)
    };
    let tile_bytes = TILE * row_bytes(head_dim);
    let [first, end] = ranges(spans.ranges());
    let [first_query, end_query] = ranges(spans.key_ranges());
    let values =
        |x, heads, rows| Operand::contiguous_rows(x, DType::BF16, [batch, heads, rows, head_dim]);
    let of_queries = |x| values(x, heads, queries);
    let of_keys = |x| values(x, kv_heads, keys);
    let of_rows = |x| Operand::contiguous(x, DType::F32, [batch, heads, queries]);
    let range = |x| Operand::contiguous(x, DType::I32, [batch * queries]);
    let key_range = |x| Operand::contiguous(x, DType::I32, [batch * keys]);

    let rows_a_block = 128 / (head_dim / 8).next_power_of_two().max(2);
    launch(
        &q.client,
        part(0),
        [(batch * queries * heads).div_ceil(rows_a_block), 1, 1],
        &[of_queries(&y), of_queries(&dy), of_rows(&row_sums)],
        parameters.clone(),
    );
    launch(
        &q.client,
        part(1).with_shared(6 * tile_bytes + 2048),
        [keys.div_ceil(TILE), kv_heads, batch],
        &[
            of_queries(&q),
            of_keys(&k),
            of_keys(&v),
            of_queries(&dy),
            of_rows(&statistics),
            of_rows(&row_sums),
            range(&first),
            range(&end),
            key_range(&first_query),
            key_range(&end_query),
            of_keys(&dk_buffer),
            of_keys(&dv_buffer),
        ],
        parameters.clone(),
    );
    launch(
        &q.client,
        part(2).with_shared(6 * tile_bytes),
        [queries.div_ceil(TILE), heads, batch],
        &[
            of_queries(&q),
            of_keys(&k),
            of_keys(&v),
            of_queries(&dy),
            of_rows(&statistics),
            of_rows(&row_sums),
            range(&first),
            range(&end),
            of_queries(&dq_buffer),
        ],
        parameters,
    );
    Some([dq, dk, dv])
}

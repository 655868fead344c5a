//! Attention in plain operations: grouped-query heads without repeating keys, softmax in f32.

use crate::kernels::Kernels;
use burn::{
    prelude::*,
    tensor::{DType, TensorData, activation::softmax},
};

use super::nn::{to_dtype, to_f32};

/// Added to the score of a hidden key. Finite, so that a row with no visible key stays finite.
const HIDDEN: f32 = -1e30;

/// Query rows worked on at once: bounds the score matrix of a large image to some 100 MB.
const QUERY_ROWS: usize = 1024;

/// Which keys each query sees, as a bias on the scores: 0 or a large negative number.
#[derive(Debug, Clone)]
pub struct AttentionBias<B: Backend> {
    /// `[batch, 1, queries, keys]`, f32.
    bias: Tensor<B, 4>,
}

impl<B: Kernels> AttentionBias<B> {
    /// Causal attention inside segments.
    ///
    /// `segments[row][key]` names the sample a token belongs to, negative for padding; a token
    /// sees itself and what precedes it in its own segment. The queries are the last
    /// `keys - first_query` tokens of a row. `None` when plain causal masking of one query is all
    /// there is to do, that is when nothing is hidden.
    ///
    /// # Panics
    /// If rows differ in length.
    pub fn causal(segments: &[Vec<i32>], first_query: usize, device: &B::Device) -> Option<Self> {
        let keys = segments.first().map_or(0, Vec::len);
        let queries = keys - first_query;
        let mut values = Vec::with_capacity(segments.len() * queries * keys);
        let mut any_hidden = false;
        for row in segments {
            assert_eq!(row.len(), keys, "rows of segments differ in length");
            for query in first_query..keys {
                for (key, segment) in row.iter().enumerate() {
                    let seen = key <= query && *segment >= 0 && *segment == row[query];
                    any_hidden |= !seen;
                    values.push(if seen { 0.0 } else { HIDDEN });
                }
            }
        }
        any_hidden.then(|| Self {
            bias: Tensor::from_data(
                TensorData::new(values, [segments.len(), 1, queries, keys]),
                (device, DType::F32),
            ),
        })
    }

    /// The same bias on the autodiff backend, or back: mapped through `f`.
    pub fn map<C: Backend>(self, f: impl FnOnce(Tensor<B, 4>) -> Tensor<C, 4>) -> AttentionBias<C> {
        AttentionBias { bias: f(self.bias) }
    }
}

/// Scaled dot-product attention with grouped-query heads.
///
/// # Shapes
/// - `q`: `[batch, heads, queries, head_dim]`
/// - `k`, `v`: `[batch, key_value_heads, keys, head_dim]`; query head `h` reads key head
///   `h / (heads / key_value_heads)`
/// - returns: `[batch, heads, queries, head_dim]` in the dtype of `v`
pub fn attention<B: Kernels>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    bias: Option<&AttentionBias<B>>,
) -> Tensor<B, 4> {
    let [_, _, queries, _] = q.dims();
    if queries <= QUERY_ROWS {
        return attend(q, k, v, bias.map(|bias| bias.bias.clone()));
    }
    let parts = (0..queries)
        .step_by(QUERY_ROWS)
        .map(|start| {
            let rows = QUERY_ROWS.min(queries - start);
            attend(
                q.clone().narrow(2, start, rows),
                k.clone(),
                v.clone(),
                bias.map(|bias| bias.bias.clone().narrow(2, start, rows)),
            )
        })
        .collect();
    Tensor::cat(parts, 2)
}

fn attend<B: Kernels>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
    bias: Option<Tensor<B, 4>>,
) -> Tensor<B, 4> {
    let [batch, heads, queries, head_dim] = q.dims();
    let [_, key_value_heads, keys, _] = k.dims();
    let dtype = v.dtype();
    // Query heads that share a key head become more rows of one product.
    let rows = heads / key_value_heads * queries;
    let q = (q * (head_dim as f64).powf(-0.5)).reshape([batch, key_value_heads, rows, head_dim]);
    let scores = to_f32(q.matmul(k.swap_dims(2, 3))).reshape([batch, heads, queries, keys]);
    let scores = match bias {
        Some(bias) => scores + bias,
        None => scores,
    };
    let weights = to_dtype(softmax(scores, 3), dtype);
    weights
        .reshape([batch, key_value_heads, rows, keys])
        .matmul(v)
        .reshape([batch, heads, queries, head_dim])
}

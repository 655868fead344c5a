//! Layouts of attention heads.

use burn::prelude::*;

/// Heads before tokens, as attention takes them.
///
/// # Shapes
/// - `x`: `[batch × seq, heads, head_dim]`
/// - returns: `[batch, heads, seq, head_dim]`
pub fn heads_first<B: Backend>(x: Tensor<B, 3>, batch: usize) -> Tensor<B, 4> {
    let [tokens, heads, head_dim] = x.dims();
    x.reshape([batch, tokens / batch, heads, head_dim])
        .swap_dims(1, 2)
}

/// Tokens before heads, as the output projection takes them.
///
/// # Shapes
/// - `x`: `[batch, heads, seq, head_dim]`
/// - returns: `[batch × seq, heads × head_dim]`
pub fn tokens_first<B: Backend>(x: Tensor<B, 4>) -> Tensor<B, 2> {
    let [batch, heads, seq, head_dim] = x.dims();
    x.swap_dims(1, 2).reshape([batch * seq, heads * head_dim])
}

/// Splits the rows of a projection into heads.
///
/// # Shapes
/// - `x`: `[n, heads × head_dim]`
/// - returns: `[n, heads, head_dim]`
pub fn split_heads<B: Backend>(x: Tensor<B, 2>, head_dim: usize) -> Tensor<B, 3> {
    let [tokens, width] = x.dims();
    x.reshape([tokens, width / head_dim, head_dim])
}

//! New keys and values into a cache: `cache.cu`.

use burn::tensor::DType;

use super::{
    attention::{strides, with_contiguous_heads},
    launch::{Backend, Kernel, launch, strided, tensor},
    operand::Operand,
};
use crate::ops::KeysAndValues;

const SOURCES: &[&str] = &[include_str!("scalar.cuh"), include_str!("cache.cu")];

/// Writes in place, where nobody else holds the buffers.
#[expect(clippy::result_large_err, reason = "the buffers go back as they came")]
pub(super) fn append(
    buffers: KeysAndValues<Backend>,
    new: &KeysAndValues<Backend>,
    at: usize,
) -> Result<KeysAndValues<Backend>, KeysAndValues<Backend>> {
    let [batch, heads, rows, head_dim] = new[0].dims();
    let [_, _, capacity, _] = buffers[0].dims();
    let [keys, values] = buffers.map(strided);
    let ours = [&keys, &values]
        .into_iter()
        .all(|buffer| buffer.can_mut() && buffer.is_contiguous() && buffer.dtype == DType::BF16);
    let covered = head_dim.is_multiple_of(8) && new.iter().all(|x| x.dtype() == DType::BF16);
    if !ours || !covered || at + rows > capacity {
        return Err([tensor(keys), tensor(values)]);
    }
    let [new_keys, new_values] = new.clone().map(with_contiguous_heads);
    let kernel = Kernel::new(
        "append_to_cache",
        SOURCES,
        vec![("SCALAR_BF16", 1), ("HEAD_DIM", head_dim as i64)],
        256,
    );
    let mut parameters: Vec<u64> = [batch, heads, rows, capacity, at]
        .map(|size| size as u64)
        .to_vec();
    parameters.extend(strides(&new_keys));
    parameters.extend(strides(&new_values));
    let grid = [(2 * batch * heads * rows).div_ceil(8), 1, 1];
    let fresh = |x| Operand::contiguous_rows(x, DType::BF16, [batch, heads, rows, head_dim]);
    let held = |x| Operand::contiguous(x, DType::BF16, [batch, heads, capacity, head_dim]);
    let all = [
        fresh(&new_keys),
        fresh(&new_values),
        held(&keys),
        held(&values),
    ];
    launch(&keys.client, kernel, grid, &all, parameters);
    Ok([tensor(keys), tensor(values)])
}

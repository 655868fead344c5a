//! Matmul of f32 matrices in f32: `matmul_f32.cu`. Burn's own matmul uses TF32 on this backend.

use burn::{prelude::*, tensor::DType};

use super::{
    launch::{Backend, Kernel, empty, launch, strided, tensor},
    operand::Operand,
};

const SOURCES: &[&str] = &[include_str!("matmul_f32.cu")];

/// Rows and columns of a block's tile.
const TILE: usize = 64;

/// Largest extent of a grid along its second and third axes.
const MOST_BLOCKS: usize = 65_535;

/// `a b` over the last two axes, f32: `[.., m, k]` and `[.., k, n]` to `[.., m, n]`.
///
/// # Panics
/// If `k` is not the same in both.
pub(super) fn matmul<const D: usize>(
    a: &Tensor<Backend, D>,
    b: &Tensor<Backend, D>,
) -> Option<Tensor<Backend, D>> {
    let (left, right) = (a.dims(), b.dims());
    let covered = (2..=4).contains(&D)
        && [a.dtype(), b.dtype()] == [DType::F32; 2]
        && left[..D - 2] == right[..D - 2]
        && left.iter().chain(&right).all(|size| *size > 0)
        && left[..D - 2].iter().product::<usize>() <= MOST_BLOCKS
        && left[D - 2].div_ceil(TILE) <= MOST_BLOCKS;
    if !covered {
        return None;
    }
    let (m, k, n) = (left[D - 2], left[D - 1], right[D - 1]);
    assert_eq!(k, right[D - 2], "a matmul of {left:?} and {right:?}");
    let (a, b) = (strided(a.clone()), strided(b.clone()));
    // Missing axes have one element; their stride is never used.
    let strides = |buffer: &super::launch::Buffer| -> [u64; 4] {
        let mut all = [0; 4];
        for (axis, stride) in buffer.meta.strides().iter().enumerate() {
            all[4 - D + axis] = *stride as u64;
        }
        all
    };
    let mut shape = left;
    shape[D - 1] = n;
    let y = empty(&a, shape, DType::F32);
    let inner = if D > 2 { left[D - 3] } else { 1 };
    let mut parameters: Vec<u64> = [inner, m, n, k].map(|size| size as u64).to_vec();
    parameters.extend(strides(&a));
    parameters.extend(strides(&b));
    let kernel = Kernel::new("product_f32", SOURCES, vec![], 256);
    let batches = left[..D - 2].iter().product::<usize>();
    launch(
        &a.client,
        kernel,
        [n.div_ceil(TILE), m.div_ceil(TILE), batches],
        &[
            Operand::strided(&a, DType::F32, left),
            Operand::strided(&b, DType::F32, right),
            Operand::contiguous(&y, DType::F32, shape),
        ],
        parameters,
    );
    Some(tensor(y))
}

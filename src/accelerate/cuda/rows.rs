//! Norms over rows: `rows.cu`.

use burn::{prelude::*, tensor::DType};

use super::launch::{Backend, Buffer, Kernel, contiguous, empty, float_bits, launch, tensor};
use super::{operand::Operand, plan::card, scalar_of};

const SOURCES: &[&str] = &[include_str!("scalar.cuh"), include_str!("rows.cu")];

/// Widest row a block holds in registers.
const WIDEST: usize = 16_384;

/// Whether the kernels cover the rows of a tensor on this device.
pub(super) fn covers(device: usize, width: usize, dtype: DType) -> bool {
    card(device).is_supported()
        && scalar_of(dtype).is_some_and(|(_, vector)| width.is_multiple_of(vector))
        && width <= WIDEST
}

/// The kernel of one norm over rows of this width: `variant` is its macro in `rows.cu`.
pub(super) fn kernel(
    name: &'static str,
    variant: &'static str,
    width: usize,
    dtype: DType,
) -> Kernel {
    let (bf16, vector) = scalar_of(dtype).expect("`covers` accepted the type");
    let threads = (width / vector / 2)
        .next_power_of_two()
        .clamp(32, if width > 4096 { 512 } else { 256 });
    Kernel::new(
        name,
        SOURCES,
        vec![
            (variant, 1),
            ("SCALAR_BF16", bf16),
            ("WIDTH", width as i64),
            ("THREADS", threads as i64),
        ],
        threads as u32,
    )
}

/// One norm over the rows of `x`; `vectors` are over columns, `matrices` over rows and columns: the kernel
/// takes `x`, then them.
fn run(
    [name, variant]: [&'static str; 2],
    x: &Tensor<Backend, 2>,
    vectors: &[&Tensor<Backend, 1>],
    matrices: &[&Tensor<Backend, 2>],
    epsilon: f64,
) -> Option<Tensor<Backend, 2>> {
    let ([rows, width], dtype) = (x.dims(), x.dtype());
    let one_type = vectors.iter().all(|one| one.dtype() == dtype)
        && matrices.iter().all(|one| one.dtype() == dtype);
    if !one_type || !covers(x.device().index, width, dtype) {
        return None;
    }
    let x = contiguous(x.clone());
    let vectors: Vec<Buffer> = vectors
        .iter()
        .map(|one| contiguous((*one).clone()))
        .collect();
    let matrices: Vec<Buffer> = matrices
        .iter()
        .map(|one| contiguous((*one).clone()))
        .collect();
    let out = empty(&x, [rows, width], dtype);
    let matrix = |one| Operand::contiguous(one, dtype, [rows, width]);
    let mut operands = vec![matrix(&x)];
    operands.extend((vectors.iter()).map(|one| Operand::contiguous(one, dtype, [width])));
    operands.extend(matrices.iter().chain([&out]).map(matrix));
    let parameters = vec![rows as u64, float_bits(epsilon)];
    let kernel = kernel(name, variant, width, dtype);
    launch(&x.client, kernel, [rows, 1, 1], &operands, parameters);
    Some(tensor(out))
}

pub(super) fn rms_norm(
    x: &Tensor<Backend, 2>,
    weight: &Tensor<Backend, 1>,
    epsilon: f64,
) -> Option<Tensor<Backend, 2>> {
    run(["rms_norm", "NORM_RMS"], x, &[weight], &[], epsilon)
}

pub(super) fn rms_norm_backward(
    x: &Tensor<Backend, 2>,
    weight: &Tensor<Backend, 1>,
    epsilon: f64,
    dy: &Tensor<Backend, 2>,
    residual: &Tensor<Backend, 2>,
) -> Option<Tensor<Backend, 2>> {
    let kernel = ["rms_norm_backward", "NORM_RMS_BACKWARD"];
    run(kernel, x, &[weight], &[dy, residual], epsilon)
}

pub(super) fn layer_norm(
    x: &Tensor<Backend, 2>,
    weight: &Tensor<Backend, 1>,
    bias: &Tensor<Backend, 1>,
    epsilon: f64,
) -> Option<Tensor<Backend, 2>> {
    run(
        ["layer_norm", "NORM_LAYER"],
        x,
        &[weight, bias],
        &[],
        epsilon,
    )
}

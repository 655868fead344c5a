//! Training on quantised weights: gradients through matrices that are dequantised for one matmul ([`super::dequantised`]).
//!
//! The input's gradient sums over all outputs in f32 at once, so that a step gives the bits of training on the same
//! weights in bf16. The head goes in pieces.

use burn::{prelude::*, tensor::DType};

use super::{
    dequantised::pieces,
    frozen_matrix::{covers, whole},
    gemm::{self, Epilogue, WeightLayout},
    launch::{Backend, contiguous, tensor},
    loss,
};
use crate::ops::{TargetLoss, quantised::QuantisedWeight};

/// [`TrainingOps::input_gradient_quantised`](crate::ops::TrainingOps::input_gradient_quantised).
pub(super) fn input_gradient(
    dy: &Tensor<Backend, 2>,
    weight: &QuantisedWeight<Backend>,
) -> Option<Tensor<Backend, 2>> {
    covers(dy, weight).then(|| gemm::input_gradient(&[(dy.clone(), whole(weight))]))
}

/// [`TrainingOps::target_loss_quantised`](crate::ops::TrainingOps::target_loss_quantised).
pub(super) fn target_loss(
    hidden: &Tensor<Backend, 2>,
    head: &QuantisedWeight<Backend>,
    ids: &Tensor<Backend, 1, Int>,
    weight: f64,
) -> Option<TargetLoss<Backend>> {
    if !covers(hidden, head) {
        return None;
    }
    let logits = pieces(head).map(|(_, rows)| gemm::logits(hidden, &rows));
    let logits = contiguous(Tensor::cat(logits.collect::<Option<Vec<_>>>()?, 1));
    let (sums, gradient) = loss::softmax_loss(&logits, ids, weight);
    drop(logits);
    // Summed in f32, as one matmul over the whole head would.
    let parts = pieces(head).map(|((start, count), rows)| {
        let dy = contiguous(gradient.clone().narrow(1, start, count));
        let rows = contiguous(rows);
        let pair = [(&dy, &rows)];
        let dx = gemm::matmul(&pair, WeightLayout::InOut, Epilogue::default(), DType::F32);
        tensor::<2>(dx)
    });
    let sum = parts.reduce(|sum, part| sum + part)?;
    Some(TargetLoss {
        sums,
        hidden_gradient: sum.cast(DType::BF16),
    })
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;
    use crate::{
        accelerate::{
            cuda::tests::{Report, T, device},
            draws,
        },
        ops::{
            BackwardMatmul, DeviceOps, ForwardOps, LowRank, Matrix, TrainingOps,
            quantised::{Format, pack::pack},
        },
    };

    fn normal(shape: [usize; 2], std: f64, dtype: DType) -> T<2> {
        draws::normal(shape, std, dtype, &Default::default())
    }

    fn quantised([out, inner]: [usize; 2], format: Format) -> QuantisedWeight<Backend> {
        let values = normal([out, inner], 0.05, DType::F32).into_data();
        let values = values.to_vec::<f32>().unwrap();
        let Ok(matrix) = pack(out, inner, format, |row, to| {
            to.copy_from_slice(&values[row * inner..][..inner]);
            Ok::<_, Infallible>(())
        });
        QuantisedWeight::upload(matrix, out, inner, format, DType::BF16, &Default::default())
    }

    fn formats() -> [Format; 3] {
        [
            Format::Int8,
            Format::Int4 { group: 32 },
            Format::Int4 { group: 64 },
        ]
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn forward_and_backward_give_the_bits_of_the_dequantised_weights() {
        device();
        for format in formats() {
            for ([out, inner], rows) in [([512, 256], 5), ([1024, 2560], 200), ([96, 4320], 33)] {
                let name = format!("{format} {rows} x {inner} to {out}");
                let weight = quantised([out, inner], format);
                let floats = Backend::dequantise_rows(&weight, 0, out, DType::BF16);
                let adapter = LowRank {
                    a: normal([8, inner], 0.1, DType::F32),
                    b: normal([out, 8], 0.1, DType::F32),
                    scaling: 4.0,
                    dropout: None,
                };
                let x = normal([rows, inner], 1.0, DType::BF16);
                let low = Backend::low_rank_inputs(x.clone(), &[&adapter]).remove(0);
                let bits = |x: T<2>| x.into_data().bytes.to_vec();
                let residual = Some(normal([rows, out], 1.0, DType::BF16));
                let got = Backend::adapted_linear_for_backward(
                    x.clone(),
                    &weight,
                    low.clone(),
                    &adapter,
                    residual.clone(),
                );
                let want = Backend::adapted_linear(x, floats.clone(), low, &adapter, residual);
                assert!(bits(got) == bits(want), "{name}: forward");
                let dy = normal([rows, out], 1.0, DType::BF16);
                let dlow = normal([rows, 8], 1.0, DType::BF16);
                let both = |weight: Matrix<Backend>| {
                    let matmul = |adapter| BackwardMatmul {
                        dy: dy.clone(),
                        weight: weight.clone(),
                        adapter,
                    };
                    let adapted = Some((dlow.clone(), adapter.clone()));
                    Backend::input_gradient(&[matmul(adapted), matmul(None)])
                };
                let got = both(Matrix::Quantised(weight.clone()));
                assert!(
                    bits(got) == bits(both(floats.clone().into())),
                    "{name}: backward"
                );
                let got = Backend::input_gradient_quantised(dy.clone(), &weight);
                let want = gemm::input_gradient(&[(dy, floats)]);
                assert!(bits(got) == bits(want), "{name}: alone");
            }
        }
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn the_loss_of_a_head_in_pieces_is_that_of_its_floats() {
        let device = device();
        let mut report = Report::default();
        // The second takes three pieces.
        for ([vocab, width], rows) in [([1000, 256], 7), ([33_000, 1024], 130)] {
            let head = quantised([vocab, width], Format::Int8);
            let floats = Backend::dequantise_rows(&head, 0, vocab, DType::BF16);
            let hidden = normal([rows, width], 1.0, DType::BF16);
            let ids: Vec<i32> = (0..rows as i32)
                .map(|row| row * 37 % vocab as i32)
                .collect();
            let ids = Tensor::<Backend, 1, Int>::from_ints(ids.as_slice(), &device);
            let got = Backend::target_loss_quantised(hidden.clone(), &head, ids.clone(), 0.01);
            let want = Backend::target_loss(hidden, floats, ids, 0.01);
            report.close(&format!("loss {rows} x {vocab}"), got.sums, want.sums, 1e-6);
            let name = format!("gradient {rows} x {vocab}");
            report.close(&name, got.hidden_gradient, want.hidden_gradient, 3e-3);
        }
        report.finish();
    }

    /// What comes after a dequantised matrix in a step still has memory of its exact size: a pool would take
    /// pages of gigabytes.
    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn dequantising_leaves_the_memory_of_the_step_exact() {
        let device = device();
        let weight = quantised([1024, 2560], Format::Int8);
        let reserved = || Backend::memory_in_use(&device).map_or(0, |memory| memory.reserved);
        Backend::in_exact_memory(&device, Some(&[1024]), || {
            let rows = Backend::dequantise_for_matmul(&weight, 0, 1024, DType::BF16);
            let before = reserved();
            let large = T::<1>::zeros([100 << 20], (&device, DType::F32));
            let taken = reserved() - before;
            assert!(
                (400 << 20..420 << 20).contains(&taken),
                "{taken} bytes were taken"
            );
            drop((rows, large));
        });
    }
}

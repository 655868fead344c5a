//! The backward pass through quantised matrices in plain Burn: some rows as floats at a time.

use burn::prelude::*;

use super::{QuantisedWeight, matmul::by_rows};
use crate::ops::{
    TargetLoss, TrainingOps,
    cast::{to_dtype, to_f32},
    plain::loss_and_logit_gradient,
};

/// `dy W`, `[n, out]` → `[n, in]` in the type of `dy`.
///
/// Products of several pieces are added up in f32: each sum would round the gradient once more in a
/// half type.
pub(crate) fn input_gradient<B: TrainingOps>(
    dy: Tensor<B, 2>,
    weight: &QuantisedWeight<B>,
) -> Tensor<B, 2> {
    let dtype = dy.dtype();
    let [out, _] = weight.dims();
    let mut pieces = weight.row_pieces(dtype).map(|(start, count)| {
        let rows = B::dequantise_for_matmul(weight, start, count, dtype);
        let dy = match count == out {
            true => dy.clone(),
            false => dy.clone().narrow(1, start, count),
        };
        B::matmul(dy, rows)
    });
    let first = pieces.next().expect("a matrix has rows");
    let mut pieces = pieces.peekable();
    if pieces.peek().is_none() {
        return first;
    }
    to_dtype(
        pieces.fold(to_f32(first), |sum, piece| sum + to_f32(piece)),
        dtype,
    )
}

/// [`TrainingOps::target_loss`] with a quantised head, which counts as floats of its
/// [`dtype`](QuantisedWeight::dtype).
pub(crate) fn target_loss<B: TrainingOps>(
    hidden: Tensor<B, 2>,
    head: &QuantisedWeight<B>,
    ids: Tensor<B, 1, Int>,
    weight: f64,
) -> TargetLoss<B> {
    let dtype = hidden.dtype();
    let logits = by_rows(head, head.dtype(), |rows, _, _| {
        B::logits(hidden.clone(), rows)
    });
    let (sums, gradient) = loss_and_logit_gradient(logits, ids, weight);
    let gradient = to_dtype(gradient, head.dtype());
    TargetLoss {
        sums,
        hidden_gradient: to_dtype(B::input_gradient_quantised(gradient, head), dtype),
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::{
        backend::Autodiff,
        tensor::{DType, Distribution, Tolerance},
    };
    use burn_flex::Flex;

    use super::*;
    use crate::ops::{
        BackwardMatmul, ForwardOps, LowRank,
        quantised::{Format, pack::pack},
    };

    type AB = Autodiff<Flex>;

    const FORMATS: [Format; 3] = [
        Format::Int8,
        Format::Int4 { group: 32 },
        Format::Int4 { group: 64 },
    ];

    fn normal<B: Backend>(shape: [usize; 2], std: f64) -> Tensor<B, 2> {
        let options = (&Default::default(), DType::F32);
        Tensor::random(shape, Distribution::Normal(0.0, std), options)
    }

    fn quantised([out, inner]: [usize; 2], format: Format) -> QuantisedWeight<Flex> {
        let floats: Vec<f32> = normal::<Flex>([out, inner], 0.1)
            .into_data()
            .to_vec()
            .unwrap();
        let Ok(matrix) = pack(out, inner, format, |row, values| {
            values.copy_from_slice(&floats[row * inner..][..inner]);
            Ok::<_, std::convert::Infallible>(())
        });
        let device = Default::default();
        QuantisedWeight::upload(matrix, out, inner, format, DType::F32, &device)
    }

    fn close<const D: usize>(what: &str, ours: Tensor<Flex, D>, want: Tensor<Flex, D>) {
        // The same numbers are added up in another order at most.
        let tolerance = Tolerance::absolute(1e-5).set_relative(1e-5);
        let (ours, want) = (ours.into_data(), want.into_data());
        assert_eq!(ours.shape, want.shape, "{what}");
        ours.assert_approx_eq::<f32>(&want, tolerance);
    }

    /// Widths that fill no word, no group and no piece of 16 bytes among them.
    const SHAPES: [[usize; 2]; 4] = [[24, 64], [7, 100], [5, 33], [1, 3]];

    #[test]
    fn gradients_are_those_of_autodiff_through_the_dequantised_floats() {
        for format in FORMATS {
            for [out, inner] in SHAPES {
                let name = format!("{format} [{out}, {inner}]");
                let weight = quantised([out, inner], format);
                let dy = normal::<Flex>([6, out], 1.0);
                let x = normal::<Flex>([6, inner], 1.0);
                let (a, b) = (
                    normal::<Flex>([3, inner], 0.3),
                    normal::<Flex>([out, 3], 0.3),
                );
                // Through the floats, and recorded over the words.
                let leaf =
                    |x: &Tensor<Flex, 2>| Tensor::<AB, 2>::from_inner(x.clone()).require_grad();
                let gradients = |is_quantised: bool| {
                    let [x, a, b] = [&x, &a, &b].map(leaf);
                    let adapter = LowRank {
                        a: a.clone(),
                        b: b.clone(),
                        scaling: 2.0,
                        dropout: None,
                    };
                    let residual = Some(Tensor::from_inner(dy.clone()));
                    let y = if is_quantised {
                        let weight = QuantisedWeight::from_inner(weight.clone());
                        AB::adapted_linear_quantised(x.clone(), &weight, &adapter, residual)
                    } else {
                        let weight = Tensor::from_inner(weight.unpack(DType::F32));
                        let low = AB::low_rank_inputs(x.clone(), &[&adapter]).remove(0);
                        AB::adapted_linear(x.clone(), weight, low, &adapter, residual)
                    };
                    let value = y.clone().inner();
                    let tape = (y * Tensor::from_inner(dy.clone())).sum().backward();
                    let all = [x, a, b].map(|leaf| leaf.grad(&tape).expect("it is trained"));
                    (value, all)
                };
                let (ours, want) = (gradients(true), gradients(false));
                close(&name, ours.0, want.0);
                for (ours, want) in ours.1.into_iter().zip(want.1.clone()) {
                    close(&name, ours, want);
                }
                // The operation alone, and with an adapter beside.
                let floats = weight.unpack(DType::F32);
                let want = dy.clone().matmul(floats.clone());
                close(
                    &name,
                    Flex::input_gradient_quantised(dy.clone(), &weight),
                    want,
                );
                let matmul = |weight| {
                    let adapter = LowRank {
                        a: a.clone(),
                        b: b.clone(),
                        scaling: 2.0,
                        dropout: None,
                    };
                    let dlow = (dy.clone() * 2.0).matmul(b.clone());
                    [BackwardMatmul {
                        dy: dy.clone(),
                        weight,
                        adapter: Some((dlow, adapter)),
                    }]
                };
                close(
                    &name,
                    Flex::input_gradient(&matmul(crate::ops::Matrix::Quantised(weight.clone()))),
                    Flex::input_gradient(&matmul(floats.into())),
                );
            }
        }
    }

    /// Of a matrix in several pieces, in f32 and in a half type, in which the sum of pieces is rounded once.
    #[test]
    fn pieces_add_up_to_the_whole() {
        let [out, inner] = [9000, 1024];
        let format = Format::Int8;
        let device = Default::default();
        let mut state = 1u32;
        let words: Vec<i32> = (0..out * format.words(inner))
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state as i32
            })
            .collect();
        let words = TensorData::new(words, [out, format.words(inner)]);
        let words = Tensor::from_data(words, (&device, DType::I32));
        let scales = Tensor::full([out, 1], 1e-3, (&device, DType::F32));
        let weight = QuantisedWeight::<Flex>::new(words, scales, format, inner, DType::F32);
        assert_eq!(weight.row_pieces(DType::F32).count(), 2);
        let covered: usize = weight.row_pieces(DType::F32).map(|(_, count)| count).sum();
        assert_eq!(covered, out);
        let dy = normal::<Flex>([3, out], 1.0);
        let ours = Flex::input_gradient_quantised(dy.clone(), &weight);
        let want = dy.clone().matmul(weight.unpack(DType::F32));
        // Sums of 9,000 products of about 0.07.
        let tolerance = Tolerance::absolute(1e-3);
        (ours.into_data()).assert_approx_eq::<f32>(&want.into_data(), tolerance);
    }

    #[test]
    fn the_loss_of_a_quantised_head_is_that_of_its_floats() {
        let [targets, vocab, hidden] = [5, 203, 40];
        let head = quantised([vocab, hidden], Format::Int8);
        let x = normal::<Flex>([targets, hidden], 1.0);
        let ids = Tensor::<Flex, 1, Int>::from_ints([0, 202, 7, 7, 100], &Default::default());
        let ours = Flex::target_loss_quantised(x.clone(), &head, ids.clone(), 0.3);
        let want = Flex::target_loss(x, head.unpack(DType::F32), ids, 0.3);
        close("sums", ours.sums, want.sums);
        close("gradient", ours.hidden_gradient, want.hidden_gradient);
    }
}

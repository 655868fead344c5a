//! Matmuls, dropout masks and adapters.

use super::*;

/// `a b` on the host, in f64.
fn host_matmul(a: &T<3>, b: &T<3>) -> T<3> {
    let ([batches, m, k], [_, _, n]) = (a.dims(), b.dims());
    let values = |x: &T<3>| -> Vec<f64> {
        let data = x.clone().into_data();
        data.iter::<f32>().map(f64::from).collect()
    };
    let (left, right) = (values(a), values(b));
    let mut y = Vec::with_capacity(batches * m * n);
    for batch in 0..batches {
        for row in 0..m {
            for column in 0..n {
                let terms = (0..k).map(|at| {
                    left[(batch * m + row) * k + at] * right[(batch * k + at) * n + column]
                });
                y.push(terms.sum::<f64>() as f32);
            }
        }
    }
    let data = burn::tensor::TensorData::new(y, [batches, m, n]);
    Tensor::from_data(data, (&a.device(), DType::F32))
}

/// f32 is multiplied in f32, forward and backward; TF32 would be some 3e-4 away.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn matmuls_of_f32() {
    use burn::backend::Autodiff;
    let device = device();
    let mut report = Report::default();
    for (batches, m, k, n) in some(vec![
        (1, 1, 5, 3),
        (2, 65, 33, 70),
        (3, 130, 200, 64),
        (1, 7, 4096, 129),
    ]) {
        let name = |what| format!("{what} {batches} x {m} x {k} x {n}");
        let a = normal([batches, m, k], 1.0, DType::F32, &device);
        let b = normal([batches, k, n], 1.0, DType::F32, &device);
        let dy = normal([batches, m, n], 1.0, DType::F32, &device);
        let want = host_matmul(&a, &b);
        report.close(
            &name("matmul"),
            Cuda::matmul(a.clone(), b.clone()),
            want.clone(),
            2e-6,
        );
        // The same operands, strided as transposed views are.
        let transposed = |x: &T<3>| launch_contiguous(x.clone().swap_dims(1, 2)).swap_dims(1, 2);
        report.close(
            &name("matmul of views"),
            Cuda::matmul(transposed(&a), transposed(&b)),
            want,
            2e-6,
        );
        let [left, right] =
            [&a, &b].map(|x| Tensor::<Autodiff<Cuda>, 3>::from_inner(x.clone()).require_grad());
        let y = Autodiff::<Cuda>::matmul(left.clone(), right.clone());
        let gradients = (y * Tensor::from_inner(dy.clone())).sum().backward();
        report.close(
            &name("gradient of the left"),
            left.grad(&gradients).expect("it requires a gradient"),
            host_matmul(&dy, &b.swap_dims(1, 2)),
            2e-6,
        );
        report.close(
            &name("gradient of the right"),
            right.grad(&gradients).expect("it requires a gradient"),
            host_matmul(&a.swap_dims(1, 2), &dy),
            2e-6,
        );
    }
    report.finish();
}

fn launch_contiguous<const D: usize>(x: T<D>) -> T<D> {
    super::super::launch::tensor(super::super::launch::contiguous(x))
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn matmuls() {
    let device = device();
    let mut report = Report::default();
    let shapes = vec![
        (1, 64, 64),
        (7, 72, 136),
        (129, 1152, 4304),
        (368, 4096, 1024),
        (300, 4304, 1152),
        (640, 4096, 4096),
    ];
    for (rows, inner, out) in some(shapes) {
        let name = |what| format!("{what} {rows} x {inner} x {out}");
        let x = normal([rows, inner], 1.0, DType::BF16, &device);
        let weight = normal([out, inner], 0.02, DType::BF16, &device);
        let bias = normal([out], 1.0, DType::BF16, &device);
        let residual = normal([rows, out], 1.0, DType::BF16, &device);
        let (xf, wf) = (to_f32(x.clone()), to_f32(weight.clone()));
        for (bias, residual) in [
            (None, None),
            (Some(bias.clone()), None),
            (Some(bias.clone()), Some(residual.clone())),
        ] {
            report.close(
                &name("linear"),
                Cuda::linear_add(x.clone(), weight.clone(), bias.clone(), residual.clone()),
                plain::linear(
                    xf.clone(),
                    wf.clone(),
                    bias.map(to_f32),
                    residual.map(to_f32),
                ),
                ONE_ROUNDING,
            );
        }
        for activation in [Activation::GeluTanh, Activation::GeluExact] {
            let bias = Some(bias.clone());
            let want = plain::linear(xf.clone(), wf.clone(), bias.clone().map(to_f32), None);
            let want = match activation {
                Activation::GeluTanh => gelu_tanh(want),
                Activation::GeluExact => gelu_exact(want),
            };
            report.close(
                &name("linear_activated"),
                Cuda::linear_activated(x.clone(), weight.clone(), bias, activation),
                want,
                ONE_ROUNDING,
            );
        }
        report.close(
            &name("logits"),
            Cuda::logits(x.clone(), weight.clone()),
            xf.matmul(wf.clone().transpose()),
            1e-4,
        );
        let dy = normal([rows, out], 1.0, DType::BF16, &device);
        let more = normal([rows, 64], 1.0, DType::BF16, &device);
        let other = normal([64, inner], 0.1, DType::BF16, &device);
        let matmul = |dy: &T<2>, weight: &T<2>| BackwardMatmul {
            dy: dy.clone(),
            weight: weight.clone().into(),
            adapter: None,
        };
        let want =
            to_f32(dy.clone()).matmul(wf) + to_f32(more.clone()).matmul(to_f32(other.clone()));
        report.close(
            &name("input_gradient"),
            Cuda::input_gradient(&[matmul(&dy, &weight), matmul(&more, &other)]),
            want,
            SOME_ROUNDINGS,
        );
    }
    report.finish();
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn dropout_masks_are_the_host_s_bit_for_bit() {
    draws::check_dropout_masks::<Cuda>(&device());
}

/// Adapters over one input, alone and several together, of which a launch may serve some.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn adapters() {
    let device = device();
    let mut report = Report::default();
    for (rows, inner, outs, rank) in some(vec![
        (1, 64, vec![96], 8),
        (33, 1152, vec![128, 32], 16),
        (400, 4096, vec![1024, 256, 256], 8),
        (1000, 256, vec![4096], 32),
        (65, 96, vec![160, 64], 24),
        (130, 512, vec![64, 64, 64], 64),
    ]) {
        for dropout in [None, Some(0.25)] {
            let name =
                |what: &str| format!("{what} {rows} x {inner} x {outs:?} r {rank} {dropout:?}");
            let x = normal([rows, inner], 1.0, DType::BF16, &device);
            let xf = to_f32(x.clone());
            let weights: Vec<T<2>> = (outs.iter())
                .map(|out| normal([*out, inner], 0.02, DType::BF16, &device))
                .collect();
            let adapters: Vec<LowRank<Cuda>> = (outs.iter().enumerate())
                .map(|(index, out)| LowRank {
                    a: normal([rank, inner], 0.05, DType::F32, &device),
                    b: normal([*out, rank], 0.1, DType::F32, &device),
                    scaling: 4.0,
                    dropout: dropout.map(|probability| Dropout {
                        probability,
                        seed: 11 + index as u64,
                    }),
                })
                .collect();
            // The adapters' factors are rounded to bf16 for the tensor cores.
            let close = 1e-2;
            let shared: Vec<_> = adapters.iter().collect();
            let lows = Cuda::low_rank_inputs(x.clone(), &shared);
            let (mut backwards, mut exact) = (Vec::new(), Vec::new());
            for ((adapter, weight), low) in adapters.iter().zip(&weights).zip(lows) {
                let want_low = plain::low_rank_input(xf.clone(), adapter);
                report.close(&name("low"), low.clone(), want_low.clone(), close);
                let [out, _] = weight.dims();
                let residual = normal([rows, out], 1.0, DType::BF16, &device);
                report.close(
                    &name("adapted_linear"),
                    Cuda::adapted_linear(
                        x.clone(),
                        weight.clone(),
                        low.clone(),
                        adapter,
                        Some(residual.clone()),
                    ),
                    plain::adapted_linear(
                        xf.clone(),
                        to_f32(weight.clone()),
                        want_low.clone(),
                        adapter,
                        Some(to_f32(residual)),
                    ),
                    close,
                );
                let dy = normal([rows, out], 1.0, DType::BF16, &device);
                let backward = |low, dy| LowRankBackward {
                    low,
                    dy,
                    adapter: adapter.clone(),
                };
                exact.push(backward(want_low, to_f32(dy.clone())));
                backwards.push(backward(low, dy));
            }
            let got = Cuda::low_rank_backward(x, &backwards);
            let (mut matmuls, mut exact_matmuls) = (Vec::new(), Vec::new());
            for (index, got) in got.into_iter().enumerate() {
                let want = plain::low_rank_backward(xf.clone(), &exact[index]);
                report.close(&name("gradient of A"), got.a, want.a, close);
                report.close(&name("gradient of B"), got.b, want.b, close);
                let low = &name("gradient of low");
                report.close(low, got.low.clone(), want.low.clone(), close);
                let matmul = |dy, weight: T<2>, low| BackwardMatmul {
                    dy,
                    weight: weight.into(),
                    adapter: Some((low, adapters[index].clone())),
                };
                let weight = weights[index].clone();
                matmuls.push(matmul(backwards[index].dy.clone(), weight.clone(), got.low));
                let dy = exact[index].dy.clone();
                exact_matmuls.push(matmul(dy, to_f32(weight), want.low));
            }
            report.close(
                &name("input_gradient"),
                Cuda::input_gradient(&matmuls),
                plain::input_gradient(&exact_matmuls),
                close,
            );
            let [gate, up] = [2.0, 1.0].map(|std| normal([rows, inner], std, DType::BF16, &device));
            let got = Cuda::swiglu_input_gradient(matmuls.remove(0), gate.clone(), up.clone());
            let want = plain::swiglu_backward(
                to_f32(gate),
                to_f32(up),
                plain::input_gradient(&exact_matmuls[..1]),
            );
            for (got, want) in got.into_iter().zip(want) {
                report.close(&name("swiglu_input_gradient"), got, want, close);
            }
        }
    }
    report.finish();
}

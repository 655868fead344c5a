//! Every kernel against the default it replaces, over odd shapes, in f32 and, where the adapter has it,
//! f16.
//!
//! The reference is the default on the same inputs cast to f32. Tolerances are relative distances
//! (norm of the difference over norm of the reference): an f16 result is rounded once, 2⁻¹² on average;
//! f32 sums in another order differ by some 1e-6, and a software device's root and exponential by some
//! 1e-5.

mod attention;
mod steps;

use burn::{
    prelude::*,
    tensor::{
        DType,
        backend::{Backend as _, BackendTypes},
    },
};

use super::{
    super::wgpu_setup::wgpu_setup,
    matvec::{self, InputNorm},
    vulkan::{Backend, contiguous, tensor},
};
use crate::{
    accelerate::draws,
    ops::{
        ForwardOps, LowRank,
        cast::{to_dtype, to_f32},
        plain,
        plain::{gelu_exact, gelu_tanh},
    },
};

type T<const D: usize> = Tensor<Backend, D>;
type Device = <Backend as BackendTypes>::Device;

/// The device, opened as `--device wgpu` opens it.
pub(super) fn device() -> Device {
    draws::begin();
    let device = Device::default();
    wgpu_setup(&device).expect("the first use of the device in this process");
    device
}

/// Types of the device that are compared.
fn dtypes(device: &Device) -> Vec<DType> {
    let all = [DType::F32, DType::F16];
    all.into_iter()
        .filter(|dtype| Backend::supports_dtype(device, *dtype))
        .collect()
}

fn normal<const D: usize>(shape: [usize; D], std: f64, dtype: DType, device: &Device) -> T<D> {
    draws::normal(shape, std, dtype, device)
}

/// Relative distances seen, and which were too large.
#[derive(Default)]
struct Report(Vec<String>);

impl Report {
    fn close<const D: usize>(&mut self, name: &str, got: T<D>, want: T<D>, dtype: DType) {
        assert_eq!(got.dims(), want.dims(), "{name}");
        let values = |x: T<D>| -> Vec<f64> {
            let data = to_f32(x).into_data();
            data.iter::<f32>().map(f64::from).collect()
        };
        let (got, want) = (values(got), values(want));
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>().sqrt();
        let reference = norm(&mut want.iter().copied());
        let distance = norm(&mut got.iter().zip(&want).map(|(a, b)| a - b)) / reference.max(1e-30);
        let allowed = if dtype == DType::F32 { 2e-5 } else { 1e-3 };
        // A NaN is too far as well.
        let fine = distance <= allowed;
        let mark = if fine { "ok  " } else { "FAIL" };
        println!("{mark} {name} {dtype:?}: {distance:.2e}");
        if !fine {
            self.0.push(format!(
                "{name} {dtype:?}: {distance:.3e}, allowed {allowed:.0e}"
            ));
        }
    }

    fn finish(self) {
        assert!(self.0.is_empty(), "{:#?}", self.0);
    }
}

#[test]
#[ignore = "needs a Vulkan device"]
fn matmuls_of_few_rows() {
    let device = device();
    let mut report = Report::default();
    for dtype in dtypes(&device) {
        for (rows, inner, out) in [
            (1, 8, 1),
            (1, 64, 64),
            (2, 200, 37),
            (3, 1152, 130),
            (8, 4304, 33),
            (5, 2304, 96),
        ] {
            let name = |what: &str| format!("{what} {rows} x {inner} x {out}");
            let x = normal([rows, inner], 1.0, dtype, &device);
            let weight = normal([out, inner], 0.05, dtype, &device);
            let bias = normal([out], 1.0, dtype, &device);
            let residual = normal([rows, out], 1.0, dtype, &device);
            let scale = normal([inner], 1.0, dtype, &device);
            let (xf, wf) = (to_f32(x.clone()), to_f32(weight.clone()));
            for (bias, residual) in [
                (None, None),
                (Some(bias.clone()), None),
                (Some(bias.clone()), Some(residual.clone())),
            ] {
                report.close(
                    &name("linear"),
                    Backend::linear_add(x.clone(), weight.clone(), bias.clone(), residual.clone()),
                    plain::linear(
                        xf.clone(),
                        wf.clone(),
                        bias.map(to_f32),
                        residual.map(to_f32),
                    ),
                    dtype,
                );
            }
            // Logits are f32 whatever the weights are, and only summed in another order.
            report.close(
                &name("logits"),
                Backend::logits(x.clone(), weight.clone()),
                xf.clone().matmul(wf.clone().transpose()),
                DType::F32,
            );
            let norm = InputNorm {
                weight: contiguous(scale.clone()),
                epsilon: 1e-6,
            };
            let normed = plain::rms_norm(xf, to_f32(scale), 1e-6);
            let (x, matrix) = (contiguous(x), contiguous(weight));
            let got = matvec::matmul(&x, Some(&norm), &matrix, None, None, dtype);
            let want = normed.clone().matmul(wf.clone().transpose());
            report.close(
                &name("norm and matmul"),
                tensor::<2>(got),
                want.clone(),
                dtype,
            );
            let got = matvec::swiglu_matmul(&x, &norm, &matrix, &matrix);
            let want = plain::swiglu(want.clone(), want);
            report.close(&name("swiglu matmul"), tensor::<2>(got), want, dtype);
        }
        adapters(dtype, &device, &mut report);
        let weights = [12, 4, 8].map(|out| normal([out, 72], 0.1, dtype, &device));
        let (x, scale) = (
            normal([2, 72], 1.0, dtype, &device),
            normal([72], 1.0, dtype, &device),
        );
        let normed = plain::rms_norm(to_f32(x.clone()), to_f32(scale.clone()), 1e-6);
        let parts = weights
            .clone()
            .map(|w| normed.clone().matmul(to_f32(w).transpose()));
        let norm = InputNorm {
            weight: contiguous(scale),
            epsilon: 1e-6,
        };
        let matrices = weights.map(contiguous);
        let got = matvec::three_matmuls(&contiguous(x), &norm, matrices.each_ref());
        let want = Tensor::cat(parts.to_vec(), 1);
        report.close("three matmuls", tensor::<2>(got), want, dtype);
    }
    report.finish();
}

fn adapters(dtype: DType, device: &Device, report: &mut Report) {
    for (rows, inner, out, rank) in [(1, 64, 96, 8), (3, 200, 37, 4), (2, 72, 24, 6)] {
        let x = normal([rows, inner], 1.0, dtype, device);
        let weight = normal([out, inner], 0.05, dtype, device);
        let residual = normal([rows, out], 1.0, dtype, device);
        let adapter = LowRank {
            a: normal([rank, inner], 0.1, DType::F32, device),
            b: normal([out, rank], 0.1, DType::F32, device),
            scaling: 4.0,
            dropout: None,
        };
        let wide = [&x, &weight, &residual].map(|x| to_f32(x.clone()));
        let [xf, wf, rf] = wide;
        let low = Backend::low_rank_inputs(x.clone(), &[&adapter]).remove(0);
        let low_wanted = plain::low_rank_input(xf.clone(), &adapter);
        let name = format!("adapted_linear {rows} x {inner} x {out} r {rank}");
        report.close(
            &format!("{name}, low"),
            low.clone(),
            low_wanted.clone(),
            DType::F32,
        );
        let got = Backend::adapted_linear(x, weight, low, &adapter, Some(residual));
        let want = plain::adapted_linear(xf, wf, low_wanted, &adapter, Some(rf));
        report.close(&name, got, want, dtype);
    }
}

#[test]
#[ignore = "needs a Vulkan device"]
fn dropout_masks_are_the_host_s_bit_for_bit() {
    draws::check_dropout_masks::<Backend>(&device());
}

#[test]
#[ignore = "needs a Vulkan device"]
fn norms() {
    let device = device();
    let mut report = Report::default();
    for dtype in dtypes(&device) {
        for (rows, width) in [(1, 64), (3, 1152), (130, 72), (5, 4096), (7, 200)] {
            let name = |what: &str| format!("{what} [{rows}, {width}]");
            let x = normal([rows, width], 2.0, dtype, &device) + 3.0;
            let weight = normal([width], 1.0, dtype, &device);
            let bias = normal([width], 1.0, dtype, &device);
            let (xf, wf) = (to_f32(x.clone()), to_f32(weight.clone()));
            report.close(
                &name("rms_norm"),
                Backend::rms_norm(x.clone(), weight.clone(), 1e-6),
                plain::rms_norm(xf.clone(), wf.clone(), 1e-6),
                dtype,
            );
            report.close(
                &name("layer_norm"),
                Backend::row_layer_norm(x, weight, bias.clone(), 1e-6),
                plain::layer_norm(xf, wf, to_f32(bias), 1e-6),
                dtype,
            );
        }
    }
    report.finish();
}

#[test]
#[ignore = "needs a Vulkan device"]
fn pointwise() {
    let device = device();
    let mut report = Report::default();
    for dtype in dtypes(&device) {
        for (rows, width) in [(1, 8), (3, 4304), (37, 136)] {
            let name = |what: &str| format!("{what} [{rows}, {width}]");
            let gate = normal([rows, width], 3.0, dtype, &device);
            let up = normal([rows, width], 1.0, dtype, &device);
            let (gf, uf) = (to_f32(gate.clone()), to_f32(up.clone()));
            report.close(
                &name("swiglu"),
                Backend::swiglu(gate.clone(), up),
                plain::swiglu(gf.clone(), uf),
                dtype,
            );
            report.close(
                &name("gelu_tanh"),
                Backend::gelu_tanh(gate.clone()),
                gelu_tanh(gf.clone()),
                dtype,
            );
            report.close(
                &name("gelu_exact"),
                Backend::gelu_exact(gate),
                gelu_exact(gf),
                dtype,
            );
        }
    }
    report.finish();
}

/// Activations of the published vision tower reach five digits: no intermediate value may become infinite.
#[test]
#[ignore = "needs a Vulkan device"]
fn large_activations_stay_finite() {
    let device = device();
    if !Backend::supports_dtype(&device, DType::F16) {
        println!("SKIPPED: the adapter has no f16");
        return;
    }
    let mut report = Report::default();
    let values: Vec<f32> = (0..64)
        .map(|i| (1e4 + 800.0 * i as f32) * if i % 3 == 0 { -1.0 } else { 1.0 })
        .collect();
    let large = T::<1>::from_floats(values.as_slice(), &device).reshape([4, 16]);
    let x = to_dtype(large.clone(), DType::F16);
    let large = to_f32(x.clone());
    let ones = T::<1>::ones([16], (&device, DType::F16));
    for (name, got, want) in [
        (
            "gelu_tanh",
            Backend::gelu_tanh(x.clone()),
            gelu_tanh(large.clone()),
        ),
        (
            "gelu_exact",
            Backend::gelu_exact(x.clone()),
            gelu_exact(large.clone()),
        ),
        (
            "rms_norm",
            Backend::rms_norm(x.clone(), ones.clone(), 1e-6),
            plain::rms_norm(large.clone(), to_f32(ones.clone()), 1e-6),
        ),
        (
            "layer_norm",
            Backend::row_layer_norm(x.clone(), ones.clone(), ones.clone(), 1e-6),
            plain::layer_norm(large.clone(), to_f32(ones.clone()), to_f32(ones), 1e-6),
        ),
        // Beyond the largest f16 the result is clamped: an infinity would be a NaN in the next norm.
        (
            "swiglu",
            Backend::swiglu(x.clone(), x.clone()),
            plain::swiglu(large.clone(), large.clone()).clamp(-65504.0, 65504.0),
        ),
        (
            "linear",
            Backend::linear_add(x.clone(), x, None, None),
            plain::linear(large.clone(), large, None, None).clamp(-65504.0, 65504.0),
        ),
    ] {
        report.close(name, got, want, DType::F16);
    }
    report.finish();
}

//! The kernels over quantised words against the same sums in f64 on the host, on every GPU backend.

use std::time::Instant;

use burn::tensor::{DType, Device, Tensor, TensorData};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::{
    ops::{
        LowRank,
        quantised::{
            Format, QuantisedWeight,
            pack::{QuantisedMatrix, pack, unpack},
        },
    },
    runtime::accelerator::Accelerator,
};

const FORMATS: [Format; 4] = [
    Format::Int8,
    Format::Int4 { group: 32 },
    Format::Int4 { group: 64 },
    Format::Int4 { group: 128 },
];

fn values(random: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| random.random_range(-1.0f32..1.0))
        .collect()
}

fn quantised(values: &[f32], d_input: usize, format: Format) -> QuantisedMatrix {
    let rows = values.len() / d_input;
    let matrix = pack::<()>(rows, d_input, format, |row, out| {
        out.copy_from_slice(&values[row * d_input..][..d_input]);
        Ok(())
    });
    matrix.unwrap()
}

/// A tensor of `dtype` and the values it holds after rounding.
fn tensor<B: Accelerator, const D: usize>(
    values: Vec<f32>,
    shape: [usize; D],
    dtype: DType,
    device: &Device<B>,
) -> (Tensor<B, D>, Vec<f32>) {
    let data = TensorData::new(values, shape).convert_dtype(dtype);
    let rounded = data.iter::<f32>().collect();
    (Tensor::from_data(data, (device, dtype)), rounded)
}

/// Rounding of `dtype` beside an f32 sum.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 0.0,
        DType::F16 => 2f64.powi(-11),
        _ => 2f64.powi(-8),
    }
}

struct Case {
    format: Format,
    /// Rows, inputs, outputs.
    sizes: [usize; 3],
    dtype: DType,
    /// A bias and a residual.
    added: bool,
    rank: Option<usize>,
}

/// Compares one matmul; `wanted` and `size` are sums of the terms and of their absolute values.
fn compare(case: &Case, ours: Tensor<impl Accelerator, 2>, wanted: &[f64], size: &[f64]) {
    assert_eq!(ours.dims(), [case.sizes[0], case.sizes[2]]);
    let rounding = rounding(ours.dtype());
    for (index, ours) in ours.into_data().iter::<f32>().enumerate() {
        // Terms come with 128 times their level where the offset has not been taken off yet, and f32
        // rounds each of some hundred additions of a lane by 2^-24 of the sum so far.
        let mut allowed = size[index] * 2e-5 + rounding * wanted[index].abs() + 1e-6;
        if case.dtype == DType::F16 && matches!(case.format, Format::Int4 { .. }) {
            // Tensor cores multiply a level times its group's scale in f16.
            allowed += size[index] * 2f64.powi(-11);
        }
        if case.rank.is_some() && !case.sizes[1].is_multiple_of(8) {
            // The default rounds the matmul, the adapter's inputs, its part and their sum.
            allowed += 4.0 * rounding * size[index];
        }
        let off = (f64::from(ours) - wanted[index]).abs();
        assert!(
            off <= allowed,
            "{} {:?} {:?} bias {} rank {:?}, element {index}: {ours}, expected {}, off by {off:.2e}, allowed {allowed:.2e}",
            case.format,
            case.sizes,
            case.dtype,
            case.added,
            case.rank,
            wanted[index]
        );
    }
}

fn check<B: Accelerator>(case: &Case, device: &Device<B>) {
    let mut random = ChaCha8Rng::seed_from_u64(case.sizes.iter().sum::<usize>() as u64);
    let [rows, d_input, out] = case.sizes;
    let dtype = case.dtype;
    let matrix = quantised(&values(&mut random, out * d_input), d_input, case.format);
    let w = unpack(&matrix, d_input, case.format);
    let weight = QuantisedWeight::<B>::upload(matrix, out, d_input, case.format, dtype, device);
    let x = values(&mut random, rows * d_input);
    let (x_device, x) = tensor::<B, 2>(x, [rows, d_input], dtype, device);
    let (bias_device, bias) = tensor::<B, 1>(values(&mut random, out), [out], dtype, device);
    let residual = values(&mut random, rows * out);
    let (residual_device, residual) = tensor::<B, 2>(residual, [rows, out], dtype, device);
    let rank = case.rank.unwrap_or(0);
    let a = values(&mut random, rank * d_input);
    let b = values(&mut random, out * rank);

    let mut wanted = vec![0.0; rows * out];
    let mut size = vec![0.0; rows * out];
    for row in 0..rows {
        let x = &x[row * d_input..][..d_input];
        let dot = |w: &[f32]| -> (f64, f64) {
            let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            terms.fold((0.0, 0.0), |(sum, size), term| {
                (sum + term, size + term.abs())
            })
        };
        let low: Vec<f64> = (0..rank)
            .map(|r| 0.5 * dot(&a[r * d_input..][..d_input]).0)
            .collect();
        for channel in 0..out {
            let at = row * out + channel;
            (wanted[at], size[at]) = dot(&w[channel * d_input..][..d_input]);
            for (r, low) in low.iter().enumerate() {
                let share = low * f64::from(b[channel * rank + r]);
                wanted[at] += share;
                size[at] += share.abs();
            }
            if case.added {
                let bias = f64::from(bias[channel]);
                wanted[at] += f64::from(residual[at]) + if rank == 0 { bias } else { 0.0 };
            }
        }
    }
    let residual_device = case.added.then_some(residual_device);
    let ours = match case.rank {
        None => {
            let bias = case.added.then_some(bias_device);
            B::linear_quantised(x_device.clone(), &weight, bias, residual_device)
        }
        Some(rank) => {
            let adapter = LowRank {
                a: tensor::<B, 2>(a, [rank, d_input], DType::F32, device).0,
                b: tensor::<B, 2>(b, [out, rank], DType::F32, device).0,
                scaling: 0.5,
                dropout: None,
            };
            B::adapted_linear_quantised(x_device.clone(), &weight, &adapter, residual_device)
        }
    };
    assert_eq!(ours.dtype(), dtype);
    compare(case, ours, &wanted, &size);
    if !case.added && case.rank.is_none() {
        let logits = B::logits_quantised(x_device, &weight);
        assert_eq!(logits.dtype(), DType::F32);
        compare(case, logits, &wanted, &size);
    }
}

/// Types the device calculates in.
fn dtypes<B: Accelerator>(device: &Device<B>) -> Vec<DType> {
    [DType::F32, DType::F16, DType::BF16]
        .into_iter()
        .filter(|dtype| B::supports_dtype(device, *dtype))
        .collect()
}

fn matmuls_agree<B: Accelerator>() {
    let device = Default::default();
    for format in FORMATS {
        for dtype in dtypes::<B>(&device) {
            // One row and several, odd numbers of outputs, rows of padded words, and both ways of
            // taking more than eight rows, besides the float matmul's own tests.
            for (sizes, added, rank) in [
                ([1, 64, 1], false, None),
                ([1, 4304, 6], true, None),
                ([3, 96, 131], true, None),
                ([8, 256, 37], false, None),
                ([11, 256, 37], true, None),
                ([1, 256, 9000], false, None),
                ([1, 256, 40], true, Some(8)),
                ([5, 104, 33], false, Some(70)),
                ([5, 100, 33], true, None),
                ([9, 128, 33], true, Some(3)),
                // An adapter over rows that are no whole pieces.
                ([5, 100, 33], true, Some(4)),
                ([1, 64, 8195], false, None),
            ] {
                let case = Case {
                    format,
                    sizes,
                    dtype,
                    added,
                    rank,
                };
                check::<B>(&case, &device);
            }
        }
    }
}

fn rows_unpack<B: Accelerator>() {
    let device = Default::default();
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let zeros = [32, 64, 128].map(|group| Format::Int4Zeros { group });
    for format in FORMATS.into_iter().chain(zeros) {
        for (rows, d_input) in [(7, 64), (5, 100), (3, 4304), (2, 30)] {
            let matrix = quantised(&values(&mut random, rows * d_input), d_input, format);
            let wanted = unpack(&matrix, d_input, format);
            let weight =
                QuantisedWeight::<B>::upload(matrix, rows, d_input, format, DType::F32, &device);
            for dtype in dtypes::<B>(&device) {
                let data = TensorData::new(wanted[d_input..].to_vec(), [rows - 1, d_input]);
                let ours = B::dequantise_rows(&weight, 1, rows - 1, dtype).into_data();
                assert_eq!(ours, data.convert_dtype(dtype), "{format} {rows} {d_input}");
            }
        }
    }
}

/// Bytes of quantised weights a second that one matmul reads, over copies that no cache holds.
fn speed<B: Accelerator>(name: &str, dtype: DType) {
    let device: Device<B> = Default::default();
    if !B::supports_dtype(&device, dtype) {
        return;
    }
    for [d_input, out] in [[4096, 4096], [4096, 12288], [12288, 4096]] {
        for format in [Format::Int8, Format::Int4 { group: 64 }] {
            let copies = (1usize << 28).div_ceil(format.bytes(out, d_input));
            let matrix = QuantisedMatrix {
                words: (0..out * format.words(d_input))
                    .map(|i| (i as i32).wrapping_mul(0x9e37_79b9u32 as i32))
                    .collect(),
                scales: vec![0.01; out * format.scales(d_input)],
                zeros: Vec::new(),
            };
            let weights: Vec<QuantisedWeight<B>> = (0..copies)
                .map(|_| {
                    QuantisedWeight::upload(matrix.clone(), out, d_input, format, dtype, &device)
                })
                .collect();
            let mut line = format!("{name} {dtype:?} {d_input}x{out} {format}:");
            for rows in [1, 4, 8, 64] {
                let x = Tensor::<B, 2>::ones([rows, d_input], (&device, dtype));
                let run = |times: usize| {
                    let start = Instant::now();
                    for _ in 0..times {
                        for weight in &weights {
                            let _ = B::linear_quantised(x.clone(), weight, None, None);
                        }
                    }
                    let _ = B::sync(&device);
                    start.elapsed().as_secs_f64() / (times * copies) as f64
                };
                // Compiling included.
                let first = run(1) * copies as f64;
                let seconds = run(4).min(run(4));
                let rate = format.bytes(out, d_input) as f64 / seconds / 1e9;
                line += &format!(
                    "  b{rows} {:.1} us {rate:.0} GB/s (first {first:.2} s)",
                    seconds * 1e6
                );
            }
            eprintln!("{line}");
        }
    }
}

#[cfg(feature = "wgpu")]
mod vulkan {
    use burn::{backend::Vulkan, tensor::DType};

    #[test]
    #[ignore = "needs a Vulkan device"]
    fn matmuls_agree() {
        super::super::tests::device();
        super::matmuls_agree::<Vulkan>();
    }

    #[test]
    #[ignore = "needs a Vulkan device"]
    fn rows_unpack() {
        super::super::tests::device();
        super::rows_unpack::<Vulkan>();
    }

    #[test]
    #[ignore = "measures speed"]
    fn measured_speed() {
        super::speed::<Vulkan>("vulkan", DType::F16);
        super::speed::<Vulkan>("vulkan", DType::F32);
    }
}

#[cfg(feature = "cuda")]
mod cuda {
    use burn::{backend::Cuda, tensor::DType};

    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn matmuls_agree() {
        super::matmuls_agree::<Cuda>();
    }

    #[test]
    #[ignore = "needs an NVIDIA GPU"]
    fn rows_unpack() {
        super::rows_unpack::<Cuda>();
    }

    #[test]
    #[ignore = "measures speed"]
    fn measured_speed() {
        super::speed::<Cuda>("cuda", DType::BF16);
    }
}

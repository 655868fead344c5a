//! The kernel of tiles against the same sums in f64 on the host, with and without cooperative matrices.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use burn::{
    backend::{Vulkan, wgpu::WgpuRuntime},
    tensor::{DType, Distribution, Tensor, TensorData, backend::Backend},
};
use half::f16;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    launch::contiguous,
    matmul_config::Matrices,
    matvec::{self, InputNorm},
    quantized::{self, Quantised},
    tile_config::cooperative,
    tile_matmul::{Added, Operand, launch},
};
use crate::ops::quantised::{
    Format, QuantisedWeight,
    pack::{QuantisedMatrix, pack, unpack},
};

/// Whether matmuls go the way of devices without tiles, to be compared with.
pub(super) static WITHOUT: AtomicBool = AtomicBool::new(false);

type Buffer = super::launch::Buffer<WgpuRuntime>;

/// A matrix on the device, and its values as the kernel multiplies them.
#[expect(clippy::large_enum_variant, reason = "a few a test")]
enum Matrix {
    Floats(Buffer),
    Levels(Quantised<WgpuRuntime>),
}

impl Matrix {
    fn operand(&self) -> Operand<'_, WgpuRuntime> {
        match self {
            Self::Floats(buffer) => Operand::floats(buffer).unwrap(),
            Self::Levels(weight) => weight.operand(),
        }
    }
}

fn values(random: &mut ChaCha8Rng, count: usize) -> Vec<f32> {
    (0..count)
        .map(|_| random.random_range(-1.0f32..1.0))
        .collect()
}

/// A buffer of f16 and the values it holds.
fn halves<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> (Buffer, Vec<f32>) {
    let data = TensorData::new(values, shape).convert_dtype(DType::F16);
    let rounded = data.iter::<f32>().collect();
    let device = super::tests::device();
    let tensor = Tensor::<Vulkan, D>::from_data(data, (&device, DType::F16));
    (contiguous(tensor), rounded)
}

fn matrix(
    random: &mut ChaCha8Rng,
    format: Option<Format>,
    out: usize,
    d_input: usize,
) -> (Matrix, Vec<f32>) {
    let values = values(random, out * d_input);
    let Some(format) = format else {
        let (buffer, values) = halves(values, [out, d_input]);
        return (Matrix::Floats(buffer), values);
    };
    let packed = pack::<()>(out, d_input, format, |row, to| {
        to.copy_from_slice(&values[row * d_input..][..d_input]);
        Ok(())
    })
    .unwrap();
    let values = unpack(&packed, d_input, format);
    let device = Default::default();
    let weight =
        QuantisedWeight::<Vulkan>::upload(packed, out, d_input, format, DType::F16, &device);
    (Matrix::Levels(Quantised::of(&weight)), values)
}

/// Sums of the products and of their absolute values, `[rows, out]`.
fn products(x: &[f32], w: &[f32], d_input: usize) -> Vec<(f64, f64)> {
    let rows = x.chunks(d_input);
    rows.flat_map(|x| {
        w.chunks(d_input).map(move |w| {
            let terms = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
            terms.fold((0.0, 0.0), |(sum, size), term| {
                (sum + term, size + term.abs())
            })
        })
    })
    .collect()
}

const EPSILON: f64 = 1e-3;

/// Rows normalised, and rounded as the kernel does.
fn normed(x: &[f32], gains: &[f32]) -> Vec<f32> {
    let rows = x.chunks(gains.len());
    rows.flat_map(|row| {
        let squares: f64 = row.iter().map(|x| f64::from(*x).powi(2)).sum();
        let root = (squares / row.len() as f64 + EPSILON).sqrt();
        let value = move |(x, gain): (&f32, &f32)| {
            f16::from_f64(f64::from(*x) * f64::from(*gain) / root).to_f32()
        };
        row.iter().zip(gains).map(value).collect::<Vec<_>>()
    })
    .collect()
}

struct Case {
    normed: bool,
    format: Option<Format>,
    rows: usize,
    d_input: usize,
    widths: [usize; 3],
    matrices: Matrices,
    added: bool,
    out: DType,
}

fn check(case: &Case, cooperative: bool) {
    let Case {
        format,
        rows,
        d_input,
        widths,
        ..
    } = *case;
    let mut random = ChaCha8Rng::seed_from_u64((rows * 31 + d_input + widths[0]) as u64);
    let (x, x_values) = halves(values(&mut random, rows * d_input), [rows, d_input]);
    let (gains, gain_values) = halves(values(&mut random, d_input), [d_input]);
    let x_values = match case.normed {
        false => x_values,
        true => normed(&x_values, &gain_values),
    };
    let made = widths.map(|width| matrix(&mut random, format, width, d_input));
    let total = match case.matrices {
        Matrices::Three => widths.iter().sum(),
        Matrices::One | Matrices::Pair => widths[0],
    };
    let (bias, bias_values) = halves(values(&mut random, total), [total]);
    let (residual, residual_values) = halves(values(&mut random, rows * total), [rows, total]);
    let added = Added {
        bias: case.added.then_some(&bias),
        residual: case.added.then_some(&residual),
    };
    let operands = made.each_ref().map(|(matrix, _)| matrix.operand());
    let y = launch(
        &x,
        case.normed.then_some((&gains, EPSILON)),
        operands.each_ref(),
        case.matrices,
        added,
        case.out,
        cooperative,
    );
    let ours = super::launch::tensor::<WgpuRuntime, 2>(y).into_data();
    assert_eq!(ours.shape.as_slice(), [rows, total]);

    // A level times its group's scale is rounded to f16, as rows of a dequantised matrix are.
    let mut weights = match format {
        Some(Format::Int4 { .. } | Format::Int4Zeros { .. }) => 2f64.powi(-11),
        _ => 0.0,
    };
    if case.normed {
        // A normalised input may be rounded to the other side of a middle.
        weights += 2f64.powi(-11);
    }
    // Some hundred additions in f32, tensor cores with fewer bits in between.
    let allowed = |(_, size): (f64, f64)| size * (4e-6 + weights) + 1e-6;
    let of = made
        .each_ref()
        .map(|(_, w)| products(&x_values, w, d_input));
    let wanted: Vec<(f64, f64)> = match case.matrices {
        Matrices::One => of[0].iter().map(|sum| (sum.0, allowed(*sum))).collect(),
        Matrices::Three => (0..rows)
            .flat_map(|row| {
                let parts = of.iter().zip(widths);
                parts.flat_map(move |(of, width)| of[row * width..][..width].to_vec())
            })
            .map(|sum| (sum.0, allowed(sum)))
            .collect(),
        Matrices::Pair => of[0]
            .iter()
            .zip(&of[1])
            .map(|(gate, up)| {
                let silu = gate.0 / (1.0 + (-gate.0).exp());
                // The slope of silu is below 1.1.
                let off = 1.1 * allowed(*gate) * up.0.abs() + silu.abs() * allowed(*up);
                (silu * up.0, off + allowed(*gate) * allowed(*up) + 1e-6)
            })
            .collect(),
    };
    let rounding = if case.out == DType::F16 {
        2f64.powi(-11)
    } else {
        0.0
    };
    for (at, (ours, (wanted, off))) in ours.iter::<f32>().zip(wanted).enumerate() {
        let mut wanted = wanted;
        if case.added {
            wanted += f64::from(bias_values[at % total]) + f64::from(residual_values[at]);
        }
        let off = off + rounding * wanted.abs() + 1e-6;
        let found = (f64::from(ours) - wanted).abs();
        assert!(
            found <= off,
            "{format:?}, {rows} rows, {d_input} inputs, {widths:?} {:?}, added {}, element {at}: {ours}, expected {wanted}, off by {found:.2e}, allowed {off:.2e}",
            case.matrices,
            case.added
        );
    }
}

/// Every shape of tile, in numbers of rows, inputs and outputs that do not fill it.
fn agree(cooperative: bool) {
    let formats = [
        None,
        Some(Format::Int8),
        Some(Format::Int4 { group: 32 }),
        Some(Format::Int4 { group: 64 }),
    ];
    for format in formats {
        for (rows, d_input, widths, matrices, added, out) in [
            (1, 1032, [37; 3], Matrices::One, true, DType::F16),
            (1, 136, [8200; 3], Matrices::One, false, DType::F32),
            (5, 64, [1; 3], Matrices::One, false, DType::F16),
            (16, 2112, [40; 3], Matrices::One, true, DType::F16),
            (17, 328, [50; 3], Matrices::One, true, DType::F16),
            (40, 200, [70; 3], Matrices::One, true, DType::F16),
            (64, 512, [33; 3], Matrices::One, false, DType::F32),
            (130, 136, [130; 3], Matrices::One, true, DType::F16),
            (3, 576, [256, 128, 128], Matrices::Three, false, DType::F16),
            (33, 128, [128, 128, 256], Matrices::Three, false, DType::F16),
            (2, 520, [48; 3], Matrices::Pair, false, DType::F16),
            (30, 192, [40; 3], Matrices::Pair, false, DType::F16),
            (64, 96, [20; 3], Matrices::Pair, false, DType::F16),
            (70, 96, [20; 3], Matrices::Pair, false, DType::F16),
        ] {
            let case = Case {
                normed: matrices != Matrices::One,
                format,
                rows,
                d_input,
                widths,
                matrices,
                added,
                out,
            };
            check(&case, cooperative);
        }
    }
    // Tiles of 128 outputs, which only many have.
    let case = Case {
        normed: false,
        format: Some(Format::Int4 { group: 64 }),
        rows: 129,
        d_input: 64,
        widths: [6_150; 3],
        matrices: Matrices::One,
        added: false,
        out: DType::F16,
    };
    check(&case, cooperative);
}

#[test]
#[ignore = "needs a Vulkan device"]
fn tiles_agree_without_cooperative_matrices() {
    agree(false);
}

#[test]
#[ignore = "needs a Vulkan device with cooperative matrices"]
fn cooperative_tiles_agree() {
    let (x, _) = halves(vec![f16::ONE.to_f32(); 8], [1, 8]);
    assert!(
        cooperative(&x.client),
        "the device multiplies no f16 matrices of 16 by 16 through SPIR-V"
    );
    agree(true);
}

/// Time on the device of launches that fit into one pass, each; the device is given work before, since an
/// idle one runs at a fifth of its clock.
fn on_device(like: &Buffer, launches: usize, mut launch: impl FnMut(usize) + Send) -> Duration {
    let mut run = || {
        let work = || (0..launches).for_each(&mut launch);
        let ((), ticks) = like.client.profile(work, "launches").unwrap();
        cubecl::future::block_on(ticks.resolve()).duration() / launches as u32
    };
    let start = Instant::now();
    while start.elapsed() < Duration::from_millis(100) {
        run();
    }
    (0..6).map(|_| run()).min().unwrap()
}

/// Matrices of an 8B that share an input.
struct Layer {
    name: &'static str,
    widths: [usize; 3],
    d_input: usize,
    matrices: Matrices,
}

const LAYERS: [Layer; 5] = [
    Layer {
        name: "qkv",
        widths: [4096, 1024, 1024],
        d_input: 4096,
        matrices: Matrices::Three,
    },
    Layer {
        name: "output",
        widths: [4096; 3],
        d_input: 4096,
        matrices: Matrices::One,
    },
    Layer {
        name: "gate and up",
        widths: [12288; 3],
        d_input: 4096,
        matrices: Matrices::Pair,
    },
    Layer {
        name: "down",
        widths: [4096; 3],
        d_input: 12288,
        matrices: Matrices::One,
    },
    Layer {
        name: "head",
        widths: [151_936; 3],
        d_input: 4096,
        matrices: Matrices::One,
    },
];

/// A matrix of some numbers.
fn drawn(format: Option<Format>, out: usize, d_input: usize) -> Matrix {
    let device = Default::default();
    let Some(format) = format else {
        let draw = Distribution::Uniform(-1.0, 1.0);
        let tensor = Tensor::<Vulkan, 2>::random([out, d_input], draw, (&device, DType::F16));
        return Matrix::Floats(contiguous(tensor));
    };
    let words = (0..(out * format.words(d_input)) as u32).map(|at| at.wrapping_mul(0x9e37_79b9));
    let matrix = QuantisedMatrix {
        words: words.map(|word| word as i32).collect(),
        scales: vec![0.01; out * format.scales(d_input)],
        zeros: Vec::new(),
    };
    let weight =
        QuantisedWeight::<Vulkan>::upload(matrix, out, d_input, format, DType::F16, &device);
    Matrix::Levels(Quantised::of(&weight))
}

/// One matmul of a decoder's step, with its norm.
fn decode_matmul(x: &Buffer, norm: &Buffer, layer: &Layer, made: [&Matrix; 3]) {
    let input = InputNorm {
        weight: norm.clone(),
        epsilon: 1e-6,
    };
    match made {
        [Matrix::Floats(a), Matrix::Floats(b), Matrix::Floats(c)] => match layer.matrices {
            Matrices::One => drop(matvec::matmul(x, None, a, None, None, DType::F16)),
            Matrices::Pair => drop(matvec::swiglu_matmul(x, &input, a, b)),
            Matrices::Three => drop(matvec::three_matmuls(x, &input, [a, b, c])),
        },
        [Matrix::Levels(a), Matrix::Levels(b), Matrix::Levels(c)] => match layer.matrices {
            Matrices::One => {
                drop(quantized::matmul(
                    x,
                    None,
                    a,
                    (None, None),
                    None,
                    DType::F16,
                ));
            }
            Matrices::Pair => drop(quantized::swiglu_matmul(x, (norm, 1e-6), a, b)),
            Matrices::Three => drop(quantized::three_matmuls(x, (norm, 1e-6), [a, b, c])),
        },
        _ => unreachable!("of one format"),
    }
}

/// Times of the products of a step on the device, in microseconds, with tiles and without, over copies of the
/// matrices that no cache holds.
#[test]
#[ignore = "measures speed"]
fn tiles_measured_speed() {
    let (small, _) = halves(vec![1.0; 64], [1, 64]);
    let (weight, _) = halves(vec![1.0; 64 * 128], [128, 64]);
    for tasks in [100, 2000] {
        let start = Instant::now();
        for _ in 0..tasks {
            drop(matvec::matmul(
                &small,
                None,
                &weight,
                None,
                None,
                DType::F16,
            ));
        }
        <Vulkan as Backend>::sync(&Default::default()).unwrap();
        let each = start.elapsed().as_secs_f64() / f64::from(tasks) * 1e6;
        eprintln!("{tasks} launches of a small kernel: {each:.1} us each");
    }
    let int4 = Some(Format::Int4 { group: 64 });
    for format in [int4, Some(Format::Int8), None] {
        for layer in &LAYERS {
            if layer.name == "head" && format == int4 {
                continue;
            }
            let elements: usize = match layer.matrices {
                Matrices::One => layer.widths[0] * layer.d_input,
                Matrices::Pair => 2 * layer.widths[0] * layer.d_input,
                Matrices::Three => layer.widths.iter().sum::<usize>() * layer.d_input,
            };
            let bytes = match format {
                None => 2.0,
                Some(Format::Int8) => 1.0,
                Some(Format::Int4 { .. } | Format::Int4Zeros { .. }) => 0.5 + 2.0 / 64.0,
            } * elements as f64;
            let copies = ((1 << 28) as f64 / bytes).ceil().min(16.0) as usize;
            let needed = match layer.matrices {
                Matrices::One => 1,
                Matrices::Pair => 2,
                Matrices::Three => 3,
            };
            let sets: Vec<Vec<Matrix>> = (0..copies)
                .map(|_| {
                    let widths = layer.widths[..needed].iter();
                    widths
                        .map(|width| drawn(format, *width, layer.d_input))
                        .collect()
                })
                .collect();
            let (norm, _) = halves(vec![1.0; layer.d_input], [layer.d_input]);
            let mut line = format!(
                "{} {}:",
                layer.name,
                format.map_or("f16".into(), |f| f.to_string())
            );
            for rows in [1, 8, 32, 64, 368] {
                let (x, _) = halves(vec![0.5; rows * layer.d_input], [rows, layer.d_input]);
                let operands: Vec<[&Matrix; 3]> = sets
                    .iter()
                    .map(|set| [0, 1, 2].map(|at: usize| &set[at.min(needed - 1)]))
                    .collect();
                let launches = copies.max(if rows > 64 { 2 } else { 8 });
                if rows <= 8 {
                    WITHOUT.store(true, Ordering::Relaxed);
                    let time = on_device(&x, launches, |at| {
                        decode_matmul(&x, &norm, layer, operands[at % copies]);
                    });
                    WITHOUT.store(false, Ordering::Relaxed);
                    let us = time.as_secs_f64() * 1e6;
                    line += &format!(" [{rows}: {us:.1}, {:.0} GB/s]", bytes / us / 1e3);
                }
                let tiled = operands
                    .iter()
                    .map(|set| set.map(Matrix::operand))
                    .collect::<Vec<_>>();
                let time = on_device(&x, launches, |at| {
                    let of = tiled[at % copies].each_ref();
                    let nothing = Added {
                        bias: None,
                        residual: None,
                    };
                    let first = (layer.matrices != Matrices::One).then_some((&norm, 1e-6));
                    let matrices = layer.matrices;
                    drop(launch(&x, first, of, matrices, nothing, DType::F16, true));
                });
                let us = time.as_secs_f64() * 1e6;
                let flop = 2.0 * (rows * elements) as f64;
                line += &format!(
                    " {rows}: {us:.1} us, {:.0} GB/s, {:.0} TFLOP/s;",
                    bytes / us / 1e3,
                    flop / us / 1e6
                );
            }
            eprintln!("{line}");
        }
    }
}

//! Matrices in fragment order against the same matrices row by row.

use burn::{
    prelude::*,
    tensor::{DType, TensorData},
};

use super::{
    super::tests::{Report, T, device, some},
    arranged, can_arrange, covers,
};
use crate::{
    accelerate::{cuda::Cuda, draws},
    ops::{
        ForwardOps,
        cast::to_f32,
        plain,
        quantised::{Format, QuantisedWeight, pack::pack},
    },
};

const FORMATS: [Format; 4] = [
    Format::Int8,
    Format::Int4 { group: 32 },
    Format::Int4 { group: 64 },
    Format::Int4 { group: 128 },
];

/// A quantised matrix, row by row and in fragment order.
fn pair(
    format: Format,
    [rows, d_input]: [usize; 2],
    device: &Device<Cuda>,
) -> [QuantisedWeight<Cuda>; 2] {
    let matrix = pack::<()>(rows, d_input, format, |row, out| {
        for (at, value) in out.iter_mut().enumerate() {
            let angle = (row * 7919 + at * 104_729) % 65_537;
            *value = (angle as f32 * 0.37).sin() * (1.0 + (at / 32 % 5) as f32);
        }
        Ok(())
    });
    let matrix = matrix.unwrap();
    let by_rows =
        QuantisedWeight::<Cuda>::upload(matrix, rows, d_input, format, DType::BF16, device);
    assert!(can_arrange(&by_rows));
    // Of a clone: the first stays as it is.
    let fragments = arranged(by_rows.clone());
    assert!(fragments.is_arranged() && !by_rows.is_arranged());
    [by_rows, fragments]
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn arranged_matrices_hold_the_same_values() {
    let device = device();
    let cases: Vec<_> = FORMATS
        .into_iter()
        .flat_map(|format| [[16, 64], [48, 192], [208, 4096]].map(|dims| (format, dims)))
        .filter(|(format, dims)| covers(*format, *dims))
        .collect();
    for (format, dims) in some(cases) {
        let [rows, _] = dims;
        let [by_rows, fragments] = pair(format, dims, &device);
        for dtype in [DType::BF16, DType::F32, DType::F16] {
            let want = by_rows.unpack(dtype);
            let same = |got: T<2>, want: T<2>| {
                assert_eq!(
                    got.into_data(),
                    want.into_data(),
                    "{format} {dims:?} {dtype:?}"
                );
            };
            same(
                Cuda::dequantise_rows(&fragments, 0, rows, dtype),
                want.clone(),
            );
            same(fragments.unpack(dtype), want.clone());
            let (start, count) = (3, rows - 7);
            same(
                Cuda::dequantise_rows(&fragments, start, count, dtype),
                want.narrow(0, start, count),
            );
        }
        let indices = Tensor::<Cuda, 1, Int>::from_ints([rows as i32 - 1, 0, 9, 9], &device);
        let want = by_rows.unpack(DType::BF16).select(0, indices.clone());
        let got = Cuda::select_quantised(&fragments, indices);
        assert_eq!(got.into_data(), want.into_data(), "{format} {dims:?}");
        // Without a second owner, where it is.
        let moved = arranged(by_rows);
        assert_eq!(
            moved.unpack(DType::F32).into_data(),
            fragments.unpack(DType::F32).into_data()
        );
    }
}

#[test]
#[ignore = "needs an NVIDIA GPU"]
fn matmuls_with_fragments() {
    let device = device();
    let mut report = Report::default();
    let shapes = [[48, 192], [16, 64], [6160, 4096], [4096, 1024]];
    let cases: Vec<_> = FORMATS
        .into_iter()
        .flat_map(|format| shapes.map(|dims| (format, dims)))
        .filter(|(format, dims)| covers(*format, *dims))
        .collect();
    for (format, dims) in some(cases) {
        let [out, d_input] = dims;
        let [by_rows, fragments] = pair(format, dims, &device);
        let w = by_rows.unpack(DType::F32);
        let bias: T<1> = draws::normal([out], 1.0, DType::BF16, &device);
        // 65 rows go through floats.
        for rows in [1, 7, 9, 16, 17, 33, 64, 65] {
            let x: T<2> = draws::normal([rows, d_input], 1.0, DType::BF16, &device);
            let residual: T<2> = draws::normal([rows, out], 1.0, DType::BF16, &device);
            let want = |bias, residual: Option<T<2>>| {
                plain::linear(to_f32(x.clone()), w.clone(), bias, residual.map(to_f32))
            };
            let name = |what: &str| format!("{format} {rows} x {d_input} x {out} {what}");
            let got = Cuda::linear_quantised(x.clone(), &fragments, None, None);
            report.close(&name("alone"), got, want(None, None), 3e-3);
            let got = Cuda::linear_quantised(
                x.clone(),
                &fragments,
                Some(bias.clone()),
                Some(residual.clone()),
            );
            let added = want(Some(to_f32(bias.clone())), Some(residual));
            report.close(&name("with bias and residual"), got, added, 3e-3);
            let got = Cuda::logits_quantised(x.clone(), &fragments);
            assert_eq!(got.dtype(), DType::F32);
            // f32 sums of exact products; plain ones round inputs of neither.
            report.close(&name("as logits"), got, want(None, None), 1e-5);
        }
    }
    report.finish();
}

/// A row alone and among others: the same bits, in both kernels.
#[test]
#[ignore = "needs an NVIDIA GPU"]
fn a_row_does_not_depend_on_its_company() {
    let device = device();
    for format in FORMATS {
        for dims in [[4096, 1024], [6160, 4096]] {
            let [out, d_input] = dims;
            let [_, fragments] = pair(format, dims, &device);
            let x: T<2> = draws::normal([64, d_input], 1.0, DType::BF16, &device);
            let all = Cuda::linear_quantised(x.clone(), &fragments, None, None);
            for rows in [1, 8, 12, 16, 17, 33] {
                let some = x.clone().narrow(0, 0, rows);
                let got = Cuda::linear_quantised(some, &fragments, None, None);
                let want = all.clone().slice([0..rows, 0..out]);
                let bits = |y: T<2>| -> TensorData { y.into_data() };
                assert_eq!(bits(got), bits(want), "{format} {dims:?}, {rows} rows");
            }
        }
    }
}

//! Fixtures and comparison.

use std::path::{Path, PathBuf};
use xray_qwen3vl::runtime::accelerator::Accelerator;

use burn::{prelude::*, tensor::DType};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// The folder with reference tensors.
pub fn fixtures() -> PathBuf {
    std::env::var_os("PARITY_FIXTURES").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parity"),
        PathBuf::from,
    )
}

/// The folder with the published tokenizer.
pub fn tokenizer_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer")
}

/// A JSON file of the fixture folder.
pub fn json(name: &str) -> Value {
    let path = fixtures().join(name);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A safetensors file of the fixture folder.
pub struct Reference {
    name: String,
    bytes: Vec<u8>,
}

impl Reference {
    pub fn open(name: &str) -> Self {
        Self::at(&fixtures().join(name))
    }

    pub fn at(path: &Path) -> Self {
        let bytes = std::fs::read(path)
            .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
        Self {
            name: path.display().to_string(),
            bytes,
        }
    }

    fn view(&self, name: &str) -> (Dtype, Vec<usize>, Vec<u8>) {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let view = tensors
            .tensor(name)
            .unwrap_or_else(|_| panic!("{} has no tensor {name}", self.name));
        (view.dtype(), view.shape().to_vec(), view.data().to_vec())
    }

    pub fn names(&self) -> Vec<String> {
        let tensors = SafeTensors::deserialize(&self.bytes).unwrap();
        let mut names: Vec<String> = tensors.names().into_iter().map(|n| n.to_string()).collect();
        names.sort();
        names
    }

    pub fn has(&self, name: &str) -> bool {
        self.names().iter().any(|n| n == name)
    }

    pub fn shape(&self, name: &str) -> Vec<usize> {
        self.view(name).1
    }

    pub fn f32s(&self, name: &str) -> Vec<f32> {
        let (dtype, _, bytes) = self.view(name);
        assert_eq!(dtype, Dtype::F32, "{name}");
        bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    }

    pub fn ints(&self, name: &str) -> Vec<i64> {
        let (dtype, _, bytes) = self.view(name);
        match dtype {
            Dtype::I64 => bytes
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().unwrap()))
                .collect(),
            Dtype::I32 => bytes
                .chunks_exact(4)
                .map(|b| i64::from(i32::from_le_bytes(b.try_into().unwrap())))
                .collect(),
            other => panic!("{name} is {other:?}"),
        }
    }

    /// Rows of an integer matrix.
    pub fn int_rows(&self, name: &str) -> Vec<Vec<i64>> {
        let width = *self.shape(name).last().unwrap();
        self.ints(name).chunks(width).map(<[i64]>::to_vec).collect()
    }

    /// Rows of token ids.
    pub fn id_rows(&self, name: &str) -> Vec<Vec<u32>> {
        self.int_rows(name)
            .into_iter()
            .map(|row| row.into_iter().map(|id| id as u32).collect())
            .collect()
    }
}

/// Elements of a tensor in f32.
pub fn values<B: Accelerator, const D: usize>(tensor: Tensor<B, D>) -> Vec<f32> {
    let data = tensor.into_data();
    match data.dtype {
        DType::F32 => data.to_vec().unwrap(),
        _ => data.convert::<f32>().to_vec().unwrap(),
    }
}

/// Checks `|ours - want| <= abs + rel * |want|` everywhere; the message names part, element and values.
pub fn assert_close(part: &str, ours: &[f32], want: &[f32], abs: f32, rel: f32) {
    assert_eq!(ours.len(), want.len(), "{part}: number of elements");
    let mut worst = (0, 0.0f32);
    for (index, (a, b)) in ours.iter().zip(want).enumerate() {
        let excess = (a - b).abs() - (abs + rel * b.abs());
        let excess = if excess.is_nan() {
            f32::INFINITY
        } else {
            excess
        };
        if index == 0 || excess > worst.1 {
            worst = (index, excess);
        }
    }
    let (index, excess) = worst;
    if ours.is_empty() || excess <= 0.0 {
        return;
    }
    panic!(
        "{part}: largest difference {} at element {index}: ours {}, reference {} (tolerance {abs} + {rel}·|reference|)",
        (ours[index] - want[index]).abs(),
        ours[index],
        want[index]
    );
}

/// Relative Frobenius distance.
pub fn relative_distance(ours: &[f32], want: &[f32]) -> f64 {
    assert_eq!(ours.len(), want.len());
    let square = |x: f32| f64::from(x) * f64::from(x);
    let difference: f64 = ours.iter().zip(want).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = want.iter().map(|b| square(*b)).sum();
    (difference / norm.max(1e-300)).sqrt()
}

/// The folder's tolerance for activations and logits in f32.
pub const ACTIVATIONS: (f32, f32) = (1e-4, 1e-4);

//! Random tensors for tests. Burn's own generator belongs to the whole process, so what a test drew
//! would depend on the tests beside it.

use std::cell::RefCell;

use burn::{
    prelude::*,
    tensor::{DType, TensorData},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ops::cast::to_dtype;

const SEED: u64 = 7;

thread_local! {
    static GENERATOR: RefCell<ChaCha8Rng> = RefCell::new(ChaCha8Rng::seed_from_u64(SEED));
}

/// Begins the draws of a test.
pub(crate) fn begin() {
    GENERATOR.set(ChaCha8Rng::seed_from_u64(SEED));
}

/// Normal draws (Box and Muller 1958) in f32, cast to `dtype`.
pub(crate) fn normal<B: Backend, const D: usize>(
    shape: [usize; D],
    std: f64,
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, D> {
    let count = shape.iter().product();
    let values: Vec<f32> = GENERATOR.with_borrow_mut(|random| {
        let mut one = || {
            let radius = (-2.0 * (1.0 - random.random::<f64>()).ln()).sqrt();
            let angle = std::f64::consts::TAU * random.random::<f64>();
            (std * radius * angle.cos()) as f32
        };
        (0..count).map(|_| one()).collect()
    });
    let data = TensorData::new(values, shape);
    to_dtype(Tensor::from_data(data, (device, DType::F32)), dtype)
}

//! What tests of kernels share: random tensors, and a check of any backend's dropout masks. Burn's own generator
//! belongs to the whole process, so what a test drew would depend on the tests beside it.

use std::cell::RefCell;

use burn::{
    prelude::*,
    tensor::{DType, TensorData},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::ops::{Dropout, ForwardOps, cast::to_dtype};

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

/// Compares dropout masks of a backend with those of the host, bit for bit.
pub(crate) fn check_dropout_masks<B: ForwardOps>(device: &B::Device) {
    for (rows, width, probability) in [(1, 1, 0.5), (5, 7, 0.25), (400, 4096, 0.05)] {
        let dropout = Dropout {
            probability,
            seed: 0x0123_4567_89ab_cdef,
        };
        let like = normal::<B, 2>([rows, width], 1.0, DType::F32, device);
        let mask = B::dropout_mask(&like, dropout).into_data();
        let wanted = dropout.mask(rows * width);
        assert_eq!(mask.to_vec::<f32>().unwrap(), wanted, "{rows} x {width}");
    }
}

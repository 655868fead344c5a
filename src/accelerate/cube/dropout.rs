//! Dropout masks, see [`crate::ops::dropout`].

use burn::tensor::{DType, Tensor};
use burn_cubecl::CubeRuntime;
use cubecl::prelude::*;

use super::launch::{Cube, cubes, elements, empty, strided, tensor};
use crate::ops::Dropout;

const UNITS: usize = 128;

/// A unit draws for two neighbouring elements; the last of an odd count has no neighbour.
#[cube(launch_unchecked)]
fn fill(
    out: &mut Array<f32>,
    count: usize,
    seed_low: u32,
    seed_high: u32,
    threshold: u32,
    scale: f32,
) {
    let place = ABSOLUTE_POS * 2;
    if place < count {
        let pair = (ABSOLUTE_POS as u32) & 0x7fff_ffffu32;
        let x = (pair ^ seed_low) * 0x9e37_79b1u32;
        let x = x ^ (x >> 15u32);
        let x = (x ^ seed_high) * 0x85eb_ca77u32;
        let x = x ^ (x >> 13u32);
        let x = x * 0xc2b2_ae3du32;
        let bits = x ^ (x >> 16u32);
        out[place] = select((bits & 0xffffu32) >= threshold, scale, 0.0f32);
        if place + 1 < count {
            out[place + 1] = select((bits >> 16u32) >= threshold, scale, 0.0f32);
        }
    }
}

/// The mask in the shape of `like`, f32.
pub(super) fn mask<R: CubeRuntime>(
    like: &Tensor<Cube<R>, 2>,
    dropout: Dropout,
) -> Option<Tensor<Cube<R>, 2>> {
    let [rows, width] = like.dims();
    let like = strided(like.clone());
    let out = empty(&like, [rows, width], DType::F32);
    let count = rows * width;
    // SAFETY: `out` has `count` elements, and units beyond write nothing.
    #[allow(unsafe_code)]
    unsafe {
        fill::launch_unchecked::<R>(
            &like.client,
            cubes(count.div_ceil(2 * UNITS)),
            CubeDim::new_1d(UNITS as u32),
            elements(&out),
            count,
            dropout.seed as u32,
            (dropout.seed >> 32) as u32,
            dropout.threshold(),
            dropout.keep_scale() as f32,
        );
    }
    Some(tensor(out))
}

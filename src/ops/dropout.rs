//! Dropout masks from a counter: whether an input is dropped is a function of the seed and the
//! element's place, in integers, so that every backend draws the same mask, and draws it again in the
//! backward pass without having kept it.
//!
//! The seed of a mask is [`mix`](crate::base::seeds::mix) of the run's seed, the optimizer step, the
//! micro-batch in the window and the adapter, in this order, each mixed into the seed before it. The
//! place is `row · width + column` modulo 2³². `cuda/dropout.cuh` and `cube/dropout.rs` are the same
//! function.

use rayon::prelude::*;

/// Zeroes inputs of an adapter at random; the same seed gives the same mask on every backend.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Share of the inputs that become zero, in `(0, 1)`; rounded to a multiple of 1 / 65,536.
    pub probability: f64,
    /// Decides the mask.
    pub seed: u64,
}

/// Elements of a mask that one task fills.
const CHUNK: usize = 1 << 14;

impl Dropout {
    /// Of 65,536 draws, those below this drop an element.
    pub fn threshold(self) -> u32 {
        ((self.probability * 65_536.0).round() as u32).clamp(1, 65_535)
    }

    /// Factor on what is kept, exact for the threshold.
    pub fn keep_scale(self) -> f64 {
        65_536.0 / f64::from(65_536 - self.threshold())
    }

    /// 32 bits for two neighbouring elements, the lower 16 for the first.
    ///
    /// Source: the finaliser of MurmurHash3, keyed before and between its rounds.
    fn bits(self, pair: u32) -> u32 {
        let mut x = (pair ^ self.seed as u32).wrapping_mul(0x9e37_79b1);
        x ^= x >> 15;
        x = (x ^ (self.seed >> 32) as u32).wrapping_mul(0x85eb_ca77);
        x ^= x >> 13;
        x = x.wrapping_mul(0xc2b2_ae3d);
        x ^ (x >> 16)
    }

    /// What each of the first `count` elements is multiplied with: 0, or [`Dropout::keep_scale`].
    pub fn mask(self, count: usize) -> Vec<f32> {
        let (threshold, scale) = (self.threshold(), self.keep_scale() as f32);
        let of = |bits: u32| if bits >= threshold { scale } else { 0.0 };
        let mut mask = vec![0.0; count];
        mask.par_chunks_mut(CHUNK)
            .enumerate()
            .for_each(|(chunk, values)| {
                for (at, two) in values.chunks_mut(2).enumerate() {
                    // Places wrap at 2³², so pairs of them do at 2³¹.
                    let pair = (chunk * (CHUNK / 2) + at) as u32 & 0x7fff_ffff;
                    let bits = self.bits(pair);
                    two[0] = of(bits & 0xffff);
                    if let Some(second) = two.get_mut(1) {
                        *second = of(bits >> 16);
                    }
                }
            });
        mask
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::seeds::mix;

    const SEED: u64 = 0x0123_4567_89ab_cdef;

    fn dropped(probability: f64, seed: u64, count: usize) -> Vec<usize> {
        let mask = Dropout { probability, seed }.mask(count);
        (0..count).filter(|at| mask[*at] == 0.0).collect()
    }

    /// Computed separately, in integers of unbounded size.
    #[test]
    fn the_mask_of_a_seed_is_the_same_everywhere() {
        let one = Dropout {
            probability: 0.25,
            seed: SEED,
        };
        let bits = [0, 1, 2, 12_345, 0x7fff_ffff].map(|pair| one.bits(pair));
        assert_eq!(
            bits,
            [
                0xac33_c010,
                0x8457_3aac,
                0x9ec0_4907,
                0xe116_263b,
                0x2020_68b2
            ]
        );
        assert_eq!(
            dropped(0.25, SEED, 40),
            [2, 10, 12, 20, 21, 28, 29, 30, 33, 35, 36, 39]
        );
        let kept = one.mask(4);
        assert_eq!(kept[0], 65_536.0 / 49_152.0);
        // The first mask of a run of seed 42: step 0, micro-batch 0, adapter 0. An odd count ends in
        // half a pair.
        let seed = mix(mix(mix(42, 0), 0), 0);
        assert_eq!(seed, 0x6310_bf04_d820_7f46);
        assert_eq!(
            dropped(0.25, seed, 35),
            [3, 9, 10, 22, 23, 24, 27, 30, 32, 34]
        );
        assert_eq!(
            dropped(0.05, seed, 400),
            [
                51, 71, 112, 131, 169, 212, 224, 242, 256, 265, 301, 339, 371, 380, 383, 398
            ]
        );
    }

    #[test]
    fn a_mask_does_not_depend_on_how_it_is_filled() {
        let one = Dropout {
            probability: 0.5,
            seed: 7,
        };
        let long = one.mask(3 * CHUNK + 5);
        assert_eq!(one.mask(CHUNK + 1), long[..CHUNK + 1]);
        let dropped = long.iter().filter(|value| **value == 0.0).count();
        let share = dropped as f64 / long.len() as f64;
        assert!((share - 0.5).abs() < 0.01, "{share}");
    }

    #[test]
    fn a_share_beyond_the_steps_of_the_draw_stays_within() {
        let of = |probability| Dropout {
            probability,
            seed: 1,
        };
        assert_eq!(of(1e-9).threshold(), 1);
        assert_eq!(of(1.0 - 1e-9).threshold(), 65_535);
        assert_eq!(of(1.0 - 1e-9).keep_scale(), 65_536.0);
        assert_eq!(of(0.05).threshold(), 3_277);
    }

    /// The operation that layers call, on a backend.
    #[cfg(feature = "flex")]
    #[test]
    fn the_plain_operation_gives_the_mask_row_after_row() {
        use crate::ops::ForwardOps;
        use burn::tensor::Tensor;
        type B = burn_flex::Flex;
        let like = Tensor::<B, 2>::zeros([5, 7], &Default::default());
        let one = Dropout {
            probability: 0.25,
            seed: SEED,
        };
        let mask = B::dropout_mask(&like, one);
        assert_eq!(mask.dims(), [5, 7]);
        assert_eq!(mask.into_data().to_vec::<f32>().unwrap(), one.mask(35));
        let like = burn::tensor::Tensor::<burn::backend::Autodiff<B>, 2>::from_inner(like);
        let mask = burn::backend::Autodiff::<B>::dropout_mask(&like, one);
        assert_eq!(mask.into_data().to_vec::<f32>().unwrap(), one.mask(35));
    }
}

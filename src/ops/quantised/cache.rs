//! Keys and values in 8 bits: half the memory of a long context, at the price of dequantising a layer's
//! cache in each step. CUDA's captured steps read the words (`accelerate/cuda/decode`).

use burn::{prelude::*, tensor::DType};

use crate::ops::cast::{to_dtype, to_f32};

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum CacheFormat {
    /// In the type of the weights.
    #[default]
    Float,
    /// In 8 bits, a scale for each token and head.
    Int8,
}

/// Added to a level so that it is stored without a sign.
const OFFSET: f64 = 128.0;

/// Keys or values of one layer.
#[derive(Debug, Clone)]
struct Packed<B: Backend> {
    /// `[batch, heads, capacity, head_dim / 4]`, i32: four levels a word, the first in the lowest bits.
    words: Tensor<B, 4, Int>,
    /// `[batch, heads, capacity, 1]`, f32.
    scales: Tensor<B, 4>,
}

impl<B: Backend> Packed<B> {
    /// Quantises `[batch, heads, tokens, head_dim]`.
    fn pack(x: Tensor<B, 4>) -> Self {
        let [batch, heads, tokens, head_dim] = x.dims();
        assert!(head_dim.is_multiple_of(4), "heads of {head_dim} elements");
        let x = to_f32(x);
        let scales = x.clone().abs().max_dim(3) / 127.0;
        // Where all is zero any divisor will do.
        let divisors = scales.clone().clamp_min(f32::MIN_POSITIVE);
        let levels = ((x / divisors).round().clamp(-127.0, 127.0) + OFFSET).int();
        let levels = levels.cast(burn::tensor::IntDType::I32).reshape([
            batch * heads,
            tokens,
            head_dim / 4,
            4,
        ]);
        let places = (0..4).map(|place| {
            levels
                .clone()
                .narrow(3, place, 1)
                .bitwise_left_shift_scalar((8 * place as i32).elem())
        });
        let words = places
            .reduce(Tensor::bitwise_or)
            .expect("a word has four places");
        Self {
            words: words.reshape([batch, heads, tokens, head_dim / 4]),
            scales,
        }
    }

    /// The first `len` tokens as floats, `[batch, heads, len, head_dim]`.
    fn unpack(&self, len: usize, dtype: DType) -> Tensor<B, 4> {
        let words = self.words.clone().narrow(2, 0, len);
        let [batch, heads, _, width] = words.dims();
        let places = (0..4).map(|place| {
            words
                .clone()
                .bitwise_right_shift_scalar((8 * place).elem())
                .bitwise_and_scalar(255.elem())
        });
        let levels: Tensor<B, 5, Int> = Tensor::stack(places.collect(), 4);
        let levels = to_f32(levels.reshape([batch, heads, len, 4 * width]).float());
        let scales = self.scales.clone().narrow(2, 0, len);
        to_dtype((levels - OFFSET) * scales, dtype)
    }

    fn capacity(&self) -> usize {
        self.words.dims()[2]
    }

    /// The same tokens in buffers of `capacity`.
    fn grown(self, capacity: usize) -> Self {
        let [batch, heads, held, width] = self.words.dims();
        let device = self.words.device();
        let range = |width| [0..batch, 0..heads, 0..held, 0..width];
        let words = Tensor::zeros([batch, heads, capacity, width], (&device, DType::I32));
        let scales = Tensor::zeros([batch, heads, capacity, 1], (&device, DType::F32));
        Self {
            words: words.slice_assign(range(width), self.words),
            scales: scales.slice_assign(range(1), self.scales),
        }
    }

    /// Writes `new` from token `at` on.
    fn write(self, new: Self, at: usize) -> Self {
        let [batch, heads, tokens, width] = new.words.dims();
        let range = |width| [0..batch, 0..heads, at..at + tokens, 0..width];
        Self {
            words: self.words.slice_assign(range(width), new.words),
            scales: self.scales.slice_assign(range(1), new.scales),
        }
    }

    fn select(self, rows: Tensor<B, 1, Int>) -> Self {
        Self {
            words: self.words.select(0, rows.clone()),
            scales: self.scales.select(0, rows),
        }
    }
}

/// Keys and values of one layer in 8 bits.
#[derive(Debug, Clone)]
pub struct QuantisedCache<B: Backend> {
    keys: Packed<B>,
    values: Packed<B>,
}

impl<B: Backend> QuantisedCache<B> {
    /// Writes new tokens `[batch, heads, new, head_dim]` after the first `len` of `held`, in buffers of at
    /// least `capacity` tokens, and returns all keys and values so far as floats,
    /// `[batch, heads, len + new, head_dim]` each. Clones of `held` keep what
    /// they hold.
    pub fn append(
        held: Option<Self>,
        len: usize,
        [k, v]: [Tensor<B, 4>; 2],
        capacity: usize,
    ) -> (Self, (Tensor<B, 4>, Tensor<B, 4>)) {
        let (dtype, end) = (k.dtype(), len + k.dims()[2]);
        let (new_keys, new_values) = (Packed::pack(k), Packed::pack(v));
        let write = |held: Option<Packed<B>>, new: Packed<B>| match held {
            Some(held) if held.capacity() >= end => held.write(new, len),
            Some(held) => held.grown(capacity).write(new, len),
            None => new.grown(capacity),
        };
        let (keys, values) = held.map(|held| (held.keys, held.values)).unzip();
        let this = Self {
            keys: write(keys, new_keys),
            values: write(values, new_values),
        };
        let seen = (this.keys.unpack(end, dtype), this.values.unpack(end, dtype));
        (this, seen)
    }

    /// Words and scales of keys, and of values: `[batch, heads, capacity, head_dim / 4]`, i32, and
    /// `[batch, heads, capacity, 1]`, f32.
    pub fn buffers(&self) -> [(&Tensor<B, 4, Int>, &Tensor<B, 4>); 2] {
        [&self.keys, &self.values].map(|packed| (&packed.words, &packed.scales))
    }

    /// Tokens that there is room for.
    pub fn capacity(&self) -> usize {
        self.keys.capacity()
    }

    /// The named rows of the batch.
    ///
    /// # Shapes
    /// - `rows`: `[n]`
    pub fn select(self, rows: Tensor<B, 1, Int>) -> Self {
        Self {
            keys: self.keys.select(rows.clone()),
            values: self.values.select(rows),
        }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;
    use burn_flex::Flex;

    fn values<const D: usize>(tensor: Tensor<Flex, D>) -> Vec<f32> {
        tensor.into_data().iter::<f32>().collect()
    }

    #[test]
    fn a_token_is_quantised_to_the_expected_words() {
        let device = Default::default();
        // Scale 2.54 / 127 = 0.02: levels 127, -127, 1, 0, each plus 128; then a token of zeros.
        let x =
            Tensor::<Flex, 1>::from_floats([2.54, -2.54, 0.02, 0.008, 0.0, 0.0, 0.0, 0.0], &device);
        let packed = Packed::pack(x.reshape([1, 1, 2, 4]));
        let words: Vec<i64> = packed.words.clone().into_data().iter::<i64>().collect();
        assert_eq!(
            words,
            [0x8081_01ff_u32 as i32 as i64, 0x8080_8080_u32 as i32 as i64]
        );
        let back = values(packed.unpack(2, DType::F32));
        for (back, want) in back
            .iter()
            .zip([2.54, -2.54, 0.02, 0.0, 0.0, 0.0, 0.0, 0.0])
        {
            assert!((back - want).abs() < 1e-6, "{back} {want}");
        }
    }

    #[test]
    fn tokens_are_appended_and_forks_keep_theirs() {
        let device = Default::default();
        let draw = |tokens: usize, factor: f32| {
            let values = Tensor::<Flex, 1, Int>::arange(0..(2 * tokens * 8) as i64, &device);
            ((values.float() * 0.37).sin() * factor).reshape([1, 2, tokens, 8])
        };
        let (first, second) = (draw(3, 1.0), draw(2, 0.5));
        let append = |held, len, x: &Tensor<Flex, 4>| {
            QuantisedCache::append(held, len, [x.clone(), x.clone() * 2.0], 4)
        };
        let (held, _) = append(None, 0, &first);
        let fork = held.clone();
        // After the third token, which makes the buffers grow.
        let held = QuantisedCache {
            keys: held.keys.grown(8),
            values: held.values.grown(8),
        };
        let (_, (keys, all_values)) = append(Some(held), 3, &second);
        let want = Tensor::cat(vec![first.clone(), second.clone()], 2);
        let near = |ours: Tensor<Flex, 4>, want: Tensor<Flex, 4>| {
            let off = (ours - want).abs().max().into_scalar();
            // Half a level of the largest value.
            assert!(off < 2.0 / 254.0 * 1.01, "{off}");
        };
        near(keys, want.clone());
        near(all_values, want * 2.0);
        let (_, (keys, _)) = append(Some(fork), 1, &second);
        near(keys, Tensor::cat(vec![first.narrow(2, 0, 1), second], 2));
    }
}

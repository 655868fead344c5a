//! Three-axis positions and rotary tables.
//!
//! Positions are integers and are worked out on the host; the tables are f32 whatever the model's
//! dtype, because bf16 cannot tell neighbouring positions apart beyond 256.

use crate::kernels::{HeadNorm, Kernels};
use burn::{prelude::*, tensor::TensorData};

use super::config::TextConfig;

/// Positions of every token on the three axes (time, height, width), `[axis][token]`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Positions {
    /// One vector of token positions an axis.
    pub axes: [Vec<i64>; 3],
}

impl Positions {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.axes[0].len()
    }

    /// Whether there is no token.
    pub fn is_empty(&self) -> bool {
        self.axes[0].is_empty()
    }

    /// Appends one token.
    pub fn push(&mut self, position: [i64; 3]) {
        for (axis, value) in self.axes.iter_mut().zip(position) {
            axis.push(value);
        }
    }

    /// The positions of tokens `range`.
    pub fn slice(&self, range: std::ops::Range<usize>) -> Self {
        Self {
            axes: self
                .axes
                .each_ref()
                .map(|axis| axis[range.clone()].to_vec()),
        }
    }

    /// Appends all tokens of `other`.
    pub fn extend(&mut self, other: &Self) {
        for (axis, more) in self.axes.iter_mut().zip(&other.axes) {
            axis.extend_from_slice(more);
        }
    }
}

/// What does not fit between a prompt and its images.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PositionError {
    /// More image tokens than the images have, or fewer.
    #[error(
        "the prompt holds {found} image tokens, its {images} image(s) need {expected}; one placeholder an image is expanded to its number of merged patches"
    )]
    ImageTokens {
        /// Image tokens in the prompt.
        found: usize,
        /// Tokens the images need.
        expected: usize,
        /// Number of images.
        images: usize,
    },
    /// An image's tokens are interrupted by text.
    #[error("image {image} has {found} image tokens in a row, expected {expected}")]
    Interrupted {
        /// Index of the image.
        image: usize,
        /// Tokens found in a row.
        found: usize,
        /// Tokens expected.
        expected: usize,
    },
}

/// Position ids of one unpadded sequence, and the next free position less its length.
///
/// Text counts up on all axes alike; an image's tokens share one time position and carry their row
/// and column; text after an image goes on behind the largest position so far. `grids` holds each
/// image's patches as `(time, height, width)`.
///
/// # Errors
/// [`PositionError`] when image tokens and grids do not agree.
///
/// Source: `Qwen3VLModel.get_rope_index`, transformers.
pub fn rope_index(
    input_ids: &[u32],
    grids: &[[usize; 3]],
    image_token_id: u32,
    merge: usize,
) -> Result<(Positions, i64), PositionError> {
    let mut positions = Positions::default();
    let mut next: i64 = 0;
    let mut image = 0;
    let mut at = 0;
    let mismatch = || PositionError::ImageTokens {
        found: input_ids.iter().filter(|id| **id == image_token_id).count(),
        expected: grids
            .iter()
            .map(|[t, h, w]| t * h * w / (merge * merge))
            .sum(),
        images: grids.len(),
    };
    while at < input_ids.len() {
        if input_ids[at] != image_token_id {
            positions.push([next; 3]);
            next += 1;
            at += 1;
            continue;
        }
        let [t, h, w] = *grids.get(image).ok_or_else(mismatch)?;
        let (rows, columns) = (h / merge, w / merge);
        let expected = t * rows * columns;
        let found = input_ids[at..]
            .iter()
            .take(expected)
            .take_while(|id| **id == image_token_id)
            .count();
        if found < expected {
            if input_ids[at + found..].contains(&image_token_id) {
                return Err(PositionError::Interrupted {
                    image,
                    found,
                    expected,
                });
            }
            return Err(mismatch());
        }
        for frame in 0..t {
            for row in 0..rows {
                for column in 0..columns {
                    positions.push([next + frame as i64, next + row as i64, next + column as i64]);
                }
            }
        }
        next += t.max(rows).max(columns) as i64;
        at += expected;
        image += 1;
    }
    if image != grids.len() {
        return Err(mismatch());
    }
    let delta = next - input_ids.len() as i64;
    Ok((positions, delta))
}

/// Cosines and sines for rotating heads, both `[tokens, head_dim]`, f32.
#[derive(Debug, Clone)]
pub struct RopeTables<B: Backend> {
    /// Cosines.
    pub cos: Tensor<B, 2>,
    /// Sines.
    pub sin: Tensor<B, 2>,
}

impl<B: Kernels> RopeTables<B> {
    /// Tables from angles `[tokens, half]` given row by row; each row is used for both halves.
    fn from_angles(angles: &[f32], half: usize, device: &B::Device) -> Self {
        let tokens = angles.len() / half;
        let mut cos = Vec::with_capacity(tokens * half * 2);
        let mut sin = Vec::with_capacity(tokens * half * 2);
        for row in angles.chunks_exact(half) {
            let start = cos.len();
            for angle in row {
                let (s, c) = angle.sin_cos();
                cos.push(c);
                sin.push(s);
            }
            cos.extend_from_within(start..);
            sin.extend_from_within(start..);
        }
        Self::from_values(cos, sin, tokens, device)
    }

    fn from_values(cos: Vec<f32>, sin: Vec<f32>, tokens: usize, device: &B::Device) -> Self {
        let tensor = |values: Vec<f32>| {
            let width = values.len() / tokens.max(1);
            B::compact(Tensor::from_data(
                TensorData::new(values, [tokens, width]),
                (device, burn::tensor::DType::F32),
            ))
        };
        Self {
            cos: tensor(cos),
            sin: tensor(sin),
        }
    }

    /// Tables of the language model: frequency `j` turns with the axis that owns it.
    ///
    /// The axes are interleaved (time, height, width, time, …) as far as the height and width
    /// sections reach; the rest belongs to time.
    ///
    /// Source: `Qwen3VLTextRotaryEmbedding.apply_interleaved_mrope`, transformers.
    pub fn text(positions: &Positions, config: &TextConfig, device: &B::Device) -> Self {
        let half = config.head_dim / 2;
        let inv_freq = inverse_frequencies(config.head_dim, config.rope_theta);
        let axis: Vec<usize> = (0..half)
            .map(|j| match j % 3 {
                1 if j < config.mrope_section[1] * 3 => 1,
                2 if j < config.mrope_section[2] * 3 => 2,
                _ => 0,
            })
            .collect();
        let mut angles = Vec::with_capacity(positions.len() * half);
        for token in 0..positions.len() {
            for j in 0..half {
                angles.push(positions.axes[axis[j]][token] as f32 * inv_freq[j]);
            }
        }
        Self::from_angles(&angles, half, device)
    }

    /// Tables of the vision tower: the first half of the frequencies turns with the row, the second
    /// with the column. `rows_columns` holds `(row, column)` a patch.
    pub fn vision(rows_columns: &[[u32; 2]], head_dim: usize, device: &B::Device) -> Self {
        let inv_freq = inverse_frequencies(head_dim / 2, 10_000.0);
        let quarter = inv_freq.len();
        // Rows and columns are few and occur often: their sines are worked out once.
        let places = rows_columns
            .iter()
            .flatten()
            .max()
            .map_or(0, |most| *most + 1);
        let sin_cos: Vec<(f32, f32)> = (0..places)
            .flat_map(|place| {
                inv_freq
                    .iter()
                    .map(move |freq| (place as f32 * freq).sin_cos())
            })
            .collect();
        let mut cos = Vec::with_capacity(rows_columns.len() * head_dim);
        let mut sin = Vec::with_capacity(rows_columns.len() * head_dim);
        for position in rows_columns {
            let start = cos.len();
            for place in position {
                let at = *place as usize * quarter;
                for (s, c) in &sin_cos[at..at + quarter] {
                    cos.push(*c);
                    sin.push(*s);
                }
            }
            cos.extend_from_within(start..);
            sin.extend_from_within(start..);
        }
        Self::from_values(cos, sin, rows_columns.len(), device)
    }

    /// Normalises heads where a norm is given, then rotates them; `[tokens, heads, head_dim]`.
    pub fn rotate(&self, x: Tensor<B, 3>, norm: Option<HeadNorm<B>>) -> Tensor<B, 3> {
        B::rotate_heads(x, norm, self.cos.clone(), self.sin.clone())
    }
}

/// Turns a position into angles: one frequency a pair of elements of a head.
pub(crate) fn inverse_frequencies(dim: usize, theta: f64) -> Vec<f32> {
    // In f32 like the reference: the published tables were made so.
    (0..dim / 2)
        .map(|j| 1.0 / (theta as f32).powf((2 * j) as f32 / dim as f32))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_goes_on_behind_the_larger_side_of_an_image() {
        // One text token, a 2×3 image of merged patches, two text tokens.
        let ids = [1, 9, 9, 9, 9, 9, 9, 2, 3];
        let (positions, delta) = rope_index(&ids, &[[1, 4, 6]], 9, 2).unwrap();
        assert_eq!(positions.axes[0], [0, 1, 1, 1, 1, 1, 1, 4, 5]);
        assert_eq!(positions.axes[1], [0, 1, 1, 1, 2, 2, 2, 4, 5]);
        assert_eq!(positions.axes[2], [0, 1, 2, 3, 1, 2, 3, 4, 5]);
        assert_eq!(delta, -3);
    }

    #[test]
    fn image_tokens_and_grids_must_agree() {
        let count = rope_index(&[9, 9], &[[1, 4, 6]], 9, 2).unwrap_err();
        assert!(count.to_string().contains("need 6"), "{count}");
        let none = rope_index(&[1, 9], &[], 9, 2).unwrap_err();
        assert!(none.to_string().contains("holds 1 image tokens"), "{none}");
        let unused = rope_index(&[1, 2], &[[1, 2, 2]], 9, 2).unwrap_err();
        assert!(unused.to_string().contains("holds 0"), "{unused}");
        let split = rope_index(&[9, 1, 9, 9], &[[1, 2, 6]], 9, 2).unwrap_err();
        assert_eq!(
            split,
            PositionError::Interrupted {
                image: 0,
                found: 1,
                expected: 3
            }
        );
    }
}

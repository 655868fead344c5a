//! Rotary position embedding (RoPE): cosine and sine tables from three-axis positions (M-RoPE).
//!
//! Positions are integers and are computed on the host; the tables are f32 whatever the model's
//! dtype, because bf16 gives neighbouring positions beyond 256 the same value.

use crate::{
    batch::positions::Positions,
    ops::{HeadNorm, Ops},
};

use burn::{prelude::*, tensor::TensorData};

use super::config::TextConfig;

/// Cosines and sines for rotating heads, both `[tokens, head_dim]`, f32.
#[derive(Debug, Clone)]
pub struct RopeTables<B: Backend> {
    /// Cosines.
    pub cos: Tensor<B, 2>,
    /// Sines.
    pub sin: Tensor<B, 2>,
}

impl<B: Ops> RopeTables<B> {
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
            B::contiguous(Tensor::from_data(
                TensorData::new(values, [tokens, width]),
                (device, burn::tensor::DType::F32),
            ))
        };
        Self {
            cos: tensor(cos),
            sin: tensor(sin),
        }
    }

    /// Tables of the language model: frequency `j` is multiplied by the position on the axis that owns it.
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

    /// Tables of the vision tower: the first half of the frequencies is for the row, the second for
    /// the column. `rows_columns` holds `(row, column)` a patch.
    pub fn vision(rows_columns: &[[u32; 2]], head_dim: usize, device: &B::Device) -> Self {
        let inv_freq = inverse_frequencies(head_dim / 2, 10_000.0);
        let quarter = inv_freq.len();
        // Rows and columns are few and occur often: their sines are computed once.
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

    /// Width of a head.
    pub fn head_dim(&self) -> usize {
        self.cos.dims()[1]
    }

    /// Normalises heads where a norm is given, then rotates them.
    ///
    /// # Shapes
    /// - `x` and result: `[tokens, heads, head_dim]`
    pub fn rotate(&self, x: Tensor<B, 3>, norm: Option<HeadNorm<B>>) -> Tensor<B, 3> {
        B::rotate_heads(x, norm, self.cos.clone(), self.sin.clone())
    }
}

/// Inverse frequencies that map a position to angles: one a pair of elements of a head.
pub(crate) fn inverse_frequencies(dim: usize, theta: f64) -> Vec<f32> {
    // In f32 like the reference: the published tables were made so.
    (0..dim / 2)
        .map(|j| 1.0 / (theta as f32).powf((2 * j) as f32 / dim as f32))
        .collect()
}

//! The vision tower: patches in, one token for every merged square of patches out.
//!
//! Patches come and go in spatial-merge-block order: the patches of one merged square are
//! contiguous. Shape letters: `n` patches of all images together, `m = n / merge²` merged tokens.

use crate::{
    batch::images::ImageInput,
    ops::{
        Activation, AttentionSpans, Kept, Ops,
        cast::{to_dtype, to_f32},
    },
};

use burn::{
    module::Param,
    prelude::*,
    tensor::{DType, TensorData},
};

use super::{
    config::VisionConfig,
    heads::{heads_first, tokens_first},
    nn::{Embedding, InitOptions, LayerNorm, Linear, lazy_full, lazy_normal},
    patch_positions::{PositionCorners, patch_positions},
    rope::RopeTables,
};

const LAYER_NORM_EPS: f64 = 1e-6;

/// Projection of flattened patches; the published kernel keeps its five axes.
///
/// Source: `Qwen3VLVisionPatchEmbed`, a 3-D convolution whose stride is its size, so a matmul.
#[derive(Module, Debug)]
pub struct PatchEmbedProjection<B: Backend> {
    /// `[hidden, channels, frames, height, width]`.
    pub weight: Param<Tensor<B, 5>>,
    /// `[hidden]`.
    pub bias: Param<Tensor<B, 1>>,
}

/// Patches to the tower's width.
#[derive(Module, Debug)]
pub struct PatchEmbed<B: Backend> {
    /// The projection.
    pub proj: PatchEmbedProjection<B>,
}

impl<B: Ops> PatchEmbed<B> {
    fn new(config: &VisionConfig, options: &InitOptions, device: &B::Device) -> Self {
        let shape = [
            config.hidden_size,
            config.in_channels,
            config.temporal_patch_size,
            config.patch_size,
            config.patch_size,
        ];
        Self {
            proj: PatchEmbedProjection {
                weight: lazy_normal(shape, options.initializer_range, options.dtype, device),
                bias: lazy_full([config.hidden_size], 0.0, options.dtype, device),
            },
        }
    }

    /// The projection, plus `positions` where they are given.
    ///
    /// # Shapes
    /// - `pixel_values`: `[n, channels × frames × height × width]`
    /// - `positions`: `[n, hidden]`
    /// - returns: `[n, hidden]`
    pub fn forward(
        &self,
        pixel_values: Tensor<B, 2>,
        positions: Option<Tensor<B, 2>>,
    ) -> Tensor<B, 2> {
        let weight = self.proj.weight.val();
        let hidden = weight.dims()[0];
        let weight = weight.reshape([hidden as i32, -1]);
        let bias = self.proj.bias.val();
        B::linear_add(
            to_dtype(pixel_values, bias.dtype()),
            weight,
            Some(bias),
            positions,
        )
    }
}

/// Self-attention inside each image.
#[derive(Module, Debug)]
pub struct VisionAttention<B: Backend> {
    /// Queries, keys and values in one projection.
    pub qkv: Linear<B>,
    /// Output projection.
    pub proj: Linear<B>,
    num_heads: usize,
}

impl<B: Ops> VisionAttention<B> {
    /// Attention within each image, plus `residual`.
    ///
    /// # Shapes
    /// - `x`, `residual` and result: `[n, hidden]`
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
        layout: &VisionLayout<B>,
        dropout_seed: Option<u64>,
    ) -> Tensor<B, 2> {
        let qkv = self.qkv.forward(x, dropout_seed);
        let (cos, sin) = (layout.rope.cos.clone(), layout.rope.sin.clone());
        let [q, k, v] =
            B::split_and_rotate(qkv, self.num_heads, cos, sin).map(|x| heads_first(x, 1));
        let y = B::span_attention(q, k, v, &layout.spans);
        self.proj
            .forward_add(tokens_first(y), residual, dropout_seed)
    }
}

/// Feed-forward block: `fc2(gelu(fc1(x)))`, GELU in the tanh form.
#[derive(Module, Debug)]
pub struct VisionMlp<B: Backend> {
    /// Up.
    pub linear_fc1: Linear<B>,
    /// Down.
    pub linear_fc2: Linear<B>,
}

impl<B: Ops> VisionMlp<B> {
    /// The feed-forward block, plus `residual`.
    ///
    /// # Shapes
    /// - `x`, `residual` and result: `[n, hidden]`
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        residual: Tensor<B, 2>,
        dropout_seed: Option<u64>,
    ) -> Tensor<B, 2> {
        let x = self
            .linear_fc1
            .forward_activated(x, Activation::GeluTanh, dropout_seed);
        self.linear_fc2.forward_add(x, residual, dropout_seed)
    }
}

/// One block of the tower: pre-norm attention and feed-forward, both with a residual.
#[derive(Module, Debug)]
pub struct VisionBlock<B: Backend> {
    /// Before attention.
    pub norm1: LayerNorm<B>,
    /// Before the feed-forward block.
    pub norm2: LayerNorm<B>,
    /// Attention.
    pub attn: VisionAttention<B>,
    /// Feed-forward block.
    pub mlp: VisionMlp<B>,
}

impl<B: Ops> VisionBlock<B> {
    fn new(config: &VisionConfig, options: &InitOptions, device: &B::Device) -> Self {
        let hidden = config.hidden_size;
        let linear = |from, to| Linear::new(from, to, true, options, device);
        Self {
            norm1: LayerNorm::new(hidden, LAYER_NORM_EPS, options, device),
            norm2: LayerNorm::new(hidden, LAYER_NORM_EPS, options, device),
            attn: VisionAttention {
                qkv: linear(hidden, 3 * hidden),
                proj: linear(hidden, hidden),
                num_heads: config.num_heads,
            },
            mlp: VisionMlp {
                linear_fc1: linear(hidden, config.intermediate_size),
                linear_fc2: linear(config.intermediate_size, hidden),
            },
        }
    }

    /// Attention, then the feed-forward block.
    ///
    /// # Shapes
    /// - `x` and result: `[n, hidden]`
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        layout: &VisionLayout<B>,
        dropout_seed: Option<u64>,
    ) -> Tensor<B, 2> {
        let normed = self.norm1.forward(x.clone());
        let x = self.attn.forward(normed, x, layout, dropout_seed);
        let normed = self.norm2.forward(x.clone());
        self.mlp.forward(normed, x, dropout_seed)
    }
}

/// Joins each merged square of patches into one token of the language model's width.
#[derive(Module, Debug)]
pub struct PatchMerger<B: Backend> {
    /// Over single patches (main merger) or over the joined square (DeepStack mergers).
    pub norm: LayerNorm<B>,
    /// Inner projection.
    pub linear_fc1: Linear<B>,
    /// Outer projection.
    pub linear_fc2: Linear<B>,
    norm_after_shuffle: bool,
}

impl<B: Ops> PatchMerger<B> {
    fn new(
        config: &VisionConfig,
        norm_after_shuffle: bool,
        options: &InitOptions,
        device: &B::Device,
    ) -> Self {
        let joined = config.hidden_size * config.spatial_merge_size.pow(2);
        let norm_width = if norm_after_shuffle {
            joined
        } else {
            config.hidden_size
        };
        Self {
            norm: LayerNorm::new(norm_width, LAYER_NORM_EPS, options, device),
            linear_fc1: Linear::new(joined, joined, true, options, device),
            linear_fc2: Linear::new(joined, config.out_hidden_size, true, options, device),
            norm_after_shuffle,
        }
    }

    /// Joins the patches of each square to a feature.
    ///
    /// # Shapes
    /// - `x`: `[n, hidden]`
    /// - returns: `[m, out_hidden]`, `m` a fourth of `n` for squares of two by two
    pub fn forward(&self, x: Tensor<B, 2>, dropout_seed: Option<u64>) -> Tensor<B, 2> {
        let [patches, hidden] = x.dims();
        let joined = self.linear_fc1.weight.lazy_shape()[1];
        let merged = patches * hidden / joined;
        let x = if self.norm_after_shuffle {
            self.norm.forward(x.reshape([merged, joined]))
        } else {
            self.norm.forward(x).reshape([merged, joined])
        };
        let x = self
            .linear_fc1
            .forward_activated(x, Activation::GeluExact, dropout_seed);
        self.linear_fc2.forward(x, dropout_seed)
    }
}

/// The patches as a tensor `[patches, patch_dim]` in `dtype`; bf16 is rounded here, so that half
/// the bytes travel.
///
/// # Panics
/// If the number of values is not that of the grids.
pub fn pixel_tensor<B: Ops>(
    images: &ImageInput,
    patch_dim: usize,
    dtype: DType,
    device: &B::Device,
) -> Tensor<B, 2> {
    let shape = [images.patches(), patch_dim];
    assert_eq!(
        images.pixel_values.len(),
        shape[0] * shape[1],
        "pixel values and grids disagree"
    );
    if dtype == DType::BF16 {
        let mut half = vec![half::bf16::ZERO; images.pixel_values.len()];
        images.write_half_values(&mut half);
        let values = TensorData::new(half, shape);
        return Tensor::from_data(values, (device, dtype));
    }
    let values = TensorData::new(images.pixel_values.to_vec(), shape);
    to_dtype(Tensor::from_data(values, (device, DType::F32)), dtype)
}

/// Output of the tower: features for the language model.
#[derive(Debug, Clone)]
pub struct VisionOutput<B: Backend> {
    /// Goes into the text embeddings, `[m, out_hidden]`.
    pub merged: Tensor<B, 2>,
    /// DeepStack features, added after the first layers of the language model, each `[m, out_hidden]`.
    pub deepstack: Vec<Tensor<B, 2>>,
}

impl<B: Backend> VisionOutput<B> {
    /// Some features, in the order of `indices`.
    ///
    /// # Shapes
    /// - `indices`: `[n]`
    pub fn select(&self, indices: Tensor<B, 1, Int>) -> Self {
        let select = |x: &Tensor<B, 2>| x.clone().select(0, indices.clone());
        Self {
            merged: select(&self.merged),
            deepstack: self.deepstack.iter().map(select).collect(),
        }
    }
}

/// Positions of the patches of some images: what the tower needs besides pixels.
#[derive(Debug, Clone)]
pub struct VisionLayout<B: Backend> {
    /// Four rows of the position table for each patch: one index tensor `[n]` a corner.
    corners: Vec<(Tensor<B, 1, Int>, Tensor<B, 2>)>,
    /// Rotary tables, `[n, head_dim]`.
    pub rope: RopeTables<B>,
    /// Attention stays inside each frame.
    pub spans: AttentionSpans<B>,
}

impl<B: Ops> VisionLayout<B> {
    /// Computes positions for images of `grids` patches, `(time, height, width)` each.
    pub fn new(grids: &[[usize; 3]], config: &VisionConfig, device: &B::Device) -> Self {
        let mut corners = PositionCorners::default();
        let mut rows_columns = Vec::new();
        let mut segments = Vec::new();
        for grid in grids {
            corners.extend(*grid, config.position_side(), config.spatial_merge_size);
            rows_columns.extend(patch_positions(*grid, config.spatial_merge_size));
            segments.extend(std::iter::repeat_n(grid[1] * grid[2], grid[0]));
        }
        let patches = rows_columns.len();
        let corners = (0..4)
            .map(|corner| {
                let indices: Vec<i32> = corners
                    .indices
                    .iter()
                    .map(|row| row[corner] as i32)
                    .collect();
                let weights: Vec<f32> = corners.weights.iter().map(|row| row[corner]).collect();
                (
                    Tensor::from_ints(indices.as_slice(), device),
                    Tensor::from_data(TensorData::new(weights, [patches, 1]), (device, DType::F32)),
                )
            })
            .collect();
        Self {
            corners,
            rope: RopeTables::vision(&rows_columns, config.head_dim(), device),
            spans: AttentionSpans::blocks(&segments, device),
        }
    }
}

/// The vision tower.
///
/// Source: `Qwen3VLVisionModel`, transformers, `modeling_qwen3_vl.py`.
#[derive(Module, Debug)]
pub struct VisionModel<B: Backend> {
    /// Patches to the tower's width.
    pub patch_embed: PatchEmbed<B>,
    /// Learned position table.
    pub pos_embed: Embedding<B>,
    /// Blocks.
    pub blocks: Vec<VisionBlock<B>>,
    /// Last block's output to tokens.
    pub merger: PatchMerger<B>,
    /// Inner blocks' outputs to DeepStack tokens.
    pub deepstack_merger_list: Vec<PatchMerger<B>>,
    deepstack_visual_indexes: Vec<usize>,
    /// What the backend caches for these weights.
    pub kept: Kept<B>,
}

impl<B: Ops> VisionModel<B> {
    /// A tower whose parameters are initialised at first use.
    pub fn new(config: &VisionConfig, options: &InitOptions, device: &B::Device) -> Self {
        Self {
            patch_embed: PatchEmbed::new(config, options, device),
            pos_embed: Embedding::new(
                config.num_position_embeddings,
                config.hidden_size,
                options,
                device,
            ),
            blocks: (0..config.depth)
                .map(|_| VisionBlock::new(config, options, device))
                .collect(),
            merger: PatchMerger::new(config, false, options, device),
            deepstack_merger_list: config
                .deepstack_visual_indexes
                .iter()
                .map(|_| PatchMerger::new(config, true, options, device))
                .collect(),
            deepstack_visual_indexes: config.deepstack_visual_indexes.clone(),
            kept: Kept::default(),
        }
    }

    /// All linear layers.
    pub fn linears(&self) -> impl Iterator<Item = &Linear<B>> {
        let blocks = self.blocks.iter().flat_map(|block| {
            let (attn, mlp) = (&block.attn, &block.mlp);
            [&attn.qkv, &attn.proj, &mlp.linear_fc1, &mlp.linear_fc2]
        });
        let mergers = std::iter::once(&self.merger).chain(&self.deepstack_merger_list);
        blocks.chain(mergers.flat_map(|merger| [&merger.linear_fc1, &merger.linear_fc2]))
    }

    /// Type of the stored weights.
    pub fn dtype(&self) -> DType {
        self.patch_embed.proj.bias.val().dtype()
    }

    /// Interpolated position embeddings, `[n, hidden]`.
    pub fn position_embeddings(&self, layout: &VisionLayout<B>) -> Tensor<B, 2> {
        let mut sum: Option<Tensor<B, 2>> = None;
        for (indices, weights) in &layout.corners {
            let rows = to_f32(self.pos_embed.forward(indices.clone()));
            let part = rows * weights.clone();
            sum = Some(match sum {
                Some(sum) => sum + part,
                None => part,
            });
        }
        let dtype = self.dtype();
        to_dtype(sum.expect("a patch has four corners"), dtype)
    }

    /// Input of the first block: patch embedding plus position.
    ///
    /// # Shapes
    /// - `pixel_values`: `[n, patch_dim]`
    /// - returns: `[n, hidden]`
    pub fn embed(&self, pixel_values: Tensor<B, 2>, layout: &VisionLayout<B>) -> Tensor<B, 2> {
        self.patch_embed
            .forward(pixel_values, Some(self.position_embeddings(layout)))
    }

    /// The DeepStack merger that reads the output of block `index`, where there is one.
    pub fn deepstack_after(&self, index: usize) -> Option<&PatchMerger<B>> {
        let at = self
            .deepstack_visual_indexes
            .iter()
            .position(|i| *i == index)?;
        self.deepstack_merger_list.get(at)
    }

    /// # Shapes
    /// - `pixel_values`: `[n, patch_dim]`, the images of `layout` one after another
    pub fn forward(
        &self,
        pixel_values: Tensor<B, 2>,
        layout: &VisionLayout<B>,
        dropout_seed: Option<u64>,
    ) -> VisionOutput<B> {
        let positions = self.position_embeddings(layout);
        self.forward_from(pixel_values, positions, layout, dropout_seed)
    }

    /// [`VisionModel::forward`] with position embeddings `[n, hidden]` computed before.
    ///
    /// # Shapes
    /// - `pixel_values`: `[n, patch_dim]`
    pub fn forward_from(
        &self,
        pixel_values: Tensor<B, 2>,
        positions: Tensor<B, 2>,
        layout: &VisionLayout<B>,
        dropout_seed: Option<u64>,
    ) -> VisionOutput<B> {
        let x = self.patch_embed.forward(pixel_values, Some(positions));
        self.run_blocks(x, layout, dropout_seed, |_| ())
    }

    /// All blocks and mergers over the result of [`VisionModel::embed`]; `on_input` gets the input of each
    /// block and at last that of the main merger.
    ///
    /// # Shapes
    /// - `x` and what `on_input` gets: `[n, hidden]`
    pub fn run_blocks(
        &self,
        mut x: Tensor<B, 2>,
        layout: &VisionLayout<B>,
        dropout_seed: Option<u64>,
        mut on_input: impl FnMut(&Tensor<B, 2>),
    ) -> VisionOutput<B> {
        let mut deepstack = Vec::with_capacity(self.deepstack_merger_list.len());
        for (index, block) in self.blocks.iter().enumerate() {
            on_input(&x);
            x = block.forward(x, layout, dropout_seed);
            if let Some(merger) = self.deepstack_after(index) {
                deepstack.push(merger.forward(x.clone(), dropout_seed));
            }
        }
        on_input(&x);
        VisionOutput {
            merged: self.merger.forward(x, dropout_seed),
            deepstack,
        }
    }
}

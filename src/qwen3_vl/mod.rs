//! Qwen3-VL: token ids and patches in, hidden states and logits out.
//!
//! This module opens no file but a checkpoint's ([`weights`]) and knows neither text nor pixels: what
//! it gets are ids, positions and normalised patches. Fields carry the checkpoint's own names, so
//! a parameter's path in the module tree is its key in the file.

mod ahead;
pub mod cache;
pub mod config;
pub mod nn;
pub mod pixels;
pub mod rope;
pub mod text;
pub mod vision;
pub mod weights;

use crate::{
    kernels::{AttentionSpans, Kernels},
    quant::{Quantization, Weight},
};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use burn::{
    prelude::*,
    tensor::{DType, TensorData},
};

use ahead::Ahead;
use cache::KeyValueCache;
use config::Qwen3VlConfig;
use nn::{InitOptions, Linear, to_dtype, to_f32};
use pixels::Pixels;
use rope::{PositionError, Positions, RopeTables, rope_index};
use text::{TextContext, TextModel};
use vision::{VisionLayout, VisionModel, VisionOutput};

/// The images of a batch, on the host: all patches one after another.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ImageInput {
    /// Normalised patches, `[patches, patch_dim]` row-major, in merge-block order.
    pub pixel_values: Pixels,
    /// Patches of each image: `(time, height, width)`.
    pub image_grid_thw: Vec<[usize; 3]>,
}

impl ImageInput {
    /// Appends the images of `other`.
    pub fn extend(&mut self, other: &Self) {
        self.pixel_values.extend_from_slice(&other.pixel_values);
        self.image_grid_thw.extend_from_slice(&other.image_grid_thw);
    }

    /// Number of patches of all images.
    pub fn patches(&self) -> usize {
        self.image_grid_thw.iter().map(|[t, h, w]| t * h * w).sum()
    }

    /// Writes the values of all patches, rounded to bf16.
    ///
    /// # Panics
    /// If there is not room for exactly that many.
    pub fn write_half_values(&self, half: &mut [half::bf16]) {
        const PIECE: usize = 1 << 15;
        assert_eq!(half.len(), self.pixel_values.len(), "room for the pixels");
        half.par_chunks_mut(PIECE)
            .zip(self.pixel_values.par_chunks(PIECE))
            .for_each(|(half, values)| half.convert_from_f32_slice(values));
    }

    /// The patches as a tensor `[patches, patch_dim]` in `dtype`; bf16 is rounded here, so that half
    /// the bytes travel.
    ///
    /// # Panics
    /// If the number of values is not that of the grids.
    pub fn tensor<B: Kernels>(
        &self,
        patch_dim: usize,
        dtype: DType,
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let shape = [self.patches(), patch_dim];
        assert_eq!(
            self.pixel_values.len(),
            shape[0] * shape[1],
            "pixel values and grids disagree"
        );
        if dtype == DType::BF16 {
            let mut half = vec![half::bf16::ZERO; self.pixel_values.len()];
            self.write_half_values(&mut half);
            let values = TensorData::new(half, shape);
            return Tensor::from_data(values, (device, dtype));
        }
        let values = TensorData::new(self.pixel_values.to_vec(), shape);
        to_dtype(Tensor::from_data(values, (device, DType::F32)), dtype)
    }
}

/// One batch of sequences, on the host: every row padded to one length.
#[derive(Debug, Clone, PartialEq)]
pub struct TextInput {
    /// Token ids, `[batch][seq]`.
    pub input_ids: Vec<Vec<u32>>,
    /// The sample each token belongs to, `[batch][seq]`, negative for padding. Several samples may
    /// share a row; attention stays inside each.
    pub segments: Vec<Vec<i32>>,
    /// Positions of all tokens, row after row.
    pub positions: Positions,
    /// Token that stands for an image patch.
    pub image_token_id: u32,
}

/// Side on which short rows are padded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Padding {
    /// For generation: every row ends in its last token.
    Left,
    /// For training.
    Right,
}

impl TextInput {
    /// A padded batch of independent sequences.
    ///
    /// `grids` holds the images of each row; padding has position 0. Returns the batch and each
    /// row's next position less its number of tokens.
    ///
    /// # Errors
    /// [`PositionError`] when image tokens and grids of a row do not agree.
    pub fn padded(
        rows: &[Vec<u32>],
        grids: &[Vec<[usize; 3]>],
        config: &Qwen3VlConfig,
        padding: Padding,
        pad_token_id: u32,
    ) -> Result<(Self, Vec<i64>), PositionError> {
        let seq = rows.iter().map(Vec::len).max().unwrap_or(0);
        let merge = config.vision_config.spatial_merge_size;
        let mut batch = Self {
            input_ids: Vec::with_capacity(rows.len()),
            segments: Vec::with_capacity(rows.len()),
            positions: Positions::default(),
            image_token_id: config.image_token_id,
        };
        let mut deltas = Vec::with_capacity(rows.len());
        for (ids, grids) in rows.iter().zip(grids) {
            let (positions, delta) = rope_index(ids, grids, config.image_token_id, merge)?;
            let pad = seq - ids.len();
            let (before, after) = match padding {
                Padding::Left => (pad, 0),
                Padding::Right => (0, pad),
            };
            let fill = |count| std::iter::repeat_n(pad_token_id, count);
            batch.input_ids.push(
                fill(before)
                    .chain(ids.iter().copied())
                    .chain(fill(after))
                    .collect(),
            );
            let hidden = |count| std::iter::repeat_n(-1, count);
            batch.segments.push(
                hidden(before)
                    .chain(std::iter::repeat_n(0, ids.len()))
                    .chain(hidden(after))
                    .collect(),
            );
            (0..before).for_each(|_| batch.positions.push([0; 3]));
            batch.positions.extend(&positions);
            (0..after).for_each(|_| batch.positions.push([0; 3]));
            deltas.push(delta);
        }
        Ok((batch, deltas))
    }

    /// Several samples in one row, one after another; attention and positions stay inside each.
    ///
    /// # Errors
    /// [`PositionError`] when image tokens and grids of a sample do not agree.
    pub fn packed(
        samples: &[Vec<u32>],
        grids: &[Vec<[usize; 3]>],
        config: &Qwen3VlConfig,
    ) -> Result<Self, PositionError> {
        let merge = config.vision_config.spatial_merge_size;
        let mut positions = Positions::default();
        let mut segments = Vec::new();
        for (index, (ids, grids)) in samples.iter().zip(grids).enumerate() {
            positions.extend(&rope_index(ids, grids, config.image_token_id, merge)?.0);
            segments.extend(std::iter::repeat_n(index as i32, ids.len()));
        }
        Ok(Self {
            input_ids: vec![samples.concat()],
            segments: vec![segments],
            positions,
            image_token_id: config.image_token_id,
        })
    }

    /// Number of rows.
    pub fn batch(&self) -> usize {
        self.input_ids.len()
    }

    /// Tokens in a row.
    pub fn seq(&self) -> usize {
        self.input_ids.first().map_or(0, Vec::len)
    }

    /// The tokens in the columns `range` of every row.
    pub fn columns(&self, range: std::ops::Range<usize>) -> Self {
        let mut positions = Positions::default();
        for row in 0..self.batch() {
            let start = row * self.seq();
            let tokens = start + range.start..start + range.end;
            positions.extend(&self.positions.slice(tokens));
        }
        Self {
            input_ids: cut(&self.input_ids, &range),
            segments: cut(&self.segments, &range),
            positions,
            image_token_id: self.image_token_id,
        }
    }

    /// For each token the row of `[one zero row; image features]` that belongs to it.
    fn image_rows(&self) -> Vec<i32> {
        let mut next = 0;
        self.input_ids
            .iter()
            .flatten()
            .map(|id| {
                if *id == self.image_token_id {
                    next += 1;
                    next
                } else {
                    0
                }
            })
            .collect()
    }

    /// What the layers need when nothing is cached.
    pub fn context<B: Kernels>(
        &self,
        config: &Qwen3VlConfig,
        dropout_seed: Option<u64>,
        device: &B::Device,
    ) -> TextContext<B> {
        TextContext {
            batch: self.batch(),
            rope: RopeTables::text(&self.positions, &config.text_config, device),
            spans: AttentionSpans::causal(&self.segments, 0, device),
            dropout_seed,
        }
    }
}

/// The columns `range` of some rows.
fn cut<T: Clone>(rows: &[Vec<T>], range: &std::ops::Range<usize>) -> Vec<Vec<T>> {
    let cut = |row: &Vec<T>| row[range.clone()].to_vec();
    rows.iter().map(cut).collect()
}

/// Where image features go among the tokens of a batch.
#[derive(Debug, Clone)]
pub struct ImagePlacement<B: Backend> {
    /// For each token 0, or 1 + the index of its image feature; `[n]`.
    rows: Tensor<B, 1, Int>,
    /// 1 for text, 0 for image tokens; `[n, 1]`, f32.
    is_text: Tensor<B, 2>,
    /// The image tokens, `[m]`.
    image_tokens: Tensor<B, 1, Int>,
}

impl<B: Kernels> ImagePlacement<B> {
    /// Reads the placement off the ids of a batch.
    pub fn new(input: &TextInput, device: &B::Device) -> Self {
        let rows = input.image_rows();
        let is_text: Vec<f32> = rows.iter().map(|row| f32::from(*row == 0)).collect();
        let tokens = rows.len();
        let image_tokens: Vec<i32> = (0..tokens as i32)
            .filter(|token| rows[*token as usize] > 0)
            .collect();
        Self {
            image_tokens: Tensor::from_ints(image_tokens.as_slice(), device),
            rows: Tensor::from_ints(rows.as_slice(), device),
            is_text: Tensor::from_data(TensorData::new(is_text, [tokens, 1]), (device, DType::F32)),
        }
    }

    /// Features at the image tokens, zero elsewhere: `[m, hidden]` → `[n, hidden]`.
    pub fn spread(&self, features: Tensor<B, 2>) -> Tensor<B, 2> {
        let [_, hidden] = features.dims();
        let zero = Tensor::zeros([1, hidden], (&features.device(), features.dtype()));
        Tensor::cat(vec![zero, features], 0).select(0, self.rows.clone())
    }

    /// Rows of the image tokens: `[n, hidden]` → `[m, hidden]`; what flows back through the others.
    pub fn gather(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        x.select(0, self.image_tokens.clone())
    }

    /// Token vectors with the image tokens' replaced by features.
    pub fn replace(&self, embeds: Tensor<B, 2>, features: Tensor<B, 2>) -> Tensor<B, 2> {
        let is_text = to_dtype(self.is_text.clone(), embeds.dtype());
        embeds * is_text + self.spread(features)
    }
}

/// The two towers, as the checkpoint nests them.
#[derive(Module, Debug)]
pub struct Qwen3VlModel<B: Backend> {
    /// Vision tower.
    pub visual: VisionModel<B>,
    /// Language model.
    pub language_model: TextModel<B>,
}

/// Qwen3-VL with its language head.
///
/// Source: `Qwen3VLForConditionalGeneration`, transformers, `modeling_qwen3_vl.py`.
#[derive(Module, Debug)]
pub struct Qwen3Vl<B: Backend> {
    /// The two towers.
    pub model: Qwen3VlModel<B>,
    /// The head; `None` where it is tied to the embedding.
    pub lm_head: Option<Linear<B>>,
}

impl<B: Kernels> Qwen3Vl<B> {
    /// A model whose parameters are drawn at first use, so that loading replaces them unallocated.
    pub fn new(config: &Qwen3VlConfig, options: &InitOptions, device: &B::Device) -> Self {
        let text = &config.text_config;
        Self {
            model: Qwen3VlModel {
                visual: VisionModel::new(&config.vision_config, options, device),
                language_model: TextModel::new(text, options, device),
            },
            lm_head: (!config.tie_word_embeddings)
                .then(|| Linear::new(text.hidden_size, text.vocab_size, false, options, device)),
        }
    }

    /// Type of the stored weights.
    pub fn dtype(&self) -> DType {
        self.model.language_model.norm.weight.val().dtype()
    }

    /// How the weights are packed, if they are.
    pub fn quantization(&self) -> Option<Quantization> {
        let layer = self.model.language_model.layers.first()?;
        let layers = layer.self_attn.q_proj.weight.packed()?.format();
        Some(Quantization { layers })
    }

    /// Runs the vision tower over all images of a batch.
    pub fn encode_images(
        &self,
        images: &ImageInput,
        config: &Qwen3VlConfig,
        device: &B::Device,
    ) -> VisionOutput<B> {
        let tower = &self.model.visual;
        let sent = ahead::take::<B>(images, device);
        let (layout, sent) = match sent {
            Some(Ahead { layout, pixels }) => (layout, Some(pixels)),
            None => {
                let (grids, sizes) = (&images.image_grid_thw, &config.vision_config);
                (VisionLayout::shared(grids, sizes, device), None)
            }
        };
        B::vision_tower(tower, images, &layout, || {
            let patch_dim = config.vision_config.patch_dim();
            let pixels = sent
                .clone()
                .unwrap_or_else(|| images.tensor(patch_dim, tower.dtype(), device));
            tower.forward(pixels, &layout, None)
        })
    }

    /// Sends the images of a batch that this thread will show the vision tower next, so that the device
    /// has them by then. They are found again by where they lie: the batch must not be changed meanwhile.
    pub fn send_ahead(&self, images: &ImageInput, config: &Qwen3VlConfig, device: &B::Device) {
        let (patch_dim, dtype) = (config.vision_config.patch_dim(), self.model.visual.dtype());
        let ahead = Ahead::<B> {
            layout: VisionLayout::shared(&images.image_grid_thw, &config.vision_config, device),
            pixels: images.tensor(patch_dim, dtype, device),
        };
        ahead::keep(images, device, ahead);
    }

    /// Token vectors of a batch, `[n, hidden]`.
    pub fn embed(&self, input: &TextInput, device: &B::Device) -> Tensor<B, 2> {
        let ids: Vec<i32> = input
            .input_ids
            .iter()
            .flatten()
            .map(|id| *id as i32)
            .collect();
        self.model
            .language_model
            .embed_tokens
            .forward(Tensor::from_ints(ids.as_slice(), device))
    }

    /// Runs the language model over a batch: last hidden states after the final norm, `[n, hidden]`.
    ///
    /// `vision` holds the features of all image tokens of the batch, in order.
    ///
    /// # Panics
    /// If the number of features is not that of the image tokens.
    pub fn hidden_states(
        &self,
        input: &TextInput,
        vision: Option<&VisionOutput<B>>,
        config: &Qwen3VlConfig,
        mut cache: Option<&mut KeyValueCache<B>>,
        dropout_seed: Option<u64>,
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let mut context = input.context::<B>(config, dropout_seed, device);
        if let Some(cache) = cache.as_deref_mut() {
            let cached = cache.len();
            if cache.segments.is_empty() {
                cache.segments = vec![Vec::new(); input.batch()];
            }
            for (all, new) in cache.segments.iter_mut().zip(&input.segments) {
                all.extend_from_slice(new);
            }
            context.spans = AttentionSpans::causal(&cache.segments, cached, device);
        }
        let mut x = self.embed(input, device);
        let placement = vision.map(|vision| {
            let found = input.image_rows().iter().filter(|row| **row > 0).count();
            assert_eq!(
                found,
                vision.merged.dims()[0],
                "image tokens and features disagree"
            );
            ImagePlacement::new(input, device)
        });
        if let (Some(vision), Some(placement)) = (vision, &placement) {
            x = placement.replace(x, vision.merged.clone());
        }
        for (index, layer) in self.model.language_model.layers.iter().enumerate() {
            let layer_cache = cache.as_deref_mut().map(|cache| &mut cache.layers[index]);
            x = layer.forward(x, &context, layer_cache);
            if let (Some(vision), Some(placement)) = (vision, &placement)
                && let Some(features) = vision.deepstack.get(index)
            {
                x = x + placement.spread(features.clone());
            }
        }
        self.model.language_model.norm.forward(x)
    }

    /// Fills a cache with the prompts of a batch, padded on the left, at most `columns` tokens of every row
    /// at once: what lies between the layers is no larger than that. The last hidden state of each row,
    /// `[batch, hidden]`.
    ///
    /// # Panics
    /// As [`Self::hidden_states`], or if there is no token.
    pub fn prefill(
        &self,
        input: &TextInput,
        vision: Option<&VisionOutput<B>>,
        config: &Qwen3VlConfig,
        cache: &mut KeyValueCache<B>,
        columns: usize,
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let (batch, seq) = (input.batch(), input.seq());
        let image_rows = input.image_rows();
        let mut last = None;
        for start in (0..seq).step_by(columns) {
            let end = seq.min(start + columns);
            let whole = end - start == seq;
            let features: Vec<i32> = (0..batch)
                .flat_map(|row| &image_rows[row * seq + start..row * seq + end])
                .filter(|row| **row > 0)
                .map(|row| row - 1)
                .collect();
            let chosen = vision.filter(|_| !features.is_empty()).map(|vision| {
                if whole {
                    vision.clone()
                } else {
                    vision.select(Tensor::from_ints(features.as_slice(), device))
                }
            });
            let chunk = input.columns(start..end);
            let hidden =
                self.hidden_states(&chunk, chosen.as_ref(), config, Some(cache), None, device);
            last = Some((hidden, end - start));
        }
        let (hidden, columns) = last.expect("a prompt has a token");
        let ends: Vec<i32> = (1..=batch).map(|row| (row * columns - 1) as i32).collect();
        hidden.select(0, Tensor::from_ints(ends.as_slice(), device))
    }

    /// Logits in f32: `[n, hidden]` → `[n, vocab]`.
    ///
    pub fn logits(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.lm_head {
            Some(head) if head.lora.is_some() => to_f32(head.forward(hidden, None)),
            _ => match self.head() {
                Weight::Dense(head) => B::logits(hidden, head.val()),
                Weight::Packed(head) => B::logits_packed(hidden, head),
            },
        }
    }

    /// The head's matrix, `[vocab, hidden]`: its own or the embedding's.
    pub fn head(&self) -> &Weight<B> {
        match &self.lm_head {
            Some(head) => &head.weight,
            None => &self.model.language_model.embed_tokens.weight,
        }
    }

    /// The head's weight as floats, `[vocab, hidden]`.
    pub fn head_weight(&self) -> Tensor<B, 2> {
        self.head().val()
    }

    /// The whole model at once, without a cache: logits of every token, `[n, vocab]`.
    pub fn forward(
        &self,
        input: &TextInput,
        images: &ImageInput,
        config: &Qwen3VlConfig,
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let vision =
            (!images.image_grid_thw.is_empty()).then(|| self.encode_images(images, config, device));
        let hidden = self.hidden_states(input, vision.as_ref(), config, None, None, device);
        self.logits(hidden)
    }
}

//! Qwen3-VL: token ids and patches in, hidden states and logits out.
//!
//! This module opens no file but a checkpoint's ([`weights`]) and knows neither text nor pixels: what
//! it gets are ids, positions and normalised patches. Fields carry the checkpoint's own names, so
//! a parameter's path in the module tree is its key in the file.

pub mod cache;

pub mod config;

pub mod nn;

pub mod rope;

pub mod text;

pub mod vision;

pub mod weights;

use burn::{
    prelude::*,
    tensor::{DType, TensorData},
};

use crate::{
    batch::{images::ImageInput, text::TextInput},
    ops::{
        AttentionSpans, Ops,
        cast::{to_dtype, to_f32},
        quantised::Quantization,
    },
    weights::Weight,
};
use cache::KeyValueCache;
use config::Qwen3VlConfig;
use nn::{InitOptions, Linear};
use text::{TextContext, TextModel};
use vision::{VisionLayout, VisionModel, VisionOutput, pixel_tensor};

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

impl<B: Ops> ImagePlacement<B> {
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

impl<B: Ops> Qwen3Vl<B> {
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
        let mut context = TextContext::new(input, config, dropout_seed, device);
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
        let vision = (!images.image_grid_thw.is_empty()).then(|| {
            let tower = &self.model.visual;
            let sizes = &config.vision_config;
            let layout = VisionLayout::new(&images.image_grid_thw, sizes, device);
            let pixels = pixel_tensor(images, sizes.patch_dim(), tower.dtype(), device);
            tower.forward(pixels, &layout, None)
        });
        let hidden = self.hidden_states(input, vision.as_ref(), config, None, None, device);
        self.logits(hidden)
    }
}

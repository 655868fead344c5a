//! Both towers and the head: token ids and patches in, hidden states and logits out.
//!
//! Shape letters: `n` tokens of all sequences, `m` image tokens among them.

use burn::{prelude::*, tensor::DType};

use super::{
    config::{Qwen3VlConfig, TextConfig},
    image_features::ImageFeatures,
    key_values::{KeyValueCache, KeyValues},
    layer::{DecoderLayer, Eager, TextContext, decoder_layers},
    nn::{Embedding, InitOptions, Linear, RmsNorm},
    vision::{VisionLayout, VisionModel, VisionOutput, pixel_tensor},
};
use crate::{
    batch::{images::ImageInput, text::TextInput},
    ops::{AttentionSpans, Ops, cast::to_f32, quantised::Quantization},
    weights::Weight,
};

/// The language model without its head.
///
/// Source: `Qwen3VLTextModel`, transformers, `modeling_qwen3_vl.py`.
#[derive(Module, Debug)]
pub struct TextModel<B: Backend> {
    /// Token vectors.
    pub embed_tokens: Embedding<B>,
    /// Decoder layers.
    pub layers: Vec<DecoderLayer<B>>,
    /// Norm before the head.
    pub norm: RmsNorm<B>,
}

impl<B: Ops> TextModel<B> {
    /// A model whose parameters are initialised at first use.
    pub fn new(config: &TextConfig, options: &InitOptions, device: &B::Device) -> Self {
        Self {
            embed_tokens: Embedding::new(config.vocab_size, config.hidden_size, options, device),
            layers: (0..config.num_hidden_layers)
                .map(|_| DecoderLayer::new(config, options, device))
                .collect(),
            norm: RmsNorm::new(config.hidden_size, config.rms_norm_eps, options, device),
        }
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
    /// A model whose parameters are initialised at first use, so that loading replaces them unallocated.
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

    /// How the weights are quantised, if some are: the format of the first that is, of the language model's
    /// layers where these are. Others can have other formats, or stay floats.
    pub fn quantization(&self) -> Option<Quantization> {
        // Not of the first alone: an adapter may bring a layer of its own, in floats, and other tools leave
        // some as floats.
        let text = &self.model.language_model;
        let linears = text.layers.iter().flat_map(DecoderLayer::projections);
        let vision = self.model.visual.linears();
        let tables = std::iter::once(&text.embed_tokens.weight).chain([self.head()]);
        let mut weights = linears
            .chain(vision)
            .map(|linear| &linear.weight)
            .chain(tables);
        let packed = weights.find_map(Weight::packed)?;
        Some(Quantization {
            layers: packed.format(),
        })
    }

    /// Token vectors of a batch, `[n, hidden]`, image features in place of image tokens.
    pub fn embed(
        &self,
        input: &TextInput,
        images: Option<&ImageFeatures<B>>,
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let ids = input.input_ids.iter().flatten();
        let ids: Vec<i32> = ids.map(|id| *id as i32).collect();
        let table = &self.model.language_model.embed_tokens;
        let x = table.forward(Tensor::from_ints(ids.as_slice(), device));
        match images {
            Some(images) => images.place(x),
            None => x,
        }
    }

    /// The language model up to the last layer's output, `[n, hidden]`; what comes next is
    /// [`Self::norm`] and [`Self::logits`], over the rows that are wanted.
    pub fn run_layers(
        &self,
        input: &TextInput,
        images: Option<&ImageFeatures<B>>,
        context: &TextContext<B>,
        key_values: impl KeyValues<B>,
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let layers = &self.model.language_model.layers;
        let x = self.embed(input, images, device);
        let mut run = Eager::new(layers, context, images, key_values);
        decoder_layers(&mut run, 0..layers.len(), x)
    }

    /// The norm before the head.
    ///
    /// # Shapes
    /// - `x` and result: `[n, hidden]`
    pub fn norm(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        self.model.language_model.norm.forward(x)
    }

    /// Runs the language model over a batch: last hidden states after the final norm, `[n, hidden]`.
    ///
    /// `vision` holds the features of all `m` image tokens of the batch, in order, `[m, hidden]` each.
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
        let spans = match cache.as_deref_mut() {
            Some(cache) => {
                let cached = cache.len();
                cache.announce(&input.segments);
                AttentionSpans::causal(&cache.segments, cached, device)
            }
            None => AttentionSpans::causal(&input.segments, 0, device),
        };
        let context = TextContext::with_spans(input, spans, config, dropout_seed, device);
        let images = vision.map(|vision| ImageFeatures::new(input, vision.clone(), device));
        self.norm(self.run_layers(input, images.as_ref(), &context, cache, device))
    }

    /// Fills a cache with the prompts of a batch, padded on the left, at most `columns` tokens of every row
    /// at once: activations between the layers are no larger than that. Returns the last hidden state of
    /// each row,
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

    /// Logits in f32.
    ///
    /// # Shapes
    /// - `hidden`: `[n, hidden]`
    /// - returns: `[n, vocab]`
    pub fn logits(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.lm_head {
            Some(head) if head.lora.is_some() || head.bias.is_some() => {
                to_f32(head.forward(hidden, None))
            }
            _ => match self.head() {
                Weight::Dense(head) => B::logits(hidden, head.val()),
                Weight::Packed(head) => B::logits_quantised(hidden, head),
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

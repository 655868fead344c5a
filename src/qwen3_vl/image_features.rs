//! Image features among the tokens of a batch.
//!
//! Shape letters: `n` tokens of all sequences, `m` image tokens among them.

use burn::{
    prelude::*,
    tensor::{DType, TensorData},
};

use super::vision::VisionOutput;
use crate::{
    batch::text::TextInput,
    ops::{Ops, cast::to_dtype},
};

/// Features of the images of a batch, and where they belong among its tokens.
#[derive(Debug, Clone)]
pub struct ImageFeatures<B: Backend> {
    /// For each token 0, or 1 + the index of its image feature; `[n]`.
    rows: Tensor<B, 1, Int>,
    /// 1 for text, 0 for image tokens; `[n, 1]`, f32.
    is_text: Tensor<B, 2>,
    /// The image tokens, `[m]`.
    image_tokens: Tensor<B, 1, Int>,
    vision: VisionOutput<B>,
}

impl<B: Ops> ImageFeatures<B> {
    /// Finds the image tokens among the ids of a batch; `vision` has one row for each, `[m, hidden]`.
    ///
    /// # Panics
    /// If the number of features is not that of the image tokens.
    pub fn new(input: &TextInput, vision: VisionOutput<B>, device: &B::Device) -> Self {
        let rows = input.image_rows();
        let is_text: Vec<f32> = rows.iter().map(|row| f32::from(*row == 0)).collect();
        let tokens = rows.len();
        let image_tokens: Vec<i32> = (0..tokens as i32)
            .filter(|token| rows[*token as usize] > 0)
            .collect();
        assert_eq!(
            image_tokens.len(),
            vision.merged.dims()[0],
            "image tokens and features disagree"
        );
        Self {
            image_tokens: Tensor::from_ints(image_tokens.as_slice(), device),
            rows: Tensor::from_ints(rows.as_slice(), device),
            is_text: Tensor::from_data(TensorData::new(is_text, [tokens, 1]), (device, DType::F32)),
            vision,
        }
    }

    /// Token vectors with the image tokens' replaced by features.
    ///
    /// # Shapes
    /// - `embeds` and result: `[n, hidden]`
    pub fn place(&self, embeds: Tensor<B, 2>) -> Tensor<B, 2> {
        let is_text = to_dtype(self.is_text.clone(), embeds.dtype());
        embeds * is_text + self.spread(self.vision.merged.clone())
    }

    /// The stream after a layer, plus the DeepStack features that belong there.
    ///
    /// # Shapes
    /// - `x` and result: `[n, hidden]`
    pub fn add_deepstack(&self, layer: usize, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match self.vision.deepstack.get(layer) {
            Some(features) => x + self.spread(features.clone()),
            None => x,
        }
    }

    /// Layers after which features are added.
    pub fn deepstack_layers(&self) -> usize {
        self.vision.deepstack.len()
    }

    /// Gradient of the image features, gathered from that of the stream they were scattered into.
    ///
    /// # Shapes
    /// - `gradient`: `[n, hidden]`
    /// - returns: `[m, hidden]`, a row an image token
    pub fn gather(&self, gradient: Tensor<B, 2>) -> Tensor<B, 2> {
        gradient.select(0, self.image_tokens.clone())
    }

    /// Features at the image tokens, zero elsewhere: `[m, hidden]` → `[n, hidden]`.
    fn spread(&self, features: Tensor<B, 2>) -> Tensor<B, 2> {
        let [_, hidden] = features.dims();
        let zero = Tensor::zeros([1, hidden], (&features.device(), features.dtype()));
        Tensor::cat(vec![zero, features], 0).select(0, self.rows.clone())
    }
}

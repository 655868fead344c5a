//! The metadata as the `config.json` of the original checkpoint.

use serde_json::{Value, json};

use super::{
    GgufPair,
    file::{GgufFile, Meta},
};
use crate::qwen3_vl::weights::WeightsError;

/// Architecture of the language model.
const ARCHITECTURE: &str = "qwen3vl";

/// What the metadata says about images.
#[derive(Debug, Clone, PartialEq)]
pub struct ImageKeys {
    /// Mean of each channel.
    pub image_mean: Option<[f32; 3]>,
    /// Standard deviation of each channel.
    pub image_std: Option<[f32; 3]>,
    /// Smallest and largest size in pixels.
    pub limits: [Option<usize>; 2],
}

/// Refuses other models than Qwen3-VL.
pub(super) fn check_architecture(file: &GgufFile) -> Result<(), WeightsError> {
    match file.architecture() {
        ARCHITECTURE => Ok(()),
        "qwen3vlmoe" => Err(file.refuse("architecture `qwen3vlmoe`: this program reads dense Qwen3-VL (2B, 4B, 8B, 32B), no mixtures of experts")),
        other => Err(file.refuse(format!(
            "architecture `{other}`, expected `{ARCHITECTURE}`: this program reads Qwen3-VL only"
        ))),
    }
}

/// Refuses vision towers of other models.
pub(super) fn check_vision(file: &GgufFile) -> Result<(), WeightsError> {
    let projector = file
        .text("clip.vision.projector_type")
        .or(file.text("clip.projector_type"));
    if file.architecture() != super::CLIP {
        return Err(file.refuse(format!(
            "architecture `{}`, expected the vision tower (`clip`), a file called mmproj",
            file.architecture()
        )));
    }
    match projector {
        Some("qwen3vl_merger") => Ok(()),
        other => Err(file.refuse(format!(
            "key `clip.projector_type` is {}, expected `qwen3vl_merger`; is this the mmproj file of a Qwen3-VL?",
            other.map_or("missing".to_string(), |other| format!("`{other}`"))
        ))),
    }
}

/// Blocks whose output goes to the first layers of the language model.
pub(super) fn deepstack(vision: &GgufFile) -> Vec<usize> {
    let flags = vision
        .numbers("clip.vision.is_deepstack_layers")
        .unwrap_or_default();
    let indexes = flags.iter().enumerate().filter(|(_, flag)| **flag != 0.0);
    indexes.map(|(index, _)| index).collect()
}

/// A whole number that has to be there.
fn size(file: &GgufFile, key: &str) -> Result<u64, WeightsError> {
    file.whole(key)
        .ok_or_else(|| file.refuse(format!("key `{key}` is missing, expected a whole number")))
}

/// A size of a tensor that has to be there.
fn tensor_size(file: &GgufFile, name: &str, axis: usize) -> Result<usize, WeightsError> {
    let info = file.tensors.get(name);
    info.and_then(|info| info.shape.get(axis).copied())
        .ok_or_else(|| file.refuse(format!("tensor `{name}` is missing")))
}

impl GgufPair {
    /// The `config.json` that the files were made from, as far as they say.
    ///
    /// # Errors
    /// [`WeightsError::Gguf`] names the file and the key.
    pub fn config(&self) -> Result<Value, WeightsError> {
        let (text, vision) = (&self.text, &self.vision);
        let key = |name: &str| format!("{ARCHITECTURE}.{name}");
        let scaling = text.text(&key("rope.scaling.type"));
        if let Some(kind) = scaling.filter(|kind| *kind != "none") {
            return Err(text.refuse(format!(
                "key `{}` is `{kind}`, expected `none`",
                key("rope.scaling.type")
            )));
        }
        let sections = key("rope.dimension_sections");
        let sections: Vec<u64> = match text.numbers(&sections) {
            Some([time, height, width, rest @ ..]) if rest.iter().all(|size| *size == 0.0) => {
                [time, height, width].map(|size| *size as u64).to_vec()
            }
            _ => {
                return Err(
                    text.refuse(format!("key `{sections}` is missing, expected three sizes"))
                );
            }
        };
        let number = |name: &str| {
            text.number(&key(name)).ok_or_else(|| {
                text.refuse(format!("key `{}` is missing, expected a number", key(name)))
            })
        };
        let deepstack = deepstack(vision);
        if let Some(count) = text.whole(&key("n_deepstack_layers"))
            && count as usize != deepstack.len()
        {
            return Err(vision.refuse(format!(
                "{} blocks feed the language model, which expects {count}; do both files belong to one model?",
                deepstack.len()
            )));
        }
        if vision.whole("clip.use_silu") == Some(1) {
            return Err(vision.refuse("key `clip.use_silu` is true, expected `clip.use_gelu`"));
        }
        let hidden = size(text, &key("embedding_length"))?;
        let heads = size(text, &key("attention.head_count"))?;
        let head_dim = text.whole(&key("attention.key_length"));
        if head_dim != text.whole(&key("attention.value_length")) {
            return Err(text.refuse("`attention.key_length` and `attention.value_length` differ"));
        }
        let token = |token: &str| self.token_id(token);
        let clip = |name: &str| size(vision, &format!("clip.vision.{name}"));
        Ok(json!({
            "model_type": "qwen3_vl",
            "text_config": {
                "vocab_size": tensor_size(text, "token_embd.weight", 0)?,
                "hidden_size": hidden,
                "intermediate_size": size(text, &key("feed_forward_length"))?,
                "num_hidden_layers": size(text, &key("block_count"))?,
                "num_attention_heads": heads,
                "num_key_value_heads": size(text, &key("attention.head_count_kv"))?,
                "head_dim": head_dim,
                "max_position_embeddings": size(text, &key("context_length"))?,
                "rms_norm_eps": number("attention.layer_norm_rms_epsilon")?,
                "rope_theta": number("rope.freq_base")?,
                "rope_scaling": {"mrope_section": sections, "rope_type": "default", "mrope_interleaved": true},
                "attention_bias": text.tensors.contains_key("blk.0.attn_q.bias"),
                "eos_token_id": text.whole("tokenizer.ggml.eos_token_id"),
            },
            "vision_config": {
                "depth": clip("block_count")?,
                "hidden_size": clip("embedding_length")?,
                "intermediate_size": clip("feed_forward_length")?,
                "num_heads": clip("attention.head_count")?,
                "num_position_embeddings": tensor_size(vision, "v.position_embd.weight", 0)?,
                "out_hidden_size": tensor_size(vision, "mm.2.weight", 0)?,
                "in_channels": tensor_size(vision, "v.patch_embd.weight", 1)?,
                "patch_size": clip("patch_size")?,
                "spatial_merge_size": vision.whole("clip.vision.spatial_merge_size").unwrap_or(2),
                "temporal_patch_size": 2,
                "deepstack_visual_indexes": deepstack,
            },
            "image_token_id": token("<|image_pad|>")?,
            "video_token_id": token("<|video_pad|>")?,
            "vision_start_token_id": token("<|vision_start|>")?,
            "vision_end_token_id": token("<|vision_end|>")?,
            "tie_word_embeddings": !text.tensors.contains_key("output.weight"),
        }))
    }

    /// Number of a token in the file's vocabulary.
    fn token_id(&self, token: &str) -> Result<usize, WeightsError> {
        let tokens = self.text.texts("tokenizer.ggml.tokens").unwrap_or_default();
        tokens.iter().position(|found| found == token).ok_or_else(|| {
            self.text.refuse(format!("key `tokenizer.ggml.tokens` lacks `{token}`; was the file made without its vocabulary?"))
        })
    }

    /// What the metadata says about images.
    pub fn images(&self) -> ImageKeys {
        let three = |key: &str| match self.vision.meta.get(key) {
            Some(Meta::Numbers(numbers)) => {
                let [red, green, blue] = numbers[..] else {
                    return None;
                };
                Some([red, green, blue].map(|number| number as f32))
            }
            _ => None,
        };
        let pixels = |key: &str| self.vision.whole(key).map(|pixels| pixels as usize);
        ImageKeys {
            image_mean: three("clip.vision.image_mean"),
            image_std: three("clip.vision.image_std"),
            limits: [
                pixels("clip.vision.image_min_pixels"),
                pixels("clip.vision.image_max_pixels"),
            ],
        }
    }
}

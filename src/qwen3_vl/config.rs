//! `config.json` as types, its names kept.
//!
//! Two layouts are in circulation: the published one (transformers 4.57: `rope_theta` beside
//! `rope_scaling`) and that of transformers 5 (`rope_parameters`). Both read into the same types;
//! the published one is always written.

mod published;

use std::{
    fs,
    path::{Path, PathBuf},
};

use published::other_model;

use super::weights::{
    Head,
    gguf::{self, GgufParts},
    head,
};
use crate::{base::files::hint::file_hint, batch::text::ImageTokens};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// What can be wrong with a `config.json`.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error(
        "cannot read `{}`: {cause}; expected the folder of a Qwen3-VL checkpoint with its `config.json`{}",
        .path.display(),
        file_hint(.path)
    )]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// The file is not JSON, or a key is missing or of another type.
    #[error("`{}`: {cause}", .path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Why, with the key.
        cause: serde_json::Error,
    },
    /// The weights cannot be read, which say whether the head is the embedding.
    #[error(transparent)]
    Weights(#[from] super::weights::WeightsError),
    /// A value cannot be used.
    #[error("`{}`: key `{key}`: {reason}", .path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The key at fault, dotted.
        key: String,
        /// What was found and what was expected.
        reason: String,
    },
}

/// Sizes of a whole Qwen3-VL.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Qwen3VlConfig {
    /// The language model.
    pub text_config: TextConfig,
    /// The vision tower.
    pub vision_config: VisionConfig,
    /// Placeholder token for one merged image patch.
    pub image_token_id: u32,
    /// Placeholder token for one merged video patch.
    pub video_token_id: u32,
    /// Token before an image.
    pub vision_start_token_id: u32,
    /// Token after an image.
    pub vision_end_token_id: u32,
    /// Whether the head is the transposed embedding (2B and 4B) or a matrix of its own (8B, 32B).
    pub tie_word_embeddings: bool,
}

/// Sizes of the language model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TextConfig {
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width between the projections of the feed-forward block (SwiGLU).
    pub intermediate_size: usize,
    /// Number of decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads; divides the query heads.
    pub num_key_value_heads: usize,
    /// Width of one head; `head_dim * num_attention_heads` may differ from `hidden_size`.
    pub head_dim: usize,
    /// Longest sequence the positions were trained for, in tokens.
    pub max_position_embeddings: usize,
    /// Added to the mean square before the root.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Frequencies given to time, height and width; their sum is half of `head_dim`.
    pub mrope_section: [usize; 3],
    /// Whether the attention projections have a bias.
    pub attention_bias: bool,
    /// Token that ends an answer, where the file names one.
    pub eos_token_id: Option<u32>,
}

/// Sizes of the vision tower.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VisionConfig {
    /// Number of blocks.
    pub depth: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width inside the feed-forward block.
    pub intermediate_size: usize,
    /// Attention heads.
    pub num_heads: usize,
    /// Rows of the learned position table, a square number.
    pub num_position_embeddings: usize,
    /// Width of the output for the language model.
    pub out_hidden_size: usize,
    /// Colour channels.
    #[serde(default = "three")]
    pub in_channels: usize,
    /// Side of a patch in pixels.
    pub patch_size: usize,
    /// Side of the square of patches that becomes one token.
    pub spatial_merge_size: usize,
    /// Frames in a patch; a still image is repeated.
    pub temporal_patch_size: usize,
    /// Blocks whose output goes to the first layers of the language model.
    pub deepstack_visual_indexes: Vec<usize>,
}

fn three() -> usize {
    3
}

impl VisionConfig {
    /// Length of one flattened patch: channels × frames × height × width.
    pub fn patch_dim(&self) -> usize {
        self.in_channels * self.temporal_patch_size * self.patch_size * self.patch_size
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_heads
    }

    /// Side of the square position table.
    pub fn position_side(&self) -> usize {
        self.num_position_embeddings.isqrt()
    }
}

#[derive(Deserialize)]
struct RawConfig {
    model_type: String,
    text_config: RawText,
    vision_config: Value,
    image_token_id: u32,
    video_token_id: u32,
    vision_start_token_id: u32,
    vision_end_token_id: u32,
    tie_word_embeddings: Option<bool>,
}

#[derive(Deserialize)]
struct RawText {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: usize,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    rms_norm_eps: f64,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    eos_token_id: Option<u32>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f64>,
    rope_scaling: Option<RawRope>,
    rope_parameters: Option<RawRope>,
}

#[derive(Deserialize)]
struct RawRope {
    mrope_section: Option<[usize; 3]>,
    rope_theta: Option<f64>,
    rope_type: Option<String>,
    /// The key's name before transformers 4.45.
    #[serde(rename = "type")]
    old_type: Option<String>,
    mrope_interleaved: Option<bool>,
}

impl Qwen3VlConfig {
    /// Reads `config.json` in `model_dir`, or the metadata of a GGUF.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the key.
    pub fn from_dir(model_dir: &Path) -> Result<Self, ConfigError> {
        Self::from_model(model_dir, &GgufParts::default())
    }

    /// [`Self::from_dir`], with the other files of a GGUF named.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the key.
    pub fn from_model(model: &Path, parts: &GgufParts) -> Result<Self, ConfigError> {
        if let Some(pair) = gguf::find(model, parts)? {
            return Ok(Self::from_tree(pair.config()?, pair.main_file())?.0);
        }
        let path = model.join("config.json");
        let text = fs::read_to_string(&path).map_err(|cause| ConfigError::Read {
            path: path.clone(),
            cause,
        })?;
        let tree = serde_json::from_str(&text).map_err(|cause| ConfigError::Parse {
            path: path.clone(),
            cause,
        })?;
        let (mut config, tied) = Self::from_tree(tree, &path)?;
        config.tie_word_embeddings = match tied {
            Some(false) => false,
            // Adapters of a tied model may be merged with a head of their own, which the config goes on
            // calling tied; transformers (5.24) takes the head of the file as well.
            Some(true) => head(model)? != Head::Own,
            // transformers would draw a random head where there is none.
            None => head(model)? == Head::Absent,
        };
        Ok(config)
    }

    /// What a reader of the results should know about the head of the checkpoint in `dir`.
    pub fn head_remark(&self, dir: &Path) -> Option<String> {
        let text = fs::read_to_string(dir.join("config.json")).ok()?;
        let tree: Value = serde_json::from_str(&text).ok()?;
        let stated = |tree: &Value| tree.get("tie_word_embeddings").and_then(Value::as_bool);
        let inner = tree.get("text_config").and_then(stated);
        match (stated(&tree).or(inner), self.tie_word_embeddings) {
            (Some(true), false) => Some(
                "the checkpoint's `lm_head.weight` differs from its embedding although `config.json` calls them tied; it is used as it is, as transformers 5 does".to_string(),
            ),
            (None, true) => Some(
                "`config.json` does not say `tie_word_embeddings` and the files hold no `lm_head.weight`, so the embedding is the head too".to_string(),
            ),
            _ => None,
        }
    }

    /// Reads the text of a `config.json`; `path` is what errors name.
    ///
    /// # Errors
    /// [`ConfigError`] names the file and the key.
    pub fn from_json(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let tree = serde_json::from_str(text).map_err(|cause| ConfigError::Parse {
            path: path.to_path_buf(),
            cause,
        })?;
        Ok(Self::from_tree(tree, path)?.0)
    }

    /// The sizes, and whether the head is tied as far as the file says.
    fn from_tree(tree: Value, path: &Path) -> Result<(Self, Option<bool>), ConfigError> {
        let parse_error = |cause| ConfigError::Parse {
            path: path.to_path_buf(),
            cause,
        };
        let value_error = |key: &str, reason: String| ConfigError::Value {
            path: path.to_path_buf(),
            key: key.to_string(),
            reason,
        };
        match tree.get("model_type").and_then(Value::as_str) {
            Some("qwen3_vl") => {}
            other => return Err(value_error("model_type", other_model(other))),
        }
        let raw: RawConfig = serde_json::from_value(tree).map_err(parse_error)?;
        debug_assert_eq!(raw.model_type, "qwen3_vl");
        let vision_act = raw
            .vision_config
            .get("hidden_act")
            .and_then(Value::as_str)
            .unwrap_or("gelu_pytorch_tanh");
        if vision_act != "gelu_pytorch_tanh" {
            return Err(value_error(
                "vision_config.hidden_act",
                format!("found `{vision_act}`, expected `gelu_pytorch_tanh`"),
            ));
        }
        let vision_config: VisionConfig =
            serde_json::from_value(raw.vision_config).map_err(parse_error)?;
        let text = raw.text_config;
        let tied = raw.tie_word_embeddings.or(text.tie_word_embeddings);
        for (name, rope) in [
            ("rope_parameters", &text.rope_parameters),
            ("rope_scaling", &text.rope_scaling),
        ] {
            let Some(rope) = rope else { continue };
            for (key, kind) in [("rope_type", &rope.rope_type), ("type", &rope.old_type)] {
                // `mrope` is what Qwen2-VL's files call the default.
                if let Some(kind) = kind
                    .as_deref()
                    .filter(|kind| !["default", "mrope"].contains(kind))
                {
                    return Err(value_error(
                        &format!("text_config.{name}.{key}"),
                        format!("found `{kind}`, expected `default`"),
                    ));
                }
            }
            if rope.mrope_interleaved == Some(false) {
                return Err(value_error(
                    &format!("text_config.{name}.mrope_interleaved"),
                    "found false; Qwen3-VL interleaves its axes".to_string(),
                ));
            }
        }
        let rope = text.rope_parameters.or(text.rope_scaling);
        let rope_theta = rope
            .as_ref()
            .and_then(|rope| rope.rope_theta)
            .or(text.rope_theta)
            .ok_or_else(|| {
                value_error(
                    "text_config.rope_theta",
                    "missing, also under `rope_parameters`".to_string(),
                )
            })?;
        let mrope_section = rope
            .as_ref()
            .and_then(|rope| rope.mrope_section)
            .ok_or_else(|| {
                value_error(
                    "text_config.rope_scaling.mrope_section",
                    "missing, also under `rope_parameters`; expected three sizes".to_string(),
                )
            })?;
        if let Some(act) = text.hidden_act.as_deref().filter(|act| *act != "silu") {
            return Err(value_error(
                "text_config.hidden_act",
                format!("found `{act}`, expected `silu`"),
            ));
        }
        let config = Self {
            text_config: TextConfig {
                vocab_size: text.vocab_size,
                hidden_size: text.hidden_size,
                intermediate_size: text.intermediate_size,
                num_hidden_layers: text.num_hidden_layers,
                num_attention_heads: text.num_attention_heads,
                num_key_value_heads: text.num_key_value_heads,
                head_dim: text
                    .head_dim
                    .unwrap_or(text.hidden_size / text.num_attention_heads.max(1)),
                max_position_embeddings: text.max_position_embeddings,
                rms_norm_eps: text.rms_norm_eps,
                rope_theta,
                mrope_section,
                attention_bias: text.attention_bias,
                eos_token_id: text.eos_token_id,
            },
            vision_config,
            image_token_id: raw.image_token_id,
            video_token_id: raw.video_token_id,
            vision_start_token_id: raw.vision_start_token_id,
            vision_end_token_id: raw.vision_end_token_id,
            tie_word_embeddings: tied.unwrap_or(false),
        };
        config
            .check()
            .map_err(|(key, reason)| value_error(key, reason))?;
        Ok((config, tied))
    }

    /// Checks the sizes against each other; the error is the key and the reason.
    ///
    /// # Errors
    /// The first key whose value cannot be used.
    pub fn check(&self) -> Result<(), (&'static str, String)> {
        let (text, vision) = (&self.text_config, &self.vision_config);
        for (key, value) in [
            ("text_config.vocab_size", text.vocab_size),
            ("text_config.hidden_size", text.hidden_size),
            ("text_config.intermediate_size", text.intermediate_size),
            ("text_config.num_hidden_layers", text.num_hidden_layers),
            ("text_config.num_attention_heads", text.num_attention_heads),
            ("text_config.num_key_value_heads", text.num_key_value_heads),
            ("text_config.head_dim", text.head_dim),
            ("vision_config.depth", vision.depth),
            ("vision_config.hidden_size", vision.hidden_size),
            ("vision_config.intermediate_size", vision.intermediate_size),
            ("vision_config.num_heads", vision.num_heads),
            ("vision_config.in_channels", vision.in_channels),
            ("vision_config.patch_size", vision.patch_size),
            (
                "vision_config.spatial_merge_size",
                vision.spatial_merge_size,
            ),
            (
                "vision_config.temporal_patch_size",
                vision.temporal_patch_size,
            ),
        ] {
            if value == 0 {
                return Err((key, "found 0, expected a positive number".to_string()));
            }
        }
        if text.num_attention_heads % text.num_key_value_heads != 0 {
            return Err((
                "text_config.num_key_value_heads",
                format!(
                    "{} does not divide num_attention_heads {}",
                    text.num_key_value_heads, text.num_attention_heads
                ),
            ));
        }
        let sections: usize = text.mrope_section.iter().sum();
        if sections * 2 != text.head_dim {
            return Err((
                "text_config.rope_scaling.mrope_section",
                format!(
                    "{:?} adds up to {sections}, expected half of head_dim {}",
                    text.mrope_section, text.head_dim
                ),
            ));
        }
        if vision.hidden_size % vision.num_heads != 0 || !vision.head_dim().is_multiple_of(4) {
            return Err((
                "vision_config.num_heads",
                format!(
                    "hidden_size {} over {} heads must give a head width that is a multiple of 4",
                    vision.hidden_size, vision.num_heads
                ),
            ));
        }
        let side = vision.position_side();
        if side == 0 || side * side != vision.num_position_embeddings {
            return Err((
                "vision_config.num_position_embeddings",
                format!("{} is not a square", vision.num_position_embeddings),
            ));
        }
        if vision.out_hidden_size != text.hidden_size {
            return Err((
                "vision_config.out_hidden_size",
                format!(
                    "found {}, expected text_config.hidden_size {}",
                    vision.out_hidden_size, text.hidden_size
                ),
            ));
        }
        if let Some(index) = vision
            .deepstack_visual_indexes
            .iter()
            .find(|index| **index >= vision.depth)
        {
            return Err((
                "vision_config.deepstack_visual_indexes",
                format!("{index} is not below depth {}", vision.depth),
            ));
        }
        if vision.deepstack_visual_indexes.len() > text.num_hidden_layers {
            return Err((
                "vision_config.deepstack_visual_indexes",
                format!(
                    "{} outputs for {} text layers",
                    vision.deepstack_visual_indexes.len(),
                    text.num_hidden_layers
                ),
            ));
        }
        if self.image_token_id as usize >= text.vocab_size {
            return Err((
                "image_token_id",
                format!(
                    "{} is not below vocab_size {}",
                    self.image_token_id, text.vocab_size
                ),
            ));
        }
        Ok(())
    }
}

impl From<&Qwen3VlConfig> for ImageTokens {
    fn from(config: &Qwen3VlConfig) -> Self {
        Self {
            image_token_id: config.image_token_id,
            merge: config.vision_config.spatial_merge_size,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn published_sizes_are_consistent_and_survive_writing() {
        for size in ["2b", "4b", "8b", "32b"] {
            let config = Qwen3VlConfig::published(size).unwrap();
            config.check().unwrap();
            let text = config.to_published_json("bfloat16");
            let read = Qwen3VlConfig::from_json(&text, Path::new("config.json")).unwrap();
            assert_eq!(read, config);
        }
    }

    #[test]
    fn a_missing_key_is_named_with_its_file() {
        let text = Qwen3VlConfig::published("8b")
            .unwrap()
            .to_published_json("bfloat16")
            .replace("\"num_hidden_layers\"", "\"num_layers\"");
        let error = Qwen3VlConfig::from_json(&text, Path::new("m/config.json")).unwrap_err();
        let message = error.to_string();
        assert!(message.contains("m/config.json"), "{message}");
        assert!(message.contains("num_hidden_layers"), "{message}");
    }

    #[test]
    fn another_model_is_refused() {
        let error =
            Qwen3VlConfig::from_json(r#"{"model_type": "llama"}"#, Path::new("config.json"))
                .unwrap_err();
        assert!(error.to_string().contains("qwen3_vl"), "{error}");
    }

    #[test]
    fn a_rope_of_another_kind_is_refused_under_all_its_names() {
        let text = Qwen3VlConfig::published("8b")
            .unwrap()
            .to_published_json("bfloat16");
        let read = |text: &str| Qwen3VlConfig::from_json(text, Path::new("config.json"));
        let named = |key: &str, kind: &str| {
            text.replace(
                r#""rope_type": "default""#,
                &format!(r#""{key}": "{kind}""#),
            )
        };
        for (key, kind, taken) in [
            ("rope_type", "yarn", false),
            ("type", "yarn", false),
            ("type", "linear", false),
            ("type", "mrope", true),
            ("type", "default", true),
        ] {
            match read(&named(key, kind)) {
                Ok(_) => assert!(taken, "{key} {kind}"),
                Err(error) => {
                    let error = error.to_string();
                    assert!(
                        !taken && error.contains(kind) && error.contains(key),
                        "{error}"
                    );
                }
            }
        }
        // Both layouts in one file: neither goes unread.
        let both = named("type", "yarn").replace(
            r#""rope_scaling""#,
            r#""rope_parameters": {"mrope_section": [24, 20, 20], "rope_theta": 5e6}, "rope_scaling""#,
        );
        assert!(read(&both).unwrap_err().to_string().contains("yarn"));
    }

    #[test]
    fn sections_must_fill_the_head() {
        let mut config = Qwen3VlConfig::published("8b").unwrap();
        config.text_config.mrope_section = [24, 20, 19];
        let (key, _) = config.check().unwrap_err();
        assert!(key.contains("mrope_section"));
    }
}

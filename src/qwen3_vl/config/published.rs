//! The published models: their sizes, their `config.json`, and what other models are.

use serde_json::json;

use super::{Qwen3VlConfig, TextConfig, VisionConfig};

/// What another model is, by its `model_type`, and what to take instead.
pub(super) fn other_model(found: Option<&str>) -> String {
    let what = match found {
        Some("qwen3_vl_moe") => "a mixture of experts (30B-A3B, 235B-A22B)",
        Some("qwen3_5" | "qwen3_5_moe") => "Qwen3.5",
        Some("qwen2_5_vl") => "Qwen2.5-VL",
        Some("qwen2_vl") => "Qwen2-VL",
        Some("qwen3_omni_moe" | "qwen2_5_omni") => "an Omni model",
        Some("qwen3" | "qwen3_moe" | "qwen2") => "a language model without a vision tower",
        Some("qwen3_vl_text" | "qwen3_vl_vision") => "one part of a Qwen3-VL",
        _ => "",
    };
    let found = match (found, what) {
        (None, _) => "missing".to_string(),
        (Some(kind), "") => format!("found `{kind}`"),
        (Some(kind), what) => format!("found `{kind}`, {what}"),
    };
    format!(
        "{found}, expected `qwen3_vl`; this program reads Qwen3-VL (dense) checkpoints only: Qwen3-VL-2B, 4B, 8B and 32B, Instruct or Thinking"
    )
}

impl Qwen3VlConfig {
    /// The text of a `config.json` in the published layout.
    pub fn to_published_json(&self, dtype: &str) -> String {
        let (text, vision) = (&self.text_config, &self.vision_config);
        let tree = json!({
            "architectures": ["Qwen3VLForConditionalGeneration"],
            "image_token_id": self.image_token_id,
            "model_type": "qwen3_vl",
            "text_config": {
                "attention_bias": text.attention_bias,
                "attention_dropout": 0.0,
                "dtype": dtype,
                "eos_token_id": text.eos_token_id,
                "head_dim": text.head_dim,
                "hidden_act": "silu",
                "hidden_size": text.hidden_size,
                "initializer_range": 0.02,
                "intermediate_size": text.intermediate_size,
                "max_position_embeddings": text.max_position_embeddings,
                "model_type": "qwen3_vl_text",
                "num_attention_heads": text.num_attention_heads,
                "num_hidden_layers": text.num_hidden_layers,
                "num_key_value_heads": text.num_key_value_heads,
                "rms_norm_eps": text.rms_norm_eps,
                "rope_scaling": {
                    "mrope_interleaved": true,
                    "mrope_section": text.mrope_section,
                    "rope_type": "default",
                },
                "rope_theta": text.rope_theta,
                "use_cache": true,
                "vocab_size": text.vocab_size,
            },
            "tie_word_embeddings": self.tie_word_embeddings,
            "transformers_version": "4.57.0",
            "video_token_id": self.video_token_id,
            "vision_config": {
                "deepstack_visual_indexes": vision.deepstack_visual_indexes,
                "depth": vision.depth,
                "hidden_act": "gelu_pytorch_tanh",
                "hidden_size": vision.hidden_size,
                "in_channels": vision.in_channels,
                "initializer_range": 0.02,
                "intermediate_size": vision.intermediate_size,
                "model_type": "qwen3_vl",
                "num_heads": vision.num_heads,
                "num_position_embeddings": vision.num_position_embeddings,
                "out_hidden_size": vision.out_hidden_size,
                "patch_size": vision.patch_size,
                "spatial_merge_size": vision.spatial_merge_size,
                "temporal_patch_size": vision.temporal_patch_size,
            },
            "vision_end_token_id": self.vision_end_token_id,
            "vision_start_token_id": self.vision_start_token_id,
        });
        let mut text = serde_json::to_string_pretty(&tree).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Sizes of the published checkpoints: `2b`, `4b`, `8b`, `32b` (Instruct and Thinking alike).
    ///
    /// Source: `config.json` of `Qwen/Qwen3-VL-{2B,4B,8B,32B}-{Instruct,Thinking}`.
    pub fn published(size: &str) -> Option<Self> {
        let (hidden, inter, layers, heads, tied, vision) = match size.to_ascii_lowercase().as_str()
        {
            "2b" => (2048, 6144, 28, 16, true, (24, 1024, 4096, [5, 11, 17])),
            "4b" => (2560, 9728, 36, 32, true, (24, 1024, 4096, [5, 11, 17])),
            "8b" => (4096, 12288, 36, 32, false, (27, 1152, 4304, [8, 16, 24])),
            "32b" => (5120, 25600, 64, 64, false, (27, 1152, 4304, [8, 16, 24])),
            _ => return None,
        };
        let (depth, vision_hidden, vision_inter, deepstack) = vision;
        Some(Self {
            text_config: TextConfig {
                vocab_size: 151_936,
                hidden_size: hidden,
                intermediate_size: inter,
                num_hidden_layers: layers,
                num_attention_heads: heads,
                num_key_value_heads: 8,
                head_dim: 128,
                max_position_embeddings: 262_144,
                rms_norm_eps: 1e-6,
                rope_theta: 5e6,
                mrope_section: [24, 20, 20],
                attention_bias: false,
                eos_token_id: Some(151_645),
            },
            vision_config: VisionConfig {
                depth,
                hidden_size: vision_hidden,
                intermediate_size: vision_inter,
                num_heads: 16,
                num_position_embeddings: 2304,
                out_hidden_size: hidden,
                in_channels: 3,
                patch_size: 16,
                spatial_merge_size: 2,
                temporal_patch_size: 2,
                deepstack_visual_indexes: deepstack.to_vec(),
            },
            image_token_id: 151_655,
            video_token_id: 151_656,
            vision_start_token_id: 151_652,
            vision_end_token_id: 151_653,
            tie_word_embeddings: tied,
        })
    }

    /// Sizes of the tiny model, which a CPU runs in no time: of `model/tiny`, but for the ids of special tokens, which
    /// are its tokenizer's and here the last of the vocabulary.
    pub fn tiny() -> Self {
        Self {
            text_config: TextConfig {
                vocab_size: 1024,
                hidden_size: 128,
                intermediate_size: 384,
                num_hidden_layers: 4,
                num_attention_heads: 4,
                num_key_value_heads: 2,
                head_dim: 32,
                max_position_embeddings: 4096,
                rms_norm_eps: 1e-6,
                rope_theta: 10_000.0,
                mrope_section: [6, 5, 5],
                attention_bias: false,
                eos_token_id: None,
            },
            vision_config: VisionConfig {
                depth: 4,
                hidden_size: 96,
                intermediate_size: 256,
                num_heads: 3,
                num_position_embeddings: 64,
                out_hidden_size: 128,
                in_channels: 3,
                patch_size: 16,
                spatial_merge_size: 2,
                temporal_patch_size: 2,
                deepstack_visual_indexes: vec![1, 2],
            },
            image_token_id: 1020,
            video_token_id: 1021,
            vision_start_token_id: 1022,
            vision_end_token_id: 1023,
            tie_word_embeddings: true,
        }
    }
}

//! The vocabulary in the metadata as a `tokenizer.json`.

use serde_json::{Map, Value, json};

use super::GgufPair;

/// How Qwen cuts text into words before merges, in every release since Qwen2.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Kinds of tokens that are read as one piece before anything else.
const CONTROL: f64 = 3.0;
const USER_DEFINED: f64 = 4.0;
/// Places that fill the vocabulary up.
const UNUSED: f64 = 5.0;

impl GgufPair {
    /// The text of a `tokenizer.json`; `None` where the file does not say all of it: tokens, their kinds,
    /// merges, and a way to cut words that is known here.
    pub fn tokenizer_json(&self) -> Option<Vec<u8>> {
        let file = &self.text;
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        if file.text(&key("model"))? != "gpt2" || file.text(&key("pre"))? != "qwen2" {
            return None;
        }
        let tokens = file.texts(&key("tokens"))?;
        let merges = file.texts(&key("merges"))?;
        let kinds = file.numbers(&key("token_type"))?;
        if kinds.len() != tokens.len() {
            return None;
        }
        let (mut vocab, mut added) = (Map::new(), Vec::new());
        for (id, (token, kind)) in tokens.iter().zip(kinds).enumerate() {
            if *kind == CONTROL || *kind == USER_DEFINED {
                added.push(json!({
                    "id": id, "content": token, "special": *kind == CONTROL, "single_word": false,
                    "lstrip": false, "rstrip": false, "normalized": false,
                }));
            } else if *kind != UNUSED {
                vocab.insert(token.clone(), id.into());
            }
        }
        let byte_level = json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false,
        });
        let words = json!({
            "type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false,
        });
        let tree = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added,
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, byte_level.clone()]},
            "post_processor": byte_level.clone(),
            "decoder": byte_level,
            "model": {
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
                "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false,
                "vocab": Value::Object(vocab), "merges": merges,
            },
        });
        serde_json::to_vec(&tree).ok()
    }
}

impl GgufPair {
    /// Names of files that go with the weights in a checkpoint folder, and what the metadata says in their
    /// place.
    pub fn side_files(&self) -> Vec<(&'static str, Option<Vec<u8>>)> {
        let template = self
            .chat_template()
            .map(|source| source.as_bytes().to_vec());
        let images = self.images();
        let key = |name: &str| self.vision.whole(&format!("clip.vision.{name}"));
        let preprocessor = json!({
            "image_processor_type": "Qwen2VLImageProcessorFast",
            "image_mean": images.image_mean.unwrap_or([0.5; 3]),
            "image_std": images.image_std.unwrap_or([0.5; 3]),
            "patch_size": key("patch_size"),
            "temporal_patch_size": 2,
            "merge_size": key("spatial_merge_size").unwrap_or(2),
        });
        let tokenizer = json!({
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "clean_up_tokenization_spaces": false,
        });
        vec![
            ("tokenizer.json", self.tokenizer_json()),
            (
                "tokenizer_config.json",
                serde_json::to_vec_pretty(&tokenizer).ok(),
            ),
            ("chat_template.jinja", template),
            (
                "preprocessor_config.json",
                serde_json::to_vec_pretty(&preprocessor).ok(),
            ),
            ("processor_config.json", None),
            ("generation_config.json", None),
        ]
    }
}

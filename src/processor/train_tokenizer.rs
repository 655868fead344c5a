//! Trains a small tokenizer in the form of Qwen3's, for models far smaller than the published ones.
//!
//! Same NFC normaliser, same pre-tokenizer, same byte-level alphabet, and the same 26 added tokens
//! in the same order after the learnt vocabulary; only the merges are fewer. The same corpus gives
//! the same bytes.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::chat::INSTRUCT_TEMPLATE;
use super::tokenizer::{Tokenizer, TokenizerError};

/// Qwen3's pre-tokenizer: contractions, words, single digits, punctuation, white space.
const PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Qwen3's added tokens in the order of their ids, and whether they are marked special.
const ADDED_TOKENS: [(&str, bool); 26] = [
    ("<|endoftext|>", true),
    ("<|im_start|>", true),
    ("<|im_end|>", true),
    ("<|object_ref_start|>", true),
    ("<|object_ref_end|>", true),
    ("<|box_start|>", true),
    ("<|box_end|>", true),
    ("<|quad_start|>", true),
    ("<|quad_end|>", true),
    ("<|vision_start|>", true),
    ("<|vision_end|>", true),
    ("<|vision_pad|>", true),
    ("<|image_pad|>", true),
    ("<|video_pad|>", true),
    ("<tool_call>", false),
    ("</tool_call>", false),
    ("<|fim_prefix|>", false),
    ("<|fim_middle|>", false),
    ("<|fim_suffix|>", false),
    ("<|fim_pad|>", false),
    ("<|repo_name|>", false),
    ("<|file_sep|>", false),
    ("<tool_response>", false),
    ("</tool_response>", false),
    ("<think>", false),
    ("</think>", false),
];

/// Bytes a learnt token may have: eight Chinese characters. The pattern takes a clause without
/// punctuation for one word, so a small corpus of like reports would else be learnt clause by clause.
const MAX_TOKEN_BYTES: usize = 24;

/// Smallest vocabulary: the 256 bytes and the added tokens.
pub const MIN_VOCAB_SIZE: usize = 256 + ADDED_TOKENS.len();

/// Why a tokenizer could not be trained or saved.
#[derive(Debug, thiserror::Error)]
pub enum TrainTokenizerError {
    /// The vocabulary has no room.
    #[error(
        "`vocab_size` is {vocab_size}; expected at least {MIN_VOCAB_SIZE} for the bytes and the added tokens"
    )]
    VocabSize {
        /// The wanted size.
        vocab_size: usize,
    },
    /// The trainer failed.
    #[error("cannot train the tokenizer: {reason}")]
    Train {
        /// What the trainer said.
        reason: String,
    },
    /// A file could not be written.
    #[error("cannot write `{}`", .path.display())]
    Write {
        /// File that was being written.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
}

/// A trained tokenizer as the texts of its two files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrainedTokenizer {
    /// Text of `tokenizer.json`.
    pub tokenizer_json: String,
    /// Text of `tokenizer_config.json`, the built-in Instruct template in it.
    pub tokenizer_config_json: String,
}

impl TrainedTokenizer {
    /// The tokenizer itself.
    ///
    /// # Errors
    /// [`TokenizerError`] if the text is no tokenizer.
    pub fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        Tokenizer::from_bytes(self.tokenizer_json.as_bytes(), Path::new("tokenizer.json"))
    }

    /// Writes `tokenizer.json` and `tokenizer_config.json` into `folder`, made if need be.
    ///
    /// # Errors
    /// [`TrainTokenizerError::Write`] with the file that failed.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<(), TrainTokenizerError> {
        let folder = folder.as_ref();
        let failed = |path: &Path, cause| TrainTokenizerError::Write {
            path: path.to_owned(),
            cause,
        };
        fs::create_dir_all(folder).map_err(|cause| failed(folder, cause))?;
        for (name, text) in [
            ("tokenizer.json", &self.tokenizer_json),
            ("tokenizer_config.json", &self.tokenizer_config_json),
        ] {
            let path = folder.join(name);
            fs::write(&path, text).map_err(|cause| failed(&path, cause))?;
        }
        Ok(())
    }
}

/// Learns a vocabulary of at most `vocab_size` tokens, bytes and added tokens counted.
///
/// Fewer come out where the corpus has no more pairs that occur twice. Nothing is drawn at random:
/// the same corpus gives the same bytes.
///
/// # Errors
/// [`TrainTokenizerError::VocabSize`] below [`MIN_VOCAB_SIZE`], [`TrainTokenizerError::Train`].
pub fn train_tokenizer<'a>(
    corpus: impl Iterator<Item = &'a str> + Send,
    vocab_size: usize,
) -> Result<TrainedTokenizer, TrainTokenizerError> {
    if vocab_size < MIN_VOCAB_SIZE {
        return Err(TrainTokenizerError::VocabSize { vocab_size });
    }
    let failed = |reason: String| TrainTokenizerError::Train { reason };
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(untrained().to_string())
        .map_err(|error| failed(error.to_string()))?;
    let mut trainer = TrainerWrapper::BpeTrainer(
        BpeTrainer::builder()
            .vocab_size(vocab_size - ADDED_TOKENS.len())
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .max_token_length(Some(MAX_TOKEN_BYTES))
            .show_progress(false)
            .build(),
    );
    tokenizer
        .train(&mut trainer, corpus)
        .map_err(|error| failed(error.to_string()))?;
    let text = tokenizer
        .to_string(false)
        .map_err(|error| failed(error.to_string()))?;

    // The added tokens are written here rather than by the library, which would put those marked
    // special before all others and so change Qwen's order.
    let mut file: Value = serde_json::from_str(&text).map_err(|error| failed(error.to_string()))?;
    let base = tokenizer.get_vocab_size(false);
    file["added_tokens"] = ADDED_TOKENS
        .iter()
        .enumerate()
        .map(|(index, &(content, special))| {
            let mut token = added_token(content, special);
            token["id"] = json!(base + index);
            token
        })
        .collect();
    let decoder: serde_json::Map<String, Value> = ADDED_TOKENS
        .iter()
        .enumerate()
        .map(|(index, &(content, special))| {
            ((base + index).to_string(), added_token(content, special))
        })
        .collect();
    let config = json!({
        "add_bos_token": false,
        "add_prefix_space": false,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": ADDED_TOKENS[1..14].iter().map(|token| token.0).collect::<Vec<_>>(),
        "bos_token": null,
        "chat_template": INSTRUCT_TEMPLATE,
        "clean_up_tokenization_spaces": false,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 262_144,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": false,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": null,
    });
    let pretty = |value: &Value| {
        serde_json::to_string_pretty(value)
            .map(|text| text + "\n")
            .map_err(|error| failed(error.to_string()))
    };
    Ok(TrainedTokenizer {
        tokenizer_json: pretty(&file)?,
        tokenizer_config_json: pretty(&config)?,
    })
}

fn added_token(content: &str, special: bool) -> Value {
    json!({
        "content": content,
        "single_word": false,
        "lstrip": false,
        "rstrip": false,
        "normalized": false,
        "special": special,
    })
}

/// Qwen3's `tokenizer.json` without a vocabulary.
fn untrained() -> Value {
    let byte_level = json!({
        "type": "ByteLevel",
        "add_prefix_space": false,
        "trim_offsets": false,
        "use_regex": false,
    });
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": PATTERN},
                    "behavior": "Isolated",
                    "invert": false,
                },
                byte_level.clone(),
            ],
        },
        "post_processor": byte_level.clone(),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": false,
            "vocab": {},
            "merges": [],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::chat::ChatTemplate;

    const CORPUS: [&str; 4] = [
        "双肺纹理清晰，心影大小正常。",
        "双肺透亮度正常，心影增大。",
        "未见胸腔积液，双肺清晰。 The lungs are clear.",
        "The heart is normal. The lungs are clear.",
    ];

    #[test]
    fn the_same_corpus_gives_the_same_bytes() {
        let long: Vec<String> = (0..200)
            .map(|i| {
                format!(
                    "{} 第{}例 {}",
                    CORPUS[i % 4],
                    i * 7919 % 1000,
                    CORPUS[i * 3 % 4]
                )
            })
            .collect();
        let train = || train_tokenizer(long.iter().map(String::as_str), 400).unwrap();
        let first = train();
        assert_eq!(first, train());
        assert_eq!(first, train());
    }

    #[test]
    fn the_result_is_a_tokenizer_of_qwens_form() {
        let folder = tempfile::tempdir().unwrap();
        let trained = train_tokenizer(CORPUS.into_iter(), 320).unwrap();
        trained.save(folder.path()).unwrap();
        let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
        assert!((MIN_VOCAB_SIZE + 1..=320).contains(&tokenizer.vocab_size()));
        let special = tokenizer.special();
        assert_eq!(special.im_start, special.endoftext + 1);
        assert_eq!(special.image_pad, special.endoftext + 12);
        assert_eq!(special.think_end as usize, tokenizer.vocab_size() - 1);
        let text = "<|im_start|>双肺清晰 🩻 é\n<think>";
        let ids = tokenizer.encode(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
        assert_eq!(ids.first(), Some(&special.im_start));
        assert_eq!(ids.last(), Some(&special.think_start));
        assert!(tokenizer.encode("双肺").unwrap().len() < 6);
        let template = ChatTemplate::find(folder.path(), None).unwrap().unwrap();
        assert_eq!(template.source(), INSTRUCT_TEMPLATE);
    }

    #[test]
    fn a_vocabulary_without_room_is_refused() {
        let error = train_tokenizer(CORPUS.into_iter(), 281).unwrap_err();
        assert!(error.to_string().contains("281"), "{error}");
        let empty = train_tokenizer(std::iter::empty(), MIN_VOCAB_SIZE).unwrap();
        assert_eq!(empty.tokenizer().unwrap().vocab_size(), MIN_VOCAB_SIZE);
    }
}

//! Text to token ids and back: Qwen's byte-level BPE, read from a checkpoint's `tokenizer.json`.
//!
//! There are two encoders. [`Tokenizer::encode`] reads `<|im_start|>` and its like as the
//! single tokens they name; it is for text this program composed (a rendered template).
//! [`Tokenizer::encode_plain`] reads the same characters as ordinary letters. Text from outside that
//! goes *into* a template passes [`Tokenizer::refuse_control_tokens`] first, so that a question
//! cannot close its own turn or stand for an image.
//!
//! This module knows nothing of messages, images or tensors.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use flate2::read::GzDecoder;
use tokenizers::{
    DecoderWrapper, Model, NormalizedString, Normalizer, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer,
};

/// Why a tokenizer could not be read or used.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// Neither form of the file is in the folder.
    #[error("`{}` holds neither `tokenizer.json` nor `tokenizer.json.gz`; hint: copy it from the published checkpoint", .folder.display())]
    NotFound {
        /// Folder that was searched.
        folder: PathBuf,
    },
    /// The file exists but its bytes could not be read.
    #[error("cannot read tokenizer `{}`", .path.display())]
    Read {
        /// File that was being read.
        path: PathBuf,
        /// What the system said.
        #[source]
        cause: io::Error,
    },
    /// The bytes are not a tokenizer.
    #[error("`{}` is not a tokenizer file: {reason}", .path.display())]
    Parse {
        /// File that was being read.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// The decoder is of another family, so tokens are not runs of bytes.
    #[error("`{}` has no `ByteLevel` decoder; expected the tokenizer of a Qwen3 checkpoint", .path.display())]
    NotByteLevel {
        /// File that was being read.
        path: PathBuf,
    },
    /// A token the model's input is built from is not in the vocabulary.
    #[error("tokenizer `{}` lacks the special token `{token}`; expected the tokenizer of a Qwen3 checkpoint", .path.display())]
    MissingToken {
        /// File that was being read.
        path: PathBuf,
        /// The token's text.
        token: String,
    },
    /// Text from outside holds a token that steers the model.
    #[error(
        "the text holds the control token `{token}`; hint: take it out or put a space inside it"
    )]
    ControlToken {
        /// The token's text.
        token: String,
    },
    /// The tokenizer refused the text.
    #[error("cannot encode the text: {reason}")]
    Encode {
        /// What the tokenizer said.
        reason: String,
    },
    /// The tokenizer refused the ids.
    #[error("cannot decode the tokens: {reason}")]
    Decode {
        /// What the tokenizer said.
        reason: String,
    },
}

/// Ids of the tokens the model's input is built from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpecialTokens {
    /// `<|endoftext|>`, also the padding token.
    pub endoftext: u32,
    /// `<|im_start|>`, opens a message.
    pub im_start: u32,
    /// `<|im_end|>`, closes a message and stops generation.
    pub im_end: u32,
    /// `<|vision_start|>`, before the tokens of an image.
    pub vision_start: u32,
    /// `<|vision_end|>`, after the tokens of an image.
    pub vision_end: u32,
    /// `<|image_pad|>`, replaced by one merged image feature each.
    pub image_pad: u32,
    /// `<think>`, opens the reasoning.
    pub think_start: u32,
    /// `</think>`, closes the reasoning.
    pub think_end: u32,
}

/// Byte-level BPE tokenizer of a checkpoint; cloning shares the vocabulary.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    special: SpecialTokens,
    control: Arc<Vec<String>>,
}

impl Tokenizer {
    /// Reads `tokenizer.json`, or else `tokenizer.json.gz`, of a checkpoint folder.
    ///
    /// # Errors
    /// Every [`TokenizerError`] that names a file: absent, unreadable, not a tokenizer, not
    /// byte-level, or without one of the tokens of [`SpecialTokens`].
    pub fn from_folder(folder: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let folder = folder.as_ref();
        let plain = folder.join("tokenizer.json");
        if plain.is_file() {
            return Self::from_file(plain);
        }
        let compressed = folder.join("tokenizer.json.gz");
        if compressed.is_file() {
            return Self::from_file(compressed);
        }
        Err(TokenizerError::NotFound {
            folder: folder.to_owned(),
        })
    }

    /// Reads one file; a name that ends in `.gz` is decompressed.
    ///
    /// # Errors
    /// As [`Tokenizer::from_folder`].
    pub fn from_file(path: impl AsRef<Path>) -> Result<Self, TokenizerError> {
        let path = path.as_ref();
        let read = |cause| TokenizerError::Read {
            path: path.to_owned(),
            cause,
        };
        let mut file = File::open(path).map_err(read)?;
        let mut bytes = Vec::new();
        if path.extension().is_some_and(|end| end == "gz") {
            GzDecoder::new(file).read_to_end(&mut bytes).map_err(read)?;
        } else {
            file.read_to_end(&mut bytes).map_err(read)?;
        }
        Self::from_bytes(&bytes, path)
    }

    /// Reads the text of a `tokenizer.json`; `path` only serves the error messages.
    ///
    /// # Errors
    /// As [`Tokenizer::from_folder`].
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, TokenizerError> {
        let mut inner =
            tokenizers::Tokenizer::from_bytes(bytes).map_err(|error| TokenizerError::Parse {
                path: path.to_owned(),
                reason: error.to_string(),
            })?;
        // A file saved during training may still cut or pad; both would change ids silently.
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|error| TokenizerError::Parse {
                path: path.to_owned(),
                reason: error.to_string(),
            })?;
        if !matches!(inner.get_decoder(), Some(DecoderWrapper::ByteLevel(_))) {
            return Err(TokenizerError::NotByteLevel {
                path: path.to_owned(),
            });
        }
        let id = |token: &str| {
            inner
                .token_to_id(token)
                .ok_or_else(|| TokenizerError::MissingToken {
                    path: path.to_owned(),
                    token: token.to_owned(),
                })
        };
        let special = SpecialTokens {
            endoftext: id("<|endoftext|>")?,
            im_start: id("<|im_start|>")?,
            im_end: id("<|im_end|>")?,
            vision_start: id("<|vision_start|>")?,
            vision_end: id("<|vision_end|>")?,
            image_pad: id("<|image_pad|>")?,
            think_start: id("<think>")?,
            think_end: id("</think>")?,
        };
        let mut control: Vec<String> = inner
            .get_added_tokens_decoder()
            .into_values()
            .filter(|token| {
                let fenced = token.content.starts_with("<|") && token.content.ends_with("|>");
                token.special || fenced
            })
            .map(|token| token.content)
            .collect();
        control.sort();
        Ok(Self {
            inner: Arc::new(inner),
            special,
            control: Arc::new(control),
        })
    }

    /// Ids of the tokens the model's input is built from.
    pub fn special(&self) -> SpecialTokens {
        self.special
    }

    /// Id of one token by its text as the vocabulary writes it, `None` if it is no single token.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Bytes of the longest token: text of more than `n` times as many has more than `n` tokens.
    pub fn longest_token_bytes(&self) -> usize {
        let vocabulary = self.inner.get_vocab(true);
        let lengths = vocabulary
            .values()
            .map(|id| self.bytes_of(*id, false).len());
        lengths.max().unwrap_or(1).max(1)
    }

    /// All ids in use, added tokens included, by rising id, each with its text as the vocabulary writes it.
    pub fn vocabulary(&self) -> Vec<(u32, String)> {
        let vocabulary = self.inner.get_vocab(true).into_iter();
        let mut all: Vec<(u32, String)> = vocabulary.map(|(text, id)| (id, text)).collect();
        all.sort_unstable();
        all
    }

    /// Number of ids in use, added tokens included; a checkpoint's embedding may have more rows.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// Ids of `text`, special tokens in it read as such; adds no token of its own.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] if the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            self.inner
                .encode_fast(text, false)
                .map_err(|error| TokenizerError::Encode {
                    reason: error.to_string(),
                })?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Ids of `text`, every character taken as a letter: `<|im_end|>` or `<think>` in it become
    /// several ordinary tokens.
    ///
    /// The library's own switch (`encode_special_tokens`) leaves added tokens that are not marked
    /// special, `<think>` among them, whole; so the steps are run here without the added vocabulary.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`] if the tokenizer refuses the text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.run_plain(text)
            .map_err(|error| TokenizerError::Encode {
                reason: error.to_string(),
            })
    }

    fn run_plain(&self, text: &str) -> tokenizers::Result<Vec<u32>> {
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = self.inner.get_normalizer() {
            normalizer.normalize(&mut normalized)?;
        }
        let mut pieces = PreTokenizedString::from(normalized);
        if let Some(pre_tokenizer) = self.inner.get_pre_tokenizer() {
            pre_tokenizer.pre_tokenize(&mut pieces)?;
        }
        let model = self.inner.get_model();
        pieces.tokenize(|piece| model.tokenize(piece.get()))?;
        Ok(pieces
            .get_splits(OffsetReferential::Normalized, OffsetType::Byte)
            .into_iter()
            .filter_map(|(_, _, tokens)| tokens.as_ref())
            .flatten()
            .map(|token| token.id)
            .collect())
    }

    /// Checks text from outside before it goes into a template.
    ///
    /// Refused are tokens marked special and all of the form `<|…|>`. The tags `<think>` and
    /// `<tool_call>` with their partners pass: answers are written with them.
    ///
    /// # Errors
    /// [`TokenizerError::ControlToken`] with the first of them.
    pub fn refuse_control_tokens(&self, text: &str) -> Result<(), TokenizerError> {
        // Most text has no `<` at all, and a report is checked on every step of a run.
        if !text.contains('<') {
            return Ok(());
        }
        match self
            .control
            .iter()
            .filter_map(|token| text.find(token.as_str()).map(|at| (at, token)))
            .min()
        {
            Some((_, token)) => Err(TokenizerError::ControlToken {
                token: token.clone(),
            }),
            None => Ok(()),
        }
    }

    /// Text of `ids`; with `skip_special`, tokens marked special leave no trace (`<think>` stays).
    ///
    /// Bytes that form no character become U+FFFD; ids beyond the vocabulary are passed over.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`] if the tokenizer refuses the ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        self.inner
            .decode(ids, skip_special)
            .map_err(|error| TokenizerError::Decode {
                reason: error.to_string(),
            })
    }

    /// Starts a decoder that takes tokens one at a time.
    pub fn stream(&self, skip_special: bool) -> StreamDecoder {
        StreamDecoder {
            tokenizer: self.clone(),
            skip_special,
            pending: Vec::new(),
        }
    }

    /// Bytes of one token; empty for an unknown id and for a skipped special token.
    pub(crate) fn bytes_of(&self, id: u32, skip_special: bool) -> Vec<u8> {
        let Some(token) = self.inner.id_to_token(id) else {
            return Vec::new();
        };
        if skip_special && self.inner.get_added_vocabulary().is_special_token(&token) {
            return Vec::new();
        }
        // As the ByteLevel decoder: a token with a letter outside the alphabet is meant literally.
        token
            .chars()
            .map(byte_of_letter)
            .collect::<Option<Vec<u8>>>()
            .unwrap_or_else(|| token.into_bytes())
    }
}

/// Byte of a letter of the byte-level alphabet.
///
/// Source: `bytes_to_unicode`, GPT-2: printable Latin-1 letters are their own bytes, the 68 other bytes
/// are the letters from U+0100 on.
fn byte_of_letter(letter: char) -> Option<u8> {
    let code = u32::from(letter);
    let byte = match code {
        0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF => code,
        0x100..=0x120 => code - 0x100,
        0x121..=0x142 => code - 0x121 + 0x7F,
        0x143 => 0xAD,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// Decodes tokens to text one by one, never splitting a character.
///
/// A Chinese character is often spread over several tokens; its bytes wait until the last has
/// come. All texts given out, joined, equal [`Tokenizer::decode`] of all ids.
#[derive(Debug, Clone)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    pending: Vec<u8>,
}

impl StreamDecoder {
    /// Takes one token and gives the text that is complete now, often empty.
    pub fn push(&mut self, id: u32) -> String {
        self.pending
            .extend(self.tokenizer.bytes_of(id, self.skip_special));
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(whole) => {
                    text.push_str(whole);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let (whole, rest) = self.pending.split_at(error.valid_up_to());
                    text.push_str(&String::from_utf8_lossy(whole));
                    // No length means that more bytes may still complete the character.
                    let Some(broken) = error.error_len() else {
                        self.pending = rest.to_vec();
                        return text;
                    };
                    text.push(char::REPLACEMENT_CHARACTER);
                    self.pending = rest[broken..].to_vec();
                }
            }
        }
    }

    /// Ends the stream: bytes of a character that was never completed become U+FFFD.
    pub fn flush(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_alphabet_covers_every_byte_once() {
        let mut seen = [0; 256];
        for letter in (0..0x200).filter_map(char::from_u32) {
            if let Some(byte) = byte_of_letter(letter) {
                seen[usize::from(byte)] += 1;
            }
        }
        assert!(seen.iter().all(|&count| count == 1));
        assert_eq!(byte_of_letter('Ġ'), Some(b' '));
        assert_eq!(byte_of_letter('Ċ'), Some(b'\n'));
        assert_eq!(byte_of_letter('中'), None);
    }

    #[test]
    fn a_missing_file_is_named_with_its_folder() {
        let error = Tokenizer::from_folder("no/such/folder").unwrap_err();
        assert!(error.to_string().contains("`no/such/folder`"), "{error}");
        let error = Tokenizer::from_file("no/tokenizer.json").unwrap_err();
        assert!(error.to_string().contains("`no/tokenizer.json`"), "{error}");
    }

    #[test]
    fn a_file_of_another_kind_is_refused() {
        let path = Path::new("x/tokenizer.json");
        let error = Tokenizer::from_bytes(b"{}", path).unwrap_err();
        assert!(matches!(error, TokenizerError::Parse { .. }), "{error}");
    }
}

//! The file of a store of texts: `drafts.bin`.
//!
//! Little-endian: magic, version, SHA-256 of the tokenizer's vocabulary (32 bytes), number of texts (u64), number of words
//! of the index (u64), its text and its order (u32 each), SHA-256 of all that (32 bytes).

use std::{
    fs,
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

use super::index::{START, SuffixIndex};
use crate::{
    base::files::{FileError, write_atomic},
    processor::tokenizer::Tokenizer,
};

/// Name of the file beside an adapter.
pub const DRAFTS_FILE: &str = "drafts.bin";

const MAGIC: &[u8; 8] = b"XRAYDRFT";
const VERSION: u32 = 1;
const HASH: usize = 32;
/// Magic, version, hash of the vocabulary, texts, words.
const HEAD: usize = MAGIC.len() + size_of::<u32>() + HASH + 2 * size_of::<u64>();

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DraftsError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// Another file, or another version of it.
    #[error("`{}` is {found}, expected a store that `drafts` wrote; write it again with `drafts --data … --output`", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What it is.
        found: String,
    },
    /// Bytes are missing or changed.
    #[error("`{}` is damaged: {reason}; write it again with `drafts --data … --output`", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: &'static str,
    },
    /// Ids of another tokenizer.
    #[error("`{}` was written with another tokenizer than the model's; write it again with `drafts --model` of this model", .path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
    },
    /// More tokens than an index has places.
    #[error(
        "`{data}` holds answers of {tokens} tokens, more than the 4,294,967,295 of a store; write one from fewer rows"
    )]
    TooMany {
        /// The data.
        data: String,
        /// Tokens of all answers.
        tokens: usize,
    },
    /// Nothing to draft from.
    #[error(
        "`{0}` holds no answer to draft from; expected rows whose assistant messages are learnt"
    )]
    Empty(String),
}

/// Texts whose tokens are drafted, for the tokenizer that made them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DraftStore {
    pub(super) index: SuffixIndex,
    texts: u64,
}

impl DraftStore {
    /// The store of the answers of a data set called `data`, each with the token that ends it.
    ///
    /// # Errors
    /// [`DraftsError::Empty`] without an answer, [`DraftsError::TooMany`] with more than fit.
    pub fn of_answers(data: &str, answers: &[Vec<u32>]) -> Result<Self, DraftsError> {
        let tokens = answers.iter().map(Vec::len).sum();
        if tokens == 0 {
            return Err(DraftsError::Empty(data.into()));
        }
        if !SuffixIndex::holds(answers.len(), tokens) {
            return Err(DraftsError::TooMany {
                data: data.into(),
                tokens,
            });
        }
        Ok(Self::new(answers))
    }

    /// A store of token ids, each text with the token that ends it.
    ///
    /// # Panics
    /// If they are 2³² or more with one beside each text.
    pub fn new(texts: &[Vec<u32>]) -> Self {
        Self {
            index: SuffixIndex::new(texts.iter().map(Vec::as_slice)),
            texts: texts.iter().filter(|text| !text.is_empty()).count() as u64,
        }
    }

    /// Number of texts.
    pub fn texts(&self) -> u64 {
        self.texts
    }

    /// Number of tokens of all texts.
    pub fn tokens(&self) -> u64 {
        (self.index.text.len() as u64).saturating_sub(self.texts + 1)
    }

    /// Bytes in memory and in the file.
    pub fn bytes(&self) -> u64 {
        (8 * self.index.text.len() + HEAD + HASH) as u64
    }

    /// Writes the store, in one piece or not at all.
    ///
    /// # Errors
    /// [`DraftsError::File`].
    pub fn save(&self, path: &Path, tokenizer: &Tokenizer) -> Result<(), DraftsError> {
        let mut bytes = Vec::with_capacity(self.bytes() as usize);
        bytes.extend_from_slice(MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&vocabulary_hash(tokenizer));
        bytes.extend_from_slice(&self.texts.to_le_bytes());
        bytes.extend_from_slice(&(self.index.text.len() as u64).to_le_bytes());
        for word in self.index.text.iter().chain(&self.index.order) {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        let hash = Sha256::digest(&bytes);
        write_atomic(path, |file| {
            file.write_all(&bytes)?;
            file.write_all(&hash)
        })?;
        Ok(())
    }

    /// Reads a store that was written for this tokenizer.
    ///
    /// # Errors
    /// [`DraftsError`] names the file.
    pub fn load(path: &Path, tokenizer: &Tokenizer) -> Result<Self, DraftsError> {
        let bytes = fs::read(path).map_err(|cause| FileError::read(path, cause))?;
        let format = |found: String| DraftsError::Format {
            path: path.to_owned(),
            found,
        };
        let damaged = |reason| DraftsError::Damaged {
            path: path.to_owned(),
            reason,
        };
        if bytes.get(..MAGIC.len()) != Some(MAGIC) {
            return Err(format("something else".into()));
        }
        if bytes.len() < HEAD + HASH {
            return Err(damaged("it is cut short"));
        }
        let mut rest = &bytes[MAGIC.len()..];
        let mut take = |count: usize| {
            let (taken, left) = rest.split_at(count);
            rest = left;
            taken
        };
        let version = word(take(4));
        if version != VERSION {
            return Err(format(format!(
                "of version {version} (this program writes {VERSION})"
            )));
        }
        let vocabulary = take(HASH);
        let [texts, words] = [take(8), take(8)]
            .map(|bytes| u64::from_le_bytes(bytes.try_into().expect("eight bytes")));
        let body = usize::try_from(words)
            .ok()
            .and_then(|words| words.checked_mul(8))
            .filter(|body| bytes.len() - HEAD - HASH == *body)
            .ok_or_else(|| damaged("its length is not what it says"))?;
        let (signed, hash) = bytes.split_at(HEAD + body);
        if Sha256::digest(signed).as_slice() != hash {
            return Err(damaged("its checksum is another"));
        }
        if vocabulary_hash(tokenizer) != vocabulary {
            return Err(DraftsError::Tokenizer {
                path: path.to_owned(),
            });
        }
        let mut values = signed[HEAD..].chunks_exact(4).map(word);
        let text: Vec<u32> = values.by_ref().take(words as usize).collect();
        let order: Vec<u32> = values.collect();
        // A file may come from anywhere; a checksum proves no meaning.
        let largest = tokenizer.vocabulary().last().map_or(0, |(id, _)| *id);
        let known = |id: &u32| *id == START || *id <= largest;
        if !text.iter().all(known) || order.iter().any(|place| u64::from(*place) >= words) {
            return Err(damaged("it names tokens or places that are not there"));
        }
        Ok(Self {
            index: SuffixIndex { text, order },
            texts,
        })
    }
}

fn word(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

/// Hash of which text each id stands for.
fn vocabulary_hash(tokenizer: &Tokenizer) -> [u8; HASH] {
    let mut hash = Sha256::new();
    for (id, token) in tokenizer.vocabulary() {
        hash.update(id.to_le_bytes());
        hash.update((token.len() as u64).to_le_bytes());
        hash.update(token.as_bytes());
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_folder(Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny")).unwrap()
    }

    #[test]
    fn a_store_comes_back_as_it_was_and_damage_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(DRAFTS_FILE);
        let tokenizer = tokenizer();
        let store = DraftStore::new(&[vec![1, 2, 3], vec![], vec![1, 2, 4]]);
        assert_eq!((store.texts(), store.tokens()), (2, 6));
        store.save(&path, &tokenizer).unwrap();
        assert_eq!(DraftStore::load(&path, &tokenizer).unwrap(), store);
        assert_eq!(fs::metadata(&path).unwrap().len(), store.bytes());
        // Nothing is left beside it.
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        let whole = fs::read(&path).unwrap();
        let refused = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            DraftStore::load(&path, &tokenizer).unwrap_err().to_string()
        };
        assert!(refused(b"{}").contains("something else"));
        assert!(refused(&whole[..40]).contains("cut short"));
        assert!(refused(&whole[..whole.len() - 1]).contains("length"));
        let mut changed = whole.clone();
        changed[HEAD] ^= 1;
        assert!(refused(&changed).contains("checksum"));
        let mut newer = whole.clone();
        newer[8] = 2;
        assert!(refused(&newer).contains("version 2"));
        let signed = |mut bytes: Vec<u8>| {
            let end = bytes.len() - HASH;
            let hash = Sha256::digest(&bytes[..end]);
            bytes[end..].copy_from_slice(&hash);
            bytes
        };
        let mut other = whole.clone();
        other[12] ^= 1;
        assert!(refused(&signed(other)).contains("another tokenizer"));
        let mut astray = whole.clone();
        let last = astray.len() - HASH - 1;
        astray[last] = 1;
        assert!(refused(&signed(astray)).contains("not there"));
        let absent = folder.path().join("absent.bin");
        let error = DraftStore::load(&absent, &tokenizer).unwrap_err();
        assert!(error.to_string().contains("absent.bin"), "{error}");
    }
}

//! Which base an adapter was trained on: a fingerprint of the base's weights beside PEFT's files.
//!
//! PEFT names the base by its folder, and two bases of one size load each other's adapters without a
//! warning. The fingerprint is stored in `base_fingerprint.json`, a file of its own that PEFT ignores.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Seek},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::config::AdapterError;
use crate::{
    base::files::{FileError, write_atomic},
    ops::quantised::Quantization,
    qwen3_vl::weights::{
        TensorFile, WeightsError, checkpoint_files_with,
        gguf::{GgufParts, is_gguf},
    },
};

/// Name of the file in an adapter's folder.
const FILE: &str = "base_fingerprint.json";

/// Bytes read at the beginning, in the middle and at the end of each tensor.
const SAMPLE_BYTES: usize = 64;

/// Fingerprint of a set of base weights: names, types, shapes and some bytes of every tensor.
///
/// Shards and the order of tensors in them do not count, so a checkpoint stays itself when it is
/// sharded anew; another type makes it another one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BaseFingerprint {
    /// Layout number, 1.
    pub format: u32,
    /// SHA-256 over the tensors in order of name; of the floats where quantised weights were made from them.
    pub sha256: String,
    /// How the weights were quantised beside which an adapter was trained; absent where they were not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
    /// Of those weights, where they were quantised on the disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub quantised_sha256: Option<String>,
}

/// An adapter's base cannot be identified, or is another one.
#[derive(Debug, thiserror::Error)]
pub enum BaseError {
    /// The base's weights cannot be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// The fingerprint's file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The fingerprint's file holds something else.
    #[error("`{}` is damaged: {cause}; with --any-base it is ignored", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where it stops making sense.
        cause: serde_json::Error,
    },
    /// The weights differ.
    #[error(
        "`{}` was made for another base model: it was trained on weights `{}…`, those in `{}` are `{}…`; \
         if they are the same in another form (another type, say), add --any-base",
        .adapter.display(), short(.trained_on), .base.display(), short(.found)
    )]
    Other {
        /// The adapter's folder.
        adapter: PathBuf,
        /// The base's folder.
        base: PathBuf,
        /// Fingerprint in the adapter's folder.
        trained_on: String,
        /// Fingerprint of the base.
        found: String,
    },
}

fn short(hash: &str) -> &str {
    hash.get(..12).unwrap_or(hash)
}

impl BaseFingerprint {
    /// Of the weights of a checkpoint; reads headers and some bytes of each tensor.
    ///
    /// # Errors
    /// [`AdapterError::Weights`] names the file.
    pub fn of(model: &Path, parts: &GgufParts) -> Result<Self, AdapterError> {
        let mut tensors = BTreeMap::new();
        for path in checkpoint_files_with(model, parts)? {
            if is_gguf(&path) {
                let hash = sample(&path).map_err(|cause| WeightsError::Read {
                    path: path.clone(),
                    cause,
                })?;
                tensors.insert(format!("file {}", tensors.len()), hash);
                continue;
            }
            let file = TensorFile::open(&path)?;
            for (name, dtype, shape, data) in file.stored() {
                let mut hash = Sha256::new();
                hash.update(format!("{dtype:?} {shape:?} "));
                let last = data.len().saturating_sub(SAMPLE_BYTES);
                for from in [0, last / 2, last] {
                    hash.update(&data[from..(from + SAMPLE_BYTES).min(data.len())]);
                }
                tensors.insert(name.to_string(), hash.finalize());
            }
        }
        let mut all = Sha256::new();
        for (name, hash) in tensors {
            all.update(name.as_bytes());
            all.update([0]);
            all.update(hash);
        }
        let sha256 = all.finalize();
        Ok(Self {
            format: 1,
            sha256: sha256.iter().map(|byte| format!("{byte:02x}")).collect(),
            quantization: None,
            quantised_sha256: None,
        })
    }

    /// Of what an adapter is trained on: the weights in a checkpoint folder, quantised as `quantization`
    /// says, on the disk or while they are loaded.
    ///
    /// # Errors
    /// [`BaseError`] names the file.
    pub fn of_training(
        model: &Path,
        parts: &GgufParts,
        quantization: Option<Quantization>,
    ) -> Result<Self, BaseError> {
        let stored = Self::of(model, parts)?;
        // A quantised checkpoint names its original.
        let made_from = match is_gguf(model) {
            true => None,
            false => Self::load(model)?,
        };
        Ok(match made_from {
            Some(original) => Self {
                quantization: quantization.map(|one| one.to_string()),
                quantised_sha256: Some(stored.sha256),
                ..original
            },
            None => Self {
                quantization: quantization.map(|one| one.to_string()),
                ..stored
            },
        })
    }

    /// Writes it into an adapter's folder.
    ///
    /// # Errors
    /// [`FileError`].
    pub fn save(&self, adapter: &Path) -> Result<(), FileError> {
        write_atomic(&adapter.join(FILE), |out| {
            serde_json::to_writer_pretty(&mut *out, self)?;
            out.write_all(b"\n")
        })
    }

    /// Of the base that an adapter was trained on; `None` if its folder does not say, as those of
    /// other programs.
    ///
    /// # Errors
    /// [`BaseError::Damaged`], [`BaseError::File`].
    pub fn load(adapter: &Path) -> Result<Option<Self>, BaseError> {
        let path = adapter.join(FILE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map(Some)
                .map_err(|cause| BaseError::Damaged { path, cause }),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(cause) => Err(FileError::read(&path, cause).into()),
        }
    }
}

/// Of a whole file: its length, and pieces of it.
fn sample(path: &Path) -> io::Result<sha2::digest::Output<Sha256>> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    let mut hash = Sha256::new();
    hash.update(length.to_le_bytes());
    let last = length.saturating_sub(SAMPLE_BYTES as u64);
    for part in 0..=32 {
        file.seek(io::SeekFrom::Start(last / 32 * part))?;
        let mut piece = Vec::new();
        file.by_ref()
            .take(SAMPLE_BYTES as u64)
            .read_to_end(&mut piece)?;
        hash.update(&piece);
    }
    Ok(hash.finalize())
}

/// What to know where an adapter was trained beside weights that were quantised in another way than those it
/// is used on, or that are not quantised: in Chinese and in English.
pub fn quantisation_remark(
    adapter: &Path,
    used_on: Option<Quantization>,
) -> Option<(String, String)> {
    // A damaged file is refused by `check_base`, or ignored as the user wants it.
    let trained_on = BaseFingerprint::load(adapter).ok()??.quantization?;
    let used_on = used_on.map(|quantization| quantization.to_string());
    if used_on.as_deref() == Some(trained_on.as_str()) {
        return None;
    }
    let (chinese, english) = match &used_on {
        Some(used_on) => (
            format!("量化为 {used_on} 的权重"),
            format!("weights quantised as {used_on}"),
        ),
        None => (
            "未量化的权重".to_owned(),
            "weights that are not quantised".to_owned(),
        ),
    };
    Some((
        format!(
            "适配器 `{}` 在量化为 {trained_on} 的权重旁训练，现用于{chinese}",
            adapter.display()
        ),
        format!(
            "the adapter in `{}` was trained beside weights quantised as {trained_on} and is used with {english}; its answers differ a little from those in training",
            adapter.display()
        ),
    ))
}

/// Refuses a base that the adapter was not trained on, whatever its folder is called.
///
/// # Errors
/// [`BaseError`]; an adapter that does not name its base is accepted.
pub fn check_base(adapter: &Path, model: &Path, parts: &GgufParts) -> Result<(), BaseError> {
    let Some(trained_on) = BaseFingerprint::load(adapter)? else {
        return Ok(());
    };
    // A quantised checkpoint names its original: an adapter for that fits this as well.
    let made_from = match is_gguf(model) {
        true => None,
        false => BaseFingerprint::load(model)?,
    };
    let found = made_from.map_or_else(|| BaseFingerprint::of(model, parts), Ok)?;
    if found.sha256 == trained_on.sha256 {
        return Ok(());
    }
    Err(BaseError::Other {
        adapter: adapter.to_path_buf(),
        base: model.to_path_buf(),
        trained_on: trained_on.sha256,
        found: found.sha256,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/fixtures/parity")
            .join(name)
    }

    /// A copy of a fixture checkpoint's weights, the byte at `changed` from the end another one.
    fn copy(changed: Option<usize>) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = fs::read(fixture("model-tiny/model.safetensors")).unwrap();
        if let Some(from_end) = changed {
            let at = bytes.len() - from_end;
            bytes[at] ^= 1;
        }
        fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
        dir
    }

    #[test]
    fn weights_identify_the_base_and_folder_names_do_not() {
        let alone = GgufParts::default();
        let same = BaseFingerprint::of(&fixture("model-tiny"), &alone).unwrap();
        assert_eq!(
            BaseFingerprint::of(copy(None).path(), &alone).unwrap(),
            same
        );
        assert_ne!(
            BaseFingerprint::of(copy(Some(3)).path(), &alone).unwrap(),
            same
        );
        let merged = BaseFingerprint::of(&fixture("merged"), &alone).unwrap();
        assert_ne!(merged, same);
        assert_eq!(same.sha256.len(), 64);
    }

    #[test]
    fn another_base_is_refused_and_an_unnamed_one_is_not() {
        let alone = GgufParts::default();
        let adapter = tempfile::tempdir().unwrap();
        check_base(adapter.path(), &fixture("merged"), &alone).unwrap();
        let base = BaseFingerprint::of(&fixture("model-tiny"), &alone).unwrap();
        base.save(adapter.path()).unwrap();
        check_base(adapter.path(), &fixture("model-tiny"), &alone).unwrap();
        let error = check_base(adapter.path(), &fixture("merged"), &alone).unwrap_err();
        let text = error.to_string();
        for piece in ["another base model", "--any-base", &base.sha256[..12]] {
            assert!(text.contains(piece), "{text}");
        }
        // An adapter that was trained beside quantised weights fits their original, and says what it is used on.
        assert_eq!(quantisation_remark(adapter.path(), None), None);
        let int4 = "int4".parse().ok();
        let beside = BaseFingerprint::of_training(&fixture("model-tiny"), &alone, int4).unwrap();
        beside.save(adapter.path()).unwrap();
        assert_eq!(BaseFingerprint::load(adapter.path()).unwrap(), Some(beside));
        check_base(adapter.path(), &fixture("model-tiny"), &alone).unwrap();
        assert_eq!(quantisation_remark(adapter.path(), int4), None);
        let (_, english) = quantisation_remark(adapter.path(), None).unwrap();
        assert!(
            english.contains("int4, groups of 64 and is used with weights that are not"),
            "{english}"
        );
        let (chinese, _) = quantisation_remark(adapter.path(), "int8".parse().ok()).unwrap();
        assert!(chinese.contains("量化为 int8 的权重"), "{chinese}");
        fs::write(adapter.path().join(FILE), "{").unwrap();
        let error = check_base(adapter.path(), &fixture("merged"), &alone).unwrap_err();
        assert!(matches!(error, BaseError::Damaged { .. }), "{error}");
    }
}

//! What a folder of a model holds, by the names of its files: whole or not, and in which form.

use std::{
    collections::BTreeSet,
    fmt,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use serde::Deserialize;
use serde_json::Value;

/// What a folder has to hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// Config, tokenizer and weights.
    Checkpoint,
    /// Config and tokenizer.
    Description,
    /// A PEFT adapter.
    Adapter,
}

impl Want {
    /// What is wanted, as the object of a sentence.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Checkpoint | Self::Description => "model",
            Self::Adapter => "adapter",
        }
    }
}

/// Index of weights in several files.
pub(super) const INDEX_ENDING: &str = ".index.json";

/// Longest index or config that is read.
const LONGEST_JSON: u64 = 64 << 20;

/// First bytes of a file that git-lfs left out.
const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

/// The form of the weights in a folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightsKind {
    /// Safetensors of this many files.
    Safetensors(usize),
    /// Safetensors that MLX quantised, with bits a weight.
    Mlx(u64),
    /// Pickles of PyTorch, of this many files.
    Pickle(usize),
    /// llama.cpp's form, of this many files.
    Gguf(usize),
    /// A PEFT adapter.
    Adapter,
    /// No weights.
    None,
}

impl fmt::Display for WeightsKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let files = |count: &usize| match count {
            1 => "1 file".to_owned(),
            count => format!("{count} files"),
        };
        match self {
            Self::Safetensors(count) => write!(f, "weights as safetensors, {}", files(count)),
            Self::Mlx(bits) => write!(f, "weights that MLX quantised to {bits} bits"),
            Self::Pickle(count) => {
                write!(f, "weights as pickles of PyTorch (.bin), {}", files(count))
            }
            Self::Gguf(count) => write!(f, "weights in llama.cpp's form (GGUF), {}", files(count)),
            Self::Adapter => f.write_str("a PEFT adapter"),
            Self::None => f.write_str("no weights"),
        }
    }
}

/// What a name of a file says about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FileKind {
    Safetensors,
    Pickle,
    Gguf,
    Other,
}

/// Kind of a file by its name; pickles of a trainer's state are no weights.
pub(super) fn file_kind(name: &str) -> FileKind {
    let state = [
        "training_args",
        "optimizer",
        "scheduler",
        "rng_state",
        "scaler",
    ];
    match name.rsplit_once('.').map(|(_, ending)| ending) {
        Some("safetensors") => FileKind::Safetensors,
        Some("bin") if !state.iter().any(|start| name.starts_with(start)) => FileKind::Pickle,
        Some("gguf") => FileKind::Gguf,
        _ => FileKind::Other,
    }
}

/// Names of the files directly in `folder`.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

fn json(path: &Path) -> Option<Value> {
    let size = fs::metadata(path).ok()?.len();
    let text = fs::read(path).ok().filter(|_| size <= LONGEST_JSON)?;
    serde_json::from_slice(&text).ok()
}

/// Whether `folder` is made for what is wanted, whole or not.
pub(super) fn is_meant(folder: &Path, want: Want) -> bool {
    match want {
        Want::Adapter => folder.join("adapter_config.json").is_file(),
        Want::Checkpoint | Want::Description => {
            folder.join("config.json").is_file()
                || names(folder)
                    .iter()
                    .any(|name| file_kind(name) == FileKind::Gguf)
        }
    }
}

/// What `folder` lacks of what is wanted, as the end of "… is missing"; `None` if it is whole.
pub(super) fn missing(folder: &Path, want: Want) -> Option<String> {
    let has = |name: &str| folder.join(name).is_file();
    match want {
        Want::Adapter => {
            if !has("adapter_config.json") {
                return Some("adapter_config.json".into());
            }
            let weights = ["adapter_model.safetensors", "adapter_model.bin"];
            match weights.iter().any(|name| has(name)) {
                true => None,
                false => Some(weights[0].into()),
            }
        }
        Want::Description => description_missing(&has),
        Want::Checkpoint => {
            let names = names(folder);
            let of = |kind| {
                names
                    .iter()
                    .any(|name| file_kind(name) == kind && has(name))
            };
            let described = description_missing(&has);
            if described.is_some() && !of(FileKind::Gguf) {
                return described;
            }
            let indices: Vec<&String> = names
                .iter()
                .filter(|name| name.ends_with(INDEX_ENDING))
                .collect();
            for index in indices.iter().filter(|name| is_of_model(name)) {
                // A single file with the whole is enough beside an index that was left over.
                if has(index.trim_end_matches(INDEX_ENDING)) {
                    continue;
                }
                let Some(shards) = shards(&folder.join(index)) else {
                    return Some(format!("a whole {index}"));
                };
                if let Some(shard) = shards.into_iter().find(|shard| !has(shard)) {
                    return Some(shard);
                }
                return None;
            }
            let kinds = [FileKind::Safetensors, FileKind::Pickle, FileKind::Gguf];
            match kinds.into_iter().any(of) {
                true => None,
                false => Some("model.safetensors".into()),
            }
        }
    }
}

/// Whether an index is of weights in a form that is read.
pub(super) fn is_of_model(index: &str) -> bool {
    let file = index.trim_end_matches(INDEX_ENDING);
    file_kind(file) != FileKind::Other
}

fn description_missing(has: &dyn Fn(&str) -> bool) -> Option<String> {
    if !has("config.json") {
        return Some("config.json".into());
    }
    let tokenizers = ["tokenizer.json", "tokenizer.json.gz", "vocab.json"];
    match tokenizers.iter().any(|name| has(name)) {
        true => None,
        false => Some(tokenizers[0].into()),
    }
}

/// Files that an index of weights names; `None` if it is no index.
pub(super) fn shards(index: &Path) -> Option<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: std::collections::HashMap<String, String>,
    }
    let size = fs::metadata(index).ok()?.len();
    let text = fs::read(index).ok().filter(|_| size <= LONGEST_JSON)?;
    let index: Index = serde_json::from_slice(&text).ok()?;
    let files: BTreeSet<String> = index.weight_map.into_values().collect();
    // Part of a path: an index may name files beside it and no others.
    let beside = |name: &String| !name.is_empty() && !name.contains(['/', '\\', ':']);
    (!files.is_empty() && files.iter().all(beside)).then_some(files)
}

/// The first file of weights in `folder` that is a pointer of git-lfs.
pub(super) fn lfs_pointer(folder: &Path) -> Option<PathBuf> {
    names(folder)
        .into_iter()
        .filter(|name| file_kind(name) != FileKind::Other || name == "tokenizer.json")
        .map(|name| folder.join(name))
        .find(|path| is_lfs_pointer(path))
}

fn is_lfs_pointer(path: &Path) -> bool {
    // A pointer has three short lines.
    let short = fs::metadata(path).is_ok_and(|data| data.is_file() && data.len() < 1024);
    let mut start = [0; POINTER.len()];
    short
        && File::open(path).is_ok_and(|mut file| file.read_exact(&mut start).is_ok())
        && start == *POINTER
}

/// The form of the weights in `folder`.
pub(super) fn weights_kind(folder: &Path) -> WeightsKind {
    let names = names(folder);
    if names.iter().any(|name| name == "adapter_config.json") {
        return WeightsKind::Adapter;
    }
    let count = |kind| names.iter().filter(|name| file_kind(name) == kind).count();
    match count(FileKind::Safetensors) {
        0 => {}
        files => {
            let config = json(&folder.join("config.json")).unwrap_or_default();
            // MLX writes this key; transformers' quantised checkpoints have `quantization_config` alone.
            let mlx = config
                .get("quantization")
                .filter(|tree| tree.get("group_size").is_some())
                .and_then(|tree| tree.get("bits")?.as_u64());
            return match mlx {
                Some(bits) => WeightsKind::Mlx(bits),
                None => WeightsKind::Safetensors(files),
            };
        }
    }
    match (count(FileKind::Pickle), count(FileKind::Gguf)) {
        (0, 0) => WeightsKind::None,
        (0, files) => WeightsKind::Gguf(files),
        (files, _) => WeightsKind::Pickle(files),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            fs::write(dir.path().join(name), text).unwrap();
        }
        dir
    }

    const INDEX: &str =
        r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#;

    #[test]
    fn a_missing_shard_is_named() {
        let whole = [
            ("config.json", "{}"),
            ("tokenizer.json", "{}"),
            ("model.safetensors.index.json", INDEX),
            ("model-1.safetensors", "x"),
            ("model-2.safetensors", "x"),
        ];
        let lacks = |count: usize, want| missing(folder(&whole[..count]).path(), want);
        assert_eq!(lacks(5, Want::Checkpoint), None);
        for (count, name) in [
            (4, "model-2.safetensors"),
            (3, "model-1.safetensors"),
            (2, "model.safetensors"),
            (1, "tokenizer.json"),
            (0, "config.json"),
        ] {
            assert_eq!(lacks(count, Want::Checkpoint).as_deref(), Some(name));
        }
        assert_eq!(lacks(2, Want::Description), None);
        assert_eq!(
            lacks(5, Want::Adapter).as_deref(),
            Some("adapter_config.json")
        );
        let broken = folder(&[
            ("config.json", "{}"),
            ("tokenizer.json", "{}"),
            (
                "model.safetensors.index.json",
                r#"{"weight_map": {"a": "../../etc/passwd"}}"#,
            ),
        ]);
        assert_eq!(
            missing(broken.path(), Want::Checkpoint).as_deref(),
            Some("a whole model.safetensors.index.json")
        );
    }

    #[test]
    fn forms_are_told_by_names() {
        let kind = |files: &[(&str, &str)]| weights_kind(folder(files).path());
        let config = ("config.json", "{}");
        assert_eq!(
            kind(&[config, ("model.safetensors", "")]),
            WeightsKind::Safetensors(1)
        );
        let mlx = r#"{"quantization": {"group_size": 64, "bits": 4}}"#;
        assert_eq!(
            kind(&[("config.json", mlx), ("model.safetensors", "")]),
            WeightsKind::Mlx(4)
        );
        assert_eq!(
            kind(&[config, ("pytorch_model.bin", ""), ("training_args.bin", "")]),
            WeightsKind::Pickle(1)
        );
        assert_eq!(kind(&[("q4.gguf", "")]), WeightsKind::Gguf(1));
        assert_eq!(kind(&[("adapter_config.json", "")]), WeightsKind::Adapter);
        assert_eq!(kind(&[config]), WeightsKind::None);
    }

    #[test]
    fn a_pointer_of_git_lfs_is_seen() {
        let text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n";
        let dir = folder(&[("config.json", "{}"), ("model.safetensors", text)]);
        assert_eq!(
            lfs_pointer(dir.path()),
            Some(dir.path().join("model.safetensors"))
        );
        assert_eq!(
            lfs_pointer(folder(&[("model.safetensors", "x")]).path()),
            None
        );
    }
}

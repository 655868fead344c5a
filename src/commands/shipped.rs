//! What comes with the program: the tiny model, the configs, the sample image and the sample data set.
//!
//! In the repository they are files. Elsewhere the small ones are inside the program and the data set is drawn again,
//! byte for byte; both are put into the cache folder of the user when a command first asks for them.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    base::{
        build_info::VERSION,
        files::{FileError, write_atomic},
        system::cache_folder,
    },
    dataset::map_paths,
    phantom::{Dialect, PROMPTS, PhantomDatasetError, write_dataset},
};

/// One file of the repository, by its path there.
macro_rules! files {
    ($($path:literal),+ $(,)?) => {
        &[$(($path, include_bytes!(concat!(env!("CARGO_MANIFEST_DIR"), "/", $path)))),+]
    };
}

/// The files inside the program.
const FILES: &[(&str, &[u8])] = files![
    "model/tiny/chat_template.jinja",
    "model/tiny/config.json",
    "model/tiny/generation_config.json",
    "model/tiny/model.safetensors",
    "model/tiny/preprocessor_config.json",
    "model/tiny/tokenizer.json",
    "model/tiny/tokenizer_config.json",
    "data/sample/demo.png",
    "configs/openi-lora.toml",
    "configs/schema.json",
    "configs/thinking-lora.toml",
    "configs/tiny-dpo.toml",
    "configs/tiny-grpo.toml",
    "configs/tiny-partial.toml",
    "configs/tiny-pretrain-2.toml",
    "configs/tiny-pretrain.toml",
    "configs/tiny.toml",
    "configs/hooks/swanlab_log.py",
    "configs/hooks/wandb_log.py",
];

/// The sample data set, in two parts: folder, and studies of [`SAMPLE_SEED`] in their order.
const SAMPLES: [(&str, std::ops::Range<u64>); 2] = [
    ("data/sample/train", 384..1024),
    ("data/sample/val", 320..384),
];
const SAMPLE_SEED: u64 = 11;

/// What keeps a shipped file from being written where it can be read.
#[derive(Debug, thiserror::Error)]
enum ShippedError {
    #[error("there is no folder for it: neither XDG_CACHE_HOME nor HOME is set")]
    NoFolder,
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Samples(#[from] PhantomDatasetError),
}

/// The path of something that comes with the program: as given, beside the sources the program was built from, or in
/// the cache folder. A path of anything else is returned as given.
pub(super) fn shipped(path: &Path) -> PathBuf {
    if path.exists() {
        return path.to_path_buf();
    }
    let cache = cache_folder();
    // A run names the copy it was made with, and the cache may have been emptied since.
    let copies = cache.as_deref().map(copies_in);
    let path = copies
        .and_then(|copies| path.strip_prefix(copies).ok())
        .unwrap_or(path);
    if path.is_absolute() {
        return path.to_path_buf();
    }
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if beside.exists() {
        return beside;
    }
    match from_program(path, cache) {
        Some(Ok(place)) if place.exists() => place,
        Some(Ok(_)) => path.to_path_buf(),
        Some(Err(error)) => {
            eprintln!(
                "note: `{}` comes with this program and is not here; {error}",
                path.display()
            );
            path.to_path_buf()
        }
        None => path.to_path_buf(),
    }
}

/// The name of a data set: phantoms as they are, a file as [`shipped`] finds it.
pub(super) fn shipped_data(name: &str) -> String {
    map_paths(name, |path| {
        if path.starts_with("phantom:") {
            path.to_owned()
        } else {
            shipped(Path::new(path)).display().to_string()
        }
    })
}

/// The text of a config that comes with the program, by its name without folder and ending.
pub(super) fn config_text(name: &str) -> Option<&'static str> {
    let path = format!("configs/{name}.toml");
    let (_, bytes) = FILES.iter().find(|(known, _)| *known == path)?;
    std::str::from_utf8(bytes).ok()
}

/// Names that [`config_text`] takes.
pub(super) fn config_names() -> Vec<&'static str> {
    let names = FILES.iter().filter_map(|(path, _)| {
        let name = path.strip_prefix("configs/")?;
        name.strip_suffix(".toml")
    });
    names.collect()
}

/// The folder of this version's copies.
fn copies_in(cache: &Path) -> PathBuf {
    cache.join(format!("shipped-{VERSION}"))
}

/// The cached copy of a path of the repository; `None` if it does not come with the program.
fn from_program(path: &Path, cache: Option<PathBuf>) -> Option<Result<PathBuf, ShippedError>> {
    let is_part = |name: &str| Path::new(name).starts_with(path) || path.starts_with(name);
    let wanted: Vec<_> = FILES
        .iter()
        .filter(|(name, _)| Path::new(name).starts_with(path))
        .collect();
    let samples: Vec<_> = SAMPLES.iter().filter(|(name, _)| is_part(name)).collect();
    // A whole folder such as `data` is not asked for.
    let is_named = path.components().count() >= 2;
    if !is_named || wanted.is_empty() && samples.is_empty() {
        return None;
    }
    let root = cache.as_deref().map(copies_in);
    let put = |root: &Path| -> Result<PathBuf, ShippedError> {
        let mut written = false;
        for (name, bytes) in wanted {
            written |= put_file(&root.join(name), bytes)?;
        }
        for (name, studies) in samples {
            written |= put_samples(&root.join(name), studies.clone())?;
        }
        let place = root.join(path);
        if written {
            eprintln!(
                "`{}` is not here; the copy that comes with the program is in `{}`",
                path.display(),
                place.display()
            );
        }
        Ok(place)
    };
    Some(
        root.ok_or(ShippedError::NoFolder)
            .and_then(|root| put(&root)),
    )
}

/// Writes a file unless it is there as it should be; says whether it did.
fn put_file(path: &Path, bytes: &[u8]) -> Result<bool, FileError> {
    let has_length = fs::metadata(path).is_ok_and(|found| found.len() == bytes.len() as u64);
    if has_length && fs::read(path).is_ok_and(|found| found == bytes) {
        return Ok(false);
    }
    make_parent(path)?;
    write_atomic(path, |out| out.write_all(bytes))?;
    Ok(true)
}

/// Draws a part of the sample data set unless it is there; says whether it did. The folder is renamed when it is
/// whole.
fn put_samples(folder: &Path, studies: std::ops::Range<u64>) -> Result<bool, ShippedError> {
    if folder.is_dir() {
        return Ok(false);
    }
    make_parent(folder)?;
    match write_dataset(folder, SAMPLE_SEED, studies, Dialect::House, &PROMPTS) {
        // Another process was faster.
        Err(_) if folder.is_dir() => Ok(false),
        other => Ok(other.map(|_| true)?),
    }
}

fn make_parent(path: &Path) -> Result<(), FileError> {
    let parent = path.parent().unwrap_or(Path::new(""));
    fs::create_dir_all(parent).map_err(|cause: io::Error| FileError::write(parent, cause))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn repository(path: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
    }

    #[test]
    fn the_files_inside_are_all_of_their_folders() {
        for folder in ["model/tiny", "configs", "configs/hooks"] {
            let on_disk: BTreeSet<String> = fs::read_dir(repository(folder))
                .unwrap()
                .map(|entry| entry.unwrap())
                .filter(|entry| entry.file_type().unwrap().is_file())
                .map(|entry| format!("{folder}/{}", entry.file_name().to_str().unwrap()))
                .collect();
            let inside: BTreeSet<String> = FILES
                .iter()
                .filter(|(name, _)| Path::new(name).parent() == Some(Path::new(folder)))
                .map(|(name, _)| name.to_string())
                .collect();
            assert_eq!(inside, on_disk, "{folder}");
        }
    }

    #[test]
    fn the_sample_data_set_is_drawn_as_it_is_in_the_repository() {
        let folder = tempfile::tempdir().unwrap();
        let (name, studies) = SAMPLES[1].clone();
        let target = folder.path().join("samples/val");
        assert!(put_samples(&target, studies.clone()).unwrap());
        // A second time nothing is done.
        assert!(!put_samples(&target, studies).unwrap());
        let names = |root: &Path| -> BTreeSet<PathBuf> {
            let mut found = BTreeSet::new();
            for part in ["", "images"] {
                for entry in fs::read_dir(root.join(part)).unwrap() {
                    found.insert(Path::new(part).join(entry.unwrap().file_name()));
                }
            }
            found
        };
        let found = names(&target);
        assert_eq!(found, names(&repository(name)));
        for file in found.iter().filter(|file| target.join(file).is_file()) {
            let here = fs::read(target.join(file)).unwrap();
            assert!(
                here == fs::read(repository(name).join(file)).unwrap(),
                "{}",
                file.display()
            );
        }
    }

    #[test]
    fn a_path_of_the_repository_is_found_in_the_cache_and_no_other() {
        let cache = tempfile::tempdir().unwrap();
        let find = |path: &str| from_program(Path::new(path), Some(cache.path().to_path_buf()));
        let model = find("model/tiny").unwrap().unwrap();
        for name in ["config.json", "model.safetensors", "tokenizer.json"] {
            let written = fs::read(model.join(name)).unwrap();
            assert!(
                written == fs::read(repository("model/tiny").join(name)).unwrap(),
                "{name}"
            );
        }
        let samples = find("data/sample/val/samples.jsonl").unwrap().unwrap();
        assert!(samples.is_file(), "{}", samples.display());
        for other in ["model", "model/other", "data/openi/train.jsonl", "configs"] {
            assert!(find(other).is_none(), "{other}");
        }
        let error = from_program(Path::new("configs/tiny.toml"), None)
            .unwrap()
            .unwrap_err();
        assert!(error.to_string().contains("HOME"), "{error}");
    }

    #[test]
    fn a_damaged_copy_is_written_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b");
        for (content, written) in [
            (None, true),
            (Some("short"), true),
            (Some("gone"), true),
            (Some("good"), false),
        ] {
            if let Some(content) = content {
                fs::write(&path, content).unwrap();
            }
            assert_eq!(put_file(&path, b"good").unwrap(), written, "{content:?}");
            assert_eq!(fs::read(&path).unwrap(), b"good");
        }
    }

    #[test]
    fn configs_are_found_by_name() {
        assert!(
            config_text("tiny")
                .unwrap()
                .contains("model = \"model/tiny\"")
        );
        assert_eq!(config_text("nothing"), None);
        assert!(config_names().contains(&"openi-lora"));
    }
}

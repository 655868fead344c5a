//! Why a folder that was named for a checkpoint or an adapter is none, and what to name in its place.

use std::{
    env, fs,
    path::{Component, Path, PathBuf},
};

/// A sentence, beginning with `; `, on what to name in place of `folder`, which lacks `file`; empty
/// where nothing better is known.
///
/// `file` is `config.json` of a checkpoint or `adapter_config.json` of an adapter.
pub fn folder_hint(folder: &Path, file: &str) -> String {
    hint(folder, file, &hub_caches()).map_or_else(String::new, |hint| format!("; {hint}"))
}

/// [`folder_hint`] for the folder of a file that cannot be read.
pub fn file_hint(path: &Path) -> String {
    match (
        path.parent(),
        path.file_name().and_then(|name| name.to_str()),
    ) {
        (Some(folder), Some(name)) => folder_hint(folder, name),
        _ => String::new(),
    }
}

fn hint(folder: &Path, file: &str, caches: &[PathBuf]) -> Option<String> {
    if folder.join(file).is_file() {
        return None;
    }
    if folder.is_dir() {
        return below(folder, file);
    }
    if folder.starts_with("~") {
        return Some(
            "a shell replaces `~` only outside quotes and at the beginning of a word; write the whole path"
                .to_owned(),
        );
    }
    let (owner, name) = hub_id(folder)?;
    let cached = caches
        .iter()
        .map(|cache| cache.join(format!("models--{owner}--{name}")))
        .find_map(|folder| newest_snapshot(&folder, file));
    if let Some(snapshot) = cached {
        return Some(format!(
            "`{owner}/{name}` was downloaded before; name its folder `{}`",
            snapshot.display()
        ));
    }
    Some(format!(
        "if `{owner}/{name}` is a name on Hugging Face or ModelScope, download it with \
         `hf download {owner}/{name} --local-dir model/{name}` or \
         `modelscope download --model {owner}/{name} --local_dir model/{name}` and name `model/{name}`"
    ))
}

/// The folder below `folder` that holds `file`: a snapshot of a download, or the only one, or the best
/// checkpoint of a run.
fn below(folder: &Path, file: &str) -> Option<String> {
    if let Some(snapshot) = newest_snapshot(folder, file) {
        return Some(format!(
            "this is the folder of a download, name its snapshot `{}`",
            snapshot.display()
        ));
    }
    let mut found: Vec<PathBuf> = fs::read_dir(folder)
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join(file).is_file())
        .collect();
    found.sort();
    match found.as_slice() {
        [] => None,
        [only] => Some(format!("name `{}`", only.display())),
        [.., last] => Some(format!(
            "name one of the {} folders in it, such as `{}`",
            found.len(),
            best_of_run(folder)
                .filter(|best| found.contains(best))
                .as_ref()
                .unwrap_or(last)
                .display()
        )),
    }
}

/// The checkpoint that a run's `best.json` names.
fn best_of_run(run: &Path) -> Option<PathBuf> {
    let text = fs::read(run.join("best.json")).ok()?;
    let tree: serde_json::Value = serde_json::from_slice(&text).ok()?;
    let step = tree.get("step")?.as_u64()?;
    Some(run.join(format!("checkpoint-{step}")))
}

/// The newest snapshot with `file` in a folder `models--OWNER--NAME`.
fn newest_snapshot(folder: &Path, file: &str) -> Option<PathBuf> {
    fs::read_dir(folder.join("snapshots"))
        .ok()?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.join(file).is_file())
        .max_by_key(|path| path.metadata().and_then(|data| data.modified()).ok())
}

/// `OWNER/NAME`, where a path has the form of one.
fn hub_id(path: &Path) -> Option<(&str, &str)> {
    let is_word = |text: &&str| {
        text.chars()
            .all(|letter| letter.is_ascii_alphanumeric() || "._-".contains(letter))
    };
    let mut parts = path.components().map(|part| match part {
        Component::Normal(name) => name.to_str().filter(is_word),
        _ => None,
    });
    let (owner, name) = (parts.next()??, parts.next()??);
    // A folder that is there is where something else was meant.
    (parts.next().is_none() && !Path::new(owner).is_dir()).then_some((owner, name))
}

/// Where Hugging Face's tools keep what they download.
fn hub_caches() -> Vec<PathBuf> {
    let folder = |name: &str| {
        env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let home = folder("HF_HOME").or_else(|| Some(folder("HOME")?.join(".cache/huggingface")));
    folder("HF_HUB_CACHE")
        .into_iter()
        .chain(home.map(|home| home.join("hub")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hub_name_names_the_download() {
        let hint = hint(Path::new("Qwen/Qwen3-VL-8B-Instruct"), "config.json", &[]).unwrap();
        assert!(
            hint.contains(
                "`hf download Qwen/Qwen3-VL-8B-Instruct --local-dir model/Qwen3-VL-8B-Instruct`"
            ) && hint.contains("`modelscope download --model Qwen/Qwen3-VL-8B-Instruct "),
            "{hint}"
        );
        for other in ["absent", "a/b/c", "/a/b", "./a", "src/absent", "a b/c"] {
            assert_eq!(
                super::hint(Path::new(other), "config.json", &[]),
                None,
                "{other}"
            );
        }
    }

    #[test]
    fn a_download_names_its_snapshot() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--Qwen--Q");
        let snapshot = folder.join("snapshots/0123abcd");
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        let caches = [cache.path().to_path_buf()];
        for named in [folder.as_path(), Path::new("Qwen/Q")] {
            let hint = hint(named, "config.json", &caches).unwrap();
            assert!(hint.contains(snapshot.to_str().unwrap()), "{hint}");
        }
        assert_eq!(hint(&snapshot, "config.json", &[]), None);
    }

    #[test]
    fn a_quoted_tilde_is_explained() {
        let hint = hint(Path::new("~/models/q"), "config.json", &[]).unwrap();
        assert!(hint.contains("outside quotes"), "{hint}");
    }

    #[test]
    fn a_run_names_its_best_checkpoint_and_a_parent_its_only_folder() {
        let run = tempfile::tempdir().unwrap();
        for step in ["checkpoint-2", "checkpoint-4"] {
            fs::create_dir(run.path().join(step)).unwrap();
            fs::write(run.path().join(step).join("adapter_config.json"), "{}").unwrap();
        }
        let named = |end: &str| {
            let hint = hint(run.path(), "adapter_config.json", &[]).unwrap();
            assert!(hint.contains(&format!("{end}`")), "{hint}");
        };
        named("checkpoint-4");
        fs::write(run.path().join("best.json"), r#"{"step":2}"#).unwrap();
        named("checkpoint-2");
        fs::remove_dir_all(run.path().join("checkpoint-4")).unwrap();
        named("checkpoint-2");
    }
}

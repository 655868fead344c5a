//! Why a folder that was named for a checkpoint or an adapter is none, and what to name in its place.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A sentence, beginning with `; `, on what to name in place of `folder`, which lacks `file`; empty
/// where nothing better is known.
///
/// `file` is `config.json` of a checkpoint or `adapter_config.json` of an adapter.
pub fn folder_hint(folder: &Path, file: &str) -> String {
    hint(folder, file).map_or_else(String::new, |hint| format!("; {hint}"))
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

fn hint(folder: &Path, file: &str) -> Option<String> {
    match folder.join(file).is_file() {
        true => None,
        false => below(folder, file),
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_download_names_its_snapshot() {
        let cache = tempfile::tempdir().unwrap();
        let folder = cache.path().join("models--Qwen--Q");
        let snapshot = folder.join("snapshots/0123abcd");
        fs::create_dir_all(&snapshot).unwrap();
        fs::write(snapshot.join("config.json"), "{}").unwrap();
        let named = hint(&folder, "config.json").unwrap();
        assert!(named.contains(snapshot.to_str().unwrap()), "{named}");
        assert_eq!(hint(&snapshot, "config.json"), None);
        assert_eq!(hint(Path::new("absent"), "config.json"), None);
    }

    #[test]
    fn a_run_names_its_best_checkpoint_and_a_parent_its_only_folder() {
        let run = tempfile::tempdir().unwrap();
        for step in ["checkpoint-2", "checkpoint-4"] {
            fs::create_dir(run.path().join(step)).unwrap();
            fs::write(run.path().join(step).join("adapter_config.json"), "{}").unwrap();
        }
        let named = |end: &str| {
            let hint = hint(run.path(), "adapter_config.json").unwrap();
            assert!(hint.contains(&format!("{end}`")), "{hint}");
        };
        named("checkpoint-4");
        fs::write(run.path().join("best.json"), r#"{"step":2}"#).unwrap();
        named("checkpoint-2");
        fs::remove_dir_all(run.path().join("checkpoint-4")).unwrap();
        named("checkpoint-2");
    }
}

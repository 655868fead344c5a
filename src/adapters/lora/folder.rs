//! From the folder that was named to the adapter that was meant.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::Value;

const CONFIG: &str = "adapter_config.json";

/// Names under which the adapter is stored as training began: PEFT's documentation, LLaMA-Factory, ms-swift.
const INITIAL: &[&str] = &[
    "pissa_init",
    "olora_init",
    "corda_init",
    "lora_ga_init",
    "initial_model",
];

/// An adapter's folder, and what to say where another one was named.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdapterFolder {
    /// The folder with `adapter_config.json`, or the one named where none was found.
    pub dir: PathBuf,
    /// Which one was taken and why, where it is not the one named.
    pub note: Option<String>,
}

/// Finds the adapter that `named` leads to: itself, the best checkpoint of a run, or the only adapter in it.
///
/// A folder that leads to none, or to several, is returned as it is: reading it says why.
pub fn find_adapter(named: &Path) -> AdapterFolder {
    let as_named = AdapterFolder {
        dir: named.to_path_buf(),
        note: None,
    };
    if is_adapter(named) || !named.is_dir() {
        return as_named;
    }
    if let Some((best, file)) = best_checkpoint(named) {
        return match is_adapter(&best) {
            true => AdapterFolder {
                note: Some(format!(
                    "`{}` is the folder of a run; `{}` is used, the best checkpoint by `{}`",
                    named.display(),
                    best.display(),
                    file.display()
                )),
                dir: best,
            },
            false => as_named,
        };
    }
    match adapters_in(named).as_slice() {
        [only] => AdapterFolder {
            dir: only.clone(),
            note: Some(format!(
                "`{}` holds one adapter; `{}` is used",
                named.display(),
                only.display()
            )),
        },
        _ => as_named,
    }
}

/// What is in a folder without `adapter_config.json` and helps to find what was meant.
pub(super) fn why_none(dir: &Path) -> Option<String> {
    if let Some((best, _)) = best_checkpoint(dir) {
        return Some(if is_adapter(&best) {
            format!(
                "it is that of a run, whose best checkpoint is `{}`",
                best.display()
            )
        } else if best.join("config.json").is_file() {
            format!(
                "it is that of a run that trained the whole model; name its best checkpoint `{}` with --model and leave out --adapter",
                best.display()
            )
        } else {
            format!(
                "it is that of a run, whose best checkpoint `{}` is not there any more",
                best.display()
            )
        });
    }
    if dir.join("config.json").is_file() {
        return Some(
            "it holds a whole model; name it with --model and leave out --adapter".to_owned(),
        );
    }
    let found = adapters_in(dir);
    let named: Vec<String> = found
        .iter()
        .take(4)
        .map(|path| format!("`{}`", path.display()))
        .collect();
    (!named.is_empty()).then(|| format!("adapters are in {}; name one", named.join(", ")))
}

/// The folder of an adapter as training began, in `dir` or beside it.
pub(super) fn initial_adapter(dir: &Path) -> Option<PathBuf> {
    let dir = dir.canonicalize().ok()?;
    dir.ancestors()
        .take(2)
        .flat_map(|around| INITIAL.iter().map(move |name| around.join(name)))
        .find(|path| *path != dir && is_adapter(path))
}

fn is_adapter(dir: &Path) -> bool {
    dir.join(CONFIG).is_file()
}

fn adapters_in(dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| is_adapter(path))
        .collect();
    found.sort();
    found
}

/// The checkpoint that a run calls its best, and the file that says so: `best.json` of this program, or the
/// `trainer_state.json` of transformers' trainer in the newest checkpoint.
fn best_checkpoint(run: &Path) -> Option<(PathBuf, PathBuf)> {
    let read = |path: &Path| -> Option<Value> {
        serde_json::from_str(&fs::read_to_string(path).ok()?).ok()
    };
    let file = run.join("best.json");
    if let Some(step) = read(&file).and_then(|best| best.get("step")?.as_u64()) {
        return Some((run.join(format!("checkpoint-{step}")), file));
    }
    let newest = fs::read_dir(run)
        .ok()?
        .flatten()
        .filter_map(|entry| {
            let step: u64 = entry
                .file_name()
                .to_str()?
                .strip_prefix("checkpoint-")?
                .parse()
                .ok()?;
            let file = entry.path().join("trainer_state.json");
            file.is_file().then_some((step, file))
        })
        .max()?
        .1;
    let best = read(&newest)?;
    let best = Path::new(best.get("best_model_checkpoint")?.as_str()?).file_name()?;
    // The run may have been moved: only the last part counts, inside it.
    let best = run.join(best);
    best.is_dir().then_some((best, newest))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn adapter(dir: &Path) {
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join(CONFIG), "{}").unwrap();
    }

    #[test]
    fn a_run_leads_to_its_best_checkpoint_and_a_parent_to_its_only_adapter() {
        let run = tempfile::tempdir().unwrap();
        let at = |name: &str| run.path().join(name);
        adapter(&at("checkpoint-2"));
        let found = find_adapter(run.path());
        assert_eq!(found.dir, at("checkpoint-2"));
        assert!(found.note.unwrap().contains("holds one adapter"));
        adapter(&at("checkpoint-10"));
        // Two, and nobody says which.
        let found = find_adapter(run.path());
        assert_eq!((found.dir.as_path(), found.note), (run.path(), None));
        assert!(why_none(run.path()).unwrap().contains("checkpoint-10"));
        // As transformers' trainer says it, from wherever it ran.
        fs::write(
            at("checkpoint-10/trainer_state.json"),
            r#"{"best_model_checkpoint": "/elsewhere/out/checkpoint-2"}"#,
        )
        .unwrap();
        assert_eq!(find_adapter(run.path()).dir, at("checkpoint-2"));
        fs::write(at("best.json"), r#"{"step": 10}"#).unwrap();
        let found = find_adapter(run.path());
        assert_eq!(found.dir, at("checkpoint-10"));
        assert!(found.note.unwrap().contains("best.json"));
        // An adapter is itself.
        let named = find_adapter(&at("checkpoint-2"));
        assert_eq!((named.dir, named.note), (at("checkpoint-2"), None));
    }

    #[test]
    fn a_run_of_the_whole_model_says_so() {
        let run = tempfile::tempdir().unwrap();
        let best = run.path().join("checkpoint-4");
        fs::create_dir(&best).unwrap();
        fs::write(best.join("config.json"), "{}").unwrap();
        fs::write(run.path().join("best.json"), r#"{"step": 4}"#).unwrap();
        assert_eq!(find_adapter(run.path()).note, None);
        let hint = why_none(run.path()).unwrap();
        assert!(
            hint.contains("--model") && hint.contains("checkpoint-4"),
            "{hint}"
        );
        assert!(why_none(&best).unwrap().contains("whole model"));
    }

    #[test]
    fn the_adapter_as_training_began_is_found_beside_or_in_it() {
        let run = tempfile::tempdir().unwrap();
        let last = run.path().join("checkpoint-9");
        adapter(&last);
        assert_eq!(initial_adapter(&last), None);
        adapter(&run.path().join("pissa_init"));
        let found = initial_adapter(&last).unwrap();
        assert!(found.ends_with("pissa_init"), "{}", found.display());
        adapter(&last.join("initial_model"));
        assert!(initial_adapter(&last).unwrap().ends_with("initial_model"));
    }
}

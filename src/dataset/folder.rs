//! What a folder is that was named where a data file is expected, and what to name in its place.

use std::path::{Path, PathBuf};

use crate::{base::files::nearest::nearest, processor::image::ENDINGS};

/// Endings of data files, without `.gz`.
const DATA: [&str; 6] = ["jsonl", "json", "ndjson", "csv", "tsv", "parquet"];

/// Files that are named in a message.
const NAMED: usize = 4;

/// Most entries that are looked at.
const MOST_ENTRIES: usize = 10_000;

/// What the folder `path` is, and what to do, as the end of a sentence about it.
pub(super) fn describe(path: &Path) -> String {
    let has = |name: &str| path.join(name).is_file();
    let shown = path.display();
    if has("dataset_dict.json") {
        return format!(
            "is a data set in parts, saved by `datasets`; hint: write it as Parquet, in Python `for name, part in datasets.load_from_disk(\"{shown}\").items(): part.to_parquet(f\"{{name}}.parquet\")`"
        );
    }
    if has("state.json") && has("dataset_info.json") {
        return format!(
            "is a data set saved by `datasets`; hint: write it as Parquet, in Python `datasets.load_from_disk(\"{shown}\").to_parquet(\"data.parquet\")`"
        );
    }
    let (mut files, mut images) = (Vec::new(), 0);
    let below = |folder: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).into_iter().flatten();
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut paths: Vec<PathBuf> = paths.take(MOST_ENTRIES).collect();
        paths.sort();
        paths
    };
    for entry in below(path) {
        let inner = if entry.is_dir() {
            below(&entry)
        } else {
            vec![entry]
        };
        for file in inner {
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            let name = name.strip_suffix(".gz").unwrap_or(&name).to_lowercase();
            let ending = name.rsplit_once('.').map_or("", |(_, ending)| ending);
            if DATA.contains(&ending) && name != "dataset_info.json" {
                files.push(file);
            } else if ENDINGS.contains(&ending) {
                images += 1;
            }
        }
    }
    let names: Vec<String> = files
        .iter()
        .take(NAMED)
        .map(|file| format!("`{}`", file.display()))
        .collect();
    let is_parquet = |file: &PathBuf| file.extension().is_some_and(|ending| ending == "parquet");
    let hint = match files.as_slice() {
        [] if images > 0 => format!(
            "it holds {images} images and no file that names them; `infer --images-dir {shown}` answers about them, and training wants a row a study: {{\"image\": \"a.png\", \"report\": \"…\"}}, which `convert` reads"
        ),
        [] => "name a file in it, or let `convert` look for a corpus".to_owned(),
        [file, ..] if files.len() > NAMED && files.iter().all(is_parquet) => {
            let folder = file.parent().unwrap_or(path).display();
            format!("name its tables, `'{folder}/*.parquet'`, or those of one part")
        }
        [_] => format!(
            "name its file, {}; `convert {shown} --output OUT` reads reports without questions",
            names[0]
        ),
        _ => format!(
            "name one of its files, {}{}; `convert {shown} --output OUT` reads reports without questions",
            names.join(", "),
            if files.len() > NAMED { " …" } else { "" }
        ),
    };
    format!("is a folder and no data file; hint: {hint}")
}

/// Hint for a missing data file, where its name allows one.
pub(super) fn absent(path: &Path) -> Option<String> {
    let text = path.to_str()?;
    if let Some((scheme, _)) = text.split_once("://") {
        return Some(format!(
            "data files are read from the disk and not from addresses ({scheme}://); download it first (of a hub, `hf download --repo-type dataset OWNER/NAME --local-dir DIR` or `modelscope download --dataset OWNER/NAME --local_dir DIR`) and name the file"
        ));
    }
    let name = path.file_name()?.to_str()?;
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    if let Ok(entries) = std::fs::read_dir(folder) {
        let names = entries.take(MOST_ENTRIES);
        let names: Vec<String> = names
            .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
            .collect();
        let found = nearest(name, names.iter().map(String::as_str))?;
        return Some(format!(
            "did you mean `{}`?",
            path.with_file_name(found).display()
        ));
    }
    let is_repository = text.split('/').count() == 2 && path.extension().is_none();
    is_repository.then(|| {
        format!(
            "if it is a data set on a hub, download it first, `hf download --repo-type dataset {text} --local-dir DIR` or `modelscope download --dataset {text} --local_dir DIR`, and name its files"
        )
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_file_that_is_not_there_is_looked_for() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("train.jsonl"), "x").unwrap();
        let text = absent(&root.path().join("train.josnl")).unwrap();
        assert!(text.contains("train.jsonl`?"), "{text}");
        assert_eq!(absent(&root.path().join("other")), None);
        let text = absent(Path::new("no-such-owner/reports")).unwrap();
        assert!(
            text.contains("--repo-type dataset no-such-owner/reports"),
            "{text}"
        );
        let text = absent(Path::new("https://example.org/a.jsonl")).unwrap();
        assert!(text.contains("from the disk"), "{text}");
    }

    #[test]
    fn a_folder_says_what_to_name_in_its_place() {
        let root = tempfile::tempdir().unwrap();
        let made = |name: &str, files: &[&str]| {
            for file in files {
                let path = root.path().join(name).join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, "x").unwrap();
            }
            describe(&root.path().join(name))
        };
        for (name, files, words) in [
            (
                "saved",
                &[
                    "state.json",
                    "dataset_info.json",
                    "data-00000-of-00001.arrow",
                ][..],
                &["load_from_disk", "to_parquet"][..],
            ),
            (
                "parts",
                &["dataset_dict.json", "train/state.json"],
                &["in parts", ".items()"],
            ),
            (
                "folder",
                &["train/metadata.jsonl", "train/0.png"],
                &["train/metadata.jsonl", "convert"],
            ),
            ("images", &["0.png", "1.DCM"], &["2 images", "--images-dir"]),
            (
                "tables",
                &[
                    "0.parquet",
                    "1.parquet",
                    "2.parquet",
                    "3.parquet",
                    "4.parquet",
                ],
                &["*.parquet"],
            ),
            (
                "several",
                &["a.jsonl", "b.csv.gz"],
                &["a.jsonl", "b.csv.gz", "one of its files"],
            ),
            ("none", &["a.txt"], &["look for a corpus"]),
        ] {
            let text = made(name, files);
            for word in words {
                assert!(text.contains(word), "{name}: {text}");
            }
        }
    }
}

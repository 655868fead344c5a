//! Which files of a repository are needed: descriptions, and weights in the best form there is.

use std::collections::BTreeSet;

use super::{
    folder::{FileKind, INDEX_ENDING, Want, file_kind, is_of_model},
    listing::Entry,
};

/// Files that are no weights, by their ending; a repository's own pages and licences are not needed.
const DESCRIPTIONS: &[&str] = &[".json", ".jinja", ".model"];

/// More of them, by name.
const DESCRIPTION_NAMES: &[&str] = &["merges.txt", "vocab.txt", "tokenizer.json.gz"];

/// Files to take, in two steps: an index, which is among the first, says which weights there are.
#[derive(Debug, Default)]
pub(super) struct Selection {
    /// Without weights.
    pub(super) descriptions: Vec<Entry>,
    /// Every file of weights that may be wanted.
    pub(super) weights: Vec<Entry>,
    /// Path of the index of the weights, if they have one.
    pub(super) index: Option<String>,
}

/// Chooses among `files`; `include` are patterns with `*` and `?` that replace the choice.
///
/// # Errors
/// What to type, where there is nothing to take or no choice can be made.
pub(super) fn select(files: &[Entry], want: Want, include: &[String]) -> Result<Selection, String> {
    if !include.is_empty() {
        let chosen = |entry: &&Entry| {
            include
                .iter()
                .any(|pattern| matches_pattern(pattern, &entry.path))
        };
        let descriptions: Vec<Entry> = files.iter().filter(chosen).cloned().collect();
        if descriptions.is_empty() {
            return Err(format!(
                "no file fits --include {}; its files are {}",
                include.join(" "),
                some_names(files)
            ));
        }
        return Ok(Selection {
            descriptions,
            ..Selection::default()
        });
    }
    let described = |entry: &&Entry| {
        let path = entry.path.as_str();
        let at_root = !path.contains('/');
        let templates = path.starts_with("additional_chat_templates/");
        (at_root || templates)
            && (DESCRIPTIONS.iter().any(|ending| path.ends_with(ending))
                || DESCRIPTION_NAMES.contains(&path))
            && (!path.ends_with(INDEX_ENDING) || (want == Want::Checkpoint && is_of_model(path)))
    };
    let mut selection = Selection {
        descriptions: files.iter().filter(described).cloned().collect(),
        ..Selection::default()
    };
    if want == Want::Description {
        return match selection.descriptions.is_empty() {
            true => Err(format!(
                "it has no config; its files are {}",
                some_names(files)
            )),
            false => Ok(selection),
        };
    }
    let of = |kind| -> Vec<Entry> {
        let root = files.iter().filter(|entry| !entry.path.contains('/'));
        root.filter(|entry| file_kind(&entry.path) == kind)
            .filter(|entry| want != Want::Adapter || entry.path.starts_with("adapter_model."))
            .cloned()
            .collect()
    };
    let forms = [FileKind::Safetensors, FileKind::Pickle].map(of);
    if let Some(weights) = forms.into_iter().find(|weights| !weights.is_empty()) {
        let kind = file_kind(&weights[0].path);
        let index_of = |entry: &&Entry| {
            let file = entry.path.strip_suffix(INDEX_ENDING);
            file.is_some_and(|file| file_kind(file) == kind)
        };
        let index = selection.descriptions.iter().find(index_of);
        selection.index = index.map(|entry| entry.path.clone());
        // The index of a form that is not taken would name files that are not there.
        let taken = selection.index.clone();
        selection.descriptions.retain(|entry| {
            !entry.path.ends_with(INDEX_ENDING) || Some(&entry.path) == taken.as_ref()
        });
        selection.weights = weights;
        return Ok(selection);
    }
    let weights = of(FileKind::Gguf);
    let (projectors, models): (Vec<Entry>, Vec<Entry>) = weights
        .into_iter()
        .partition(|entry| entry.path.to_lowercase().contains("mmproj"));
    let variants: BTreeSet<&str> = models.iter().map(|entry| unsplit(&entry.path)).collect();
    if variants.is_empty() {
        return Err(format!(
            "it has no weights (*.safetensors, *.bin or *.gguf) at its top; its files are {}; --include takes some of them",
            some_names(files)
        ));
    }
    if variants.len() > 1 {
        let names: Vec<&str> = variants.into_iter().collect();
        return Err(format!(
            "it has the same weights {} times as GGUF; choose with --include, such as --include '{}*' --include '*mmproj*' --include '*.json' ({})",
            names.len(),
            names[0].trim_end_matches(".gguf"),
            names.join(", ")
        ));
    }
    selection.weights = models.into_iter().chain(projectors).collect();
    Ok(selection)
}

/// The name of a GGUF file without `-00001-of-00003`.
fn unsplit(name: &str) -> &str {
    let stem = name.trim_end_matches(".gguf");
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|byte| byte.is_ascii_digit());
    let part = stem.rsplit_once("-of-").filter(|(_, all)| digits(all));
    let split = part.and_then(|(rest, _)| rest.rsplit_once('-'));
    split
        .filter(|(_, at)| digits(at))
        .map_or(stem, |(stem, _)| stem)
}

fn some_names(files: &[Entry]) -> String {
    let shown: Vec<&str> = files
        .iter()
        .take(12)
        .map(|entry| entry.path.as_str())
        .collect();
    match files.len() {
        0 => "none".into(),
        count if count > shown.len() => {
            format!("{}, and {} more", shown.join(", "), count - shown.len())
        }
        _ => shown.join(", "),
    }
}

/// A pattern as Python's `fnmatch` reads it, without sets: `*` is any text, `/` too, `?` any letter.
pub(super) fn matches_pattern(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) =
        (pattern.chars().collect(), text.chars().collect());
    let (mut at, mut place) = (0, 0);
    // The last star, and how much of the text it takes.
    let mut star: Option<(usize, usize)> = None;
    while place < text.len() {
        match pattern.get(at) {
            Some('*') => {
                star = Some((at, place));
                at += 1;
            }
            Some(letter) if *letter == '?' || *letter == text[place] => {
                at += 1;
                place += 1;
            }
            _ => match star {
                Some((star_at, taken)) => {
                    star = Some((star_at, taken + 1));
                    at = star_at + 1;
                    place = taken + 1;
                }
                None => return false,
            },
        }
    }
    pattern[at..].iter().all(|letter| *letter == '*')
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(paths: &[&str]) -> Vec<Entry> {
        let entry = |path: &&str| Entry {
            path: path.to_string(),
            size: Some(1),
            digest: None,
        };
        paths.iter().map(entry).collect()
    }

    fn taken(paths: &[&str], want: Want, include: &[&str]) -> Result<Vec<String>, String> {
        let include: Vec<String> = include.iter().map(|text| text.to_string()).collect();
        let selection = select(&entries(paths), want, &include)?;
        let all = selection.descriptions.into_iter().chain(selection.weights);
        Ok(all.map(|entry| entry.path).collect())
    }

    #[test]
    fn what_is_needed_is_taken_and_nothing_else() {
        let published = [
            ".gitattributes",
            "README.md",
            "LICENSE",
            "config.json",
            "tokenizer.json",
            "merges.txt",
            "chat_template.jinja",
            "model.safetensors.index.json",
            "pytorch_model.bin.index.json",
            "model-1.safetensors",
            "pytorch_model-1.bin",
            "onnx/model.onnx",
            "original/x.safetensors",
            "q4.gguf",
            "training_args.bin",
            "optimizer.pt",
            "assets/picture.png",
        ];
        assert_eq!(
            taken(&published, Want::Checkpoint, &[]).unwrap(),
            [
                "config.json",
                "tokenizer.json",
                "merges.txt",
                "chat_template.jinja",
                "model.safetensors.index.json",
                "model-1.safetensors",
            ]
        );
        assert_eq!(
            taken(&published, Want::Description, &[]).unwrap(),
            [
                "config.json",
                "tokenizer.json",
                "merges.txt",
                "chat_template.jinja"
            ]
        );
        assert_eq!(
            taken(&published, Want::Checkpoint, &["onnx/*", "*.md"]).unwrap(),
            ["README.md", "onnx/model.onnx"]
        );
    }

    #[test]
    fn other_forms_are_taken_where_there_is_nothing_else() {
        let pickle = [
            "config.json",
            "pytorch_model.bin",
            "training_args.bin",
            "a.gguf",
        ];
        assert_eq!(
            taken(&pickle, Want::Checkpoint, &[]).unwrap(),
            ["config.json", "pytorch_model.bin"]
        );
        let one = [
            "m-Q4-00001-of-00002.gguf",
            "m-Q4-00002-of-00002.gguf",
            "mmproj-m.gguf",
        ];
        assert_eq!(taken(&one, Want::Checkpoint, &[]).unwrap(), one);
        let many = ["m-Q4.gguf", "m-Q8.gguf", "mmproj-m.gguf"];
        let reason = taken(&many, Want::Checkpoint, &[]).unwrap_err();
        assert!(
            reason.contains("--include") && reason.contains("m-Q8"),
            "{reason}"
        );
        let none = taken(&["README.md"], Want::Checkpoint, &[]).unwrap_err();
        assert!(none.contains("README.md"), "{none}");
        assert!(taken(&many, Want::Checkpoint, &["*.txt"]).is_err());
    }

    #[test]
    fn patterns_are_those_of_a_shell() {
        for (pattern, text, fits) in [
            ("*", "", true),
            ("*.json", "a/b.json", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("a*b*c", "a-b-b-c", true),
            ("a*b", "a-b-c", false),
            ("", "a", false),
            ("模*", "模型", true),
        ] {
            assert_eq!(matches_pattern(pattern, text), fits, "{pattern} {text}");
        }
        // Stars one after another take no exponential time.
        assert!(!matches_pattern(&"*a".repeat(40), &"a".repeat(39)));
    }
}

//! ARCHITECTURE.md against the tree: every file that it names is there, and what it says a file or a type has.

use std::{fs, path::Path};

/// Names of other programs' things.
const FOREIGN: [&str; 4] = [
    "TrainingStrategy::Custom",
    "client.sync",
    "CubeTask",
    "CARGO_TARGET_DIR",
];

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// Files of `folder` by their path from the root, code and settings with their text.
fn read_all(root: &Path, folder: &Path, files: &mut Vec<(String, String)>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.strip_prefix(root).unwrap().to_string_lossy();
        if path.is_dir() {
            read_all(root, &path, files);
        } else {
            let is_text = ["rs", "cu", "cuh", "toml", "sh"]
                .map(Some)
                .contains(&path.extension().and_then(|e| e.to_str()));
            let text = is_text.then(|| fs::read_to_string(&path).unwrap());
            files.push((name.into_owned(), text.unwrap_or_default()));
        }
    }
}

/// What is between backticks, code blocks left out; of `a/{b,c}` each.
fn named(text: &str) -> Vec<String> {
    let mut outside = String::new();
    for (index, part) in text.split("```").enumerate() {
        if index % 2 == 0 {
            outside.push_str(part);
        }
    }
    let spans = outside.split('`').skip(1).step_by(2);
    let mut all = Vec::new();
    for span in spans {
        match span.split_once('{').and_then(|(before, rest)| {
            let (inside, after) = rest.split_once('}')?;
            Some((before, inside, after))
        }) {
            Some((before, inside, after)) => {
                let each = inside.split(',');
                all.extend(each.map(|one| format!("{before}{}{after}", one.trim())));
            }
            None => all.push(span.split_whitespace().collect::<Vec<_>>().join(" ")),
        }
    }
    all
}

/// Files by their path, code and settings with their text.
struct Tree(Vec<(String, String)>);

impl Tree {
    fn texts(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(_, text)| text.as_str())
    }

    fn has_word(text: &str, word: &str) -> bool {
        text.match_indices(word).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            let after = text[at + word.len()..].chars().next();
            !before.is_some_and(is_word) && !after.is_some_and(is_word)
        })
    }

    /// The texts of the files that a path may mean: whole, or the end of one, or a module's folder.
    fn of_path(&self, path: &str) -> Vec<&str> {
        let path = path.trim_end_matches('/');
        let found = self.0.iter().filter(|(name, _)| {
            let name = format!("/{name}");
            name.ends_with(&format!("/{path}"))
                || name.ends_with(&format!("/{path}.rs"))
                || name.contains(&format!("/{path}/"))
        });
        found.map(|(_, text)| text.as_str()).collect()
    }

    /// Why the tree has nothing of this name.
    fn missing(&self, span: &str) -> Option<String> {
        let span = span.trim_end_matches("()");
        if FOREIGN.contains(&span) {
            return None;
        }
        let is_path = [".rs", ".cu", ".sh", ".toml"]
            .iter()
            .any(|end| span.contains(end));
        let is_path = is_path || span.contains('/');
        if is_path {
            let (path, name) = match span.split_once("::") {
                Some((path, name)) => (path, Some(name)),
                None => (span, None),
            };
            let files = self.of_path(path);
            if files.is_empty() {
                return Some(format!("no file or folder `{path}`"));
            }
            let name = name.filter(|name| !files.iter().any(|text| Self::has_word(text, name)));
            return name.map(|name| format!("`{path}` has no `{name}`"));
        }
        let is_name = |c: char| is_word(c) || c == ':';
        if !span.chars().all(is_name) || !span.starts_with(|c: char| c.is_alphabetic()) {
            return None;
        }
        let parts: Vec<&str> = span.split("::").collect();
        let path = parts[..parts.len() - 1].join("/");
        let name = parts[parts.len() - 1];
        let of_modules = self.of_path(&path);
        let has = |text: &str| Self::has_word(text, name);
        let is_there = match path.as_str() {
            "" => !self.of_path(name).is_empty() || self.texts().any(has),
            _ if !of_modules.is_empty() => of_modules.into_iter().any(has),
            // A type's: in a file that names both.
            _ => {
                let owner = parts[parts.len() - 2];
                self.texts()
                    .any(|text| has(text) && Self::has_word(text, owner))
            }
        };
        (!is_there).then(|| format!("nothing of the name `{span}`"))
    }
}

fn tree() -> Tree {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in ["src", "tests", "configs", "benches"] {
        read_all(root, &root.join(folder), &mut files);
    }
    // The names of this file prove nothing.
    let own = files
        .iter_mut()
        .find(|(name, _)| name == "tests/app/architecture.rs");
    own.unwrap().1.clear();
    Tree(files)
}

#[test]
fn what_architecture_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join("ARCHITECTURE.md")).unwrap();
    let (tree, names) = (tree(), named(&text));
    assert!(names.len() > 100, "only {} names were read", names.len());
    let missing: Vec<String> = names.iter().filter_map(|name| tree.missing(name)).collect();
    assert!(
        missing.is_empty(),
        "ARCHITECTURE.md:\n{}",
        missing.join("\n")
    );
}

#[test]
fn a_name_that_is_not_there_is_found() {
    let tree = Tree(vec![
        ("src/a/b.rs".into(), "struct Made; fn make_one() {}".into()),
        ("src/c/mod.rs".into(), "impl Made { fn grow() {} }".into()),
    ]);
    let text = "`a/b.rs::Made` ```\n`none.rs`\n``` `{a,c}/b.rs` `b::make_one` `b::make` `Made::grow` `Made::shrink` `x ≤ y`";
    let names = named(text);
    let missing: Vec<String> = names.iter().filter_map(|name| tree.missing(name)).collect();
    assert_eq!(
        missing,
        [
            "no file or folder `c/b.rs`",
            "nothing of the name `b::make`",
            "nothing of the name `Made::shrink`"
        ]
    );
}

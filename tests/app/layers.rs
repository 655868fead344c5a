//! The layers of `src/lib.rs`: an import never points up.

use std::{collections::BTreeMap, fs, path::Path};

fn source(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The layer of each module: modules in one paragraph of `lib.rs` are side by side.
fn layers() -> BTreeMap<String, usize> {
    let text = source("lib.rs");
    let paragraphs = text.split("\n\n").map(|paragraph| {
        let modules = paragraph.lines().filter_map(|line| {
            let (_, name) = line
                .split_once("mod ")
                .filter(|(before, _)| ["pub ", "pub(crate) ", ""].contains(before))?;
            Some(name.strip_suffix(';')?.to_string())
        });
        modules.collect::<Vec<_>>()
    });
    let filled = paragraphs.filter(|modules| !modules.is_empty());
    filled
        .enumerate()
        .flat_map(|(layer, modules)| modules.into_iter().map(move |module| (module, layer)))
        .collect()
}

/// First segments of all paths below `crate::`, groups in braces included, with their line.
fn crate_paths(text: &str) -> Vec<(usize, String)> {
    let code: Vec<&str> = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect();
    let code = code.join("\n");
    let mut found = Vec::new();
    for (start, _) in code.match_indices("crate::") {
        let line = code[..start].matches('\n').count() + 1;
        let rest = &code[start + "crate::".len()..];
        let segment = |text: &str| -> String {
            let text = text.trim_start();
            let is_word = |c: char| c.is_alphanumeric() || c == '_';
            text.chars().take_while(|c| is_word(*c)).collect()
        };
        if !rest.starts_with('{') {
            found.push((line, segment(rest)));
            continue;
        }
        let mut depth = 0;
        for (at, c) in rest.char_indices() {
            match c {
                '{' => depth += 1,
                '}' => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                break;
            }
            if depth == 1 && (c == '{' || c == ',') {
                let line = line + rest[..at].matches('\n').count();
                found.push((line, segment(&rest[at + 1..])));
            }
        }
    }
    found
}

fn rust_files(folder: &Path, files: &mut Vec<std::path::PathBuf>) {
    let entries = fs::read_dir(folder).unwrap();
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

#[test]
fn an_import_never_points_up() {
    let layers = layers();
    assert!(layers.len() > 10, "{layers:?}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    rust_files(&root, &mut files);
    let mut upward = Vec::new();
    let mut read = 0;
    for file in files {
        let name = file.strip_prefix(&root).unwrap();
        let first = name.iter().next().unwrap().to_string_lossy();
        let Some(own) = layers.get(first.trim_end_matches(".rs")) else {
            assert!(
                ["lib.rs", "main.rs"].contains(&&*first),
                "{first} has no layer"
            );
            continue;
        };
        for (line, module) in crate_paths(&fs::read_to_string(&file).unwrap()) {
            read += 1;
            if layers.get(&module).is_some_and(|layer| layer > own) {
                upward.push(format!("src/{}:{line} imports `{module}`", name.display()));
            }
        }
    }
    assert!(read > 500, "only {read} imports were read");
    assert!(
        upward.is_empty(),
        "imports of a higher layer:\n{}",
        upward.join("\n")
    );
}

#[test]
fn paths_are_read_in_every_form() {
    let text = "use crate::base::files;\n// crate::train\nuse crate::{\n    ops::{Ops, cast::to_f32},\n    train,\n};\nfn f() { crate::bench::run() }\n";
    let found = crate_paths(text);
    let found: Vec<(usize, &str)> = found.iter().map(|(l, m)| (*l, m.as_str())).collect();
    assert_eq!(
        found,
        [(1, "base"), (3, "ops"), (4, "train"), (5, ""), (7, "bench")]
    );
}

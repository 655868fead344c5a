//! The layers of `src/lib.rs`: an import never points up, and no two files import each other, directly or
//! through others.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

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

/// Files that call each other by design: the default of an operation is made of other operations.
const OPERATIONS: [&str; 5] = [
    "ops/forward.rs",
    "ops/plain.rs",
    "ops/quantised/matmul.rs",
    "ops/quantised/training.rs",
    "ops/training.rs",
];

type ModulePath = Vec<String>;

/// `text` without comments and without the module of tests at its end.
fn without_tests(text: &str) -> String {
    let lines = text.lines().map(|line| match line.split_once("//") {
        Some((before, _)) if !before.contains('"') => before,
        _ => line,
    });
    let mut code = String::new();
    let mut is_test = false;
    for line in lines {
        if is_test && line.starts_with("mod ") && line.ends_with('{') {
            break;
        }
        is_test = line.starts_with("#[cfg(") && line.contains("test")
            || is_test && line.starts_with("#[");
        code.push_str(line);
        code.push('\n');
    }
    code
}

/// The paths of a `use`, its groups in braces written out, each with the name it brings in.
fn written_out(tree: &str) -> Vec<(String, String)> {
    let tree = tree.trim();
    let Some(brace) = tree.find('{') else {
        let (path, name) = tree.split_once(" as ").unwrap_or((tree, tree));
        let name = name.rsplit("::").next().unwrap_or_default();
        return vec![(path.trim().to_string(), name.trim().to_string())];
    };
    let (start, inside) = (&tree[..brace], &tree[brace + 1..]);
    let (mut depth, mut from, mut all) = (0, 0, Vec::new());
    for (at, c) in inside.char_indices() {
        match c {
            '{' => depth += 1,
            '}' if depth > 0 => depth -= 1,
            ',' | '}' if depth == 0 => {
                let part = inside[from..at].trim();
                if !part.is_empty() {
                    all.extend(written_out(&format!("{start}{part}")));
                }
                from = at + 1;
                if c == '}' {
                    break;
                }
            }
            _ => {}
        }
    }
    all
}

/// An import: whether it is handed on, its path, the name it brings in.
type Import = (bool, String, String);

/// The `use` lines of some code, and the paths in the rest of it that begin with a module of this crate.
fn imports(code: &str, children: &BTreeSet<String>) -> Vec<Import> {
    let mut found = Vec::new();
    let mut rest = String::new();
    for statement in code.split_inclusive(';') {
        let start = statement.find("use ").filter(|at| {
            let before = statement[..*at].lines().last().unwrap_or_default().trim();
            before.is_empty() || before == "pub" || before.starts_with("pub(")
        });
        let Some(at) = start else {
            rest.push_str(statement);
            continue;
        };
        rest.push_str(&statement[..at]);
        let before = statement[..at].lines().last().unwrap_or_default();
        let tree = statement[at + 4..].trim_end_matches(';').replace('\n', " ");
        for (path, name) in written_out(&tree) {
            found.push((before.trim().starts_with("pub"), path, name));
        }
    }
    let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == ':';
    for path in rest.split(|c: char| !is_word(c)) {
        let first = path.split("::").next().unwrap_or_default();
        if path.contains("::") && (["crate", "super"].contains(&first) || children.contains(first))
        {
            found.push((false, path.to_string(), String::new()));
        }
    }
    found
}

/// The files of the crate as modules, with what each imports.
struct Modules {
    files: BTreeMap<ModulePath, String>,
    imports: BTreeMap<ModulePath, Vec<Import>>,
}

impl Modules {
    fn read() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
        let mut paths = Vec::new();
        rust_files(&root, &mut paths);
        let mut files = BTreeMap::new();
        let mut code = BTreeMap::new();
        for path in paths {
            let name = path
                .strip_prefix(&root)
                .unwrap()
                .to_string_lossy()
                .into_owned();
            let stem = name.trim_end_matches(".rs").trim_end_matches("/mod");
            let module: ModulePath = match stem {
                "main" => continue,
                "lib" => Vec::new(),
                stem => stem.split('/').map(str::to_string).collect(),
            };
            // Files of tests alone may import whatever they test.
            if module.iter().any(|name| name.ends_with("tests")) {
                continue;
            }
            code.insert(
                module.clone(),
                without_tests(&fs::read_to_string(&path).unwrap()),
            );
            files.insert(module, name);
        }
        let children = |of: &ModulePath| -> BTreeSet<String> {
            let below = files.keys().filter(|module| module.len() == of.len() + 1);
            below
                .filter(|module| module.starts_with(of))
                .map(|module| module[of.len()].clone())
                .collect()
        };
        let imports = code
            .iter()
            .map(|(module, code)| (module.clone(), imports(code, &children(module))))
            .collect();
        Self { files, imports }
    }

    /// The file that defines what `path` in `module` names: through `pub use` of the files between.
    fn definer(
        &self,
        module: &ModulePath,
        path: &str,
        seen: &mut BTreeSet<String>,
    ) -> Option<ModulePath> {
        let mut at = module.clone();
        let mut names: Vec<&str> = path.split("::").filter(|name| !name.is_empty()).collect();
        match *names.first()? {
            "crate" => {
                at.clear();
                names.remove(0);
            }
            "super" | "self" => {
                while let Some(first) = names
                    .first()
                    .filter(|name| ["super", "self"].contains(name))
                {
                    if *first == "super" {
                        at.pop();
                    }
                    names.remove(0);
                }
            }
            first => {
                at.push(first.to_string());
                if !self.files.contains_key(&at) {
                    return None;
                }
                at.pop();
            }
        }
        for (index, name) in names.iter().enumerate() {
            at.push((*name).to_string());
            if self.files.contains_key(&at) {
                continue;
            }
            at.pop();
            let handed_on = self.imports[&at]
                .iter()
                .find(|(public, _, new)| *public && new == name);
            return match handed_on {
                Some((_, from, _)) if seen.insert(format!("{at:?} {name}")) => {
                    let rest = names[index + 1..].iter().map(|name| format!("::{name}"));
                    let from = format!("{from}{}", rest.collect::<String>());
                    self.definer(&at, &from, seen).or(Some(at))
                }
                _ => Some(at),
            };
        }
        Some(at)
    }

    /// The files that each imports, with the paths; a parent and its own modules are one.
    fn arrows(&self) -> BTreeMap<&str, BTreeMap<&str, &str>> {
        let mut arrows: BTreeMap<&str, BTreeMap<&str, &str>> = BTreeMap::new();
        for (module, imports) in &self.imports {
            for (_, path, _) in imports {
                let Some(other) = self.definer(module, path, &mut BTreeSet::new()) else {
                    continue;
                };
                let (from, to) = (self.files[module].as_str(), self.files[&other].as_str());
                let of_a_family = other.starts_with(module) || module.starts_with(&other);
                let by_design = OPERATIONS.contains(&from) && OPERATIONS.contains(&to);
                if !of_a_family && !by_design {
                    arrows.entry(from).or_default().insert(to, path);
                }
            }
        }
        arrows
    }
}

/// The arrows of one circle, if there is any: files that import nothing, or only such, are taken away until the
/// others each import one that stays.
fn circle(mut arrows: BTreeMap<&str, BTreeMap<&str, &str>>) -> Vec<String> {
    loop {
        let importing: BTreeSet<&str> = arrows.keys().copied().collect();
        for to in arrows.values_mut() {
            to.retain(|to, _| importing.contains(to));
        }
        arrows.retain(|_, to| !to.is_empty());
        if arrows.len() == importing.len() {
            break;
        }
    }
    let Some(mut at) = arrows.keys().next().copied() else {
        return Vec::new();
    };
    let mut walked: Vec<(&str, String)> = Vec::new();
    while walked.iter().all(|(from, _)| *from != at) {
        let (to, path) = arrows[at].iter().next().unwrap();
        walked.push((at, format!("src/{at} imports `{path}` of src/{to}")));
        at = to;
    }
    let circle = walked.into_iter().skip_while(|(from, _)| *from != at);
    circle.map(|(_, line)| line).collect()
}

#[test]
fn files_import_each_other_in_no_circle() {
    let modules = Modules::read();
    let arrows = modules.arrows();
    let count: usize = arrows.values().map(BTreeMap::len).sum();
    assert!(count > 1500, "only {count} imports were read");
    let circle = circle(arrows);
    assert!(
        circle.is_empty(),
        "files that import each other in a circle:\n{}",
        circle.join("\n")
    );
}

#[test]
fn a_circle_is_named_through_what_hands_names_on() {
    let code = "pub use b::Made;\nuse super::{\n    c::{One, Two as Three},\n    d,\n};\nfn f() { crate::e::g() }\n";
    let children = BTreeSet::from(["b".to_string()]);
    let found = imports(code, &children);
    let found: Vec<(bool, &str, &str)> = found
        .iter()
        .map(|(p, a, n)| (*p, a.as_str(), n.as_str()))
        .collect();
    let expected = [
        (true, "b::Made", "Made"),
        (false, "super::c::One", "One"),
        (false, "super::c::Two", "Three"),
        (false, "super::d", "d"),
        (false, "crate::e::g", ""),
    ];
    assert_eq!(found, expected);
    let module = |path: &str| -> ModulePath { path.split("::").map(str::to_string).collect() };
    let parts = [
        ("a", "a/mod.rs", "pub use b::Made;"),
        ("a::b", "a/b.rs", "use crate::c::Other;"),
        ("c", "c.rs", "use crate::{a::Made, d::Last};"),
        ("d", "d.rs", ""),
    ];
    let mut modules = Modules {
        files: BTreeMap::from([(Vec::new(), "lib.rs".to_string())]),
        imports: BTreeMap::from([(Vec::new(), Vec::new())]),
    };
    for (path, file, code) in parts {
        modules.files.insert(module(path), file.to_string());
        modules
            .imports
            .insert(module(path), imports(code, &children));
    }
    assert_eq!(
        circle(modules.arrows()),
        [
            "src/a/b.rs imports `crate::c::Other` of src/c.rs",
            "src/c.rs imports `crate::a::Made` of src/a/b.rs"
        ]
    );
}

//! The READMEs name a test for what they say: each of them is there.

use std::{collections::BTreeSet, fs, path::Path};

use crate::repository;

/// All Rust source of a folder, joined.
fn source(folder: &Path) -> String {
    let mut all = String::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all += &source(&path);
        } else if path.extension().is_some_and(|ending| ending == "rs") {
            all += &fs::read_to_string(path).unwrap();
        }
    }
    all
}

#[test]
fn every_test_that_a_readme_names_is_there() {
    let root = repository();
    let suites =
        ["tests/app", "tests/parity", "src"].map(|folder| (folder, source(&root.join(folder))));
    for name in ["README.md", "README.zh.md"] {
        let text = fs::read_to_string(root.join(name)).unwrap();
        // Every second piece is in backticks.
        let named: BTreeSet<&str> = text.split('`').skip(1).step_by(2).collect();
        let mut seen = 0;
        for code in named {
            let (folder, path) = match code.split_once(' ') {
                Some(("app", path)) => ("tests/app", path),
                Some(("parity", path)) => ("tests/parity", path),
                None if code.contains("::tests") => ("src", code),
                _ => continue,
            };
            if path.contains([' ', '…']) {
                continue;
            }
            seen += 1;
            let (_, own) = suites.iter().find(|(suite, _)| *suite == folder).unwrap();
            let (module, test) = match path.rsplit_once("::") {
                Some((module, "tests")) => (module, None),
                Some((module, test)) => (module, Some(test)),
                None => (path, None),
            };
            if let Some(test) = test {
                assert!(own.contains(&format!("fn {test}(")), "{name}: `{code}`");
            }
            let module = module.trim_end_matches("::tests").replace("::", "/");
            let places = [
                format!("{module}.rs"),
                format!("{module}/mod.rs"),
                format!("{module}/tests.rs"),
            ];
            let found = places
                .iter()
                .any(|place| root.join(folder).join(place).is_file());
            assert!(found, "{name}: `{code}`, none of {places:?} in {folder}");
        }
        assert!(seen > 30, "{name} names {seen} tests");
    }
}

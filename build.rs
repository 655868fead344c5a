//! What `--version` says of the build: commit, features, target. Needs no git; without it the commit is `unknown`.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    // What the program is built from. A commit alone changes none of it, and rebuilds nothing: the commit that is
    // named is the one whose sources were compiled.
    for path in ["build.rs", "src", "Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={path}");
    }
    // For builds without the repository's history, as in a container.
    println!("cargo::rerun-if-env-changed=XRAY_COMMIT");
    println!("cargo::rustc-env=XRAY_COMMIT={}", commit());
    println!("cargo::rustc-env=XRAY_FEATURES={}", features().join(" "));
    println!("cargo::rustc-env=XRAY_DEVICES={}", devices().join(" "));
    println!("cargo::rustc-env=XRAY_TARGET={}", variable("TARGET"));
    println!("cargo::rustc-env=XRAY_PROFILE={}", variable("PROFILE"));
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_default()
}

/// The features that are on, as Cargo.toml spells them.
fn features() -> Vec<String> {
    let mut names: Vec<String> = env::vars()
        .filter_map(|(name, _)| Some(name.strip_prefix("CARGO_FEATURE_")?.to_lowercase()))
        .filter(|name| name != "default")
        .collect();
    names.sort();
    names
}

/// What `--device` can name in this build.
fn devices() -> Vec<&'static str> {
    [("CUDA", "cuda"), ("WGPU", "wgpu"), ("FLEX", "cpu")]
        .into_iter()
        .filter(|(feature, _)| env::var_os(format!("CARGO_FEATURE_{feature}")).is_some())
        .map(|(_, device)| device)
        .collect()
}

/// The commit as given, as git or the package says, or `unknown`; with `-dirty` where sources differ from it.
fn commit() -> String {
    let given = variable("XRAY_COMMIT");
    let root = PathBuf::from(variable("CARGO_MANIFEST_DIR"));
    [Some(given), of_git(&root), of_package(&root)]
        .into_iter()
        .flatten()
        .find(|commit| is_plain(commit))
        .unwrap_or_else(|| "unknown".to_string())
}

/// Whether a text can be a commit: nothing that would break the line cargo reads.
fn is_plain(commit: &str) -> bool {
    !commit.is_empty()
        && commit
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

fn of_git(root: &Path) -> Option<String> {
    let git = |args: &[&str]| {
        let output = Command::new("git")
            .arg("-C")
            .arg(root)
            .args(args)
            .output()
            .ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_string())
    };
    // A repository further up, such as one of a home folder, is another one.
    let top = fs::canonicalize(git(&["rev-parse", "--show-toplevel"])?).ok()?;
    if top != fs::canonicalize(root).ok()? {
        return None;
    }
    let commit = git(&["rev-parse", "--short=9", "HEAD"])?;
    let changed = git(&[
        "status",
        "--porcelain",
        "--",
        "src",
        "build.rs",
        "Cargo.toml",
        "Cargo.lock",
    ])?;
    Some(match changed.is_empty() {
        true => commit,
        false => format!("{commit}-dirty"),
    })
}

/// What `cargo package` writes beside the sources it packs.
fn of_package(root: &Path) -> Option<String> {
    let text = fs::read_to_string(root.join(".cargo_vcs_info.json")).ok()?;
    let (_, rest) = text.split_once("\"sha1\"")?;
    let sha = rest.split('"').nth(1)?;
    Some(sha.get(..9)?.to_string())
}

//! Between the program and the shell it was called from: paths, pipes, and commands to be typed.

use std::path::{Path, PathBuf};

use super::usage::UsageError;
use crate::dataset::map_paths;

/// A path that comes with the repository: as given, or beside the sources the program was built from.
pub(super) fn shipped(path: &Path) -> PathBuf {
    if path.exists() || path.is_absolute() {
        return path.to_path_buf();
    }
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if beside.exists() {
        beside
    } else {
        path.to_path_buf()
    }
}

/// The name of data sets: phantoms as they are, files as [`shipped`] finds them.
pub(super) fn shipped_data(name: &str) -> String {
    map_paths(name, |path| {
        if path.starts_with("phantom:") {
            path.to_owned()
        } else {
            shipped(Path::new(path)).display().to_string()
        }
    })
}

/// Refuses to write into a folder that is there.
pub(super) fn expect_new(output: &Path) -> Result<(), UsageError> {
    if output.exists() {
        return Err(UsageError(format!(
            "`{}` is there already; name a new folder with --output",
            output.display()
        )));
    }
    Ok(())
}

/// A reader that has seen enough, such as `head`, is no failure.
pub(super) fn unless_closed(printed: std::io::Result<()>) -> std::io::Result<()> {
    match printed {
        Err(cause) if cause.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

/// The program as it was called, for commands that are printed to be typed.
pub(super) fn program() -> String {
    let called = std::env::args_os().next();
    let called = called.map(|name| name.to_string_lossy().into_owned());
    shell_word(&called.unwrap_or_else(|| "xray-qwen3vl".to_string()))
}

/// A word as a shell takes it, in quotes where it has to be.
pub(super) fn shell_word(word: &str) -> String {
    let plain = |c: char| c.is_alphanumeric() || "/._-+:,=@%~".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_string()
    } else {
        format!("'{}'", word.replace('\'', "'\\''"))
    }
}

//! Between the program and the shell it was called from: outputs, pipes, and commands to be typed.

use std::path::Path;

use super::usage::UsageError;

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

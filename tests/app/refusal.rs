//! How the program says no: one line on stderr, nothing on stdout, soon.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use crate::infer;

/// Longest time until a refusal.
const SOON: Duration = Duration::from_secs(20);

/// One wrong use of `infer`.
pub(crate) struct Case {
    pub(crate) name: &'static str,
    pub(crate) args: Vec<String>,
    pub(crate) code: i32,
    /// Pieces of the message.
    pub(crate) says: Vec<String>,
}

/// A case from borrowed texts.
pub(crate) fn case(name: &'static str, args: &[&str], code: i32, says: &[&str]) -> Case {
    let owned = |texts: &[&str]| texts.iter().map(|text| text.to_string()).collect();
    Case {
        name,
        args: owned(args),
        code,
        says: owned(says),
    }
}

/// Runs every case; the failure lists all that went wrong, by name.
pub(crate) fn check(folder: &Path, cases: &[Case]) {
    let mut report = String::new();
    for case in cases {
        let args: Vec<&str> = case.args.iter().map(String::as_str).collect();
        let started = Instant::now();
        let (code, stdout, stderr) = infer(folder, &args);
        let mut problems = refusal_problems(code, case.code, &stdout, &stderr);
        if started.elapsed() > SOON {
            problems.push(format!("it took {:.1?}", started.elapsed()));
        }
        for piece in case.says.iter().filter(|piece| !stderr.contains(*piece)) {
            problems.push(format!("the message lacks `{piece}`"));
        }
        if !problems.is_empty() {
            report.push_str(&format!(
                "\n{}: {}\n  stderr: {}",
                case.name,
                problems.join("; "),
                stderr.trim_end().replace('\n', "\n          ")
            ));
        }
    }
    assert!(report.is_empty(), "{report}");
}

/// What is wrong with a refusal.
pub(crate) fn refusal_problems(
    code: i32,
    expected: i32,
    stdout: &str,
    stderr: &str,
) -> Vec<String> {
    let mut problems = Vec::new();
    if code != expected {
        problems.push(format!("exit code {code}, expected {expected}"));
    }
    if !stdout.is_empty() {
        problems.push(format!("stdout is not empty: {}", stdout.trim_end()));
    }
    let errors = stderr
        .lines()
        .filter(|line| line.starts_with("error: "))
        .count();
    // Wrong usage may be followed by the right one.
    if errors != 1 || (expected == 1 && stderr.lines().count() != 1) {
        problems.push("stderr is not one line `error: …`".to_string());
    }
    for word in ["panicked", "RUST_BACKTRACE", "internal error"] {
        if stderr.contains(word) {
            problems.push(format!("stderr holds `{word}`"));
        }
    }
    problems
}

//! `completions` and `man`: what a shell completes, and pages for `man`.

use std::{
    fs,
    io::{Write, stdout},
    path::PathBuf,
};

use anyhow::{Context, Result};
use clap::{Args, Command, ValueEnum};
use clap_complete::{Shell, generate};

use super::shell::{shell_word, unless_closed};

/// Name of the program in completions and pages.
const NAME: &str = "xray-qwen3vl";

/// Shells that completions can be written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ShellName {
    /// Bash.
    Bash,
    /// Zsh.
    Zsh,
    /// Fish.
    Fish,
    /// PowerShell.
    Powershell,
    /// Elvish.
    Elvish,
}

impl From<ShellName> for Shell {
    fn from(name: ShellName) -> Self {
        match name {
            ShellName::Bash => Self::Bash,
            ShellName::Zsh => Self::Zsh,
            ShellName::Fish => Self::Fish,
            ShellName::Powershell => Self::PowerShell,
            ShellName::Elvish => Self::Elvish,
        }
    }
}

/// Arguments of `completions`.
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: ShellName,
}

/// Runs `completions` for `program`, the whole command line: the script goes to stdout.
///
/// # Errors
/// It cannot be printed.
pub fn run(args: &CompletionsArgs, mut program: Command) -> Result<()> {
    let mut script = Vec::new();
    generate(Shell::from(args.shell), &mut program, NAME, &mut script);
    let mut script = String::from_utf8(script).context("the completions are not UTF-8")?;
    if args.shell == ShellName::Bash {
        // clap_complete spells a hyphen of the program's name in two ways, so that no option of a command is
        // completed (clap-rs/clap#6421).
        let (first, second) = NAME.split_once('-').unwrap_or((NAME, ""));
        script = script.replace(
            &format!("{first}__subcmd__{second}"),
            &format!("{first}__{second}"),
        );
    }
    unless_closed(stdout().lock().write_all(script.as_bytes()))
        .context("cannot print the completions")
}

/// Arguments of `man`.
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Folder for the pages, one for the program and one for each command; files of the same names are replaced.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
}

/// Runs `man` for `program`, the whole command line.
///
/// # Errors
/// The folder or a page cannot be written.
pub fn run_man(args: &ManArgs, program: Command) -> Result<()> {
    fs::create_dir_all(&args.output)
        .with_context(|| format!("cannot make the folder `{}`", args.output.display()))?;
    clap_mangen::generate_to(program, &args.output)
        .with_context(|| format!("cannot write the pages to `{}`", args.output.display()))?;
    let first = args.output.join(format!("{NAME}.1"));
    println!(
        "wrote `{}` and a page for each command; `man -l {}` shows it",
        first.display(),
        shell_word(&first.display().to_string())
    );
    Ok(())
}

//! `config`: a run's settings as they will be used, an example, and the schema for editors.

use std::{
    fmt::Write as _,
    io::{Write, stdout},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use super::{
    shell::unless_closed,
    shipped::{config_names, config_text, shipped},
    train::settings::with_keys,
    usage::UsageError,
};
use crate::{
    base::files::nearest::nearest,
    train::config::{TrainConfig, schema::config_schema},
};

/// Arguments of `config`.
#[derive(Debug, Args)]
pub struct ConfigArgs {
    /// What is printed.
    #[command(subcommand)]
    pub command: ConfigCommand,
}

/// What `config` prints.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// All keys of a run with the values it would use, defaults included, after checking them.
    Show(ShowArgs),
    /// A config that comes with the program, with its comments; `openi-lora` explains every key.
    Example {
        /// Its name: openi-lora, thinking-lora, tiny …
        #[arg(value_name = "NAME", default_value = "openi-lora")]
        name: String,
    },
    /// The JSON schema of a config file.
    Schema,
}

/// Arguments of `config show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Config file of the run.
    #[arg(long, value_name = "FILE", default_value = "configs/tiny.toml")]
    pub config: PathBuf,
    /// Any key of the config file, as in `train`; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Print one JSON object, in which keys without a value are null.
    #[arg(long)]
    pub json: bool,
}

/// Runs `config`.
///
/// # Errors
/// The file cannot be read, or a key cannot be used; the message names it.
pub fn run(args: ConfigArgs) -> Result<()> {
    let text = match args.command {
        ConfigCommand::Show(args) => show(&args)?,
        ConfigCommand::Example { name } => example(&name)?.to_string(),
        ConfigCommand::Schema => serde_json::to_string_pretty(&config_schema())? + "\n",
    };
    unless_closed(stdout().lock().write_all(text.as_bytes())).context("cannot print the config")
}

fn show(args: &ShowArgs) -> Result<String> {
    let config = TrainConfig::from_file(&shipped(&args.config))?;
    let config = with_keys(&config, &args.set)?;
    config
        .validate()
        .map_err(|error| UsageError(error.to_string()))?;
    if args.json {
        return Ok(serde_json::to_string(&config)? + "\n");
    }
    let mut text = config.to_toml();
    let given = toml::Table::try_from(&config).context("cannot read the settings back")?;
    for key in TrainConfig::keys() {
        if !given.contains_key(&key) {
            let _ = writeln!(text, "# {key} is not set");
        }
    }
    Ok(text)
}

fn example(name: &str) -> Result<&'static str, UsageError> {
    let stem = Path::new(name)
        .file_stem()
        .map(|stem| stem.to_string_lossy());
    config_text(stem.as_deref().unwrap_or(name)).ok_or_else(|| {
        let known = config_names();
        let near = nearest(name, known.iter().copied());
        let near = near.map_or_else(String::new, |near| format!("; did you mean `{near}`?"));
        UsageError(format!(
            "there is no example `{name}`, only {}{near}",
            known.join(", ")
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_a_whole_config_again() {
        let args = ShowArgs {
            config: Path::new(env!("CARGO_MANIFEST_DIR")).join("configs/tiny.toml"),
            set: vec!["lora_rank=3".into()],
            json: false,
        };
        let text = show(&args).unwrap();
        let read: TrainConfig = toml::from_str(&text).unwrap();
        assert_eq!((read.lora_rank, read.save_steps), (3, 120));
        for key in TrainConfig::keys() {
            let is_there = |line: &str| {
                line.starts_with(&format!("{key} = ")) || line == format!("# {key} is not set")
            };
            assert!(text.lines().any(is_there), "no `{key}` in\n{text}");
        }
    }

    #[test]
    fn an_example_is_found_by_name_or_path_and_else_the_nearest_is_named() {
        assert!(
            example("configs/openi-lora.toml")
                .unwrap()
                .contains("lora_rank = 8")
        );
        let error = example("openi-lra").unwrap_err().to_string();
        assert!(error.contains("did you mean `openi-lora`?"), "{error}");
    }
}

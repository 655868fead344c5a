//! The settings of a run as they were typed: its file, and flags over single keys.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{
    args::TrainArgs,
    settings::{from_table, set_keys},
};
use crate::{commands::shipped::shipped, dataset::data_names, train::config::TrainConfig};

/// The run without arguments.
const DEFAULT_CONFIG: &str = "configs/tiny.toml";

/// Reads the config file and puts over it what flags say.
pub(super) fn load_config(args: &TrainArgs) -> Result<TrainConfig> {
    let path = shipped(args.config.as_deref().unwrap_or(Path::new(DEFAULT_CONFIG)));
    let config = TrainConfig::from_file(&path).map_err(anyhow::Error::from)?;
    let mut table = toml::Table::try_from(&config).context("cannot read the settings back")?;
    let mut set = |key: &str, value: toml::Value| {
        table.insert(key.to_string(), value);
    };
    let text = |path: &PathBuf| toml::Value::String(path.display().to_string());
    if let Some(path) = &args.model {
        set("model", text(path));
    }
    for (key, path) in [
        ("mmproj", &args.gguf.mmproj),
        ("tokenizer", &args.gguf.tokenizer),
    ] {
        if let Some(path) = path {
            set(key, text(path));
        }
    }
    if let Some(path) = &args.adapter {
        set("adapter", text(path));
    }
    if let Some(data) = &args.train_data {
        set("train_data", data.clone().into());
    }
    if let Some(data) = &args.val_data {
        set("val_data", data.clone().into());
    }
    if let Some(columns) = &args.columns {
        let columns = columns
            .theirs()
            .map(|(ours, theirs)| (ours.to_owned(), theirs.into()));
        set("columns", toml::Value::Table(columns.collect()));
    }
    if args.allow_image_urls {
        set("allow_image_urls", true.into());
    }
    if let Some(path) = &args.output_dir {
        set("output_dir", text(path));
    }
    if !args.device.is_empty() {
        set("device", args.device.clone().into());
    }
    if let Some(dtype) = args.dtype {
        let name = clap::ValueEnum::to_possible_value(&dtype);
        set(
            "dtype",
            name.map_or_else(String::new, |name| name.get_name().to_string())
                .into(),
        );
    }
    if let Some(seed) = args.seed {
        set("seed", (seed as i64).into());
    }
    if let Some(generate) = args.eval_generate {
        set("eval_generate", (generate as i64).into());
    }
    if let Some(objective) = args.objective {
        set("objective", objective.name().into());
    }
    if let Some(reduction) = args.loss_reduction {
        let name = clap::ValueEnum::to_possible_value(&reduction);
        set(
            "loss_reduction",
            name.map_or_else(String::new, |name| name.get_name().to_string())
                .into(),
        );
    }
    if args.packing || args.packing_tokens.is_some() {
        set("packing", true.into());
    }
    if let Some(tokens) = args.packing_tokens {
        set("packing_tokens", (tokens as i64).into());
    }
    if args.deterministic {
        set("deterministic", true.into());
    }
    set_keys(&mut table, &args.set)?;
    from_table(table)
}

/// Share held out where a run is given training data of its own and no validation data.
const HELD_OUT: f64 = 0.05;

/// Drawn images say nothing about radiographs: a run that is given radiographs to learn from does not validate on the
/// drawn ones of its config, but on studies held out of its own data.
pub(super) fn validate_on_own_data(args: &TrainArgs, config: &mut TrainConfig) {
    let sample = Path::new("data/sample");
    let is_drawn = |name: &str| {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
        let names = data_names(name).unwrap_or_default();
        let mut paths = names.iter().map(|name| name.path.as_str());
        !names.is_empty()
            && paths.all(|name| {
                let path = Path::new(name);
                name.starts_with("phantom:")
                    || path.starts_with(sample)
                    || path.starts_with(repository.join(sample))
            })
    };
    let is_set = |key: &str| {
        let mut pairs = args.set.iter().filter_map(|pair| pair.split_once('='));
        pairs.any(|(name, _)| name.trim() == key)
    };
    let own = (args.train_data.is_some() || is_set("train_data")) && !is_drawn(&config.train_data);
    let asked = args.val_data.is_some() || is_set("val_data");
    if !own || asked || !config.val_data.as_deref().is_some_and(is_drawn) {
        return;
    }
    config.val_data = None;
    if !is_set("split_dataset_ratio") {
        config.split_dataset_ratio = HELD_OUT;
    }
}

/// The folder itself, or the first of `NAME-2`, `NAME-3` … that is free.
pub(super) fn free_folder(folder: &Path) -> PathBuf {
    (1..)
        .map(|number| match number {
            1 => folder.to_path_buf(),
            number => PathBuf::from(format!("{}-{number}", folder.display())),
        })
        .find(|folder| !folder.exists())
        .unwrap_or_else(|| folder.to_path_buf())
}

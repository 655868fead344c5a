//! What was typed becomes keys of a run's settings; what is no key is named with the nearest one.

use anyhow::{Context, Result};
use clap::{
    Args, Command,
    error::{ContextKind, ContextValue, ErrorKind},
};

use super::args::TrainArgs;
use crate::{
    commands::usage::UsageError,
    train::config::{TrainConfig, explain, nearest},
};

/// A config with single keys replaced by `KEY=VALUE` pairs.
pub(in crate::commands) fn with_keys(
    config: &TrainConfig,
    pairs: &[String],
) -> Result<TrainConfig> {
    let mut table = toml::Table::try_from(config).context("cannot read the settings back")?;
    set_keys(&mut table, pairs)?;
    from_table(table)
}

pub(super) fn from_table(table: toml::Table) -> Result<TrainConfig> {
    table
        .try_into()
        .map_err(|error: toml::de::Error| UsageError(explain(error.to_string().trim())).into())
}

pub(super) fn set_keys(table: &mut toml::Table, pairs: &[String]) -> Result<()> {
    let known = TrainConfig::keys();
    for pair in pairs {
        let wrong = |what: String| UsageError(format!("--set `{pair}`: {what}"));
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| wrong("expected KEY=VALUE".into()))?;
        let (key, value) = (key.trim(), value.trim());
        if !known.iter().any(|known| known == key) {
            return Err(wrong(crate::train::config::unknown_key(key)).into());
        }
        // A bare word is a string.
        let parsed = format!("v = {value}")
            .parse::<toml::Table>()
            .ok()
            .and_then(|mut table| table.remove("v"));
        let parsed = match parsed {
            Some(parsed) => parsed,
            None if value.starts_with('[') && value.ends_with(']') => {
                let words = value.trim_matches(['[', ']']).split(',');
                let words: Vec<String> = words.map(|word| format!("{:?}", word.trim())).collect();
                let list = format!("{key}=[{}]", words.join(", "));
                return Err(wrong(format!("a list is written `--set '{list}'`")).into());
            }
            None => value.into(),
        };
        // A whole number where a fraction is meant, a word where a list of words is.
        let parsed = match (table.get(key), parsed) {
            (Some(toml::Value::Array(_)), toml::Value::String(word)) => vec![word].into(),
            (Some(toml::Value::Float(_)), toml::Value::Integer(whole)) => (whole as f64).into(),
            (_, parsed) => parsed,
        };
        table.insert(key.to_string(), parsed);
    }
    Ok(())
}

/// Names of ms-swift's that are flags of another name here.
const ELSEWHERE: &[(&str, &str)] = &[
    ("dataset", "--train-data"),
    ("custom_dataset_info", "--columns"),
    ("val_dataset", "--val-data"),
    ("model_id_or_path", "--model"),
    ("adapters", "--adapter"),
    ("torch_dtype", "--dtype"),
    ("resume_from_checkpoint", "--resume"),
    ("train_dataset", "--train-data"),
    ("data", "--train-data"),
    ("output", "--output-dir"),
    ("train_type", "--set tuner"),
    ("tuner_type", "--set tuner"),
    ("sft_type", "--set tuner"),
    ("lr", "--set learning_rate"),
    ("epochs", "--set num_train_epochs"),
    ("num_epochs", "--set num_train_epochs"),
    ("batch_size", "--set per_device_train_batch_size"),
    ("eval_batch_size", "--set per_device_eval_batch_size"),
    ("lora_r", "--set lora_rank"),
    ("rank", "--set lora_rank"),
    ("lora_dropout_p", "--set lora_dropout"),
    ("lora_target_modules", "--set target_modules"),
    ("num_workers", "--set dataloader_num_workers"),
    ("early_stop_interval", "--set early_stopping_patience"),
];

/// Flags of other trainers that are not needed here, and why.
const NEEDLESS: &[(&str, &str)] = &[
    (
        "model_type",
        "`config.json` in the model's folder says what it is",
    ),
    ("template", "the chat template is the model's own"),
    ("template_type", "the chat template is the model's own"),
    ("attn_impl", "the device decides how attention is computed"),
    (
        "use_flash_attn",
        "the device decides how attention is computed",
    ),
    ("flash_attn", "the device decides how attention is computed"),
    (
        "deepspeed",
        "a device holds a whole model: `--device cuda:0,cuda:1` takes several, `--set quantize=int4` takes less memory",
    ),
    ("bf16", "`--dtype bf16` is the type of the weights"),
    ("fp16", "`--dtype f16` is the type of the weights"),
    ("do_train", "`train` trains"),
    ("stage", "`train` does supervised fine-tuning"),
    ("dataset_dir", "`--train-data` takes the path of a file"),
    (
        "dataset_info",
        "`--train-data` takes the path of a file, `--columns` names its columns",
    ),
];

/// Flags of other programs for what `infer` takes as it is.
const GIVEN_TO_INFER: [&str; 6] = [
    "val_dataset",
    "dataset",
    "data",
    "eval_data",
    "images",
    "image",
];

/// What to write in place of a flag of other programs that `infer` does not have.
fn infer_hint(name: &str, value: &str) -> Option<String> {
    let key = name.replace('-', "_");
    GIVEN_TO_INFER.contains(&key.as_str()).then(|| {
        format!(
            "`--{name}` is no flag: data files and images are named as they are, `infer {value}`"
        )
    })
}

/// What to write in place of a flag that `train` and `plan` do not have; `None` where clap's own words do.
pub fn flag_hint(error: &clap::Error, typed: &[String]) -> Option<String> {
    let command = typed.get(1).map(String::as_str);
    let has_hints = matches!(command, Some("train" | "plan" | "infer"));
    if error.kind() != ErrorKind::UnknownArgument || !has_hints {
        return None;
    }
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else {
        return None;
    };
    let name = flag.strip_prefix("--")?;
    let name = name.split_once('=').map_or(name, |(name, _)| name);
    let own = TrainArgs::augment_args(Command::new("train"));
    let at = typed.iter().position(|word| {
        let word = word.strip_prefix("--").unwrap_or_default();
        word.split_once('=').map_or(word, |(name, _)| name) == name
    })?;
    let value = match typed[at].split_once('=') {
        Some((_, value)) => Some(value),
        None => typed
            .get(at + 1)
            .map(String::as_str)
            .filter(|word| !word.starts_with("--")),
    };
    let value = value.unwrap_or("VALUE");
    if command == Some("infer") {
        return infer_hint(name, value);
    }
    let key = name.replace('-', "_");
    let flags: Vec<String> = own
        .get_arguments()
        .filter_map(|arg| arg.get_long().map(str::to_string))
        .collect();
    let flag_of = |key: &str| flags.iter().find(|flag| flag.replace('-', "_") == key);
    let keys = TrainConfig::keys();
    if command == Some("train")
        && let Some(flag) = flag_of(&key)
    {
        return Some(format!("`--{name}` is written `--{flag}`"));
    }
    if keys.contains(&key) {
        return Some(format!(
            "`--{name}` is no flag but a key of the settings; write `--set {key}={value}`"
        ));
    }
    if let Some((_, there)) = ELSEWHERE.iter().find(|(name, _)| *name == key) {
        let joined = if there.starts_with("--set") { '=' } else { ' ' };
        return Some(format!("`--{name}` is here `{there}{joined}{value}`"));
    }
    if let Some((_, why)) = NEEDLESS.iter().find(|(name, _)| *name == key) {
        return Some(format!("`--{name}` is not needed here: {why}"));
    }
    let words = keys.iter().map(String::as_str);
    let found = nearest(&key, words)?;
    Some(match flag_of(found) {
        Some(flag) if command == Some("train") => {
            format!("there is no flag `--{name}`; did you mean `--{flag}`?")
        }
        _ => format!("there is no flag `--{name}`; did you mean `--set {found}={value}`?"),
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::Cli;

    fn hint(words: &[&str]) -> Option<String> {
        let typed: Vec<String> = ["xray-qwen3vl"]
            .iter()
            .chain(words)
            .map(|word| word.to_string())
            .collect();
        let error = Cli::try_parse_from(&typed).map(|_| ()).unwrap_err();
        flag_hint(&error, &typed)
    }

    #[test]
    fn a_flag_that_is_none_is_answered_with_what_to_write() {
        for (words, says) in [
            (
                ["train", "--learning-rate", "1e-4"],
                "`--set learning_rate=1e-4`",
            ),
            (
                ["train", "--learning_rate=1e-4", "--no-tui"],
                "`--set learning_rate=1e-4`",
            ),
            (["train", "--lora_rank", "16"], "`--set lora_rank=16`"),
            (["train", "--output_dir", "x"], "is written `--output-dir`"),
            (
                ["train", "--dataset", "a.jsonl"],
                "is here `--train-data a.jsonl`",
            ),
            (
                ["train", "--train_type", "lora"],
                "is here `--set tuner=lora`",
            ),
            (
                ["train", "--learnin-rate", "1"],
                "did you mean `--set learning_rate=1`?",
            ),
            (["plan", "--max_steps", "5"], "`--set max_steps=5`"),
            (
                ["train", "--model_type", "qwen3_vl"],
                "not needed here: `config.json`",
            ),
            (
                ["infer", "--val_dataset", "a.jsonl"],
                "named as they are, `infer a.jsonl`",
            ),
            (
                ["train", "--lr", "1e-4"],
                "is here `--set learning_rate=1e-4`",
            ),
            (
                ["train", "--batch-size", "2"],
                "`--set per_device_train_batch_size=2`",
            ),
        ] {
            let found = hint(&words).unwrap_or_default();
            assert!(found.contains(says), "{words:?}: {found}");
        }
        assert_eq!(hint(&["train", "--zzzzzz"]), None);
        assert_eq!(hint(&["infer", "--learning-rate", "1"]), None);
    }

    #[test]
    fn a_key_that_is_none_is_answered_with_the_nearest() {
        let set = |pair: &str| {
            let pairs = [pair.to_string()];
            with_keys(&TrainConfig::default(), &pairs)
        };
        for (pair, says) in [
            ("learnin_rate=1e-4", "did you mean `learning_rate`?"),
            ("learning-rate=1e-4", "did you mean `learning_rate`?"),
            ("qqqq=1", "`configs/openi-lora.toml` explains every key"),
            (
                "report_to=wandb",
                "report_command = [\"python3\", \"configs/hooks/wandb_log.py\"]",
            ),
            ("report_to=mlflow", "expected `tensorboard` or `command`"),
            (
                "target_modules=[q_proj]",
                "--set 'target_modules=[\"q_proj\"]'",
            ),
            ("max_steps=many", "expected a whole number"),
        ] {
            let error = set(pair).unwrap_err().to_string();
            assert!(error.contains(says), "{pair}: {error}");
        }
        assert_eq!(set("learning_rate=1").unwrap().learning_rate, 1.0);
        assert_eq!(set("device=cpu").unwrap().device, ["cpu"]);
        let error = set("target_modules=q_proj")
            .unwrap()
            .validate()
            .unwrap_err();
        let error = error.to_string();
        assert!(error.contains("[\"q_proj\"]"), "{error}");
    }
}

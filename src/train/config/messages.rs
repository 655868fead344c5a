//! What is wrong with a key or a value, in the words of the config file.

use super::{TrainConfig, nearest};

/// Values of ms-swift's and transformers' `report_to` that are reached in another way here.
const OTHER_REPORTERS: &[(&str, &str)] = &[
    (
        "wandb",
        "a run reports there through a program: `report_to = [\"command\"]` with `report_command = [\"python3\", \"configs/hooks/wandb_log.py\"]`",
    ),
    (
        "swanlab",
        "a run reports there through a program: `report_to = [\"command\"]` with `report_command = [\"python3\", \"configs/hooks/swanlab_log.py\"]`",
    ),
    ("none", "an empty list reports nowhere: `report_to = []`"),
    (
        "all",
        "name them: `report_to = [\"tensorboard\", \"command\"]`",
    ),
];

/// What toml says of a key or a value, in the words of this file.
pub fn explain(message: &str) -> String {
    let words = message.replace('\n', " ");
    if let Some((_, rest)) = words.split_once("unknown field `")
        && let Some((key, _)) = rest.split_once('`')
    {
        return unknown_key(key);
    }
    for (name, instead) in OTHER_REPORTERS {
        if words.contains(&format!("unknown variant `{name}`, expected `tensorboard`")) {
            return format!("`report_to` knows no `{name}`; {instead}");
        }
    }
    [
        (
            "expected a sequence",
            "expected a list such as [\"a\", \"b\"]",
        ),
        ("expected usize", "expected a whole number"),
        ("expected u64", "expected a whole number"),
        ("expected f64", "expected a number"),
        ("expected a boolean", "expected true or false"),
        ("expected a string", "expected text"),
        ("invalid type: ", ""),
        ("invalid value: ", ""),
    ]
    .iter()
    .fold(words, |words, (from, to)| words.replace(from, to))
    .trim()
    .to_string()
}

/// Says that a key is none, and which may be meant.
pub fn unknown_key(key: &str) -> String {
    let known = TrainConfig::keys();
    match nearest(key, known.iter().map(String::as_str)) {
        Some(near) => format!("unknown key `{key}`; did you mean `{near}`?"),
        None => format!(
            "unknown key `{key}`; `configs/openi-lora.toml` explains every key, `xray-qwen3vl config example openi-lora` prints it"
        ),
    }
}

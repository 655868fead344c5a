//! Whether an answer is learnt, by any of the keys that trainers mark it with.
//!
//! Sources: `LossScale._inner_call`, ms-swift 4.6, `loss_scale/base.py`; `train` and `training` of a message, Axolotl,
//! `prompt_strategies/chat_template.py`; `weight` of a message, OpenAI's fine-tuning format; `loss_weight`, LLaMA-Factory 1.

use serde_json::{Map, Value};

use super::row_fault::{RowFault, shown};

/// Keys of a message that say whether it is learnt.
pub(super) const KEYS: [&str; 6] = [
    "loss",
    "loss_scale",
    "train",
    "training",
    "weight",
    "loss_weight",
];

/// Those of them that a row may have as a whole.
pub(super) const ROW_KEYS: [&str; 2] = ["loss", "loss_scale"];

/// What the keys of a row or a message say; `None` if nothing. An answer is learnt unless one of them says no.
///
/// # Errors
/// [`RowFault::Key`] for a value that is neither yes nor no: answers have no weights.
pub(super) fn learns(
    fields: &Map<String, Value>,
    keys: &[&str],
    place: &str,
) -> Result<Option<bool>, RowFault> {
    let mut found = None;
    for key in keys {
        let Some(value) = fields.get(*key).filter(|value| !value.is_null()) else {
            continue;
        };
        let is_flag = matches!(*key, "loss" | "train" | "training");
        let says = match value {
            Value::Bool(says) if is_flag => *says,
            value if !is_flag && value.as_f64() == Some(1.0) => true,
            value if !is_flag && value.as_f64() == Some(0.0) => false,
            other => {
                let expected = if is_flag {
                    "true (learnt) or false (not learnt)"
                } else {
                    "1 (learnt) or 0 (not learnt): answers have no weights between or above; repeat a row that is to count more"
                };
                return Err(RowFault::key(
                    format!("{place}{key}"),
                    shown(other),
                    expected,
                ));
            }
        };
        found = Some(found.unwrap_or(true) && says);
    }
    Ok(found)
}

/// The first of the keys that a message has.
pub(super) fn key_of(fields: &Map<String, Value>) -> &'static str {
    KEYS.into_iter()
        .find(|key| fields.contains_key(*key))
        .unwrap_or(KEYS[0])
}

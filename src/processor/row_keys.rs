//! Which keys of a row training reads, which mean nothing to it, and which end it.
//!
//! The one policy for `train`, `check` and `convert`. A key that changes what is learnt is read or
//! refused; a key that only describes the row passes; any other passes with a remark, unless it
//! looks like a misspelling of one that is read. A key without a value (`null`, `""`, `[]`,
//! `{}`) is passed over, whatever its name.
//!
//! Source of the keys with a meaning: `RowPreprocessor.standard_keys` and `_check_messages`,
//! ms-swift 4.6, `dataset/preprocessor/core.py`.

use serde_json::{Map, Value};

use crate::{
    base::files::nearest::nearest,
    study::{PATIENT_KEYS, STUDY_KEYS},
};

/// What training does with a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyUse {
    /// It is read.
    Read,
    /// It names or describes the row and changes nothing.
    Harmless,
    /// It belongs to another objective than learning answers; it stays in the row, with a remark.
    Kept,
    /// It would change what is learnt and is not supported; the text says what to do.
    Refused(&'static str),
    /// It looks like this key, which is read.
    Slip(&'static str),
    /// It is in no list.
    Unknown,
}

/// Keys of a row that training reads.
const ROW_KEYS: [&str; 12] = [
    "messages",
    "tools",
    "functions",
    "images",
    "image",
    "img",
    "system",
    "system_prompt",
    "objects",
    "chat_template_kwargs",
    "loss",
    "loss_scale",
];

/// Keys of a message that training reads.
const MESSAGE_KEYS: [&str; 8] = [
    "role",
    "content",
    "loss",
    "loss_scale",
    "train",
    "training",
    "weight",
    "loss_weight",
];

/// Keys that name or describe a row or a message, beside those of its study. `channel` only splits the loss that ms-swift
/// prints.
const HARMLESS: &[&str] = &[
    "id",
    "idx",
    "index",
    "uuid",
    "sample_id",
    "row_id",
    "image_id",
    "question_id",
    "dicom_id",
    "study_uid",
    "series_id",
    "accession",
    "accession_number",
    "source",
    "dataset",
    "data_source",
    "split",
    "subset",
    "channel",
    "category",
    "task",
    "tags",
    "language",
    "lang",
    "license",
    "author",
    "comment",
    "comments",
    "note",
    "notes",
    "meta",
    "metadata",
    "view",
    "modality",
    "created_at",
    "timestamp",
];

/// A second text or picture set of a row, for another kind of training than that of answers.
const PREFERENCES: &str = "preferences are read in ms-swift's form: the answer to be given in `messages`, the other one in `rejected_response`, and `objective = \"dpo\"`; single verdicts (KTO, reward models) are not supported";
const RL: &str = "with `objective = \"grpo\"` rewards compare with the last answer in `messages`; put the true report there and take the key out";
const NO_VIDEO: &str =
    "videos are not read; give single frames as `images`, or take the row out of the file";
const NO_AUDIO: &str = "sound is not read; take the row out of the file";
const NO_CALLS: &str =
    "calls of tools belong to messages of `assistant`, the tools to the row; take the key out here";
const REASONING: &str = "reasoning is learnt from `content`: write `<think>\\n…\\n</think>\\n\\n` before the answer there, and take the key out";
const WEIGHTS: &str = "rows and answers have no weights; use `loss` (true or false) or `loss_scale` (1 or 0) of a message, or repeat a row that is to count more";
const WHOLE: &str = "an answer is learnt as a whole or not at all, by `loss` (true or false) of its message; take the key out";
const SECOND_TEXT: &str = "the row has `messages` as well, and only they are learnt; take the key out, or move its text into `messages`";

const REFUSED_IN_ROWS: &[(&[&str], &str)] = &[
    (&["videos", "video"], NO_VIDEO),
    (&["audios", "audio", "ref_audios", "audio_codes"], NO_AUDIO),
    (&["label", "rejected", "chosen"], PREFERENCES),
    (&["solution", "teacher_prompt"], RL),
    (
        &[
            "weight",
            "weights",
            "sample_weight",
            "loss_weight",
            "loss_mask",
            "mask",
        ],
        WEIGHTS,
    ),
    (
        &[
            "query",
            "response",
            "history",
            "instruction",
            "input",
            "output",
            "prompt",
            "answer",
            "question",
            "conversation",
            "conversations",
            "report",
            "caption",
            "text",
        ],
        SECOND_TEXT,
    ),
];

const REFUSED_IN_MESSAGES: &[(&[&str], &str)] = &[
    (&["reasoning_content", "reasoning", "thinking"], REASONING),
    (
        &["tool_calls", "tool_call_id", "function_call", "tools"],
        NO_CALLS,
    ),
    (
        &["loss_mask", "mask", "train_detail", "training_detail"],
        WHOLE,
    ),
    (
        &["images", "image"],
        "pictures of a message are not read; name them in `images` of the row and put `<image>` where each belongs",
    ),
    (&["videos", "video"], NO_VIDEO),
    (&["audios", "audio"], NO_AUDIO),
];

/// What training does with `key` of a row whose value is `value`.
pub fn of_row(key: &str, value: &Value) -> KeyUse {
    if is_kept(key) && !is_empty(value) {
        return KeyUse::Kept;
    }
    if (key.starts_with("positive_") || key.starts_with("negative_")) && !is_empty(value) {
        return KeyUse::Refused("training of embeddings is not supported; take the key out");
    }
    of(key, value, &ROW_KEYS, REFUSED_IN_ROWS)
}

/// Whether `key` belongs to preference training: the answer that is not to be given, and by how much.
pub fn is_kept(key: &str) -> bool {
    key.starts_with("rejected_") || key == "margin"
}

/// The keys that name a rejected answer.
pub const REJECTED_KEYS: [&str; 2] = ["rejected_response", "rejected_messages"];

/// What a row says of its rejected answer; `None` where it has none.
pub(super) fn rejected_of(row: &Map<String, Value>) -> Option<Box<Map<String, Value>>> {
    let own = row.iter().filter(|(key, value)| {
        let belongs = REJECTED_KEYS.contains(&key.as_str()) || *key == "rejected_images";
        belongs && !is_empty(value)
    });
    let own: Map<String, Value> = own
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    (!own.is_empty()).then(|| Box::new(own))
}

/// Whether `key` holds what may be the answer of a row, under a name that is not read.
pub(super) fn may_be_answer(key: &str) -> bool {
    const VERDICTS: [&str; 4] = ["label", "chosen", "rejected", "solution"];
    let texts = REFUSED_IN_ROWS
        .iter()
        .filter(|(_, cure)| *cure == SECOND_TEXT);
    VERDICTS.contains(&key) || texts.flat_map(|(keys, _)| *keys).any(|known| *known == key)
}

/// What training does with `key` of a message whose value is `value`.
pub fn of_message(key: &str, value: &Value) -> KeyUse {
    of(key, value, &MESSAGE_KEYS, REFUSED_IN_MESSAGES)
}

fn of(
    key: &str,
    value: &Value,
    read: &[&'static str],
    refused: &[(&[&str], &'static str)],
) -> KeyUse {
    if read.contains(&key) {
        return KeyUse::Read;
    }
    // A name that begins with `_` is how a file says that a key is its own affair.
    let names = [HARMLESS, &STUDY_KEYS, &PATIENT_KEYS].concat();
    if is_empty(value) || key.starts_with('_') || names.contains(&key) {
        return KeyUse::Harmless;
    }
    let cure = refused.iter().find(|(keys, _)| keys.contains(&key));
    if let Some((_, cure)) = cure {
        return KeyUse::Refused(cure);
    }
    nearest(key, read.iter().copied()).map_or(KeyUse::Unknown, KeyUse::Slip)
}

/// Whether a value says nothing.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        // ms-swift writes `tools` as a text of JSON.
        Value::String(text) => matches!(text.trim(), "" | "[]" | "{}" | "null"),
        Value::Array(entries) => entries.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn every_key_of_ms_swift_is_read_or_refused() {
        // `RowPreprocessor.standard_keys` without the prefixes, `messages` and `images`.
        let some = json!("x");
        for key in [
            "videos",
            "audios",
            "positive_messages",
            "negative_images",
            "label",
            "teacher_prompt",
            "ref_audios",
            "audio_codes",
        ] {
            let found = of_row(key, &some);
            assert!(matches!(found, KeyUse::Refused(_)), "{key}: {found:?}");
            assert_eq!(of_row(key, &json!(null)), KeyUse::Harmless, "{key}");
            assert_eq!(of_row(key, &json!([])), KeyUse::Harmless, "{key}");
        }
        for key in [
            "objects",
            "chat_template_kwargs",
            "image",
            "system",
            "tools",
        ] {
            assert_eq!(of_row(key, &some), KeyUse::Read, "{key}");
        }
        for key in [
            "rejected_messages",
            "rejected_images",
            "rejected_response",
            "margin",
        ] {
            assert_eq!(of_row(key, &some), KeyUse::Kept, "{key}");
            assert_eq!(of_row(key, &json!(null)), KeyUse::Harmless, "{key}");
        }
        assert_eq!(of_row("channel", &some), KeyUse::Harmless);
        assert!(matches!(of_row("label", &json!(false)), KeyUse::Refused(_)));
    }

    #[test]
    fn a_misspelt_key_is_distinguished_from_a_key_of_ones_own() {
        let some = json!("x");
        for (key, nearest) in [
            ("Images", "images"),
            ("imags", "images"),
            ("message", "messages"),
            ("lossscale", "loss_scale"),
            ("loss-scale", "loss_scale"),
            ("System", "system"),
            ("object", "objects"),
        ] {
            assert_eq!(of_row(key, &some), KeyUse::Slip(nearest), "{key}");
        }
        for key in ["hospital", "ViewPosition", "visit", "age", "sex"] {
            assert_eq!(of_row(key, &some), KeyUse::Unknown, "{key}");
        }
        assert_eq!(of_row("_loss", &some), KeyUse::Harmless);
        assert_eq!(of_message("contents", &some), KeyUse::Slip("content"));
        assert!(matches!(
            of_message("reasoning_content", &some),
            KeyUse::Refused(_)
        ));
    }
}

//! Rows of other trainers and corpora: what form one is in, and how to bring it into the one read.

use serde_json::{Map, Value};

/// The form that is read.
pub(super) const EXPECTED: &str = r#"`{"messages": [{"role": "user", "content": "<image>…"}, {"role": "assistant", "content": "…"}], "images": ["a.png"]}`"#;

/// What a row without `messages` is, and what to do about it.
pub(super) fn describe(row: &Map<String, Value>) -> (String, String) {
    let has = |key: &str| row.contains_key(key);
    let first = |key: &str| {
        let entries = row.get(key).and_then(Value::as_array);
        entries.and_then(|entries| entries.first())
    };
    let found = |words: &str, hint: &str| (words.to_owned(), hint.to_owned());
    for key in ["conversations", "conversation"] {
        let Some(turn) = first(key) else { continue };
        return if turn.get("from").is_some() {
            found(
                &format!("`{key}` of `from` and `value` (the form of ShareGPT and LLaVA)"),
                "rename it to `messages`, `from` to `role` (`human` is `user`, `gpt` is `assistant`), `value` to `content`",
            )
        } else {
            found(
                &format!("`{key}` of `human` and `assistant` (the ShareGPT form of ms-swift)"),
                "make two messages of each turn, one of `user` and one of `assistant`",
            )
        };
    }
    if has("query") || has("response") {
        let history = if has("history") {
            "; the pairs of `history` come before them"
        } else {
            ""
        };
        return (
            "`query` and `response` (the query-response form of ms-swift)".to_owned(),
            format!(
                "make `query` the content of a message of `user`, and `response` that of `assistant`{history}"
            ),
        );
    }
    if has("instruction") || (has("input") && has("output")) {
        return found(
            "`instruction` and `output` (the form of Alpaca)",
            "make `instruction`, a line end and `input` the content of a message of `user`, and `output` that of `assistant`",
        );
    }
    if has("chosen") && has("rejected") {
        return found(
            "`chosen` and `rejected` (preferences)",
            "preference training is not supported; put the chosen answer into `messages`",
        );
    }
    if has("img") && has("label") {
        return found(
            "`img`, `prompt` and `label` (the form of XrayGLM)",
            "`convert` reads such rows, with `--image-key img`, `--report-key label`, `--images DIR` and `--output OUT`",
        );
    }
    if has("annotations") {
        return found(
            "one object with `annotations` (the form of OpenI-zh)",
            "`convert` reads it, with `--images DIR` and `--output OUT`",
        );
    }
    if has("image_id") && has("caption") {
        return found(
            "`image_id` and `caption` (a row of OpenI-zh)",
            "`convert` reads such rows, with `--image-key image_id` and `--report-key caption`",
        );
    }
    if has("file_name") || row.values().any(|value| value.get("file_name").is_some()) {
        return found(
            "a description of data sets (dataset_info.json of LLaMA-Factory)",
            "name the data file itself",
        );
    }
    if has("text") {
        return found(
            "a plain `text`",
            "training is on questions and answers; put the text to be learnt into a message of `assistant`, after one of `user`",
        );
    }
    let keys: Vec<String> = row.keys().take(8).map(|key| format!("`{key}`")).collect();
    let words = match keys.len() {
        0 => "an object without keys".to_owned(),
        1 => format!("only the key {}", keys[0]),
        _ => format!("only the keys {}", keys.join(", ")),
    };
    (
        words,
        "put question and answer into `messages` and the paths of the pictures into `images`, or let `convert` do it, with `--image-key` and `--report-key`"
            .to_owned(),
    )
}

/// What a list of `content` is, and what to do about it.
pub(super) fn describe_parts(parts: &[Value]) -> (&'static str, &'static str) {
    let kinds = |kind: &str| {
        parts
            .iter()
            .any(|part| part.get("type").and_then(Value::as_str) == Some(kind))
    };
    let hint = "a text, with `<image>` where a picture belongs and its path in `images` of the row";
    if kinds("image_url") {
        (
            "a list of parts with `image_url` (the form of OpenAI)",
            hint,
        )
    } else if kinds("image") || kinds("text") {
        (
            "a list of parts (the form of chat templates on Hugging Face)",
            hint,
        )
    } else {
        ("a list", "a text")
    }
}

/// The role that is meant by a name other trainers use.
pub(super) fn role_of(name: &str) -> Option<&'static str> {
    match name.to_lowercase().as_str() {
        "user" | "human" => Some("user"),
        "assistant" | "gpt" | "bot" | "model" => Some("assistant"),
        "system" | "developer" => Some("system"),
        _ => None,
    }
}

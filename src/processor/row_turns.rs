//! Turns of a conversation as other trainers write them, brought into messages with `role` and `content`.

use serde_json::{Map, Value, json};

use super::{
    row_fault::{RowFault, kind_of},
    row_keys,
};

/// The role that is meant by a name other trainers use.
pub(super) fn role_of(name: &str) -> Option<&'static str> {
    match name.to_lowercase().as_str() {
        "user" | "human" => Some("user"),
        "assistant" | "gpt" | "bot" | "model" | "chatgpt" | "ai" => Some("assistant"),
        "system" | "developer" => Some("system"),
        _ => None,
    }
}

/// `from` and `value` become `role` and `content`, and other names of roles those that are read.
pub(super) fn standard_names(message: &mut Map<String, Value>) {
    for (other, own) in [("from", "role"), ("value", "content")] {
        if !message.contains_key(own)
            && let Some(value) = message.shift_remove(other)
        {
            message.insert(own.to_owned(), value);
        }
    }
    if let Some(Value::String(role)) = message.get_mut("role")
        && let Some(own) = role_of(role)
        && role != own
    {
        *role = own.to_owned();
    }
}

/// The messages of a conversation under another name, of messages or of pairs.
pub(super) fn conversation(key: &str, entries: Value) -> Result<Value, RowFault> {
    let Value::Array(entries) = entries else {
        return Err(RowFault::key(key, kind_of(&entries), "a list of messages"));
    };
    let mut messages = Vec::new();
    for (index, entry) in entries.into_iter().enumerate() {
        let place = format!("{key}[{index}]");
        let Value::Object(mut fields) = entry else {
            let expected = "an object with `from` and `value`";
            return Err(RowFault::key(place, kind_of(&entry), expected));
        };
        let is_message = ["from", "role", "value", "content"]
            .iter()
            .any(|key| fields.contains_key(*key));
        if is_message {
            messages.push(Value::Object(fields));
            continue;
        }
        let keys: Vec<String> = fields
            .keys()
            .take(5)
            .map(|key| format!("`{key}`"))
            .collect();
        let mut pair = Vec::new();
        for role in ["user", "assistant"] {
            let names: Vec<String> = fields
                .keys()
                .filter(|name| role_of(name) == Some(role))
                .cloned()
                .collect();
            let [name] = names.as_slice() else {
                let expected = "a pair such as `{\"human\": …, \"assistant\": …}`, or an object with `from` and `value`";
                let found = format!("an object with {}", keys.join(", "));
                return Err(RowFault::key(place, found, expected));
            };
            let content = fields.shift_remove(name).unwrap_or_default();
            pair.push(json!({"role": role, "content": content}));
        }
        // Of The Cauldron's pairs, the collection that each comes from.
        fields.shift_remove("source");
        if let Some((name, value)) = fields
            .into_iter()
            .find(|(_, value)| !row_keys::is_empty(value))
        {
            return Err(RowFault::key(
                format!("{place}.{name}"),
                kind_of(&value),
                "a pair of question and answer alone",
            ));
        }
        messages.append(&mut pair);
    }
    Ok(messages.into())
}

/// `prompt` and `completion` as lists of messages, which TRL's trainers take: one conversation.
pub(super) fn turns(
    row: &mut Map<String, Value>,
    query: Option<&str>,
    response: &str,
) -> Result<Option<Value>, RowFault> {
    let of_messages = |key: &str| {
        let entries = row.get(key).and_then(Value::as_array);
        entries.is_some_and(|entries| {
            let mut entries = entries.iter();
            entries.len() > 0 && entries.all(|entry| entry.get("role").is_some())
        })
    };
    let Some(query) = query.filter(|query| of_messages(query) && of_messages(response)) else {
        return Ok(None);
    };
    let mut messages = Vec::new();
    for key in [query, response] {
        let entries = row.shift_remove(key).unwrap_or_default();
        if let Value::Array(mut entries) = conversation(key, entries)? {
            messages.append(&mut entries);
        }
    }
    Ok(Some(messages.into()))
}

/// The turns before the last: a list of pairs.
pub(super) fn history(value: Option<Value>) -> Result<Vec<Value>, RowFault> {
    let expected = "a list of pairs `[question, answer]`";
    let pairs = match value {
        None => return Ok(Vec::new()),
        Some(value) if row_keys::is_empty(&value) => return Ok(Vec::new()),
        Some(Value::Array(pairs)) => pairs,
        Some(other) => return Err(RowFault::key("history", kind_of(&other), expected)),
    };
    let mut messages = Vec::new();
    for (index, pair) in pairs.into_iter().enumerate() {
        match pair {
            Value::Array(mut pair) if pair.len() == 2 => {
                let answer = pair.pop().unwrap_or_default();
                let question = pair.pop().unwrap_or_default();
                messages.push(json!({"role": "user", "content": question}));
                messages.push(json!({"role": "assistant", "content": answer}));
            }
            Value::Object(message) if message.contains_key("role") => {
                messages.push(Value::Object(message));
            }
            other => {
                let place = format!("history[{index}]");
                return Err(RowFault::key(place, kind_of(&other), expected));
            }
        }
    }
    Ok(messages)
}

//! Rows of other trainers, brought into `messages` and `images`.
//!
//! Read are `conversations` of ShareGPT and LLaVA (`from`, `value`), `conversation` of `human` and `assistant`,
//! query and response with `history`, Alpaca's `instruction`, `input` and `output`, XrayGLM's `img`, `prompt`
//! and `label`, content as a list of parts (OpenAI, Hugging Face, Qwen), and the role names of all of these.
//! A row that is in the plain form already stays as it is.
//!
//! Source: `AutoPreprocessor`, `MessagesPreprocessor`, `ResponsePreprocessor` and `AlpacaPreprocessor`,
//! ms-swift 4.6, `dataset/preprocessor/core.py`.

use serde_json::{Map, Value, json};

use super::row_fault::{RowFault, kind_of};
use super::row_parts::{LIMITS, PartImages};
use super::row_turns::{conversation, history, standard_names, turns};
use super::{literal, row_keys};

/// Keys of a conversation; `conversatons` is how LLaVA-Med's files spell it, and `texts` are The Cauldron's pairs.
pub(super) const CONVERSATIONS: [&str; 5] = [
    "messages",
    "conversations",
    "conversation",
    "conversatons",
    "texts",
];

/// Keys of a question and of an answer, in rows without a conversation; the first of each is ms-swift's own.
pub(super) const QUERY: [&str; 6] = [
    "query",
    "prompt",
    "input",
    "instruction",
    "question",
    "problem",
];
pub(super) const RESPONSE: [&str; 11] = [
    "response",
    "answer",
    "output",
    "targets",
    "target",
    "answer_key",
    "answers",
    "solution",
    "text",
    "completion",
    "content",
];

/// Keys whose value may be text of JSON or of Python in a table.
const STRUCTURED: [&str; 9] = [
    "messages",
    "conversations",
    "conversation",
    "history",
    "objects",
    "chat_template_kwargs",
    "images",
    "image",
    "img",
];

/// Whether a row with these keys is one that `to_messages` or the plain form takes.
pub fn is_training_form(row: &Map<String, Value>) -> bool {
    let given = |key: &&str| {
        row.get(*key)
            .is_some_and(|value| !row_keys::is_empty(value))
    };
    if CONVERSATIONS.iter().any(given) {
        return true;
    }
    let any = |names: &[&str]| {
        let mut keys = row.keys();
        keys.any(|key| names.contains(&key.to_lowercase().as_str()))
    };
    any(&RESPONSE[..1]) || (any(&QUERY) && any(&RESPONSE))
}

/// Brings a row of another form into `messages` and `images`; one of no known form stays as it is.
///
/// # Errors
/// [`RowFault`] if two keys say the same, or a value is of another kind than its key wants.
pub(super) fn to_messages(row: &mut Map<String, Value>) -> Result<(), RowFault> {
    for key in STRUCTURED {
        if let Some(Value::String(text)) = row.get(key)
            && let Some(value) = literal::parse(text)
        {
            row.insert(key.to_owned(), value);
        }
    }
    limits(row)?;
    if let Some(list @ Value::Array(_)) = row.get("objects") {
        let objects = objects(list)?;
        row.insert("objects".to_owned(), objects);
    }
    if row.get("messages").is_some_and(row_keys::is_empty) && !is_list(row.get("messages")) {
        row.shift_remove("messages");
    }
    if !row.contains_key("messages") {
        let given = |key: &&&str| {
            row.get(**key)
                .is_some_and(|value| !row_keys::is_empty(value))
        };
        let mut found = CONVERSATIONS.iter().filter(given);
        match (found.next(), found.next()) {
            (Some(key), Some(other)) => return Err(both(key, other)),
            (Some(key), None) => {
                let entries = row.shift_remove(*key).unwrap_or_default();
                let messages = conversation(key, entries)?;
                row.insert("messages".to_owned(), messages);
            }
            (None, _) => question_and_answer(row)?,
        }
    }
    let images = row
        .get("images")
        .is_some_and(|value| !row_keys::is_empty(value));
    let Some(Value::Array(messages)) = row.get_mut("messages") else {
        return Ok(());
    };
    let mut parts = PartImages::default();
    for (index, message) in messages.iter_mut().enumerate() {
        let Value::Object(message) = message else {
            continue;
        };
        standard_names(message);
        if let Some(Value::Array(entries)) = message.get("content") {
            let key = format!("messages[{index}].content");
            let text = parts.text(&key, entries)?;
            message.insert("content".to_owned(), text.into());
        }
    }
    of_images(row, &mut parts)?;
    if !parts.images.is_empty() {
        if images
            || row
                .get("image")
                .is_some_and(|value| !row_keys::is_empty(value))
        {
            return Err(RowFault::key(
                "images",
                "given beside images in the parts of `content`",
                "one of the two; a part `{\"type\": \"image\"}` alone is the place of the next of `images`",
            ));
        }
        row.insert("images".to_owned(), parts.images.into());
    }
    for (name, limit) in LIMITS.into_iter().zip(parts.limits) {
        if let Some(limit) = limit {
            row.insert(name.to_owned(), limit);
        }
    }
    limits(row)
}

fn is_list(value: Option<&Value>) -> bool {
    matches!(value, Some(Value::Array(_)))
}

fn both(one: &str, other: &str) -> RowFault {
    let found = format!("given beside `{other}`");
    let expected = format!(
        "one of the two; hint: `columns` says which one counts, as `--columns response={other}`, or begin the name of the other with `_`"
    );
    RowFault::key(one, found, expected)
}

/// The key among `names` that has a value, whatever its capitals.
pub(super) fn only(row: &Map<String, Value>, names: &[&str]) -> Result<Option<String>, RowFault> {
    let mut found = row
        .iter()
        .filter(|(key, value)| {
            names.contains(&key.to_lowercase().as_str()) && !row_keys::is_empty(value)
        })
        .map(|(key, _)| key);
    match (found.next(), found.next()) {
        (Some(key), Some(other)) => Err(both(key, other)),
        (key, _) => Ok(key.cloned()),
    }
}

/// Whether a row is one of XrayGLM's. A `label` that is no text is a verdict of preference training.
pub(super) fn is_xrayglm(row: &Map<String, Value>) -> bool {
    let image = row
        .get("img")
        .is_some_and(|value| !row_keys::is_empty(value));
    image && matches!(row.get("label"), Some(Value::String(_)))
}

/// A question and its answer under keys of their own, with the turns before them.
fn question_and_answer(row: &mut Map<String, Value>) -> Result<(), RowFault> {
    let given = |row: &Map<String, Value>, key: &str| {
        row.get(key).is_some_and(|value| !row_keys::is_empty(value))
    };
    let response = if is_xrayglm(row) {
        Some("label".to_owned())
    } else {
        only(row, &RESPONSE)?
    };
    let Some(response) = response else {
        return Ok(());
    };
    let is_alpaca = given(row, "instruction") && given(row, "input");
    let query = if is_alpaca {
        Some("instruction".to_owned())
    } else {
        only(row, &QUERY)?
    };
    // A text alone may be anything; an answer alone is named so.
    if query.is_none() && response.to_lowercase() != RESPONSE[0] {
        return Ok(());
    }
    let text = |key: &str, value: Value| match value {
        Value::String(text) => Ok(text),
        Value::Array(mut texts) if texts.len() == 1 => match texts.pop() {
            Some(Value::String(text)) => Ok(text),
            _ => Err(RowFault::key(key, "a list", "a text")),
        },
        Value::Array(texts) => Err(RowFault::key(
            key,
            format!("a list of {} answers", texts.len()),
            "one text; hint: write a row for each answer that is to be learnt",
        )),
        other => Err(RowFault::key(key, kind_of(&other), "a text")),
    };
    if let Some(messages) = turns(row, query.as_deref(), &response)? {
        row.insert("messages".to_owned(), messages);
        return Ok(());
    }
    let answer = text(&response, row.shift_remove(&response).unwrap_or_default())?;
    let mut messages = history(row.shift_remove("history"))?;
    if let Some(query) = query {
        let mut question = text(&query, row.shift_remove(&query).unwrap_or_default())?;
        if is_alpaca {
            let input = text("input", row.shift_remove("input").unwrap_or_default())?;
            question = format!("{question}\n{input}");
        }
        messages.push(json!({"role": "user", "content": question}));
    }
    messages.push(json!({"role": "assistant", "content": answer}));
    for key in QUERY.iter().chain(&RESPONSE) {
        if row.get(*key).is_some_and(row_keys::is_empty) {
            row.shift_remove(*key);
        }
    }
    row.insert("messages".to_owned(), messages.into());
    Ok(())
}

/// Takes `min_pixels` and `max_pixels` out of the objects in `images`.
fn of_images(row: &mut Map<String, Value>, parts: &mut PartImages) -> Result<(), RowFault> {
    for key in ["images", "image", "img"] {
        let entries = match row.get_mut(key) {
            Some(Value::Array(entries)) => entries.as_mut_slice(),
            Some(entry @ Value::Object(_)) => std::slice::from_mut(entry),
            _ => continue,
        };
        for (index, entry) in entries.iter_mut().enumerate() {
            if let Value::Object(fields) = entry {
                parts.limits(&format!("{key}[{index}]"), fields)?;
                fields.retain(|name, _| !LIMITS.contains(&name.as_str()));
            }
        }
    }
    Ok(())
}

/// `min_pixels` and `max_pixels` of the row itself, brought to the others.
fn limits(row: &mut Map<String, Value>) -> Result<(), RowFault> {
    for name in LIMITS {
        let Some(limit) = row.shift_remove(name) else {
            continue;
        };
        if row_keys::is_empty(&limit) {
            continue;
        }
        let kwargs = row
            .entry("chat_template_kwargs")
            .or_insert_with(|| json!({}));
        if kwargs.is_null() {
            *kwargs = json!({});
        }
        let Value::Object(kwargs) = kwargs else {
            return Err(both(name, "chat_template_kwargs"));
        };
        if kwargs.get(name).is_some_and(|other| *other != limit) {
            return Err(both(name, "chat_template_kwargs"));
        }
        kwargs.insert(name.to_owned(), limit);
    }
    Ok(())
}

/// `objects` as a list of objects, each with its name and box, as lists under `ref` and `bbox`.
fn objects(list: &Value) -> Result<Value, RowFault> {
    let mut fields = Map::new();
    for (index, object) in list.as_array().into_iter().flatten().enumerate() {
        let place = format!("objects[{index}]");
        let Value::Object(object) = object else {
            let expected = "an object with `ref` and `bbox`";
            return Err(RowFault::key(place, kind_of(object), expected));
        };
        for (key, value) in object {
            let own = match key.as_str() {
                "ref" | "caption" | "label" | "name" => "ref",
                "bbox" | "box" | "bbox_2d" => "bbox",
                "image_id" | "image" => "image_id",
                "bbox_type" => {
                    if fields.get("bbox_type").is_some_and(|other| other != value) {
                        let expected = "the same for all objects of the row";
                        return Err(RowFault::key(
                            format!("{place}.{key}"),
                            value.to_string(),
                            expected,
                        ));
                    }
                    fields.insert(key.clone(), value.clone());
                    continue;
                }
                other => {
                    return Err(RowFault::Refused {
                        key: format!("{place}.{other}"),
                        cure: "of objects `ref`, `bbox`, `bbox_type` and `image_id` are read; take it out",
                    });
                }
            };
            let entries = fields.entry(own).or_insert_with(|| json!([]));
            if let Value::Array(entries) = entries {
                if entries.len() != index {
                    return Err(RowFault::key(
                        format!("{place}.{key}"),
                        "given here and not in every object",
                        "the same keys in all objects of the row",
                    ));
                }
                entries.push(value.clone());
            }
        }
    }
    Ok(Value::Object(fields))
}

#[cfg(test)]
#[path = "row_forms/tests.rs"]
mod tests;

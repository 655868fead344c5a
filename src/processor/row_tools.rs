//! Rows in which functions are called: their descriptions, calls and results, written into ordinary messages.
//!
//! The text is the one that [`super::tools`] gives for serving, so that a model is trained on what it will read. Read are
//! `tools` (OpenAI's objects, bare functions as ms-swift and LLaMA-Factory write them, each also as a text of JSON),
//! `tool_calls` of an answer, and the roles of calls and results that other trainers have. Calls are part of an answer and
//! learnt with it; results are read only.
//!
//! Source: the chat template of Qwen3-VL; names of roles and keys: `agent_template/hermes.py`, ms-swift 4.6, and
//! `data/converter.py`, LLaMA-Factory.

use serde_json::{Map, Value, json};

use super::jinja::python_json;
use super::row_fault::{RowFault, kind_of};
use super::tools::{Call, Speaker, Turn, instructions, result_text, with_calls};
use super::{learnt, literal, row_keys, tags};

/// Keys of a row under which functions are described.
pub(super) const TOOLS: [&str; 2] = ["tools", "functions"];

/// Roles of a message that calls.
const CALLS: [&str; 2] = ["tool_call", "function_call"];

/// Roles of a message that holds the result of a call.
const RESULTS: [&str; 6] = [
    "tool",
    "tool_response",
    "function",
    "function_response",
    "observation",
    "observations",
];

/// Keys of messages that only say which call a result belongs to.
const NAMES: [&str; 3] = ["tool_call_id", "name", "id"];

/// Writes tools, calls and results of a row in the plain form into its messages.
///
/// # Errors
/// [`RowFault::Key`] for a description or a call of another form.
pub(super) fn to_words(row: &mut Map<String, Value>) -> Result<(), RowFault> {
    let tools = descriptions(row)?;
    let Some(Value::Array(messages)) = row.get_mut("messages") else {
        return Ok(());
    };
    let calls = messages.iter().any(|message| {
        let role = message.get("role").and_then(Value::as_str);
        let key = |key| {
            message
                .get(key)
                .is_some_and(|value| !row_keys::is_empty(value))
        };
        let of_tools = |role: &str| CALLS.contains(&role) || RESULTS.contains(&role);
        role.is_some_and(of_tools) || key("tool_calls") || key("function_call")
    });
    if tools.is_empty() && !calls {
        return Ok(());
    }
    let mut written: Vec<Value> = Vec::with_capacity(messages.len() + 1);
    let mut after_result = false;
    for (index, message) in std::mem::take(messages).into_iter().enumerate() {
        let place = format!("messages[{index}]");
        let mut fields = match message {
            Value::Object(fields) => fields,
            other => {
                written.push(other);
                continue;
            }
        };
        let role = fields
            .get("role")
            .and_then(Value::as_str)
            .unwrap_or_default();
        let is_result = RESULTS.contains(&role);
        let is_answer = |message: &Value| message["role"] == "assistant";
        if is_result && !after_result && !written.last().is_some_and(is_answer) {
            return Err(RowFault::key(
                format!("{place}.role"),
                format!("`{role}` without a call before it"),
                "the result of a call after the message of `assistant` that calls",
            ));
        }
        if is_result {
            let text = result_text(&result(&fields, &place)?);
            NAMES.iter().for_each(|name| {
                fields.shift_remove(*name);
            });
            fields.insert("role".to_owned(), "user".into());
            match written.last_mut().filter(|_| after_result) {
                Some(before) => join(before, fields, &text, &place)?,
                None => {
                    fields.insert("content".to_owned(), text.into());
                    written.push(fields.into());
                }
            }
        } else if CALLS.contains(&role) {
            let text = in_answer("", &calls_of(fields.get("content"), &place, "content")?);
            fields.insert("role".to_owned(), "assistant".into());
            match written.last_mut().filter(|last| is_answer(last)) {
                Some(before) => join(before, fields, &text, &place)?,
                None => {
                    fields.insert("content".to_owned(), text.into());
                    written.push(fields.into());
                }
            }
        } else if role == "assistant" {
            written.push(answer(fields, &place)?.into());
        } else {
            written.push(fields.into());
        }
        after_result = is_result;
    }
    if !tools.is_empty() {
        let about = tags::escaped(&instructions(&tools));
        match written
            .first_mut()
            .filter(|first| first["role"] == "system")
        {
            Some(system) => {
                let said = system["content"].as_str().unwrap_or_default();
                system["content"] = format!("{said}\n\n{about}").into();
            }
            None => written.insert(0, json!({"role": "system", "content": about})),
        }
    }
    *messages = written;
    Ok(())
}

/// Takes the descriptions of functions out of a row.
fn descriptions(row: &mut Map<String, Value>) -> Result<Vec<Value>, RowFault> {
    let mut found: Option<(&str, Value)> = None;
    for key in TOOLS {
        let Some(value) = row
            .shift_remove(key)
            .filter(|value| !row_keys::is_empty(value))
        else {
            continue;
        };
        if let Some((other, _)) = found {
            let said = format!("given beside `{other}`");
            return Err(RowFault::key(key, said, "one of the two"));
        }
        found = Some((key, value));
    }
    let Some((key, value)) = found else {
        return Ok(Vec::new());
    };
    let expected = "a list of functions, `[{\"type\": \"function\", \"function\": {\"name\": …, \"parameters\": …}}]`";
    let list = match parsed(value) {
        Value::Array(list) => list,
        one @ Value::Object(_) => vec![one],
        other => return Err(RowFault::key(key, kind_of(&other), expected)),
    };
    let described = list.into_iter().enumerate().map(|(index, tool)| {
        let tool = parsed(tool);
        let of = tool.get("function").unwrap_or(&tool);
        if of
            .get("name")
            .and_then(Value::as_str)
            .is_none_or(str::is_empty)
        {
            let place = format!("{key}[{index}]");
            return Err(RowFault::key(
                place,
                "without the `name` of a function",
                expected,
            ));
        }
        Ok(match tool.get("function") {
            Some(_) => tool,
            None => json!({"type": "function", "function": tool}),
        })
    });
    described.collect()
}

/// A text of JSON or Python as its value; any other value as it is.
fn parsed(value: Value) -> Value {
    match value {
        Value::String(text) => literal::parse(&text).unwrap_or(Value::String(text)),
        value => value,
    }
}

/// What a result says, as text.
fn result(message: &Map<String, Value>, place: &str) -> Result<String, RowFault> {
    match message.get("content") {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Null) | None => {
            let found = if message.contains_key("content") {
                "null"
            } else {
                "missing"
            };
            Err(RowFault::key(
                format!("{place}.content"),
                found,
                "the result of a call",
            ))
        }
        Some(value) => Ok(tags::escaped(&python_json(value))),
    }
}

/// The calls that a value holds: one, or a list of them, as objects or as a text of JSON.
fn calls_of(value: Option<&Value>, place: &str, key: &str) -> Result<Vec<Call>, RowFault> {
    let expected = "a call, `{\"name\": …, \"arguments\": {…}}`, or a list of them";
    let value = parsed(value.cloned().unwrap_or_default());
    let list = match value {
        Value::Array(list) if !list.is_empty() => list,
        one @ Value::Object(_) => vec![one],
        other => {
            return Err(RowFault::key(
                format!("{place}.{key}"),
                kind_of(&other),
                expected,
            ));
        }
    };
    let calls = list.into_iter().map(|call| {
        let wrong = |found: &str| RowFault::key(format!("{place}.{key}"), found, expected);
        let call = parsed(call);
        let call = call.get("function").unwrap_or(&call);
        let name = call.get("name").and_then(Value::as_str);
        let name = name.filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| wrong("a call without `name`"))?;
        match call.get("arguments").or_else(|| call.get("parameters")) {
            None | Some(Value::Null) => Ok(Call::new(name, "{}")),
            Some(Value::String(text)) => Ok(Call::new(name, text)),
            Some(arguments @ Value::Object(_)) => Ok(Call::new(name, &arguments.to_string())),
            Some(other) => Err(wrong(&format!(
                "a call whose arguments are {}",
                kind_of(other)
            ))),
        }
    });
    calls.collect()
}

/// An answer with its calls after its words.
fn in_answer(words: &str, calls: &[Call]) -> String {
    let mut turn = Turn::text(Speaker::Assistant, "");
    turn.tool_calls = calls.to_vec();
    let calls = tags::escaped(&with_calls(&turn));
    match (words, calls.as_str()) {
        ("", calls) => calls.to_owned(),
        (words, "") => words.to_owned(),
        (words, calls) => format!("{words}\n{calls}"),
    }
}

/// A message of the assistant with its calls in its content.
fn answer(mut fields: Map<String, Value>, place: &str) -> Result<Map<String, Value>, RowFault> {
    let mut calls = Vec::new();
    for key in ["tool_calls", "function_call"] {
        let value = fields
            .shift_remove(key)
            .filter(|value| !row_keys::is_empty(value));
        if let Some(value) = value {
            calls.extend(calls_of(Some(&value), place, key)?);
        }
    }
    if calls.is_empty() {
        return Ok(fields);
    }
    let words = match fields.get("content") {
        None | Some(Value::Null) => "",
        Some(Value::String(text)) => text,
        Some(other) => {
            return Err(RowFault::key(
                format!("{place}.content"),
                kind_of(other),
                "a text",
            ));
        }
    };
    let text = in_answer(words, &calls);
    fields.insert("content".to_owned(), text.into());
    Ok(fields)
}

/// Adds `text` and the other keys of a message to the one before it, which is of the same role.
///
/// # Errors
/// [`RowFault::Key`] if they are learnt differently: both are one message then.
fn join(
    before: &mut Value,
    fields: Map<String, Value>,
    text: &str,
    place: &str,
) -> Result<(), RowFault> {
    let differs = learnt::KEYS
        .iter()
        .find(|key| before.get(**key) != fields.get(**key));
    if let Some(key) = differs {
        return Err(RowFault::key(
            format!("{place}.{key}"),
            "other than that of the message before it",
            "the same for messages of one role that follow each other: they are one message",
        ));
    }
    let said = before["content"].as_str().unwrap_or_default();
    before["content"] = match said {
        "" => text.into(),
        said => format!("{said}\n{text}").into(),
    };
    if let Value::Object(before) = before {
        for (key, value) in fields {
            before.entry(key).or_insert(value);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::sample::parse_fields;

    fn texts(row: Value) -> Result<Vec<String>, String> {
        let parsed = parse_fields(row.as_object().unwrap().clone());
        let (sample, plain) = parsed.map_err(|fault| fault.to_string())?;
        assert!(!plain.contains_key("tools"));
        let messages = sample.conversation.messages();
        let texts = messages
            .iter()
            .map(|message| format!("{}: {}", message.role.as_str(), message.content.text()));
        Ok(texts.collect())
    }

    const CALL: &str =
        "<tool_call>\n{\"name\": \"find\", \"arguments\": {\"名\": \"张\"}}\n</tool_call>";
    const RESULT: &str = "<tool_response>\n无\n</tool_response>";

    #[test]
    fn every_way_to_write_a_call_is_the_same_text() {
        let expected = [
            "user: 问".to_owned(),
            format!("assistant: 我查。\n{CALL}"),
            format!("user: {RESULT}"),
            "assistant: 未见。".to_owned(),
        ];
        let call = json!({"name": "find", "arguments": {"名": "张"}});
        let as_text = json!({"name": "find", "arguments": "{\"名\":\"张\"}"});
        for (calling, role) in [
            (
                vec![
                    json!({"role": "assistant", "content": "我查。", "tool_calls": [{"id": "c1", "type": "function", "function": as_text}]}),
                ],
                "tool",
            ),
            (
                vec![json!({"role": "assistant", "content": "我查。", "function_call": call})],
                "function",
            ),
            (
                vec![
                    json!({"role": "assistant", "content": "我查。"}),
                    json!({"role": "tool_call", "content": call.to_string()}),
                ],
                "tool_response",
            ),
            (
                vec![
                    json!({"from": "gpt", "value": "我查。"}),
                    json!({"from": "function_call", "value": as_text.to_string()}),
                ],
                "observation",
            ),
        ] {
            let mut messages = vec![json!({"role": "user", "content": "问"})];
            messages.extend(calling);
            messages
                .push(json!({"role": role, "content": "无", "tool_call_id": "c1", "name": "find"}));
            messages.push(json!({"role": "assistant", "content": "未见。"}));
            assert_eq!(
                texts(json!({"messages": messages})).unwrap(),
                expected,
                "{role}"
            );
        }
    }

    #[test]
    fn descriptions_follow_the_system_message() {
        let bare = json!({"name": "find", "parameters": {"type": "object", "properties": {}}});
        let wrapped = json!({"type": "function", "function": bare});
        let messages =
            json!([{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]);
        let expected =
            texts(json!({"tools": [wrapped], "system": "简", "messages": messages})).unwrap();
        assert!(
            expected[0].starts_with("system: 简\n\n# Tools\n\nYou may call"),
            "{}",
            expected[0]
        );
        for tools in [
            json!([bare]),
            json!(json!([bare]).to_string()),
            json!([wrapped.to_string()]),
            bare.clone(),
        ] {
            let row = json!({"tools": tools, "system": "简", "messages": messages});
            assert_eq!(texts(row).unwrap(), expected, "{tools}");
        }
        let alone = texts(json!({"functions": [bare], "query": "问", "response": "答"})).unwrap();
        assert!(alone[0].starts_with("system: # Tools"));
        // A tag in a description is words.
        let tagged = json!({"name": "find", "description": "puts <image> in"});
        let found = texts(json!({"tools": [tagged], "messages": messages})).unwrap();
        assert!(found[0].contains("puts <image> in"), "{}", found[0]);
    }

    #[test]
    fn results_of_several_calls_are_one_message_and_calls_one_answer() {
        let call = json!({"role": "tool_call", "content": "{\"name\": \"find\", \"arguments\": {\"名\": \"张\"}}"});
        let result = json!({"role": "tool", "content": "无"});
        let row = json!({"messages": [
            {"role": "user", "content": "问"}, call, call, result, result, {"role": "assistant", "content": "未见。"},
        ]});
        assert_eq!(
            texts(row).unwrap(),
            [
                "user: 问".to_owned(),
                format!("assistant: {CALL}\n{CALL}"),
                format!("user: {RESULT}\n{RESULT}"),
                "assistant: 未见。".to_owned(),
            ]
        );
    }

    #[test]
    fn what_is_no_call_is_refused() {
        let row = |message: Value| {
            let user = json!({"role": "user", "content": "问"});
            json!({"messages": [user, message, {"role": "assistant", "content": "答"}]})
        };
        for (row, says) in [
            (
                row(json!({"role": "tool_call", "content": "look"})),
                "`messages[1].content` is a text",
            ),
            (
                row(json!({"role": "tool_call", "content": "{\"arguments\": {}}"})),
                "without `name`",
            ),
            (
                row(
                    json!({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}),
                ),
                "arguments are a list",
            ),
            (
                json!({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "x"},
                    {"role": "tool", "content": "1"}, {"role": "tool", "content": "2", "loss": true},
                    {"role": "assistant", "content": "答"}]}),
                "`messages[3].loss` is other than that of the message before it",
            ),
            (
                json!({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "x"},
                    {"role": "tool", "content": null}]}),
                "`messages[2].content` is null",
            ),
            (
                row(json!({"role": "user", "content": "x", "tool_calls": [1]})),
                "tool_calls",
            ),
            (
                row(json!({"role": "tool", "content": "x"})),
                "`tool` without a call before it",
            ),
            (
                json!({"tools": "look", "query": "q", "response": "a"}),
                "`tools` is a text",
            ),
            (
                json!({"tools": [{"type": "function"}], "query": "q", "response": "a"}),
                "without the `name`",
            ),
            (
                json!({"tools": [{"name": "f"}], "functions": [{"name": "f"}], "query": "q", "response": "a"}),
                "beside `tools`",
            ),
            (
                json!({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "x", "loss": false},
                    {"role": "tool_call", "content": "{\"name\": \"f\"}"}]}),
                "`messages[2].loss`",
            ),
        ] {
            let fault = texts(row.clone()).unwrap_err();
            assert!(fault.contains(says), "{row}: {fault}");
        }
    }
}

//! Rows that are to be answered, not learnt: what they may lack, and what means nothing for them.

use serde_json::{Map, Value, json};

use super::learnt;
use super::literal;
use super::row_fault::{RowFault, kind_of};
use super::row_forms::{CONVERSATIONS, QUERY, RESPONSE, is_xrayglm, only};
use super::{row_keys, row_turns::history};

/// Gives a row without an answer its `messages`: the question of the row, or `question` about its images.
///
/// A row with an answer, or with a key that may be one, stays as it is.
///
/// # Errors
/// [`RowFault`] if two keys say the same, or a question or `history` is of another kind.
pub(super) fn ask(row: &mut Map<String, Value>, question: &str) -> Result<(), RowFault> {
    let given = |row: &Map<String, Value>, key: &str| {
        row.get(key).is_some_and(|value| !row_keys::is_empty(value))
    };
    let is_conversation = CONVERSATIONS.iter().any(|key| given(row, key));
    if is_conversation || is_xrayglm(row) || only(row, &RESPONSE)?.is_some() {
        return Ok(());
    }
    let is_alpaca = given(row, "instruction") && given(row, "input");
    let query = match is_alpaca {
        true => Some("instruction".to_owned()),
        false => only(row, &QUERY)?,
    };
    let shows = ["images", "image", "img"].iter().any(|key| given(row, key));
    let is_own = |key: &str| {
        query.as_deref() == Some(key) || (is_alpaca && key == "input") || key == "history"
    };
    let doubtful = row.iter().any(|(key, value)| {
        !is_own(key) && row_keys::may_be_answer(key) && !row_keys::is_empty(value)
    });
    if doubtful || (query.is_none() && !shows) {
        return Ok(());
    }
    let mut text = |key: &str| match row.shift_remove(key) {
        Some(Value::String(text)) => Ok(text),
        other => {
            let found = other.as_ref().map_or("missing", kind_of);
            Err(RowFault::key(key, found, "a text"))
        }
    };
    let mut asked = match &query {
        Some(key) => text(key)?,
        None => question.to_owned(),
    };
    if is_alpaca {
        asked = format!("{asked}\n{}", text("input")?);
    }
    let earlier = match row.shift_remove("history") {
        Some(Value::String(text)) => Some(literal::parse(&text).unwrap_or(Value::String(text))),
        other => other,
    };
    let mut messages = history(earlier)?;
    messages.push(json!({"role": "user", "content": asked}));
    for key in QUERY.iter().chain(&RESPONSE) {
        if row.get(*key).is_some_and(row_keys::is_empty) {
            row.shift_remove(*key);
        }
    }
    row.insert("messages".to_owned(), messages.into());
    Ok(())
}

/// Takes out of a row with `messages` what only training reads: `loss` and its like, and an empty last answer.
pub(super) fn without_lesson(row: &mut Map<String, Value>) {
    row.retain(|key, _| !learnt::ROW_KEYS.contains(&key.as_str()));
    let Some(Value::Array(messages)) = row.get_mut("messages") else {
        return;
    };
    for message in messages.iter_mut().filter_map(Value::as_object_mut) {
        message.retain(|key, _| !learnt::KEYS.contains(&key.as_str()));
    }
    let is_empty_answer = |message: &Value| {
        let content = message.get("content");
        message.get("role").and_then(Value::as_str) == Some("assistant")
            && content.is_none_or(row_keys::is_empty)
            && message.get("tool_calls").is_none_or(row_keys::is_empty)
    };
    if messages.last().is_some_and(is_empty_answer) {
        messages.pop();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::sample::parse_question;

    const STANDARD: &str = "写报告";

    fn asked(row: Value) -> Result<(Vec<String>, Option<String>), String> {
        let fields = row.as_object().unwrap().clone();
        let (sample, _) = parse_question(fields, STANDARD).map_err(|fault| fault.to_string())?;
        let messages = sample.conversation.prompt_messages();
        let texts = messages.iter().map(|message| message.content.text());
        let answer = sample.conversation.last_answer().map(str::to_owned);
        Ok((texts.collect(), answer))
    }

    #[test]
    fn a_row_needs_no_answer() {
        for (row, texts, answer) in [
            (json!({"image": "a.png"}), vec![STANDARD], None),
            (
                json!({"images": "a.png", "id": 7, "response": ""}),
                vec![STANDARD],
                None,
            ),
            (json!({"query": "问", "images": ["a"]}), vec!["问"], None),
            (
                json!({"instruction": "问", "input": "二", "output": null, "image": "a"}),
                vec!["问\n二"],
                None,
            ),
            (
                json!({"query": "二", "history": "[[\"一\", \"答\"]]", "image": "a"}),
                vec!["一", "答", "二"],
                None,
            ),
            (
                json!({"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": ""}]}),
                vec!["问"],
                None,
            ),
            (
                json!({"query": "问", "response": "答", "loss": false}),
                vec!["问"],
                Some("答"),
            ),
            (
                json!({"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答", "loss": false}]}),
                vec!["问"],
                Some("答"),
            ),
        ] {
            let found = asked(row.clone()).unwrap();
            assert_eq!(found.0, texts, "{row}");
            assert_eq!(found.1.as_deref(), answer, "{row}");
        }
    }

    #[test]
    fn what_may_be_an_answer_is_not_passed_over() {
        for (row, says) in [
            (
                json!({"image": "a.png", "report": "双肺清晰"}),
                "response=report",
            ),
            (
                json!({"image": "a.png", "query": "问", "label": true}),
                "query",
            ),
            (
                json!({"query": "一", "prompt": "二"}),
                "`query` is given beside `prompt`",
            ),
            (json!({"query": ["一"], "image": "a"}), "`query` is a list"),
            (json!({"id": 3}), "expected"),
            (json!({"query": "q", "history": 5}), "`history` is a number"),
        ] {
            let fault = asked(row.clone()).unwrap_err();
            assert!(fault.contains(says), "{row}: {fault}");
        }
    }
}

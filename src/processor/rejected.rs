//! The answer of a row that is not to be given, for preference training.
//!
//! ms-swift's keys: `rejected_response`, a text or the messages after the last question, and `rejected_messages`, a
//! whole conversation about the same images.

use serde_json::{Map, Value, json};

use super::{
    conversation::Conversation,
    row_fault::{RowFault, kind_of},
    row_keys::REJECTED_KEYS,
    sample::{Sample, parse_fields},
};

impl Sample {
    /// The conversation with the rejected answer of a preference row in place of the last one; `None` where the row
    /// has none.
    ///
    /// # Errors
    /// [`RowFault`]: what is not such an answer, or the same as the chosen one.
    pub fn rejected_conversation(&self) -> Result<Option<Conversation>, RowFault> {
        let own = self.rejected.as_deref();
        own.map(|own| conversation(own, &self.conversation, &self.images))
            .transpose()
    }
}

/// The conversation with the rejected answer in place of the last one.
///
/// # Errors
/// [`RowFault`]: another type, no answer, both keys, other images, or the same answer as the chosen one.
fn conversation(
    own: &Map<String, Value>,
    chosen: &Conversation,
    images: &[String],
) -> Result<Conversation, RowFault> {
    if own.contains_key("rejected_images") {
        return Err(RowFault::key(
            "rejected_images",
            "given",
            "it absent: both answers of a pair are about the images of the row",
        ));
    }
    let [response, messages] = REJECTED_KEYS.map(|key| own.get(key));
    let rejected = match (response, messages) {
        (Some(_), Some(_)) => {
            return Err(RowFault::key(
                REJECTED_KEYS[0],
                "given beside `rejected_messages`",
                "one of the two",
            ));
        }
        (Some(response), None) => {
            let answer = answer_of(response)?;
            let mut rejected = chosen.clone();
            if let Some(last) = rejected.turns.last_mut() {
                last.answer = Some(answer);
            }
            rejected
        }
        (None, messages) => {
            let mut row = Map::new();
            row.insert("messages".to_owned(), messages.cloned().unwrap_or_default());
            row.insert("images".to_owned(), json!(images));
            let mut rejected = parse_fields(row)
                .map_err(|fault| {
                    RowFault::key(REJECTED_KEYS[1], fault.to_string(), "a whole conversation")
                })?
                .0
                .conversation;
            if rejected.last_answer().is_none() {
                return Err(RowFault::key(
                    REJECTED_KEYS[1],
                    "without an answer",
                    "a whole conversation",
                ));
            }
            if rejected.system.is_none() {
                rejected.system.clone_from(&chosen.system);
            }
            rejected
        }
    };
    if rejected == *chosen {
        return Err(RowFault::key(
            if response.is_some() {
                REJECTED_KEYS[0]
            } else {
                REJECTED_KEYS[1]
            },
            "the chosen answer again",
            "another answer",
        ));
    }
    Ok(rejected)
}

/// The answer that `rejected_response` holds.
fn answer_of(response: &Value) -> Result<String, RowFault> {
    let wrong = |found: &str| {
        RowFault::key(
            REJECTED_KEYS[0],
            found,
            "a text, or messages of `assistant`",
        )
    };
    let text = match response {
        Value::String(text) => text.clone(),
        Value::Array(messages) => {
            let mut text = String::new();
            for message in messages {
                match (message["role"].as_str(), message["content"].as_str()) {
                    (Some("assistant"), Some(content)) => text.push_str(content),
                    _ => return Err(wrong("a list with another entry")),
                }
            }
            text
        }
        other => return Err(wrong(kind_of(other))),
    };
    if text.trim().is_empty() {
        return Err(RowFault::EmptyAnswer {
            key: REJECTED_KEYS[0].to_owned(),
        });
    }
    // With the tags and escapes of an answer.
    let row = json!({"messages": [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": text},
    ]});
    let Value::Object(row) = row else {
        return Ok(text);
    };
    let (sample, _) = parse_fields(row)
        .map_err(|fault| RowFault::key(REJECTED_KEYS[0], fault.to_string(), "an answer"))?;
    Ok(sample
        .conversation
        .last_answer()
        .unwrap_or_default()
        .to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::sample::fields_of;

    fn parse(rest: &str) -> Sample {
        let line = format!(
            r#"{{"messages":[{{"role":"user","content":"<image>看"}},{{"role":"assistant","content":"左侧气胸。"}}],"images":["a.png"],{rest}}}"#
        );
        parse_fields(fields_of(&line).unwrap()).unwrap().0
    }

    #[test]
    fn a_rejected_answer_takes_the_place_of_the_last_one() {
        for rest in [
            r#""rejected_response":"右侧气胸。""#,
            r#""rejected_response":[{"role":"assistant","content":"右侧气胸。"}]"#,
            r#""rejected_messages":[{"role":"user","content":"<image>看"},{"role":"assistant","content":"右侧气胸。"}]"#,
        ] {
            let sample = parse(rest);
            let rejected = sample.rejected_conversation().unwrap().unwrap();
            assert_eq!(rejected.last_answer(), Some("右侧气胸。"), "{rest}");
            assert_eq!(
                rejected.turns[0].question,
                sample.conversation.turns[0].question
            );
        }
        assert_eq!(parse(r#""id":1"#).rejected_conversation().unwrap(), None);
    }

    #[test]
    fn what_is_no_pair_is_named() {
        for (rest, part) in [
            (
                r#""rejected_response":"左侧气胸。""#,
                "the chosen answer again",
            ),
            (
                r#""rejected_response":5"#,
                "a text, or messages of `assistant`",
            ),
            (
                r#""rejected_response":"x","rejected_images":["b.png"]"#,
                "rejected_images",
            ),
            (
                r#""rejected_response":"x","rejected_messages":[{}]"#,
                "one of the two",
            ),
            (
                r#""rejected_messages":[{"role":"user","content":"x"}]"#,
                "without an answer",
            ),
        ] {
            let error = parse(rest).rejected_conversation().unwrap_err().to_string();
            assert!(error.contains(part), "{rest}: {error}");
        }
    }
}

//! The body of `POST /v1/responses`, as the conversation it comes to.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{
    Reader,
    rules::{
        GENERATION_RULES, ITEM_RULES, REASONING_RULES, RESPONSES_RULES, STREAM_RULES, TEXT_RULES,
    },
    tools::{ToolForm, arguments},
};
use crate::serve::{
    error::ApiError,
    fields::{Fields, wrong_kind},
    types::{ChatContent, ChatMessage, ChatPart, ChatRequest, GenerationFields, ToolCall},
};

/// A request, and what its response repeats of it.
#[derive(Debug, Clone)]
pub(in crate::serve) struct ResponsesRequest {
    /// The conversation.
    pub(in crate::serve) chat: ChatRequest,
    /// Fields as the response has them.
    pub(in crate::serve) repeated: Map<String, Value>,
}

/// Fields that a response repeats as they came, and what it has where they were absent.
fn repeated(fields: &Fields) -> Map<String, Value> {
    let or = |name: &str, default: Value| fields.peek(name).cloned().unwrap_or(default);
    let mut text = or("text", json!({}));
    if text.is_object() && text["format"].is_null() {
        text["format"] = json!({"type": "text"});
    }
    let object = json!({
        "instructions": or("instructions", Value::Null),
        "max_output_tokens": or("max_output_tokens", Value::Null),
        "metadata": or("metadata", json!({})),
        "parallel_tool_calls": or("parallel_tool_calls", true.into()),
        "reasoning": {"effort": null, "summary": null},
        "temperature": or("temperature", Value::Null),
        "text": text,
        "tool_choice": or("tool_choice", "auto".into()),
        "tools": or("tools", json!([])),
        "top_logprobs": or("top_logprobs", 0.into()),
        "top_p": or("top_p", Value::Null),
        "user": or("user", Value::Null),
    });
    match object {
        Value::Object(object) => object,
        _ => Map::new(),
    }
}

/// The conversation so far.
#[derive(Default)]
struct Conversation {
    messages: Vec<ChatMessage>,
    /// Reasoning that belongs to the next item of the assistant.
    reasoning: Option<String>,
    /// Ids of calls.
    calls: BTreeSet<String>,
}

impl Conversation {
    /// The assistant's message that is under way, or a new one. Its reasoning, text and calls are items of
    /// their own here, and one message of a chat.
    fn assistant(&mut self, wants_content: bool) -> &mut ChatMessage {
        let goes_on = self.reasoning.is_none()
            && self.messages.last().is_some_and(|last| {
                last.role == "assistant" && !(wants_content && last.content.is_some())
            });
        if !goes_on {
            self.messages.push(ChatMessage {
                role: "assistant".into(),
                reasoning_content: self.reasoning.take(),
                ..ChatMessage::default()
            });
        }
        self.messages.last_mut().expect("one was pushed")
    }
}

impl Reader {
    fn input(&mut self, value: Value, conversation: &mut Conversation) -> Result<(), ApiError> {
        let items = match value {
            Value::String(text) => {
                conversation.messages.push(ChatMessage {
                    role: "user".into(),
                    content: Some(ChatContent::Text(text)),
                    ..ChatMessage::default()
                });
                return Ok(());
            }
            Value::Array(items) => items,
            other => return Err(wrong_kind("input", &other, "a text or a list of items")),
        };
        for (index, item) in items.into_iter().enumerate() {
            self.item(item, &format!("input[{index}]"), conversation)?;
        }
        Ok(())
    }

    fn item(
        &mut self,
        value: Value,
        path: &str,
        conversation: &mut Conversation,
    ) -> Result<(), ApiError> {
        let mut fields = Fields::of(value, path)?;
        let kind = fields.text("type")?;
        match kind.as_deref() {
            None | Some("message") => {
                let role = fields.text("role")?;
                let role = fields.needed("role", role)?;
                let name = fields.name("content");
                let found = fields.value("content");
                let content = self.content(fields.needed("content", found)?, &name)?;
                if role == "assistant" {
                    conversation.assistant(true).content = Some(content);
                } else {
                    conversation.messages.push(ChatMessage {
                        role,
                        content: Some(content),
                        ..ChatMessage::default()
                    });
                }
            }
            Some("function_call") => {
                let id = fields.text("call_id")?;
                let name = fields.text("name")?;
                let call = ToolCall {
                    name: fields.needed("name", name)?,
                    arguments: arguments(&mut fields)?,
                };
                conversation.calls.insert(fields.needed("call_id", id)?);
                conversation.assistant(false).tool_calls.push(call);
            }
            Some("function_call_output") => {
                let id = fields.text("call_id")?;
                let id = fields.needed("call_id", id)?;
                if !conversation.calls.contains(&id) {
                    let name = fields.name("call_id");
                    return Err(ApiError::invalid(
                        &name,
                        format!("`{name}` is the id of no call before it"),
                    ));
                }
                let name = fields.name("output");
                let found = fields.value("output");
                let content = self.content(fields.needed("output", found)?, &name)?;
                conversation.messages.push(ChatMessage {
                    role: "tool".into(),
                    content: Some(content),
                    ..ChatMessage::default()
                });
            }
            Some("reasoning") => {
                let name = fields.name("content");
                let content = match fields.value("content") {
                    None => None,
                    Some(value) => Some(self.content(value, &name)?),
                };
                if let Some(ChatContent::Parts(parts)) = content {
                    let texts = parts.into_iter().filter_map(|part| match part {
                        ChatPart::Text { text } => Some(text),
                        ChatPart::ImageUrl { .. } => None,
                    });
                    conversation.reasoning = Some(texts.collect());
                }
            }
            Some(other) => {
                let other: String = other.chars().take(40).collect();
                return Err(ApiError::invalid(
                    path,
                    format!(
                        "`{path}` is of the type `{other}`, expected `message`, `function_call`, \
                         `function_call_output` or `reasoning`"
                    ),
                ));
            }
        }
        self.finish(fields, ITEM_RULES)
    }

    /// `include`: whether log probabilities are wanted.
    fn include(fields: &mut Fields) -> Result<bool, ApiError> {
        let mut logprobs = false;
        for one in fields.texts("include")?.unwrap_or_default() {
            match one.as_str() {
                "message.output_text.logprobs" => logprobs = true,
                // The reasoning is sent as it is, and can be sent back.
                "reasoning.encrypted_content" => {}
                _ => {
                    let one: String = one.chars().take(60).collect();
                    return Err(ApiError::invalid(
                        "include",
                        format!(
                            "`include` has `{one}`; this server takes `message.output_text.logprobs` only"
                        ),
                    ));
                }
            }
        }
        Ok(logprobs)
    }
}

impl ResponsesRequest {
    /// Reads the body of a request; `lenient` passes over what is unknown and names it in `ignored`.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field.
    pub(in crate::serve) fn read(mut fields: Fields, lenient: bool) -> Result<Self, ApiError> {
        let mut reader = Reader::new(lenient);
        let repeated = repeated(&fields);
        let mut conversation = Conversation::default();
        if let Some(instructions) = fields.text("instructions")? {
            conversation.messages.push(ChatMessage {
                role: "system".into(),
                content: Some(ChatContent::Text(instructions)),
                ..ChatMessage::default()
            });
        }
        let input = fields.value("input");
        reader.input(fields.needed("input", input)?, &mut conversation)?;
        let mut generation = GenerationFields {
            max_output_tokens: fields.count("max_output_tokens")?,
            ..GenerationFields::default()
        };
        Self::read_rest(&mut reader, &mut fields, &mut generation)?;
        let mut chat = ChatRequest {
            findings: false,
            model: fields.text("model")?,
            messages: conversation.messages,
            tools: reader.tool_use(&mut fields, ToolForm::Flat)?,
            prompt: reader.prompt_options(&mut fields)?,
            generation,
            ignored: Vec::new(),
        };
        reader.finish_all(fields, &[RESPONSES_RULES, GENERATION_RULES])?;
        chat.ignored = reader.ignored;
        Ok(Self { chat, repeated })
    }

    fn read_rest(
        reader: &mut Reader,
        fields: &mut Fields,
        generation: &mut GenerationFields,
    ) -> Result<(), ApiError> {
        Reader::sampling(fields, generation)?;
        generation.top_k = fields.integer("top_k")?;
        generation.min_p = fields.number("min_p")?;
        generation.repetition_penalty = fields.number("repetition_penalty")?;
        generation.frequency_penalty = fields.number("frequency_penalty")?;
        generation.presence_penalty = fields.number("presence_penalty")?;
        generation.seed = fields.integer("seed")?;
        if let Some(mut text) = fields.object("text")? {
            if let Some(format) = text.object("format")? {
                generation.form = reader.text_format(format)?;
            }
            reader.finish(text, TEXT_RULES)?;
        }
        let wanted = Reader::include(fields)?;
        let top = fields.count("top_logprobs")?.unwrap_or(0);
        generation.logprobs = (wanted || top > 0).then_some(top);
        if let Some(reasoning) = fields.object("reasoning")? {
            reader.finish(reasoning, REASONING_RULES)?;
        }
        if let Some(options) = fields.object("stream_options")? {
            reader.finish(options, STREAM_RULES)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::super::fields::parse_body, *};

    fn read(body: Value) -> Result<ResponsesRequest, ApiError> {
        ResponsesRequest::read(parse_body(body.to_string().as_bytes()).unwrap(), false)
    }

    #[test]
    fn items_become_the_messages_of_a_chat() {
        let request = read(json!({
            "instructions": "Be short.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "?"}]},
                {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a", "annotations": []}]},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c2", "output": "2"},
            ],
        }))
        .unwrap();
        let roles: Vec<&str> = request
            .chat
            .messages
            .iter()
            .map(|message| message.role.as_str())
            .collect();
        assert_eq!(roles, ["system", "user", "assistant", "tool"]);
        let assistant = &request.chat.messages[2];
        assert_eq!(assistant.reasoning_content.as_deref(), Some("hm"));
        assert!(assistant.content.is_some());
        assert_eq!(assistant.tool_calls.len(), 2);
        assert_eq!(request.repeated["instructions"], "Be short.");
        assert_eq!(request.repeated["text"]["format"]["type"], "text");
    }

    #[test]
    fn what_needs_a_memory_is_refused_by_its_name() {
        for (more, param) in [
            (json!({"store": true}), "store"),
            (
                json!({"previous_response_id": "resp_1"}),
                "previous_response_id",
            ),
            (json!({"conversation": "c"}), "conversation"),
            (json!({"background": true}), "background"),
            (json!({"truncation": "auto"}), "truncation"),
            (json!({"reasoning": {"effort": "low"}}), "reasoning.effort"),
            (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
            (
                json!({"input": [{"type": "item_reference", "id": "x"}]}),
                "input[0]",
            ),
            (json!({"max_tokens": 5}), "max_tokens"),
            (
                json!({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}),
                "input[0].call_id",
            ),
        ] {
            let mut body = json!({"input": "?"});
            body.as_object_mut()
                .unwrap()
                .extend(more.as_object().unwrap().clone());
            let error = read(body).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{more}: {error}");
        }
        let fine = json!({"input": "?", "store": false, "background": false, "reasoning": null});
        assert!(read(fine).is_ok());
    }
}

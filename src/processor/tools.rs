//! Tools in a prompt: descriptions of functions, calls and results.
//!
//! A template that reads `tools` writes them itself, as those of the published checkpoints do. For one
//! that does not, [`in_words`] writes the same text into ordinary messages: Hermes' form, which Qwen's
//! models are trained on.

use serde::Serialize;
use serde_json::{Value, json};

use super::{
    jinja::python_json,
    message::{Content, Message, Part, Role},
};

/// Opens a call in an answer; one token of Qwen's vocabulary.
pub const CALL_OPEN: &str = "<tool_call>";

/// Closes a call.
pub const CALL_CLOSE: &str = "</tool_call>";

const RESULT_OPEN: &str = "<tool_response>";
const RESULT_CLOSE: &str = "</tool_response>";

/// Author of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Speaker {
    /// Instructions.
    System,
    /// Asks.
    User,
    /// Answers and calls.
    Assistant,
    /// The result of a call.
    Tool,
}

impl Speaker {
    /// The role as templates write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::System => "system",
            Self::User => "user",
            Self::Assistant => "assistant",
            Self::Tool => "tool",
        }
    }
}

/// One message of a conversation in which functions may be called.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Turn {
    /// Its author.
    pub role: Speaker,
    /// Text and images.
    pub content: Content,
    /// Reasoning before an answer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    /// Calls of an answer.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<Call>,
}

/// One call of a function.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "type", rename = "function")]
pub struct Call {
    /// Name and arguments.
    pub function: CalledFunction,
}

/// Name and arguments of a call.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CalledFunction {
    /// The function.
    pub name: String,
    /// An object, or a text where that is not JSON.
    pub arguments: Value,
}

impl Call {
    /// A call with arguments as text, which is read where it is a JSON object.
    pub fn new(name: impl Into<String>, arguments: &str) -> Self {
        let read = serde_json::from_str(arguments).ok();
        let arguments = read
            .filter(Value::is_object)
            .unwrap_or_else(|| arguments.into());
        Self {
            function: CalledFunction {
                name: name.into(),
                arguments,
            },
        }
    }

    fn text(&self) -> String {
        let CalledFunction { name, arguments } = &self.function;
        let arguments = match arguments {
            Value::String(text) => text.clone(),
            value => python_json(value),
        };
        let name = json!(name);
        format!("{CALL_OPEN}\n{{\"name\": {name}, \"arguments\": {arguments}}}\n{CALL_CLOSE}")
    }
}

/// The description of a function, as templates take it.
pub fn description(name: &str, text: Option<&str>, parameters: Option<&Value>) -> Value {
    let mut function = json!({"name": name});
    if let Some(text) = text {
        function["description"] = text.into();
    }
    function["parameters"] = match parameters {
        Some(parameters) => parameters.clone(),
        None => json!({"type": "object", "properties": {}}),
    };
    json!({"type": "function", "function": function})
}

/// What the system message says of functions.
///
/// Source: the chat template of Qwen3-VL; models know this wording.
pub(super) fn instructions(tools: &[Value]) -> String {
    let tools: String = tools
        .iter()
        .map(|tool| format!("\n{}", python_json(tool)))
        .collect();
    format!(
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\
         You are provided with function signatures within <tools></tools> XML tags:\n<tools>{tools}\n</tools>\n\n\
         For each function call, return a json object with function name and arguments within \
         {CALL_OPEN}{CALL_CLOSE} XML tags:\n{CALL_OPEN}\n\
         {{\"name\": <function-name>, \"arguments\": <args-json-object>}}\n{CALL_CLOSE}"
    )
}

/// The conversation in messages of a template that knows no tools.
pub fn in_words(turns: &[Turn], tools: &[Value]) -> Vec<Message> {
    let mut messages: Vec<Message> = Vec::with_capacity(turns.len() + 1);
    if !tools.is_empty() {
        messages.push(Message::text(Role::System, instructions(tools)));
    }
    let mut after_result = false;
    for turn in turns {
        let is_result = turn.role == Speaker::Tool;
        let message = match turn.role {
            Speaker::System if !tools.is_empty() && messages.len() == 1 => {
                let said = turn.content.text();
                let about_tools = messages[0].content.text();
                messages[0].content = Content::Text(format!("{said}\n\n{about_tools}"));
                continue;
            }
            Speaker::System => Message::text(Role::System, turn.content.text()),
            Speaker::User => Message {
                role: Role::User,
                content: turn.content.clone(),
                reasoning_content: None,
            },
            Speaker::Assistant => Message {
                role: Role::Assistant,
                content: Content::Text(with_calls(turn)),
                reasoning_content: turn.reasoning_content.clone(),
            },
            Speaker::Tool => {
                let result = result_text(&turn.content.text());
                // Results of several calls are one message.
                if after_result
                    && let Some(Content::Text(before)) =
                        messages.last_mut().map(|last| &mut last.content)
                {
                    before.push('\n');
                    before.push_str(&result);
                    continue;
                }
                Message::text(Role::User, result)
            }
        };
        after_result = is_result;
        messages.push(message);
    }
    messages
}

/// The result of a call as the model reads it.
pub(super) fn result_text(text: &str) -> String {
    format!("{RESULT_OPEN}\n{text}\n{RESULT_CLOSE}")
}

/// The words of an answer, then its calls.
pub(super) fn with_calls(turn: &Turn) -> String {
    let mut lines = vec![turn.content.text()];
    lines.extend(turn.tool_calls.iter().map(Call::text));
    lines.retain(|line| !line.is_empty());
    lines.join("\n")
}

impl Turn {
    /// A turn of words alone.
    pub fn text(role: Speaker, text: impl Into<String>) -> Self {
        Self {
            role,
            content: Content::Text(text.into()),
            reasoning_content: None,
            tool_calls: Vec::new(),
        }
    }

    /// All texts in it, each for itself: words, reasoning, names and arguments of calls.
    pub fn texts(&self) -> Vec<String> {
        let mut texts = vec![self.content.text()];
        texts.extend(self.reasoning_content.clone());
        for call in &self.tool_calls {
            texts.push(call.function.name.clone());
            texts.push(match &call.function.arguments {
                Value::String(text) => text.clone(),
                value => python_json(value),
            });
        }
        texts
    }

    /// Bytes of all texts.
    pub fn text_bytes(&self) -> usize {
        let content = match &self.content {
            Content::Text(text) => text.len(),
            Content::Parts(parts) => parts
                .iter()
                .map(|part| match part {
                    Part::Text { text } => text.len(),
                    Part::Image => 0,
                })
                .sum(),
        };
        let calls = self.tool_calls.iter().map(|call| {
            let CalledFunction { name, arguments } = &call.function;
            name.len() + arguments.to_string().len() + 2 * CALL_OPEN.len()
        });
        content + self.reasoning_content.as_ref().map_or(0, String::len) + calls.sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::processor::chat::{ChatTemplate, RenderOptions};

    /// The published template's way with tools, in short.
    const WITH_TOOLS: &str = r#"{%- if tools %}<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>{% for tool in tools %}{{ '\n' }}{{ tool | tojson }}{% endfor %}{{ '\n' }}</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call><|im_end|>
{% endif %}{% for message in messages %}{% if message.role == 'system' %}{% elif message.role == 'tool' %}
{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}<|im_start|>user{% endif %}{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}<|im_end|>
{% endif %}{% else %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls %}{% set call = call.function %}
{%- if not loop.first or message.content %}{{ '\n' }}{% endif %}<tool_call>
{"name": "{{ call.name }}", "arguments": {{ call.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"#;

    #[test]
    fn words_are_those_of_a_template_with_tools() {
        let tools = [
            description(
                "find",
                Some("Looks."),
                Some(&json!({"type": "object", "properties": {"名": {"type": "string"}}})),
            ),
            description("count", None, None),
        ];
        let mut asked = Turn::text(Speaker::Assistant, "");
        asked.tool_calls = vec![
            Call::new("find", "{\"名\":\"张\"}"),
            Call::new("count", "{}"),
        ];
        let turns = [
            Turn::text(Speaker::System, "Be short."),
            Turn::text(Speaker::User, "?"),
            asked,
            Turn::text(Speaker::Tool, "1"),
            Turn::text(Speaker::Tool, "2"),
        ];
        let options = RenderOptions::generation();
        let plain = ChatTemplate::instruct().unwrap();
        assert!(!plain.reads("tools"));
        let words = plain.render(&in_words(&turns, &tools), options).unwrap();
        let knowing = ChatTemplate::new(WITH_TOOLS, "test").unwrap();
        assert!(knowing.reads("tools") && !knowing.reads("enable_thinking"));
        let more = json!({"tools": tools});
        let more = more.as_object().unwrap();
        let rendered = knowing.render_with(&turns, more, options).unwrap();
        assert_eq!(words, rendered);
        assert!(words.contains("\n{\"type\": \"function\", \"function\": {\"name\": \"find\""));
        assert!(words.contains("<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n"));
        assert!(
            words.contains("{\"name\": \"find\", \"arguments\": {\"名\": \"张\"}}"),
            "{words}"
        );
    }
}

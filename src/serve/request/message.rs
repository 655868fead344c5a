//! Messages of a conversation and their pieces.

use std::collections::BTreeSet;

use serde_json::Value;

use super::{
    Reader,
    rules::{MESSAGE_RULES, PART_RULES, SIZE_RULES},
};
use crate::{
    processor::sample::PixelLimits,
    serve::{
        error::ApiError,
        fields::{Fields, wrong_kind},
        types::{ChatContent, ChatMessage, ChatPart, ImageSize, ImageUrl},
    },
};

const PART_TYPES: &str =
    "`text`, `image_url`, `input_text`, `input_image`, `output_text`, `image` or `refusal`";

impl Reader {
    /// Takes the messages of a conversation.
    pub(super) fn messages(&mut self, fields: &mut Fields) -> Result<Vec<ChatMessage>, ApiError> {
        let list = fields.list("messages")?;
        let mut read = Vec::new();
        let mut calls = BTreeSet::new();
        for (index, message) in fields.needed("messages", list)?.into_iter().enumerate() {
            read.push(self.message(message, &format!("messages[{index}]"), &mut calls)?);
        }
        Ok(read)
    }

    /// One message; `calls` are the ids of calls so far.
    fn message(
        &mut self,
        value: Value,
        path: &str,
        calls: &mut BTreeSet<String>,
    ) -> Result<ChatMessage, ApiError> {
        let mut fields = Fields::of(value, path)?;
        let role = fields.text("role")?;
        let role = fields.needed("role", role)?;
        let mut content = match fields.value("content") {
            None => None,
            Some(value) => Some(self.content(value, &fields.name("content"))?),
        };
        // vLLM writes the first, and lately the second.
        let reasoning_content = fields.text("reasoning_content")?;
        let reasoning = fields.text("reasoning")?;
        let mut tool_calls = Vec::new();
        match role.as_str() {
            "assistant" => {
                let name = fields.name("tool_calls");
                let list = fields.list("tool_calls")?.unwrap_or_default();
                for (index, call) in list.into_iter().enumerate() {
                    let (id, call) = self.call(call, &format!("{name}[{index}]"))?;
                    calls.extend(id);
                    tool_calls.push(call);
                }
                // What the model said instead of an answer.
                if let Some(refusal) = fields.text("refusal")?
                    && content.is_none()
                {
                    content = Some(ChatContent::Text(refusal));
                }
            }
            "tool" => {
                // Some clients repeat the function's name.
                fields.text("name")?;
                if let Some(id) = fields.text("tool_call_id")?
                    && !calls.contains(&id)
                {
                    let name = fields.name("tool_call_id");
                    return Err(ApiError::invalid(
                        &name,
                        format!("`{name}` is the id of no call before it"),
                    ));
                }
            }
            "function" => {
                let name = fields.name("role");
                return Err(ApiError::invalid(
                    &name,
                    format!(
                        "`{name}` is `function`, which is not supported; send a message of role `tool`"
                    ),
                ));
            }
            _ => {}
        }
        self.finish(fields, MESSAGE_RULES)?;
        Ok(ChatMessage {
            role,
            content,
            reasoning_content: reasoning_content.or(reasoning),
            tool_calls,
        })
    }

    /// Text, or a list of parts.
    pub(super) fn content(&mut self, value: Value, path: &str) -> Result<ChatContent, ApiError> {
        match value {
            Value::String(text) => Ok(ChatContent::Text(text)),
            Value::Array(parts) => {
                let mut taken = Vec::with_capacity(parts.len());
                for (index, part) in parts.into_iter().enumerate() {
                    taken.push(self.part(part, &format!("{path}[{index}]"))?);
                }
                Ok(ChatContent::Parts(taken))
            }
            other => Err(wrong_kind(path, &other, "a text or a list of parts")),
        }
    }

    fn part(&mut self, value: Value, path: &str) -> Result<ChatPart, ApiError> {
        if let Value::String(text) = value {
            return Ok(ChatPart::Text { text });
        }
        let mut fields = Fields::of(value, path)?;
        let kind = fields.text("type")?;
        let kind = fields.needed("type", kind)?;
        let part = match kind.as_str() {
            "text" | "input_text" | "output_text" | "summary_text" | "reasoning_text" => {
                let text = fields.text("text")?;
                ChatPart::Text {
                    text: fields.needed("text", text)?,
                }
            }
            "refusal" => {
                let text = fields.text("refusal")?;
                ChatPart::Text {
                    text: fields.needed("refusal", text)?,
                }
            }
            // OpenAI's, the Responses API's, and the one of Qwen's own examples.
            "image_url" | "input_image" | "image" => self.image(&mut fields, &kind)?,
            _ => {
                let kind: String = kind.chars().take(40).collect();
                return Err(ApiError::invalid(
                    path,
                    format!("`{path}` is of the type `{kind}`, expected {PART_TYPES}"),
                ));
            }
        };
        self.finish(fields, PART_RULES)?;
        Ok(part)
    }

    fn image(&mut self, fields: &mut Fields, kind: &str) -> Result<ChatPart, ApiError> {
        let mut found = Vec::new();
        let mut size = image_size(fields)?;
        let names: &[&'static str] = match kind {
            "image" => &["image", "image_url", "url"],
            _ => &["image_url"],
        };
        for &field in names {
            let name = fields.name(field);
            match fields.value(field) {
                None => {}
                Some(Value::String(url)) => found.push(url),
                Some(Value::Object(object)) => {
                    let mut inner = Fields::of(Value::Object(object), &name)?;
                    let url = inner.text("url")?;
                    found.push(inner.needed("url", url)?);
                    let of_url = image_size(&mut inner)?;
                    if of_url != ImageSize::default() {
                        size = of_url;
                    }
                    self.finish(inner, PART_RULES)?;
                }
                Some(other) => {
                    return Err(wrong_kind(&name, &other, "an address or {\"url\": …}"));
                }
            }
        }
        if found.len() > 1 {
            let name = fields.name(names[0]);
            return Err(ApiError::invalid(
                &name,
                format!("`{name}` is one of several addresses"),
            ));
        }
        let url = fields.needed(names[0], found.pop())?;
        Ok(ChatPart::ImageUrl {
            image_url: ImageUrl { url, size },
        })
    }

    /// `mm_processor_kwargs`: sizes of all images.
    pub(super) fn sizes(&mut self, fields: &mut Fields) -> Result<PixelLimits, ApiError> {
        let Some(mut kwargs) = fields.object("mm_processor_kwargs")? else {
            return Ok(PixelLimits::default());
        };
        let mut limits = pixel_limits(&mut kwargs)?;
        // As the processor's own file writes them.
        if let Some(mut size) = kwargs.object("size")? {
            let (least, most) = (size.count("shortest_edge")?, size.count("longest_edge")?);
            limits.min_pixels = limits.min_pixels.or(least);
            limits.max_pixels = limits.max_pixels.or(most);
            self.finish(size, &[])?;
        }
        self.finish(kwargs, SIZE_RULES)?;
        Ok(limits)
    }
}

fn pixel_limits(fields: &mut Fields) -> Result<PixelLimits, ApiError> {
    Ok(PixelLimits {
        min_pixels: fields.count("min_pixels")?,
        max_pixels: fields.count("max_pixels")?,
    })
}

fn image_size(fields: &mut Fields) -> Result<ImageSize, ApiError> {
    let limits = pixel_limits(fields)?;
    let name = fields.name("detail");
    let low = match fields.text("detail")?.as_deref() {
        // Images are read at the full size that the server takes.
        None | Some("auto" | "high" | "original") => false,
        Some("low") => true,
        Some(other) => {
            return Err(wrong_kind(
                &name,
                &other.into(),
                "`low`, `high`, `auto` or `original`",
            ));
        }
    };
    Ok(ImageSize { limits, low })
}

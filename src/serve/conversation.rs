//! The conversation of a request: checked, and rendered to the text of a prompt.

use std::{
    borrow::Cow,
    sync::atomic::{AtomicBool, Ordering},
};

use serde_json::{Map, Value};

use super::{
    App,
    error::ApiError,
    types::{ChatContent, ChatMessage, ChatPart, ImageSize, PromptOptions, Tool},
};
use crate::{
    base::base64_text::base64_bytes,
    processor::{
        chat::{ChatError, ChatTemplate, RenderOptions},
        message::{Content, Part},
        tokenizer::{Tokenizer, TokenizerError},
        tools::{Call, Speaker, Turn, description, in_words},
    },
};

/// Most messages of a request.
const MAX_MESSAGES: usize = 256;

/// Text is tokenised in parts of this many bytes where it has to be counted first.
const PART_BYTES: usize = 64 << 10;

/// Where an image of a request comes from.
pub(super) enum Source {
    Bytes(Vec<u8>),
    Url(String),
}

/// An image of a request.
pub(super) struct AskedImage {
    pub(super) source: Source,
    /// The size it is read at.
    pub(super) size: ImageSize,
}

/// Messages and tools of a request, without its images.
pub(super) struct Conversation {
    turns: Vec<Turn>,
    /// Descriptions of functions, as templates take them.
    tools: Vec<Value>,
    options: PromptOptions,
}

/// The text of a prompt.
pub(super) struct Rendered {
    /// With one placeholder for each image.
    pub(super) text: String,
    /// Whether the answer begins inside of reasoning.
    pub(super) opens_thinking: bool,
}

fn wrong(reason: impl Into<String>) -> ApiError {
    ApiError::invalid("messages", reason)
}

impl Conversation {
    /// Checks messages and takes their images out.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the message or the image, by number.
    pub(super) fn new(
        messages: Vec<ChatMessage>,
        tools: &[Tool],
        options: PromptOptions,
        app: &App,
    ) -> Result<(Self, Vec<AskedImage>), ApiError> {
        if messages.is_empty() || messages.len() > MAX_MESSAGES {
            return Err(wrong(format!(
                "`messages` has {} entries, expected 1 to {MAX_MESSAGES}",
                messages.len()
            )));
        }
        let mut images = Vec::new();
        let mut turns = Vec::with_capacity(messages.len());
        for (index, message) in messages.into_iter().enumerate() {
            turns.push(turn(message, index, &mut images, app)?);
        }
        if options.continue_final_message
            && turns.last().map(|turn| turn.role) != Some(Speaker::Assistant)
        {
            return Err(ApiError::invalid(
                "continue_final_message",
                "`continue_final_message` needs the last message to be one of the assistant",
            ));
        }
        let tools = tools
            .iter()
            .map(|tool| {
                let text = tool.description.as_deref();
                description(&tool.name, text, tool.parameters.as_ref())
            })
            .collect();
        Ok((
            Self {
                turns,
                tools,
                options,
            },
            images,
        ))
    }

    /// The options it was made with.
    pub(super) fn options(&self) -> &PromptOptions {
        &self.options
    }

    /// Bytes of all its texts.
    pub(super) fn text_bytes(&self) -> usize {
        let turns = self.turns.iter().map(Turn::text_bytes);
        let tools = self.tools.iter().map(|tool| tool.to_string().len());
        let variables = self.options.template.values();
        let variables = variables.map(|value| value.to_string().len());
        turns.chain(tools).chain(variables).sum()
    }

    fn texts(&self) -> impl Iterator<Item = Cow<'_, str>> {
        let turns = self.turns.iter().flat_map(Turn::texts).map(Cow::from);
        let tools = self.tools.iter().map(|tool| Cow::from(tool.to_string()));
        turns.chain(tools)
    }

    /// Counts the tokens of long text part by part, so that what does not fit ends early: what the
    /// tokenizer takes for all of it at once is some hundred times the text.
    ///
    /// # Errors
    /// [`ApiError`] of status 400.
    pub(super) fn check_length(&self, app: &App, stop: &AtomicBool) -> Result<(), ApiError> {
        if self.text_bytes() <= PART_BYTES {
            return Ok(());
        }
        let mut tokens = 0;
        for text in self.texts() {
            count_tokens(&text, app, stop, &mut tokens)?;
        }
        Ok(())
    }

    /// Renders the prompt.
    ///
    /// # Errors
    /// [`ApiError`] of status 400: a control token in a text, a variable the template does not read, or
    /// messages it refuses.
    pub(super) fn render(
        &self,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
    ) -> Result<Rendered, ApiError> {
        self.refuse_control_tokens(tokenizer)?;
        let mut variables = self.variables(template)?;
        let options = RenderOptions {
            add_generation_prompt: !self.options.without_generation_prompt,
            ..RenderOptions::default()
        };
        let has_calls = self
            .turns
            .iter()
            .any(|turn| turn.role == Speaker::Tool || !turn.tool_calls.is_empty());
        let rendered = if template.reads("tools") {
            if !self.tools.is_empty() {
                variables.insert("tools".into(), self.tools.clone().into());
            }
            template.render_with(&self.turns, &variables, options)
        } else if self.tools.is_empty() && !has_calls {
            template.render_with(&self.turns, &variables, options)
        } else {
            let messages = in_words(&self.turns, &self.tools);
            template.render_with(&messages, &variables, options)
        };
        let mut text = rendered.map_err(chat_error)?;
        if self.options.continue_final_message {
            self.cut_after_final_message(&mut text)?;
        }
        let opens_thinking = opens_thinking(&text);
        Ok(Rendered {
            text,
            opens_thinking,
        })
    }

    /// Variables of the template that the request sets.
    fn variables(&self, template: &ChatTemplate) -> Result<Map<String, Value>, ApiError> {
        let mut variables = self.options.template.clone();
        for name in self.options.template.keys() {
            let path = format!("chat_template_kwargs.{name}");
            if ["messages", "tools", "documents"].contains(&name.as_str()) {
                let cure = "it is a field of the request itself";
                return Err(ApiError::invalid(
                    &path,
                    format!("`{path}` is not taken; {cure}"),
                ));
            }
            if template.reads(name) {
                continue;
            }
            // What the template does anyway needs no variable.
            let thinks = Value::from(template.opens_thinking());
            if name == "enable_thinking" && self.options.template.get(name) == Some(&thinks) {
                variables.remove(name);
                continue;
            }
            return Err(ApiError::invalid(
                &path,
                format!("`{path}` is not read by the model's chat template; leave it out"),
            ));
        }
        Ok(variables)
    }

    fn refuse_control_tokens(&self, tokenizer: &Tokenizer) -> Result<(), ApiError> {
        for (index, turn) in self.turns.iter().enumerate() {
            for text in turn.texts() {
                tokenizer.refuse_control_tokens(&text).map_err(|cause| {
                    control_error(&format!("messages[{index}]"), "messages", &cause)
                })?;
            }
        }
        for (index, tool) in self.tools.iter().enumerate() {
            tokenizer
                .refuse_control_tokens(&tool.to_string())
                .map_err(|cause| control_error(&format!("tools[{index}]"), "tools", &cause))?;
        }
        for (name, value) in &self.options.template {
            let path = format!("chat_template_kwargs.{name}");
            tokenizer
                .refuse_control_tokens(&value.to_string())
                .map_err(|cause| control_error(&path, &path, &cause))?;
        }
        Ok(())
    }

    /// Cuts off what the template writes after the last message.
    ///
    /// Source: `apply_chat_template` with `continue_final_message`, transformers.
    fn cut_after_final_message(&self, text: &mut String) -> Result<(), ApiError> {
        let last = self.turns.last().map(|turn| turn.content.text());
        let last = last.unwrap_or_default();
        // Some templates trim what they write.
        let found = [last.as_str(), last.trim_end(), last.trim()]
            .into_iter()
            .find_map(|words| Some(text.rfind(words)? + words.len()));
        match found {
            Some(end) if !last.trim().is_empty() => {
                text.truncate(end);
                Ok(())
            }
            _ => Err(ApiError::invalid(
                "continue_final_message",
                "`continue_final_message` finds no text of the last message in the prompt to go on with",
            )),
        }
    }
}

/// Whether an answer to this prompt begins inside of reasoning.
fn opens_thinking(prompt: &str) -> bool {
    let last = prompt.rfind("<|im_start|>assistant");
    let answer = last.map_or(prompt, |at| &prompt[at..]);
    let is_answer = last.is_some() && !answer[1..].contains("<|im_start|>");
    prompt.trim_end().ends_with("<think>")
        || (is_answer && answer.rfind("<think>") > answer.rfind("</think>"))
}

/// A message as the template takes it; its images are appended to `images`.
fn turn(
    message: ChatMessage,
    index: usize,
    images: &mut Vec<AskedImage>,
    app: &App,
) -> Result<Turn, ApiError> {
    let role = match message.role.as_str() {
        "system" | "developer" => Speaker::System,
        "user" => Speaker::User,
        "assistant" => Speaker::Assistant,
        "tool" => Speaker::Tool,
        _ => {
            return Err(wrong(format!(
                "`messages[{index}].role` is not one of system, developer, user, assistant, tool"
            )));
        }
    };
    let content = match message.content {
        None => Content::Text(String::new()),
        Some(ChatContent::Text(text)) => Content::Text(text),
        Some(ChatContent::Parts(parts)) => {
            let mut taken = Vec::with_capacity(parts.len());
            for part in parts {
                taken.push(match part {
                    ChatPart::Text { text } => Part::Text { text },
                    ChatPart::ImageUrl { image_url } => {
                        if role != Speaker::User {
                            return Err(wrong(format!(
                                "`messages[{index}]` holds an image; only messages of the user may"
                            )));
                        }
                        if images.len() == app.config.max_images {
                            return Err(wrong(format!(
                                "the request holds more than {} images",
                                app.config.max_images
                            )));
                        }
                        let urls_allowed = app.config.allow_image_urls;
                        images.push(AskedImage {
                            source: source(&image_url.url, images.len(), urls_allowed)?,
                            size: image_url.size,
                        });
                        Part::Image
                    }
                });
            }
            // Templates treat plain text and pieces differently; some take pieces from the user alone.
            if role != Speaker::User {
                Content::Text(Content::Parts(taken).text())
            } else {
                Content::Parts(taken)
            }
        }
    };
    Ok(Turn {
        role,
        content,
        reasoning_content: message.reasoning_content,
        tool_calls: message
            .tool_calls
            .iter()
            .map(|call| Call::new(&call.name, &call.arguments))
            .collect(),
    })
}

pub(super) fn image_name(index: usize) -> String {
    format!("image {}", index + 1)
}

/// Counts the tokens of `text` on top of `tokens`, part by part; ends where they do not fit.
///
/// # Errors
/// [`ApiError`] of status 400, and of 500 when the request was cancelled.
pub(super) fn count_tokens(
    mut text: &str,
    app: &App,
    stop: &AtomicBool,
    tokens: &mut usize,
) -> Result<(), ApiError> {
    // A cut may make a token into a few.
    const OF_A_CUT: usize = 4;
    while !text.is_empty() {
        if stop.load(Ordering::Relaxed) {
            return Err(ApiError::internal());
        }
        let mut end = text.len().min(PART_BYTES);
        while !text.is_char_boundary(end) {
            end += 1;
        }
        let (part, rest) = text.split_at(end);
        text = rest;
        let found = app.parts.tokenizer.encode_plain(part);
        *tokens += found.map_or(0, |ids| ids.len()).saturating_sub(OF_A_CUT);
        if *tokens >= app.context() {
            return Err(too_long(app, *tokens));
        }
    }
    Ok(())
}

pub(super) fn too_long(app: &App, tokens: usize) -> ApiError {
    let context = app.context();
    wrong(format!(
        "the prompt has more than {tokens} tokens; this server takes {context} with the answer"
    ))
    .with_code("context_length_exceeded")
}

fn source(url: &str, index: usize, urls_allowed: bool) -> Result<Source, ApiError> {
    let name = image_name(index);
    let wrong = |reason: &str| {
        ApiError::invalid("messages", format!("{name} {reason}")).with_code("image_url")
    };
    let scheme = |prefix: &str| {
        url.get(..prefix.len())
            .is_some_and(|start| start.eq_ignore_ascii_case(prefix))
    };
    if scheme("data:") {
        let form = "is not of the form data:image/TYPE;base64,…";
        let (kind, data) = url["data:".len()..]
            .split_once(',')
            .ok_or_else(|| wrong(form))?;
        if !kind.to_ascii_lowercase().ends_with(";base64") {
            return Err(wrong(form));
        }
        // The content decides the format; the declared type may be wrong.
        let bytes = base64_bytes(data).ok_or_else(|| wrong("is not valid base64"))?;
        return Ok(Source::Bytes(bytes));
    }
    if scheme("http://") || scheme("https://") {
        if urls_allowed {
            return Ok(Source::Url(url.to_owned()));
        }
        return Err(wrong(
            "is an address, and this server does not fetch images; send it as data:image/TYPE;base64,…",
        ));
    }
    Err(wrong(
        "is not of the form data:image/TYPE;base64,…; other addresses are not read",
    ))
}

fn control_error(name: &str, param: &str, cause: &TokenizerError) -> ApiError {
    let message = match cause {
        TokenizerError::ControlToken { token } => {
            format!("`{name}` holds the control token `{token}`, which is not taken")
        }
        _ => format!("`{name}` cannot be read"),
    };
    ApiError::invalid(param, message)
}

pub(super) fn chat_error(error: ChatError) -> ApiError {
    match &error {
        ChatError::Template { reason, .. } => {
            // The template's own words, for instance that the system message must be the first.
            let reason: String = reason.chars().take(200).collect();
            wrong(format!(
                "the messages do not fit the model's chat template: {reason}"
            ))
        }
        ChatError::NoMessages => wrong("`messages` is empty"),
        other => {
            log::error!("messages could not be encoded: {other}");
            ApiError::internal()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasoning_is_open_where_the_prompt_opened_it() {
        for (prompt, open) in [
            (
                "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n",
                false,
            ),
            (
                "<|im_start|>user\n?<|im_end|>\n<|im_start|>assistant\n<think>\n",
                true,
            ),
            ("<|im_start|>assistant\n<think>\n先看", true),
            ("<|im_start|>assistant\n<think>\n\n</think>\n\n", false),
            (
                "<|im_start|>assistant\n<think>a<|im_end|>\n<|im_start|>user\n?",
                false,
            ),
            ("<|im_start|>user\nWhat is <think>?<|im_end|>\n", false),
        ] {
            assert_eq!(opens_thinking(prompt), open, "{prompt}");
        }
    }
}

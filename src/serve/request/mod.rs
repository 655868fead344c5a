//! Reads requests: which fields there are, of what kind, and what becomes of those of other servers.

mod form;
mod generation;
mod message;
mod responses;
mod rules;
#[cfg(test)]
mod tests;
mod tools;

use serde_json::{Map, Value};

use super::{
    error::ApiError,
    fields::{Fields, Rules, wrong_kind},
    findings::FIELD,
    types::{
        AdapterRequest, ChatRequest, CompletionRequest, DetokenizeRequest, PromptOptions,
        PromptText, TokenizeInput, TokenizeRequest,
    },
};
pub(super) use responses::ResponsesRequest;
use rules::{ADAPTER_RULES, CHAT_RULES, COMPLETION_RULES, GENERATION_RULES, TOKENIZE_RULES};
use tools::ToolForm;

/// Most prompts of a request.
const MAX_PROMPTS: usize = 128;

/// Reads fields of fields, with the names of those that are passed over.
struct Reader {
    /// Passes over what is unknown instead of refusing it.
    lenient: bool,
    ignored: Vec<String>,
}

impl Reader {
    fn new(lenient: bool) -> Self {
        Self {
            lenient,
            ignored: Vec::new(),
        }
    }

    fn finish(&mut self, fields: Fields, rules: Rules) -> Result<(), ApiError> {
        self.finish_all(fields, &[rules])
    }

    fn finish_all(&mut self, fields: Fields, tables: &[Rules]) -> Result<(), ApiError> {
        fields.finish_all(tables, self.lenient.then_some(&mut self.ignored))
    }

    /// How messages become a prompt.
    fn prompt_options(&mut self, fields: &mut Fields) -> Result<PromptOptions, ApiError> {
        let mut template = match fields.value("chat_template_kwargs") {
            None => Map::new(),
            Some(Value::Object(kwargs)) => kwargs,
            Some(other) => return Err(wrong_kind("chat_template_kwargs", &other, "an object")),
        };
        template.retain(|_, value| !value.is_null());
        if let Some(enable) = fields.flag("enable_thinking")? {
            template.insert("enable_thinking".into(), enable.into());
        }
        let mut prompts = fields.flag("add_generation_prompt")?;
        let mut goes_on = fields.flag("continue_final_message")?;
        // transformers takes both as arguments, and some clients send all arguments there.
        for (name, flag) in [
            ("add_generation_prompt", &mut prompts),
            ("continue_final_message", &mut goes_on),
        ] {
            if let Some(value) = template.remove(name) {
                let path = format!("chat_template_kwargs.{name}");
                let value = value
                    .as_bool()
                    .ok_or_else(|| wrong_kind(&path, &value, "`true` or `false`"))?;
                *flag = Some(value);
            }
        }
        let continue_final_message = goes_on == Some(true);
        if continue_final_message && prompts == Some(true) {
            return Err(ApiError::invalid(
                "continue_final_message",
                "`continue_final_message` and `add_generation_prompt` are both true; an answer either \
                 goes on with the last message or begins a new one",
            ));
        }
        Ok(PromptOptions {
            template,
            without_generation_prompt: continue_final_message || prompts == Some(false),
            continue_final_message,
            limits: self.sizes(fields)?,
            truncate: Self::truncate(fields)?,
        })
    }

    /// What a conversation has besides how it is answered.
    fn conversation(&mut self, fields: &mut Fields) -> Result<ChatRequest, ApiError> {
        Ok(ChatRequest {
            model: fields.text("model")?,
            messages: self.messages(fields)?,
            tools: self.tool_use(fields, ToolForm::Nested)?,
            prompt: self.prompt_options(fields)?,
            ..ChatRequest::default()
        })
    }
}

impl ChatRequest {
    /// Reads the body of a request; `lenient` passes over what is unknown and names it in `ignored`.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field.
    pub(super) fn read(mut fields: Fields, lenient: bool) -> Result<Self, ApiError> {
        let mut reader = Reader::new(lenient);
        let mut request = reader.conversation(&mut fields)?;
        request.generation = reader.generation(&mut fields)?;
        request.generation.prediction = reader.prediction(&mut fields)?;
        request.findings = fields.flag(FIELD)? == Some(true);
        let wanted = fields.flag("logprobs")? == Some(true);
        let top = fields.count("top_logprobs")?;
        if !wanted && top.is_some_and(|top| top > 0) {
            return Err(ApiError::invalid(
                "top_logprobs",
                "`top_logprobs` needs `logprobs` to be true",
            ));
        }
        request.generation.logprobs = wanted.then(|| top.unwrap_or(0));
        reader.finish_all(fields, &[CHAT_RULES, GENERATION_RULES])?;
        request.ignored = reader.ignored;
        Ok(request)
    }
}

fn prompts(fields: &mut Fields) -> Result<Vec<PromptText>, ApiError> {
    let name = "prompt";
    let expected = "a text, a list of token ids, or a list of either";
    let found = fields.value(name);
    let value = fields.needed(name, found)?;
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let one = |value: &Value| match value {
        Value::String(text) => Some(PromptText::Text(text.clone())),
        Value::Array(list) => {
            let ids = list.iter().map(id).collect::<Option<Vec<u32>>>()?;
            Some(PromptText::Ids(ids))
        }
        _ => None,
    };
    let prompts = match &value {
        Value::Array(list) if !list.is_empty() && !list[0].is_number() => {
            list.iter().map(one).collect::<Option<Vec<_>>>()
        }
        value => one(value).map(|prompt| vec![prompt]),
    };
    let prompts = prompts.ok_or_else(|| wrong_kind(name, &value, expected))?;
    if prompts.len() > MAX_PROMPTS {
        return Err(ApiError::invalid(
            name,
            format!(
                "`{name}` has {} entries, at most {MAX_PROMPTS} are taken",
                prompts.len()
            ),
        ));
    }
    Ok(prompts)
}

impl CompletionRequest {
    /// Reads the body of a request; `lenient` passes over what is unknown and names it in `ignored`.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field.
    pub(super) fn read(mut fields: Fields, lenient: bool) -> Result<Self, ApiError> {
        let mut reader = Reader::new(lenient);
        let mut request = Self {
            model: fields.text("model")?,
            prompts: prompts(&mut fields)?,
            echo: fields.flag("echo")?.unwrap_or(false),
            truncate: Reader::truncate(&mut fields)?,
            generation: reader.generation(&mut fields)?,
            ignored: Vec::new(),
        };
        request.generation.logprobs = fields.count("logprobs")?;
        reader.finish_all(fields, &[COMPLETION_RULES, GENERATION_RULES])?;
        request.ignored = reader.ignored;
        Ok(request)
    }
}

impl TokenizeRequest {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field.
    pub(super) fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let mut reader = Reader::new(false);
        let token_strs = fields.flag("return_token_strs")?.unwrap_or(false);
        let (model, input) = match fields.has("messages") {
            true => {
                let chat = reader.conversation(&mut fields)?;
                (chat.model.clone(), TokenizeInput::Chat(Box::new(chat)))
            }
            false => {
                let model = fields.text("model")?;
                let prompt = fields.text("prompt")?;
                let prompt = prompt.ok_or_else(|| {
                    ApiError::invalid("prompt", "expected `prompt` with a text, or `messages`")
                })?;
                (model, TokenizeInput::Text(prompt))
            }
        };
        reader.finish(fields, TOKENIZE_RULES)?;
        Ok(Self {
            model,
            input,
            token_strs,
        })
    }
}

impl DetokenizeRequest {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field.
    pub(super) fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let tokens = fields.ids("tokens")?;
        let request = Self {
            model: fields.text("model")?,
            tokens: fields.needed("tokens", tokens)?,
        };
        fields.finish(&[], None)?;
        Ok(request)
    }
}

impl AdapterRequest {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field.
    pub(super) fn read(mut fields: Fields) -> Result<Self, ApiError> {
        let name = fields.text("lora_name")?;
        let request = Self {
            lora_name: fields.needed("lora_name", name)?,
            lora_path: fields.text("lora_path")?,
        };
        fields.finish(ADAPTER_RULES, None)?;
        Ok(request)
    }
}

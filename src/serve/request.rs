//! Reads requests: which fields there are, of what kind, and what becomes of those of other servers.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{
    error::ApiError,
    fields::{Fields, Rule, Rules, texts_of, wrong_kind},
    types::{
        AdapterRequest, AnswerForm, ChatContent, ChatMessage, ChatPart, ChatRequest, ImageUrl,
    },
};

const FORM_INSTEAD: &str =
    "send `response_format` with a JSON schema, `guided_regex` or `guided_choice`";
const TEXT_ONLY: &str = "this server writes text only";

/// Fields of OpenAI's and vLLM's chat requests, and of their like, that are not honoured as such.
const CHAT_RULES: Rules = &[
    // The user, the purpose, and how a provider bills and stores a request.
    ("metadata", Rule::Harmless),
    ("prompt_cache_key", Rule::Harmless),
    ("prompt_cache_retention", Rule::Harmless),
    ("request_id", Rule::Harmless),
    ("safety_identifier", Rule::Harmless),
    ("service_tier", Rule::Harmless),
    ("store", Rule::Harmless),
    ("user", Rule::Harmless),
    // What this server does anyway.
    ("add_generation_prompt", Rule::Only(&["true"])),
    ("add_special_tokens", Rule::Only(&["false"])),
    ("audio", Rule::Refused(TEXT_ONLY)),
    ("bad_words", Rule::Only(&["[]"])),
    ("continue_final_message", Rule::Only(&["false"])),
    ("detokenize", Rule::Only(&["true"])),
    ("documents", Rule::Only(&["[]"])),
    ("early_stopping", Rule::Only(&["false"])),
    ("echo", Rule::Only(&["false"])),
    ("function_call", Rule::Only(&["\"none\"", "\"auto\""])),
    ("functions", Rule::Only(&["[]"])),
    ("include_reasoning", Rule::Only(&["true"])),
    ("include_stop_str_in_output", Rule::Only(&["false"])),
    ("length_penalty", Rule::Only(&["1"])),
    ("mm_processor_kwargs", Rule::Only(&["{}"])),
    ("modalities", Rule::Only(&["[\"text\"]"])),
    ("parallel_tool_calls", Rule::Harmless),
    ("priority", Rule::Only(&["0"])),
    ("return_token_ids", Rule::Only(&["false"])),
    ("return_tokens_as_token_ids", Rule::Only(&["false"])),
    ("skip_special_tokens", Rule::Only(&["true"])),
    ("spaces_between_special_tokens", Rule::Only(&["true"])),
    ("tool_choice", Rule::Only(&["\"none\"", "\"auto\""])),
    ("tools", Rule::Only(&["[]"])),
    ("use_beam_search", Rule::Only(&["false"])),
    ("vllm_xargs", Rule::Only(&["{}"])),
    // What it does not do.
    (
        "cache_salt",
        Rule::Refused("start the server with --no-prefix-cache to share nothing between requests"),
    ),
    (
        "chat_template",
        Rule::Refused("the model's own template is used"),
    ),
    (
        "guided_decoding_backend",
        Rule::Refused("there is one backend only"),
    ),
    ("guided_grammar", Rule::Refused(FORM_INSTEAD)),
    (
        "guided_whitespace_pattern",
        Rule::Refused("JSON is written without free white space"),
    ),
    ("kv_transfer_params", Rule::Refused("")),
    ("logits_processors", Rule::Refused("")),
    ("prediction", Rule::Refused("")),
    (
        "prompt_logprobs",
        Rule::Refused("log probabilities are those of the answer, by `logprobs`"),
    ),
    (
        "reasoning_effort",
        Rule::Refused("how long the model reasons cannot be set"),
    ),
    ("structural_tag", Rule::Refused(FORM_INSTEAD)),
    (
        "thinking_token_budget",
        Rule::Refused("how long the model reasons cannot be set"),
    ),
    (
        "truncate_prompt_tokens",
        Rule::Refused("send a shorter prompt"),
    ),
    (
        "verbosity",
        Rule::Refused("ask for a short or long answer in words"),
    ),
    ("web_search_options", Rule::Refused(TEXT_ONLY)),
    // What others call it.
    ("format", Rule::Refused("did you mean `response_format`?")),
    ("grammar", Rule::Refused(FORM_INSTEAD)),
    ("input", Rule::Refused("did you mean `messages`?")),
    (
        "json_schema",
        Rule::Refused("did you mean `response_format`?"),
    ),
    ("max_length", Rule::Refused("did you mean `max_tokens`?")),
    (
        "max_new_tokens",
        Rule::Refused("did you mean `max_tokens`?"),
    ),
    (
        "max_output_tokens",
        Rule::Refused("did you mean `max_tokens`?"),
    ),
    ("n_predict", Rule::Refused("did you mean `max_tokens`?")),
    ("num_predict", Rule::Refused("did you mean `max_tokens`?")),
    ("prompt", Rule::Refused("did you mean `messages`?")),
    (
        "repeat_penalty",
        Rule::Refused("did you mean `repetition_penalty`?"),
    ),
    ("stop_sequences", Rule::Refused("did you mean `stop`?")),
    ("system", Rule::Refused("send a message of role `system`")),
];

/// What a message may have besides: answers of this and other servers are sent back whole.
const MESSAGE_RULES: Rules = &[
    ("annotations", Rule::Only(&["[]"])),
    ("audio", Rule::Refused(TEXT_ONLY)),
    ("function_call", Rule::Refused(TEXT_ONLY)),
    (
        "name",
        Rule::Refused("the model's template has no place for a name; say it in the content"),
    ),
    ("refusal", Rule::Refused("send it as the message's content")),
    ("tool_call_id", Rule::Refused(TEXT_ONLY)),
    ("tool_calls", Rule::Only(&["[]"])),
];

const SIZE_OF_IMAGE: &str = "the size of images is the server's; start it with --max-pixels";

/// What a piece of a message may have besides.
const PART_RULES: Rules = &[
    ("annotations", Rule::Only(&["[]"])),
    ("cache_control", Rule::Harmless),
    // Images are always read at the full size the model takes.
    (
        "detail",
        Rule::Only(&["\"auto\"", "\"high\"", "\"original\""]),
    ),
    ("max_pixels", Rule::Refused(SIZE_OF_IMAGE)),
    ("min_pixels", Rule::Refused(SIZE_OF_IMAGE)),
    ("resized_height", Rule::Refused(SIZE_OF_IMAGE)),
    ("resized_width", Rule::Refused(SIZE_OF_IMAGE)),
    ("uuid", Rule::Harmless),
];

const STREAM_RULES: Rules = &[
    ("continuous_usage_stats", Rule::Only(&["false"])),
    ("include_obfuscation", Rule::Harmless),
];

const STRUCTURED_RULES: Rules = &[
    ("disable_any_whitespace", Rule::Only(&["true"])),
    ("disable_additional_properties", Rule::Only(&["true"])),
    ("disable_fallback", Rule::Harmless),
    ("grammar", Rule::Refused(FORM_INSTEAD)),
    ("structural_tag", Rule::Refused(FORM_INSTEAD)),
    (
        "whitespace_pattern",
        Rule::Refused("JSON is written without free white space"),
    ),
];

const SCHEMA_RULES: Rules = &[
    ("description", Rule::Harmless),
    ("name", Rule::Harmless),
    // A schema is followed to the letter in any case.
    ("strict", Rule::Harmless),
];

const ADAPTER_RULES: Rules = &[
    ("base_model_name", Rule::Refused("there is one base only")),
    (
        "lora_int_id",
        Rule::Refused("an adapter is known by its name"),
    ),
    ("load_inplace", Rule::Only(&["false"])),
];

/// Reads fields of fields, with the names of those that are passed over.
struct Reader {
    /// Passes over what is unknown instead of refusing it.
    lenient: bool,
    ignored: Vec<String>,
}

impl Reader {
    fn finish(&mut self, fields: Fields, rules: Rules) -> Result<(), ApiError> {
        fields.finish(rules, self.lenient.then_some(&mut self.ignored))
    }

    fn message(&mut self, value: Value, path: &str) -> Result<ChatMessage, ApiError> {
        let mut fields = Fields::of(value, path)?;
        let role = fields.text("role")?;
        let role = fields.needed("role", role)?;
        let content_name = fields.name("content");
        let content = match fields.value("content") {
            None => None,
            Some(Value::String(text)) => Some(ChatContent::Text(text)),
            Some(Value::Array(parts)) => {
                let mut taken = Vec::with_capacity(parts.len());
                for (index, part) in parts.into_iter().enumerate() {
                    taken.push(self.part(part, &format!("{content_name}[{index}]"))?);
                }
                Some(ChatContent::Parts(taken))
            }
            Some(other) => {
                return Err(wrong_kind(
                    &content_name,
                    &other,
                    "a text or a list of parts",
                ));
            }
        };
        // vLLM writes the first, and lately the second.
        let reasoning_content = fields.text("reasoning_content")?;
        let reasoning = fields.text("reasoning")?;
        self.finish(fields, MESSAGE_RULES)?;
        Ok(ChatMessage {
            role,
            content,
            reasoning_content: reasoning_content.or(reasoning),
        })
    }

    fn part(&mut self, value: Value, path: &str) -> Result<ChatPart, ApiError> {
        if let Value::String(text) = value {
            return Ok(ChatPart::Text { text });
        }
        let mut fields = Fields::of(value, path)?;
        let kind = fields.text("type")?;
        let kind = fields.needed("type", kind)?;
        let part = match kind.as_str() {
            "text" | "input_text" | "output_text" => {
                let text = fields.text("text")?;
                ChatPart::Text {
                    text: fields.needed("text", text)?,
                }
            }
            // OpenAI's, the Responses API's, and the one of Qwen's own examples.
            "image_url" | "input_image" | "image" => self.image(&mut fields, &kind)?,
            _ => {
                let kind: String = kind.chars().take(40).collect();
                return Err(ApiError::invalid(
                    path,
                    format!(
                        "`{path}` is of the type `{kind}`, expected `text`, `image_url`, `input_image` or `image`"
                    ),
                ));
            }
        };
        self.finish(fields, PART_RULES)?;
        Ok(part)
    }

    fn image(&mut self, fields: &mut Fields, kind: &str) -> Result<ChatPart, ApiError> {
        let mut found = Vec::new();
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
            image_url: ImageUrl(url),
        })
    }

    /// The form of the answer, from whichever of the fields for it is set.
    fn form(&mut self, fields: &mut Fields) -> Result<Option<AnswerForm>, ApiError> {
        let mut forms = Vec::new();
        if let Some(mut format) = fields.object("response_format")? {
            let kind = format.text("type")?;
            let kind = format.needed("type", kind)?;
            match kind.as_str() {
                "text" => {}
                "json_object" => forms.push(any_object()),
                "json_schema" => {
                    let named = format.object("json_schema")?;
                    let mut named = format.needed("json_schema", named)?;
                    let schema = named.value("schema");
                    forms.push(AnswerForm::Json(named.needed("schema", schema)?));
                    self.finish(named, SCHEMA_RULES)?;
                }
                _ => {
                    let name = format.name("type");
                    let kind: String = kind.chars().take(40).collect();
                    return Err(ApiError::invalid(
                        &name,
                        format!(
                            "`{name}` is `{kind}`, expected `text`, `json_object` or `json_schema`"
                        ),
                    ));
                }
            }
            self.finish(format, &[])?;
        }
        guided(
            fields,
            &mut forms,
            "guided_json",
            "guided_regex",
            "guided_choice",
        )?;
        if fields.flag("guided_json_object")? == Some(true) {
            forms.push(any_object());
        }
        if let Some(mut structured) = fields.object("structured_outputs")? {
            guided(&mut structured, &mut forms, "json", "regex", "choice")?;
            if structured.flag("json_object")? == Some(true) {
                forms.push(any_object());
            }
            self.finish(structured, STRUCTURED_RULES)?;
        }
        if forms.len() > 1 {
            return Err(ApiError::invalid(
                "response_format",
                "the request asks for several forms of the answer; expected one of \
                 `response_format`, `structured_outputs`, `guided_json`, `guided_regex` and `guided_choice`",
            ));
        }
        Ok(forms.pop())
    }
}

fn any_object() -> AnswerForm {
    AnswerForm::Json(json!({"type": "object"}))
}

/// Takes vLLM's fields of these names.
fn guided(
    fields: &mut Fields,
    forms: &mut Vec<AnswerForm>,
    schema: &'static str,
    regex: &'static str,
    choice: &'static str,
) -> Result<(), ApiError> {
    match fields.value(schema) {
        None => {}
        // vLLM takes the schema as text, too.
        Some(Value::String(text)) => {
            let name = fields.name(schema);
            let schema = serde_json::from_str(&text).map_err(|_| {
                ApiError::invalid(&name, format!("`{name}` is a text that is not JSON"))
            })?;
            forms.push(AnswerForm::Json(schema));
        }
        Some(value) => forms.push(AnswerForm::Json(value)),
    }
    if let Some(regex) = fields.text(regex)? {
        forms.push(AnswerForm::Regex(regex));
    }
    if let Some(texts) = fields.texts(choice)? {
        forms.push(AnswerForm::Choice(texts));
    }
    Ok(())
}

fn stop(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    match fields.value("stop") {
        None => Ok(Vec::new()),
        Some(Value::String(text)) => Ok(vec![text]),
        Some(other) => {
            texts_of(other).map_err(|other| wrong_kind("stop", &other, "a text or a list of texts"))
        }
    }
}

fn logit_bias(fields: &mut Fields) -> Result<Option<BTreeMap<String, f32>>, ApiError> {
    let expected = "an object of numbers by token id";
    let Some(value) = fields.value("logit_bias") else {
        return Ok(None);
    };
    let numbers = value.as_object().and_then(|object| {
        let number = |(id, value): (&String, &Value)| Some((id.clone(), value.as_f64()? as f32));
        object.iter().map(number).collect()
    });
    match numbers {
        Some(numbers) => Ok(Some(numbers)),
        None => Err(wrong_kind("logit_bias", &value, expected)),
    }
}

impl ChatRequest {
    /// Reads the body of a request; `lenient` passes over what is unknown and names it in `ignored`.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field.
    pub(super) fn read(mut fields: Fields, lenient: bool) -> Result<Self, ApiError> {
        let mut reader = Reader {
            lenient,
            ignored: Vec::new(),
        };
        let messages = fields.list("messages")?;
        let mut read = Vec::new();
        for (index, message) in fields.needed("messages", messages)?.into_iter().enumerate() {
            read.push(reader.message(message, &format!("messages[{index}]"))?);
        }
        let include_usage = match fields.object("stream_options")? {
            None => false,
            Some(mut options) => {
                let include = options.flag("include_usage")?.unwrap_or(false);
                reader.finish(options, STREAM_RULES)?;
                include
            }
        };
        let enable_thinking = match fields.object("chat_template_kwargs")? {
            None => None,
            Some(mut kwargs) => {
                let enable = kwargs.flag("enable_thinking")?;
                reader.finish(kwargs, &[("add_generation_prompt", Rule::Only(&["true"]))])?;
                enable
            }
        };
        let n = fields.count("n")?;
        if let Some(best_of) = fields.count("best_of")?
            && best_of != n.unwrap_or(1)
        {
            return Err(ApiError::invalid(
                "best_of",
                format!(
                    "`best_of` is {best_of} and `n` is {}; all answers are sent, so both have to be equal",
                    n.unwrap_or(1)
                ),
            ));
        }
        let request = Self {
            model: fields.text("model")?,
            messages: read,
            max_tokens: fields.count("max_tokens")?,
            max_completion_tokens: fields.count("max_completion_tokens")?,
            min_tokens: fields.count("min_tokens")?,
            temperature: fields.number("temperature")?,
            top_p: fields.number("top_p")?,
            top_k: fields.integer("top_k")?,
            min_p: fields.number("min_p")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            frequency_penalty: fields.number("frequency_penalty")?,
            presence_penalty: fields.number("presence_penalty")?,
            logit_bias: logit_bias(&mut fields)?,
            allowed_token_ids: fields.ids("allowed_token_ids")?,
            seed: fields.integer("seed")?,
            n,
            stop: stop(&mut fields)?,
            stop_token_ids: fields.ids("stop_token_ids")?.unwrap_or_default(),
            stream: fields.flag("stream")?,
            include_usage,
            logprobs: fields.flag("logprobs")?,
            top_logprobs: fields.count("top_logprobs")?,
            form: reader.form(&mut fields)?,
            ignore_eos: fields.flag("ignore_eos")?,
            enable_thinking,
            ignored: Vec::new(),
        };
        reader.finish(fields, CHAT_RULES)?;
        Ok(Self {
            ignored: reader.ignored,
            ..request
        })
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::{
        super::{
            fields::{known, parse_body},
            router::OPENAPI,
        },
        *,
    };

    /// Collects the names of the properties of `schema` and of the objects inside, by path.
    fn properties(
        document: &Value,
        schema: &Value,
        path: &str,
        found: &mut BTreeMap<String, BTreeSet<String>>,
    ) {
        if let Some(name) = schema["$ref"].as_str() {
            let target = document.pointer(name.trim_start_matches('#')).unwrap();
            return properties(document, target, path, found);
        }
        for form in schema["anyOf"].as_array().into_iter().flatten() {
            properties(document, form, path, found);
        }
        properties_of_items(document, schema, path, found);
        for (name, inner) in schema["properties"].as_object().into_iter().flatten() {
            found.entry(path.into()).or_default().insert(name.clone());
            let inner_path = match path {
                "" => name.clone(),
                path => format!("{path}.{name}"),
            };
            properties(document, inner, &inner_path, found);
        }
    }

    fn properties_of_items(
        document: &Value,
        schema: &Value,
        path: &str,
        found: &mut BTreeMap<String, BTreeSet<String>>,
    ) {
        if schema["items"].is_object() {
            properties(document, &schema["items"], &format!("{path}[]"), found);
        }
    }

    fn check_against_document(schema: &str) {
        let document: Value = serde_json::from_str(OPENAPI).unwrap();
        let mut documented = BTreeMap::new();
        let root = &document["components"]["schemas"][schema];
        properties(&document, root, "", &mut documented);
        let read = known::take();
        assert_eq!(
            read.keys().collect::<Vec<_>>(),
            documented.keys().collect::<Vec<_>>(),
            "objects of {schema}, read and documented"
        );
        for (path, names) in read {
            let documented = &documented[&path];
            for name in &names.taken {
                assert!(
                    documented.contains(*name),
                    "`{name}` of `{path}` is read and not in openapi.json"
                );
            }
            for name in documented {
                let name = name.as_str();
                assert!(
                    names.taken.contains(name) || names.in_rules.contains(name),
                    "`{name}` of `{path}` is in openapi.json and not read"
                );
            }
        }
    }

    #[test]
    fn the_document_has_the_fields_that_are_read() {
        let _ = known::take();
        let url = json!({"url": "data:x"});
        let parts = json!([
            {"type": "text", "text": "?"},
            {"type": "image_url", "image_url": url},
            {"type": "input_image", "image_url": "data:x"},
            {"type": "image", "image": "data:x"},
        ]);
        let schema = json!({"name": "x", "schema": {"type": "boolean"}});
        let base = json!({
            "messages": [{"role": "user", "content": parts}],
            "stream_options": {"include_usage": true},
            "chat_template_kwargs": {"enable_thinking": false},
        });
        for (name, form) in [
            (
                "response_format",
                json!({"type": "json_schema", "json_schema": schema}),
            ),
            ("structured_outputs", json!({"regex": "a"})),
        ] {
            let mut body = base.clone();
            body[name] = form;
            read(body, false).unwrap();
        }
        check_against_document("ChatRequest");
        let body = json!({"lora_name": "a"}).to_string();
        AdapterRequest::read(parse_body(body.as_bytes()).unwrap()).unwrap();
        check_against_document("AdapterRequest");
    }

    fn read(body: Value, lenient: bool) -> Result<ChatRequest, ApiError> {
        ChatRequest::read(parse_body(body.to_string().as_bytes()).unwrap(), lenient)
    }

    fn with(more: Value) -> Value {
        let mut body = json!({"messages": [{"role": "user", "content": "?"}]});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        body
    }

    #[test]
    fn no_field_of_another_server_is_passed_over() {
        for (more, param) in [
            (
                json!({"guided_grammar": "root ::= \"a\""}),
                "guided_grammar",
            ),
            (
                json!({"continue_final_message": true}),
                "continue_final_message",
            ),
            (
                json!({"add_generation_prompt": false}),
                "add_generation_prompt",
            ),
            (json!({"bad_words": ["x"]}), "bad_words"),
            (json!({"best_of": 3}), "best_of"),
            (json!({"use_beam_search": true}), "use_beam_search"),
            (json!({"prompt_logprobs": 1}), "prompt_logprobs"),
            (
                json!({"include_stop_str_in_output": true}),
                "include_stop_str_in_output",
            ),
            (json!({"skip_special_tokens": false}), "skip_special_tokens"),
            (
                json!({"truncate_prompt_tokens": 5}),
                "truncate_prompt_tokens",
            ),
            (json!({"priority": 5}), "priority"),
            (json!({"reasoning_effort": "low"}), "reasoning_effort"),
            (json!({"tool_choice": "required"}), "tool_choice"),
            (json!({"tools": [{}]}), "tools"),
            (json!({"modalities": ["audio"]}), "modalities"),
            (json!({"max_new_tokens": 5}), "max_new_tokens"),
            (json!({"typo_temperatur": 5}), "typo_temperatur"),
            (
                json!({"chat_template_kwargs": {"tone": 1}}),
                "chat_template_kwargs.tone",
            ),
            (
                json!({"stream_options": {"usage": true}}),
                "stream_options.usage",
            ),
            (
                json!({"response_format": {"type": "grammar"}}),
                "response_format.type",
            ),
            (
                json!({"guided_regex": "a", "guided_choice": ["b"]}),
                "response_format",
            ),
        ] {
            let error = read(with(more.clone()), false).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{more}: {error}");
        }
    }

    #[test]
    fn what_asks_for_nothing_else_is_taken() {
        let body = with(json!({
            "tools": [], "tool_choice": "auto", "parallel_tool_calls": true, "best_of": 2, "n": 2,
            "user": "u", "metadata": {"a": "b"}, "store": false, "service_tier": "auto",
            "skip_special_tokens": true, "add_generation_prompt": true, "length_penalty": 1.0,
            "response_format": {"type": "text"}, "logit_bias": null, "echo": false, "priority": 0,
            "reasoning_effort": null, "stream_options": {"include_usage": true},
        }));
        let request = read(body, false).unwrap();
        assert!(request.include_usage && request.form.is_none());
    }

    #[test]
    fn fields_of_vllm_that_name_an_ability_are_honoured() {
        let form = |more: Value| read(with(more), false).unwrap().form;
        let schema = json!({"type": "boolean"});
        let json_form = Some(AnswerForm::Json(schema.clone()));
        assert_eq!(form(json!({"guided_json": schema})), json_form);
        assert_eq!(form(json!({"guided_json": schema.to_string()})), json_form);
        assert_eq!(
            form(json!({"structured_outputs": {"json": schema}})),
            json_form
        );
        assert_eq!(
            form(json!({"guided_regex": "a+"})),
            Some(AnswerForm::Regex("a+".into()))
        );
        assert_eq!(
            form(json!({"structured_outputs": {"choice": ["左", "右"]}})),
            Some(AnswerForm::Choice(vec!["左".into(), "右".into()]))
        );
        let request = read(
            with(json!({
                "stop_token_ids": [1, 2], "min_tokens": 3, "allowed_token_ids": [4],
                "chat_template_kwargs": {"enable_thinking": false},
            })),
            false,
        )
        .unwrap();
        assert_eq!(request.stop_token_ids, [1, 2]);
        assert_eq!(request.min_tokens, Some(3));
        assert_eq!(request.allowed_token_ids, Some(vec![4]));
        assert_eq!(request.enable_thinking, Some(false));
    }

    #[test]
    fn a_lenient_server_names_what_it_passes_over() {
        let body = with(json!({"typo_temperatur": 1, "reasoning_effort": "low", "user": "u"}));
        let mut ignored = read(body, true).unwrap().ignored;
        ignored.sort();
        assert_eq!(ignored, ["reasoning_effort", "typo_temperatur"]);
        // A value of another kind is no matter of taste.
        assert!(read(with(json!({"temperature": "warm"})), true).is_err());
    }

    #[test]
    fn images_are_taken_in_every_known_form_and_others_are_named() {
        let part = |part: Value| {
            let text = json!({"type": "text", "text": "?"});
            read(
                json!({"messages": [{"role": "user", "content": [text, part]}]}),
                false,
            )
        };
        for taken in [
            json!({"type": "image_url", "image_url": {"url": "data:x", "detail": "auto"}}),
            json!({"type": "image_url", "image_url": "data:x"}),
            json!({"type": "input_image", "image_url": "data:x", "detail": "high"}),
            json!({"type": "image", "image": "data:x"}),
            json!({"type": "image", "image_url": {"url": "data:x"}}),
            json!({"type": "image", "url": "data:x"}),
        ] {
            let request = part(taken.clone()).unwrap();
            let Some(ChatContent::Parts(parts)) = &request.messages[0].content else {
                panic!("{taken}");
            };
            let ChatPart::ImageUrl { image_url } = &parts[1] else {
                panic!("{taken}");
            };
            assert_eq!(image_url.url(), "data:x");
        }
        for (refused, param) in [
            (json!({"type": "image"}), "messages[0].content[1].image"),
            (json!({"type": "video"}), "messages[0].content[1]"),
            (
                json!({"type": "refusal", "refusal": "no"}),
                "messages[0].content[1]",
            ),
            (
                json!({"type": "image_url"}),
                "messages[0].content[1].image_url",
            ),
            (json!({"text": "no type"}), "messages[0].content[1].type"),
            (
                json!({"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}),
                "messages[0].content[1].image_url.detail",
            ),
            (
                json!({"type": "image", "image": "data:x", "max_pixels": 5}),
                "messages[0].content[1].max_pixels",
            ),
        ] {
            let error = part(refused.clone()).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(param), "{refused}: {error}");
            assert!(!error.message.contains("usize") && !error.message.contains("struct"));
        }
    }
}

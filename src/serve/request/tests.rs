//! Which fields are read, refused and documented.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::{
    super::{
        fields::{known, parse_body},
        openapi::document,
        types::{AnswerForm, ChatContent, ChatPart, ToolChoice},
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
    let of_all = schema["allOf"].as_array().into_iter().flatten();
    let of_any = schema["anyOf"].as_array().into_iter().flatten();
    for form in of_all.chain(of_any) {
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
    let document = document(false);
    let mut documented = BTreeMap::new();
    let root = &document["components"]["schemas"][schema];
    properties(document, root, "", &mut documented);
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
        {"type": "refusal", "refusal": "?"},
        {"type": "image_url", "image_url": url},
        {"type": "input_image", "image_url": "data:x"},
        {"type": "image", "image": "data:x"},
    ]);
    let schema = json!({"name": "x", "schema": {"type": "boolean"}});
    let function = json!({"name": "f", "parameters": {}});
    let named = json!({"type": "function", "function": {"name": "f"}});
    let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let base = json!({
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c", "content": "1"},
        ],
        "stream_options": {"include_usage": true},
        "chat_template_kwargs": {"enable_thinking": false},
        "mm_processor_kwargs": {"size": {"longest_edge": 1}},
        "tools": [{"type": "function", "function": function}],
    });
    for (name, form, choice) in [
        (
            "response_format",
            json!({"type": "json_schema", "json_schema": schema}),
            named.clone(),
        ),
        (
            "structured_outputs",
            json!({"regex": "a"}),
            json!({"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}),
        ),
    ] {
        let mut body = base.clone();
        body[name] = form;
        body["tool_choice"] = choice;
        body["prediction"] = json!({"type": "content", "content": "?"});
        read(body, false).unwrap();
    }
    check_against_document("ChatRequest");
    let parse = |body: Value| parse_body(body.to_string().as_bytes()).unwrap();
    let form = json!({"type": "json_schema", "json_schema": schema});
    let body = json!({"prompt": "?", "stream_options": {}, "response_format": form});
    CompletionRequest::read(parse(body), false).unwrap();
    let body = json!({"prompt": "?", "structured_outputs": {"regex": "a"}});
    CompletionRequest::read(parse(body), false).unwrap();
    check_against_document("CompletionRequest");
    let items = json!([
        {"type": "message", "role": "user", "content": parts},
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": parts},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "?"}]},
    ]);
    let flat = json!({"type": "function", "name": "f"});
    let mut body = json!({
        "input": items,
        "tools": [{"type": "function", "name": "f", "parameters": {}}],
        "text": {"format": {"type": "json_schema", "schema": {}}},
        "reasoning": {},
        "stream_options": {},
        "mm_processor_kwargs": {"size": {}},
        "tool_choice": flat,
    });
    ResponsesRequest::read(parse(body.clone()), false).unwrap();
    body["tool_choice"] = json!({"type": "allowed_tools", "mode": "auto", "tools": [flat]});
    ResponsesRequest::read(parse(body), false).unwrap();
    check_against_document("ResponsesRequest");
    let body = json!({"lora_name": "a"}).to_string();
    AdapterRequest::read(parse_body(body.as_bytes()).unwrap()).unwrap();
    check_against_document("AdapterRequest");
    TokenizeRequest::read(parse(json!({"prompt": "?"}))).unwrap();
    check_against_document("TokenizeRequest");
    let mut body = base_of_tokens(&base);
    TokenizeRequest::read(parse(body.clone())).unwrap();
    body["tool_choice"] = json!({"type": "function", "function": {"name": "f"}});
    TokenizeRequest::read(parse(body)).unwrap();
    check_against_document("TokenizeChatRequest");
    DetokenizeRequest::read(parse(json!({"tokens": [1]}))).unwrap();
    check_against_document("DetokenizeRequest");
}

fn base_of_tokens(base: &Value) -> Value {
    let mut body = base.clone();
    body.as_object_mut().unwrap().remove("stream_options");
    let named = json!({"type": "function", "function": {"name": "f"}});
    let tools = json!({"mode": "auto", "tools": [named]});
    body["tool_choice"] = json!({"type": "allowed_tools", "allowed_tools": tools});
    body
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
        (json!({"best_of": 3}), "best_of"),
        (json!({"use_beam_search": true}), "use_beam_search"),
        (
            json!({"truncate_prompt_tokens": 0}),
            "truncate_prompt_tokens",
        ),
        (json!({"priority": 5}), "priority"),
        (json!({"reasoning_effort": "low"}), "reasoning_effort"),
        (json!({"functions": [{"name": "f"}]}), "functions"),
        (json!({"function_call": {"name": "f"}}), "function_call"),
        (json!({"tool_choice": "required"}), "tool_choice"),
        (json!({"tool_choice": "often"}), "tool_choice"),
        (json!({"tools": [{}]}), "tools[0].function"),
        (json!({"tools": [{"type": "retrieval"}]}), "tools[0].type"),
        (json!({"modalities": ["audio"]}), "modalities"),
        (json!({"max_new_tokens": 5}), "max_new_tokens"),
        (json!({"typo_temperatur": 5}), "typo_temperatur"),
        (
            json!({"continue_final_message": true, "add_generation_prompt": true}),
            "continue_final_message",
        ),
        (
            json!({"mm_processor_kwargs": {"fps": 1}}),
            "mm_processor_kwargs.fps",
        ),
        (
            json!({"chat_template_kwargs": {"add_generation_prompt": 1}}),
            "chat_template_kwargs.add_generation_prompt",
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
            json!({"guided_regex": "a", "guided_grammar": "root ::= \"a\""}),
            "response_format",
        ),
        (json!({"top_logprobs": 2}), "top_logprobs"),
        (json!({"grammar": "x"}), "grammar"),
    ] {
        let error = read(with(more.clone()), false).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{more}: {error}");
    }
    let error = read(with(json!({"functions": [{"name": "f"}]})), false).unwrap_err();
    assert!(error.message.contains("send `tools`"), "{error}");
}

#[test]
fn functions_are_read_in_every_form_of_choice() {
    let function = |name: &str| json!({"type": "function", "function": {"name": name}});
    let tools = json!([function("f"), function("g")]);
    let choose = |choice: Value| {
        let body = with(json!({"tools": tools, "tool_choice": choice}));
        read(body, false).map(|request| request.tools)
    };
    let names = |choice: Value| -> Vec<String> {
        let tools = choose(choice).unwrap();
        tools
            .callable()
            .iter()
            .map(|(_, tool)| tool.name.clone())
            .collect()
    };
    assert_eq!(names(Value::Null), ["f", "g"]);
    assert_eq!(names("none".into()), [] as [&str; 0]);
    assert_eq!(names("required".into()), ["f", "g"]);
    assert_eq!(names(function("g")), ["g"]);
    let allowed = json!({"mode": "required", "tools": [function("g")]});
    let allowed = json!({"type": "allowed_tools", "allowed_tools": allowed});
    assert_eq!(names(allowed.clone()), ["g"]);
    assert_eq!(choose(allowed).unwrap().choice, ToolChoice::Required);
    let error = choose(function("h")).unwrap_err();
    assert!(error.message.contains("names `h`"), "{error}");
    for (tools, param) in [
        (json!([function("f"), function("f")]), "tools[1]"),
        (json!([function("a b")]), "tools[0].function.name"),
        (
            json!([{"type": "function", "function": {"name": "f", "parameters": 1}}]),
            "tools[0].function.parameters",
        ),
    ] {
        let error = read(with(json!({"tools": tools})), false).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param));
    }
    let messages = json!([
        {"role": "user", "content": "?"},
        {"role": "tool", "tool_call_id": "nobody", "content": "1"},
    ]);
    let error = read(json!({"messages": messages}), false).unwrap_err();
    assert_eq!(error.param.as_deref(), Some("messages[1].tool_call_id"));
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
    let generation = request.generation;
    assert!(generation.include_usage && generation.form.is_none());
}

#[test]
fn fields_of_vllm_that_name_an_ability_are_honoured() {
    let form = |more: Value| read(with(more), false).unwrap().generation.form;
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
            "chat_template_kwargs": {"enable_thinking": false}, "bad_words": ["x"],
            "mm_processor_kwargs": {"min_pixels": 5, "size": {"longest_edge": 6}},
            "continue_final_message": true, "truncate_prompt_tokens": 7, "skip_special_tokens": false,
            "include_stop_str_in_output": true, "prompt_logprobs": 1,
        })),
        false,
    )
    .unwrap();
    let (generation, prompt) = (request.generation, request.prompt);
    assert_eq!(generation.stop_token_ids, [1, 2]);
    assert_eq!(generation.min_tokens, Some(3));
    assert_eq!(generation.allowed_token_ids, Some(vec![4]));
    assert_eq!(generation.bad_words, ["x"]);
    assert!(generation.include_stop_str_in_output && generation.keep_special_tokens);
    assert_eq!(generation.prompt_logprobs, Some(1));
    assert_eq!(prompt.template["enable_thinking"], false);
    assert_eq!(prompt.limits.min_pixels, Some(5));
    assert_eq!(prompt.limits.max_pixels, Some(6));
    assert!(prompt.continue_final_message && prompt.without_generation_prompt);
    assert_eq!(prompt.truncate, Some(7));
    let same = read(with(json!({"enable_thinking": false})), false).unwrap();
    assert_eq!(same.prompt.template["enable_thinking"], false);
    assert_eq!(
        form(json!({"guided_grammar": "x"})),
        Some(AnswerForm::Grammar("x".into()))
    );
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
        json!({"type": "image", "image": "data:x", "max_pixels": 5}),
        json!({"type": "image_url", "image_url": {"url": "data:x", "detail": "low"}}),
    ] {
        let request = part(taken.clone()).unwrap();
        let Some(ChatContent::Parts(parts)) = &request.messages[0].content else {
            panic!("{taken}");
        };
        let ChatPart::ImageUrl { image_url } = &parts[1] else {
            panic!("{taken}");
        };
        assert_eq!(image_url.url, "data:x");
    }
    for (refused, param) in [
        (json!({"type": "image"}), "messages[0].content[1].image"),
        (json!({"type": "video"}), "messages[0].content[1]"),
        (
            json!({"type": "image_url"}),
            "messages[0].content[1].image_url",
        ),
        (json!({"text": "no type"}), "messages[0].content[1].type"),
        (
            json!({"type": "image_url", "image_url": {"url": "data:x", "detail": "tiny"}}),
            "messages[0].content[1].image_url.detail",
        ),
        (
            json!({"type": "image", "image": "data:x", "resized_width": 5}),
            "messages[0].content[1].resized_width",
        ),
    ] {
        let error = part(refused.clone()).unwrap_err();
        assert_eq!(error.param.as_deref(), Some(param), "{refused}: {error}");
        assert!(!error.message.contains("usize") && !error.message.contains("struct"));
    }
}

//! `serve` from outside: functions that the model calls.

use serde_json::{Value, json};

use crate::server::{Response, Server, start, with};

fn body(more: Value) -> Value {
    let report = json!({
        "type": "object",
        "properties": {"side": {"enum": ["左", "右"]}, "count": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["side", "count"],
    });
    let tools = json!([
        {"type": "function", "function": {"name": "report", "description": "Writes down.", "parameters": report}},
        {"type": "function", "function": {"name": "look_again"}},
    ]);
    let mut body = json!({
        "messages": [{"role": "user", "content": "左侧有积液吗？"}],
        "tools": tools,
        "max_tokens": 400,
    });
    body.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    body
}

/// Name and arguments of all calls of an answer.
fn calls(message: &Value) -> Vec<(String, Value)> {
    let calls = message["tool_calls"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    calls
        .iter()
        .map(|call| {
            assert!(call["id"].as_str().unwrap().starts_with("call_"), "{call}");
            let function = &call["function"];
            let arguments = function["arguments"].as_str().unwrap();
            let arguments =
                serde_json::from_str(arguments).unwrap_or_else(|error| panic!("{error}: {call}"));
            (function["name"].as_str().unwrap().to_owned(), arguments)
        })
        .collect()
}

fn answer(server: &Server, more: Value) -> Value {
    let response = server.chat(&body(more));
    assert_eq!(response.status, 200, "{response:?}");
    response.json()["choices"][0].clone()
}

fn report_is_whole(arguments: &Value) {
    assert!(
        ["左", "右"].contains(&arguments["side"].as_str().unwrap()),
        "{arguments}"
    );
    assert!(
        (1..=9).contains(&arguments["count"].as_i64().unwrap()),
        "{arguments}"
    );
    assert_eq!(arguments.as_object().unwrap().len(), 2);
}

/// What the deltas of a stream come to.
fn joined(response: &Response) -> Value {
    let mut message = json!({"content": "", "tool_calls": []});
    let mut reason = Value::Null;
    let mut events = response.events();
    assert_eq!(events.pop().as_deref(), Some("[DONE]"));
    for event in events {
        let chunk: Value = serde_json::from_str(&event).unwrap();
        let choice = &chunk["choices"][0];
        if !choice["finish_reason"].is_null() {
            reason = choice["finish_reason"].clone();
        }
        let text = choice["delta"]["content"].as_str().unwrap_or_default();
        message["content"] = format!("{}{text}", message["content"].as_str().unwrap()).into();
        for delta in choice["delta"]["tool_calls"]
            .as_array()
            .into_iter()
            .flatten()
        {
            let index = delta["index"].as_u64().unwrap() as usize;
            let all = message["tool_calls"].as_array_mut().unwrap();
            if index == all.len() {
                all.push(delta.clone());
            } else {
                let more = delta["function"]["arguments"].as_str().unwrap();
                let function = &mut all[index]["function"];
                let before = function["arguments"].as_str().unwrap();
                function["arguments"] = format!("{before}{more}").into();
            }
        }
    }
    json!({"message": message, "finish_reason": reason})
}

#[test]
fn a_call_is_forced_and_follows_its_schema() {
    let server = start(&[]);
    let named = json!({"type": "function", "function": {"name": "report"}});
    let found = answer(
        &server,
        json!({"tool_choice": named, "parallel_tool_calls": false}),
    );
    assert_eq!(found["finish_reason"], "tool_calls");
    assert_eq!(found["message"]["content"], Value::Null);
    let all = calls(&found["message"]);
    assert_eq!((all.len(), all[0].0.as_str()), (1, "report"));
    report_is_whole(&all[0].1);

    let once = answer(
        &server,
        json!({"tool_choice": "required", "parallel_tool_calls": false}),
    );
    assert_eq!(calls(&once["message"]).len(), 1);
    let several = answer(&server, json!({"tool_choice": "required"}));
    for (name, arguments) in calls(&several["message"]) {
        match name.as_str() {
            "report" => report_is_whole(&arguments),
            "look_again" => assert_eq!(arguments, json!({})),
            other => panic!("{other} is no function"),
        }
    }
    let only = json!({"mode": "required", "tools": [{"type": "function", "function": {"name": "look_again"}}]});
    let only = json!({"type": "allowed_tools", "allowed_tools": only});
    let found = answer(
        &server,
        json!({"tool_choice": only, "parallel_tool_calls": false}),
    );
    assert_eq!(calls(&found["message"]), [("look_again".into(), json!({}))]);
}

#[test]
fn a_stream_of_calls_comes_to_the_whole_answer() {
    let server = start(&[]);
    for choice in ["required", "auto"] {
        let settings =
            json!({"tool_choice": choice, "max_tokens": 60, "seed": 3, "logit_bias": {"1012": 9}});
        let whole = answer(&server, settings.clone());
        let streamed = joined(&server.chat(&with(body(settings), "stream", true.into())));
        assert_eq!(
            streamed["finish_reason"], whole["finish_reason"],
            "{choice}"
        );
        let content = whole["message"]["content"].as_str().unwrap_or_default();
        assert_eq!(streamed["message"]["content"], content, "{choice}");
        let parts = |message: &Value| -> Vec<Value> {
            let calls = message["tool_calls"]
                .as_array()
                .cloned()
                .unwrap_or_default();
            calls.iter().map(|call| call["function"].clone()).collect()
        };
        assert_eq!(
            parts(&streamed["message"]),
            parts(&whole["message"]),
            "{choice}"
        );
    }
}

#[test]
fn a_model_that_likes_to_calls_by_the_schema_and_one_that_does_not_writes() {
    let server = start(&[]);
    let words = answer(
        &server,
        json!({"tool_choice": "auto", "logit_bias": {"1012": -100}}),
    );
    assert!(calls(&words["message"]).is_empty());
    assert!(!words["message"]["content"].as_str().unwrap().is_empty());
    let none = answer(&server, json!({"tool_choice": "none"}));
    assert!(calls(&none["message"]).is_empty());
    // The token that opens a call, made the likeliest where it may come.
    let eager = json!({"logit_bias": {"1012": 100}, "parallel_tool_calls": false});
    let called = answer(&server, eager);
    assert_eq!(called["finish_reason"], "tool_calls", "{called}");
    let all = calls(&called["message"]);
    assert_eq!(all.len(), 1);
    if all[0].0 == "report" {
        report_is_whole(&all[0].1);
    }
    // Either a call or an answer of the form.
    let form =
        json!({"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "无"}}});
    let answered = answer(
        &server,
        json!({"response_format": form, "logit_bias": {"1012": -100}}),
    );
    assert_eq!(answered["message"]["content"], "\"无\"");
    let called = answer(
        &server,
        json!({"response_format": form, "logit_bias": {"1012": 100}}),
    );
    assert!(!calls(&called["message"]).is_empty(), "{called}");
}

#[test]
fn calls_and_results_are_part_of_the_prompt() {
    let server = start(&[]);
    let call = json!({"id": "call_1", "type": "function", "function": {"name": "report", "arguments": "{\"side\":\"左\"}"}});
    let messages = json!([
        {"role": "system", "content": "简短。"},
        {"role": "user", "content": "？"},
        {"role": "assistant", "content": null, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "好"}]},
    ]);
    let tools = body(json!({}))["tools"].clone();
    let request = json!({"messages": messages, "tools": tools});
    let found = server.post("/tokenize", &request).json();
    let tokens = json!({"tokens": found["tokens"]});
    let found = server.post("/detokenize", &tokens).json();
    let prompt = found["prompt"].as_str().unwrap();
    for part in [
        "<|im_start|>system\n简短。\n\n# Tools\n",
        "<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"report\"",
        "<|im_start|>assistant\n<tool_call>\n{\"name\": \"report\", \"arguments\": {\"side\": \"左\"}}\n</tool_call><|im_end|>",
        "<|im_start|>user\n<tool_response>\n好\n</tool_response><|im_end|>",
    ] {
        assert!(prompt.contains(part), "{part} is not in {prompt}");
    }
    let answer = server.chat(&with(body(json!({"max_tokens": 3})), "messages", messages));
    assert_eq!(answer.status, 200, "{answer:?}");
    for (name, value, param) in [
        (
            "tools",
            json!([{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]),
            "tools",
        ),
        (
            "messages",
            json!([{"role": "function", "name": "f", "content": "1"}]),
            "messages[0].role",
        ),
        ("functions", json!([{"name": "f"}]), "functions"),
    ] {
        let refused = server.chat(&with(body(json!({})), name, value));
        assert_eq!(refused.status, 400, "{refused:?}");
        assert_eq!(refused.json()["error"]["param"], param);
    }
}

#[test]
fn a_schema_that_cannot_be_followed_is_told_or_refused() {
    let server = start(&[]);
    let ask = |strict: bool| {
        let schema =
            json!({"type": "object", "properties": {"a": {"type": "array", "uniqueItems": true}}});
        let function = json!({"name": "f", "parameters": schema, "strict": strict});
        let tools = json!([{"type": "function", "function": function}]);
        server.chat(&body(json!({"tools": tools, "max_tokens": 3})))
    };
    let told = ask(false);
    assert_eq!(told.status, 200, "{told:?}");
    let remarks = told.json()["remarks"].clone();
    let codes: Vec<&Value> = remarks
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["code"])
        .collect();
    assert!(codes.contains(&&json!("schema_not_followed")), "{remarks}");
    let refused = ask(true);
    assert_eq!(refused.status, 400);
    assert_eq!(
        refused.json()["error"]["param"],
        "tools[0].function.parameters"
    );
}

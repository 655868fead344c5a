//! `serve` from outside: OpenAI's Responses API.

use serde_json::{Value, json};

use crate::{
    demo_image,
    server::{Response, Server, data_url, question, start, with},
};

fn respond(server: &Server, body: &Value) -> Value {
    let response = server.post("/v1/responses", body);
    assert_eq!(response.status, 200, "{response:?}");
    response.json()
}

fn output_text(response: &Value) -> String {
    let items = response["output"].as_array().unwrap();
    items
        .iter()
        .filter(|item| item["type"] == "message")
        .flat_map(|item| item["content"].as_array().unwrap())
        .map(|part| part["text"].as_str().unwrap())
        .collect()
}

/// The events of a stream, each with the name it was sent by.
fn events(response: &Response) -> Vec<Value> {
    let mut named = Vec::new();
    let mut name = "";
    for line in response.body.lines() {
        if let Some(found) = line.strip_prefix("event: ") {
            name = found;
        }
        if let Some(data) = line.strip_prefix("data: ") {
            let event: Value = serde_json::from_str(data).unwrap();
            assert_eq!(event["type"], name);
            assert_eq!(event["sequence_number"], named.len());
            named.push(event);
        }
    }
    named
}

#[test]
fn a_film_is_answered_as_in_a_chat() {
    let server = start(&[]);
    let want = server.chat(&question("有什么异常？")).json();
    let content = json!([
        {"type": "input_image", "image_url": data_url(&demo_image()), "detail": "auto"},
        {"type": "input_text", "text": "有什么异常？"},
    ]);
    let input = json!([{"role": "user", "content": content}]);
    let found = respond(
        &server,
        &json!({"model": "tiny", "input": input, "store": false}),
    );
    assert_eq!(
        output_text(&found),
        want["choices"][0]["message"]["content"].as_str().unwrap()
    );
    assert_eq!(found["status"], "completed");
    assert_eq!(
        found["usage"]["input_tokens"],
        want["usage"]["prompt_tokens"]
    );
    assert_eq!(
        found["usage"]["output_tokens"],
        want["usage"]["completion_tokens"]
    );
    assert_eq!(
        (&found["store"], &found["remarks"]),
        (&json!(false), &json!([]))
    );
    assert_eq!(found["text"], json!({"format": {"type": "text"}}));

    // The next question, with all that was said.
    let mut input = input.as_array().unwrap().clone();
    input.extend(found["output"].as_array().unwrap().clone());
    input.push(json!({"role": "user", "content": "哪一侧？"}));
    let next = respond(&server, &json!({"input": input, "instructions": "简短。"}));
    assert!(next["usage"]["input_tokens"].as_u64() > found["usage"]["input_tokens"].as_u64());
    assert_eq!(next["instructions"], "简短。");
}

#[test]
fn a_form_and_a_limit_are_followed() {
    let server = start(&[]);
    let schema = json!({"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"], "additionalProperties": false});
    let format = json!({"type": "json_schema", "name": "x", "schema": schema, "strict": true});
    let body = json!({"input": "？", "text": {"format": format}});
    let found = respond(&server, &body);
    let value: Value = serde_json::from_str(&output_text(&found)).unwrap();
    assert!(value["n"].is_boolean());
    assert_eq!(found["text"]["format"]["name"], "x");
    let cut = json!({"input": "？", "max_output_tokens": 2, "top_logprobs": 1, "include": ["message.output_text.logprobs"]});
    let cut = respond(&server, &cut);
    assert_eq!(cut["status"], "incomplete");
    assert_eq!(cut["incomplete_details"]["reason"], "max_output_tokens");
    let part = &cut["output"][0]["content"][0];
    assert_eq!(part["logprobs"].as_array().unwrap().len(), 2);
    for (more, param) in [
        (json!({"store": true}), "store"),
        (
            json!({"previous_response_id": "resp_1"}),
            "previous_response_id",
        ),
        (json!({"tools": [{"type": "web_search"}]}), "tools[0].type"),
        (json!({"input": null}), "input"),
        (json!({"input": []}), "messages"),
    ] {
        let mut body = json!({"input": "？"});
        body.as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        let refused = server.post("/v1/responses", &body);
        assert_eq!(refused.status, 400, "{refused:?}");
        assert_eq!(refused.json()["error"]["param"], param);
    }
}

#[test]
fn a_stream_grows_to_the_whole_response() {
    let server = start(&[]);
    let body = json!({"input": "写一份报告。", "max_output_tokens": 20});
    let whole = respond(&server, &body);
    let streamed = server.post("/v1/responses", &with(body, "stream", true.into()));
    let events = events(&streamed);
    let names: Vec<&str> = events
        .iter()
        .map(|event| event["type"].as_str().unwrap())
        .collect();
    assert_eq!(
        names[..4],
        [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added"
        ]
    );
    let end = &names[names.len() - 4..];
    assert_eq!(
        end,
        [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            match whole["status"] == "completed" {
                true => "response.completed",
                false => "response.incomplete",
            }
        ]
    );
    let text: String = events
        .iter()
        .filter(|event| event["type"] == "response.output_text.delta")
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    assert_eq!(text, output_text(&whole));
    let last = &events.last().unwrap()["response"];
    assert_eq!(output_text(last), text);
    assert_eq!(
        last["usage"]["output_tokens"],
        whole["usage"]["output_tokens"]
    );
    assert_eq!(events[2]["item"]["id"], last["output"][0]["id"]);
}

#[test]
fn functions_are_called_and_their_results_are_read() {
    let server = start(&[]);
    let parameters = json!({"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 3}}, "required": ["n"]});
    let tools = json!([{"type": "function", "name": "count", "parameters": parameters}]);
    let body = json!({"input": "？", "tools": tools, "tool_choice": {"type": "function", "name": "count"},
        "parallel_tool_calls": false});
    let found = respond(&server, &body);
    let call = &found["output"][0];
    assert_eq!(
        (&call["type"], &call["name"]),
        (&json!("function_call"), &json!("count"))
    );
    let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
    assert!((1..=3).contains(&arguments["n"].as_i64().unwrap()));
    assert_eq!(found["tools"], tools);

    let streamed = server.post("/v1/responses", &with(body.clone(), "stream", true.into()));
    let events = events(&streamed);
    let of = |name: &str| -> Vec<&Value> {
        events
            .iter()
            .filter(|event| event["type"] == name)
            .collect()
    };
    let deltas: String = of("response.function_call_arguments.delta")
        .iter()
        .map(|event| event["delta"].as_str().unwrap())
        .collect();
    let done = of("response.function_call_arguments.done")[0];
    assert_eq!(
        (done["arguments"].as_str(), &done["name"]),
        (Some(deltas.as_str()), &json!("count"))
    );
    assert_eq!(deltas, call["arguments"].as_str().unwrap());

    let input = json!([
        {"role": "user", "content": "？"},
        call,
        {"type": "function_call_output", "call_id": call["call_id"], "output": "3"},
    ]);
    let next = respond(
        &server,
        &json!({"input": input, "tools": tools, "max_output_tokens": 4}),
    );
    assert!(!next["output"].as_array().unwrap().is_empty());
}

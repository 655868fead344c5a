//! `serve` held against its own OpenAPI document: what it sends is documented, and what is documented is sent.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::{
    serve::write_adapter,
    server::{Response, question, start, with},
    text,
};

/// The document, and the properties of it that were seen in a response.
struct Document {
    root: Value,
    seen: BTreeSet<String>,
}

impl Document {
    /// Follows a `$ref` to the schema itself, by its pointer.
    fn resolve(&self, pointer: &str) -> String {
        match self.at(pointer)["$ref"].as_str() {
            Some(target) => self.resolve(target.trim_start_matches('#')),
            None => pointer.to_owned(),
        }
    }

    fn at(&self, pointer: &str) -> &Value {
        self.root
            .pointer(pointer)
            .unwrap_or_else(|| panic!("nothing at {pointer} of the document"))
    }

    /// Fails where `value` has a property that the schema at `pointer` has not, lacks one that it
    /// requires, or is of another type.
    fn check(&mut self, value: &Value, pointer: &str) {
        let pointer = self.resolve(pointer);
        let schema = self.at(&pointer).clone();
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let of_type = |name: &Value| name == kind || (name == "number" && kind == "integer");
        let fits = match &schema["type"] {
            Value::Null => true,
            Value::Array(names) => names.iter().any(of_type),
            name => of_type(name),
        };
        assert!(fits, "{value} is no {} of {pointer}", schema["type"]);
        if let Some(constant) = schema.get("const") {
            assert_eq!(value, constant, "{pointer}");
        }
        if let Some(values) = schema["enum"].as_array() {
            assert!(values.contains(value), "{value} is none of {pointer}");
        }
        for item in value.as_array().into_iter().flatten() {
            self.check(item, &format!("{pointer}/items"));
        }
        let Some(object) = value.as_object() else {
            return;
        };
        for name in schema["required"].as_array().into_iter().flatten() {
            let name = name.as_str().expect("`required` lists names");
            assert!(
                object.contains_key(name),
                "{pointer} requires `{name}`: {value}"
            );
        }
        for (name, inner) in object {
            let documented = schema["properties"].get(name).is_some();
            let others = &schema["additionalProperties"];
            if !documented && others.is_object() {
                self.check(inner, &format!("{pointer}/additionalProperties"));
                continue;
            }
            if !documented && others == true {
                continue;
            }
            assert!(documented, "`{name}` is sent and not in {pointer}: {value}");
            let inner_pointer = format!("{pointer}/properties/{name}");
            self.check(inner, &inner_pointer);
            self.seen.insert(inner_pointer);
        }
    }

    /// All properties of the schema at `pointer`, and of the schemas inside.
    fn properties(&self, pointer: &str, found: &mut BTreeSet<String>) {
        let pointer = self.resolve(pointer);
        let schema = self.at(&pointer);
        if schema["items"].is_object() {
            self.properties(&format!("{pointer}/items"), found);
        }
        for name in schema["properties"]
            .as_object()
            .into_iter()
            .flat_map(|all| all.keys())
        {
            let inner = format!("{pointer}/properties/{name}");
            // A schema may hold itself.
            if found.insert(inner.clone()) {
                self.properties(&inner, found);
            }
        }
    }
}

fn schema(name: &str) -> String {
    format!("/components/schemas/{name}")
}

/// Where the document has the schema of a response.
fn of_response(path: &str, method: &str, status: u16, kind: &str) -> String {
    let path = path.replace('/', "~1");
    let kind = kind.replace('/', "~1");
    format!("/paths/{path}/{method}/responses/{status}/content/{kind}/schema")
}

/// Checks a whole answer, or each event of one.
fn check_each(document: &mut Document, answer: &Response, stream: bool, path: &str) {
    assert_eq!(answer.status, 200, "{answer:?}");
    if !stream {
        let whole = of_response(path, "post", 200, "application/json");
        return document.check(&answer.json(), &whole);
    }
    let event = of_response(path, "post", 200, "text/event-stream");
    for data in answer.events() {
        if data != "[DONE]" {
            document.check(&serde_json::from_str(&data).unwrap(), &event);
        }
    }
}

#[test]
fn responses_have_the_fields_of_the_document_and_no_others() {
    let folder = tempfile::tempdir().unwrap();
    write_adapter(&folder.path().join("other"));
    let server = start(&["--lenient", "--adapter-dir", text(folder.path())]);
    let mut document = Document {
        root: server.get("/openapi.json").json(),
        seen: BTreeSet::new(),
    };
    let forms = [
        json!({"logprobs": true, "top_logprobs": 2, "typo_temperatur": 1}),
        json!({"guided_regex": "<think>心影</think>正常"}),
        // One token over and over, which ends as a repetition.
        json!({"logit_bias": {"100": 100}, "max_tokens": 200}),
        json!({"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required",
            "parallel_tool_calls": false}),
        json!({"findings": true}),
    ];
    let no_image = json!({"messages": [{"role": "user", "content": "？"}], "max_tokens": 2});
    let mut bodies = vec![no_image];
    bodies.extend(forms.map(|form| {
        let settings = form.as_object().expect("settings are an object").clone();
        settings
            .into_iter()
            .fold(question("？"), |body, (key, value)| {
                with(body, &key, value)
            })
    }));

    let whole = of_response("/v1/chat/completions", "post", 200, "application/json");
    let chunk = of_response("/v1/chat/completions", "post", 200, "text/event-stream");
    for body in bodies {
        let answer = server.chat(&body);
        assert_eq!(answer.status, 200, "{answer:?}");
        document.check(&answer.json(), &whole);
        let body = with(body, "stream", true.into());
        let body = with(body, "stream_options", json!({"include_usage": true}));
        let mut events = server.chat(&body).events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"));
        for event in events {
            document.check(&serde_json::from_str(&event).unwrap(), &chunk);
        }
    }

    let scored = with(question("？"), "prompt_logprobs", 1.into());
    document.check(
        &server.chat(&with(scored, "max_tokens", 1.into())).json(),
        &whole,
    );

    for stream in [false, true] {
        for body in [
            json!({"prompt": "心影", "logprobs": 1, "echo": true}),
            json!({"prompt": ["心影", "肺"], "n": 2, "max_tokens": 2, "stream_options": {"include_usage": true}}),
        ] {
            let body = with(body, "stream", stream.into());
            let answer = server.post("/v1/completions", &body);
            check_each(&mut document, &answer, stream, "/v1/completions");
        }
        for body in [
            json!({"input": "？", "include": ["message.output_text.logprobs"], "max_output_tokens": 3, "tpyo": 1}),
            json!({"input": "？", "tools": [{"type": "function", "name": "f"}], "tool_choice": "required"}),
        ] {
            let body = with(body, "stream", stream.into());
            let answer = server.post("/v1/responses", &body);
            check_each(&mut document, &answer, stream, "/v1/responses");
        }
    }
    for (path, method, body) in [
        (
            "/tokenize",
            "post",
            json!({"prompt": "心影", "return_token_strs": true}),
        ),
        ("/tokenize", "post", question("？")["messages"].clone()),
        ("/detokenize", "post", json!({"tokens": [1, 2]})),
        ("/version", "get", Value::Null),
    ] {
        let body = match body {
            messages @ Value::Array(_) => json!({"messages": messages}),
            body => body,
        };
        let found = match method {
            "get" => server.get(path),
            _ => server.post(path, &body),
        };
        assert_eq!(found.status, 200, "{found:?}");
        document.check(
            &found.json(),
            &of_response(path, method, 200, "application/json"),
        );
    }

    for path in ["/v1/limits", "/v1/models"] {
        let found = server.get(path).json();
        document.check(&found, &of_response(path, "get", 200, "application/json"));
    }
    document.check(&server.get("/v1/models/tiny").json(), &schema("Model"));
    for path in ["/v1/load_lora_adapter", "/v1/unload_lora_adapter"] {
        let done = server.post(path, &json!({"lora_name": "other"}));
        assert_eq!(done.status, 200, "{done:?}");
        let message = "/components/responses/Message/content/application~1json/schema";
        document.check(&done.json(), message);
    }
    let refused = server.chat(&json!({"messages": []}));
    document.check(&refused.json(), &schema("Error"));

    let mut documented = BTreeSet::new();
    for pointer in [
        &whole,
        &chunk,
        &schema("Limits"),
        &schema("Model"),
        &schema("Error"),
        &schema("FindingProbability"),
    ] {
        document.properties(pointer, &mut documented);
    }
    let never: Vec<_> = documented.difference(&document.seen).collect();
    assert!(never.is_empty(), "documented and never sent: {never:?}");
}

fn check(properties: Value, value: Value) {
    let mut document = Document {
        root: json!({"required": ["a"], "properties": properties}),
        seen: BTreeSet::new(),
    };
    document.check(&value, "");
}

#[test]
#[should_panic(expected = "`b` is sent and not in")]
fn a_field_that_is_not_documented_is_found() {
    check(json!({"a": {}}), json!({"a": 1, "b": 2}));
}

#[test]
#[should_panic(expected = "requires `a`")]
fn a_field_that_is_required_and_not_sent_is_found() {
    check(json!({"a": {}, "b": {}}), json!({"b": 2}));
}

#[test]
#[should_panic(expected = "is no \"string\" of")]
fn a_field_of_another_type_is_found() {
    check(json!({"a": {"type": "string"}}), json!({"a": 1}));
}

#[test]
fn every_documented_path_is_served() {
    let server = start(&[]);
    let document = server.get("/openapi.json").json();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let path = path.replace("{name}", "tiny");
        for method in methods.as_object().unwrap().keys() {
            let response = server.send(&method.to_uppercase(), &path, &[], b"");
            assert!(
                ![404, 405].contains(&response.status),
                "{method} {path}: {response:?}"
            );
        }
    }
}

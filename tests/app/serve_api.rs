//! `serve` from outside: refused and ignored fields, remarks on images, and its log.

use std::{fs, process::Stdio};

use serde_json::{Value, json};

use crate::{
    demo_image, program, run,
    serve::write_adapter,
    server::{about, data_url, question, start, with},
    text,
};

fn text_question(text: &str) -> Value {
    json!({"messages": [{"role": "user", "content": text}], "max_tokens": 4})
}

#[test]
fn a_key_of_blanks_starts_no_server() {
    let folder = tempfile::tempdir().unwrap();
    for key in [
        "        ",
        "       a",
        "\t\t\t\t\t\t\t\t\t",
        "钥匙钥匙钥匙",
        "good-enough,",
    ] {
        let (code, _, stderr) = run(
            folder.path(),
            &["serve", "--host", "0.0.0.0", "--api-key", key],
        );
        assert_eq!(code, 2, "{key:?}: {stderr}");
        assert!(stderr.contains("--api-key"), "{key:?}: {stderr}");
    }
    let child = program(folder.path(), &["serve", "--port", "0"])
        .env("XRAY_API_KEY", "")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("XRAY_API_KEY is empty; unset it"),
        "{stderr}"
    );
    // Blanks around a key are nobody's.
    let server = start(&["--api-key", "  correct-horse "]);
    assert_eq!(server.get("/v1/models").status, 401);
    let bearer = |key: &str| {
        let head = [&*format!("authorization: Bearer {key}")];
        server.send("GET", "/v1/models", &head, b"").status
    };
    assert_eq!(bearer("correct-horse"), 200);
    assert_eq!(bearer(""), 401);
    assert_eq!(bearer("   "), 401);
}

#[test]
fn every_request_has_an_id_and_those_refused_a_line() {
    let server = start(&["--api-key", "correct-horse"]);
    let key = "authorization: Bearer correct-horse";
    let json_head = ["content-type: application/json", key];
    let refused = server.get("/v1/models/wang-1985");
    let id = refused.header("x-request-id").unwrap().to_owned();
    assert_eq!((refused.status, id.len()), (401, 32));
    let missing = server.send("GET", "/patient/wang-1985", &[key], b"");
    assert_eq!(missing.status, 404);
    let bad = server.send("POST", "/v1/chat/completions", &json_head, b"[]");
    assert_eq!(bad.status, 400);
    let body = text_question("有积液吗").to_string();
    let answer = server.send("POST", "/v1/chat/completions", &json_head, body.as_bytes());
    assert_eq!(answer.status, 200);
    let answer_id = answer.header("x-request-id").unwrap();
    assert_eq!(answer.json()["id"], format!("chatcmpl-{answer_id}"));
    assert!(server.get("/healthz").header("x-request-id").is_some());
    for _ in 0..300 {
        server.get("/v1/models");
    }
    std::thread::sleep(std::time::Duration::from_millis(1200));
    server.get("/v1/models");
    std::thread::sleep(std::time::Duration::from_millis(300));
    let log = server.log();
    let line = |part: &str| {
        log.lines()
            .find(|line| line.contains(part))
            .unwrap_or_else(|| panic!("no line with {part}: {log}"))
    };
    let first = line(&id);
    assert!(
        first.starts_with("20") && first.contains("Z request id="),
        "{first}"
    );
    assert!(
        first.contains("status=401 outcome=refused code=invalid_api_key"),
        "{first}"
    );
    assert!(first.contains("route=/v1/models/{*name} "), "{first}");
    assert!(line("status=404").contains("route=- "), "{log}");
    line("status=400 outcome=refused");
    let answered = line(answer_id);
    assert!(
        answered.contains("status=200 outcome=done model=\"tiny\" images=0"),
        "{answered}"
    );
    assert!(!log.contains("wang") && !log.contains("积液"), "{log}");
    let refused = log.matches("status=401").count();
    assert!(
        (40..120).contains(&refused),
        "{refused} lines of 302 refused requests"
    );
    line("more requests were left out");
}

#[test]
fn an_adapters_name_cannot_write_into_the_log() {
    let folder = tempfile::tempdir().unwrap();
    write_adapter(&folder.path().join("a"));
    fs::create_dir(folder.path().join("empty")).unwrap();
    let server = start(&["--adapter-dir", text(folder.path()), "--max-adapters", "2"]);
    let load = |name: &str, path: &str| {
        let body = json!({"lora_name": name, "lora_path": path});
        server.post("/v1/load_lora_adapter", &body)
    };
    for name in [
        "x\n2026-11-30 ERROR forged\u{1b}[31m",
        "../../etc",
        "<script>",
        "",
        &"a".repeat(200),
    ] {
        for path in ["a", "empty"] {
            let refused = load(name, path);
            assert_eq!(refused.status, 400, "{name:?}");
            assert_eq!(refused.json()["error"]["param"], "lora_name", "{name:?}");
        }
    }
    assert!(!server.log().contains("forged"), "{}", server.log());
    assert_eq!(load("one", "a").status, 200);
    assert_eq!(load("two", "a").status, 200);
    let third = load("three", "a");
    assert_eq!(third.status, 400);
    assert_eq!(third.json()["error"]["code"], "too_many_adapters");
    let unknown = json!({"lora_name": "four", "lora_paht": "a"});
    let unknown = server.post("/v1/load_lora_adapter", &unknown);
    assert!(
        unknown.body.contains("did you mean `lora_path`?"),
        "{unknown:?}"
    );
    let given = format!("a b={}", text(&folder.path().join("a")));
    let (code, _, stderr) = run(folder.path(), &["serve", "--lora", &given]);
    assert_eq!((code, stderr.contains("is no name")), (2, true), "{stderr}");
}

#[test]
fn unknown_fields_are_refused_or_named() {
    let server = start(&[]);
    for (field, value, says) in [
        ("suffix", json!("x"), "no field"),
        ("structural_tag", json!("x"), "not supported"),
        ("typo_temperatur", json!(1), "no field"),
        ("temperatur", json!(1), "did you mean `temperature`?"),
        (
            "max_tokens",
            json!(-1),
            "`max_tokens` is `-1`, expected a whole number",
        ),
        ("messages", json!({}), "expected a list"),
        ("top_p", json!(0), "expected more than 0 and at most 1"),
        (
            "chat_template_kwargs",
            json!({"enable_thinking": true}),
            "chat template",
        ),
    ] {
        let response = server.chat(&with(text_question("?"), field, value));
        assert_eq!(response.status, 400, "{field}: {response:?}");
        let error = response.json()["error"].clone();
        assert!(error["message"].as_str().unwrap().contains(says), "{error}");
        assert!(
            error["param"].as_str().unwrap().starts_with(field),
            "{error}"
        );
    }
    let by_place = json!(["tiny", [["user", "hi"]], 5]);
    let response = server.chat(&by_place);
    assert_eq!(response.status, 400);
    assert!(
        response.body.contains("expected a JSON object"),
        "{response:?}"
    );

    let lenient = start(&["--lenient"]);
    let body = with(text_question("?"), "typo_temperatur", json!(1));
    let whole = lenient.chat(&body);
    assert_eq!(whole.header("x-ignored-fields"), Some("typo_temperatur"));
    assert_eq!(whole.json()["ignored_fields"], json!(["typo_temperatur"]));
    let streamed = lenient.chat(&with(body, "stream", true.into()));
    assert_eq!(streamed.header("x-ignored-fields"), Some("typo_temperatur"));
    assert!(streamed.body.contains("\"ignored_fields\""), "{streamed:?}");
    let known = lenient.chat(&text_question("?"));
    assert!(known.json().get("ignored_fields").is_none());
}

#[test]
fn fields_of_vllm_are_honoured() {
    let server = start(&[]);
    let ask = |field: &str, value: Value| {
        let body = with(text_question("请写一份报告。"), "max_tokens", 300.into());
        server.chat(&with(body, field, value))
    };
    let schema =
        json!({"type": "object", "properties": {"n": {"type": "boolean"}}, "required": ["n"]});
    for (field, value) in [
        ("guided_json", schema.clone()),
        ("structured_outputs", json!({"json": schema})),
    ] {
        let found: Value = serde_json::from_str(&ask(field, value).text()).unwrap();
        assert!(
            found["n"].is_boolean() && found.as_object().unwrap().len() == 1,
            "{found}"
        );
    }
    let choice = ask("guided_choice", json!(["正常", "异常"])).text();
    assert!(["正常", "异常"].contains(&&*choice), "{choice}");
    let digits = ask("guided_regex", json!("[0-9]{3}")).text();
    assert!(
        digits.len() == 3 && digits.parse::<u32>().is_ok(),
        "{digits}"
    );
    let plain = ask("min_tokens", 0.into()).json();
    let tokens = |answer: &Value| answer["usage"]["completion_tokens"].as_u64().unwrap();
    let longer = ask("min_tokens", (tokens(&plain) + 5).into()).json();
    assert!(tokens(&longer) >= tokens(&plain) + 5, "{longer}");
    let too_many = ask("min_tokens", 301.into());
    assert_eq!(too_many.status, 400, "{too_many:?}");
}

#[test]
fn what_a_schema_repeats_is_not_cut_as_a_circle() {
    let server = start(&[]);
    for schema in [
        json!({"type": "array", "items": {"type": "boolean"}, "minItems": 40, "maxItems": 40}),
        json!({"const": "-".repeat(60)}),
        json!({"type": "string", "pattern": "^[0-9]{40}$"}),
        json!({"type": "array", "minItems": 20, "maxItems": 20, "items": {"type": "object",
            "properties": {"p": {"const": "无"}, "c": {"const": 0}}, "required": ["p", "c"]}}),
    ] {
        let format = json!({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}});
        let body = with(question("请写。"), "response_format", format);
        let answer = server.chat(&with(body, "max_tokens", 600.into())).json();
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "stop", "{schema}: {answer}");
        let text = choice["message"]["content"].as_str().unwrap();
        serde_json::from_str::<Value>(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    }
}

#[test]
fn remarks_on_images_come_with_the_answer() {
    let server = start(&[]);
    let none = server.chat(&text_question("？")).json();
    assert_eq!(none["remarks"][0]["code"], "no_image", "{none}");
    assert_eq!(none["remarks"][0]["image"], Value::Null);
    let demo = data_url(&demo_image());
    let body = with(about(&demo, "？"), "max_tokens", 3.into());
    assert_eq!(server.chat(&body).json()["remarks"], json!([]));
    let streamed = server.chat(&with(text_question("？"), "stream", true.into()));
    let events = streamed.events();
    let code = |event: &String| {
        let chunk: Value = serde_json::from_str(event).unwrap();
        chunk["remarks"][0]["code"].as_str().map(str::to_owned)
    };
    assert_eq!(code(&events[0]).as_deref(), Some("no_image"));
    assert_eq!(code(&events[events.len() - 2]).as_deref(), Some("no_image"));
}

#[test]
fn images_are_taken_however_a_client_writes_them() {
    let server = start(&[]);
    let url = data_url(&demo_image());
    let want = server.chat(&about(&url, "？")).text();
    let (head, data) = url.split_once(',').unwrap();
    let lines: Vec<&str> = data
        .as_bytes()
        .chunks(76)
        .map(|line| std::str::from_utf8(line).unwrap())
        .collect();
    for data in [
        lines.join("\n") + "\n",
        lines.join("\r\n"),
        data.replace('+', "-").replace('/', "_"),
        data.replace('+', "%2B")
            .replace('/', "%2F")
            .replace('=', "%3D"),
        data.trim_end_matches('=').to_owned(),
    ] {
        let answer = server.chat(&about(&format!("{head},{data}"), "？"));
        assert_eq!(answer.status, 200, "{answer:?}");
        assert_eq!(answer.text(), want);
    }
    for part in [
        json!({"type": "image", "image": url}),
        json!({"type": "input_image", "image_url": url}),
    ] {
        let mut body = about(&url, "？");
        body["messages"][0]["content"][0] = part;
        assert_eq!(server.chat(&body).text(), want);
    }
    let mut body = about(&url, "？");
    body["messages"][0]["content"][0] = json!({"type": "video_url", "video_url": "x"});
    let refused = server.chat(&body).json();
    assert_eq!(refused["error"]["param"], "messages[0].content[0]");
}

#[test]
fn limits_can_be_read_before_a_request() {
    let server = start(&["--max-images", "3", "--max-image-megapixels", "5"]);
    let limits = server.get("/v1/limits").json();
    assert_eq!(limits["max_images"], 3);
    assert_eq!(limits["max_image_pixels"], 5_000_000);
    assert_eq!(limits["max_body_bytes"], 64 << 20);
    assert!(limits["max_model_len"].as_u64().unwrap() >= 512);
    assert_eq!(limits["page_history"], Value::Null);
}

//! `serve` from outside: answers, streams, models, adapters, many users at once.

use std::{fs, path::Path, thread};

use serde_json::{Value, json};

use crate::{
    cli_prompt, demo_image, fixture_image, infer_well, json_lines, records, repository, run,
    server::{about, data_url, question, start, with},
    text,
};

fn delta(events: &[String], key: &str) -> String {
    events
        .iter()
        .filter(|event| *event != "[DONE]")
        .map(|event| {
            let chunk: Value = serde_json::from_str(event).unwrap();
            chunk["choices"][0]["delta"][key]
                .as_str()
                .unwrap_or_default()
                .to_owned()
        })
        .collect()
}

#[test]
fn an_answer_is_that_of_infer_whole_streamed_and_again() {
    let folder = tempfile::tempdir().unwrap();
    let (stdout, _) = infer_well(folder.path(), &[text(&demo_image())]);
    let want = stdout.trim_end();
    let server = start(&[]);
    let body = question(cli_prompt());
    let first = server.chat(&body);
    assert_eq!(first.text(), want);
    let first = first.json();
    assert_eq!(first["object"], "chat.completion");
    assert_eq!(first["choices"][0]["finish_reason"], "stop");
    assert_eq!(first["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    let usage = &first["usage"];
    assert_eq!(
        usage["total_tokens"].as_u64(),
        Some(
            usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
        )
    );

    let streamed = with(body.clone(), "stream", true.into());
    let streamed = with(streamed, "stream_options", json!({"include_usage": true}));
    let response = server.chat(&streamed);
    assert_eq!(
        response.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
    let events = response.events();
    assert_eq!(delta(&events, "content"), want);
    assert_eq!(events.last().unwrap(), "[DONE]");
    let counts: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(counts["choices"], json!([]));
    assert_eq!(
        counts["usage"]["completion_tokens"],
        usage["completion_tokens"]
    );

    // The second question about the image needs neither the vision tower nor the image's tokens.
    assert_eq!(server.metric("xray_images_encoded_total"), 1);
    let second = server.chat(&question("有胸腔积液吗？")).json();
    let cached = second["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
    assert!(cached.unwrap() > 16, "{second}");
    assert_eq!(server.metric("xray_images_encoded_total"), 1);
    // The log has sizes, and no content.
    let log = server.log();
    assert!(log.contains(" images=1 "), "{log}");
    assert!(!log.contains(want) && !log.contains("积液"), "{log}");
}

#[test]
fn settings_of_a_request_are_kept() {
    let server = start(&["--no-prefix-cache"]);
    let base = question("请写一份报告。");
    let short = server
        .chat(&with(base.clone(), "max_tokens", 2.into()))
        .json();
    assert_eq!(short["choices"][0]["finish_reason"], "length");
    assert_eq!(short["usage"]["completion_tokens"], 2);

    let whole = server.chat(&base).text();
    let stop: String = whole.chars().skip(3).take(2).collect();
    let stopped = server
        .chat(&with(base.clone(), "stop", json!([stop])))
        .text();
    assert_eq!(stopped, whole[..whole.find(&stop).unwrap()]);

    let hot = with(
        with(base.clone(), "temperature", 4.0.into()),
        "seed",
        5.into(),
    );
    // Few tokens: a batch of another size rounds otherwise, and a draw near a boundary falls on its other side.
    let hot = with(with(hot, "n", 3.into()), "max_tokens", 8.into());
    let contents = |body: &Value| -> Vec<String> {
        let answer = server.chat(body).json();
        let choices = answer["choices"].as_array().unwrap();
        choices
            .iter()
            .map(|choice| choice["message"]["content"].as_str().unwrap().to_owned())
            .collect()
    };
    let three = contents(&hot);
    assert_eq!(three.len(), 3);
    assert_eq!(contents(&hot), three);
    assert!(three[0] != three[1] || three[1] != three[2], "{three:?}");
    assert_eq!(
        contents(&with(with(hot, "n", 1.into()), "seed", 6.into())),
        three[1..2]
    );

    let body = with(
        with(base, "logprobs", true.into()),
        "top_logprobs",
        3.into(),
    );
    let answer = server.chat(&body).json();
    let content = answer["choices"][0]["logprobs"]["content"]
        .as_array()
        .unwrap();
    let first = &content[0];
    assert_eq!(first["top_logprobs"].as_array().unwrap().len(), 3);
    // Greedy: the chosen token is the likeliest.
    assert_eq!(first["token"], first["top_logprobs"][0]["token"]);
    assert!(first["logprob"].as_f64().unwrap() <= 0.0);
}

#[test]
fn json_follows_its_schema() {
    let server = start(&[]);
    let schema = json!({
        "type": "object",
        "properties": {
            "side": {"enum": ["左侧", "右侧", "双侧"]},
            "findings": {"type": "array", "items": {"enum": ["实变", "积液", "气胸"]}, "maxItems": 3},
        },
        "required": ["side", "findings"],
        "additionalProperties": false,
    });
    let format =
        json!({"type": "json_schema", "json_schema": {"name": "report", "schema": schema}});
    let body = with(question("请写一份报告。"), "response_format", format);
    for seed in 0..4 {
        let body = with(
            with(body.clone(), "seed", seed.into()),
            "temperature",
            1.2.into(),
        );
        let text = server.chat(&body).text();
        let value: Value =
            serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        assert!(
            ["左侧", "右侧", "双侧"].contains(&value["side"].as_str().unwrap()),
            "{text}"
        );
        assert!(value["findings"].as_array().unwrap().len() <= 3, "{text}");
    }
    let bad = json!({"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}});
    let refused = server.chat(&with(question("？"), "response_format", bad));
    assert_eq!(refused.status, 400);
    assert_eq!(refused.json()["error"]["param"], "response_format");
}

#[test]
fn many_users_at_once_get_what_each_gets_alone() {
    let server = start(&["--max-running", "16"]);
    let pictures = [
        data_url(&demo_image()),
        data_url(&fixture_image("model_a.png")),
        data_url(&fixture_image("gray_odd.png")),
    ];
    let questions = ["请写一份报告。", "有胸腔积液吗？", "心影是否增大？", "描述"];
    let bodies: Vec<Value> = (0..12)
        .map(|kind| {
            let body = about(&pictures[kind % 3], questions[kind / 3]);
            with(body, "max_tokens", (8 + kind * 3).into())
        })
        .collect();
    let alone: Vec<String> = bodies.iter().map(|body| server.chat(body).text()).collect();
    thread::scope(|scope| {
        for user in 0..48 {
            let (server, bodies, alone) = (&server, &bodies, &alone);
            scope.spawn(move || {
                for turn in 0..3 {
                    let kind = (user * 7 + turn * 5) % bodies.len();
                    assert_eq!(
                        server.chat(&bodies[kind]).text(),
                        alone[kind],
                        "kind {kind}"
                    );
                }
            });
        }
    });
    assert_eq!(server.metric("xray_sequences_failed_total"), 0);
    server.wait_metric("xray_running", 0);
    assert_eq!(server.metric("xray_queue"), 0);
}

/// Writes an adapter of the tiny model that changes its answers.
pub(crate) fn write_adapter(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let config = json!({
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 8, "lora_dropout": 0.0,
        "target_modules": ["q_proj"], "bias": "none", "base_model_name_or_path": "tiny",
    });
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for layer in 0..4 {
        for (part, shape) in [("lora_A", [2usize, 128]), ("lora_B", [128, 2])] {
            let start = data.len();
            for at in 0..256 {
                let value = ((at * 37 + layer * 11) % 19) as f32 / 19.0 - 0.5;
                data.extend(value.to_le_bytes());
            }
            let name = format!(
                "base_model.model.model.language_model.layers.{layer}.self_attn.q_proj.{part}.weight"
            );
            let entry =
                json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]});
            header.insert(name, entry);
        }
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(data);
    fs::write(dir.join("adapter_model.safetensors"), file).unwrap();
}

#[test]
fn adapters_are_models_beside_the_base_and_come_and_go() {
    let folder = tempfile::tempdir().unwrap();
    write_adapter(&folder.path().join("other"));
    let server = start(&["--adapter-dir", text(folder.path())]);
    let ask = |model: &str| server.chat(&with(question("请写一份报告。"), "model", model.into()));
    let base = ask("tiny").text();
    assert_eq!(ask("other").status, 404);
    let loaded = server.post("/v1/load_lora_adapter", &json!({"lora_name": "other"}));
    assert_eq!(loaded.status, 200, "{loaded:?}");
    let names: Vec<String> = server.get("/v1/models").json()["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|model| model["id"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(names, ["tiny", "other"]);
    assert_eq!(server.get("/v1/models/other").json()["parent"], "tiny");
    let adapted = ask("other").text();
    assert_ne!(adapted, base, "the adapter changes nothing");
    // Both in one batch.
    thread::scope(|scope| {
        for user in 0..12 {
            let (ask, base, adapted) = (&ask, &base, &adapted);
            scope.spawn(move || {
                let (model, want) = [("tiny", base), ("other", adapted)][user % 2];
                assert_eq!(ask(model).text(), *want, "{model}");
            });
        }
    });
    let again = server.post("/v1/load_lora_adapter", &json!({"lora_name": "other"}));
    assert_eq!(again.status, 400);
    for path in ["../other", "/etc", "nothing", ".."] {
        let body = json!({"lora_name": "x", "lora_path": path});
        let refused = server.post("/v1/load_lora_adapter", &body);
        assert_eq!(refused.status, 400, "{path}: {refused:?}");
        assert!(!refused.body.contains(text(folder.path())), "{refused:?}");
    }
    let gone = server.post("/v1/unload_lora_adapter", &json!({"lora_name": "other"}));
    assert_eq!(gone.status, 200);
    assert_eq!(ask("other").status, 404);
    assert_eq!(ask("tiny").text(), base);
    let closed = start(&[]);
    let refused = closed.post("/v1/load_lora_adapter", &json!({"lora_name": "other"}));
    assert_eq!(refused.status, 403);
}

#[test]
fn infer_asks_a_server_and_gets_what_it_would_write_itself() {
    let folder = tempfile::tempdir().unwrap();
    let pictures = ["model_a.png", "model_b.png", "gray_odd.png"].map(fixture_image);
    let mut args = vec!["--json", "--max-new-tokens", "24"];
    args.extend(pictures.iter().map(|path| text(path)));
    let (own, _) = infer_well(folder.path(), &args);
    let server = start(&[]);
    let url = server.url();
    let mut remote = args.clone();
    remote.extend(["--server", &url, "--batch-size", "3"]);
    let (theirs, _) = infer_well(folder.path(), &remote);
    let reports = |text: &str| -> Vec<Value> {
        json_lines(text)
            .into_iter()
            .map(|record| {
                json!([
                    record["image"],
                    record["report"],
                    record["finish_reason"],
                    record["prompt_tokens"]
                ])
            })
            .collect()
    };
    assert_eq!(reports(&theirs), reports(&own));
    let (streamed, _) = infer_well(folder.path(), &["--server", &url, "--stream"]);
    let (whole, _) = infer_well(folder.path(), &[]);
    assert_eq!(streamed, whole);

    // A batch run goes on where it stopped.
    let output = folder.path().join("out.jsonl");
    let mut batch = vec![
        "--server",
        &url,
        "--output",
        text(&output),
        text(&pictures[0]),
    ];
    infer_well(folder.path(), &batch);
    batch.push(text(&pictures[1]));
    infer_well(folder.path(), &batch);
    assert_eq!(records(&output).len(), 2);

    // What belongs to the server is not ignored.
    let unsent = ["infer", "--server", &url, "--adapter", "x"];
    let (code, stdout, stderr) = run(folder.path(), &unsent);
    assert_eq!((code, stdout.as_str()), (2, ""), "{stderr}");
    assert!(stderr.contains("--server-model"), "{stderr}");

    drop(server);
    let (code, stdout, stderr) = run(folder.path(), &["infer", "--server", &url]);
    assert_eq!((code, stdout.as_str()), (1, ""));
    assert!(stderr.contains("cannot reach"), "{stderr}");
    // A server that is gone leaves no record, so that the next run sends it again.
    batch.push(text(&pictures[2]));
    let (code, _, stderr) = run(folder.path(), &[&["infer"], &batch[..]].concat());
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("0 of 1 reports"), "{stderr}");
    assert_eq!(records(&output).len(), 2);
}

#[test]
fn bench_serve_measures_and_compares() {
    let server = start(&[]);
    let folder = tempfile::tempdir().unwrap();
    let url = server.url();
    let args = [
        "bench",
        "serve",
        "--server",
        &url,
        "--users",
        "6",
        "--seconds",
        "1",
        "--check",
        "--max-new-tokens",
        "16",
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let result: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(result["different"], 0);
    assert!(result["answered"].as_u64().unwrap() >= 6, "{stdout}");
    assert_eq!(result["refused"], json!({}));
    let args = [
        "bench",
        "serve",
        "--server",
        &url,
        "--rate",
        "20",
        "--seconds",
        "1",
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
}

#[test]
fn dicom_images_are_shown_and_read() {
    let server = start(&[]);
    let image = repository().join("tests/fixtures/dicom/gray_12u_1.dcm");
    let shown = server.send(
        "POST",
        "/v1/images/preview",
        &["content-type: application/dicom"],
        &fs::read(&image).unwrap(),
    );
    assert_eq!(shown.status, 200, "{shown:?}");
    assert_eq!(shown.header("content-type"), Some("image/png"));
    assert!(shown.body.contains("PNG"));
    let body = with(
        about(&data_url(&image), "请写一份报告。"),
        "max_tokens",
        8.into(),
    );
    assert!(!server.chat(&body).text().is_empty());
    let wrong = server.send("POST", "/v1/images/preview", &[], b"hello");
    assert_eq!(wrong.status, 400);
}

//! `serve` with `findings`: the probabilities of `infer --findings` beside an answer, on one prefill.

use std::fs;

use serde_json::{Value, json};

use crate::{
    cli_prompt, demo_image, infer_well, json_lines, run,
    server::{question, start, with},
    text, tiny_model,
};

/// Small images, short reports.
const QUICK: [&str; 2] = ["--max-pixels", "16384"];

fn asked(words: &str) -> Value {
    let body = with(question(words), "findings", true.into());
    with(body, "max_tokens", 8.into())
}

#[test]
fn sentences_beside_an_answer_are_scored_as_infer_does() {
    are_those_of_infer("sum");
}

#[test]
fn reports_beside_an_answer_are_drawn_as_infer_does() {
    are_those_of_infer("drawn");
}

/// Compares the probabilities of `serve` with those of `infer` under a calibration of the form `form`.
fn are_those_of_infer(form: &str) {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(tiny_model()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let model = text(&model);
    let data = "phantom:31:0..24:house";
    let args = [
        "calibrate",
        "--device",
        "cpu",
        "--model",
        model,
        "--data",
        data,
        "--form",
        form,
    ];
    let (code, _, stderr) = run(folder.path(), &[&args[..], &QUICK].concat());
    assert_eq!(code, 0, "{stderr}");
    let image = demo_image();
    let args = [
        text(&image),
        "--model",
        model,
        "--findings",
        "--json",
        "--max-new-tokens",
        "8",
    ];
    let (stdout, _) = infer_well(folder.path(), &[&args[..], &QUICK].concat());
    let expected = json_lines(&stdout).remove(0);

    // Without kept sequences, so that only the answer's own prompt can be shared.
    let args = [
        "--model",
        model,
        "--served-model-name",
        "tiny",
        "--no-prefix-cache",
    ];
    let server = start(&[&args[..], &QUICK].concat());
    let answer = server.chat(&asked(cli_prompt())).json();
    let choice = &answer["choices"][0];
    assert_eq!(choice["message"]["content"], expected["report"]);
    let found = &choice["findings"];
    assert_eq!(
        (&found["calibrated"], &found["uncalibrated_because"]),
        (&json!(true), &Value::Null)
    );
    assert_eq!(found["rules"], expected["findings_rules"]);
    let classes = found["classes"].as_object().unwrap();
    assert_eq!(classes.len(), 20);
    for (name, one) in classes {
        let expected = &expected["findings"][name];
        for key in ["decision", "in_report", "conflict"] {
            assert_eq!(one[key], expected[key], "{name} {key}");
        }
        // One token after the other against all at once: sums in another order.
        for key in ["logit", "probability"] {
            let [one, expected] = [&one[key], &expected[key]].map(|value| value.as_f64());
            let near = one.zip(expected).is_none_or(|(a, b)| (a - b).abs() < 2e-3);
            assert!(
                near && one.is_some() == expected.is_some(),
                "{name} {key}: {one:?} {expected:?}"
            );
        }
    }
    let conflicts = classes
        .values()
        .filter(|one| one["conflict"] == true)
        .count();
    let remarks = answer["remarks"].as_array().unwrap();
    let told = remarks
        .iter()
        .filter(|remark| remark["code"] == "finding_conflict");
    assert_eq!(told.count(), conflicts);

    if form == "sum" {
        // The prompt went through once, and the sentences after it.
        let prompt = answer["usage"]["prompt_tokens"].as_u64().unwrap();
        assert_eq!(server.metric("xray_prompt_tokens_total"), prompt - 1);
        assert!(server.metric("xray_findings_tokens_total") > 100);
        assert_eq!(server.metric("xray_time_to_findings_seconds_count"), 1);
    } else {
        // The tokens of the sixteen drawn reports are none of the answer.
        let of_answer = answer["usage"]["completion_tokens"].as_u64().unwrap();
        assert!(of_answer <= 8);
        assert!(server.metric("xray_generated_tokens_total") >= of_answer + 2 * 16);
    }
    // Drawn reports go on from the prompt of their own answer, and nothing is kept for the next request.
    assert_eq!(server.metric("xray_images_encoded_total"), 1);
    assert_eq!(server.metric("xray_cache_kept_tokens"), 0);
    server.wait_metric("xray_cache_running_tokens", 0);

    // As a stream they come with the end; an answer without them is the same.
    let streamed = server
        .chat(&with(asked(cli_prompt()), "stream", true.into()))
        .events();
    let chunks: Vec<Value> = streamed
        .iter()
        .filter_map(|data| serde_json::from_str(data).ok())
        .collect();
    let with_findings: Vec<&Value> = chunks
        .iter()
        .filter(|chunk| !chunk["choices"][0]["findings"].is_null())
        .collect();
    assert_eq!(with_findings.len(), 1, "{streamed:?}");
    assert_eq!(with_findings[0]["choices"][0]["findings"], *found);
    assert!(!with_findings[0]["choices"][0]["finish_reason"].is_null());
    let plain = server
        .chat(&with(asked(cli_prompt()), "findings", false.into()))
        .json();
    assert_eq!(plain["choices"][0]["message"], choice["message"]);
    assert!(plain["choices"][0].get("findings").is_none());

    // The calibration is of another question.
    let other = server.chat(&asked("请描述这张胸片。")).json();
    let found = &other["choices"][0]["findings"];
    assert_eq!(found["calibrated"], false);
    let why = found["uncalibrated_because"].as_str().unwrap();
    assert!(
        why.contains("--prompt") && why.contains("请描述这张胸片"),
        "{why}"
    );
    let decided = found["classes"].as_object().unwrap().values();
    assert!(
        decided
            .into_iter()
            .all(|one| one["decision"] == "undecided")
    );
    assert!(
        other["remarks"]
            .to_string()
            .contains("findings_not_calibrated")
    );
}

#[test]
fn findings_are_refused_where_they_cannot_be_given() {
    let server = start(&[]);
    let tool = json!([{"type": "function", "function": {"name": "f"}}]);
    let text_only = json!({"messages": [{"role": "user", "content": "？"}], "findings": true});
    let form = json!({"type": "json_object"});
    for (body, part) in [
        (text_only, "image"),
        (with(asked("？"), "n", 2.into()), "`n`"),
        (with(asked("？"), "tools", tool), "`tools`"),
        (with(asked("？"), "response_format", form), "form"),
        (
            with(asked("？"), "add_generation_prompt", false.into()),
            "beginning",
        ),
        (with(asked("？"), "findings", "yes".into()), "`findings`"),
    ] {
        let refused = server.chat(&body);
        assert_eq!(refused.status, 400, "{part}: {refused:?}");
        assert_eq!(refused.json()["error"]["param"], "findings");
        assert!(refused.body.contains(part), "{part}: {}", refused.body);
    }
    for (path, body) in [
        (
            "/v1/completions",
            json!({"prompt": "心影", "findings": true}),
        ),
        ("/v1/responses", json!({"input": "？", "findings": true})),
    ] {
        let refused = server.post(path, &body);
        assert_eq!(refused.status, 400, "{path}: {refused:?}");
        assert!(
            refused.body.contains("/v1/chat/completions"),
            "{}",
            refused.body
        );
        let body = with(body, "findings", false.into());
        assert_eq!(
            server
                .post(path, &with(body, "max_tokens", Value::Null))
                .status,
            200,
            "{path}"
        );
    }
    // Without a calibration it is said, and what is not calibrated decides nothing.
    let answer = server.chat(&asked("？")).json();
    let why = &answer["choices"][0]["findings"]["uncalibrated_because"];
    assert!(why.as_str().unwrap().contains("calibrate"), "{why}");
}

#[test]
fn a_cache_without_room_for_two_sequences_is_said_before_any_work() {
    let server = start(&["--cache-tokens", "512"]);
    // More tokens than a block of the cache has, in each of the two sequences.
    let question = "7 ".repeat(180);
    let refused = server.chat(&with(asked(&question), "max_tokens", 4.into()));
    assert_eq!(refused.status, 400, "{refused:?}");
    assert!(refused.body.contains("--cache-tokens"), "{}", refused.body);
    assert_eq!(server.metric("xray_prompt_tokens_total"), 0);
}

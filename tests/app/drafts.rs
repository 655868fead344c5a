//! `drafts`, and commands that draft from what it writes.

use std::fs;

use serde_json::json;
use tempfile::tempdir;

use crate::{
    cli_prompt, demo_image, infer_well, repository, run,
    server::{question, start, with},
    text, tiny_model,
};

const TRAIN: &str = "data/sample/train/samples.jsonl";
const VAL: &str = "data/sample/val/samples.jsonl";

fn sample(file: &str) -> String {
    repository().join(file).display().to_string()
}

#[test]
fn a_store_makes_the_same_report_in_fewer_steps() {
    let folder = tempdir().unwrap();
    let (train, val) = (sample(TRAIN), sample(VAL));
    let args = [
        "drafts", "--data", &train, "--val", &val, "--output", "s.bin",
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains("`s.bin`: ") && stdout.contains(" answers of "),
        "{stdout}"
    );
    assert!(stdout.contains("4 drafted at most: "), "{stdout}");
    // A folder gets a file of its own name in it, which is found beside a model.
    let model = folder.path().join("model");
    fs::create_dir(&model).unwrap();
    for entry in fs::read_dir(tiny_model()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
    }
    let (code, stdout, stderr) = run(
        folder.path(),
        &["drafts", "--data", &train, "--output", "model"],
    );
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("drafts.bin`: "), "{stdout}");
    let image = demo_image();
    let report = |more: &[&str]| infer_well(folder.path(), &[&[text(&image)], more].concat());
    let (want, stderr) = report(&[]);
    assert!(!stderr.contains("drafts:"), "{stderr}");
    for more in [
        &["--drafts", "s.bin"][..],
        &["--drafts", "s.bin", "--draft-tokens", "2"],
        &["--drafts", "prompt"],
        &["--model", "model"],
    ] {
        let (got, stderr) = report(more);
        assert_eq!(got, want, "{more:?}");
        assert!(stderr.contains("tokens a step"), "{more:?}: {stderr}");
    }
    let (got, stderr) = report(&["--model", "model", "--drafts", "off"]);
    assert_eq!(got, want);
    assert!(!stderr.contains("draft"), "{stderr}");
    let sampled = ["--temperature", "0.8", "--seed", "4"];
    let drafted = [&sampled[..], &["--drafts", "s.bin"]].concat();
    assert_eq!(report(&drafted).0, report(&sampled).0);
    // A damaged file is an error where it was named, and told where it was found.
    fs::write(model.join("drafts.bin"), b"XRAYDRFT").unwrap();
    let (got, stderr) = report(&["--model", "model"]);
    assert_eq!(got, want);
    assert!(
        stderr.contains("nothing is drafted") && stderr.contains("damaged"),
        "{stderr}"
    );
    let args = [
        "infer",
        text(&image),
        "--device",
        "cpu",
        "--drafts",
        "model/drafts.bin",
    ];
    let (code, _, stderr) = run(folder.path(), &args);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("model/drafts.bin") && stderr.contains("damaged"),
        "{stderr}"
    );
    let (code, _, stderr) = run(
        folder.path(),
        &["infer", text(&image), "--draft-tokens", "0"],
    );
    assert_eq!(code, 2, "{stderr}");
}

#[test]
fn a_server_counts_what_it_drafts() {
    let folder = tempdir().unwrap();
    let store = folder.path().join("s.bin");
    let train = sample(TRAIN);
    let (code, _, stderr) = run(
        folder.path(),
        &["drafts", "--data", &train, "--output", text(&store)],
    );
    assert_eq!(code, 0, "{stderr}");
    let (stdout, _) = infer_well(folder.path(), &[text(&demo_image())]);
    let want = stdout.trim_end();
    let plain = start(&[]);
    let body = question(cli_prompt());
    let first = plain.chat(&body);
    assert_eq!(first.text(), want);
    let details = |answer: &serde_json::Value| {
        let details = &answer["usage"]["completion_tokens_details"];
        let count = |name: &str| details[name].as_u64().unwrap();
        (
            count("accepted_prediction_tokens"),
            count("rejected_prediction_tokens"),
        )
    };
    assert_eq!(details(&first.json()), (0, 0));
    // A prediction needs no store.
    let predicted = with(
        body.clone(),
        "prediction",
        json!({"type": "content", "content": want}),
    );
    let answer = plain.chat(&predicted);
    assert_eq!(answer.text(), want);
    let (accepted, _) = details(&answer.json());
    assert!(accepted >= 4, "{answer:?}");
    assert_eq!(plain.metric("xray_accepted_drafted_tokens_total"), accepted);
    for (wrong, field) in [
        (json!({"type": "text", "content": "x"}), "prediction.type"),
        (json!({"type": "content"}), "prediction.content"),
        (
            json!({"type": "content", "content": 3}),
            "prediction.content",
        ),
        (
            json!({"type": "content", "content": "x", "mode": 1}),
            "prediction.mode",
        ),
    ] {
        let refused = plain.chat(&with(body.clone(), "prediction", wrong));
        assert_eq!(refused.status, 400, "{refused:?}");
        assert!(refused.body.contains(field), "{refused:?}");
    }
    let parts = json!({"type": "content", "content": [{"type": "text", "text": want}]});
    assert_eq!(
        plain.chat(&with(body.clone(), "prediction", parts)).text(),
        want
    );

    let drafting = start(&["--drafts", text(&store), "--drafts-grow"]);
    let answer = drafting.chat(&body);
    assert_eq!(answer.text(), want);
    let (accepted, rejected) = details(&answer.json());
    assert!(accepted > 0, "{answer:?}");
    assert_eq!(
        drafting.metric("xray_drafted_tokens_total"),
        accepted + rejected
    );
}

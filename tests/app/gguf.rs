//! A model in GGUF in every command that takes a model, its vision tower named where two are beside it.

use std::{fs, path::Path};

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::{fixture_image, infer_well, json_lines, records, repository, run, server::start, text};

/// `tiny.gguf` with two files of a vision tower beside it.
fn files(folder: &Path) {
    let from = repository().join("tests/fixtures/checkpoints/gguf");
    fs::copy(from.join("tiny.gguf"), folder.join("tiny.gguf")).unwrap();
    for name in ["mmproj-tiny.gguf", "mmproj-other.gguf"] {
        fs::copy(from.join("mmproj-tiny.gguf"), folder.join(name)).unwrap();
    }
    fs::copy(fixture_image("model_a.png"), folder.join("a.png")).unwrap();
    let row =
        json!({"query": "What?", "response": "Clear.", "images": ["a.png"], "max_pixels": 16384});
    fs::write(folder.join("d.jsonl"), row.to_string()).unwrap();
}

const MODEL: [&str; 2] = ["--model", "tiny.gguf"];
const EYE: [&str; 2] = ["--mmproj", "mmproj-tiny.gguf"];

#[test]
fn every_command_takes_the_named_vision_tower() {
    let folder = tempdir().unwrap();
    files(folder.path());
    let train = [
        "train",
        "--train-data",
        "d.jsonl",
        "--output-dir",
        "run",
        "--device",
        "cpu",
        "--set",
        "max_steps=1",
        "--set",
        "split_dataset_ratio=0",
        "--set",
        "save_steps=1",
    ];
    for command in [
        &["quantize", "--bits", "8", "--output", "packed"][..],
        &["merge", "--output", "merged", "--device", "cpu"],
        &["bench", "load", "--device", "cpu"],
        &["preview", "a.png", "--json"],
        &train,
    ] {
        let (code, _, stderr) = run(folder.path(), &[command, &MODEL].concat());
        assert_eq!(code, 1, "{command:?} {stderr}");
        assert!(
            stderr.contains("several mmproj files"),
            "{command:?} {stderr}"
        );
        let (code, stdout, stderr) = run(folder.path(), &[command, &MODEL, &EYE].concat());
        assert_eq!(code, 0, "{command:?} {stdout}{stderr}");
    }
    let short = ["--max-new-tokens", "4", "--max-pixels", "16384", "a.png"];
    let report = |model: &[&str]| {
        let (stdout, _) = infer_well(folder.path(), &[&short[..], model].concat());
        stdout
    };
    let whole = report(&[&MODEL[..], &EYE].concat());
    assert_eq!(report(&["--model", "merged"]), whole);
    report(&["--model", "packed"]);
    report(&[&MODEL[..], &EYE, &["--adapter", "run"]].concat());
    // A tokenizer that was named goes with the weights, and has to be one.
    let tokenizer = repository().join("model/tiny");
    let named = ["--tokenizer", text(&tokenizer)];
    let merge = ["merge", "--output", "named", "--device", "cpu"];
    let (code, _, stderr) = run(folder.path(), &[&merge[..], &MODEL, &EYE, &named].concat());
    assert_eq!(code, 0, "{stderr}");
    let read = |path: &Path| fs::read(path.join("tokenizer.json")).unwrap();
    assert_eq!(read(&folder.path().join("named")), read(&tokenizer));
    let (code, _, stderr) = run(
        folder.path(),
        &["merge", "--output", "x", "--tokenizer", "."],
    );
    assert_eq!(code, 1);
    assert!(stderr.contains("tokenizer.json"), "{stderr}");
    // A folder of safetensors has no such file.
    let (code, _, stderr) = run(
        folder.path(),
        &["merge", "--output", "x", "--mmproj", "mmproj-tiny.gguf"],
    );
    assert_eq!(code, 1);
    assert!(
        stderr.contains("--mmproj goes with a language model in GGUF"),
        "{stderr}"
    );
}

#[test]
fn what_was_done_to_the_weights_reaches_whoever_asks_a_server() {
    let folder = tempdir().unwrap();
    files(folder.path());
    let model = folder.path().join("tiny.gguf");
    let eye = folder.path().join("mmproj-tiny.gguf");
    let server = start(&["--model", text(&model), "--mmproj", text(&eye)]);
    let listed = server.get("/v1/models").json();
    let remarks = listed["data"][0]["remarks"].as_array().unwrap();
    let said = remarks
        .iter()
        .filter_map(Value::as_str)
        .collect::<Vec<_>>()
        .join("\n");
    assert!(said.contains("dequantised"), "{listed}");
    let url = server.url();
    let remote = [
        "--server",
        &url,
        "--max-new-tokens",
        "2",
        "--output",
        "o.jsonl",
        "a.png",
    ];
    let (_, stderr) = infer_well(folder.path(), &remote);
    assert_eq!(stderr.matches("dequantised").count(), 1, "{stderr}");
    let record = &records(&folder.path().join("o.jsonl"))[0];
    let of_model = record["remarks"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|remark| remark["code"] == "model");
    assert_eq!(of_model.count(), remarks.len(), "{record}");
    let plain = start(&[]);
    assert_eq!(
        plain.get("/v1/models").json()["data"][0]["remarks"],
        json!([])
    );
    let (stdout, _) = infer_well(
        folder.path(),
        &[
            "--server",
            &plain.url(),
            "--max-new-tokens",
            "2",
            "--json",
            "a.png",
        ],
    );
    let codes = json_lines(&stdout)[0]["remarks"].clone();
    assert!(
        codes
            .as_array()
            .unwrap()
            .iter()
            .all(|remark| remark["code"] != "model"),
        "{codes}"
    );
}

//! `calibrate`, `infer --findings` and `eval` of probabilities, on few images.

use std::{fs, path::Path};

use serde_json::Value;
use tempfile::tempdir;

use crate::{infer, infer_well, json_lines, records, run, text, tiny_model};

/// Small images, short reports.
const QUICK: [&str; 4] = ["--max-new-tokens", "8", "--max-pixels", "16384"];

fn well(folder: &Path, args: &[&str]) -> (String, String) {
    let (code, stdout, stderr) = run(folder, args);
    assert_eq!(code, 0, "{args:?}\nstdout: {stdout}\nstderr: {stderr}");
    (stdout, stderr)
}

fn calibrate(folder: &Path, args: &[&str]) -> (String, String) {
    let base = ["calibrate", "--device", "cpu", "--max-pixels", "16384"];
    well(folder, &[&base[..], args].concat())
}

/// Six phantoms as files.
fn phantoms(folder: &Path) -> String {
    let args = ["phantoms", "--output", "set", "--seed", "5", "--count", "6"];
    well(folder, &args);
    text(&folder.join("set/images")).to_owned()
}

/// The tiny model in a folder that a calibration can be written into.
fn model(folder: &Path) -> String {
    let copy = folder.join("model");
    fs::create_dir(&copy).unwrap();
    for entry in fs::read_dir(tiny_model()).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    text(&copy).to_owned()
}

#[test]
fn probabilities_are_calibrated_found_scored_and_drawn() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let images = phantoms(folder.path());
    let model = model(folder.path());
    let findings = |more: &[&str]| {
        let base = ["--model", &model, "--images-dir", &images, "--findings"];
        let args = [&QUICK[..], &base, more].concat();
        infer_well(folder.path(), &args)
    };

    // Without a calibration every record says so, and nothing is decided.
    let (stdout, stderr) = findings(&["--json"]);
    let rows = json_lines(&stdout);
    assert_eq!(rows.len(), 6);
    assert_eq!(stderr.matches("not calibrated").count(), 1, "{stderr}");
    for row in &rows {
        assert_eq!(row["calibrated"], false);
        let remarks = row["remarks"].as_array().unwrap();
        assert!(
            remarks
                .iter()
                .any(|r| r["code"] == "findings_not_calibrated")
        );
        let classes = row["findings"].as_object().unwrap();
        assert_eq!(classes.len(), 20);
        for (name, class) in classes {
            let (p, logit) = (&class["probability"], &class["logit"]);
            // What follows from the others has no logit of its own.
            assert_eq!(logit.is_null(), name == "no_finding");
            if let (Some(p), Some(logit)) = (p.as_f64(), logit.as_f64()) {
                assert!((1.0 / (1.0 + (-logit).exp()) - p).abs() < 1e-5, "{name}");
            }
            assert_eq!(class["decision"], "undecided", "{name}");
            assert_eq!(class["conflict"], false, "{name}");
        }
    }
    // Another image has other probabilities.
    let p = |row: &Value| {
        row["findings"]["pleural_effusion"]["logit"]
            .as_f64()
            .unwrap()
    };
    assert!(rows.iter().any(|row| p(row) != p(&rows[0])));

    // A calibration beside the model is found.
    let data = ["--model", &model, "--data", "phantom:31:0..24:house"];
    let (table, told) = calibrate(folder.path(), &data);
    assert!(
        table.contains("pneumothorax") && table.contains("drawn reports, after"),
        "{table}"
    );
    assert!(
        told.contains("calibration.json") && told.contains("always undecided"),
        "{told}"
    );
    let file: Value =
        serde_json::from_slice(&fs::read(at("model/calibration.json")).unwrap()).unwrap();
    assert_eq!(file["data"]["reports"], 24);
    assert_eq!(file["data"]["truth"], "phantom");
    let (before, after) = (&file["before"]["loss"], &file["after"]["loss"]);
    assert!(after.as_f64().unwrap() < before.as_f64().unwrap());
    let first = findings(&["--json"]).0;
    let calibrated = json_lines(&first);
    assert_eq!(calibrated[0]["calibrated"], true);
    assert_eq!(
        p(&calibrated[0]),
        p(&rows[0]),
        "the logit is that of the model"
    );
    let class = &file["classes"]["pleural_effusion"];
    let expected =
        p(&rows[0]) / file["temperature"].as_f64().unwrap() + class["bias"].as_f64().unwrap();
    let found = calibrated[0]["findings"]["pleural_effusion"]["probability"]
        .as_f64()
        .unwrap();
    assert!((1.0 / (1.0 + (-expected).exp()) - found).abs() < 2e-6);
    assert_eq!(calibrated[0]["report"], rows[0]["report"]);

    // A batch run goes on; with another calibration its records are others.
    let output = ["--output", "r.jsonl"];
    findings(&output);
    let written = records(&at("r.jsonl"));
    assert_eq!(written.len(), 6);
    let (_, again) = findings(&output);
    assert!(again.contains("all 6 reports are there already"), "{again}");
    let (_, other) = findings(&["--output", "r.jsonl", "--no-calibration"]);
    assert!(
        other.contains("6 reports of another question, model or setting"),
        "{other}"
    );
    assert_ne!(
        written[0]["settings"],
        records(&at("r.jsonl"))[6]["settings"]
    );

    // Scores, in the table, as JSON and on the page.
    fs::write(at("p.jsonl"), first).unwrap();
    let args = [
        "eval",
        "p.jsonl",
        "--data",
        "set/samples.jsonl",
        "--all",
        "--json",
        "e.json",
        "--html",
        "e.html",
        "--resamples",
        "20",
    ];
    let (stdout, _) = well(folder.path(), &args);
    assert!(stdout.contains("macro AUC"), "{stdout}");
    let scores: Value = serde_json::from_slice(&fs::read(at("e.json")).unwrap()).unwrap();
    let of = &scores["probabilities"];
    assert_eq!(
        (of["cases"].as_u64(), of["missing"].as_u64()),
        (Some(6), Some(0))
    );
    let together = &of["all"];
    assert!(together["before"]["ece"].as_f64().is_some());
    assert!(together["after"]["brier"].as_f64().is_some());
    let page = fs::read_to_string(at("e.html")).unwrap();
    assert!(page.contains("所见的概率") && page.contains("class=\"curve\""));

    let of_all = &together["coverage"];
    assert!(of_all["value"].as_f64().is_some(), "{together}");
    assert_eq!(together["abstention"].as_array().unwrap().len(), 20);

    // Two models: here the same one without calibration, which ranks alike.
    let (uncalibrated, _) = findings(&["--json", "--no-calibration"]);
    fs::write(at("u.jsonl"), uncalibrated).unwrap();
    let args = [
        "eval",
        "p.jsonl",
        "--data",
        "set/samples.jsonl",
        "--compare",
        "u.jsonl",
        "--json",
        "two.json",
        "--html",
        "two.html",
        "--resamples",
        "20",
    ];
    well(folder.path(), &args);
    let two: Value = serde_json::from_slice(&fs::read(at("two.json")).unwrap()).unwrap();
    let compared = &two["probability_comparison"];
    assert_eq!(compared["cases"], 6);
    for (name, one) in compared["classes"].as_object().unwrap() {
        if name != "no_finding" {
            assert_eq!(one["auc"]["difference"]["value"], 0.0, "{name}");
        }
    }
    assert!(two["other"]["scores"]["scores"]["findings.micro.f1"]["value"].is_number());
    let page = fs::read_to_string(at("two.html")).unwrap();
    for part in ["另一次 F1", "两次的概率", "另一次的回答", "class=\"other\""] {
        assert!(page.contains(part), "{part}");
    }

    // Predictions of another program take the probabilities of a file.
    let bare: Vec<String> = calibrated
        .iter()
        .map(|row| {
            serde_json::json!({"image": row["image"], "response": row["report"]}).to_string()
        })
        .collect();
    fs::write(at("bare.jsonl"), bare.join("\n")).unwrap();
    let args = [
        "eval",
        "bare.jsonl",
        "--data",
        "set/samples.jsonl",
        "--probabilities",
        "p.jsonl",
        "--json",
        "f.json",
        "--resamples",
        "20",
    ];
    well(folder.path(), &args);
    let joined: Value = serde_json::from_slice(&fs::read(at("f.json")).unwrap()).unwrap();
    assert_eq!(joined["probabilities"], *of);
}

#[test]
fn the_calibration_of_another_model_or_question_is_refused() {
    let folder = tempdir().unwrap();
    let model = model(folder.path());
    let data = [
        "--model",
        &model,
        "--data",
        "phantom:31:0..8:house",
        "--output",
        "c.json",
    ];
    calibrate(folder.path(), &data);
    let image = crate::demo_image();
    let base = [
        text(&image),
        "--model",
        &model,
        "--findings",
        "--calibration",
        "c.json",
    ];
    let base = [&QUICK[..], &base].concat();
    infer_well(folder.path(), &base);
    let prompt = [&base[..], &["--prompt", "请描述这张胸片。"]].concat();
    let (code, stdout, stderr) = infer(folder.path(), &prompt);
    assert_eq!((code, stdout.as_str()), (1, ""), "{stderr}");
    for part in [
        "`c.json`",
        "--prompt",
        "请描述这张胸片",
        "--any-calibration",
    ] {
        assert!(stderr.contains(part), "{part}: {stderr}");
    }
    let forced = [&prompt[..], &["--any-calibration", "--json"]].concat();
    let (stdout, _) = infer_well(folder.path(), &forced);
    let remarks = json_lines(&stdout)[0]["remarks"].to_string();
    assert!(
        remarks.contains("findings_calibration_of_another_model"),
        "{remarks}"
    );

    // Weights of another model.
    let path = folder.path().join("c.json");
    let file = fs::read_to_string(&path).unwrap();
    let calibration: Value = serde_json::from_str(&file).unwrap();
    let weights = calibration["model"]["base"].as_str().unwrap();
    let other = "0123456789abcdef".repeat(4);
    fs::write(&path, file.replace(weights, &other)).unwrap();
    let (code, _, stderr) = infer(folder.path(), &base);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("base model `") && stderr.contains("`0123456789ab…`"),
        "{stderr}"
    );

    // What is missing or senseless is said before the model is loaded.
    fs::remove_file(&path).unwrap();
    let (code, _, stderr) = infer(folder.path(), &base);
    assert_eq!(code, 2);
    assert!(stderr.contains("there is no `c.json`"), "{stderr}");
    let (code, _, stderr) = infer(folder.path(), &[text(&image), "--calibration", "c.json"]);
    assert_eq!(code, 2);
    assert!(stderr.contains("--findings"), "{stderr}");
    let sent = [text(&image), "--findings", "--server", "http://127.0.0.1:9"];
    let (code, _, stderr) = run(folder.path(), &[&["infer"], &sent[..]].concat());
    assert_eq!(code, 2);
    assert!(stderr.contains("--findings"), "{stderr}");
}

#[test]
fn a_run_that_was_broken_off_goes_on_and_gives_the_same() {
    let folder = tempdir().unwrap();
    phantoms(folder.path());
    let at = |name: &str| folder.path().join(name);
    let data = ["--data", "set/samples.jsonl", "--form", "sum"];
    let whole = calibrate(
        folder.path(),
        &[&data[..], &["--output", "whole.json"]].concat(),
    );
    assert!(whole.0.contains("mean of tokens, after"), "{}", whole.0);
    assert!(!at("whole.json.partial.jsonl").exists());
    assert!(!whole.1.contains("going on"), "{}", whole.1);

    // The image of the last row cannot be read: the rows before it are kept.
    let mut images: Vec<_> = fs::read_dir(at("set/images"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    images.sort();
    let last = images.pop().unwrap();
    let bytes = fs::read(&last).unwrap();
    fs::write(&last, b"no image").unwrap();
    let base = ["calibrate", "--device", "cpu", "--max-pixels", "16384"];
    let more = [&data[..], &["--output", "c.json"]].concat();
    let (code, _, stderr) = run(folder.path(), &[&base[..], &more].concat());
    assert_eq!(code, 1, "{stderr}");
    assert!(!at("c.json").exists());
    let partial = records(&at("c.json.partial.jsonl"));
    assert_eq!(partial.len(), 6, "the model, and five rows");

    // Another question does not go on with them.
    let other = [&more[..], &["--prompt", "？"]].concat();
    let (code, _, stderr) = run(folder.path(), &[&base[..], &other].concat());
    assert_eq!(code, 1);
    assert!(
        stderr.contains("--prompt") && stderr.contains("partial.jsonl"),
        "{stderr}"
    );

    // An image that was exchanged since is asked about again.
    fs::write(&last, &bytes).unwrap();
    let first = fs::read(&images[0]).unwrap();
    fs::copy(&images[1], &images[0]).unwrap();
    let exchanged = [&data[..], &["--output", "c.json", "--limit", "5"]].concat();
    let (_, stderr) = calibrate(folder.path(), &exchanged);
    assert!(stderr.contains("going on: 5 of 5"), "{stderr}");
    fs::write(&images[0], first).unwrap();
    fs::write(
        at("c.json.partial.jsonl"),
        partial
            .iter()
            .map(|row| format!("{row}\n"))
            .collect::<String>(),
    )
    .unwrap();
    let (_, stderr) = calibrate(folder.path(), &more);
    assert!(stderr.contains("going on: 5 of 6"), "{stderr}");
    let read = |name: &str| fs::read_to_string(at(name)).unwrap();
    assert_eq!(read("c.json"), read("whole.json"));
    assert!(!at("c.json.partial.jsonl").exists());
}

#[test]
fn a_set_that_cannot_be_calibrated_on_is_an_error() {
    let folder = tempdir().unwrap();
    let fails = |args: &[&str], code: i32, part: &str| {
        let base = ["calibrate", "--device", "cpu", "--output", "c.json"];
        let (found, _, stderr) = run(folder.path(), &[&base[..], args].concat());
        assert_eq!(found, code, "{stderr}");
        assert!(stderr.contains(part), "{part}: {stderr}");
        assert!(!folder.path().join("c.json").exists());
    };
    let data = "phantom:31:0..4:house";
    fails(
        &["--data", data, "--target-error", "0.7"],
        2,
        "--target-error is 0.7",
    );
    fails(&["--data", data, "--limit", "0"], 2, "--limit is 0");
    fails(&["--data", data, "--rules", "openi"], 2, "phantoms know");
    fails(&["--data", data, "--draws", "0"], 2, "expected 1 to 256");
    let form = ["--data", data, "--form", "sum", "--draws", "4"];
    fails(&form, 2, "--draws is for --form drawn");
    fails(&["--data", data, "--lead", "印象："], 2, "--lead is for");
    fails(&["--data", "nowhere.jsonl"], 1, "nowhere.jsonl");
}

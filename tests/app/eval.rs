//! `eval` from outside: forms of predictions, figures worked out by hand, the page, refusals, and a model.

mod groups;

use std::{fs, path::Path};

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::{json_lines, records, repository, run, text};

const VAL: &str = "data/sample/val/samples.jsonl";

fn write_lines(path: &Path, rows: &[Value]) {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(path, lines).unwrap();
}

/// Runs `eval`, which must end well, and gives its stdout and its JSON.
fn eval_well(folder: &Path, args: &[&str]) -> (String, Value) {
    let mut all = vec!["eval"];
    all.extend(args);
    all.extend(["--json", "out.json"]);
    let (code, stdout, stderr) = run(folder, &all);
    assert_eq!(code, 0, "{args:?}\nstdout: {stdout}\nstderr: {stderr}");
    let json = fs::read_to_string(folder.join("out.json")).unwrap();
    (stdout, serde_json::from_str(&json).unwrap())
}

fn eval_badly(folder: &Path, args: &[&str]) -> (i32, String) {
    let mut all = vec!["eval"];
    all.extend(args);
    let (code, _, stderr) = run(folder, &all);
    assert_ne!(code, 0, "{args:?} ended well: {stderr}");
    (code, stderr)
}

fn system<'a>(json: &'a Value, name: &str) -> &'a Value {
    let systems = json["systems"].as_array().unwrap();
    let found = systems.iter().find(|system| system["system"] == name);
    found.unwrap_or_else(|| panic!("no system {name}"))
}

fn score(json: &Value, of: &str, name: &str) -> f64 {
    let value = &system(json, of)["scores"][name]["value"];
    value
        .as_f64()
        .unwrap_or_else(|| panic!("{of} has no {name}"))
}

/// Truth and answer of four studies: one side wrong, one false normal, one invented, one right.
fn four_studies() -> [(&'static str, &'static str); 4] {
    [
        ("左侧胸腔积液。", "右侧胸腔积液。"),
        ("右侧气胸，心影增大。", "心肺未见异常。"),
        ("胸部未见异常。", "右肺结节。"),
        ("胸部未见异常。", "胸部未见异常。"),
    ]
}

#[test]
fn figures_are_those_counted_by_hand() {
    let folder = tempdir().unwrap();
    let rows: Vec<Value> = four_studies()
        .iter()
        .enumerate()
        .map(|(at, (truth, answer))| {
            json!({"response": answer, "labels": truth, "images": [{"path": format!("{at}_1.png")}]})
        })
        .collect();
    write_lines(&folder.path().join("p.jsonl"), &rows);
    let (stdout, json) = eval_well(folder.path(), &["p.jsonl", "--html", "page.html"]);
    // Effusion and one normal right; nodule and one normal too many; pneumothorax, heart and one normal missed.
    let near = |name, expected: f64| {
        let found = score(&json, "model", name);
        assert!(
            (found - expected).abs() < 1e-9,
            "{name}: {found}, by hand {expected}"
        );
    };
    near("findings.micro.precision", 2.0 / 4.0);
    near("findings.micro.recall", 2.0 / 5.0);
    near("findings.false_normal", 1.0 / 2.0);
    near("findings.invented", 1.0 / 2.0);
    near("findings.laterality_errors", 1.0);
    assert_eq!(json["studies"], 4);
    assert_eq!(json["confusion"]["by_finding"]["pneumothorax"][0][3], 1);
    assert_eq!(json["cases"][1]["rank_from_worst"], 1);
    assert_eq!(json["cases"][1]["differences"]["pneumothorax"], "missed");
    assert_eq!(json["cases"][0]["differences"]["pleural_effusion"], "side");
    assert!(stdout.contains("false-normal rate"), "{stdout}");
    let value = &system(&json, "model")["scores"]["characters.rouge_l"];
    assert!(value["low"].as_f64() <= value["value"].as_f64());
    assert!(value["value"].as_f64() <= value["high"].as_f64());

    let page = fs::read_to_string(folder.path().join("page.html")).unwrap();
    assert!(page.contains("最差的病例") && page.contains("<mark class=\"side\""));
    // The namespace of SVG is a name, not an address that is fetched; this page has no other.
    let fetched = page.replace("http://www.w3.org/2000/svg", "");
    for sign in [
        "http://", "https://", "<link", " src=\"/", "@import", "url(",
    ] {
        assert!(!fetched.contains(sign), "the page has {sign}");
    }
}

#[test]
fn what_a_model_writes_cannot_become_markup() {
    let folder = tempdir().unwrap();
    let bad = "<script>alert(1)</script>气胸\"'&";
    let row =
        json!({"report": bad, "reference": "右侧<b>气胸</b>。", "image": "<img src=x>_1.png"});
    write_lines(&folder.path().join("p.jsonl"), &[row]);
    eval_well(folder.path(), &["p.jsonl", "--html", "page.html"]);
    let page = fs::read_to_string(folder.path().join("page.html")).unwrap();
    for sign in ["<script>alert", "右侧<b>", "<img src=x"] {
        assert!(!page.contains(sign), "{sign}");
    }
    assert!(page.contains("&lt;script&gt;alert(1)&lt;/script&gt;<mark"));
}

#[test]
fn every_form_gives_the_same_scores() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let studies = four_studies();
    let all = |row: &dyn Fn(usize, &str, &str) -> Value| -> Vec<Value> {
        let rows = studies.iter().enumerate();
        rows.map(|(n, (truth, answer))| row(n, truth, answer))
            .collect()
    };
    write_lines(
        &at("data.jsonl"),
        &all(&|n, truth, _| {
            json!({"messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": truth}],
               "images": [format!("images/{n}_1.png")]})
        }),
    );
    write_lines(
        &at("infer.jsonl"),
        &all(
            &|n, _, answer| json!({"image": format!("/somewhere/{n}_1.png"), "prompt": "?", "settings": "0", "report": answer}),
        ),
    );
    write_lines(
        &at("factory.jsonl"),
        &all(&|_, truth, answer| json!({"prompt": "?", "predict": answer, "label": truth})),
    );
    write_lines(
        &at("vllm.jsonl"),
        &all(&|n, truth, answer| {
            json!({"custom_id": n, "uid": n, "reference": truth,
               "response": {"body": {"choices": [{"message": {"content": format!("<think>?</think>\n\n{answer}")}}]}}})
        }),
    );
    let (_, first) = eval_well(folder.path(), &["infer.jsonl", "--data", "data.jsonl"]);
    for file in ["factory.jsonl", "vllm.jsonl"] {
        let (_, other) = eval_well(folder.path(), &[file]);
        for name in ["characters.bleu_4", "words.cider_d", "findings.micro.f1"] {
            assert_eq!(
                score(&first, "model", name),
                score(&other, "model", name),
                "{file}"
            );
        }
    }
    // The same order of rows without names of images.
    let (_, by_order) = eval_well(folder.path(), &["factory.jsonl", "--data", "data.jsonl"]);
    let name = "ms_swift.rouge_l";
    assert_eq!(
        score(&first, "model", name),
        score(&by_order, "model", name)
    );
}

#[test]
fn two_runs_are_compared_pair_by_pair() {
    let folder = tempdir().unwrap();
    let rows = |answers: &dyn Fn(usize) -> &'static str| -> Vec<Value> {
        (0..12)
            .map(|at| json!({"report": answers(at), "reference": "右侧气胸。", "image": format!("{at}_1.png")}))
            .collect()
    };
    write_lines(&folder.path().join("good.jsonl"), &rows(&|_| "右侧气胸。"));
    let mut bad = rows(&|at| {
        if at < 9 {
            "胸部未见异常。"
        } else {
            "右侧气胸。"
        }
    });
    bad.reverse();
    write_lines(&folder.path().join("bad.jsonl"), &bad);
    let (stdout, json) = eval_well(folder.path(), &["good.jsonl", "--compare", "bad.jsonl"]);
    let compared = &json["comparison"]["findings.false_normal"];
    assert_eq!(compared["first"], 0.75);
    assert_eq!(compared["second"], 0.0);
    assert!(compared["p"].as_f64().unwrap() < 0.01, "{compared}");
    assert!(
        compared["difference"]["high"].as_f64().unwrap() < 0.0,
        "{compared}"
    );
    assert!(stdout.contains("difference"), "{stdout}");

    write_lines(&folder.path().join("fewer.jsonl"), &bad[..5]);
    let (code, stderr) = eval_badly(folder.path(), &["good.jsonl", "--compare", "fewer.jsonl"]);
    assert!(
        code == 1 && stderr.contains("fewer.jsonl") && stderr.contains("_1.png"),
        "{stderr}"
    );
}

#[test]
fn refusals_name_file_row_and_key() {
    let folder = tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write(
        "no_reference.jsonl",
        "{\"report\":\"a\",\"reference\":\"b\"}\n{\"report\":\"a\"}\n",
    );
    write(
        "no_answer.jsonl",
        "\n{\"image\":\"1.png\",\"reference\":\"b\"}\n",
    );
    write(
        "broken.jsonl",
        "{\"report\":\"a\",\"reference\":\"b\"}\n{\"report\":\n",
    );
    write("empty.jsonl", "\n\n");
    write(
        "other.jsonl",
        "{\"report\":\"a\",\"image\":\"nowhere.png\"}\n",
    );
    let val = repository().join(VAL);
    for (args, signs) in [
        (
            vec!["no_reference.jsonl"],
            vec!["row 2", "`reference`", "--data"],
        ),
        (
            vec!["no_answer.jsonl"],
            vec!["row 2", "`report`", "`image`"],
        ),
        (vec!["broken.jsonl"], vec!["broken.jsonl", "row 2"]),
        (vec!["empty.jsonl"], vec!["holds no prediction"]),
        (vec!["absent.jsonl"], vec!["absent.jsonl", "cannot read"]),
        (
            vec!["other.jsonl", "--data", text(&val)],
            vec!["row 1", "nowhere.png"],
        ),
        (
            vec!["no_reference.jsonl", "--run", "nothing"],
            vec!["metrics.jsonl", "--run"],
        ),
    ] {
        let (code, stderr) = eval_badly(folder.path(), &args);
        assert_eq!(code, 1, "{stderr}");
        for sign in signs {
            assert!(stderr.contains(sign), "{args:?}: {sign} is not in {stderr}");
        }
    }
    for args in [
        vec!["--batch-size", "0"],
        vec!["--resamples", "0"],
        vec!["--baselines-only"],
        vec!["no_reference.jsonl", "--html", "nowhere/page.html"],
        vec!["no_reference.jsonl", "--adapter", "nowhere"],
    ] {
        let (code, stderr) = eval_badly(folder.path(), &args);
        assert_eq!(code, 2, "{args:?}: {stderr}");
    }
}

#[test]
fn failures_and_missing_rows_are_told() {
    let folder = tempdir().unwrap();
    let truth =
        |row: usize| records(&repository().join(VAL))[row]["messages"][1]["content"].clone();
    let rows = [
        json!({"image": "0320.png", "report": truth(0)}),
        json!({"image": "0321.png", "report": "", "error": "out of memory"}),
    ];
    write_lines(&folder.path().join("p.jsonl"), &rows);
    let val = repository().join(VAL);
    let args = ["p.jsonl", "--data", text(&val), "--html", "page.html"];
    let (_, json) = eval_well(folder.path(), &args);
    let warnings = json["warnings"].to_string();
    assert!(warnings.contains("only 2 of 64"), "{warnings}");
    assert!(warnings.contains("out of memory"), "{warnings}");
    assert!((score(&json, "model", "characters.rouge_l") - 50.0).abs() < 1e-9);
    // Both images are in the page, small.
    let page = fs::read_to_string(folder.path().join("page.html")).unwrap();
    assert_eq!(page.matches("data:image/jpeg;base64,").count(), 2);
}

#[test]
fn a_model_is_scored_beside_all_baselines_and_falls_with_swapped_images() {
    let folder = tempdir().unwrap();
    let args = [
        "--device",
        "cpu",
        "--data",
        "phantom:77:500000..500048:terse",
        "--train-data",
        "phantom:77:600000..600200:terse",
        "--max-new-tokens",
        "96",
        "--batch-size",
        "16",
        "--output",
        "reports.jsonl",
        "--html",
        "page.html",
    ];
    let (stdout, json) = eval_well(folder.path(), &args);
    let f1 = |of| score(&json, of, "findings.micro.f1");
    let scores = ["model", "constant", "random", "neighbour", "swapped"].map(|of| (of, f1(of)));
    eprintln!("finding F1 of the tiny model over 48 studies: {scores:?}\n{stdout}");
    assert!(f1("model") >= 0.7);
    assert!(f1("swapped") < f1("model") - 0.3);
    for baseline in ["constant", "random", "neighbour"] {
        assert!(f1(baseline) < f1("model"), "{baseline}");
    }
    let loss = json["loss"]["loss"].as_f64().unwrap();
    assert!((json["loss"]["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-9);
    assert!(json["loss"]["token_accuracy"].as_f64().unwrap() > 0.5);
    let page = fs::read_to_string(folder.path().join("page.html")).unwrap();
    assert!(page.contains("data:image/jpeg;base64,") && page.contains("影像互换"));

    // What was written is read again, and scores the same.
    let written = fs::read_to_string(folder.path().join("reports.jsonl")).unwrap();
    assert_eq!(json_lines(&written).len(), 48);
    let (_, again) = eval_well(folder.path(), &["reports.jsonl"]);
    for name in ["findings.micro.f1", "characters.bleu_4"] {
        assert_eq!(score(&again, "model", name), score(&json, "model", name));
    }
    let (_, stderr) = eval_badly(
        folder.path(),
        &["--output", "reports.jsonl", "--device", "cpu"],
    );
    assert!(stderr.contains("reports.jsonl"), "{stderr}");
}

#[test]
fn a_run_keeps_the_checkpoint_with_the_best_findings_and_eval_takes_it() {
    let folder = tempdir().unwrap();
    let out = folder.path().join("run");
    let args = [
        "train",
        "--no-tui",
        "--show",
        "0",
        "--output-dir",
        text(&out),
        "--eval-generate",
        "8",
        "--set",
        "eval_steps=4",
        "--set",
        "max_steps=12",
        "--set",
        "metric_for_best_model=eval_finding_f1",
    ];
    let (code, stdout, stderr) = run(repository(), &args);
    assert_eq!(code, 0, "stdout: {stdout}\nstderr: {stderr}");
    let best: Value = serde_json::from_slice(&fs::read(out.join("best.json")).unwrap()).unwrap();
    assert_eq!(best["metric"], "eval_finding_f1");
    let measured: Vec<(u64, f64)> = records(&out.join("metrics.jsonl"))
        .iter()
        .filter_map(|row| Some((row["step"].as_u64()?, row.get("eval_finding_f1")?.as_f64()?)))
        // Before the first step there is no checkpoint.
        .filter(|(step, _)| *step > 0)
        .collect();
    assert_eq!(measured.len(), 3);
    let highest = measured
        .iter()
        .fold(f64::MIN, |most, (_, value)| most.max(*value));
    let first = measured
        .iter()
        .find(|(_, value)| *value == highest)
        .unwrap();
    assert_eq!(
        (best["step"].as_u64(), best["value"].as_f64()),
        (Some(first.0), Some(first.1))
    );
    let checkpoint = out.join(format!("checkpoint-{}", first.0));
    assert!(checkpoint.join("COMPLETE.json").is_file());

    let args = [
        "--run",
        text(&out),
        "--device",
        "cpu",
        "--limit",
        "8",
        "--max-new-tokens",
        "128",
        "--no-swapped",
        "--no-neighbour",
        "--html",
        "page.html",
    ];
    let (_, json) = eval_well(folder.path(), &args);
    assert_eq!(json["about"]["adapter"], text(&checkpoint));
    assert!((score(&json, "model", "findings.micro.f1") - highest).abs() < 1e-9);
    let page = fs::read_to_string(folder.path().join("page.html")).unwrap();
    assert!(page.contains("训练曲线"));
    // Drawn once, with the other curves of the run.
    assert_eq!(page.matches("Reports about held-out studies").count(), 1);
}

#[test]
fn an_empty_answer_is_a_row_of_its_own_and_no_normal_report() {
    let folder = tempdir().unwrap();
    let answers = [
        json!(""),
        json!(null),
        json!(" \n"),
        json!("null"),
        json!("NaN"),
        json!([]),
        json!("胸部未见异常。"),
    ];
    let rows: Vec<Value> = answers
        .iter()
        .enumerate()
        .map(|(at, answer)| json!({"image": format!("{at}_1.png"), "report": answer, "reference": "胸部未见异常。"}))
        .chain([json!({"image": "9_1.png", "report": "", "reference": "右侧气胸。"})])
        .collect();
    write_lines(&folder.path().join("p.jsonl"), &rows);
    let (stdout, json) = eval_well(folder.path(), &["p.jsonl"]);
    let findings = &system(&json, "model")["findings"];
    assert_eq!(findings["empty_outputs"], json!({"count": 7, "of": 8}));
    assert_eq!(findings["invented"], json!({"count": 0, "of": 1}));
    assert_eq!(findings["false_normal"], json!({"count": 0, "of": 0}));
    // One of seven normal reports was said to be normal.
    assert!((score(&json, "model", "findings.no_finding.f1") - 2.0 / 8.0).abs() < 1e-9);
    let row = stdout
        .lines()
        .find(|line| line.contains("empty answers"))
        .unwrap();
    assert!(row.split_whitespace().any(|word| word == "7"), "{stdout}");
    let warnings = json["warnings"].to_string();
    assert!(warnings.contains("7 answers are empty"), "{warnings}");
    assert_eq!(json["cases"][0]["empty"], true);
}

//! `eval` from outside: forms of predictions, figures worked out by hand, the page, refusals, and a model.

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

/// Predictions about these images, every third one wrong.
/// Thirty studies: two views, ages, an id that is no group; every fifth finding is missed in one view.
#[test]
fn scores_by_subgroup_are_those_of_its_rows_and_few_have_no_interval() {
    let folder = tempdir().unwrap();
    let rows: Vec<Value> = (0..30)
        .map(|at| {
            let lateral = at >= 24;
            let answer = if !lateral && at % 5 == 0 { "胸部未见异常。" } else { "右侧气胸。" };
            json!({
                "image": format!("{at}.png"), "study_id": at.to_string(), "response": answer, "reference": "右侧气胸。",
                "ViewPosition": if lateral { "LL" } else { "PA" }, "age": 10 + 2 * at, "ward": format!("w{}", at % 2),
            })
        })
        .collect();
    write_lines(&folder.path().join("p.jsonl"), &rows);
    let base = ["p.jsonl", "--resamples", "20", "--html", "page.html"];
    let (_, all) = eval_well(folder.path(), &base);
    let groups = all["subgroups"].as_array().unwrap();
    let keys: Vec<&Value> = groups.iter().map(|one| &one["key"]).collect();
    assert_eq!(keys, ["ViewPosition", "age"]);
    assert_eq!(groups[0]["guessed"], true);
    let of = |group: &Value, name: &str| group["scores"][name].clone();
    let [side, front] = [&groups[0]["groups"][0], &groups[0]["groups"][1]];
    assert_eq!(
        (&side["value"], &side["reports"], &side["few"]),
        (&json!("LL"), &json!(6), &json!(true))
    );
    assert_eq!(
        of(side, "findings.micro.f1"),
        json!({"value": 1.0, "low": null, "high": null})
    );
    assert_eq!(
        (&front["reports"], &front["few"]),
        (&json!(24), &json!(false))
    );
    // Five of 24 are called normal.
    let missed = of(front, "findings.false_normal");
    assert!((missed["value"].as_f64().unwrap() - 5.0 / 24.0).abs() < 1e-12);
    assert!(missed["low"].is_number());
    let ages: Vec<&Value> = groups[1]["groups"]
        .as_array()
        .unwrap()
        .iter()
        .map(|one| &one["value"])
        .collect();
    assert_eq!(ages, ["0–17", "18–39", "40–64", "65+"]);
    let page = fs::read_to_string(folder.path().join("page.html")).unwrap();
    assert!(page.contains("按 ViewPosition") && page.contains("不给区间"));

    let named = [&base[..], &["--subgroup", "ward"]].concat();
    let (_, by_ward) = eval_well(folder.path(), &named);
    assert_eq!(by_ward["subgroups"].as_array().unwrap().len(), 1);
    assert_eq!(by_ward["subgroups"][0]["groups"][1]["reports"], 15);
    // One group of all rows has the scores of all.
    let whole: Vec<Value> = rows
        .iter()
        .map(|row| {
            let mut row = row.clone();
            row["ward"] = "w".into();
            row
        })
        .collect();
    write_lines(&folder.path().join("p.jsonl"), &whole);
    let (_, one) = eval_well(folder.path(), &named);
    for name in [
        "findings.micro.f1",
        "findings.macro.f1",
        "characters.rouge_l",
    ] {
        let found = of(&one["subgroups"][0]["groups"][0], name);
        let expected = &system(&one, "model")["scores"][name];
        for key in ["value", "low", "high"] {
            let [a, b] = [&found[key], &expected[key]].map(|value| value.as_f64().unwrap());
            assert!((a - b).abs() < 1e-9, "{name} {key}: {a} {b}");
        }
    }
    let (_, none) = eval_well(folder.path(), &[&base[..], &["--no-subgroups"]].concat());
    assert_eq!(none["subgroups"], json!([]));
    let (_, stderr) = eval_badly(
        folder.path(),
        &[&base[..], &["--subgroup", "院区"]].concat(),
    );
    assert!(
        stderr.contains("`院区`") && stderr.contains("`ward`"),
        "{stderr}"
    );
    let (_, stderr) = eval_badly(
        folder.path(),
        &[&base[..], &["--subgroup", "study_id"]].concat(),
    );
    assert!(stderr.contains("30 values"), "{stderr}");
}

fn predictions(images: &[String]) -> Vec<Value> {
    let rows = images.iter().enumerate();
    rows.map(|(at, image)| {
        let answer = if at % 3 == 0 {
            "胸部未见异常。"
        } else {
            "右侧气胸。"
        };
        json!({"image": image, "report": answer, "reference": "右侧气胸。"})
    })
    .collect()
}

#[test]
fn studies_are_told_in_the_result_and_few_of_them_give_no_test() {
    let folder = tempdir().unwrap();
    let write = |name: &str, rows: &[Value]| write_lines(&folder.path().join(name), rows);
    let named: Vec<String> = (0..10).map(|at| format!("case_{at:03}.png")).collect();
    write("case.jsonl", &predictions(&named));
    let (stdout, json) = eval_well(folder.path(), &["case.jsonl"]);
    assert_eq!(json["study"]["studies"], 10);
    assert_eq!(json["study"]["guessed"], true);
    assert!(stdout.contains("10 reports of 10 studies"), "{stdout}");

    // One study: no interval, no p value, and the reason in every form of the result.
    let views: Vec<String> = (1..5).map(|at| format!("7_{at}.png")).collect();
    write("one.jsonl", &predictions(&views));
    let mut other = predictions(&views);
    other
        .iter_mut()
        .for_each(|row| row["report"] = "右侧气胸。".into());
    write("other.jsonl", &other);
    let args = [
        "one.jsonl",
        "--compare",
        "other.jsonl",
        "--html",
        "page.html",
    ];
    let (stdout, json) = eval_well(folder.path(), &args);
    assert!(stdout.contains("4 reports of 1 study;"), "{stdout}");
    assert!(stdout.contains("no interval and no p value"), "{stdout}");
    assert!(!stdout.contains("0.002"), "{stdout}");
    let warnings = json["warnings"].to_string();
    assert!(
        warnings.contains("all 4 reports are of one study"),
        "{warnings}"
    );
    let rouge = &json["comparison"]["characters.rouge_l"];
    assert!(
        rouge["p"].is_null() && rouge["difference"]["low"].is_null(),
        "{rouge}"
    );
    assert!(
        rouge["difference"]["value"].as_f64().unwrap() < 0.0,
        "{rouge}"
    );
    let page = fs::read_to_string(folder.path().join("page.html")).unwrap();
    assert!(page.contains("全部 4 份报告属于同一项检查"));

    // Two studies: intervals, but no test.
    let views: Vec<String> = (0..2).map(|at| format!("{at}_1.png")).collect();
    write("one.jsonl", &predictions(&views));
    let (stdout, json) = eval_well(folder.path(), &["one.jsonl", "--compare", "one.jsonl"]);
    assert!(
        stdout.contains("2 studies: no p value; at least 6"),
        "{stdout}"
    );
    assert!(json["comparison"]["characters.rouge_l"]["p"].is_null());

    // A rule counts before the guess.
    let args = ["case.jsonl", "--study-regex", "case_00([0-4])|case_00[5-9]"];
    let (code, stderr) = eval_badly(folder.path(), &args);
    assert!(
        code == 1 && stderr.contains("row 6") && stderr.contains("case_005.png"),
        "{stderr}"
    );
    let args = ["case.jsonl", "--study-regex", "(case_00)"];
    let (_, json) = eval_well(folder.path(), &args);
    assert_eq!(json["study"]["studies"], 1);
    let (code, stderr) = eval_badly(folder.path(), &["case.jsonl", "--study-regex", "case"]);
    assert!(code == 2 && stderr.contains("--study-regex"), "{stderr}");
}

#[test]
fn the_study_key_of_the_data_row_counts_and_tells_leaks() {
    let folder = tempdir().unwrap();
    let data = |name: &str, from: usize, key: &str| {
        let rows: Vec<Value> = (from..from + 8)
            .map(|at| {
                json!({"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "右侧气胸。"}],
                       "images": [format!("case_{at:03}.png")], key: format!("S{}", at / 2)})
            })
            .collect();
        write_lines(&folder.path().join(name), &rows);
    };
    let images: Vec<String> = (0..8).map(|at| format!("case_{at:03}.png")).collect();
    write_lines(&folder.path().join("p.jsonl"), &predictions(&images));
    data("val.jsonl", 0, "study");
    data("train.jsonl", 100, "study");
    let args = [
        "p.jsonl",
        "--data",
        "val.jsonl",
        "--train-data",
        "train.jsonl",
    ];
    let (_, json) = eval_well(folder.path(), &args);
    assert_eq!(
        (json["studies"].as_u64(), json["study"]["guessed"].as_bool()),
        (Some(4), Some(false))
    );
    // Numbers of a hundred are others than those below ten, though their words are the same.
    assert!(
        !json["warnings"].to_string().contains("training set"),
        "{}",
        json["warnings"]
    );
    data("train.jsonl", 6, "study");
    let (_, json) = eval_well(folder.path(), &args);
    let warnings = json["warnings"].to_string();
    assert!(
        warnings.contains("2 reports are of studies or patients"),
        "{warnings}"
    );
    data("val.jsonl", 0, "accession");
    let (_, json) = eval_well(
        folder.path(),
        &["p.jsonl", "--data", "val.jsonl", "--study-key", "accession"],
    );
    assert_eq!(json["studies"], 4);
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

#[test]
fn a_run_on_films_holds_out_studies_and_not_drawings() {
    let folder = tempdir().unwrap();
    let sample = repository().join("data/sample/train");
    let mut rows = records(&sample.join("samples.jsonl"));
    rows.truncate(24);
    for row in &mut rows {
        let image = sample.join(row["images"][0].as_str().unwrap());
        row["images"] = json!([image]);
    }
    write_lines(&folder.path().join("mine.jsonl"), &rows);
    let train = |output: &str, more: &[&str]| {
        let mut args = vec![
            "train",
            "--no-tui",
            "--show",
            "0",
            "--device",
            "cpu",
            "--train-data",
            "mine.jsonl",
        ];
        args.extend(["--output-dir", output]);
        for pair in ["max_steps=4", "eval_steps=2", "save_steps=2"] {
            args.extend(["--set", pair]);
        }
        args.extend(more);
        let (code, stdout, stderr) = run(folder.path(), &args);
        assert_eq!(code, 0, "stdout: {stdout}\nstderr: {stderr}");
        stderr
    };
    let stderr = train("run", &[]);
    // 5 % of 24 rows, and at least one study.
    assert!(
        stderr.contains("held out of `mine.jsonl` for validation: 1 of 24 rows"),
        "{stderr}"
    );
    assert!(stderr.contains("23 samples"), "{stderr}");
    let config = fs::read_to_string(folder.path().join("run/config.toml")).unwrap();
    assert!(config.contains("split_dataset_ratio = 0.05"), "{config}");
    assert!(!config.contains("val_data"), "{config}");
    let metrics = records(&folder.path().join("run/metrics.jsonl"));
    assert!(metrics.iter().any(|row| row.get("eval_loss").is_some()));

    // Going on from the middle holds out the same and ends with the same adapter.
    let middle = folder.path().join("run/checkpoint-2");
    train("again", &["--resume", text(&middle)]);
    let adapter = |run: &str| {
        let path = format!("{run}/checkpoint-4/adapter_model.safetensors");
        fs::read(folder.path().join(path)).unwrap()
    };
    assert!(adapter("run") == adapter("again"));
    let stderr = train("none", &["--set", "split_dataset_ratio=0"]);
    assert!(
        !stderr.contains("held out") && stderr.contains("24 samples"),
        "{stderr}"
    );

    let args = [
        "--run",
        "run",
        "--device",
        "cpu",
        "--max-new-tokens",
        "8",
        "--no-swapped",
        "--no-neighbour",
    ];
    let (_, json) = eval_well(folder.path(), &args);
    assert_eq!(
        (json["reports"].as_u64(), &json["about"]["test_set"]),
        (Some(1), &json!("mine.jsonl (held out)"))
    );
}

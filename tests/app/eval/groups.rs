//! Subgroups, studies and patients.

use super::*;

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

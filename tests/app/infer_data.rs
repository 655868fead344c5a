//! `infer` about the rows of data files: each row's own images, question and system message.

use std::{
    fs,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use tempfile::tempdir;
use xray_qwen3vl::{
    dataset::{DataOptions, Dataset, ImageStore, read_questions},
    runtime::pipeline::TextAndImages,
};

use crate::{
    field, fixture_image, forms, infer, infer_args, infer_well, program, records,
    refusal::{case, check},
    repository, run, server, text,
};

/// Short answers.
const QUICK: [&str; 2] = ["--max-new-tokens", "2"];

fn quick<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&QUICK[..], args].concat()
}

fn found() -> PathBuf {
    repository().join("tests/fixtures/found/forms")
}

/// The form files that training reads, and those that it refuses.
fn by_outcome() -> (Vec<String>, Vec<String>) {
    let table = fs::read_to_string(found().join("expected.tsv")).unwrap();
    let rows = table.lines().skip(1).map(|line| {
        let mut cells = line.split('\t');
        let name = cells.next().unwrap().to_owned();
        (name, cells.next().unwrap().starts_with("reads"))
    });
    let (read, refused): (Vec<_>, Vec<_>) = rows.partition(|(_, read)| *read);
    let names = |rows: Vec<(String, bool)>| rows.into_iter().map(|(name, _)| name).collect();
    (names(read), names(refused))
}

fn timeless(path: &Path) -> Vec<Value> {
    let mut records = records(path);
    for record in &mut records {
        record.as_object_mut().unwrap().remove("seconds");
    }
    records
}

/// The last question of a row is asked about its images after the turns before it, whatever the form of the file; its
/// answer is kept back.
#[test]
fn every_form_that_is_learnt_can_be_asked() {
    let folder = tempdir().unwrap();
    let (names, _) = by_outcome();
    assert!(names.len() > 80, "{}", names.len());
    let paths: Vec<String> = names
        .iter()
        .map(|name| text(&found().join(name)).to_owned())
        .collect();
    let mut args = quick(&["--output", "o.jsonl", "--batch-size", "4"]);
    args.extend(paths.iter().map(String::as_str));
    let output = program(folder.path(), &infer_args(&args))
        .env("XDG_CACHE_HOME", folder.path().join("cache"))
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("which the model is not shown"), "{stderr}");

    let parts: TextAndImages = forms::parts();
    let options = DataOptions {
        store: ImageStore::new(folder.path().join("images"), |_| false),
        ..DataOptions::default()
    };
    let records = records(&folder.path().join("o.jsonl"));
    let mut records = records.iter();
    for (name, path) in names.iter().zip(&paths) {
        let data = Dataset::open_with(path, &options).unwrap();
        for row in 0..data.len() {
            let record = records
                .next()
                .unwrap_or_else(|| panic!("{name}: no record"));
            let found = data.text(row);
            assert_eq!(field(record, "data"), path, "{name}");
            assert_eq!(record["row"], data.row(row), "{name}");
            assert_eq!(record["error"], Value::Null, "{name}");
            assert_eq!(
                record["reference"].as_str(),
                found.answer.as_deref(),
                "{name}"
            );
            let images = match found.images.len() {
                0 => "",
                _ => found.name.as_str(),
            };
            assert_eq!(field(record, "image"), images, "{name}");
            if found.question.trim().is_empty() {
                assert_eq!(field(record, "prompt"), crate::cli_prompt(), "{name}");
                continue;
            }
            assert_eq!(field(record, "prompt"), found.question, "{name}");
            // The template of this model writes what training writes before an answer.
            let (prompt, _) = data.question(row, &parts).unwrap();
            assert_eq!(record["prompt_tokens"], prompt.input_ids.len(), "{name}");
        }
    }
    assert_eq!(records.count(), 0);
}

/// What training refuses for want of an answer is a question all the same; all else is refused here too.
#[test]
fn a_row_without_an_answer_is_a_question() {
    let folder = tempdir().unwrap();
    let options = DataOptions {
        store: ImageStore::new(folder.path().join("images"), |_| false),
        ..DataOptions::default()
    };
    let asks = |name: &str| -> bool {
        let files = read_questions(&[found().join(name)], &options, "q");
        files.is_ok_and(|files| files[0].rows.iter().all(|(_, row)| row.is_ok()))
    };
    let (_, refused) = by_outcome();
    let asked: Vec<String> = refused.into_iter().filter(|name| asks(name)).collect();
    assert_eq!(
        asked,
        [
            "assistant_null.jsonl",
            // Control tokens, images and sizes are looked at when the prompt is made.
            "control_token_in_text.jsonl",
            "empty_assistant.jsonl",
            "hub_findings.parquet",
            "image_path_is_folder.jsonl",
            "loss_false_all.jsonl",
            "loss_scale_0_5.jsonl",
            "mimic_like_rows.jsonl",
            "missing_image_file.jsonl",
            "no_answer_last_user.jsonl",
            "objects_outside.jsonl",
            "same_basename.jsonl",
            "tilde_path.jsonl",
        ]
    );
}

/// Four rows about two images.
fn rows(folder: &Path) -> Vec<Value> {
    for (picture, name) in [("model_a.png", "a.png"), ("model_b.png", "b.png")] {
        fs::copy(fixture_image(picture), folder.join(name)).unwrap();
    }
    vec![
        json!({"id": "r1", "study_id": "s1", "query": "正常吗？", "response": "正常。", "images": ["a.png"], "max_pixels": 16384}),
        json!({"id": 2, "image": "b.png", "max_pixels": 16384}),
        json!({"messages": [
            {"role": "system", "content": "简短。"},
            {"role": "user", "content": "<image>有什么？"}, {"role": "assistant", "content": "实变。"},
            {"role": "user", "content": "哪侧？"}, {"role": "assistant", "content": "左侧。"},
        ], "images": ["a.png"], "max_pixels": 16384, "hospital": "x"}),
        json!({"query": "<image><image>比较", "images": ["a.png", "b.png"], "max_pixels": 16384}),
    ]
}

fn write(path: &Path, rows: &[Value]) {
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    fs::write(path, lines.join("\n")).unwrap();
}

#[test]
fn a_record_says_what_the_row_says() {
    let folder = tempdir().unwrap();
    write(&folder.path().join("d.jsonl"), &rows(folder.path()));
    let args = quick(&["d.jsonl", "--output", "o.jsonl", "--system", "用中文。"]);
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(stderr.contains("2 rows have an answer"), "{stderr}");
    assert!(
        stderr.contains("1 row keeps its own system message"),
        "{stderr}"
    );
    let found = records(&folder.path().join("o.jsonl"));
    let expected = [
        json!({"image": "a.png", "row": 1, "id": "r1", "study": "s1", "prompt": "正常吗？", "system": "用中文。", "reference": "正常。"}),
        json!({"image": "b.png", "row": 2, "id": 2, "prompt": crate::cli_prompt(), "system": "用中文。"}),
        json!({"image": "a.png", "row": 3, "prompt": "哪侧？", "system": "简短。", "reference": "左侧。"}),
        json!({"image": "a.png;b.png", "row": 4, "prompt": "比较", "system": "用中文。"}),
    ];
    assert_eq!(found.len(), expected.len());
    for (record, expected) in found.iter().zip(&expected) {
        for key in [
            "image",
            "row",
            "id",
            "study",
            "patient",
            "prompt",
            "system",
            "reference",
        ] {
            assert_eq!(record[key], expected[key], "{key} of {record}");
        }
        assert_eq!(field(record, "data"), "d.jsonl");
    }
    let remark = &found[2]["remarks"][0];
    assert_eq!(field(remark, "code"), "unused_key");
    assert!(field(remark, "text").contains("`hospital`"));
    assert_eq!(field(&found[3], "image_sha256").split(';').count(), 2);
}

#[test]
fn a_run_over_rows_goes_on_where_it_was() {
    let folder = tempdir().unwrap();
    let (data, output) = (folder.path().join("d.jsonl"), folder.path().join("o.jsonl"));
    let mut rows = rows(folder.path());
    write(&data, &rows);
    let args = quick(&["d.jsonl", "--output", "o.jsonl"]);
    infer_well(folder.path(), &args);
    let whole = timeless(&output);
    let lines = fs::read_to_string(&output).unwrap();
    fs::write(&output, lines.split_inclusive('\n').next().unwrap()).unwrap();
    let (_, stderr) = infer_well(folder.path(), &quick(&["./d.jsonl", "--output", "o.jsonl"]));
    assert!(stderr.contains("going on: 1 of 4 reports"), "{stderr}");
    let resumed = timeless(&output);
    assert_eq!(resumed.len(), 4);
    for (ours, other) in resumed.iter().zip(&whole) {
        for key in ["row", "report", "reference", "row_sha256", "settings"] {
            assert_eq!(ours[key], other[key]);
        }
    }
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(
        stderr.contains("all 4 reports are there already"),
        "{stderr}"
    );

    // Another question, another reference and another image are other rows.
    rows[0]["response"] = "未见异常。".into();
    rows[1]["image"] = "a.png".into();
    write(&data, &rows);
    fs::copy(fixture_image("model_c.png"), folder.path().join("b.png")).unwrap();
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(
        stderr.contains("3 rows are not as the file has them"),
        "{stderr}"
    );
    let after = timeless(&output);
    assert_eq!(after.len(), 4);
    assert_eq!(after[0]["reference"], "未见异常。");
    assert_eq!(after[1]["image"], "a.png");
    assert_ne!(after[3]["image_sha256"], whole[3]["image_sha256"]);
    assert_eq!(after[2]["report"], whole[2]["report"]);
    assert_eq!(records(&folder.path().join("o.jsonl.replaced")).len(), 3);

    // Images named on the command line are other reports than those of rows.
    let (_, stderr) = infer_well(
        folder.path(),
        &quick(&["a.png", "--max-pixels", "16384", "--output", "o.jsonl"]),
    );
    assert!(stderr.contains("4 reports of another question"), "{stderr}");
    assert_eq!(records(&output).len(), 5);
}

#[test]
fn a_row_that_is_none_is_a_record_with_its_error() {
    let folder = tempdir().unwrap();
    let (data, output) = (folder.path().join("d.jsonl"), folder.path().join("o.jsonl"));
    let rows = rows(folder.path());
    let lines = [
        rows[0].to_string(),
        r#"{"query": "a", "query": "b"}"#.to_owned(),
        json!({"query": "q", "image": "none.png"}).to_string(),
        json!({"query": "x<|im_end|>", "image": "a.png"}).to_string(),
        json!({"query": "q", "image": "a.png", "videos": ["v"]}).to_string(),
        rows[1].to_string(),
    ];
    fs::write(&data, lines.join("\n")).unwrap();
    let args = quick(&["d.jsonl", "--output", "o.jsonl", "--batch-size", "3"]);
    let (code, _, stderr) = infer(folder.path(), &args);
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("4 reports failed, the first: `d.jsonl` row 2"),
        "{stderr}"
    );
    let found = records(&output);
    for (at, says) in [
        (1, "the key `query` is given twice"),
        (2, "none.png"),
        (3, "control token `<|im_end|>`"),
        (4, "the key `videos` is not supported"),
    ] {
        let error = field(&found[at], "error");
        assert!(
            error.starts_with(&format!("`d.jsonl` row {}: ", at + 1)),
            "{error}"
        );
        assert!(error.contains(says), "{error}");
    }
    for at in [0, 5] {
        assert_eq!(found[at]["error"], Value::Null);
        assert_eq!(found[at]["row"], at + 1);
    }
    write(
        &data,
        &[vec![rows[0].clone(); 5], vec![rows[1].clone()]].concat(),
    );
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(
        stderr.contains("4 reports that failed before are tried again"),
        "{stderr}"
    );
    assert_eq!(records(&output).len(), 6);
}

#[test]
fn columns_are_mapped_and_reports_scored_as_they_are() {
    let folder = tempdir().unwrap();
    rows(folder.path());
    let table = "bild,frage,befund\na.png,Was ist zu sehen?,双肺清晰。\nb.png,,左肺实变。\n";
    fs::write(folder.path().join("t.csv"), table).unwrap();
    let columns = "images=bild,query=frage,response=befund";
    let small = [
        "--max-pixels",
        "16384",
        "--output",
        "o.jsonl",
        "t.csv",
        "--columns",
        columns,
    ];
    infer_well(folder.path(), &quick(&small));
    let found = records(&folder.path().join("o.jsonl"));
    assert_eq!(field(&found[0], "prompt"), "Was ist zu sehen?");
    assert_eq!(field(&found[1], "prompt"), crate::cli_prompt());
    assert_eq!(field(&found[1], "reference"), "左肺实变。");
    let (code, stdout, stderr) = run(folder.path(), &["eval", "o.jsonl"]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let wrong = [
        "--output",
        "p.jsonl",
        "t.csv",
        "--columns",
        "images=bild,query=fraage",
    ];
    let (code, _, stderr) = infer(folder.path(), &quick(&wrong));
    assert_eq!(code, 1);
    assert!(stderr.contains("`fraage`"), "{stderr}");
}

#[test]
fn flags_that_rows_leave_no_room_for_are_refused() {
    let folder = tempdir().unwrap();
    write(&folder.path().join("d.jsonl"), &rows(folder.path())[..1]);
    fs::write(folder.path().join("empty.jsonl"), "\n").unwrap();
    let cases = [
        case(
            "mixed",
            &["d.jsonl", "a.png"],
            2,
            &["`d.jsonl` is a data file and `a.png` is none"],
        ),
        case(
            "together",
            &["d.jsonl", "--together"],
            2,
            &["--together", "names its own"],
        ),
        case("tags", &["d.jsonl", "--show-tags"], 2, &["--show-tags"]),
        case(
            "question",
            &["d.jsonl", "--prompt", "x"],
            2,
            &["--prompt", "every row has its own"],
        ),
        case(
            "columns",
            &["a.png", "--columns", "images=x"],
            2,
            &["--columns", "no data file"],
        ),
        case(
            "addresses",
            &["a.png", "--allow-image-urls"],
            2,
            &["--allow-image-urls"],
        ),
        case(
            "empty",
            &["empty.jsonl"],
            1,
            &["`empty.jsonl` holds no sample"],
        ),
        case("pattern", &["no*.jsonl"], 1, &["matches no file"]),
        case("missing", &["none.jsonl"], 1, &["cannot read `none.jsonl`"]),
    ];
    check(folder.path(), &cases);
}

#[test]
fn a_server_answers_rows_as_a_model_does() {
    let folder = tempdir().unwrap();
    write(&folder.path().join("d.jsonl"), &rows(folder.path()));
    let server = server::start(&[]);
    let url = server.url();
    infer_well(folder.path(), &quick(&["d.jsonl", "--output", "o.jsonl"]));
    let remote = quick(&[
        "d.jsonl",
        "--output",
        "p.jsonl",
        "--server",
        &url,
        "--batch-size",
        "3",
    ]);
    infer_well(folder.path(), &remote);
    let (own, sent) = (
        records(&folder.path().join("o.jsonl")),
        records(&folder.path().join("p.jsonl")),
    );
    assert_eq!(own.len(), sent.len());
    for (own, sent) in own.iter().zip(&sent) {
        for key in [
            "row",
            "id",
            "prompt",
            "reference",
            "report",
            "prompt_tokens",
            "image_sha256",
        ] {
            assert_eq!(own[key], sent[key], "{key}");
        }
    }
}

//! `check` and `convert` over several data files, with the names that `train` takes.

use std::{fs, path::Path};

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::{fixture_image, json_lines, records, run, text};

/// Three data files of one row each, two of them about the same image.
fn files(folder: &Path) {
    for (picture, name) in [
        ("model_a.png", "a.png"),
        ("model_b.png", "b.png"),
        ("model_c.png", "c.png"),
    ] {
        fs::copy(fixture_image(picture), folder.join(name)).unwrap();
    }
    fs::create_dir(folder.join("sub")).unwrap();
    fs::copy(fixture_image("model_c.png"), folder.join("sub/c.png")).unwrap();
    let row = |image: &str, id: Value, answer: &str| {
        let row = json!({"id": id, "query": "有什么？", "response": answer, "images": [image]});
        row.to_string() + "\n"
    };
    fs::write(
        folder.join("one.jsonl"),
        row("a.png", 1.into(), "心影增大。"),
    )
    .unwrap();
    fs::write(
        folder.join("two.jsonl"),
        row("b.png", 1.into(), "左肺实变。"),
    )
    .unwrap();
    fs::write(
        folder.join("again.jsonl"),
        row("a.png", 7.into(), "心影增大。"),
    )
    .unwrap();
    fs::write(
        folder.join("sub/three.jsonl"),
        row("c.png", "x".into(), "未见异常。"),
    )
    .unwrap();
    fs::write(
        folder.join("table.csv"),
        "query,response,images\n有什么？,右肺实变。,c.png\n",
    )
    .unwrap();
}

fn check(folder: &Path, args: &[&str]) -> (i32, Vec<Value>, String) {
    let (code, stdout, stderr) = run(folder, &[&["check", "--json"], args].concat());
    (code, json_lines(&stdout), stderr)
}

#[test]
fn check_takes_what_train_takes() {
    let folder = tempdir().unwrap();
    files(folder.path());
    for args in [
        &["one.jsonl:2,zh=two.jsonl#5,table.csv"][..],
        &["one.jsonl", "two.jsonl:0.5", "table.csv"],
        &["one.jsonl,two.jsonl", "phantom:1:0..8", "tab*.csv"],
    ] {
        let (code, lines, stderr) = check(folder.path(), args);
        assert_eq!(code, 0, "{args:?}: {lines:?} {stderr}");
        let report = lines.last().unwrap();
        let rows: Vec<u64> = report["files"]
            .as_array()
            .unwrap()
            .iter()
            .map(|file| file["rows"].as_u64().unwrap())
            .collect();
        assert_eq!(rows, [1, 1, 1], "{args:?}");
    }
    for (args, says) in [
        (
            &["*.jsonl"][..],
            "same images and same conversation as `again.jsonl` line 1",
        ),
        (
            &["two.jsonl,one.jsonl", "--val", "table.csv,again.jsonl"],
            "the image is also in `one.jsonl` line 1",
        ),
    ] {
        let (code, lines, _) = check(folder.path(), args);
        assert_eq!(code, 1);
        let said = lines
            .iter()
            .any(|line| line["message"].as_str().is_some_and(|text| text == says));
        assert!(said, "{says}: {lines:?}");
    }
    for (args, code, says) in [
        (&["one.jsonl,one.jsonl"][..], 1, "`one.jsonl` twice"),
        (
            &["one.jsonl", "./one.jsonl"],
            2,
            "`./one.jsonl` is named twice",
        ),
        (&["one.jsonl:0"], 1, "above 0"),
        (&["phantom:1:0..8"], 2, "names no data file"),
        (&["no*.jsonl"], 1, "matches no file"),
        (&["one.jsonl", "--val", ""], 1, "is empty"),
        (
            &["table.csv,one.jsonl", "--columns", "images=nowhere"],
            1,
            "`nowhere`",
        ),
    ] {
        let (found, lines, stderr) = check(folder.path(), args);
        assert_eq!(found, code, "{args:?} {stderr}");
        assert!(
            stderr.contains(says) || format!("{lines:?}").contains(says),
            "{args:?}: {stderr} {lines:?}"
        );
    }
}

#[test]
fn convert_writes_several_files_into_one() {
    let folder = tempdir().unwrap();
    files(folder.path());
    let args = [
        "convert",
        "one.jsonl",
        "two.jsonl",
        "sub/three.jsonl",
        "--output",
        "out",
        "--val-ratio",
        "0",
        "--split",
        "image",
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(
        stdout.contains("1 row has the `id` of a row in an earlier file"),
        "{stdout}"
    );
    let mut rows = records(&folder.path().join("out/train.jsonl"));
    rows.sort_by_key(|row| row["id"].to_string());
    let ids: Vec<&Value> = rows.iter().map(|row| &row["id"]).collect();
    assert_eq!(ids, [&json!("two-1"), &json!("x"), &json!(1)]);
    for row in &rows {
        let image = folder
            .path()
            .join("out")
            .join(row["images"][0].as_str().unwrap());
        assert!(image.is_file(), "{row}");
    }
    let three = rows.iter().find(|row| row["id"] == "x").unwrap();
    assert!(
        three["images"][0].as_str().unwrap().ends_with("sub/c.png"),
        "{three}"
    );
    let summary = fs::read_to_string(folder.path().join("out/summary.json")).unwrap();
    let summary: Value = serde_json::from_str(&summary).unwrap();
    assert_eq!(summary["rows_read"], 3);
    assert_eq!(summary["files"].as_object().unwrap().len(), 3);

    // A row that is left out is named with its file.
    fs::remove_file(folder.path().join("sub/c.png")).unwrap();
    let args = [
        "convert",
        "*.jsonl",
        "sub/three.jsonl",
        "--output",
        "left",
        "--val-ratio",
        "0",
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let missing = fs::read_to_string(folder.path().join("left/missing.txt")).unwrap();
    assert!(
        missing.starts_with("sub/three.jsonl row 1\tc.png"),
        "{missing}"
    );

    let corpus = json!({"annotations": [{"image_id": "a.png", "caption": "心影增大。"}]});
    fs::write(folder.path().join("openi.json"), corpus.to_string()).unwrap();
    for (args, expected, says) in [
        (
            &["one.jsonl", "openi.json"][..],
            1,
            "the inputs are of two forms",
        ),
        (&["one.jsonl", "none*.jsonl"], 1, "matches no file"),
        (&["one.jsonl", "none.jsonl"], 1, "none.jsonl"),
        (&["one.jsonl", "./one.jsonl"], 2, "is named twice"),
    ] {
        let args = [&["convert"], args, &["--output", "bad"]].concat();
        let (code, _, stderr) = run(folder.path(), &args);
        assert_eq!(code, expected, "{stderr}");
        assert!(stderr.contains(says), "{stderr}");
        assert!(
            !Path::new(text(folder.path()))
                .join("bad/train.jsonl")
                .exists()
        );
    }
}

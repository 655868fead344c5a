//! `label` from outside: rows in, findings out, in order.

use std::fs;

use tempfile::tempdir;

use crate::{json_lines, repository, run};

const REPORTS: &str = "{\"id\": \"a\", \"report\": \"右侧少量胸腔积液，心影不大。\"}\n\
    {\"id\": \"b\", \"report\": \"双肺未见明显异常。\"}\n\
    {\"id\": \"c\", \"findings\": \"左肺下叶结节影。\", \"impression\": \"肺癌？\"}\n";

#[test]
fn a_row_each_in_order_with_the_words() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("r.jsonl"), REPORTS).unwrap();
    let args = [
        "label", "r.jsonl", "--output", "l.jsonl", "--csv", "l.csv", "--html", "l.html",
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(stdout, "");
    assert!(stderr.contains("`hospital`, guessed"), "{stderr}");
    assert!(stderr.contains("3 texts: 1 normal"), "{stderr}");
    let rows = json_lines(&fs::read_to_string(at("l.jsonl")).unwrap());
    assert_eq!(rows.len(), 3);
    assert_eq!(rows[0]["id"], "a");
    assert_eq!(rows[0]["findings"]["pleural_effusion"]["side"], "right");
    assert_eq!(rows[0]["findings"]["pleural_effusion"]["severity"], "mild");
    assert_eq!(rows[1]["normal"], true);
    let lesion = &rows[2]["findings"]["lung_lesion"];
    assert_eq!(lesion["status"], "present");
    assert_eq!(lesion["lobe"][0], "lower");
    assert_eq!(lesion["evidence"][0]["section"], "findings");
    let table = fs::read_to_string(at("l.csv")).unwrap();
    let lines: Vec<&str> = table.lines().collect();
    assert!(
        lines[0].starts_with("Row,Reports,No Finding,Enlarged"),
        "{table}"
    );
    assert!(lines[2].ends_with("1.0,,,,,,,,,,,,,"), "{table}");
    assert!(
        fs::read_to_string(at("l.html"))
            .unwrap()
            .contains("胸腔积液")
    );
}

#[test]
fn sentences_and_sections_are_rows_of_their_own() {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("r.jsonl"), REPORTS).unwrap();
    let rows = |level: &str| {
        let (code, stdout, stderr) = run(folder.path(), &["label", "r.jsonl", "--level", level]);
        assert_eq!(code, 0, "{stderr}");
        json_lines(&stdout)
    };
    let sections = rows("section");
    assert_eq!(sections.len(), 4);
    assert_eq!(sections[3]["row"], 3);
    assert_eq!(sections[3]["text"], "印象：肺癌？");
    assert_eq!(
        sections[3]["findings"]["lung_lesion"]["status"],
        "uncertain"
    );
    assert_eq!(rows("sentence").len(), 4);
}

#[test]
fn agreement_with_labels_by_hand_is_printed() {
    let folder = tempdir().unwrap();
    let set = repository().join("tests/fixtures/findings/hospital.jsonl");
    let set = set.to_str().unwrap();
    let (code, stdout, stderr) = run(folder.path(), &["label", set, "--agreement"]);
    assert_eq!(code, 0, "{stderr}");
    let effusion = stdout
        .lines()
        .find(|line| line.starts_with("pleural_effusion"));
    let numbers: Vec<f64> = effusion
        .unwrap_or_default()
        .split_whitespace()
        .skip(1)
        .map(|number| number.parse().unwrap())
        .collect();
    assert!(numbers[0] >= 10.0 && numbers[2] >= 0.9, "{stdout}");
}

#[test]
fn what_cannot_be_read_is_named() {
    let folder = tempdir().unwrap();
    fs::write(
        folder.path().join("r.jsonl"),
        "{\"words\": \"心影不大。\"}\n",
    )
    .unwrap();
    let (code, _, stderr) = run(folder.path(), &["label", "r.jsonl"]);
    assert_eq!(code, 2, "{stderr}");
    assert!(
        stderr.contains("row 1") && stderr.contains("words") && stderr.contains("--text-key"),
        "{stderr}"
    );
    let (code, stdout, _) = run(folder.path(), &["label", "r.jsonl", "--text-key", "words"]);
    assert_eq!((code, json_lines(&stdout).len()), (0, 1));
    let (code, _, stderr) = run(
        folder.path(),
        &[
            "label",
            "r.jsonl",
            "--text-key",
            "words",
            "--rules",
            "hospitol",
        ],
    );
    assert_ne!(code, 0);
    assert!(stderr.contains("hospitol"), "{stderr}");
}

#[test]
fn tables_of_chinese_programs_are_read_as_train_reads_them() {
    let folder = tempdir().unwrap();
    let table = "影像号,检查所见\n1,右侧少量胸腔积液。\n2,双肺未见明显异常。\n";
    let (bytes, ..) = encoding_rs::GB18030.encode(table);
    fs::write(folder.path().join("r.csv"), bytes).unwrap();
    let (code, stdout, stderr) = run(folder.path(), &["label", "r.csv"]);
    assert_eq!(code, 0, "{stderr}");
    let rows = json_lines(&stdout);
    assert_eq!(rows.len(), 2);
    assert_eq!(rows[0]["影像号"], "1");
    assert_eq!(rows[0]["findings"]["pleural_effusion"]["side"], "right");
    fs::write(folder.path().join("broken.jsonl"), "{\"report\": \n").unwrap();
    let (code, _, stderr) = run(folder.path(), &["label", "broken.jsonl"]);
    assert_eq!(code, 1, "{stderr}");
    assert!(
        stderr.contains("broken.jsonl") && stderr.contains("row"),
        "{stderr}"
    );
}

//! `clean` from outside: what it prints, what it writes, and what it leaves alone.

use std::fs;

use serde_json::Value;
use tempfile::tempdir;

use crate::{json_lines, run};

const CORPUS: &str = r#"[
  {"img": "/x/7_1.png", "prompt": "?", "label": "纵膈正常，没有气孔。"},
  {"img": "/x/7_2.png", "prompt": "?", "label": "心影正常，建议随访。"},
  {"img": "/x/8_1.png", "prompt": "?", "label": "左底肺水肿。"}
]"#;

#[test]
fn places_are_listed_and_a_copy_is_written_with_its_changes() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("zh.json"), CORPUS).unwrap();
    let english = r#"{"annotations": [{"image_id": "8_1", "caption": "Left basal atelectasis."}]}"#;
    fs::write(at("en.json"), english).unwrap();
    let args = [
        "clean",
        "zh.json",
        "--english",
        "en.json",
        "--output",
        "out.json",
        "--report",
        "r.jsonl",
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains("zh.json row 1 (7_1): pneumothorax_as_stoma: 气孔 → 气胸"),
        "{stdout}"
    );
    assert!(
        stdout.contains("zh.json row 2 (7_2): advice: 建议 left to a reader"),
        "{stdout}"
    );
    assert!(stdout.contains("in 2 rows"), "{stdout}");
    assert!(
        stderr.contains("1 of 3 rows have their English report"),
        "{stderr}"
    );
    let written: Value = serde_json::from_slice(&fs::read(at("out.json")).unwrap()).unwrap();
    assert_eq!(written[0]["label"], "纵隔正常，没有气胸。");
    assert_eq!(written[1]["label"], "心影正常，建议随访。");
    assert_eq!(written[2]["label"], "左底肺不张。");
    let diff = fs::read_to_string(at("out.json.diff")).unwrap();
    assert!(
        diff.contains("-纵膈正常，没有气孔。\n+纵隔正常，没有气胸。\n"),
        "{diff}"
    );
    let places = json_lines(&fs::read_to_string(at("r.jsonl")).unwrap());
    assert_eq!(places.len(), 4, "{places:?}");
    assert_eq!(fs::read_to_string(at("zh.json")).unwrap(), CORPUS);

    let args = [
        "clean",
        "zh.json",
        "--only",
        "mediastinum_spelling",
        "--json",
    ];
    let (_, stdout, _) = run(folder.path(), &args);
    let lines = json_lines(&stdout);
    assert_eq!(lines.len(), 2, "{stdout}");
    assert_eq!(lines[1]["defects"]["mediastinum_spelling"]["places"], 1);
}

#[test]
fn refusals_say_what_to_do() {
    let folder = tempdir().unwrap();
    let write = |name: &str, text: &str| fs::write(folder.path().join(name), text).unwrap();
    write("zh.json", CORPUS);
    write(
        "bad.jsonl",
        "{\"messages\":[{\"role\":\"user\",\"content\":\"?\"},{\"role\":\"assistant\",\"content\":\"好。\"}]}\n{\"messages\":\n",
    );
    write("odd.json", "[{\"img\":\"a.png\"}]");
    for (args, code, signs) in [
        (
            vec!["zh.json", "--only", "nonsense"],
            2,
            vec!["`nonsense`", "mediastinum_spelling"],
        ),
        (
            vec!["zh.json", "--output", "./zh.json"],
            2,
            vec!["overwritten"],
        ),
        (vec!["bad.jsonl"], 1, vec!["bad.jsonl", "row 2"]),
        (vec!["odd.json"], 1, vec!["row 1", "`label`"]),
        (vec!["absent.json"], 1, vec!["absent.json"]),
    ] {
        let all: Vec<&str> = std::iter::once("clean").chain(args).collect();
        let (found, _, stderr) = run(folder.path(), &all);
        assert_eq!(found, code, "{all:?}: {stderr}");
        for sign in signs {
            assert!(stderr.contains(sign), "{all:?}: {sign} is not in {stderr}");
        }
    }
}

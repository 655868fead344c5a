//! `infer` and the files it meets: names, folders, outputs that are none, damage, remarks.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use serde_json::{Value, json};
use tempfile::tempdir;

use crate::{
    field, fixture_image, infer, infer_well, json_lines, records,
    refusal::{case, check},
    repository, text,
};

/// Short answers about small images.
const QUICK: [&str; 4] = ["--max-new-tokens", "8", "--max-pixels", "16384"];

fn quick<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&QUICK[..], args].concat()
}

/// Records without what differs between two equal runs.
fn timeless(path: &Path) -> Vec<Value> {
    let mut records = records(path);
    for record in &mut records {
        record.as_object_mut().unwrap().remove("seconds");
    }
    records
}

fn copy_to(folder: &Path, image: &str, name: &str) -> PathBuf {
    let path = folder.join(name);
    fs::copy(fixture_image(image), &path).unwrap();
    path
}

#[cfg(unix)]
#[test]
fn names_that_are_not_utf8_are_records_of_their_own() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempdir().unwrap();
    let images = folder.path().join("gbk");
    fs::create_dir(&images).unwrap();
    // 丙, 甲, 乙 in GBK and `_1.png`, in the order of their bytes.
    for (bytes, picture) in [
        (b"\xb1\xfb_1.png", "model_a.png"),
        (b"\xbc\xd7_1.png", "model_b.png"),
        (b"\xd2\xd2_1.png", "model_c.png"),
    ] {
        let name = std::ffi::OsStr::from_bytes(bytes);
        fs::copy(fixture_image(picture), images.join(name)).unwrap();
    }
    let output = folder.path().join("o.jsonl");
    let args = quick(&["--images-dir", "gbk", "--output", text(&output)]);
    infer_well(folder.path(), &args);
    let whole = timeless(&output);
    let names: Vec<&str> = whole.iter().map(|record| field(record, "image")).collect();
    assert_eq!(
        names,
        ["gbk/%B1%FB_1.png", "gbk/%BC%D7_1.png", "gbk/%D2%D2_1.png"]
    );
    assert!(whole.iter().all(|one| one["image_encoding"] == "percent"));
    let lines = fs::read_to_string(&output).unwrap();
    let first = lines.split_inclusive('\n').next().unwrap();
    fs::write(&output, first).unwrap();
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(stderr.contains("1 of 3"), "{stderr}");
    assert_eq!(timeless(&output), whole);
}

#[test]
fn an_image_has_one_record_by_whatever_path_it_is_named() {
    let folder = tempdir().unwrap();
    let image = copy_to(folder.path(), "model_a.png", "a.png");
    for image in ["a.png", "./a.png", text(&image)] {
        infer_well(folder.path(), &quick(&["--output", "o.jsonl", image]));
    }
    let args = quick(&["--output", "p.jsonl", "a.png", text(&image)]);
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(stderr.contains("more than once"), "{stderr}");
    for output in ["o.jsonl", "p.jsonl"] {
        assert_eq!(records(&folder.path().join(output)).len(), 1, "{output}");
    }
}

#[test]
fn a_report_that_failed_is_tried_again() {
    let folder = tempdir().unwrap();
    let output = folder.path().join("o.jsonl");
    copy_to(folder.path(), "model_a.png", "a.png");
    copy_to(folder.path(), "model_c.png", "c.png");
    fs::write(folder.path().join("b.png"), "no picture").unwrap();
    let args = quick(&["--output", "o.jsonl", "a.png", "b.png", "c.png"]);
    let (code, _, _) = infer(folder.path(), &args);
    assert_eq!(code, 1);
    assert!(records(&output)[1]["error"].is_string());
    copy_to(folder.path(), "model_b.png", "b.png");
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(
        stderr.contains("1 report that failed before is tried again"),
        "{stderr}"
    );
    let found = timeless(&output);
    infer_well(
        folder.path(),
        &quick(&["--output", "whole.jsonl", "a.png", "b.png", "c.png"]),
    );
    assert_eq!(found, timeless(&folder.path().join("whole.jsonl")));
    assert!(!folder.path().join("o.jsonl.replaced").exists());
}

#[test]
fn an_image_that_was_exchanged_gets_a_report_of_its_own() {
    let folder = tempdir().unwrap();
    let output = folder.path().join("o.jsonl");
    copy_to(folder.path(), "model_a.png", "a.png");
    copy_to(folder.path(), "model_c.png", "c.png");
    let args = quick(&["--output", "o.jsonl", "a.png", "c.png"]);
    infer_well(folder.path(), &args);
    let before = timeless(&output);
    copy_to(folder.path(), "model_b.png", "a.png");
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(
        stderr.contains("1 image is not as the file has it"),
        "{stderr}"
    );
    let after = timeless(&output);
    assert_eq!(after.len(), 2);
    assert_ne!(after[0]["image_sha256"], before[0]["image_sha256"]);
    assert_eq!(after[1], before[1]);
    let replaced = timeless(&folder.path().join("o.jsonl.replaced"));
    assert_eq!(replaced, before[..1]);
}

#[test]
fn a_damaged_batch_file_keeps_its_good_records() {
    let folder = tempdir().unwrap();
    let output = folder.path().join("o.jsonl");
    for (picture, name) in [
        ("model_a.png", "a"),
        ("model_b.png", "b"),
        ("model_c.png", "c"),
    ] {
        copy_to(folder.path(), picture, &format!("{name}.png"));
    }
    let args = quick(&["--output", "o.jsonl", "a.png", "b.png", "c.png"]);
    infer_well(folder.path(), &args);
    let whole = fs::read(&output).unwrap();
    let good = timeless(&output);
    let lines: Vec<&[u8]> = whole.split_inclusive(|byte| *byte == b'\n').collect();

    // A power cut: the last record is zeros.
    let zeros = vec![0; lines[2].len()];
    fs::write(&output, [lines[0], lines[1], &zeros].concat()).unwrap();
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(stderr.contains("zero bytes"), "{stderr}");
    assert_eq!(timeless(&output), good);

    // One byte of the second line.
    let mut damaged = lines[1].to_vec();
    damaged[4] = b'\n';
    fs::write(&output, [lines[0], &damaged, lines[2]].concat()).unwrap();
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(
        stderr.contains("2 lines are damaged (2, 3) and moved to `o.jsonl.damaged`"),
        "{stderr}"
    );
    let mut found = timeless(&output);
    found.sort_by_key(|record| field(record, "image").to_owned());
    assert_eq!(found, good);
    assert_eq!(
        fs::read(folder.path().join("o.jsonl.damaged")).unwrap(),
        damaged
    );
}

#[cfg(target_os = "linux")]
#[test]
fn what_is_no_file_is_printed_to_or_refused() {
    let folder = tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    copy_to(folder.path(), "model_a.png", "a.png");
    let (stdout, _) = infer_well(folder.path(), &quick(&["--output", "/dev/stdout", "a.png"]));
    assert_eq!(field(&json_lines(&stdout)[0], "image"), "a.png");
    let made = Command::new("mkfifo").arg(path("pipe.png")).status();
    assert!(made.unwrap().success());
    fs::File::create(path("huge.bin"))
        .unwrap()
        .set_len(1 << 40)
        .unwrap();
    let to = |name, output: &str, says: &[&str]| {
        case(name, &quick(&["--output", output, "a.png"]), 1, says)
    };
    let cases = [
        to(
            "full device",
            "/dev/full",
            &["cannot write `/dev/full`", "No space left"],
        ),
        to(
            "pipe to write",
            "pipe.png",
            &["`pipe.png`", "a pipe", "--json"],
        ),
        to(
            "huge file",
            "huge.bin",
            &["`huge.bin`", "not a record", "--output"],
        ),
        case(
            "pipe to read",
            &["pipe.png"],
            1,
            &["`pipe.png`", "a pipe, expected a file"],
        ),
        case(
            "tags of a pipe",
            &["--show-tags", "pipe.png"],
            1,
            &["a pipe, expected a file"],
        ),
        case(
            "device to read",
            &["/dev/zero"],
            1,
            &["`/dev/zero`", "a device"],
        ),
    ];
    check(folder.path(), &cases);
    assert_eq!(fs::metadata(path("huge.bin")).unwrap().len(), 1 << 40);
}

#[test]
fn what_a_folder_holds_besides_is_counted() {
    let folder = tempdir().unwrap();
    let images = folder.path().join("d");
    fs::create_dir_all(images.join("sub")).unwrap();
    copy_to(&images, "model_a.png", "a.png");
    copy_to(&images, "model_b.png", "sub/b.png");
    let dicom = repository().join("tests/fixtures/dicom/gray_8u_1.dcm");
    fs::copy(dicom, images.join("IM000001")).unwrap();
    for name in ["x.txt", "y.txt", "z.xcf"] {
        fs::write(images.join(name), "no image").unwrap();
    }
    let args = quick(&["--json", "--images-dir", "d"]);
    let (stdout, stderr) = infer_well(folder.path(), &args);
    assert!(
        stderr.contains(
            "skipped 1 folder (--recursive looks into them), 3 files of other kinds: .txt 2, .xcf 1"
        ),
        "{stderr}"
    );
    let names = |stdout: &str| -> Vec<String> {
        let lines = json_lines(stdout);
        lines
            .iter()
            .map(|one| field(one, "image").to_owned())
            .collect()
    };
    assert_eq!(names(&stdout), ["d/IM000001", "d/a.png"]);
    let (stdout, _) = infer_well(folder.path(), &[&args[..], &["--recursive"]].concat());
    assert_eq!(names(&stdout), ["d/IM000001", "d/a.png", "d/sub/b.png"]);
}

#[test]
fn remarks_on_an_image_are_in_its_record() {
    let folder = tempdir().unwrap();
    let film = repository().join("tests/fixtures/dicom/gray_8u_2.dcm");
    let mut bytes = fs::read(film).unwrap();
    let at = bytes.windows(6).position(|part| part == b"CHEST ").unwrap();
    bytes[at..at + 6].copy_from_slice(b"HAND  ");
    fs::write(folder.path().join("hand.dcm"), bytes).unwrap();
    copy_to(folder.path(), "model_a.png", "a.png");
    let of_hand = |record: &Value| -> Value {
        let remarks = record["remarks"].as_array().unwrap();
        let found = remarks
            .iter()
            .find(|remark| remark["code"] == "not_a_chest");
        found.unwrap_or_else(|| panic!("{record}")).clone()
    };
    let args = quick(&["--json", "hand.dcm", "a.png"]);
    let (stdout, stderr) = infer_well(folder.path(), &args);
    let lines = json_lines(&stdout);
    assert!(field(&of_hand(&lines[0]), "text").contains("body part is HAND"));
    assert_eq!(lines[1]["remarks"], json!([]));
    assert!(
        stderr.contains("`hand.dcm`: its body part is HAND"),
        "{stderr}"
    );
    infer_well(folder.path(), &quick(&["--output", "o.jsonl", "hand.dcm"]));
    of_hand(&records(&folder.path().join("o.jsonl"))[0]);
    let args = quick(&["--json", "--together", "a.png", "hand.dcm"]);
    let (stdout, _) = infer_well(folder.path(), &args);
    assert_eq!(of_hand(&json_lines(&stdout)[0])["image"], "hand.dcm");
}

#[test]
fn a_model_that_is_not_there_names_how_to_get_it() {
    let folder = tempdir().unwrap();
    let image = fixture_image("model_a.png");
    let snapshot = "hub/models--Qwen--Q/snapshots/0123abcd";
    fs::create_dir_all(folder.path().join(snapshot)).unwrap();
    fs::write(folder.path().join(snapshot).join("config.json"), "{}").unwrap();
    let refused =
        |name, model: &str, says: &[&str]| case(name, &["--model", model, text(&image)], 1, says);
    let cases = [
        refused(
            "a name of the hub",
            "Qwen/Qwen3-VL-8B-Instruct",
            &[
                " pull Qwen/Qwen3-VL-8B-Instruct`",
                "--download",
                "hf download Qwen/Qwen3-VL-8B-Instruct`",
                "modelscope download --model Qwen/Qwen3-VL-8B-Instruct`",
            ],
        ),
        refused(
            "a download that is not whole",
            "hub/models--Qwen--Q",
            &[snapshot, "tokenizer.json is missing"],
        ),
        refused(
            "a tilde",
            "~/absent",
            &["/absent`", "expected `config.json`"],
        ),
        refused("a typo", "modle", &["`modle`", "expected `config.json`"]),
    ];
    check(folder.path(), &cases);
}

//! DICOM through the program: reports, tags, frames, warnings, and nothing of the patient anywhere.

use std::fs;
use std::path::{Path, PathBuf};

use crate::{infer, infer_well, json_lines, repository, run, text};

/// Stands in every patient attribute of the fixtures.
const SECRETS: [&str; 3] = ["GEHEIM", "4711", "19110203"];

fn fixture(name: &str) -> PathBuf {
    repository().join("tests/fixtures/dicom").join(name)
}

fn assert_keeps_secrets(output: &str) {
    for secret in SECRETS {
        assert!(!output.contains(secret), "{secret} is in {output}");
    }
}

/// `bytes` with the first `from` made `to`, which is as long.
fn patched(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let at = bytes.windows(from.len()).position(|window| window == from);
    let at = at.expect("the fixture holds what is replaced");
    let mut bytes = bytes.to_vec();
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

#[test]
fn a_report_is_written_about_a_dicom_file_of_any_name() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("no-extension");
    fs::copy(fixture("syntax_rle_12u.dcm"), &file).unwrap();
    let (stdout, stderr) = infer_well(folder.path(), &[text(&file), "--max-new-tokens", "8"]);
    assert!(!stdout.trim().is_empty());
    assert_keeps_secrets(&(stdout + &stderr));
}

#[test]
fn equal_pixels_give_equal_reports_whatever_the_syntax() {
    let folder = tempfile::tempdir().unwrap();
    let files = [
        "gray_12u_2",
        "syntax_big_12u",
        "syntax_j2k_12u",
        "syntax_jls_12u",
    ]
    .map(|name| fixture(&format!("{name}.dcm")));
    let mut args: Vec<&str> = files.iter().map(|file| text(file)).collect();
    args.extend(["--json", "--max-new-tokens", "8"]);
    let (stdout, _) = infer_well(folder.path(), &args);
    let records = json_lines(&stdout);
    assert_eq!(records.len(), files.len());
    assert!(
        records
            .iter()
            .all(|record| record["report"] == records[0]["report"])
    );
}

#[test]
fn tags_are_technical_and_need_no_model() {
    let folder = tempfile::tempdir().unwrap();
    let file = fixture("rescale_window.dcm");
    let model = ["--model", "not-there"];
    let args = [&["infer", text(&file), "--show-tags"][..], &model].concat();
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    for line in [
        "transfer syntax: Explicit VR Little Endian (1.2.840.10008.1.2.1)",
        "bits stored: 12",
        "modality: DX",
        "window width: 3100.5",
        "rescale intercept: -1024",
    ] {
        assert!(stdout.contains(line), "{line} is not in {stdout}");
    }
    assert_keeps_secrets(&(stdout + &stderr));
    let (code, stdout, _) = run(folder.path(), &[&args[..], &["--json"]].concat());
    assert_eq!(code, 0);
    assert_eq!(json_lines(&stdout)[0]["tags"]["rows"], "34");
    assert_keeps_secrets(&stdout);
    let png = repository().join("data/sample/demo.png");
    let (code, _, stderr) = run(folder.path(), &["infer", text(&png), "--show-tags"]);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("PNG") && stderr.contains("--show-tags"),
        "{stderr}"
    );
}

#[test]
fn doubts_are_said_on_stderr_and_soft_ones_once() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixture("gray_8u_2.dcm")).unwrap();
    let knee = folder.path().join("knee.dcm");
    fs::write(&knee, patched(&bytes, b"CHEST ", b"KNEE  ")).unwrap();
    // Nothing but blanks is an attribute that says nothing.
    let silent = patched(&bytes, b"CHEST ", b"      ");
    let (one, two) = (folder.path().join("one.dcm"), folder.path().join("two.dcm"));
    fs::write(&one, &silent).unwrap();
    fs::write(&two, &silent).unwrap();
    let args = [text(&knee), text(&one), text(&two), "--max-new-tokens", "2"];
    let (_, stderr) = infer_well(folder.path(), &args);
    assert!(stderr.contains("body part is KNEE"), "{stderr}");
    assert_eq!(stderr.matches("said once").count(), 1, "{stderr}");
    assert_keeps_secrets(&stderr);
}

#[test]
fn frames_and_syntaxes_are_refused_with_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let file = fixture("gray_8u_2.dcm");
    let refused = |args: &[&str], words: &[&str]| {
        let (code, stdout, stderr) = infer(folder.path(), args);
        assert_eq!(code, 1, "{stdout}{stderr}");
        assert!(words.iter().all(|word| stderr.contains(word)), "{stderr}");
        assert_keeps_secrets(&(stdout + &stderr));
    };
    refused(&[text(&file), "--frame", "2"], &["no frame 2", "1 to 1"]);
    let png = repository().join("data/sample/demo.png");
    refused(&[text(&png), "--frame", "2"], &["PNG", "--frame"]);
    let bytes = fs::read(fixture("syntax_j2k_8u.dcm")).unwrap();
    let unread = folder.path().join("video.dcm");
    let patch = patched(&bytes, b"1.2.840.10008.1.2.4.90", b"1.2.840.10008.1.2.4.92");
    fs::write(&unread, patch).unwrap();
    refused(
        &[text(&unread)],
        &["1.2.840.10008.1.2.4.92", "JPEG 2000 Part 2", "hint"],
    );
    let cut = folder.path().join("cut.dcm");
    fs::write(&cut, &bytes[..bytes.len() - 100]).unwrap();
    refused(&[text(&cut)], &["DICOM picture", "cut off"]);
    let words = folder.path().join("words.dcm");
    fs::write(&words, "no picture at all").unwrap();
    refused(
        &[text(&words)],
        &[
            "words.dcm",
            "is not a PNG, JPEG, ",
            " NRRD or DICOM picture",
        ],
    );
    let (code, _, _) = infer(folder.path(), &[text(&file), "--frame", "0"]);
    assert_eq!(code, 2);
}

#[test]
fn check_warns_of_what_is_no_chest() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = fs::read(fixture("gray_8u_2.dcm")).unwrap();
    fs::write(
        folder.path().join("knee.dcm"),
        patched(&bytes, b"CHEST ", b"KNEE  "),
    )
    .unwrap();
    let row = r#"{"messages":[{"role":"user","content":"<image>?"},{"role":"assistant","content":"正常。"}],"images":["knee.dcm"]}"#;
    let data = folder.path().join("data.jsonl");
    fs::write(&data, format!("{row}\n")).unwrap();
    let model = repository().join("model/tiny");
    let args = ["check", text(&data), "--model", text(&model)];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(stdout.contains("body part is KNEE"), "{stdout}");
    assert!(stdout.contains("0 errors, 1 warning"), "{stdout}");
    assert_keeps_secrets(&(stdout + &stderr));
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn real_headers_do_not_leak() {
    let openi = std::env::var_os("XRAY_OPENI_DIR").expect("XRAY_OPENI_DIR is set");
    let folder = tempfile::tempdir().unwrap();
    let dicom = Path::new(&openi).join("dicom");
    let mut files: Vec<PathBuf> = fs::read_dir(dicom)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    let mut args = vec!["infer", "--show-tags"];
    args.extend(files.iter().map(|file| text(file)));
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(stdout.matches("transfer syntax: ").count(), files.len());
    // Names of attributes are fixed and values are code words or numbers: no line holds a date.
    for line in stdout.lines().filter(|line| line.starts_with("  ")) {
        let (_, value) = line.split_once(": ").unwrap();
        let digits = |word: &str| word.len() == 8 && word.bytes().all(|c| c.is_ascii_digit());
        assert!(!value.split(['\\', ' ', '(', ')']).any(digits), "{line}");
    }
}

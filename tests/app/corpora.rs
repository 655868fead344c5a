//! `convert` on a stand-in of every corpus it knows, in the layout the corpus is published in
//! (`tests/fixtures/corpora`), then `check`, and once `train`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::{TempDir, tempdir};

use crate::{json_lines, repository, run, text, tiny_model};

/// A converted corpus.
pub(crate) struct Converted {
    pub(crate) folder: TempDir,
    pub(crate) stdout: String,
    pub(crate) summary: Value,
}

impl Converted {
    pub(crate) fn rows(&self, part: &str) -> Vec<Value> {
        let path = self.folder.path().join("out").join(format!("{part}.jsonl"));
        json_lines(&fs::read_to_string(path).unwrap_or_default())
    }

    /// Rows of training, validation and test.
    pub(crate) fn counts(&self) -> [usize; 3] {
        ["train", "val", "test"].map(|part| self.rows(part).len())
    }

    pub(crate) fn all(&self) -> Vec<Value> {
        ["train", "val", "test"]
            .iter()
            .flat_map(|part| self.rows(part))
            .collect()
    }

    pub(crate) fn missing(&self) -> String {
        fs::read_to_string(self.folder.path().join("out/missing.txt")).unwrap()
    }

    pub(crate) fn remarks(&self) -> String {
        self.summary["remarks"].to_string()
    }
}

pub(crate) fn corpus(path: &str) -> PathBuf {
    repository().join("tests/fixtures/corpora").join(path)
}

pub(crate) fn convert_args<'a>(source: &'a str, args: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["convert", source, "--output", "out"];
    all.extend(args);
    all
}

/// Converts, then checks the result, which must have no error; no patient and no image is in two parts.
pub(crate) fn convert(path: &str, args: &[&str]) -> Converted {
    let source = corpus(path);
    let folder = tempdir().unwrap();
    let (code, stdout, stderr) = run(folder.path(), &convert_args(text(&source), args));
    assert_eq!(code, 0, "{path} {args:?}: {stderr}");
    let summary = fs::read(folder.path().join("out/summary.json")).unwrap();
    let converted = Converted {
        summary: serde_json::from_slice(&summary).unwrap(),
        folder,
        stdout,
    };
    let model = tiny_model();
    for part in ["val", "test"] {
        if converted.rows(part).is_empty() {
            continue;
        }
        let val = format!("out/{part}.jsonl");
        let mut args = vec!["check", "out/train.jsonl", "--val", &val];
        args.extend(["--model", text(&model), "--json"]);
        let (code, stdout, stderr) = run(converted.folder.path(), &args);
        assert_eq!(code, 0, "{path}: {stdout}{stderr}");
    }
    let mut seen: BTreeMap<String, &str> = BTreeMap::new();
    for part in ["train", "val", "test"] {
        for row in converted.rows(part) {
            let mut names: Vec<String> = row["images"]
                .as_array()
                .unwrap()
                .iter()
                .map(|image| image.as_str().unwrap().to_owned())
                .collect();
            names.extend(
                row.get("patient")
                    .map(|patient| format!("patient {patient}")),
            );
            for name in names {
                let first = *seen.entry(name.clone()).or_insert(part);
                assert_eq!(first, part, "{path}: {name}");
            }
        }
    }
    converted
}

/// Copies the files of a tree whose names are wanted.
pub(crate) fn copy(from: &Path, to: &Path, wanted: &dyn Fn(&str) -> bool) {
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        if path.is_dir() {
            copy(&path, &target, wanted);
        } else if wanted(entry.file_name().to_str().unwrap()) {
            fs::create_dir_all(to).unwrap();
            fs::copy(path, target).unwrap();
        }
    }
}

/// Ends with an error that holds all `words`.
fn refused(path: &str, args: &[&str], words: &[&str]) {
    let source = corpus(path);
    let folder = tempdir().unwrap();
    let (code, stdout, stderr) = run(folder.path(), &convert_args(text(&source), args));
    assert_ne!(code, 0, "{path} {args:?}: {stdout}");
    for word in words {
        assert!(stderr.contains(word), "{path} {args:?}: {word}: {stderr}");
    }
}

pub(crate) fn answers(rows: &[Value]) -> BTreeSet<String> {
    rows.iter()
        .map(|row| row["messages"][1]["content"].as_str().unwrap().to_owned())
        .collect()
}

pub(crate) fn images(rows: &[Value]) -> Vec<String> {
    rows.iter()
        .flat_map(|row| row["images"].as_array().unwrap())
        .map(|image| {
            image
                .as_str()
                .unwrap()
                .rsplit("fixtures/corpora/")
                .next()
                .unwrap()
                .to_owned()
        })
        .collect()
}

pub(crate) fn keys(rows: &[Value], key: &str) -> BTreeSet<String> {
    rows.iter()
        .map(|row| row[key].as_str().unwrap_or_default().to_owned())
        .collect()
}

#[test]
fn openi_zh_is_found_in_its_folder_and_lists_what_is_missing() {
    let found = convert("openi-zh", &["--val-ratio", "0.3"]);
    assert_eq!(found.summary["form"], "annotations");
    assert_eq!(found.summary["guessed"], true);
    assert!(
        found
            .stdout
            .contains("corpus                 openi-zh (guessed"),
        "{}",
        found.stdout
    );
    assert_eq!(found.summary["rows_read"], 14);
    assert_eq!(found.counts().iter().sum::<usize>(), 12);
    assert_eq!(found.summary["rows_without_image"], 1);
    assert_eq!(found.summary["rows_without_report"], 1);
    assert_eq!(found.summary["study"]["studies"], 8);
    assert_eq!(
        found.missing(),
        "row 14\t19_1\tno report\nrow 13\t18_1\timage not found\n"
    );
    let left_out = found.summary["left_out"].as_array().unwrap();
    assert_eq!(left_out.len(), 2);
    assert_eq!(left_out[0]["reason"], "image not found");
    assert_eq!(
        (&left_out[0]["rows"], &left_out[0]["first"][0]),
        (&1.into(), &13.into())
    );
    assert!(
        left_out[0]["file"]
            .as_str()
            .unwrap()
            .ends_with("openi-zh.json")
    );
    // The views of a study, by the name before `_`, in one row.
    let found = convert("openi-zh", &["--views", "all"]);
    assert_eq!(found.counts().iter().sum::<usize>(), 8);
    assert!(
        found.remarks().contains("14 rows became 10"),
        "{}",
        found.remarks()
    );
    refused(
        "openi-zh",
        &["--views", "frontal"],
        &["says which images are frontal"],
    );
    refused(
        "openi-zh",
        &["--sections", "findings"],
        &["no report", "has findings of its own"],
    );
    refused(
        "openi-zh",
        &["--split", "official"],
        &["has no split of its own"],
    );
}

#[test]
fn the_flags_of_the_published_script_give_its_rows() {
    let source = corpus("xrayglm");
    let folder = tempdir().unwrap();
    let (json, pictures) = (source.join("openi-zh-prompt.json"), source.join("images"));
    let args = [
        "convert",
        "--source_json",
        text(&json),
        "--images_dir",
        text(&pictures),
        "--output_dir",
        "out",
        "--split_ratio",
        "0.25",
        "--seed",
        "42",
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("as the published script does"), "{stdout}");
    // Drawn by Python's `random` in the order of that script: a question for each row, the shuffle, the first two rows.
    let read =
        |name: &str| json_lines(&fs::read_to_string(folder.path().join("out").join(name)).unwrap());
    let rows: Vec<Value> = read("val.jsonl")
        .into_iter()
        .chain(read("train.jsonl"))
        .collect();
    let found: Vec<String> = rows
        .iter()
        .map(|row| {
            let name = row["images"][0]
                .as_str()
                .unwrap()
                .rsplit('/')
                .next()
                .unwrap();
            format!("{name} {}", row["messages"][0]["content"].as_str().unwrap())
        })
        .collect();
    let expected = fs::read_to_string(corpus("xrayglm/published.txt")).unwrap();
    assert_eq!(found, expected.lines().collect::<Vec<_>>());
    assert_eq!(read("val.jsonl").len(), 2);
    // Both spellings of the source are one too many.
    let (code, _, stderr) = run(
        folder.path(),
        &[
            "convert",
            "a.json",
            "--source_json",
            "b.json",
            "--output",
            "o",
        ],
    );
    assert_eq!(code, 2, "{stderr}");
}

#[test]
fn r2gen_keeps_its_parts() {
    for source in ["r2gen", "r2gen/annotation.json"] {
        let found = convert(source, &[]);
        assert_eq!(found.summary["form"], "r2gen");
        assert_eq!(found.summary["split"], "official");
        assert_eq!(found.counts(), [10, 2, 4]);
        assert_eq!(found.summary["test"]["studies"], 2);
        assert_eq!(found.summary["language"], "english");
        assert_eq!(
            keys(&found.rows("test"), "study"),
            BTreeSet::from(["CXR7".to_owned(), "CXR8".to_owned()])
        );
        let question = found.rows("val")[0]["messages"][0]["content"]
            .as_str()
            .unwrap()
            .to_owned();
        assert!(question.is_ascii(), "{question}");
    }
    let found = convert("r2gen", &["--views", "all"]);
    assert_eq!(found.counts(), [5, 1, 2]);
    assert!(
        found
            .all()
            .iter()
            .all(|row| row["images"].as_array().unwrap().len() == 2)
    );
    // Another split on request, and another ratio is told to be of no use without.
    let found = convert("r2gen", &["--split", "uid", "--val-ratio", "0.25"]);
    assert_eq!(found.counts()[2], 0);
    assert_eq!(found.summary["studies_in_both"], 0);
    let found = convert("r2gen", &["--val-ratio", "0.25"]);
    assert_eq!(found.counts(), [10, 2, 4]);
    assert!(found.stdout.contains("warning: the corpus has a validation part of its own, so `--val-ratio 0.25` was not used"), "{}", found.stdout);
    // Questions of the user's.
    let found = convert("r2gen", &["--prompt", "Report?"]);
    assert!(
        found
            .all()
            .iter()
            .all(|row| row["messages"][0]["content"] == "<image>Report?")
    );
}

#[test]
fn json_rows_of_known_keys_need_no_naming() {
    for source in ["rows/pairs.json", "rows/pairs.jsonl"] {
        let found = convert(source, &["--val-ratio", "0.2"]);
        assert_eq!(found.summary["form"], "rows");
        assert_eq!(found.counts().iter().sum::<usize>(), 6);
        assert_eq!(found.summary["language"], "chinese");
        assert!(
            found
                .stdout
                .contains("warning: the key `hospital` of 6 rows says nothing to training"),
            "{}",
            found.stdout
        );
    }
    for source in ["rows/data.json", "rows/annotations.json"] {
        let found = convert(source, &["--sections", "impression", "--val-ratio", "0.3"]);
        assert_eq!(found.summary["form"], "rows");
        assert_eq!(found.summary["study"]["patients"], 3);
        assert_eq!(found.summary["patients_in_both"], 0);
        assert!(answers(&found.all()).contains("Normal chest, case 6."));
    }
    refused(
        "rows",
        &[],
        &["several files", "rows", "`pairs.json`", "name one of them"],
    );
    refused(
        "rows/pairs.json",
        &["--corpus", "padchst"],
        &["expected one of", "padchest"],
    );
    refused(
        "rows",
        &["--corpus", "padchest"],
        &["no corpus `padchest`", "ImageID"],
    );
    refused(
        ".",
        &[],
        &["several corpora", "padchest (`padchest/PADCHEST"],
    );
}

#[test]
fn chinese_tables_are_read_in_any_encoding() {
    let mut first: Option<Vec<Value>> = None;
    for source in [
        "chinese/utf8.csv",
        "chinese/gb18030.csv",
        "chinese/utf16.tsv",
    ] {
        let found = convert(source, &["--val-ratio", "0.3"]);
        assert_eq!(found.summary["form"], "table");
        assert_eq!(found.counts().iter().sum::<usize>(), 6);
        assert_eq!(found.summary["study"]["patients"], 3);
        let rows = found.all();
        let views: Vec<usize> = rows
            .iter()
            .map(|row| row["images"].as_array().unwrap().len())
            .collect();
        assert_eq!(views.iter().sum::<usize>(), 7, "two files of one number");
        assert!(
            images(&rows)
                .iter()
                .any(|image| image.ends_with("DR20240002/正位.png"))
        );
        assert!(answers(&rows).contains(
            "影像所见：两肺纹理增多，未见实变，第1例。\n心影不大。\n影像诊断：两肺未见异常，第1例。"
        ));
        assert!(
            found
                .stdout
                .contains("the key `性别` of 6 rows says nothing to training"),
            "{}",
            found.stdout
        );
        let texts: Vec<Value> = rows.iter().map(|row| row["messages"].clone()).collect();
        match &first {
            None => first = Some(texts),
            Some(first) => assert_eq!(*first, texts, "{source}"),
        }
    }
    let found = convert(
        "chinese/files.csv",
        &["--sections", "findings", "--val-ratio", "0.3"],
    );
    assert!(answers(&found.all()).contains("心影增大，第4例。"));
    let found = convert(
        "chinese/utf8.csv",
        &["--views", "one-per-image", "--val-ratio", "0.3"],
    );
    assert_eq!(found.counts().iter().sum::<usize>(), 7);
}

#[test]
fn most_of_the_images_missing_is_an_error_unless_allowed() {
    let folder = tempdir().unwrap();
    copy(&corpus("openi-zh"), folder.path(), &|name| {
        !name.ends_with(".png") || name.starts_with("11_") || name.starts_with("12_")
    });
    let (code, _, stderr) = run(
        folder.path(),
        &convert_args("openi-zh.json", &["--val-ratio", "0.4"]),
    );
    assert_eq!(code, 1);
    for word in ["11 of 14 rows", "--allow-missing", "missing.txt"] {
        assert!(stderr.contains(word), "{word}: {stderr}");
    }
    // The list of a failed conversion does not stand in the way of the next.
    let args = convert_args("openi-zh.json", &["--val-ratio", "0.4", "--allow-missing"]);
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains("warning: 10 of 14 rows have no image"),
        "{stdout}"
    );
    // A folder with something in it is left alone, unless it may be overwritten.
    let kept = folder.path().join("out/notes.txt");
    fs::write(&kept, "mine").unwrap();
    fs::write(folder.path().join("out/test.jsonl"), "{}").unwrap();
    let (code, _, stderr) = run(folder.path(), &args);
    assert_eq!(code, 1);
    assert!(stderr.contains("--overwrite"), "{stderr}");
    let args = convert_args(
        "openi-zh.json",
        &["--val-ratio", "0", "--allow-missing", "--overwrite"],
    );
    let (code, _, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(kept.is_file() && !folder.path().join("out/test.jsonl").exists());
    // Its own result is no corpus to write over.
    let args = [
        "convert",
        "out/train.jsonl",
        "--output",
        "out",
        "--overwrite",
    ];
    let (code, _, stderr) = run(folder.path(), &args);
    assert_eq!(code, 1);
    assert!(
        stderr.contains("would be replaced by the result"),
        "{stderr}"
    );
}

#[test]
#[cfg(unix)]
fn links_in_a_circle_and_devices_end_at_once() {
    let folder = tempdir().unwrap();
    copy(&corpus("xrayglm"), folder.path(), &|_| true);
    std::os::unix::fs::symlink(".", folder.path().join("again")).unwrap();
    let (code, _, stderr) = run(folder.path(), &convert_args(".", &["--val-ratio", "0.2"]));
    assert_eq!(code, 0, "{stderr}");
    let (code, _, stderr) = run(folder.path(), &["convert", "/dev/zero", "--output", "zero"]);
    assert_eq!(code, 1);
    assert!(stderr.contains("`/dev/zero`"), "{stderr}");
}

#[test]
fn a_converted_corpus_trains() {
    let found = convert("mimic-cxr", &["--views", "all", "--sections", "impression"]);
    let model = tiny_model();
    let settings = format!(
        "model = {:?}\ntrain_data = \"out/train.jsonl\"\nval_data = \"out/val.jsonl\"\noutput_dir = \"run\"\ndevice = [\"cpu\"]\ndtype = \"f32\"\nmax_steps = 2\nper_device_train_batch_size = 2\n",
        text(&model)
    );
    fs::write(found.folder.path().join("run.toml"), settings).unwrap();
    let args = ["train", "--config", "run.toml", "--no-tui", "--show", "0"];
    let (code, stdout, stderr) = run(found.folder.path(), &args);
    assert_eq!(code, 0, "{stdout}{stderr}");
    assert!(found.folder.path().join("run").is_dir());
}

#[test]
#[cfg(unix)]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let source = corpus("r2gen");
    let folder = tempdir().unwrap();
    let mut child = crate::program(folder.path(), &convert_args(text(&source), &[]))
        .spawn()
        .unwrap();
    // The pipe is closed before anything is printed.
    drop(child.stdout.take());
    assert!(child.wait().unwrap().success());
    assert!(folder.path().join("out/summary.json").is_file());
}

#[test]
#[ignore = "needs XRAY_OPENI_DIR, the folder of real films and reports"]
fn real_reports_are_converted_and_checked() {
    let openi = PathBuf::from(std::env::var_os("XRAY_OPENI_DIR").expect("XRAY_OPENI_DIR is set"));
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // Every image of the corpus is a picture of its own.
    fs::create_dir(at("images")).unwrap();
    let table = fs::read(openi.join("openi-zh-prompt.json")).unwrap();
    let corpus: Vec<Value> = serde_json::from_slice(&table).unwrap();
    for (number, row) in corpus.iter().enumerate() {
        let name = row["img"].as_str().unwrap().rsplit('/').next().unwrap();
        let levels = |x: u32, y: u32| {
            image::Luma([if x < 16 && y == 0 {
                (number >> x & 1) as u8 * 255
            } else {
                90
            }])
        };
        image::GrayImage::from_fn(32, 32, levels)
            .save(at("images").join(name))
            .unwrap();
    }
    fs::write(at("openi-zh-prompt.json"), &table).unwrap();
    let (code, stdout, stderr) = run(folder.path(), &convert_args(".", &[]));
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains("corpus                 xrayglm"),
        "{stdout}"
    );
    let model = tiny_model();
    let args = [
        "check",
        "out/train.jsonl",
        "--val",
        "out/val.jsonl",
        "--model",
        text(&model),
    ];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(
        code,
        0,
        "{}{stderr}",
        stdout.chars().take(3000).collect::<String>()
    );
    let summary: Value =
        serde_json::from_slice(&fs::read(at("out/summary.json")).unwrap()).unwrap();
    let rows = |part: &str| summary[part]["rows"].as_u64().unwrap();
    assert_eq!(rows("train") + rows("val"), 6423);
    assert_eq!(
        (&summary["studies_in_both"], &summary["language"]),
        (&0.into(), &"chinese".into())
    );
    // The real tables of the collection, with the images that are there.
    fs::create_dir(at("tables")).unwrap();
    for name in ["indiana_reports.csv", "indiana_projections.csv"] {
        fs::copy(openi.join(name), at("tables").join(name)).unwrap();
    }
    let projections = fs::read_to_string(at("tables/indiana_projections.csv")).unwrap();
    for (number, line) in projections.lines().skip(1).enumerate() {
        let name = line.split(',').nth(1).unwrap();
        let levels = |x: u32, y: u32| {
            image::Luma([if x < 16 && y == 0 {
                (number >> x & 1) as u8 * 255
            } else {
                60
            }])
        };
        image::GrayImage::from_fn(32, 32, levels)
            .save(at("tables").join(name))
            .unwrap();
    }
    let args = ["convert", "tables", "--views", "all", "--output", "indiana"];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("rows read              3851"), "{stdout}");
    let args = [
        "check",
        "indiana/train.jsonl",
        "--val",
        "indiana/val.jsonl",
        "--model",
        text(&model),
    ];
    let (_, stdout, _) = run(folder.path(), &args);
    assert!(
        !stdout.contains("leak-study") && !stdout.contains("leak-image"),
        "{}",
        stdout.chars().take(3000).collect::<String>()
    );
}

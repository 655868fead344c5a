//! Data files as users have them: one row in every file, images from the web, several data sets with weights.

use std::{
    fs,
    io::{Read, Write},
    net::TcpListener,
    path::Path,
    thread,
};

use serde_json::Value;
use tempfile::{TempDir, tempdir};
use xray_qwen3vl::{
    dataset::{DataOptions, Dataset, EncodedSample, ImageStore},
    runtime::pipeline::TextAndImages,
};

use crate::{forms::parts, program, repository};

fn found(name: &str) -> String {
    let folder = repository().join("tests/fixtures/found/forms");
    folder.join(name).to_str().unwrap().to_owned()
}

/// Options with a store of its own, which may ask this machine for images.
fn options(store: &TempDir) -> DataOptions {
    DataOptions {
        allow_image_urls: true,
        store: ImageStore::new(store.path(), |address| address.is_loopback()),
        ..DataOptions::default()
    }
}

fn first(name: &str, options: &DataOptions, parts: &TextAndImages) -> EncodedSample {
    let data = Dataset::open_with(name, options);
    let data = data.unwrap_or_else(|error| panic!("{error}"));
    data.encode(0, parts, 512)
        .unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn the_same_row_is_the_same_sample_in_every_file() {
    let (parts, store) = (parts(), tempdir().unwrap());
    let options = options(&store);
    let plain = first(&found("std.jsonl"), &options, &parts);
    for name in [
        // Encodings and packings.
        "BOM.jsonl",
        "CRLF.jsonl",
        "CR_only.jsonl",
        "GB18030.jsonl",
        "utf16.jsonl",
        "utf16_be.jsonl",
        "utf16_without_mark.jsonl",
        "gz.jsonl.gz",
        // Files of rows.
        "json_list_of_messages.json",
        "json_list_in_jsonl.jsonl",
        "jsonl_in_json.json",
        "pretty_printed_objects.jsonl",
        "pretty_list.json",
        "data_key.json",
        "csv_query_response_images.csv",
        "pandas_lists.csv",
        "semicolon.csv",
        "table.csv.gz",
        "hf_images.parquet",
        "query_response_gzip.parquet",
        // Rows of other trainers.
        "alpaca.jsonl",
        "query_response_images.jsonl",
        "question_answer.jsonl",
        "sharegpt_images_LLaMA_Factory.jsonl",
        "role_model.jsonl",
        "roles_human_gpt.jsonl",
        // Images in the row.
        "base64_data_uri.jsonl",
        "raw_base64.jsonl",
        "dict_bytes_and_path.jsonl",
        "bytes_as_numbers.jsonl",
    ] {
        // The texts of some are others, their answers are one.
        let sample = first(&found(name), &options, &parts);
        assert_eq!(sample.images, plain.images, "{name}");
        if !name.starts_with("csv_query") {
            assert_eq!(sample.input_ids, plain.input_ids, "{name}");
            assert_eq!(sample.labels, plain.labels, "{name}");
        }
    }
    let zstd = first(&found("question_answer_zstd.parquet"), &options, &parts);
    assert_eq!(zstd.labels, plain.labels);
    assert_ne!(zstd.images, plain.images);
}

/// Answers every request with the picture of the fixtures.
fn image_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let picture = fs::read(found("a0.png")).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).unwrap();
            let head = format!(
                "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n",
                picture.len()
            );
            let _ = stream.write_all(head.as_bytes());
            let _ = stream.write_all(&picture);
        }
    });
    address
}

#[test]
fn an_image_of_an_address_is_fetched_where_that_is_allowed() {
    let (parts, store, folder) = (parts(), tempdir().unwrap(), tempdir().unwrap());
    let plain = fs::read_to_string(found("std.jsonl")).unwrap();
    let url = format!("{}/a.png?key=secret", image_server());
    let path = folder.path().join("url.jsonl");
    fs::write(&path, plain.replace("a0.png", &url)).unwrap();
    let name = path.to_str().unwrap();
    let fetching = options(&store);
    let sample = first(name, &fetching, &parts);
    assert_eq!(sample, first(&found("std.jsonl"), &fetching, &parts));
    let data = Dataset::open_with(name, &fetching).unwrap();
    assert!(data.remarks()[0].contains("from addresses on the web"));
    let refusing = DataOptions {
        allow_image_urls: false,
        ..fetching
    };
    let error = Dataset::open_with(name, &refusing).unwrap_err().to_string();
    for words in ["row 1", "images[0]", "--allow-image-urls"] {
        assert!(error.contains(words), "{words}: {error}");
    }
    assert!(!error.contains("secret"), "{error}");
    // The program asks public addresses alone.
    let output = program(folder.path(), &["check", "url.jsonl", "--allow-image-urls"])
        .env("XRAY_CACHE_DIR", store.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(said.contains("could not be fetched"), "{said}");
    assert!(!said.contains("secret"), "{said}");
}

#[test]
fn a_converted_file_needs_no_cache() {
    let (store, folder) = (tempdir().unwrap(), tempdir().unwrap());
    let parquet = found("hf_images.parquet");
    let args = ["convert", &parquet, "--output", "out", "--val-ratio", "0"];
    let output = program(folder.path(), &args)
        .env("XRAY_CACHE_DIR", store.path())
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    drop(store);
    let out = folder.path().join("out");
    let text = fs::read_to_string(out.join("train.jsonl")).unwrap();
    let rows: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rows.len(), 2);
    let inside = |row: &Value| {
        let name = row["images"][0].as_str().unwrap();
        name.starts_with("images/") && out.join(name).is_file()
    };
    assert!(rows.iter().any(inside), "{text}");
}

/// A run of two steps on several data sets; the exit code and what was printed.
fn train(folder: &Path, data: &str, more: &[&str]) -> (i32, String) {
    let args = [
        "train",
        "--train-data",
        data,
        "--val-data",
        "one=a.jsonl,two=b.jsonl",
        "--output-dir",
        "run",
        "--device",
        "cpu",
        "--set",
        "max_steps=2",
        "--set",
        "gradient_accumulation_steps=2",
    ];
    let output = program(folder, &[&args[..], more].concat())
        .env("XRAY_CACHE_DIR", folder.join("cache"))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap_or(-1), said)
}

#[test]
fn several_data_sets_train_with_their_weights_and_resume_as_they_were() {
    let folder = tempdir().unwrap();
    for (from, to) in [
        ("a0.png", "a0.png"),
        ("std.jsonl", "a.jsonl"),
        ("base64_data_uri.jsonl", "b.jsonl"),
    ] {
        fs::copy(found(from), folder.path().join(to)).unwrap();
    }
    let (code, said) = train(folder.path(), "a.jsonl:2,b.jsonl", &[]);
    assert_eq!(code, 0, "{said}");
    let metrics = fs::read_to_string(folder.path().join("run/metrics.jsonl")).unwrap();
    for key in ["eval_loss.one", "eval_token_acc.two", "\"eval_loss\""] {
        assert!(metrics.contains(key), "{key}: {metrics}");
    }
    // The same data sets are the same run; another weight, or other bytes in a row, is another.
    let resumed = |data: &str| train(folder.path(), data, &["--resume", "auto"]);
    let (code, said) = resumed("a.jsonl:2,b.jsonl");
    assert_eq!(code, 0, "{said}");
    let (code, said) = resumed("a.jsonl:3,b.jsonl");
    assert_eq!(code, 1, "{said}");
    assert!(
        said.contains("a.jsonl:3,b.jsonl") && said.contains("training data has changed"),
        "{said}"
    );
    fs::copy(found("raw_base64.jsonl"), folder.path().join("b.jsonl")).unwrap();
    let (code, said) = resumed("a.jsonl:2,b.jsonl");
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("training data has changed"), "{said}");
}

#[test]
fn a_weight_repeats_rows_and_errors_name_the_file_of_the_row() {
    let store = tempdir().unwrap();
    let options = options(&store);
    let (a, b) = (found("std.jsonl"), found("hf_images.parquet"));
    let data = Dataset::open_with(&format!("zh={a}:2,{b}#1"), &options).unwrap();
    assert_eq!(data.len(), 3);
    assert_eq!((data.row(0), data.row(1)), (1, 1));
    assert_eq!(data.text(0), data.text(1));
    let files = data.image_files();
    assert!(files[0].1.starts_with("zh: "), "{files:?}");
    let split: Vec<_> = data.split_by_name();
    let split = split.iter().map(|(name, data)| (name.as_str(), data.len()));
    assert_eq!(split.collect::<Vec<_>>(), [("zh", 2), (b.as_str(), 1)]);
    // Files of one data set, as the hub keeps large ones.
    let shards = found("query_response*.parquet");
    let shards = Dataset::open_with(&format!("{shards},{a}"), &options).unwrap();
    assert_eq!((shards.len(), shards.split_by_name().len()), (2, 2));
    let none = Dataset::open(&found("no_such*.parquet")).unwrap_err();
    assert!(none.to_string().contains("matches no file"), "{none}");
    let twice = Dataset::open_with(&format!("{a}:2"), &options).unwrap();
    assert_ne!(
        twice.fingerprint(),
        Dataset::open(&a).unwrap().fingerprint()
    );
    let missing = format!("{a},{}", found("missing_image_file.jsonl"));
    let data = Dataset::open_with(&missing, &options).unwrap();
    let error = data.encode(1, &parts(), 512).unwrap_err().to_string();
    assert!(
        error.contains("missing_image_file.jsonl`, row 1"),
        "{error}"
    );
}

#[test]
fn columns_of_other_names_are_read_by_every_command() {
    let folder = tempdir().unwrap();
    for name in ["a0.png", "chinese_keys.jsonl"] {
        fs::copy(found(name), folder.path().join(name)).unwrap();
    }
    let columns = "images=影像,response=报告";
    let said = |args: &[&str]| {
        let output = program(folder.path(), args).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        (output.status.code().unwrap_or(-1), text + &errors)
    };
    let (code, text) = said(&["check", "chinese_keys.jsonl", "--columns", columns]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = said(&["check", "chinese_keys.jsonl", "--columns", "images=图"]);
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("no row has `图`") && text.contains("`影像`"),
        "{text}"
    );
    let (code, text) = said(&["check", "chinese_keys.jsonl", "--columns", "image=x"]);
    assert_eq!(code, 2, "{text}");
    assert!(text.contains("did you mean `images`?"), "{text}");
    // Of several data sets one is enough that has a column.
    let mixed = DataOptions {
        columns: columns.parse().unwrap(),
        ..DataOptions::default()
    };
    let mixture = format!("{},{}", found("chinese_keys.jsonl"), found("std.jsonl"));
    assert_eq!(Dataset::open_with(&mixture, &mixed).unwrap().len(), 2);
    let none = Dataset::open_with(&found("std.jsonl"), &mixed).unwrap_err();
    assert!(none.to_string().contains("no row has `影像`"), "{none}");
    let args = [
        "convert",
        "chinese_keys.jsonl",
        "--columns",
        columns,
        "--output",
        "out",
        "--val-ratio",
        "0",
    ];
    let (code, text) = said(&args);
    assert_eq!(code, 0, "{text}");
    let rows = fs::read_to_string(folder.path().join("out/train.jsonl")).unwrap();
    assert!(rows.contains("左侧中肺野实变。"), "{rows}");
}

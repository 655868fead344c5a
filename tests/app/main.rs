//! The program from outside: exit codes, both outputs and the files it leaves, in fresh folders.
//!
//! Reports come from the tiny model of the repository on the CPU; a build without the CPU backend
//! has nothing to run here.
#![cfg(feature = "flex")]
#![recursion_limit = "512"]

mod adapters;
mod architecture;
mod bad_input;
mod bad_model;
mod bench;
mod calibrate;
mod clean;
mod corpora;
mod corpora_tables;
mod data_files;
mod data_sets;
mod data_tools;
mod dicom;
mod drafts;
mod eval;
mod eval_judge;
mod forms;
mod found_pictures;
mod gguf;
mod hub;
mod hub_pull;
mod hub_server;
mod infer;
mod infer_data;
mod infer_files;
mod label;
mod layers;
mod merge_plan;
mod picture_forms;
mod preview;
mod quantize;
mod readme;
mod refusal;
mod serve;
mod serve_api;
mod serve_clients;
mod serve_completions;
mod serve_fetch;
mod serve_findings;
mod serve_keys;
mod serve_openapi;
mod serve_responses;
mod serve_safety;
mod serve_studies;
mod serve_tools;
mod server;
mod tools;
mod train;
mod train_cluster;
mod train_default;
mod train_devices;
mod train_form;
mod train_kill;
mod train_objectives;
mod train_quantised;
mod train_resume;

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::Value;

/// A run that takes longer hangs.
const LONGEST_RUN: Duration = Duration::from_secs(600);

/// Root of the repository.
fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The model of a run without `--model`.
fn tiny_model() -> PathBuf {
    repository().join("model/tiny")
}

/// The image of a run without images.
fn demo_image() -> PathBuf {
    repository().join("data/sample/demo.png")
}

/// A small picture among the reference fixtures.
fn fixture_image(name: &str) -> PathBuf {
    repository().join("tests/fixtures/parity/images").join(name)
}

/// The question of a run without `--prompt`.
fn cli_prompt() -> &'static str {
    xray_qwen3vl::commands::infer::DEFAULT_PROMPT
}

/// A path as an argument.
fn text(path: &Path) -> &str {
    path.to_str().expect("paths of these tests are UTF-8")
}

/// The program with `args`, to be started in `folder`.
fn program(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_xray-qwen3vl"));
    command
        .args(args)
        .current_dir(folder)
        .env_remove("RUST_BACKTRACE")
        .env_remove("XRAY_API_KEY")
        .env_remove("XRAY_STORE")
        .env_remove("XRAY_STORE_KEY")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Runs the program to its end: exit code (-1 after a signal), stdout, stderr.
fn run(folder: &Path, args: &[&str]) -> (i32, String, String) {
    fn read_aside(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                pipe.read_to_end(&mut bytes).expect("a pipe can be read");
            }
            String::from_utf8(bytes).expect("the program writes UTF-8")
        })
    }
    let mut child = program(folder, args).spawn().expect("the program starts");
    let stdout = read_aside(child.stdout.take());
    let stderr = read_aside(child.stderr.take());
    let started = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            break status;
        }
        if started.elapsed() > LONGEST_RUN {
            let _ = child.kill();
            panic!("{args:?} still runs after {LONGEST_RUN:?}");
        }
        thread::sleep(Duration::from_millis(5));
    };
    (
        status.code().unwrap_or(-1),
        stdout.join().expect("stdout was read"),
        stderr.join().expect("stderr was read"),
    )
}

/// Arguments of `infer`, on the CPU unless they name a device.
fn infer_args<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let mut all = vec!["infer"];
    if !args.contains(&"--device") {
        all.extend(["--device", "cpu"]);
    }
    all.extend(args);
    all
}

/// Runs `infer`; see [`run`] and [`infer_args`].
fn infer(folder: &Path, args: &[&str]) -> (i32, String, String) {
    run(folder, &infer_args(args))
}

/// Runs `infer`, which must end well; gives stdout and stderr.
fn infer_well(folder: &Path, args: &[&str]) -> (String, String) {
    let (code, stdout, stderr) = infer(folder, args);
    assert_eq!(code, 0, "{args:?}\nstdout: {stdout}\nstderr: {stderr}");
    (stdout, stderr)
}

/// The JSON objects of a text, one a line.
fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| {
            serde_json::from_str(line).unwrap_or_else(|error| panic!("{error} in line: {line}"))
        })
        .collect()
}

/// The records of a batch run's file.
fn records(path: &Path) -> Vec<Value> {
    let text = fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()));
    assert!(text.ends_with('\n'), "the last line has no end: {text}");
    json_lines(&text)
}

/// A text of a record.
fn field<'a>(record: &'a Value, key: &str) -> &'a str {
    record[key]
        .as_str()
        .unwrap_or_else(|| panic!("`{key}` is no text in {record}"))
}

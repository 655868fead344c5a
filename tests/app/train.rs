//! `train`: what a run leaves, what ends it before its time, and that its results can be used.
//!
//! Runs start from random weights, take some 20 steps on synthetic studies and last a second or two.

mod saved;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::{TempDir, tempdir};
use xray_qwen3vl::train::config::TrainConfig;

use crate::{infer_well, json_lines, records, run, text, tiny_model};

/// A run of 20 steps, 13 an epoch, with dropout.
const SETTINGS: &str = r#"
model = "model/tiny"
train_data = "phantom:11:0..52:house"
output_dir = "run"
device = ["cpu"]
dtype = "f32"
seed = 5
lora_dropout = 0.1
num_train_epochs = 10.0
max_steps = 20
per_device_train_batch_size = 2
gradient_accumulation_steps = 2
learning_rate = 1e-3
gradient_checkpointing = false
save_steps = 5
save_total_limit = 10
"#;

/// What a clock or the system measured: no two runs agree in it.
const MEASURED: [&str; 5] = [
    "samples_per_second",
    "tokens_per_second",
    "memory_gib",
    "memory_of",
    "eval_seconds",
];

/// A fresh folder with the settings of a run; the run's own folder will be `run` in it.
pub(crate) fn workspace() -> TempDir {
    let folder = tempdir().unwrap();
    fs::write(folder.path().join("run.toml"), SETTINGS).unwrap();
    folder
}

/// Arguments of a run in a [`workspace`].
pub(crate) fn train_args<'a>(args: &[&'a str]) -> Vec<&'a str> {
    let always = [
        "train",
        "--config",
        "run.toml",
        "--random-init",
        "--no-tui",
        "--show",
        "0",
    ];
    [&always[..], args].concat()
}

/// Runs `train`: exit code, stdout, stderr.
pub(crate) fn train(folder: &Path, args: &[&str]) -> (i32, String, String) {
    run(folder, &train_args(args))
}

/// Runs `train`, which must end well; gives stdout and stderr.
pub(crate) fn train_well(folder: &Path, args: &[&str]) -> (String, String) {
    let (code, stdout, stderr) = train(folder, args);
    assert_eq!(code, 0, "{args:?}\nstdout: {stdout}\nstderr: {stderr}");
    (stdout, stderr)
}

/// Runs `train`, which must end with exit code 1 and one sentence; gives the sentence.
pub(crate) fn train_badly(folder: &Path, args: &[&str]) -> String {
    let (code, stdout, stderr) = train(folder, args);
    assert_eq!(code, 1, "{args:?}\nstdout: {stdout}\nstderr: {stderr}");
    assert_eq!(stdout, "", "{args:?}");
    let errors: Vec<&str> = stderr
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "{args:?}: {stderr}");
    assert_eq!(stderr.lines().last(), Some(errors[0]), "{args:?}: {stderr}");
    for word in ["panicked", "internal error"] {
        assert!(!stderr.contains(word), "{args:?}: {stderr}");
    }
    errors[0].to_string()
}

/// Fails unless `message` holds every one of `pieces`.
pub(crate) fn assert_says(message: &str, pieces: &[&str]) {
    for piece in pieces {
        assert!(message.contains(piece), "no `{piece}` in: {message}");
    }
}

/// All files below a folder, by their paths in it.
#[derive(PartialEq)]
pub(crate) struct Files(BTreeMap<PathBuf, Vec<u8>>);

impl Files {
    pub(crate) fn read(root: &Path) -> Self {
        fn gather(root: &Path, folder: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    gather(root, &path, files);
                } else {
                    let name = path.strip_prefix(root).unwrap().to_path_buf();
                    files.insert(name, fs::read(&path).unwrap());
                }
            }
        }
        let mut files = BTreeMap::new();
        gather(root, root, &mut files);
        Self(files)
    }

    pub(crate) fn write(&self, root: &Path) {
        for (name, bytes) in &self.0 {
            let path = root.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    fn get(&self, name: &str) -> &[u8] {
        self.0
            .get(Path::new(name))
            .unwrap_or_else(|| panic!("there is no `{name}`"))
    }
}

/// A [`workspace`] after a run that nothing disturbed.
pub(crate) fn undisturbed() -> &'static Files {
    static FILES: OnceLock<Files> = OnceLock::new();
    FILES.get_or_init(|| {
        let folder = workspace();
        train_well(folder.path(), &[]);
        Files::read(folder.path())
    })
}

/// A [`workspace`] of its own after a run that nothing disturbed.
pub(crate) fn finished() -> TempDir {
    let folder = tempdir().unwrap();
    undisturbed().write(folder.path());
    folder
}

/// Rows of a `metrics.jsonl` without what no two runs agree in.
fn repeatable(mut rows: Vec<Value>) -> Vec<Value> {
    for row in &mut rows {
        row.as_object_mut()
            .unwrap()
            .retain(|key, _| !MEASURED.contains(&key.as_str()));
    }
    rows
}

/// Fails unless the run of `folder` ended as the undisturbed one, bit for bit.
pub(crate) fn assert_same_end(folder: &Path, case: &str) {
    let whole = undisturbed();
    for name in ["adapter_model.safetensors", "optimizer.safetensors"] {
        let name = format!("run/checkpoint-20/{name}");
        let bytes = fs::read(folder.join(&name)).unwrap();
        assert!(bytes == whole.get(&name), "{case}: `{name}` differs");
    }
    let expected = std::str::from_utf8(whole.get("run/metrics.jsonl")).unwrap();
    assert_eq!(
        repeatable(records(&folder.join("run/metrics.jsonl"))),
        repeatable(json_lines(expected)),
        "{case}"
    );
}

/// Steps whose checkpoints a run folder holds; nothing half written may be there.
pub(crate) fn saved_steps(run: &Path) -> Vec<u64> {
    let mut steps = Vec::new();
    for entry in fs::read_dir(run).unwrap() {
        let name = entry.unwrap().file_name().into_string().unwrap();
        assert!(!name.contains(".tmp-"), "`{name}` was left behind");
        if let Some(step) = name.strip_prefix("checkpoint-") {
            steps.push(step.parse().unwrap());
        }
    }
    steps.sort_unstable();
    steps
}

/// Steps of the rows that hold a training loss.
pub(crate) fn trained_steps(run: &Path) -> Vec<u64> {
    records(&run.join("metrics.jsonl"))
        .iter()
        .filter(|row| row.get("loss").is_some())
        .map(|row| row["step"].as_u64().unwrap())
        .collect()
}

/// A small data set as files: `data/samples.jsonl` with 24 studies.
pub(crate) fn write_data(folder: &Path) {
    let args = [
        "phantoms", "--output", "data", "--count", "24", "--seed", "3", "--plain",
    ];
    let (code, _, stderr) = run(folder, &args);
    assert_eq!(code, 0, "{stderr}");
}

/// Tensors of a file by name, as bytes.
pub(crate) fn tensors(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let bytes = fs::read(path).unwrap();
    SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_string(), view.data().to_vec()))
        .collect()
}

pub(crate) fn floats(bytes: &[u8]) -> impl Iterator<Item = f32> {
    bytes
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
}

#[test]
fn a_run_leaves_settings_measurements_curves_and_facts() {
    let folder = finished();
    let run = folder.path().join("run");
    assert_eq!(saved_steps(&run), [5, 10, 15, 20]);

    let config = TrainConfig::from_file(&run.join("config.toml")).unwrap();
    config.validate().unwrap();
    assert_eq!((config.seed, config.max_steps), (5, 20));
    assert_eq!(config.lora_dropout, 0.1);

    let facts: Value = serde_json::from_slice(&fs::read(run.join("run.json")).unwrap()).unwrap();
    assert_eq!(facts["seed"], 5);
    assert_eq!(facts["data"]["train"], "phantom:11:0..52:house");

    let rows = records(&run.join("metrics.jsonl"));
    assert_eq!(trained_steps(&run), (1..=20).collect::<Vec<u64>>());
    assert_eq!(rows.len(), 20, "without validation there are no other rows");
    for row in &rows {
        for key in ["loss", "token_acc", "learning_rate", "grad_norm", "epoch"] {
            assert!(row[key].as_f64().is_some(), "no `{key}` in {row}");
        }
    }
    for row in &rows {
        assert!(row["memory_gib"].as_f64().unwrap() > 0.0, "{row}");
        assert_eq!(row["memory_of"], "host", "the CPU has no memory of its own");
    }
    let loss = |row: &Value| row["loss"].as_f64().unwrap();
    assert!(loss(&rows[19]) < loss(&rows[0]), "nothing was learnt");

    // Thirteen steps an epoch, each in a log of its own.
    for (epoch, steps) in [(1, 13), (2, 7)] {
        let log = run.join(format!("train/epoch-{epoch}/Loss.log"));
        assert_eq!(fs::read_to_string(log).unwrap().lines().count(), steps);
    }
    let svg = fs::read_to_string(run.join("training.svg")).unwrap();
    assert!(svg.contains("<svg") && svg.trim_end().ends_with("</svg>"));
    let events: Vec<PathBuf> = fs::read_dir(run.join("tensorboard"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert_eq!(events.len(), 1, "{events:?}");
    let bytes = fs::read(&events[0]).unwrap();
    for piece in [
        "brain.Event:2",
        "train/loss",
        "train/learning_rate",
        "train/memory_gib",
    ] {
        let found = bytes
            .windows(piece.len())
            .any(|window| window == piece.as_bytes());
        assert!(found, "TensorBoard's file lacks `{piece}`");
    }
}

#[test]
fn an_unreadable_image_costs_nothing_that_was_learnt() {
    let folder = workspace();
    write_data(folder.path());
    let image = folder.path().join("data/images/0005.png");
    let good = fs::read(&image).unwrap();
    fs::write(&image, &good[..good.len() / 2]).unwrap();
    let args = ["--train-data", "data/samples.jsonl"];
    let resume = ["--train-data", "data/samples.jsonl", "--resume", "auto"];
    let message = train_badly(folder.path(), &args);
    assert_says(
        &message,
        &["data/samples.jsonl`", "row 6", "`images/0005.png`"],
    );

    // The order of the rows, a function of the seed, brings the image in the first epoch of 6 steps,
    // but not in the first step.
    let run = folder.path().join("run");
    let steps = trained_steps(&run);
    assert!((1..6).contains(&steps.len()), "{steps:?}");
    assert_eq!(saved_steps(&run), [steps.len() as u64]);

    // Nothing has been learnt from the broken image: mended, it is no other run.
    fs::write(&image, good).unwrap();
    let (_, stderr) = train_well(folder.path(), &resume);
    assert_says(
        &stderr,
        &["1 picture, first `images/0005.png`, which no step has learnt from yet"],
    );
    assert_eq!(trained_steps(&run), (1..=20).collect::<Vec<u64>>());

    let other = folder.path().join("data/images/0007.png");
    let own = fs::read(&other).unwrap();
    fs::copy(&image, &other).unwrap();
    let message = train_badly(folder.path(), &resume);
    assert_says(
        &message,
        &["1 of the images that were learnt from", "`images/0007.png`"],
    );
    fs::write(&other, own).unwrap();

    let rows = folder.path().join("data/samples.jsonl");
    let changed = fs::read_to_string(&rows).unwrap().replace('。', "！");
    fs::write(&rows, changed).unwrap();
    let message = train_badly(folder.path(), &resume);
    assert_says(&message, &["the training data has changed"]);
}

#[test]
fn a_loss_that_is_no_number_ends_the_run() {
    let folder = workspace();
    // The rate of the first step is 0, that of the second ruins the weights.
    let sets = ["learning_rate=1e30", "warmup_ratio=0.1", "save_steps=1"];
    let args: Vec<&str> = sets.iter().flat_map(|pair| ["--set", *pair]).collect();
    let message = train_badly(folder.path(), &args);
    // The newest checkpoint holds ruined weights; the one before it is named.
    assert_says(&message, &["step 3:", "learning_rate", "run/checkpoint-1`"]);
    let rows: Vec<usize> = message
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'))
        .map(|(rows, _)| rows.split(", ").map(|row| row.parse().unwrap()).collect())
        .unwrap_or_else(|| panic!("no rows in: {message}"));
    assert_eq!(rows.len(), 4, "{message}");
    assert!(rows.iter().all(|row| (1..=52).contains(row)), "{message}");
    let run = folder.path().join("run");
    assert_eq!(trained_steps(&run), [1, 2]);
    assert_eq!(saved_steps(&run), [1, 2]);
}

#[test]
fn a_sample_that_is_too_long_is_named_or_left_out() {
    let folder = workspace();
    write_data(folder.path());
    let path = folder.path().join("data/samples.jsonl");
    let mut rows = records(&path);
    let answer = rows[8]["messages"][1]["content"].as_str().unwrap();
    rows[8]["messages"][1]["content"] = answer.repeat(40).into();
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    fs::write(&path, lines).unwrap();
    let args = [
        "--train-data",
        "data/samples.jsonl",
        "--set",
        "max_length=128",
    ];
    let message = train_badly(folder.path(), &args);
    assert_says(
        &message,
        &[
            "data/samples.jsonl`",
            "row 9",
            "tokens",
            "max_length 128",
            "skip",
        ],
    );
    let tokens: usize = message
        .split_once("row 9: ")
        .and_then(|(_, rest)| rest.split(' ').next())
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("no number of tokens in: {message}"));
    assert!(tokens > 128, "{message}");

    let skip = [&args[..], &["--set", "overlong=skip"]].concat();
    let skip = [&skip[..], &["--set", "output_dir=skipped"]].concat();
    train_well(folder.path(), &skip);
    let steps = trained_steps(&folder.path().join("skipped"));
    assert_eq!(steps, (1..=20).collect::<Vec<u64>>());
}

#[test]
fn a_run_is_scored_before_its_first_step_and_with_other_images() {
    let folder = workspace();
    let mut args = vec!["--val-data", "phantom:4:0..4:house", "--eval-generate", "4"];
    for pair in [
        "max_steps=3",
        "eval_max_new_tokens=4",
        "eval_steps=2",
        "save_steps=2",
    ] {
        args.extend(["--set", pair]);
    }
    let (stdout, _) = train_well(folder.path(), &args);
    let run = folder.path().join("run");
    let validations = || -> Vec<Value> {
        let rows = records(&run.join("metrics.jsonl"));
        rows.into_iter()
            .filter(|row| row.get("eval_loss").is_some())
            .collect()
    };
    let steps = |rows: &[Value]| -> Vec<u64> {
        rows.iter()
            .map(|row| row["step"].as_u64().unwrap())
            .collect()
    };
    let rows = validations();
    assert_eq!(steps(&rows), [0, 2, 3]);
    let result = fs::read(run.join("result.json")).unwrap();
    let result: Value = serde_json::from_slice(&result).unwrap();
    assert_eq!(
        (&result["ending"], &result["step"]),
        (&"done".into(), &3.into())
    );
    let held_out = &result["held_out"];
    assert_eq!(held_out["reports"], 4);
    for key in ["eval_loss", "eval_finding_f1", "eval_finding_side_zone_f1"] {
        assert_eq!(held_out["before"][key], rows[0][key], "{key}");
        assert_eq!(held_out["after"][key], rows[2][key], "{key}");
    }
    assert!(
        held_out["images_swapped"]["eval_finding_f1"]
            .as_f64()
            .is_some()
    );
    assert_says(
        &stdout,
        &["before", "images swapped", "finding F1, side and zone"],
    );
    assert_says(
        &stdout,
        &[
            "xray-qwen3vl infer --model ",
            "model/tiny --adapter run/checkpoint-3",
        ],
    );
    // The config was given: it needs no mention of another.
    assert!(!stdout.contains("with the real model"), "{stdout}");

    let resume = [&args[..], &["--resume", "run/checkpoint-2"]].concat();
    train_well(folder.path(), &resume);
    assert_eq!(steps(&validations()), [0, 2, 3]);
}

#[test]
fn progress_lines_come_every_logging_steps_with_the_time_left() {
    let folder = workspace();
    let (stdout, stderr) = train_well(folder.path(), &["--set", "logging_steps=8"]);
    let lines: Vec<&str> = stderr
        .lines()
        .filter(|line| line.starts_with("step "))
        .collect();
    let heads: Vec<&str> = lines
        .iter()
        .map(|line| line.split("  ").next().unwrap())
        .collect();
    assert_eq!(
        heads,
        ["step 1/20", "step 8/20", "step 16/20", "step 20/20"]
    );
    for line in lines {
        assert_says(line, &["elapsed", "left"]);
    }
    assert_says(&stdout, &["done: 20 steps in 0:"]);
    let sets = [
        "--dtype",
        "bf16",
        "--set",
        "max_steps=1",
        "--set",
        "output_dir=half",
    ];
    let (stdout, stderr) = train_well(folder.path(), &sets);
    assert_says(
        &stderr,
        &["note: bf16 on the CPU is slower", "1 optimizer step,"],
    );
    assert_says(&stdout, &["done: 1 step in"]);
}

#[test]
fn a_flag_or_key_that_is_none_is_answered_with_what_to_write() {
    let folder = workspace();
    for (args, says) in [
        (
            ["--learning-rate", "1e-4"],
            "write `--set learning_rate=1e-4`",
        ),
        (
            ["--set", "learnin_rate=1e-4"],
            "did you mean `learning_rate`?",
        ),
        (
            ["--set", "target_modules=q_proj"],
            "a list of names such as [\"q_proj\"]",
        ),
    ] {
        let (code, stdout, stderr) = train(folder.path(), &args);
        assert_eq!((code, stdout.as_str()), (2, ""), "{args:?}: {stderr}");
        assert_says(&stderr, &["error: ", says]);
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
    }
}

#[test]
fn every_key_is_explained_in_both_languages() {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let english = fs::read_to_string(repository.join("configs/openi-lora.toml")).unwrap();
    let chinese = fs::read_to_string(repository.join("docs/config.zh.md")).unwrap();
    let keys = TrainConfig::keys();
    assert!(keys.len() > 50, "{keys:?}");
    for key in &keys {
        let mut lines = english.lines().map(|line| line.trim_start_matches("# "));
        let is_set = lines.any(|line| line.starts_with(&format!("{key} = ")));
        assert!(is_set, "configs/openi-lora.toml lacks `{key}`");
        let row = format!("| `{key}` | ");
        assert!(chinese.contains(&row), "docs/config.zh.md lacks `{key}`");
    }
    assert_eq!(chinese.matches("\n| `").count(), keys.len());
}

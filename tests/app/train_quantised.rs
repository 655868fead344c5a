//! `train` beside quantised weights (QLoRA), and with weights in f16: runs from the shell on the shipped model.

use std::{fs, path::Path, thread, time::Instant};

use serde_json::Value;

use crate::{
    LONGEST_RUN, field, program, records, run, text, tiny_model,
    train::{assert_says, floats, saved_steps, tensors, workspace},
    train_resume::rows_so_far,
};

/// Arguments of a run of the workspace's settings on the shipped model.
fn args<'a>(model: &'a str, output: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let always = [
        "train", "--config", "run.toml", "--no-tui", "--show", "0", "--model", model, "--set",
        output,
    ];
    [&always[..], more].concat()
}

fn train_well(folder: &Path, output: &str, more: &[&str]) -> (String, String) {
    let (model, output) = (tiny_model(), format!("output_dir={output}"));
    let (code, stdout, stderr) = run(folder, &args(text(&model), &output, more));
    assert_eq!(code, 0, "{more:?}\nstdout: {stdout}\nstderr: {stderr}");
    (stdout, stderr)
}

fn losses(run: &Path) -> Vec<f64> {
    let rows = records(&run.join("metrics.jsonl"));
    let losses = rows.iter().filter_map(|row| row.get("loss")?.as_f64());
    losses.collect()
}

fn json_of(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn quantised_runs_learn_beside_the_float_run_and_their_adapters_say_so() {
    let folder = workspace();
    let at = |name: &str| folder.path().join(name);
    let model = tiny_model();
    let model = text(&model);
    let fixed = ["--set", "lora_dropout=0", "--set", "max_steps=8"];
    let with = |more: &[&'static str]| [&fixed[..], more].concat();
    train_well(folder.path(), "float", &with(&[]));
    let want = losses(&at("float"));
    for (format, most) in [("int8", 0.05), ("int4", 0.3)] {
        let key: &'static str = match format {
            "int8" => "quantize=int8",
            _ => "quantize=int4",
        };
        let validate = [
            "--set",
            key,
            "--val-data",
            "phantom:12:0..6:house",
            "--eval-generate",
            "2",
            "--set",
            "eval_max_new_tokens=8",
            "--set",
            "eval_steps=8",
        ];
        let (stdout, stderr) = train_well(folder.path(), format, &with(&validate));
        assert_says(&stderr, &["beside weights quantised as int"]);
        assert_says(&stdout, &[&format!("--quantize {format} --adapter")]);
        let ours = losses(&at(format));
        assert_eq!(ours.len(), 8);
        assert!(ours[7] < ours[0], "{ours:?}");
        for (step, (ours, want)) in ours.iter().zip(&want).enumerate() {
            // A trained model's loss of about 7: the weights round.
            assert!(
                (ours - want).abs() < most,
                "{format} step {step}: {ours} {want}"
            );
        }
        let facts = json_of(&at(format).join("run.json"));
        assert!(field(&facts, "quantization").starts_with(format), "{facts}");
        // Frozen: the adapter alone is saved, with what it was trained on.
        let checkpoint = at(format).join("checkpoint-8");
        let base = json_of(&checkpoint.join("base_fingerprint.json"));
        assert!(field(&base, "quantization").starts_with(format), "{base}");
        assert_eq!(field(&base, "sha256"), field(&facts["data"], "base"));
        let result = json_of(&at(format).join("result.json"));
        assert!(result["held_out"]["images_swapped"].is_object(), "{result}");
    }

    // The adapter writes beside the same weights without a remark, and beside others with one.
    let infer = |more: &[&str]| {
        let always = [
            "infer",
            "--device",
            "cpu",
            "--model",
            model,
            "--adapter",
            "int4/checkpoint-8",
            "--max-new-tokens",
            "4",
        ];
        let (code, _, stderr) = run(folder.path(), &[&always[..], more].concat());
        assert_eq!(code, 0, "{stderr}");
        stderr
    };
    let remark = "was trained beside weights quantised as int4";
    assert!(!infer(&["--quantize", "int4"]).contains(remark));
    assert_says(
        &infer(&["--quantize", "int8"]),
        &[remark, "quantised as int8"],
    );
    assert_says(&infer(&[]), &[remark, "not quantised"]);
    // It is merged into the floats, and that is said.
    let merge = [
        "merge",
        "--device",
        "cpu",
        "--model",
        model,
        "--adapter",
        "int4/checkpoint-8",
        "--output",
        "merged",
    ];
    let (code, stdout, stderr) = run(folder.path(), &merge);
    assert_eq!(code, 0, "{stderr}");
    assert_says(&stdout, &[remark, "wrote `merged`"]);
    // A run is evaluated beside its own weights; others are told in the results.
    let eval = |more: &[&str]| {
        let always = [
            "eval",
            "--device",
            "cpu",
            "--run",
            "int4",
            "--limit",
            "2",
            "--max-new-tokens",
            "4",
            "--json",
            "eval.json",
        ];
        let (code, _, stderr) = run(folder.path(), &[&always[..], more].concat());
        assert_eq!(code, 0, "{stderr}");
        (stderr, fs::read_to_string(at("eval.json")).unwrap())
    };
    let (stderr, json) = eval(&[]);
    assert_says(&stderr, &["quantised as in the run: int4"]);
    assert!(!json.contains(remark), "{json}");
    let (_, json) = eval(&["--quantize", "int8"]);
    assert_says(&json, &[remark]);
}

#[test]
fn a_quantised_folder_trains_as_the_key_does_and_full_training_is_refused() {
    let folder = workspace();
    let model = tiny_model();
    let quantize = [
        "quantize",
        "--device",
        "cpu",
        "--bits",
        "4",
        "--model",
        text(&model),
        "--output",
        "packed",
    ];
    let (code, _, stderr) = run(folder.path(), &quantize);
    assert_eq!(code, 0, "{stderr}");
    let fixed = ["--set", "max_steps=3"];
    train_well(
        folder.path(),
        "key",
        &[&fixed[..], &["--set", "quantize=int4"]].concat(),
    );
    let on_disk = |output: &'static str, more: &[&'static str]| {
        run(
            folder.path(),
            &args("packed", output, &[&fixed[..], more].concat()),
        )
    };
    let (code, _, stderr) = on_disk("output_dir=disk", &[]);
    assert_eq!(code, 0, "{stderr}");
    let adapter = |run: &str| {
        fs::read(
            folder
                .path()
                .join(run)
                .join("checkpoint-3/adapter_model.safetensors"),
        )
        .unwrap()
    };
    assert!(
        adapter("key") == adapter("disk"),
        "the same weights give another adapter"
    );
    let base = |run: &str| {
        json_of(
            &folder
                .path()
                .join(run)
                .join("checkpoint-3/base_fingerprint.json"),
        )
    };
    let (key, disk) = (base("key"), base("disk"));
    assert_eq!(
        (&key["sha256"], &key["quantization"]),
        (&disk["sha256"], &disk["quantization"])
    );
    assert!(
        disk["quantised_sha256"].is_string() && key["quantised_sha256"].is_null(),
        "{disk}"
    );

    for (more, says) in [
        (
            &["--set", "tuner=full"][..],
            "`tuner = \"full\"` trains the weights",
        ),
        (&["--set", "quantize=int8"], "`quantize` is \"int8\""),
        (&["--random-init"], "--random-init"),
    ] {
        let (code, _, stderr) = on_disk("output_dir=bad", more);
        assert_eq!(code, 1, "{stderr}");
        assert_says(&stderr, &[says]);
    }
    for (more, says) in [
        (
            &["--set", "quantize=int4", "--set", "tuner=full"][..],
            "key `quantize` is int4",
        ),
        (&["--set", "quantize=int3"], "int8, int4"),
    ] {
        let output = "output_dir=bad";
        let (code, _, stderr) = run(folder.path(), &args(text(&model), output, more));
        assert_eq!(code, 2, "{stderr}");
        assert_says(&stderr, &[says]);
    }
    assert!(!folder.path().join("bad").exists());
}

/// Kills a run in its middle, continues it, and compares its end with that of an undisturbed one.
fn assert_resumes_bit_for_bit(more: &[&str]) {
    let folder = workspace();
    train_well(folder.path(), "whole", more);
    let (model, run_dir) = (tiny_model(), folder.path().join("killed"));
    let killed = args(text(&model), "output_dir=killed", more);
    let mut child = program(folder.path(), &killed).spawn().unwrap();
    let started = Instant::now();
    while rows_so_far(&run_dir) < 8 {
        let running = child.try_wait().unwrap().is_none() && started.elapsed() < LONGEST_RUN;
        assert!(running, "the run was not caught in the middle");
        thread::yield_now();
    }
    child.kill().unwrap();
    child.wait_with_output().unwrap();
    let saved = saved_before_kill(&run_dir);
    assert!(saved.contains(&5) && !saved.contains(&20), "{saved:?}");
    let (_, stderr) = train_well(
        folder.path(),
        "killed",
        &[more, &["--resume", "auto"]].concat(),
    );
    assert_says(&stderr, &["going on after step"]);
    for name in ["adapter_model.safetensors", "optimizer.safetensors"] {
        let read = |run: &str| fs::read(folder.path().join(run).join("checkpoint-20").join(name));
        assert!(
            read("whole").unwrap() == read("killed").unwrap(),
            "`{name}` differs"
        );
    }
    assert_eq!(losses(&folder.path().join("whole")), losses(&run_dir));
    assert_eq!(saved_steps(&run_dir).last(), Some(&20));
}

/// Steps of the checkpoints of a run that was killed, perhaps while it wrote one.
fn saved_before_kill(run: &Path) -> Vec<u64> {
    let names = fs::read_dir(run)
        .unwrap()
        .map(|entry| entry.unwrap().file_name());
    let steps = names.filter_map(|name| name.to_str()?.strip_prefix("checkpoint-")?.parse().ok());
    steps.collect()
}

#[test]
fn a_killed_quantised_run_goes_on_bit_for_bit() {
    assert_resumes_bit_for_bit(&["--set", "quantize=int4"]);
}

#[test]
fn a_killed_run_in_f16_goes_on_bit_for_bit_with_its_loss_scale() {
    assert_resumes_bit_for_bit(&["--set", "quantize=int8", "--dtype", "f16"]);
}

#[test]
fn two_devices_beside_quantised_weights_are_one_with_twice_the_accumulation() {
    let folder = workspace();
    let fixed = [
        "--set",
        "quantize=int4",
        "--set",
        "lora_dropout=0",
        "--set",
        "max_steps=5",
    ];
    for (name, devices, accumulation) in [
        ("one", "cpu", "gradient_accumulation_steps=4"),
        ("two", "cpu,cpu", "gradient_accumulation_steps=2"),
    ] {
        let more = ["--device", devices, "--set", accumulation];
        train_well(folder.path(), name, &[&fixed[..], &more].concat());
    }
    let [one, two] = ["one", "two"].map(|name| folder.path().join(name));
    for (one, two) in losses(&one).iter().zip(losses(&two)) {
        assert!((one - two).abs() <= 1e-4 * one.abs(), "{one} {two}");
    }
    let [one, two] =
        [one, two].map(|run| tensors(&run.join("checkpoint-5/adapter_model.safetensors")));
    assert!(one.keys().eq(two.keys()));
    for (name, bytes) in &one {
        let pairs = floats(bytes).zip(floats(&two[name]));
        let largest = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(largest <= 1e-5, "`{name}` differs by {largest:e}");
    }
}

/// In f16 the loss is scaled, on every device alike; the metrics say by how much.
#[test]
fn f16_runs_learn_as_f32_runs_on_one_device_and_two() {
    let folder = workspace();
    let fixed = ["--set", "lora_dropout=0", "--set", "max_steps=8"];
    let runs = [
        ("f32", &["--dtype", "f32"][..]),
        ("f16", &["--dtype", "f16"]),
        (
            "two",
            &[
                "--dtype",
                "f16",
                "--device",
                "cpu,cpu",
                "--set",
                "gradient_accumulation_steps=1",
            ],
        ),
    ];
    for (name, more) in runs {
        let (_, stderr) = train_well(folder.path(), name, &[&fixed[..], more].concat());
        assert_eq!(
            stderr.contains("the loss is scaled"),
            name != "f32",
            "{stderr}"
        );
    }
    let want = losses(&folder.path().join("f32"));
    for name in ["f16", "two"] {
        let run_dir = folder.path().join(name);
        let rows = records(&run_dir.join("metrics.jsonl"));
        let is_skipped = |row: &Value| row["skipped"] == true;
        // The first scale is too large for one of the eight steps: it is left out, and the losses part.
        let first = rows.iter().position(is_skipped).unwrap();
        assert!(first > 1, "{rows:?}");
        for (step, (ours, want)) in losses(&run_dir)
            .iter()
            .zip(&want)
            .take(first + 1)
            .enumerate()
        {
            // Half precision.
            assert!(
                (ours - want).abs() < 0.01,
                "{name} step {step}: {ours} {want}"
            );
        }
        let scale = |row: &Value| row["loss_scale"].as_f64().unwrap();
        assert_eq!(scale(&rows[0]), 65_536.0);
        for pair in rows.windows(2) {
            let factor = if is_skipped(&pair[0]) { 0.5 } else { 1.0 };
            assert_eq!(scale(&pair[1]), factor * scale(&pair[0]), "{pair:?}");
        }
        for row in &rows {
            assert_eq!(row["grad_norm"].is_null(), is_skipped(row), "{row}");
        }
        let state = json_of(&run_dir.join("checkpoint-8/trainer_state.json"));
        assert!(state["loss_scale"]["scale"].is_number(), "{state}");
    }
    let rows = records(&folder.path().join("f32/metrics.jsonl"));
    assert!(rows.iter().all(|row| row.get("loss_scale").is_none()));
}

#[test]
fn plan_says_what_quantised_weights_take_and_what_trains_on_cards() {
    let folder = workspace();
    let model = tiny_model();
    let plan = |more: &[&str]| {
        let always = ["plan", "--config", "run.toml", "--model", text(&model)];
        let (code, stdout, stderr) = run(folder.path(), &[&always[..], more].concat());
        assert_eq!(code, 0, "{stderr}");
        stdout
    };
    assert!(!plan(&[]).contains("dequantised"));
    let text = plan(&["--set", "quantize=int4", "--cards", "8"]);
    assert_says(&text, &["frozen weights, int4", "dequantised matrices"]);
    for format in ["16 bits", "int8", "int4"] {
        let row = text
            .lines()
            .find(|line| line.contains(&format!("8 GB  {format}")));
        assert_says(row.unwrap(), &["rows of", "GiB"]);
    }
}

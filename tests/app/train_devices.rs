//! `train` on several devices and in packed rows: the same steps as one device with padded rows; and
//! how such a run ends when one of the devices cannot go on.

use std::fs;

use crate::{
    records,
    train::{
        assert_says, floats, saved_steps, tensors, train_badly, train_well, trained_steps,
        workspace, write_data,
    },
};

/// Runs five steps of one workspace without dropout in two ways and compares losses and adapters.
fn assert_same_run(ways: [(&str, &[&str]); 2]) {
    let folder = workspace();
    let [one, two] = ways.map(|(name, args)| {
        let output = format!("output_dir={name}");
        let mut all = vec!["--set", &output, "--set", "lora_dropout=0"];
        all.extend(["--set", "max_steps=5"]);
        all.extend(args);
        train_well(folder.path(), &all);
        let run = folder.path().join(name);
        let adapter = tensors(&run.join("checkpoint-5/adapter_model.safetensors"));
        (records(&run.join("metrics.jsonl")), adapter)
    });
    assert_eq!((one.0.len(), two.0.len()), (5, 5));
    for (one, two) in one.0.iter().zip(&two.0) {
        for key in ["loss", "grad_norm"] {
            let (a, b) = (one[key].as_f64().unwrap(), two[key].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-4 * a.abs(), "{key}: {one}\n{two}");
        }
        assert_eq!((&one["epoch"], &one["step"]), (&two["epoch"], &two["step"]));
    }
    assert!(one.1.keys().eq(two.1.keys()));
    // Sums are taken in another order; AdamW brings the rounding of a small gradient to the weights.
    for (name, bytes) in &one.1 {
        let largest = floats(bytes)
            .zip(floats(&two.1[name]))
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(largest <= 1e-5, "`{name}` differs by {largest:e}");
    }
}

#[test]
fn two_devices_with_half_the_accumulation_are_the_same_run() {
    let one = ["--device", "cpu", "--set", "gradient_accumulation_steps=4"];
    let two = [
        "--device",
        "cpu,cpu",
        "--set",
        "gradient_accumulation_steps=2",
    ];
    assert_same_run([("one", &one), ("two", &two)]);
}

#[test]
fn two_devices_validate_as_one_does() {
    let folder = workspace();
    let validate = |name: &str, devices: &str, accumulation: &str| {
        let output = format!("output_dir={name}");
        let args = ["--device", devices, "--set", &output, "--set", accumulation];
        // Five batches, so that the last round has one for the first device only.
        let fixed = [
            "--set",
            "max_steps=2",
            "--set",
            "lora_dropout=0",
            "--set",
            "eval_steps=1",
            "--set",
            "per_device_eval_batch_size=3",
            "--val-data",
            "phantom:12:0..14:house",
        ];
        train_well(folder.path(), &[&args[..], &fixed[..]].concat());
        let rows = records(&folder.path().join(name).join("metrics.jsonl"));
        let rows = rows
            .into_iter()
            .filter(|row| row.get("eval_loss").is_some());
        rows.collect::<Vec<_>>()
    };
    let one = validate("one", "cpu", "gradient_accumulation_steps=4");
    let two = validate("two", "cpu,cpu", "gradient_accumulation_steps=2");
    assert_eq!((one.len(), two.len()), (2, 2));
    for (one, two) in one.iter().zip(&two) {
        for key in ["eval_loss", "eval_token_acc"] {
            let (a, b) = (one[key].as_f64().unwrap(), two[key].as_f64().unwrap());
            assert!((a - b).abs() <= 1e-4 * a.abs(), "{key}: {one}\n{two}");
        }
    }
}

#[test]
fn packed_rows_are_the_same_run() {
    let padded = ["--set", "gradient_accumulation_steps=4"];
    let packed = [
        "--set",
        "gradient_accumulation_steps=4",
        "--packing-tokens",
        "700",
    ];
    assert_same_run([("padded", &padded), ("packed", &packed)]);
}

#[test]
fn a_continued_run_on_two_devices_is_the_same_bit_for_bit() {
    let folder = workspace();
    let args = ["--device", "cpu,cpu", "--set", "max_steps=8"];
    train_well(folder.path(), &args);
    let run = folder.path().join("run");
    let read = |name: &str| fs::read(run.join("checkpoint-8").join(name)).unwrap();
    let names = ["adapter_model.safetensors", "optimizer.safetensors"];
    let whole = names.map(read);
    let (_, stderr) = train_well(
        folder.path(),
        &[&args[..], &["--resume", "run/checkpoint-5"]].concat(),
    );
    // The branch that is left steps aside.
    assert_says(
        &stderr,
        &["going on after step 5", "abandoned-checkpoint-8"],
    );
    assert_eq!(saved_steps(&run), [5, 8]);
    for (name, whole) in names.iter().zip(whole) {
        assert!(read(name) == whole, "`{name}` differs");
        let left = fs::read(run.join("abandoned-checkpoint-8").join(name)).unwrap();
        assert!(left == whole, "the abandoned `{name}` was touched");
    }
}

#[test]
fn an_unreadable_image_ends_the_run_of_all_devices() {
    let folder = workspace();
    write_data(folder.path());
    let image = folder.path().join("data/images/0005.png");
    let good = fs::read(&image).unwrap();
    fs::write(&image, &good[..good.len() / 2]).unwrap();
    // Windows of four as on one device, so that the image does not come in the first step.
    let mut args = vec!["--train-data", "data/samples.jsonl", "--device", "cpu,cpu"];
    args.extend(["--set", "gradient_accumulation_steps=1"]);
    let message = train_badly(folder.path(), &args);
    assert_says(&message, &["row 6", "`images/0005.png`"]);
    let run = folder.path().join("run");
    let steps = trained_steps(&run).len() as u64;
    assert!(steps > 0);
    assert_eq!(saved_steps(&run), [steps]);
}

#[cfg(unix)]
#[test]
fn an_image_that_never_comes_ends_the_run_of_all_devices() {
    let folder = workspace();
    write_data(folder.path());
    let image = folder.path().join("data/images/0005.png");
    fs::remove_file(&image).unwrap();
    // Opening a pipe that nobody writes to waits for ever, as a disk that is gone does.
    let made = std::process::Command::new("mkfifo")
        .arg(&image)
        .status()
        .unwrap();
    assert!(made.success());
    let mut args = vec!["--train-data", "data/samples.jsonl", "--device", "cpu,cpu"];
    args.extend(["--set", "ddp_timeout=3"]);
    let message = train_badly(folder.path(), &args);
    assert_says(
        &message,
        &[
            "data/samples.jsonl`",
            "were not read within 3 s",
            "ddp_timeout",
        ],
    );
    let rows = message
        .split_once('[')
        .and_then(|(_, rest)| rest.split_once(']'));
    let rows = rows.unwrap_or_else(|| panic!("no rows in: {message}")).0;
    assert!(rows.split(", ").any(|row| row == "6"), "{message}");
}

//! `bench`: records that agree with themselves, on the CPU and a tiny model.

use serde_json::Value;
use xray_qwen3vl::{
    base::files::sha256_file,
    bench::{
        count::{decode, text_prefill, vision, weight_bytes},
        report::Record,
    },
    runtime::synthetic::weights::RandomSize,
};

use super::{json_lines, run, text, tiny_model};

/// Runs `bench` on the CPU with JSON on stdout; it must end well and say nothing doubtful.
fn bench(args: &[&str]) -> Vec<Record> {
    let folder = tempfile::tempdir().unwrap();
    let all = [&["bench"], args, &["--device", "cpu", "--json"]].concat();
    let (code, stdout, stderr) = run(folder.path(), &all);
    assert_eq!(code, 0, "{all:?}\n{stdout}\n{stderr}");
    assert!(!stderr.contains("WARNING"), "{stderr}");
    assert_eq!(folder.path().read_dir().unwrap().count(), 0, "left a file");
    json_lines(&stdout)
        .into_iter()
        .map(|line| serde_json::from_value(line).expect("a record"))
        .collect()
}

/// What holds for every measurement.
fn check(record: &Record) {
    assert_eq!(record.device, "cpu", "{record:?}");
    assert_eq!(record.dtype, "float32", "{record:?}");
    assert!(record.min_seconds > 0.0 && record.first_call_seconds > 0.0);
    assert!(record.min_seconds <= record.median_seconds, "{record:?}");
    assert!(record.median_seconds <= record.max_seconds, "{record:?}");
    for ceiling in [
        record.matmul_ceiling_tflops,
        record.copy_ceiling_gb_per_second,
    ] {
        assert!(ceiling.is_some_and(|ceiling| ceiling > 0.0), "{record:?}");
    }
    assert!(record.host_memory_peak_gib.unwrap() > 0.0);
}

/// `value` is `expected` but for rounding.
fn near(value: Option<f64>, expected: f64) -> bool {
    value.is_some_and(|value| (value / expected - 1.0).abs() < 1e-9)
}

#[test]
fn prefill_counts_one_request_up_to_its_first_token() {
    let records = bench(&["prefill", "--random-weights", "tiny", "--samples", "3"]);
    let [record] = &records[..] else {
        panic!("{records:?}")
    };
    check(record);
    assert_eq!(record.name, "prefill_b1_s368");
    assert_eq!(record.samples, 3);
    assert!(near(
        record.tokens_per_second,
        368.0 / record.median_seconds
    ));
    assert!(near(record.samples_per_second, 1.0 / record.median_seconds));
    let config = RandomSize::Tiny.config(None).unwrap();
    let work = vision(&config, &[1024], 4).plus(text_prefill(&config, &[368], 4));
    assert!(near(record.flop, work.flop), "{record:?}");
    assert!(near(record.bytes, work.bytes), "{record:?}");
    // The process starts, draws the weights and answers once; its start is known to 10 ms.
    let first = record.first_token_seconds.unwrap();
    assert!(first + 0.02 > record.first_call_seconds, "{record:?}");
}

#[test]
fn decode_counts_the_tokens_behind_the_first_of_each_row() {
    let args = ["--random-weights", "tiny", "--samples", "1"];
    let records = bench(&[&["decode", "--batch", "1,2", "--layers", "2"], &args[..]].concat());
    assert_eq!(records.len(), 2);
    let config = RandomSize::Tiny.config(Some(2)).unwrap();
    for (record, batch) in records.iter().zip([1, 2]) {
        check(record);
        assert_eq!((record.batch, record.layers), (batch, 2));
        assert_eq!(record.name, format!("decode_b{batch}_s368_n128"));
        let tokens = 128.0 * batch as f64;
        assert!(near(
            record.tokens_per_second,
            tokens / record.median_seconds
        ));
        let work = decode(&config, &vec![368; batch], 128, 4);
        assert!(near(record.flop, work.flop) && near(record.bytes, work.bytes));
        assert!(
            record.longest_stall_seconds <= record.max_seconds,
            "{record:?}"
        );
    }
    let mixed = bench(&[&["decode", "--batch", "2", "--mixed"], &args[..]].concat());
    assert_eq!(mixed[0].name, "decode_b2_n128_mixed");
    assert!(mixed[0].mixed && mixed[0].flop != records[1].flop);
}

#[test]
fn several_devices_stand_beside_the_first_alone() {
    let args = [
        "--random-weights",
        "tiny",
        "--layers",
        "2",
        "--samples",
        "1",
    ];
    let small = ["--image-size", "64"];
    let bench = |more: &[&str]| -> Vec<Record> {
        let folder = tempfile::tempdir().unwrap();
        let device = ["--device", "cpu,cpu", "--json"];
        let all = [&["bench"], more, &args[..], &device[..]].concat();
        let (code, stdout, stderr) = run(folder.path(), &all);
        assert_eq!(code, 0, "{all:?}\n{stdout}\n{stderr}");
        assert_eq!(folder.path().read_dir().unwrap().count(), 0, "left a file");
        let records = json_lines(&stdout)
            .into_iter()
            .map(|line| serde_json::from_value(line).unwrap());
        records.collect()
    };
    let [one, two] = &bench(&[&["train", "--batch", "8", "--packing"][..], &small].concat())[..]
    else {
        panic!("expected two records")
    };
    assert_eq!(
        (one.name.as_str(), two.name.as_str()),
        ("train_m8x2_i64", "train_m8x2_d2_i64")
    );
    assert!(near(one.samples_per_second, 16.0 / one.median_seconds));
    assert!(near(two.samples_per_second, 32.0 / two.median_seconds));
    assert_eq!((one.finite, two.finite), (Some(true), Some(true)));
    let [one, two] = &bench(&[&["infer", "--batch", "2"][..], &small].concat())[..] else {
        panic!("expected two records")
    };
    assert_eq!(
        (one.name.as_str(), two.name.as_str()),
        ("infer_b2_i64", "infer_b2_d2_i64")
    );
    // Four batches of two a device.
    assert!(near(one.samples_per_second, 8.0 / one.median_seconds));
    assert!(near(two.samples_per_second, 16.0 / two.median_seconds));
    let files = bench(&["load", "--checkpoint-in", "."]);
    let names: Vec<_> = files.iter().map(|record| record.name.as_str()).collect();
    assert_eq!(names, ["load", "load_d2"]);
    assert!(
        files
            .iter()
            .all(|record| record.gb_per_second.unwrap() > 0.0)
    );

    // A folder that is not there is made, and left empty.
    let folder = tempfile::tempdir().unwrap();
    let load = ["bench", "load", "--checkpoint-in", "made/first"];
    let all = [&load[..], &args[..], &["--device", "cpu"]].concat();
    let (code, _, stderr) = run(folder.path(), &all);
    assert_eq!(code, 0, "{stderr}");
    let made = folder.path().join("made/first");
    assert_eq!(made.read_dir().unwrap().count(), 0, "left a file");

    let folder = tempfile::tempdir().unwrap();
    let all = [
        "bench",
        "decode",
        "--random-weights",
        "tiny",
        "--device",
        "cpu,cpu",
    ];
    let (code, _, stderr) = run(folder.path(), &all);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("several devices"), "{stderr}");
}

#[test]
fn train_takes_whole_steps_of_sixteen() {
    let records = bench(&[
        "train",
        "--random-weights",
        "tiny",
        "--mixed",
        "--packing",
        "--batch",
        "4",
        "--samples",
        "1",
        "--image-size",
        "64",
    ]);
    let [record] = &records[..] else {
        panic!("{records:?}")
    };
    check(record);
    assert_eq!(record.name, "train_m4x4_mixed_i64");
    assert!(near(
        record.samples_per_second,
        16.0 / record.median_seconds
    ));
    assert_eq!(
        (record.packing, record.recompute, record.finite),
        (Some(true), Some(true), Some(true))
    );
    // A model that knows nothing gives each of its 1,024 tokens the same chance, or nearly.
    for loss in [record.loss_first, record.loss_last] {
        assert!((loss.unwrap() - 1024f64.ln()).abs() < 0.5, "{record:?}");
    }
    // Running every layer but the last of four again costs less than the whole step.
    let (model, again) = (record.flop.unwrap(), record.recompute_flop.unwrap());
    assert!(again > 0.0 && again < model, "{record:?}");
}

#[test]
fn loading_and_the_vision_tower_are_measured_and_shown_as_a_table() {
    let weights = tiny_model().join("model.safetensors");
    let before = sha256_file(&weights).unwrap();
    let loads = bench(&["load", "--model", text(&tiny_model()), "--samples", "2"]);
    check(&loads[0]);
    assert!(near(
        loads[0].bytes,
        weights.metadata().unwrap().len() as f64
    ));
    assert_eq!(sha256_file(&weights).unwrap(), before);
    let draws = bench(&["load", "--random-weights", "tiny", "--samples", "1"]);
    let config = RandomSize::Tiny.config(None).unwrap();
    assert!(near(draws[0].bytes, weight_bytes(&config, 4)));

    let folder = tempfile::tempdir().unwrap();
    let args = "bench vision --samples 1 --device cpu --json vision.jsonl";
    let args: Vec<&str> = args.split(' ').collect();
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    for words in [
        "vision_b1_p1024",
        "TFLOP/s",
        "100 % is what this run reached",
    ] {
        assert!(stdout.contains(words), "{words} not in {stdout}");
    }
    let lines = std::fs::read_to_string(folder.path().join("vision.jsonl")).unwrap();
    let record: Value = json_lines(&lines).remove(0);
    assert_eq!(record["bench"], "vision");
    assert_eq!(record["tokens_per_second"], Value::Null);
}

#[test]
fn what_does_not_go_together_is_wrong_usage() {
    let folder = tempfile::tempdir().unwrap();
    for (args, word) in [
        ("prefill --packing", "bench train"),
        ("prefill --batch 0", "--batch is 0"),
        ("decode --samples 0", "--samples is 0"),
        ("train --batch 17", "16 samples"),
        ("vision --mixed", "--mixed"),
        ("load --batch 2", "--batch"),
        ("load --random-weights 8b --layers 2", "3 (one for each"),
        ("vision --table", "does not time its operations"),
        ("load --image-size 64", "--image-size"),
        ("load --layers 2", "--random-weights"),
        ("load --random-weights 3b", "3b"),
    ] {
        let all: Vec<&str> = ["bench"].into_iter().chain(args.split(' ')).collect();
        let (code, stdout, stderr) = run(folder.path(), &[&all[..], &["--device", "cpu"]].concat());
        assert_eq!((code, stdout.as_str()), (2, ""), "{args}: {stderr}");
        assert!(stderr.contains(word), "{args}: {stderr}");
    }
}

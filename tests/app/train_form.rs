//! How a step is made: the memory budget, the forms of the backward pass, repeated steps, the trace.
//!
//! All of it changes time and memory only.

use std::{fs, path::Path};

use serde_json::Value;
use xray_qwen3vl::train::config::TrainConfig;

use crate::{
    records, run,
    train::{assert_says, train, train_well, workspace},
};

/// Losses and gradient norms of a run's steps.
fn numbers(run: &Path) -> Vec<[f64; 2]> {
    records(&run.join("metrics.jsonl"))
        .iter()
        .filter_map(|row| Some([row.get("loss")?.as_f64()?, row["grad_norm"].as_f64()?]))
        .collect()
}

/// Six steps without dropout, whose masks are drawn for each micro-batch.
const SHORT: [&str; 4] = ["--set", "max_steps=6", "--set", "lora_dropout=0.0"];

#[test]
fn the_memory_budget_changes_how_a_step_is_made_and_not_what_it_gives() {
    let folder = workspace();
    let run_as = |name: &str, more: &[&str]| {
        let args = [&SHORT[..], &["--output-dir", name], more].concat();
        let (_, stderr) = train_well(folder.path(), &args);
        (numbers(&folder.path().join(name)), stderr)
    };
    let (plain, _) = run_as("plain", &[]);
    assert_eq!(plain.len(), 6);
    let (budgeted, log) = run_as("budgeted", &["--memory-budget", "2"]);
    let line = log
        .lines()
        .find(|line| line.starts_with("memory budget 2.0 GiB: rows of"))
        .unwrap_or_else(|| panic!("{log}"));
    assert_says(line, &["tokens", "samples", "stay as configured"]);
    let written = TrainConfig::from_file(&folder.path().join("budgeted/config.toml")).unwrap();
    assert_eq!(written.memory_budget, Some(2.0));
    assert!(written.packing && written.packing_tokens > 0, "{written:?}");
    let (per_step, samples) = (written.per_device_train_batch_size, 2);
    assert_eq!(
        (per_step, written.gradient_accumulation_steps),
        (samples, 2)
    );
    let forms = [
        budgeted,
        run_as("layers", &["--set", "gradient_checkpointing=true"]).0,
        run_as("pointwise", &["--set", "recompute_pointwise=true"]).0,
    ];
    for (form, numbers) in forms.iter().enumerate() {
        assert_eq!(numbers.len(), plain.len());
        for (step, (found, expected)) in numbers.iter().zip(&plain).enumerate() {
            // f32 sums in another order, through six steps of AdamW, whose division by the root enlarges
            // what rounding leaves of gradients near zero; the norm is made of those.
            for (a, (b, allowed)) in found.iter().zip(expected.iter().zip([1e-4, 1e-3])) {
                assert!(
                    (a / b - 1.0).abs() < allowed,
                    "form {form} step {step}: {a} {b}"
                );
            }
        }
    }
    // A continued run keeps the rows it has begun with, whatever fits now.
    let more = ["--resume", "auto", "--set", "max_steps=6"];
    let again = [
        &SHORT[..],
        &["--output-dir", "budgeted", "--memory-budget", "3"],
        &more,
    ]
    .concat();
    let (_, log) = train_well(folder.path(), &again);
    let rows = format!("rows of {} tokens", written.packing_tokens);
    assert_says(&log, &["memory budget 3.0 GiB", &rows]);
}

#[test]
fn a_budget_that_nothing_fits_is_refused_with_what_would_be_needed() {
    let folder = workspace();
    let (code, _, stderr) = train(folder.path(), &["--memory-budget", "0.1"]);
    assert_eq!(code, 1, "{stderr}");
    assert_says(&stderr, &["0.1 GiB is too small", "max_pixels", "weights"]);
    assert!(!folder.path().join("run").exists());
    let (code, _, stderr) = train(folder.path(), &["--memory-budget", "much"]);
    assert_eq!(code, 2, "{stderr}");
    assert_says(&stderr, &["auto", "GiB"]);
}

#[test]
fn plan_chooses_as_train_does() {
    let folder = workspace();
    let args = ["plan", "--config", "run.toml", "--memory-budget", "2"];
    let (code, stdout, stderr) = run(folder.path(), &args);
    assert_eq!(code, 0, "{stderr}");
    assert_says(&stdout, &["memory budget 2.0 GiB: rows of", "together"]);
}

#[test]
fn repeated_steps_agree_and_so_do_two_runs() {
    let folder = workspace();
    let losses: Vec<_> = ["one", "two"]
        .iter()
        .map(|name| {
            let args = [
                "--deterministic",
                "--set",
                "max_steps=6",
                "--output-dir",
                name,
            ];
            train_well(folder.path(), &args);
            numbers(&folder.path().join(name))
        })
        .collect();
    assert_eq!(losses[0].len(), 6);
    let bits = |run: &[[f64; 2]]| -> Vec<u64> {
        run.iter().flatten().map(|value| value.to_bits()).collect()
    };
    assert_eq!(bits(&losses[0]), bits(&losses[1]));
}

#[test]
fn the_trace_shows_loader_launches_and_waits() {
    let folder = workspace();
    let args = [&SHORT[..], &["--trace", "trace.json"]].concat();
    let (_, stderr) = train_well(folder.path(), &args);
    assert_says(&stderr, &["were spent waiting for samples"]);
    let text = fs::read_to_string(folder.path().join("trace.json")).unwrap();
    let trace: Value = serde_json::from_str(&text).unwrap();
    let events = trace["traceEvents"].as_array().unwrap();
    let spans = |name: &str| events.iter().filter(|one| one["name"] == name).count();
    assert_eq!(spans("launch"), 6);
    // The loader works ahead; the last look finds it ended.
    assert!(spans("samples") >= 6 && spans("wait for samples") >= 6);
    let lanes = events.iter().filter(|one| one["name"] == "samples");
    assert!(
        lanes
            .clone()
            .all(|one| one["tid"] == 1 && one["dur"].as_f64() > Some(0.0))
    );
}

//! The run without arguments: the tiny model learns to write the sample data set's reports.
//!
//! It takes minutes, and what it claims is in its figures: they are printed with `--nocapture`.

use std::{fs, path::Path, time::Instant};

use burn::tensor::DType;
use burn_flex::Flex;
use serde_json::Value;
use tempfile::tempdir;
use xray_qwen3vl::{
    dataset::Dataset,
    evaluate::{
        baselines::{ConstantSearch, best_constant_report},
        rouge::rouge_l,
        segment::characters,
    },
    generate::{GenerationConfig, Prompt},
    phantom::{finding_f1, findings_in_report},
    pipeline::{Pipeline, PipelineOptions},
};

use crate::{field, records, repository, run, text, tiny_model};

const TRAINED_ON: &str = "data/sample/train/samples.jsonl";
const HELD_OUT: &str = "data/sample/val/samples.jsonl";

/// Prompts that go through the model at once.
const BATCH: usize = 32;

/// The last held-out loss of a run.
fn held_out_loss(run: &Path) -> f64 {
    records(&run.join("metrics.jsonl"))
        .iter()
        .filter_map(|row| row.get("eval_loss")?.as_f64())
        .next_back()
        .expect("the run was validated")
}

/// Reports about `prompts` by greedy decoding.
fn answers(pipeline: &Pipeline<Flex>, prompts: &[Prompt]) -> Vec<String> {
    let settings = GenerationConfig {
        max_new_tokens: 128,
        ..GenerationConfig::default()
    };
    let mut reports = Vec::new();
    for batch in prompts.chunks(BATCH) {
        let (answers, _) = pipeline
            .answer(batch, &settings, &[], &mut |_, _| {})
            .unwrap();
        reports.extend(answers.into_iter().map(|answer| answer.report));
    }
    reports
}

/// Mean character ROUGE-L F1 of reports.
fn mean_rouge_l(truths: &[String], reports: &[String]) -> f64 {
    let sum: f64 = truths
        .iter()
        .zip(reports)
        .map(|(truth, report)| rouge_l(&characters(report), &characters(truth)))
        .sum();
    sum / truths.len() as f64
}

/// F1 of findings, side and zone included.
fn findings_f1(truths: &[String], reports: &[String]) -> f64 {
    let findings: Vec<_> = truths
        .iter()
        .zip(reports)
        .map(|(truth, report)| (findings_in_report(truth), findings_in_report(report)))
        .collect();
    finding_f1(findings.iter().map(|(truth, stated)| (truth, stated))).f1()
}

/// The training report that fits all others best.
fn constant_report() -> String {
    let reports: Vec<String> = records(&repository().join(TRAINED_ON))
        .iter()
        .map(|row| field(&row["messages"][1], "content").to_string())
        .collect();
    let best = best_constant_report(&reports, &ConstantSearch::default()).unwrap();
    reports[best.index].clone()
}

#[test]
fn the_run_without_arguments_learns_to_report() {
    let folder = tempdir().unwrap();
    let (base, tuned) = (folder.path().join("base"), folder.path().join("tuned"));
    let always = ["train", "--no-tui", "--output-dir"];

    // One step at the start of the warm-up, where the rate is 0: the base as it is.
    let one_step = [
        "--eval-generate",
        "0",
        "--show",
        "0",
        "--set",
        "max_steps=1",
        "--set",
        "eval_steps=1",
    ];
    let args = [&always[..], &[text(&base)], &one_step].concat();
    let (code, stdout, stderr) = run(repository(), &args);
    assert_eq!(code, 0, "stdout: {stdout}\nstderr: {stderr}");
    let rows = records(&base.join("metrics.jsonl"));
    assert_eq!(rows[0]["learning_rate"].as_f64(), Some(0.0), "{}", rows[0]);
    let base_loss = held_out_loss(&base);

    let started = Instant::now();
    let args = [&always[..], &[text(&tuned)]].concat();
    let (code, stdout, stderr) = run(repository(), &args);
    let seconds = started.elapsed().as_secs_f64();
    assert_eq!(code, 0, "stdout: {stdout}\nstderr: {stderr}");
    let facts: Value = serde_json::from_slice(&fs::read(tuned.join("run.json")).unwrap()).unwrap();
    let steps = records(&tuned.join("metrics.jsonl"))
        .iter()
        .filter_map(|row| row["step"].as_u64())
        .max()
        .unwrap();
    eprintln!("seed {}, {steps} steps in {seconds:.0} s", facts["seed"]);
    let tuned_loss = held_out_loss(&tuned);
    eprintln!("held-out loss: base {base_loss:.4}, tuned {tuned_loss:.4}");

    let options = PipelineOptions {
        model: tiny_model(),
        adapter: Some(tuned.join(format!("checkpoint-{steps}"))),
        dtype: DType::F32,
        quantize: None,
        min_pixels: None,
        max_pixels: None,
    };
    let pipeline = Pipeline::<Flex>::load(&options, Default::default(), &mut |_, _| {}).unwrap();
    let data = Dataset::open(text(&repository().join(HELD_OUT))).unwrap();
    let (prompts, truths): (Vec<Prompt>, Vec<String>) = (0..data.len())
        .map(|row| data.question(row, &pipeline.parts).unwrap())
        .unzip();
    let half = prompts.len() / 2;
    let swapped: Vec<Prompt> = (0..prompts.len())
        .map(|row| {
            let other = &prompts[(row + half) % prompts.len()].images;
            // The image tokens of the text stand for as many patches.
            assert_eq!(other.image_grid_thw, prompts[row].images.image_grid_thw);
            Prompt {
                input_ids: prompts[row].input_ids.clone(),
                images: other.clone(),
            }
        })
        .collect();

    let reports = answers(&pipeline, &prompts);
    let constant = vec![constant_report(); truths.len()];
    let rouge = mean_rouge_l(&truths, &reports);
    let constant_rouge = mean_rouge_l(&truths, &constant);
    let f1 = findings_f1(&truths, &reports);
    let constant_f1 = findings_f1(&truths, &constant);
    let swapped_f1 = findings_f1(&truths, &answers(&pipeline, &swapped));
    eprintln!("over {} held-out studies:", truths.len());
    eprintln!("character ROUGE-L: tuned {rouge:.3}, best constant report {constant_rouge:.3}");
    eprintln!(
        "finding F1: tuned {f1:.3}, best constant report {constant_f1:.3}, images swapped {swapped_f1:.3}"
    );
    for (truth, report) in truths.iter().zip(&reports).take(2) {
        eprintln!("  truth   {truth}\n  answer  {report}");
    }

    assert!(tuned_loss <= base_loss / 2.0, "the loss did not halve");
    assert!(rouge >= constant_rouge + 0.2, "reports are hardly better");
    assert!(f1 >= 0.8, "findings are not read off the images");
    assert!(swapped_f1 < 0.4, "findings do not come from the images");
}

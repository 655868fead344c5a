//! The run without arguments: the tiny model learns sides and findings it did not know.
//!
//! It takes minutes, and what it claims is in its figures: they are printed with `--nocapture`. `XRAY_DEFAULT_RUN` names
//! the folder of such a run that is there already, so that it is not done twice.

use std::{env, fs, path::PathBuf, time::Instant};

use serde_json::Value;
use tempfile::tempdir;
use xray_qwen3vl::eval::{
    baselines::search::{ConstantSearch, best_constant_report},
    text::{rouge::rouge_l, segment::characters},
};

use crate::{field, records, repository, run, text};

const TRAINED_ON: &str = "data/sample/train/samples.jsonl";
const HELD_OUT: &str = "data/sample/val/samples.jsonl";

/// The reports of a sample file.
fn reports(file: &str) -> Vec<String> {
    records(&repository().join(file))
        .iter()
        .map(|row| field(&row["messages"][1], "content").to_string())
        .collect()
}

/// Mean character ROUGE-L F1 of the training report that fits all others best, on held-out studies.
fn constant_rouge_l() -> f64 {
    let trained_on = reports(TRAINED_ON);
    let best = best_constant_report(&trained_on, &ConstantSearch::default()).unwrap();
    let constant = characters(&trained_on[best.index]);
    let truths = reports(HELD_OUT);
    let scores = truths
        .iter()
        .map(|truth| rouge_l(&constant, &characters(truth)));
    scores.sum::<f64>() / truths.len() as f64
}

#[test]
fn the_run_without_arguments_learns_what_the_images_show() {
    let folder = tempdir().unwrap();
    let out = match env::var_os("XRAY_DEFAULT_RUN") {
        Some(done) => PathBuf::from(done),
        None => {
            let out = folder.path().join("run");
            let started = Instant::now();
            let args = ["train", "--no-tui", "--output-dir", text(&out)];
            let (code, stdout, stderr) = run(repository(), &args);
            assert_eq!(code, 0, "stdout: {stdout}\nstderr: {stderr}");
            eprintln!("{:.0} s\n{stdout}", started.elapsed().as_secs_f64());
            out
        }
    };
    let result: Value =
        serde_json::from_slice(&fs::read(out.join("result.json")).unwrap()).unwrap();
    let held_out = &result["held_out"];
    let value = |when: &str, key: &str| held_out[when][key].as_f64().unwrap();

    assert!(value("after", "eval_loss") <= value("before", "eval_loss") / 2.0);
    assert!(value("after", "eval_rouge_l") >= constant_rouge_l() + 0.2);
    // The wording alone gives no finding: before, sides and two findings are unknown; with the images of
    // other studies the words are as good and the findings wrong.
    let findings = |when: &str| value(when, "eval_finding_side_zone_f1");
    assert!(
        findings("before") <= 0.5,
        "the base knows the findings already"
    );
    assert!(
        findings("after") >= 0.85,
        "findings are not read off the images"
    );
    assert!(
        findings("images_swapped") <= 0.3,
        "findings do not come from the images"
    );
}

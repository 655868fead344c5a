//! Learning rates against the reference's schedule and training trajectories.

use serde_json::Value;
use xray_qwen3vl::schedule::{Schedule, ScheduleKind};

/// The same `f64` operations; only the two cosines may differ in their last digit.
const RELATIVE_TOLERANCE: f64 = 1e-12;

fn train_json() -> Value {
    let path = crate::support::fixtures().join("train.json");
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|cause| panic!("cannot read `{}`: {cause}", path.display()));
    serde_json::from_str(&text).unwrap()
}

fn assert_close(name: &str, found: f64, expected: f64, peak: f64) {
    let difference = (found - expected).abs();
    assert!(
        difference <= RELATIVE_TOLERANCE * expected.abs().max(peak * 1e-3),
        "{name}: found {found:e}, expected {expected:e}, difference {difference:e}"
    );
}

#[test]
fn cosine_samples_agree() {
    let reference = train_json();
    let cases = reference["cosine_schedule"].as_array().unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let total = case["total"].as_u64().unwrap();
        let peak = case["base_lr"].as_f64().unwrap();
        let ratio = case["warmup_ratio"].as_f64().unwrap();
        let schedule = Schedule::new(ScheduleKind::Cosine, peak, ratio, total);
        assert_eq!(
            schedule.warmup_steps(),
            case["warmup_steps"].as_u64().unwrap()
        );
        for (step, expected) in case["lr_at"].as_object().unwrap() {
            let found = schedule.lr(step.parse().unwrap());
            let name = format!("total {total}, step {step}");
            assert_close(&name, found, expected.as_f64().unwrap(), peak);
        }
    }
}

#[test]
fn trajectory_rates_agree() {
    let reference = train_json();
    for (name, run) in reference["trajectory"].as_object().unwrap() {
        let total = run["total_steps"].as_u64().unwrap();
        let warmup = run["warmup_steps"].as_u64().unwrap();
        let peak = run["peak_lr"].as_f64().unwrap();
        let ratio = warmup as f64 / total as f64;
        let schedule = Schedule::new(ScheduleKind::Cosine, peak, ratio, total);
        assert_eq!(schedule.warmup_steps(), warmup);
        for step in run["steps"].as_array().unwrap() {
            let index = step["step"].as_u64().unwrap();
            let expected = step["lr"].as_f64().unwrap();
            assert_close(
                &format!("{name}, step {index}"),
                schedule.lr(index),
                expected,
                peak,
            );
        }
    }
}

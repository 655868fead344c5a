//! The curves of a training run as one figure.

use std::collections::BTreeSet;

use serde::Deserialize;
use serde_json::Value;

use super::records::Row;
use crate::base::plot::{AxisScale, BLUE, GREEN, Mark, ORANGE, Panel, Series, figure};

/// One row of a run's `metrics.jsonl`; keys it does not have are `None`, others are ignored.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct ChartRow {
    /// Finished optimizer steps.
    pub step: u64,
    /// Training loss per target token.
    pub loss: Option<f64>,
    /// Share of target tokens predicted right in training, 0 to 1.
    pub token_acc: Option<f64>,
    /// Validation loss per target token.
    pub eval_loss: Option<f64>,
    /// Share of target tokens predicted right in validation, 0 to 1.
    pub eval_token_acc: Option<f64>,
    /// ROUGE-L of generated reports, 0 to 1.
    pub eval_rouge_l: Option<f64>,
    /// F1 of their findings, 0 to 1.
    pub eval_finding_f1: Option<f64>,
    /// Learning rate.
    pub learning_rate: Option<f64>,
    /// Norm of the gradient before clipping.
    pub grad_norm: Option<f64>,
    /// All other values by name; those of an objective are drawn.
    #[serde(flatten)]
    pub others: Row,
}

/// The rows of a `metrics.jsonl` that can be drawn; those of another form are left out.
pub fn chart_rows(rows: Vec<Row>) -> Vec<ChartRow> {
    rows.into_iter()
        .filter_map(|row| serde_json::from_value(Value::Object(row)).ok())
        .collect()
}

/// Draws the curves of a run: loss, token accuracy, learning rate with gradient norm, and where reports
/// were generated their scores.
pub fn training_chart(rows: &[ChartRow]) -> String {
    let losses = column(rows, |row| row.loss);
    let loss = Panel {
        title: "Loss".into(),
        x_label: X_LABEL.into(),
        y_label: "loss per token".into(),
        scale: scale_of(&losses, 10.0),
        series: measured(losses, column(rows, |row| row.eval_loss)),
        ..Panel::default()
    };
    let accuracy = Panel {
        title: "Token accuracy".into(),
        x_label: X_LABEL.into(),
        y_label: "share of tokens".into(),
        series: measured(
            column(rows, |row| row.token_acc),
            column(rows, |row| row.eval_token_acc),
        ),
        ..Panel::default()
    };
    let mut panels = vec![loss, accuracy, rate_panel(rows)];
    panels.extend(score_panel(rows));
    panels.extend(objective_panels(rows));
    figure(&panels)
}

const X_LABEL: &str = "optimizer step";

/// The points of one value; rows without it are skipped.
fn column(rows: &[ChartRow], value: fn(&ChartRow) -> Option<f64>) -> Vec<(f64, f64)> {
    rows.iter()
        .filter_map(|row| Some((row.step as f64, value(row)?)))
        .collect()
}

/// A value as training measures it, that smoothed, and as validation measures it.
fn measured(train: Vec<(f64, f64)>, validation: Vec<(f64, f64)>) -> Vec<Series> {
    let smoothed = smooth(&train);
    [
        ("train", BLUE, Mark::FaintLine, train),
        ("train, smoothed", BLUE, Mark::Line, smoothed),
        ("validation", ORANGE, Mark::Points, validation),
    ]
    .map(series)
    .into()
}

fn series((name, color, mark, points): (&str, &str, Mark, Vec<(f64, f64)>)) -> Series {
    Series {
        name: name.into(),
        color: color.into(),
        mark,
        right: false,
        points,
    }
}

fn rate_panel(rows: &[ChartRow]) -> Panel {
    let grad_norm = column(rows, |row| row.grad_norm);
    let rate = column(rows, |row| row.learning_rate);
    Panel {
        title: "Learning rate and gradient norm".into(),
        x_label: X_LABEL.into(),
        y_label: "learning rate".into(),
        right_label: "gradient norm".into(),
        right_scale: scale_of(&grad_norm, 100.0),
        series: vec![
            Series {
                right: true,
                ..series(("gradient norm (right)", GREEN, Mark::FaintLine, grad_norm))
            },
            series(("learning rate", BLUE, Mark::Line, rate)),
        ],
        ..Panel::default()
    }
}

/// Scores of the reports generated at validations; `None` without any.
fn score_panel(rows: &[ChartRow]) -> Option<Panel> {
    let f1 = column(rows, |row| row.eval_finding_f1);
    let rouge_l = column(rows, |row| row.eval_rouge_l);
    let scored = !f1.is_empty() || !rouge_l.is_empty();
    scored.then(|| Panel {
        title: "Reports about held-out studies".into(),
        x_label: X_LABEL.into(),
        y_label: "score".into(),
        series: vec![
            series(("finding F1", ORANGE, Mark::Points, f1)),
            series(("character ROUGE-L", GREEN, Mark::Points, rouge_l)),
        ],
        ..Panel::default()
    })
}

/// What an objective measures: rewards by part, those held out, divergence, entropy, length, clipped share; empty where
/// answers are imitated.
fn objective_panels(rows: &[ChartRow]) -> Vec<Panel> {
    const COLORS: [&str; 6] = [GREEN, ORANGE, BLUE, "#8c564b", "#9467bd", "#7f7f7f"];
    let values = |name: &str| -> Vec<(f64, f64)> {
        let value = |row: &ChartRow| Some((row.step as f64, row.others.get(name)?.as_f64()?));
        rows.iter().filter_map(value).collect()
    };
    let keys = rows.iter().flat_map(|row| row.others.keys());
    let parts: BTreeSet<&str> = keys
        .map(String::as_str)
        .filter(|key| key.starts_with("reward.") || *key == "held_out_reward")
        .collect();
    let mut panels = Vec::new();
    let mut add = |title: &str, label: &str, named: &[(&str, &str)]| {
        let lines = named.iter().enumerate().filter_map(|(index, (name, key))| {
            let points = smooth(&values(key));
            let color = COLORS[index % COLORS.len()];
            (!points.is_empty()).then(|| series((name, color, Mark::Line, points)))
        });
        let lines: Vec<Series> = lines.collect();
        if !lines.is_empty() {
            panels.push(Panel {
                title: title.into(),
                x_label: X_LABEL.into(),
                y_label: label.into(),
                series: lines,
                ..Panel::default()
            });
        }
    };
    let mut rewards = vec![("sum", "reward")];
    rewards.extend(parts.iter().map(|key| {
        let name = key
            .strip_prefix("reward.")
            .unwrap_or("held out, not trained on");
        (name, *key)
    }));
    add(
        "Rewards of drawn answers, smoothed",
        "mean reward",
        &rewards,
    );
    add(
        "Divergence from the reference",
        "nats per token",
        &[("estimated KL", "kl"), ("entropy", "entropy")],
    );
    add(
        "Length of drawn answers",
        "tokens",
        &[("mean", "completion_tokens")],
    );
    add(
        "Shares",
        "share",
        &[
            ("clipped tokens", "clip_share"),
            ("answers that ended", "ended_share"),
            ("groups of one reward", "same_reward_share"),
            ("pairs preferred rightly", "preferred_share"),
        ],
    );
    add(
        "Implicit rewards",
        "beta times log-ratio",
        &[
            ("chosen", "reward_chosen"),
            ("rejected", "reward_rejected"),
            ("margin", "reward_margin"),
        ],
    );
    panels
}

/// Exponential moving average that starts unbiased; it spans some 2% of the run.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let decay = 1.0 - 1.0 / (points.len() as f64 / 50.0).clamp(3.0, 50.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let finite = points.iter().filter(|(_, y)| y.is_finite());
    finite
        .map(|&(x, y)| {
            sum = sum * decay + y;
            weight = weight * decay + 1.0;
            (x, sum / weight)
        })
        .collect()
}

/// Equal factors where the points are positive and the largest is over `factor` times the smallest.
fn scale_of(points: &[(f64, f64)], factor: f64) -> AxisScale {
    let values = || {
        points
            .iter()
            .map(|point| point.1)
            .filter(|value| value.is_finite())
    };
    let low = values().fold(f64::INFINITY, f64::min);
    if low > 0.0 && values().fold(0.0, f64::max) > factor * low {
        AxisScale::Log
    } else {
        AxisScale::Linear
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn smoothing_keeps_a_constant_and_starts_unbiased() {
        let flat: Vec<_> = (0..10).map(|i| (i as f64, 3.0)).collect();
        assert!(smooth(&flat).iter().all(|(_, y)| (y - 3.0).abs() < 1e-12));
        assert!(smooth(&[]).is_empty());
    }

    #[test]
    fn chart_rows_read_metrics_and_ignore_other_keys() {
        let line = r#"{"step":3,"loss":1.5,"eval_loss":null,"epoch":0.1}"#;
        let row: ChartRow = serde_json::from_str(line).unwrap();
        assert_eq!((row.step, row.loss, row.eval_loss), (3, Some(1.5), None));
        let svg = training_chart(&[row]);
        assert_eq!(svg.matches("no data").count(), 2);
        assert!(training_chart(&[]).matches("no data").count() == 3);
        let rewarded =
            r#"{"step":1,"reward":0.5,"reward.finding_f1":0.4,"held_out_reward":0.3,"kl":0.01}"#;
        let row: ChartRow = serde_json::from_str(rewarded).unwrap();
        let svg = training_chart(&[row]);
        for part in ["finding_f1", "held out, not trained on", "estimated KL"] {
            assert!(svg.contains(part), "no {part}");
        }
        let scored = r#"{"step":0,"eval_rouge_l":0.5,"eval_finding_f1":0.25}"#;
        let row: ChartRow = serde_json::from_str(scored).unwrap();
        assert!(training_chart(&[row]).contains("Reports about held-out studies"));
    }
}

//! The curves of a training run as one figure.

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
    let column = |value: fn(&ChartRow) -> Option<f64>| -> Vec<(f64, f64)> {
        rows.iter()
            .filter_map(|row| Some((row.step as f64, value(row)?)))
            .collect()
    };
    let measured = |train: Vec<(f64, f64)>, validation: Vec<(f64, f64)>| {
        let series = |name: &str, color: &str, mark, points| Series {
            name: name.into(),
            color: color.into(),
            mark,
            right: false,
            points,
        };
        vec![
            series("train", BLUE, Mark::FaintLine, train.clone()),
            series("train, smoothed", BLUE, Mark::Line, smooth(&train)),
            series("validation", ORANGE, Mark::Points, validation),
        ]
    };
    let grad_norm = column(|row| row.grad_norm);
    let losses = column(|row| row.loss);
    let loss = Panel {
        title: "Loss".into(),
        x_label: "optimizer step".into(),
        y_label: "loss per token".into(),
        scale: match spans_decades(&losses, 10.0) {
            true => AxisScale::Log,
            false => AxisScale::Linear,
        },
        series: measured(losses, column(|row| row.eval_loss)),
        ..Panel::default()
    };
    let accuracy = Panel {
        title: "Token accuracy".into(),
        x_label: "optimizer step".into(),
        y_label: "share of tokens".into(),
        series: measured(
            column(|row| row.token_acc),
            column(|row| row.eval_token_acc),
        ),
        ..Panel::default()
    };
    let rate = Panel {
        title: "Learning rate and gradient norm".into(),
        x_label: "optimizer step".into(),
        y_label: "learning rate".into(),
        right_label: "gradient norm".into(),
        right_scale: if spans_decades(&grad_norm, 100.0) {
            AxisScale::Log
        } else {
            AxisScale::Linear
        },
        series: vec![
            Series {
                name: "gradient norm (right)".into(),
                color: GREEN.into(),
                mark: Mark::FaintLine,
                right: true,
                points: grad_norm,
            },
            Series {
                name: "learning rate".into(),
                color: BLUE.into(),
                points: column(|row| row.learning_rate),
                ..Series::default()
            },
        ],
        ..Panel::default()
    };
    let mut panels = vec![loss, accuracy, rate];
    let scores = [
        ("finding F1", ORANGE, column(|row| row.eval_finding_f1)),
        ("character ROUGE-L", GREEN, column(|row| row.eval_rouge_l)),
    ];
    if scores.iter().any(|(.., points)| !points.is_empty()) {
        let series = |(name, color, points): (&str, &str, _)| Series {
            name: name.into(),
            color: color.into(),
            mark: Mark::Points,
            right: false,
            points,
        };
        panels.push(Panel {
            title: "Reports about held-out studies".into(),
            x_label: "optimizer step".into(),
            y_label: "score".into(),
            series: scores.map(series).into(),
            ..Panel::default()
        });
    }
    figure(&panels)
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

/// Whether the points are positive and the largest is over `factor` times the smallest.
fn spans_decades(points: &[(f64, f64)], factor: f64) -> bool {
    let values = || {
        points
            .iter()
            .map(|point| point.1)
            .filter(|value| value.is_finite())
    };
    let low = values().fold(f64::INFINITY, f64::min);
    low > 0.0 && values().fold(0.0, f64::max) > factor * low
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
        let scored = r#"{"step":0,"eval_rouge_l":0.5,"eval_finding_f1":0.25}"#;
        let row: ChartRow = serde_json::from_str(scored).unwrap();
        assert!(training_chart(&[row]).contains("Reports about held-out studies"));
    }
}

//! Small charts of a page, as SVG whose colours the page's style gives.

use std::fmt::Write;

use super::names::{ScoreScale, score_name};
use crate::eval::outcome::EvalOutcome;

const WIDTH: f64 = 420.0;
const NAME_WIDTH: f64 = 150.0;
const VALUE_WIDTH: f64 = 52.0;
const ROW: f64 = 26.0;

/// Dots with intervals of one score, a row a system, from 0 to the end of the scale; empty if nobody has it.
pub fn dots(outcome: &EvalOutcome, name: &str) -> String {
    let label = score_name(name);
    let rows: Vec<_> = outcome
        .systems
        .iter()
        .filter_map(|system| Some((system.system, *system.scores.get(name)?)))
        .filter(|(_, score)| !score.value.is_nan())
        .collect();
    if rows.is_empty() {
        return String::new();
    }
    // A score far below the end of its scale fills the axis up to the next fifth.
    let most = rows.iter().fold(0.0, |most: f64, (_, score)| {
        most.max(label.on_axis(if score.high.is_nan() {
            score.value
        } else {
            score.high
        }))
    });
    let end = ((most * 5.0 - 1e-9).ceil() / 5.0).clamp(0.2, 1.0);
    let (left, right) = (NAME_WIDTH, WIDTH - VALUE_WIDTH);
    let x = |value: f64| left + (right - left) * (label.on_axis(value) / end).clamp(0.0, 1.0);
    let height = ROW * rows.len() as f64 + 22.0;
    let mut svg = format!(
        r#"<svg class="dots" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{}">"#,
        label.english
    );
    let bottom = ROW * rows.len() as f64 + 4.0;
    for tick in 0..=2 {
        let at = left + (right - left) * f64::from(tick) / 2.0;
        let share = end * f64::from(tick) / 2.0;
        let text = match label.scale {
            ScoreScale::Ten => format!("{:.1}", share * 10.0),
            _ => format!("{:.0}", share * 100.0),
        };
        let _ = write!(
            svg,
            r#"<line class="grid" x1="{at:.1}" x2="{at:.1}" y1="2" y2="{bottom:.1}"/><text class="tick" x="{at:.1}" y="{:.1}">{text}</text>"#,
            bottom + 14.0
        );
    }
    for (row, (system, score)) in rows.iter().enumerate() {
        let y = ROW * (row as f64 + 0.5) + 2.0;
        let class = system.key();
        let _ = write!(
            svg,
            r#"<text class="name" x="{:.1}" y="{:.1}">{}</text>"#,
            left - 10.0,
            y + 4.0,
            system.names().0
        );
        if !score.low.is_nan() {
            let _ = write!(
                svg,
                r#"<line class="span {class}" x1="{:.1}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}"/>"#,
                x(score.low),
                x(score.high)
            );
        }
        let _ = write!(
            svg,
            r#"<circle class="dot {class}" cx="{:.1}" cy="{y:.1}" r="5"/><text class="value" x="{:.1}" y="{:.1}">{}</text>"#,
            x(score.value),
            WIDTH - 2.0,
            y + 4.0,
            label.value(score.value)
        );
    }
    svg.push_str("</svg>");
    svg
}

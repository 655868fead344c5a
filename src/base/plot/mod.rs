//! Charts as SVG text: curves of a training run, and histograms.
//!
//! This module opens no file and draws nothing that a browser would have to fetch.

use std::fmt::Write;

use serde::Deserialize;

const WIDTH: f64 = 800.0;
const PANEL_HEIGHT: f64 = 300.0;
const FONTS: &str = "Inter, 'Helvetica Neue', Arial, 'Noto Sans CJK SC', 'Source Han Sans SC', \
                     'PingFang SC', 'Microsoft YaHei', sans-serif";
const INK: &str = "#24292f";
const MUTED: &str = "#57606a";
const GRID: &str = "#e4e7eb";
const BLUE: &str = "#1f6feb";
const ORANGE: &str = "#d9480f";
const GREEN: &str = "#1a7f37";
/// More points than this cannot be told apart at the width of a panel.
const MAX_POINTS: usize = 2000;

/// How the values of an axis are spread.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Scale {
    /// Equal steps.
    #[default]
    Linear,
    /// Equal factors; values of 0 and below are left out.
    Log,
}

/// How a series is drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mark {
    /// A line.
    #[default]
    Line,
    /// A thin pale line, for raw values behind a smoothed curve.
    FaintLine,
    /// Dots joined by a thin line.
    Points,
}

/// A named series of points, by rising x. Points that are not finite leave a gap.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Series {
    /// Name in the legend.
    pub name: String,
    /// Colour, as CSS writes it.
    pub color: String,
    /// How it is drawn.
    pub mark: Mark,
    /// Whether it belongs to the axis on the right.
    pub right: bool,
    /// `(x, y)`.
    pub points: Vec<(f64, f64)>,
}

/// One chart: a frame with series, a left axis and, if a series asks for it, a right one.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Panel {
    /// Title above the frame.
    pub title: String,
    /// What x is.
    pub x_label: String,
    /// What y on the left is.
    pub y_label: String,
    /// What y on the right is.
    pub right_label: String,
    /// Spread of the left axis.
    pub scale: Scale,
    /// Spread of the right axis.
    pub right_scale: Scale,
    /// The series, drawn in this order.
    pub series: Vec<Series>,
}

/// Draws panels under one another, each 300 pixels high, as one SVG 800 pixels wide. A single
/// panel is 400 pixels high.
pub fn figure(panels: &[Panel]) -> String {
    let panel_height = if panels.len() == 1 {
        400.0
    } else {
        PANEL_HEIGHT
    };
    let mut svg = open_svg(panel_height * panels.len() as f64);
    for (index, panel) in panels.iter().enumerate() {
        draw_panel(&mut svg, panel, index as f64 * panel_height, panel_height);
    }
    svg.push_str("</svg>\n");
    svg
}

/// One row of a run's `metrics.jsonl`; keys it does not have are `None`, others are ignored.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct TrainingRow {
    /// Finished optimizer steps.
    pub step: u64,
    /// Training loss per target token.
    pub loss: Option<f64>,
    /// Share of target tokens guessed right in training, 0 to 1.
    pub token_acc: Option<f64>,
    /// Validation loss per target token.
    pub eval_loss: Option<f64>,
    /// Share of target tokens guessed right in validation, 0 to 1.
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

/// Draws the curves of a run: loss, token accuracy, learning rate with gradient norm, and where reports
/// were generated their scores.
pub fn training_plot(rows: &[TrainingRow]) -> String {
    let column = |value: fn(&TrainingRow) -> Option<f64>| -> Vec<(f64, f64)> {
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
            true => Scale::Log,
            false => Scale::Linear,
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
            Scale::Log
        } else {
            Scale::Linear
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

/// Draws how often values fall into equal bins, with the median marked. `unit` names the values
/// along x. Values that are not finite are left out.
pub fn histogram(values: &[f64], title: &str, unit: &str) -> String {
    let mut values: Vec<f64> = values
        .iter()
        .copied()
        .filter(|value| value.is_finite())
        .collect();
    values.sort_by(f64::total_cmp);
    let frame = Frame::new(0.0, 400.0);
    let mut svg = open_svg(400.0);
    text(&mut svg, frame.left, 26.0, "start", 15.0, INK, title);
    let (Some(&low), Some(&high)) = (values.first(), values.last()) else {
        no_data(&mut svg, &frame);
        svg.push_str("</svg>\n");
        return svg;
    };
    let median = values[values.len() / 2];
    let step = nice_step((high - low).max(f64::MIN_POSITIVE), bin_count(values.len()));
    let step = if high > low && step.is_finite() {
        step
    } else {
        low.abs().max(1.0)
    };
    let first = (low / step).floor();
    let bins = ((high / step).floor() - first) as usize + 1;
    let mut counts = vec![0_usize; bins.min(1000)];
    let last = counts.len() - 1;
    for value in &values {
        counts[(((value / step).floor() - first) as usize).min(last)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1);
    let x = Axis::exact(first * step, (first + counts.len() as f64) * step);
    let y = Axis::exact(0.0, most as f64 * 1.05);
    draw_grid(&mut svg, &frame, &y, "count");
    for (index, count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
        let left = frame.x(x.place((first + index as f64) * step)) + 0.5;
        let right = frame.x(x.place((first + index as f64 + 1.0) * step)) - 0.5;
        let top = frame.y(y.place(*count as f64));
        let (width, height) = ((right - left).max(0.5), frame.bottom - top);
        let _ = writeln!(
            svg,
            r#"<rect x="{left:.1}" y="{top:.1}" width="{width:.1}" height="{height:.1}" fill="{BLUE}" fill-opacity="0.75"/>"#
        );
    }
    draw_x_axis(&mut svg, &frame, &x, unit);
    let at = frame.x(x.place(median));
    let (top, bottom) = (frame.top, frame.bottom);
    let _ = writeln!(
        svg,
        r#"<line x1="{at:.1}" y1="{top:.1}" x2="{at:.1}" y2="{bottom:.1}" stroke="{ORANGE}" stroke-width="1.5" stroke-dasharray="5 4"/>"#
    );
    let summary = format!("n = {}, median {}", values.len(), short_number(median));
    text(&mut svg, frame.right, 26.0, "end", 12.0, ORANGE, &summary);
    svg.push_str("</svg>\n");
    svg
}

/// Square root rule, within what a panel shows clearly.
fn bin_count(values: usize) -> usize {
    ((values as f64).sqrt() as usize).clamp(5, 40)
}

/// The inside of a panel, in pixels.
struct Frame {
    left: f64,
    right: f64,
    top: f64,
    bottom: f64,
}

impl Frame {
    fn new(offset: f64, height: f64) -> Self {
        Self {
            left: 78.0,
            right: WIDTH - 70.0,
            top: offset + 44.0,
            bottom: offset + height - 50.0,
        }
    }

    fn x(&self, place: f64) -> f64 {
        self.left + place * (self.right - self.left)
    }

    fn y(&self, place: f64) -> f64 {
        self.bottom - place * (self.bottom - self.top)
    }
}

/// A range of values, its spread and its ticks.
struct Axis {
    low: f64,
    high: f64,
    scale: Scale,
    ticks: Vec<f64>,
}

impl Axis {
    /// An axis that holds all `values` with a little room; `None` without any that can be drawn.
    fn around(values: impl Iterator<Item = f64>, scale: Scale) -> Option<Self> {
        let shown = |v: &f64| v.is_finite() && (scale == Scale::Linear || *v > 0.0);
        let (low, high) = values
            .filter(shown)
            .map(|v| (v, v))
            .reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))?;
        if scale == Scale::Log {
            let (low, high) = if low < high {
                (low, high)
            } else {
                (low / 2.0, high * 2.0)
            };
            let room = (high / low).powf(0.04);
            let (low, high) = (low / room, high * room);
            return Some(Self {
                low,
                high,
                scale,
                ticks: log_ticks(low, high),
            });
        }
        let room = if low < high {
            (high - low) * 0.05
        } else {
            low.abs().max(1.0) * 0.5
        };
        // Room below zero would suggest values that cannot be.
        let bottom = if low >= 0.0 {
            (low - room).max(0.0)
        } else {
            low - room
        };
        Some(Self::exact(bottom, high + room))
    }

    fn exact(low: f64, high: f64) -> Self {
        Self {
            low,
            high,
            scale: Scale::Linear,
            ticks: linear_ticks(low, high),
        }
    }

    /// Where a value lies, 0 at the low end and 1 at the high one.
    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).ln() / (self.high / self.low).ln(),
        }
    }

    /// Tick texts, all with as many decimals as the finest step needs.
    fn labels(&self) -> Vec<String> {
        let largest = self
            .ticks
            .iter()
            .fold(0.0_f64, |most, tick| most.max(tick.abs()));
        if self.scale == Scale::Log || self.ticks.len() < 2 || !(1e-3..1e6).contains(&largest) {
            return self.ticks.iter().map(|tick| short_number(*tick)).collect();
        }
        let step = self.ticks[1] - self.ticks[0];
        let decimals = (0..=8)
            .find(|&decimals| {
                let scaled = step * 10_f64.powi(decimals);
                (scaled - scaled.round()).abs() < 1e-6 * scaled
            })
            .unwrap_or(8) as usize;
        self.ticks
            .iter()
            .map(|tick| format!("{tick:.decimals$}"))
            .collect()
    }
}

/// The smallest of 1, 2, 2.5 and 5 × 10^k that cuts `span` into at most `count` parts.
fn nice_step(span: f64, count: usize) -> f64 {
    let rough = span / count as f64;
    let unit = 10_f64.powf(rough.log10().floor());
    let fits = |factor: &&f64| **factor * unit >= rough * (1.0 - 1e-9);
    [1.0, 2.0, 2.5, 5.0].iter().find(fits).unwrap_or(&10.0) * unit
}

fn linear_ticks(low: f64, high: f64) -> Vec<f64> {
    let step = nice_step(high - low, 6);
    if !(step.is_finite() && step > 0.0) {
        return Vec::new();
    }
    let first = (low / step - 1e-9).ceil();
    // Multiples rather than sums, so that no tick reads 0.30000000000000004; `+ 0.0` turns -0 to 0.
    let tick = |index: usize| (first + index as f64) * step + 0.0;
    (0..20)
        .map(tick)
        .take_while(|tick| *tick <= high + step * 1e-9)
        .collect()
}

fn log_ticks(low: f64, high: f64) -> Vec<f64> {
    let decades = low.log10().floor() as i32..=high.log10().ceil() as i32;
    let within = |tick: &f64| *tick >= low && *tick <= high;
    let all = |factors: &'static [f64], every: usize| -> Vec<f64> {
        let powers = decades.clone().step_by(every);
        powers
            .flat_map(|p| factors.iter().map(move |f| f * 10_f64.powi(p)))
            .filter(within)
            .collect()
    };
    let every = (decades.clone().count() / 8).max(1);
    let ticks = all(&[1.0], every);
    if ticks.len() >= 3 {
        return ticks;
    }
    let finer = all(&[1.0, 2.0, 5.0], 1);
    if finer.len() >= 2 {
        finer
    } else {
        linear_ticks(low, high)
    }
}

/// Few characters for a number: `0`, `0.25`, `1.5e-4`, `20000`.
fn short_number(value: f64) -> String {
    if value == 0.0 {
        return "0".into();
    }
    let trimmed = |text: String| {
        if text.contains('.') {
            text.trim_end_matches('0').trim_end_matches('.').to_string()
        } else {
            text
        }
    };
    if (1e-3..1e6).contains(&value.abs()) {
        let decimals = (3 - value.abs().log10().floor() as i32).clamp(0, 6) as usize;
        return trimmed(format!("{value:.decimals$}"));
    }
    let text = format!("{value:.3e}");
    match text.split_once('e') {
        Some((digits, exponent)) => format!("{}e{exponent}", trimmed(digits.to_string())),
        None => text,
    }
}

/// Exponential moving average that starts unbiased; it spans some 2% of the run.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 50.0).clamp(3.0, 50.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let finite = points.iter().filter(|(_, y)| y.is_finite());
    finite
        .map(|&(x, y)| {
            sum = sum * keep + y;
            weight = weight * keep + 1.0;
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

/// At most [`MAX_POINTS`] points: of each stretch the lowest and the highest, so peaks stay.
fn thin(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.len() <= MAX_POINTS {
        return points.to_vec();
    }
    let stretch = points.len().div_ceil(MAX_POINTS / 2);
    let by_y = |a: &&(f64, f64), b: &&(f64, f64)| a.1.total_cmp(&b.1);
    let mut result = Vec::with_capacity(MAX_POINTS);
    for part in points.chunks(stretch) {
        let finite = || part.iter().filter(|point| point.1.is_finite());
        if let (Some(low), Some(high)) = (finite().min_by(by_y), finite().max_by(by_y)) {
            let (first, second) = if low.0 <= high.0 {
                (low, high)
            } else {
                (high, low)
            };
            result.extend([*first, *second]);
        } else {
            result.extend(part.first());
        }
    }
    result
}

fn open_svg(height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"{FONTS}\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    )
}

fn draw_panel(svg: &mut String, panel: &Panel, offset: f64, height: f64) {
    let frame = Frame::new(offset, height);
    text(
        svg,
        frame.left,
        offset + 26.0,
        "start",
        15.0,
        INK,
        &panel.title,
    );
    let points = |right: bool| {
        panel
            .series
            .iter()
            .filter(move |s| s.right == right)
            .flat_map(|s| s.points.iter())
    };
    let left = Axis::around(points(false).map(|point| point.1), panel.scale);
    let right = Axis::around(points(true).map(|point| point.1), panel.right_scale);
    let xs = points(false)
        .chain(points(true))
        .filter(|point| point.1.is_finite());
    let x_range = xs
        .map(|point| (point.0, point.0))
        .reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)));
    let (Some((low, high)), true) = (x_range, left.is_some() || right.is_some()) else {
        no_data(svg, &frame);
        return;
    };
    let x = if low < high {
        Axis::exact(low, high)
    } else {
        Axis::exact(low - 1.0, high + 1.0)
    };
    if let Some(axis) = &left {
        draw_grid(svg, &frame, axis, &panel.y_label);
    }
    if let Some(axis) = &right {
        draw_right_axis(svg, &frame, axis, &panel.right_label);
    }
    draw_x_axis(svg, &frame, &x, &panel.x_label);
    let drawn = |series: &&Series| series.points.iter().any(|point| point.1.is_finite());
    for series in panel.series.iter().filter(drawn) {
        if let Some(axis) = if series.right { &right } else { &left } {
            draw_series(svg, &frame, &x, axis, series);
        }
    }
    draw_legend(
        svg,
        &frame,
        panel.series.iter().filter(drawn),
        offset + 26.0,
    );
}

fn draw_series(svg: &mut String, frame: &Frame, x: &Axis, y: &Axis, series: &Series) {
    let mut path = String::new();
    let mut dots = Vec::new();
    let mut pen_down = false;
    for (at, value) in thin(&series.points) {
        let (px, py) = (frame.x(x.place(at)), frame.y(y.place(value)));
        if !(px.is_finite() && py.is_finite()) {
            pen_down = false;
            continue;
        }
        let _ = write!(path, "{}{px:.1} {py:.1}", if pen_down { "L" } else { "M" });
        pen_down = true;
        dots.push((px, py));
    }
    let color = escape(&series.color);
    let (width, opacity) = match series.mark {
        Mark::Line => (2.0, 1.0),
        Mark::FaintLine => (1.0, 0.4),
        Mark::Points => (1.2, 0.8),
    };
    let _ = writeln!(
        svg,
        r#"<path d="{path}" fill="none" stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity}" stroke-linejoin="round"/>"#
    );
    // A line through one point has no length.
    if series.mark == Mark::Points || dots.len() == 1 {
        for (px, py) in dots {
            let _ = writeln!(
                svg,
                r##"<circle cx="{px:.1}" cy="{py:.1}" r="3.5" fill="{color}" stroke="#ffffff"/>"##
            );
        }
    }
}

/// Horizontal grid lines with the left axis' numbers and its label.
fn draw_grid(svg: &mut String, frame: &Frame, axis: &Axis, label: &str) {
    for (tick, number) in axis.ticks.iter().zip(axis.labels()) {
        let at = frame.y(axis.place(*tick));
        let (left, right) = (frame.left, frame.right);
        let _ = writeln!(
            svg,
            r#"<line x1="{left:.1}" y1="{at:.1}" x2="{right:.1}" y2="{at:.1}" stroke="{GRID}"/>"#
        );
        text(svg, frame.left - 8.0, at + 4.0, "end", 12.0, MUTED, &number);
    }
    side_label(svg, 18.0, frame, label);
}

/// Numbers and label of the right axis; it has no grid lines, as the left one's would cross them.
fn draw_right_axis(svg: &mut String, frame: &Frame, axis: &Axis, label: &str) {
    for (tick, number) in axis.ticks.iter().zip(axis.labels()) {
        let (at, right) = (frame.y(axis.place(*tick)), frame.right);
        let end = right + 5.0;
        let _ = writeln!(
            svg,
            r#"<line x1="{right:.1}" y1="{at:.1}" x2="{end:.1}" y2="{at:.1}" stroke="{MUTED}"/>"#
        );
        text(
            svg,
            frame.right + 9.0,
            at + 4.0,
            "start",
            12.0,
            MUTED,
            &number,
        );
    }
    side_label(svg, WIDTH - 10.0, frame, label);
}

fn draw_x_axis(svg: &mut String, frame: &Frame, axis: &Axis, label: &str) {
    let (left, right, top, bottom) = (frame.left, frame.right, frame.top, frame.bottom);
    for (tick, number) in axis.ticks.iter().zip(axis.labels()) {
        let at = frame.x(axis.place(*tick));
        let end = bottom + 5.0;
        let _ = writeln!(
            svg,
            r#"<line x1="{at:.1}" y1="{top:.1}" x2="{at:.1}" y2="{bottom:.1}" stroke="{GRID}" stroke-opacity="0.6"/><line x1="{at:.1}" y1="{bottom:.1}" x2="{at:.1}" y2="{end:.1}" stroke="{MUTED}"/>"#
        );
        text(svg, at, bottom + 19.0, "middle", 12.0, MUTED, &number);
    }
    let _ = writeln!(
        svg,
        r#"<line x1="{left:.1}" y1="{bottom:.1}" x2="{right:.1}" y2="{bottom:.1}" stroke="{MUTED}"/>"#
    );
    text(
        svg,
        (left + right) / 2.0,
        bottom + 38.0,
        "middle",
        12.0,
        MUTED,
        label,
    );
}

/// Legend to the right of the title, outside the frame so that it covers no curve.
fn draw_legend<'a>(
    svg: &mut String,
    frame: &Frame,
    series: impl DoubleEndedIterator<Item = &'a Series>,
    baseline: f64,
) {
    let mut right = frame.right;
    for series in series.rev() {
        text(svg, right, baseline, "end", 12.0, INK, &series.name);
        let end = right - text_width(&series.name, 12.0) - 7.0;
        let (start, y) = (end - 20.0, baseline - 4.0);
        let color = escape(&series.color);
        let (width, opacity) = match series.mark {
            Mark::FaintLine => (1.5, 0.5),
            Mark::Line | Mark::Points => (2.5, 1.0),
        };
        let _ = writeln!(
            svg,
            r#"<line x1="{start:.1}" y1="{y:.1}" x2="{end:.1}" y2="{y:.1}" stroke="{color}" stroke-width="{width}" stroke-opacity="{opacity}"/>"#
        );
        if series.mark == Mark::Points {
            let at = (start + end) / 2.0;
            let _ = writeln!(
                svg,
                r#"<circle cx="{at:.1}" cy="{y:.1}" r="3.5" fill="{color}"/>"#
            );
        }
        right = start - 16.0;
    }
}

/// Rough width in pixels: a CJK character is as wide as the font is high, others about half.
fn text_width(content: &str, size: f64) -> f64 {
    content
        .chars()
        .map(|c| if c >= '\u{2e80}' { size } else { size * 0.54 })
        .sum()
}

fn side_label(svg: &mut String, x: f64, frame: &Frame, label: &str) {
    let y = (frame.top + frame.bottom) / 2.0;
    let label = escape(label);
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" transform="rotate(-90 {x:.1} {y:.1})" text-anchor="middle" font-size="12" fill="{MUTED}">{label}</text>"#
    );
}

fn no_data(svg: &mut String, frame: &Frame) {
    let (x, y) = (
        (frame.left + frame.right) / 2.0,
        (frame.top + frame.bottom) / 2.0,
    );
    text(svg, x, y, "middle", 13.0, MUTED, "no data");
}

fn text(svg: &mut String, x: f64, y: f64, anchor: &str, size: f64, fill: &str, content: &str) {
    let content = escape(content);
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{content}</text>"#
    );
}

/// Makes text safe inside elements and attributes; control characters XML forbids are dropped.
fn escape(content: &str) -> String {
    let mut result = String::with_capacity(content.len());
    for c in content.chars() {
        match c {
            '&' => result.push_str("&amp;"),
            '<' => result.push_str("&lt;"),
            '>' => result.push_str("&gt;"),
            '"' => result.push_str("&quot;"),
            '\'' => result.push_str("&#39;"),
            '\t' | '\n' | '\r' => result.push(' '),
            c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
            c => result.push(c),
        }
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_numbers_inside_the_range() {
        assert_eq!(
            linear_ticks(0.0, 1.0),
            [0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0]
        );
        assert_eq!(linear_ticks(-3.0, 12.0), [-2.5, 0.0, 2.5, 5.0, 7.5, 10.0]);
        assert_eq!(linear_ticks(1.0, 1.0), [0.0; 0]);
        assert_eq!(log_ticks(0.5, 2000.0), [1.0, 10.0, 100.0, 1000.0]);
        assert_eq!(log_ticks(1.5, 30.0), [2.0, 5.0, 10.0, 20.0]);
        assert!(log_ticks(1.1, 1.3).len() >= 2);
        assert_eq!(
            Axis::exact(0.0, 1.0).labels(),
            ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
        );
    }

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 1e-4, 2.5e-5, 0.25, 573.0, 20000.0, -1.5, 3e7].map(short_number);
        assert_eq!(
            shown,
            ["0", "1e-4", "2.5e-5", "0.25", "573", "20000", "-1.5", "3e7"]
        );
    }

    #[test]
    fn text_is_escaped() {
        let svg = histogram(&[1.0, 2.0], "<script>肺 & \"心\"\u{1}", "a'b");
        assert!(
            svg.contains("&lt;script&gt;肺 &amp; &quot;心&quot;</text>"),
            "{svg}"
        );
        assert!(svg.contains("a&#39;b") && !svg.contains("<script"));
    }

    #[test]
    fn odd_values_draw_without_a_nan() {
        let odd = [f64::NAN, f64::INFINITY, 0.0, -1.0, 5.0];
        let points: Vec<_> = odd
            .iter()
            .enumerate()
            .map(|(i, y)| (i as f64, *y))
            .collect();
        for scale in [Scale::Linear, Scale::Log] {
            for count in 0..=odd.len() {
                let series = Series {
                    points: points[..count].to_vec(),
                    ..Series::default()
                };
                let panel = Panel {
                    scale,
                    series: vec![series],
                    ..Panel::default()
                };
                let svg = figure(&[panel]);
                assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
            }
        }
        for values in [
            &[][..],
            &[f64::NAN],
            &[0.0],
            &[7.0, 7.0],
            &[-1e300, 1e300],
            &[1e-300, 0.0],
        ] {
            let svg = histogram(values, "t", "u");
            assert!(
                !svg.contains("NaN") && !svg.contains("inf"),
                "{values:?} {svg}"
            );
        }
    }

    #[test]
    fn a_gap_lifts_the_pen_and_peaks_survive_thinning() {
        let points = vec![(0.0, 1.0), (1.0, f64::NAN), (2.0, 2.0), (3.0, 1.0)];
        let series = Series {
            points,
            ..Series::default()
        };
        let svg = figure(&[Panel {
            series: vec![series],
            ..Panel::default()
        }]);
        let path = svg
            .split("<path d=\"")
            .nth(1)
            .unwrap()
            .split('"')
            .next()
            .unwrap();
        assert_eq!(
            (path.matches('M').count(), path.matches('L').count()),
            (2, 1)
        );

        let mut many: Vec<_> = (0..100_000).map(|i| (i as f64, 0.0)).collect();
        many[54_321].1 = 9.0;
        let thinned = thin(&many);
        assert!(thinned.len() <= MAX_POINTS && thinned.contains(&(54_321.0, 9.0)));
        assert!(thinned.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }

    #[test]
    fn smoothing_keeps_a_constant_and_starts_unbiased() {
        let flat: Vec<_> = (0..10).map(|i| (i as f64, 3.0)).collect();
        assert!(smooth(&flat).iter().all(|(_, y)| (y - 3.0).abs() < 1e-12));
        assert!(smooth(&[]).is_empty());
    }

    #[test]
    fn a_histogram_counts_every_value_once() {
        let values: Vec<f64> = (0..100).map(f64::from).collect();
        let svg = histogram(&values, "长度", "tokens");
        // Ten bins of ten, beside the background.
        assert_eq!(svg.matches("<rect").count(), 11);
        assert!(svg.contains("n = 100, median 50"));
    }

    #[test]
    fn training_rows_read_metrics_and_ignore_other_keys() {
        let line = r#"{"step":3,"loss":1.5,"eval_loss":null,"epoch":0.1}"#;
        let row: TrainingRow = serde_json::from_str(line).unwrap();
        assert_eq!((row.step, row.loss, row.eval_loss), (3, Some(1.5), None));
        let svg = training_plot(&[row]);
        assert_eq!(svg.matches("no data").count(), 2);
        assert!(training_plot(&[]).matches("no data").count() == 3);
        let scored = r#"{"step":0,"eval_rouge_l":0.5,"eval_finding_f1":0.25}"#;
        let row: TrainingRow = serde_json::from_str(scored).unwrap();
        assert!(training_plot(&[row]).contains("Reports about held-out studies"));
    }
}

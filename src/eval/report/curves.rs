//! Curves of probabilities as SVG, whose colours the page's style gives.

use std::fmt::Write;

use crate::eval::probability::evaluation::{ProbabilityScores, Quality};

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 14.0;
const TOP: f64 = 30.0;
const BOTTOM: f64 = 46.0;

/// A frame from 0 to 1 across and from 0 to `top` upwards.
struct Frame {
    svg: String,
    top: f64,
}

impl Frame {
    fn new(label: &str, [across, upwards]: [&str; 2], top: f64) -> Self {
        let mut this = Self {
            svg: format!(
                r#"<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}"><title>{label}</title>"#
            ),
            top,
        };
        // Writing to a string cannot fail, here and below.
        for tick in 0..=4 {
            let share = f64::from(tick) / 4.0;
            let (x, y) = (this.x(share), this.y(share * top));
            let _ = write!(
                this.svg,
                r#"<line class="grid" x1="{x:.1}" x2="{x:.1}" y1="{TOP}" y2="{:.1}"/><line class="grid" x1="{LEFT}" x2="{:.1}" y1="{y:.1}" y2="{y:.1}"/><text class="tick" x="{x:.1}" y="{:.1}">{:.0}</text><text class="tick left" x="{:.1}" y="{:.1}">{}</text>"#,
                HEIGHT - BOTTOM,
                WIDTH - RIGHT,
                HEIGHT - BOTTOM + 16.0,
                100.0 * share,
                LEFT - 6.0,
                y + 4.0,
                percent(share * top)
            );
        }
        let middle = TOP + (HEIGHT - TOP - BOTTOM) / 2.0;
        let _ = write!(
            this.svg,
            r#"<text class="axis" x="{:.1}" y="{:.1}">{across}</text><text class="axis" transform="translate(13 {middle:.1}) rotate(-90)">{upwards}</text>"#,
            LEFT + (WIDTH - LEFT - RIGHT) / 2.0,
            HEIGHT - 10.0
        );
        this
    }

    fn x(&self, share: f64) -> f64 {
        LEFT + (WIDTH - LEFT - RIGHT) * share.clamp(0.0, 1.0)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value / self.top).clamp(0.0, 1.0)
    }

    fn line(&mut self, class: &str, points: impl Iterator<Item = (f64, f64)>) {
        let mut path = String::new();
        for (at, (x, y)) in points.enumerate() {
            let mark = if at == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{mark}{:.1} {:.1}", self.x(x), self.y(y));
        }
        let _ = write!(self.svg, r#"<path class="{class}" d="{path}"/>"#);
    }

    fn dot(&mut self, class: &str, x: f64, y: f64, title: &str) {
        let (x, y) = (self.x(x), self.y(y));
        let _ = write!(
            self.svg,
            r#"<circle class="{class}" cx="{x:.1}" cy="{y:.1}" r="4"><title>{title}</title></circle>"#
        );
    }

    /// The area between two lines over the same places.
    fn band(&mut self, class: &str, points: &[(f64, f64, f64)]) {
        let mut path = String::new();
        let there = points.iter().map(|(x, low, _)| (x, low));
        let back = points.iter().rev().map(|(x, _, high)| (x, high));
        for (at, (x, y)) in there.chain(back).enumerate() {
            let mark = if at == 0 { 'M' } else { 'L' };
            let _ = write!(path, "{mark}{:.1} {:.1}", self.x(*x), self.y(*y));
        }
        let _ = write!(self.svg, r#"<path class="{class}" d="{path}Z"/>"#);
    }

    /// Names of the lines that are there, above the frame.
    fn finish(mut self, names: &[(&str, &str)]) -> String {
        let mut x = LEFT;
        for (class, name) in names {
            let _ = write!(
                self.svg,
                r#"<circle class="{class}" cx="{:.1}" cy="14" r="4"/><text class="name" x="{:.1}" y="18">{name}</text>"#,
                x + 4.0,
                x + 14.0
            );
            x += 118.0;
        }
        self.svg.push_str("</svg>");
        self.svg
    }
}

fn percent(share: f64) -> String {
    let value = 100.0 * share;
    if (value - value.round()).abs() < 1e-9 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

/// Class, name and numbers of each line that there is.
fn lines(
    scores: &ProbabilityScores,
) -> impl Iterator<Item = (&'static str, &'static str, &Quality)> {
    let before = scores.before.as_ref();
    let after = scores.after.as_ref();
    let before = before.map(|quality| ("before", "校准前 before", quality));
    before
        .into_iter()
        .chain(after.map(|quality| ("after", "校准后 after", quality)))
}

/// Observed share against probability, by bins of equal count; the diagonal is honest.
pub(super) fn reliability(scores: &ProbabilityScores) -> String {
    let mut frame = Frame::new(
        "可靠性曲线 reliability curve",
        ["预测概率 probability, %", "实际比例 observed, %"],
        1.0,
    );
    frame.line("ideal", [(0.0, 0.0), (1.0, 1.0)].into_iter());
    for (class, _, quality) in lines(scores) {
        let bins = quality.reliability.iter();
        frame.line(
            class,
            bins.clone().map(|bin| (bin.probability, bin.observed)),
        );
        for bin in bins {
            let title = format!(
                "{:.1} % → {:.1} %, {}",
                100.0 * bin.probability,
                100.0 * bin.observed,
                bin.count
            );
            frame.dot(class, bin.probability, bin.observed, &title);
        }
    }
    frame.finish(&names(scores))
}

/// Classes and names of the lines of one model.
fn names(scores: &ProbabilityScores) -> Vec<(&'static str, &'static str)> {
    lines(scores)
        .map(|(class, name, _)| (class, name))
        .collect()
}

/// Error against coverage, the surest answers first, with the target as a line and the interval of the error as a band;
/// and the line of another model.
pub(super) fn coverage(
    scores: &ProbabilityScores,
    other: Option<&ProbabilityScores>,
    target: f64,
) -> String {
    let of_other = other.and_then(|other| other.after.as_ref().or(other.before.as_ref()));
    let qualities = lines(scores).map(|(_, _, quality)| quality).chain(of_other);
    let errors = qualities.flat_map(|quality| &quality.coverage_curve);
    let most = errors.fold(2.0 * target, |most, (_, error)| most.max(*error));
    // The next tenth, so that ticks are readable numbers.
    let top = ((most * 10.0 - 1e-9).ceil() / 10.0).clamp(0.1, 1.0);
    let mut frame = Frame::new(
        "覆盖率与错误率曲线 error against coverage",
        ["覆盖率 coverage, %", "错误率 error, %"],
        top,
    );
    let band: Vec<(f64, f64, f64)> = scores
        .abstention
        .iter()
        .filter(|point| !point.error.low.is_nan())
        .map(|point| (point.coverage, point.error.low, point.error.high))
        .collect();
    if band.len() > 1 {
        frame.band("band", &band);
    }
    frame.line("ideal", [(0.0, target), (1.0, target)].into_iter());
    for (class, _, quality) in lines(scores) {
        frame.line(class, quality.coverage_curve.iter().copied());
    }
    let mut names = names(scores);
    if let Some(quality) = of_other {
        frame.line("other", quality.coverage_curve.iter().copied());
        names.push(("other", "另一次 other"));
    }
    frame.finish(&names)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::{
        bootstrap::Interval,
        probability::{evaluation::CoveragePoint, metrics::ReliabilityBin, thresholds::Thresholds},
    };

    fn quality(shift: f64) -> Quality {
        Quality {
            auc: 0.9,
            ece: 0.1,
            brier: 0.1,
            coverage: 0.5,
            reliability: (1..4)
                .map(|at| ReliabilityBin {
                    probability: f64::from(at) / 4.0,
                    observed: f64::from(at) / 4.0 + shift,
                    count: 10,
                })
                .collect(),
            coverage_curve: vec![(0.5, 0.0), (1.0, 0.31)],
        }
    }

    #[test]
    fn lines_that_are_there_are_drawn_and_named() {
        let value = 0.9;
        let mut scores = ProbabilityScores {
            positives: 10,
            negatives: 20,
            auc: Interval {
                value,
                low: value,
                high: value,
            },
            before: Some(quality(0.2)),
            after: Some(quality(0.0)),
            decided: None,
            coverage: Interval {
                value: 0.5,
                low: 0.4,
                high: 0.6,
            },
            abstention: [0.5, 1.0]
                .map(|coverage| CoveragePoint {
                    coverage,
                    error: Interval {
                        value,
                        low: 0.1,
                        high: 0.2,
                    },
                })
                .to_vec(),
            thresholds: Thresholds::default(),
        };
        let svg = reliability(&scores);
        assert_eq!(svg.matches("<path class=\"before\"").count(), 1);
        // Three bins and the mark of the name.
        assert_eq!(svg.matches("<circle class=\"after\"").count(), 4);
        // The highest error is 31 %: the axis ends at 40.
        let alone = coverage(&scores, None, 0.05);
        assert!(alone.contains(">40</text>") && alone.contains("class=\"band\""));
        assert!(!alone.contains("class=\"other\""));
        let both = coverage(&scores, Some(&scores.clone()), 0.05);
        assert!(both.contains("<path class=\"other\"") && both.contains("另一次"));
        scores.after = None;
        assert!(!reliability(&scores).contains("after"));
        assert!(!svg.contains("NaN"));
    }
}

//! Charts of series, under one another in one figure.

use std::fmt::Write;

use super::{
    axis::{Axis, AxisScale},
    frame::{PanelFrame, draw_grid, draw_right_axis, draw_x_axis, no_data},
    svg::{INK, escape, open_svg, text, text_width},
};

const PANEL_HEIGHT: f64 = 300.0;
/// More points than this cannot be distinguished at the width of a panel.
const MAX_POINTS: usize = 2000;

/// How a series is drawn.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mark {
    /// A line.
    #[default]
    Line,
    /// A thin pale line, for raw values under a smoothed curve.
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

/// One chart: a frame with series, a left axis and, if a series belongs to it, a right one.
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
    pub scale: AxisScale,
    /// Spread of the right axis.
    pub right_scale: AxisScale,
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

fn draw_panel(svg: &mut String, panel: &Panel, offset: f64, height: f64) {
    let frame = PanelFrame::new(offset, height);
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

fn draw_series(svg: &mut String, frame: &PanelFrame, x: &Axis, y: &Axis, series: &Series) {
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

/// Legend to the right of the title, outside the frame so that it covers no curve.
fn draw_legend<'a>(
    svg: &mut String,
    frame: &PanelFrame,
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_values_draw_without_a_nan() {
        let odd = [f64::NAN, f64::INFINITY, 0.0, -1.0, 5.0];
        let points: Vec<_> = odd
            .iter()
            .enumerate()
            .map(|(i, y)| (i as f64, *y))
            .collect();
        for scale in [AxisScale::Linear, AxisScale::Log] {
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
}

//! The inside of a panel, with its grid, axes and labels.

use std::fmt::Write;

use super::{
    axis::Axis,
    svg::{GRID, MUTED, WIDTH, escape, text},
};

/// The inside of a panel, in pixels.
pub(super) struct PanelFrame {
    pub(super) left: f64,
    pub(super) right: f64,
    pub(super) top: f64,
    pub(super) bottom: f64,
}

impl PanelFrame {
    pub(super) fn new(offset: f64, height: f64) -> Self {
        Self {
            left: 78.0,
            right: WIDTH - 70.0,
            top: offset + 44.0,
            bottom: offset + height - 50.0,
        }
    }

    pub(super) fn x(&self, place: f64) -> f64 {
        self.left + place * (self.right - self.left)
    }

    pub(super) fn y(&self, place: f64) -> f64 {
        self.bottom - place * (self.bottom - self.top)
    }
}

/// Horizontal grid lines with the left axis' numbers and its label.
pub(super) fn draw_grid(svg: &mut String, frame: &PanelFrame, axis: &Axis, label: &str) {
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
pub(super) fn draw_right_axis(svg: &mut String, frame: &PanelFrame, axis: &Axis, label: &str) {
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

pub(super) fn draw_x_axis(svg: &mut String, frame: &PanelFrame, axis: &Axis, label: &str) {
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

fn side_label(svg: &mut String, x: f64, frame: &PanelFrame, label: &str) {
    let y = (frame.top + frame.bottom) / 2.0;
    let label = escape(label);
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" transform="rotate(-90 {x:.1} {y:.1})" text-anchor="middle" font-size="12" fill="{MUTED}">{label}</text>"#
    );
}

pub(super) fn no_data(svg: &mut String, frame: &PanelFrame) {
    let (x, y) = (
        (frame.left + frame.right) / 2.0,
        (frame.top + frame.bottom) / 2.0,
    );
    text(svg, x, y, "middle", 13.0, MUTED, "no data");
}

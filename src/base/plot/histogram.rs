//! How often values fall into equal bins.

use std::fmt::Write;

use super::{
    axis::{Axis, nice_step, short_number},
    frame::{PanelFrame, draw_grid, draw_x_axis, no_data},
    svg::{BLUE, INK, ORANGE, open_svg, text},
};

/// Draws how often values fall into equal bins, with the median marked. `unit` names the values
/// along x. Values that are not finite are left out.
pub fn histogram(values: &[f64], title: &str, unit: &str) -> String {
    let mut values: Vec<f64> = values
        .iter()
        .copied()
        .filter(|value| value.is_finite())
        .collect();
    values.sort_by(f64::total_cmp);
    let frame = PanelFrame::new(0.0, 400.0);
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

#[cfg(test)]
mod tests {
    use super::*;

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
    fn a_histogram_counts_every_value_once() {
        let values: Vec<f64> = (0..100).map(f64::from).collect();
        let svg = histogram(&values, "长度", "tokens");
        // Ten bins of ten, beside the background.
        assert_eq!(svg.matches("<rect").count(), 11);
        assert!(svg.contains("n = 100, median 50"));
    }

    #[test]
    fn odd_values_draw_without_a_nan() {
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
}

//! Elements of an SVG: the root, texts, and the colours they share.

use std::fmt::Write;

pub(super) const WIDTH: f64 = 800.0;
pub(super) const INK: &str = "#24292f";
pub(super) const MUTED: &str = "#57606a";
pub(super) const GRID: &str = "#e4e7eb";
/// Colour of a first series, as CSS writes it.
pub const BLUE: &str = "#1f6feb";
/// Colour of a second series.
pub const ORANGE: &str = "#d9480f";
/// Colour of a third series.
pub const GREEN: &str = "#1a7f37";
const FONTS: &str = "Inter, 'Helvetica Neue', Arial, 'Noto Sans CJK SC', 'Source Han Sans SC', \
                     'PingFang SC', 'Microsoft YaHei', sans-serif";

pub(super) fn open_svg(height: f64) -> String {
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         viewBox=\"0 0 {WIDTH} {height}\" font-family=\"{FONTS}\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n"
    )
}

/// Rough width in pixels: a CJK character is as wide as the font is high, others about half.
pub(super) fn text_width(content: &str, size: f64) -> f64 {
    content
        .chars()
        .map(|c| if c >= '\u{2e80}' { size } else { size * 0.54 })
        .sum()
}

pub(super) fn text(
    svg: &mut String,
    x: f64,
    y: f64,
    anchor: &str,
    size: f64,
    fill: &str,
    content: &str,
) {
    let content = escape(content);
    let _ = writeln!(
        svg,
        r#"<text x="{x:.1}" y="{y:.1}" text-anchor="{anchor}" font-size="{size}" fill="{fill}">{content}</text>"#
    );
}

/// Makes text safe inside elements and attributes; control characters XML forbids are dropped.
pub(super) fn escape(content: &str) -> String {
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

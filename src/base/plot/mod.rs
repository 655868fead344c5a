//! Charts as SVG text: series on axes, and histograms.
//!
//! This module opens no file and draws nothing that a browser would have to fetch.

mod axis;
mod frame;
mod histogram;
mod panel;
mod svg;

pub use axis::AxisScale;
pub use histogram::histogram;
pub use panel::{Mark, Panel, Series, figure};
pub use svg::{BLUE, GREEN, ORANGE};

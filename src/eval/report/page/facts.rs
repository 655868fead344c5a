//! What a page says besides the scores.

use super::rollouts::PageRollout;
use crate::eval::caveat::Caveat;

/// What a page says besides the scores.
#[derive(Debug, Clone, Default)]
pub struct PageFacts {
    /// Rows of the head: Chinese name, English name, value.
    pub facts: Vec<(&'static str, &'static str, String)>,
    /// Things a reader must know before believing the numbers.
    pub warnings: Vec<Caveat>,
    /// Mean loss per token, perplexity and token accuracy (0 to 1) on the true reports.
    pub loss: Option<(f64, f64, f64)>,
    /// Curves of the training run, as SVG.
    pub curves: Option<String>,
    /// Answers that the training run has drawn and rewarded last.
    pub rollout: Option<PageRollout>,
    /// Most cases of the gallery.
    pub gallery: usize,
}

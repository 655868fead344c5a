//! What quantisation costs, measured.

use serde::Serialize;

/// Means over answers' tokens, each predicted from the true ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measures {
    /// e to the mean loss.
    pub perplexity: f64,
    /// Share of tokens whose likeliest prediction is right.
    pub accuracy: f64,
    /// Share of tokens whose likeliest prediction is that of the floats.
    pub agreement: f64,
}

impl Measures {
    /// Of predictions (loss, likeliest token, true token) beside those of the floats.
    pub(super) fn new(of: &[&(f64, i64, i64)], floats: &[&(f64, i64, i64)]) -> Self {
        let count = of.len().max(1) as f64;
        let right = of.iter().filter(|(_, likeliest, id)| likeliest == id);
        let same = of.iter().zip(floats).filter(|(a, b)| a.1 == b.1);
        Self {
            perplexity: (of.iter().map(|(loss, ..)| loss).sum::<f64>() / count).exp(),
            accuracy: right.count() as f64 / count,
            agreement: same.count() as f64 / count,
        }
    }
}

/// Three models on the same tokens.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Compared {
    /// Tokens.
    pub targets: usize,
    /// The model that was quantised.
    pub floats: Measures,
    /// In the same formats without calibration.
    pub round_to_nearest: Measures,
    /// As it is written.
    pub calibrated: Measures,
}

/// How far the residual stream after a layer is from that of the floats, relative to it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct LayerReport {
    /// From 0.
    pub layer: usize,
    /// Without calibration.
    pub round_to_nearest: f64,
    /// As it is written.
    pub calibrated: f64,
}

/// Relative error of a linear layer's outputs on the samples that it was calibrated on.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MatrixReport {
    /// Path.
    pub layer: String,
    /// Its format.
    pub format: String,
    /// Of round-to-nearest.
    pub round_to_nearest: f64,
    /// As it is written.
    pub calibrated: f64,
}

/// All that was measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    /// Formats, in words.
    pub formats: String,
    /// Samples that were calibrated on.
    pub calibration_samples: usize,
    /// Samples that were only measured.
    pub held_out_samples: usize,
    /// On the samples that were calibrated on.
    pub calibration: Option<Compared>,
    /// On the others.
    pub held_out: Option<Compared>,
    /// Layer after layer, on samples that were held out.
    pub layers: Vec<LayerReport>,
    /// The calibrated matrices.
    pub matrices: Vec<MatrixReport>,
}

impl Report {
    /// The results in lines for a reader: held-out samples where there are some.
    pub fn lines(&self) -> Vec<String> {
        let mut lines = Vec::new();
        let (compared, which) = match (&self.held_out, &self.calibration) {
            (Some(compared), _) => (compared, "held out"),
            (None, Some(compared)) => (compared, "calibrated on, which flatters"),
            (None, None) => return lines,
        };
        lines.push(format!(
            "on {} tokens of samples that were {which}: perplexity, right tokens, tokens as the floats",
            compared.targets
        ));
        for (name, measures) in [
            ("floats", compared.floats),
            ("round to nearest", compared.round_to_nearest),
            ("calibrated", compared.calibrated),
        ] {
            lines.push(format!(
                "  {name:16}  {:10.4}  {:6.2} %  {:6.2} %",
                measures.perplexity,
                100.0 * measures.accuracy,
                100.0 * measures.agreement
            ));
        }
        let mean = |of: fn(&MatrixReport) -> f64| {
            let sum: f64 = self.matrices.iter().map(of).sum();
            100.0 * sum / self.matrices.len().max(1) as f64
        };
        lines.push(format!(
            "mean error of a layer's outputs: {:.2} % calibrated, {:.2} % rounded to nearest",
            mean(|matrix| matrix.calibrated),
            mean(|matrix| matrix.round_to_nearest)
        ));
        if let Some(last) = self.layers.last() {
            lines.push(format!(
                "error after the last layer: {:.2} % calibrated, {:.2} % rounded to nearest",
                100.0 * last.calibrated,
                100.0 * last.round_to_nearest
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measures_are_means_over_tokens() {
        let floats = [(0.0, 5, 5), (2.0, 6, 7)];
        let ours = [(1.0, 5, 5), (1.0, 7, 7)];
        let measures = Measures::new(
            &ours.iter().collect::<Vec<_>>(),
            &floats.iter().collect::<Vec<_>>(),
        );
        assert!((measures.perplexity - 1f64.exp()).abs() < 1e-12);
        assert_eq!((measures.accuracy, measures.agreement), (1.0, 0.5));
    }
}

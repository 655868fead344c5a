//! Sums of the loss: on the device of one micro-batch, on the host of several.

use burn::prelude::*;

/// Rows of logits held at once in the loss.
pub(super) const LOSS_ROWS: usize = 512;

/// Sums over the targets of one micro-batch, on the device until they are read.
#[derive(Debug, Clone)]
pub struct LossSums<B: Backend> {
    /// Sum of the negative log likelihoods, sum of right predictions; `[2]`, f32.
    pub(super) sums: Tensor<B, 1>,
    /// Number of targets.
    pub targets: usize,
}

/// Sums over the targets of one or more micro-batches, on the host.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LossTotals {
    /// Sum of the negative log likelihoods, in nats.
    pub nll: f64,
    /// Targets that are the likeliest token.
    pub correct: f64,
    /// Number of targets.
    pub targets: usize,
}

impl LossTotals {
    /// Mean negative log likelihood.
    pub fn loss(&self) -> f64 {
        self.nll / self.targets.max(1) as f64
    }

    /// Share of right predictions.
    pub fn token_accuracy(&self) -> f64 {
        self.correct / self.targets.max(1) as f64
    }

    /// Adds the sums of another part.
    pub fn add(&mut self, other: Self) {
        self.nll += other.nll;
        self.correct += other.correct;
        self.targets += other.targets;
    }
}

impl<B: Backend> LossSums<B> {
    /// `sums`: negative log likelihood and right predictions, `[2]`, f32.
    pub(super) fn new(sums: Tensor<B, 1>, targets: usize) -> Self {
        Self { sums, targets }
    }

    /// The sums, `[2]`, f32.
    pub(super) fn tensor(&self) -> Tensor<B, 1> {
        self.sums.clone()
    }

    /// Reads the sums back; waits for the device.
    pub fn totals(&self) -> LossTotals {
        let values: Vec<f32> = self.sums.to_data().iter::<f32>().collect();
        LossTotals {
            nll: f64::from(values[0]),
            correct: f64::from(values[1]),
            targets: self.targets,
        }
    }
}

//! How the samples of a data set are divided into windows: which rows, in which order, how joined.

use std::collections::BTreeSet;

use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use crate::base::seeds::mix;

/// What is done with samples longer than `max_length`; nothing is ever cut.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Default,
    serde::Serialize,
    serde::Deserialize,
    schemars::JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// Stop and name the row.
    #[default]
    Error,
    /// Leave it out and count it.
    Skip,
}

/// What of each row goes into a window.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum WindowKind {
    /// Question and answer.
    #[default]
    Answers,
    /// Question with the chosen and with the rejected answer.
    Pairs,
    /// Its number alone: answers are drawn later.
    Rows,
}

/// How samples become windows.
#[derive(Debug, Clone, PartialEq)]
pub struct WindowPlan {
    /// Passes over the data; need not be whole.
    pub epochs: f64,
    /// Samples of a micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a window and device.
    pub accumulation: usize,
    /// Devices that share a window.
    pub devices: usize,
    /// Tokens of a row that samples of the whole window are joined into, in place of padded
    /// micro-batches; 0 pads.
    pub packing_tokens: usize,
    /// Longest sample in tokens.
    pub max_length: usize,
    /// What is done with longer ones.
    pub overlong: Overlong,
    /// Decides the order; every epoch has its own.
    pub seed: u64,
    /// Keeps the order of the file: for validation.
    pub in_order: bool,
    /// What of each row goes into a window.
    pub kind: WindowKind,
}

impl WindowPlan {
    /// Every sample once, in the order of the file, whatever its length, `batch_size` a window: to look at data, not
    /// to learn from them.
    pub fn once_in_order(batch_size: usize) -> Self {
        Self {
            epochs: 1.0,
            batch_size,
            accumulation: 1,
            devices: 1,
            packing_tokens: 0,
            max_length: usize::MAX,
            overlong: Overlong::Error,
            seed: 0,
            in_order: true,
            kind: WindowKind::Answers,
        }
    }

    /// Samples of a full window.
    pub fn window_samples(&self) -> usize {
        self.batch_size * self.accumulation * self.devices
    }

    /// Optimizer steps of an epoch over `samples`.
    pub fn steps_per_epoch(&self, samples: usize) -> usize {
        crate::schedule::steps_per_epoch(
            samples as u64,
            self.devices as u64,
            self.batch_size as u64,
            self.accumulation as u64,
        ) as usize
    }

    /// Optimizer steps of the run.
    pub fn total_steps(&self, samples: usize) -> usize {
        crate::schedule::total_steps(self.steps_per_epoch(samples) as u64, self.epochs) as usize
    }

    /// Rows of the data set in the first `steps` windows.
    pub fn rows_before(&self, steps: usize, samples: usize) -> BTreeSet<usize> {
        (0..steps)
            .flat_map(|step| self.rows(step, samples))
            .collect()
    }

    /// Rows of the data set that make window `step`.
    pub(super) fn rows(&self, step: usize, samples: usize) -> Vec<usize> {
        let per_epoch = self.steps_per_epoch(samples);
        let (epoch, at) = (step / per_epoch, step % per_epoch);
        let mut order: Vec<usize> = (0..samples).collect();
        if !self.in_order {
            order.shuffle(&mut ChaCha8Rng::seed_from_u64(mix(self.seed, epoch as u64)));
        }
        let from = at * self.window_samples();
        order[from.min(samples)..(from + self.window_samples()).min(samples)].to_vec()
    }
}

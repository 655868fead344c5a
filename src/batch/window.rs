//! All samples of one optimizer step.

use super::{
    micro_batch::MicroBatch,
    sequences::{SequenceCounts, Sequences},
};

/// All samples of one optimizer step.
#[derive(Debug, Clone)]
pub struct Window {
    /// Which step of the run, from 0.
    pub step: usize,
    /// Epochs done once the window is.
    pub epoch: f64,
    /// Micro-batches of each device of this process, which follow each other.
    pub parts: Vec<Vec<MicroBatch>>,
    /// What an objective knows of each micro-batch's sequences, as `parts`; empty where answers are imitated.
    pub sequences: Vec<Vec<Sequences>>,
    /// Counts of all sequences, on all devices.
    pub counts: SequenceCounts,
    /// Rows of the data set in it, from 0.
    pub rows: Vec<usize>,
    /// Targets of all micro-batches, on all devices.
    pub targets: usize,
    /// Number of micro-batches, on all devices.
    pub micro_batches: usize,
    /// Number of the first micro-batch in `parts` among those of the window, for what is random.
    pub first_micro_batch: usize,
    /// Tokens of all micro-batches, padding left out.
    pub tokens: usize,
}

impl Window {
    /// The window as each device takes it: its own micro-batches, the whole window's counts.
    pub fn split(self) -> Vec<Self> {
        let parts = self.parts;
        let mut first_micro_batch = self.first_micro_batch;
        let mut sequences = self.sequences.into_iter();
        parts
            .into_iter()
            .map(|part| {
                let own = Self {
                    first_micro_batch,
                    parts: vec![part],
                    sequences: sequences.next().into_iter().collect(),
                    rows: self.rows.clone(),
                    ..self
                };
                first_micro_batch += own.parts[0].len();
                own
            })
            .collect()
    }
}

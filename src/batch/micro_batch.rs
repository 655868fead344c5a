//! Samples that go through the model together in training.

use super::{images::ImageInput, text::TextInput};

/// Marks a token that is no target.
pub const IGNORE_INDEX: i64 = -100;

/// Some samples that go through the model together, on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// Tokens, padded on the right or packed.
    pub text: TextInput,
    /// What each token should be, `[batch][seq]`, [`IGNORE_INDEX`] where it is not a target.
    pub labels: Vec<Vec<i64>>,
    /// All images, in the order of their tokens.
    pub images: ImageInput,
}

impl MicroBatch {
    /// Number of targets: labels after the first token of a row.
    pub fn targets(&self) -> usize {
        self.targets_with_rows().len()
    }

    /// What the sizes of all tensors of a pass over it follow from.
    pub(crate) fn sizes(&self) -> [usize; 4] {
        [
            self.labels.len(),
            self.text.seq(),
            self.images.patches(),
            self.targets(),
        ]
    }

    /// For each target the flat row of the hidden state that predicts it, and its id.
    pub(crate) fn targets_with_rows(&self) -> Vec<(i32, i32)> {
        let seq = self.text.seq();
        let mut targets = Vec::new();
        for (row, labels) in self.labels.iter().enumerate() {
            for (at, label) in labels.iter().enumerate().skip(1) {
                if *label != IGNORE_INDEX {
                    targets.push(((row * seq + at - 1) as i32, *label as i32));
                }
            }
        }
        targets
    }
}

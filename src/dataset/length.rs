//! How long a sample is.

use crate::batch::micro_batch::IGNORE_INDEX;

/// How long a sample is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SampleLength {
    /// Tokens, those of images included.
    pub(super) tokens: usize,
    /// Those that are targets.
    pub(super) targets: usize,
}

impl SampleLength {
    pub(super) fn of(input_ids: &[u32], labels: &[i64]) -> Self {
        // Nothing predicts the first token.
        let targets = labels.iter().skip(1);
        Self {
            tokens: input_ids.len(),
            targets: targets.filter(|label| **label != IGNORE_INDEX).count(),
        }
    }
}

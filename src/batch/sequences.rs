//! What an objective knows of the sequences of a micro-batch besides their labels. No tensors.

/// The sequences of a micro-batch, in the order of their targets.
///
/// Of preferences the chosen and the rejected answer of a pair follow each other. The lists a target hold one
/// value for each target of the micro-batch, or none at all.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sequences {
    /// Number of targets of each sequence.
    pub targets: Vec<usize>,
    /// Advantage of each sequence; of samples alone.
    pub advantages: Vec<f32>,
    /// Log-probability of each target under the weights that the samples were drawn from; empty where these are
    /// the weights of the step.
    pub sampled: Vec<f32>,
    /// Log-probability of each target under the reference; empty where it is computed in the step, or not needed.
    pub reference: Vec<f32>,
}

impl Sequences {
    /// The range of each sequence among the targets.
    pub fn ranges(&self) -> Vec<std::ops::Range<usize>> {
        let mut start = 0;
        let ranges = self.targets.iter().map(|count| {
            let range = start..start + count;
            start = range.end;
            range
        });
        ranges.collect()
    }
}

/// Counts of a window over all devices, which the terms of an objective are means over.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SequenceCounts {
    /// Sequences, both of a pair.
    pub sequences: usize,
    /// Targets of all sequences.
    pub targets: usize,
    /// Targets of the chosen answers of pairs.
    pub chosen: usize,
}

impl SequenceCounts {
    /// Counts some sequences.
    pub fn of<'s>(all: impl IntoIterator<Item = &'s Sequences>) -> Self {
        let mut counts = Self::default();
        for one in all {
            counts.sequences += one.targets.len();
            counts.targets += one.targets.iter().sum::<usize>();
            counts.chosen += one.targets.iter().step_by(2).sum::<usize>();
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_and_counts_are_over_targets() {
        let one = Sequences {
            targets: vec![2, 3, 4, 0],
            ..Sequences::default()
        };
        assert_eq!(one.ranges(), [0..2, 2..5, 5..9, 9..9]);
        let counts = SequenceCounts::of([&one, &one]);
        assert_eq!(
            (counts.sequences, counts.targets, counts.chosen),
            (8, 18, 12)
        );
    }
}

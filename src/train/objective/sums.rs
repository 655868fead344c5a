//! What a step's objective came to, summed over sequences and targets.

/// Sums over the sequences of a micro-batch, a device or a step.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ObjectiveSums {
    /// The part's share of the loss that is minimised.
    pub loss: f64,
    /// Sequences; of preferences pairs.
    pub sequences: f64,
    /// Targets.
    pub targets: f64,
    /// Sum of the entropies at the targets, in nats.
    pub entropy: f64,
    /// Sum over the targets of the estimated divergence from the reference (`e^d - d - 1`), in nats.
    pub kl: f64,
    /// Targets whose ratio is clipped, so that they have no gradient.
    pub clipped: f64,
    /// Sum over the targets of the probability ratio to the weights that they were drawn from.
    pub ratio: f64,
    /// Sum over the pairs of the implicit reward of the chosen answer, `beta` times its log-ratio to the reference.
    pub chosen: f64,
    /// The same of the rejected answer.
    pub rejected: f64,
    /// Pairs whose chosen answer has the larger implicit reward.
    pub preferred: f64,
}

impl ObjectiveSums {
    /// Adds another part.
    pub fn add(&mut self, other: &Self) {
        let sums: Vec<f64> = (self.fields().iter().zip(other.fields()))
            .map(|(one, other)| one + other)
            .collect();
        *self = Self::of_fields(&sums);
    }

    /// All sums in the order of their definition.
    pub fn fields(&self) -> [f64; 10] {
        [
            self.loss,
            self.sequences,
            self.targets,
            self.entropy,
            self.kl,
            self.clipped,
            self.ratio,
            self.chosen,
            self.rejected,
            self.preferred,
        ]
    }

    /// Of what [`Self::fields`] returned.
    pub fn of_fields(fields: &[f64]) -> Self {
        let at = |place: usize| fields.get(place).copied().unwrap_or_default();
        Self {
            loss: at(0),
            sequences: at(1),
            targets: at(2),
            entropy: at(3),
            kl: at(4),
            clipped: at(5),
            ratio: at(6),
            chosen: at(7),
            rejected: at(8),
            preferred: at(9),
        }
    }

    /// Means by the names that `metrics.jsonl` and TensorBoard have for them; `pairs` for preferences.
    pub fn values(&self, pairs: bool) -> Vec<(&'static str, f64)> {
        let sequences = self.sequences.max(1.0);
        let targets = self.targets.max(1.0);
        if pairs {
            return vec![
                ("reward_chosen", self.chosen / sequences),
                ("reward_rejected", self.rejected / sequences),
                ("reward_margin", (self.chosen - self.rejected) / sequences),
                ("preferred_share", self.preferred / sequences),
                ("entropy", self.entropy / targets),
            ];
        }
        vec![
            ("kl", self.kl / targets),
            ("entropy", self.entropy / targets),
            ("clip_share", self.clipped / targets),
            ("ratio", self.ratio / targets),
        ]
    }
}

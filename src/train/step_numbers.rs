//! The numbers of a step: sums on the device, their way to the host, what the dashboard and the files show.

use burn::{prelude::*, train::ItemLazy};

use super::{
    loss::{LossSums, LossTotals},
    objective::sums::ObjectiveSums,
};
use crate::{ops::Reading, runtime::accelerator::Accelerator};

/// Loss sums of one device's micro-batches with their weights, still on the device.
#[derive(Debug)]
pub struct PartSums<B: Backend> {
    pub(super) micro_batches: Vec<(LossSums<B>, f64)>,
    /// What an objective came to: it has been read already.
    pub(super) objective: Option<ObjectiveSums>,
}

impl<B: Accelerator> PartSums<B> {
    /// Reads the sums back.
    pub fn totals(&self) -> LossTotals {
        let mut totals = LossTotals::default();
        self.micro_batches
            .iter()
            .for_each(|(sums, _)| totals.add(sums.totals()));
        totals
    }

    /// Starts an async read of the sums and, after them, of the norm in `clip` (see
    /// [`clip_scale`](crate::ops::TrainingOps::clip_scale)).
    pub fn read_async(&self, clip: Option<Tensor<B, 1>>) -> StepReading {
        let values: Vec<_> = (self.micro_batches.iter().map(|(sums, _)| sums.tensor()))
            .chain(clip)
            .collect();
        StepReading {
            reading: (!values.is_empty()).then(|| B::read_async(Tensor::cat(values, 0))),
            parts: (self.micro_batches.iter())
                .map(|(sums, weight)| (sums.targets, *weight))
                .collect(),
            objective: self.objective,
        }
    }

    /// This part's share of the loss that is minimised.
    fn objective(&self) -> f64 {
        if let Some(objective) = &self.objective {
            return objective.loss;
        }
        self.micro_batches
            .iter()
            .map(|(sums, weight)| sums.totals().nll * weight)
            .sum()
    }
}

/// Loss and gradient norm of a step, on their way to the host.
pub struct StepReading {
    reading: Option<Reading>,
    /// Targets and weight of each micro-batch.
    parts: Vec<(usize, f64)>,
    objective: Option<ObjectiveSums>,
}

/// Results of a step's async read.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct StepTotals {
    /// Sums over the step's targets.
    pub totals: LossTotals,
    /// The loss that is minimised.
    pub objective: f64,
    /// Norm of the gradient before clipping.
    pub norm: f64,
    /// What an objective came to; `None` where answers are imitated.
    pub sequences: Option<ObjectiveSums>,
}

impl StepReading {
    /// Waits for the numbers.
    pub fn wait(self) -> StepTotals {
        let values = self.reading.map_or_else(Vec::new, |reading| reading());
        let (sums, clip) = values.split_at(values.len().min(2 * self.parts.len()));
        let mut result = StepTotals {
            norm: clip.first().copied().map_or(0.0, f64::from),
            sequences: self.objective,
            ..StepTotals::default()
        };
        for (sums, (targets, weight)) in sums.chunks(2).zip(self.parts) {
            let nll = f64::from(sums[0]);
            result.totals.add(LossTotals {
                nll,
                correct: f64::from(sums[1]),
                targets,
            });
            result.objective += nll * weight;
        }
        if let Some(sequences) = &result.sequences {
            result.objective = sequences.loss;
        }
        result
    }
}

/// Numbers of one step or one validation batch, as the dashboard shows them.
#[derive(Debug, Clone, Copy, Default)]
pub struct StepNumbers {
    /// Mean loss of a target.
    pub loss: f64,
    /// Share of right predictions.
    pub token_acc: f64,
    /// Number of targets that both are means over.
    pub targets: usize,
    /// Norm of the gradient before clipping; 0 in validation, and where it left the range of f16.
    pub grad_norm: f64,
    /// Factor on the loss in this step, with weights in f16.
    pub loss_scale: Option<f64>,
    /// Whether the step was left out, its gradients being out of the range of f16.
    pub skipped: bool,
    /// Learning rate; 0 in validation.
    pub learning_rate: f64,
    /// Samples a second.
    pub samples_per_second: f64,
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Most memory so far in GiB, of the device where it reports it; 0 where it is not known.
    pub memory_gib: f64,
    /// What an objective came to; `None` where answers are imitated.
    pub sequences: Option<ObjectiveSums>,
    /// Mean reward of the rollout that the step learns from.
    pub reward: Option<f64>,
    /// Whether this is the first batch of a validation: the means of the one before end here, also within
    /// an epoch.
    pub starts_validation: bool,
}

/// What a step returns to the Learner: numbers once they are known.
#[derive(Debug)]
pub enum StepOutput<B: Backend> {
    /// Still on the device.
    Sums(PartSums<B>),
    /// On the host.
    Numbers(StepNumbers),
}

impl<B: Accelerator> ItemLazy for StepOutput<B> {
    type ItemSync = StepNumbers;

    fn sync(self) -> StepNumbers {
        match self {
            Self::Numbers(numbers) => numbers,
            Self::Sums(sums) => {
                let totals = sums.totals();
                StepNumbers {
                    loss: totals.loss(),
                    token_acc: totals.token_accuracy(),
                    targets: totals.targets,
                    ..StepNumbers::default()
                }
            }
        }
    }
}

impl<B: Accelerator> StepOutput<B> {
    /// This part's share of the loss that is minimised.
    pub fn objective(&self) -> f64 {
        match self {
            Self::Sums(sums) => sums.objective(),
            Self::Numbers(numbers) => numbers.loss,
        }
    }

    /// Starts an async read of what is still on the device; `None` where nothing is.
    pub fn read_async(&self, clip: Option<Tensor<B, 1>>) -> Option<StepReading> {
        match self {
            Self::Sums(sums) => Some(sums.read_async(clip)),
            Self::Numbers(_) => None,
        }
    }

    /// The loss sums, read back if they are still on the device.
    pub fn totals(&self) -> LossTotals {
        match self {
            Self::Sums(sums) => sums.totals(),
            Self::Numbers(numbers) => LossTotals {
                nll: numbers.loss * numbers.targets as f64,
                correct: numbers.token_acc * numbers.targets as f64,
                targets: numbers.targets,
            },
        }
    }
}

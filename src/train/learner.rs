//! The model as Burn's Learner sees it, and the metrics of its dashboard.

use std::{cell::RefCell, sync::Arc};

use burn::{
    module::AutodiffModule,
    optim::{GradientsParams, LearningRate, lr_scheduler::LrScheduler},
    prelude::*,
    train::{
        InferenceStep, ItemLazy, TrainOutput, TrainStep,
        metric::{
            Adaptor, Metric, MetricAttributes, MetricMetadata, MetricName, Numeric,
            NumericAttributes, NumericEntry, SerializedEntry,
            state::{FormatOptions, NumericMetricState},
        },
    },
};

use super::{
    config::{LossReduction, TrainConfig},
    gradients::{GradientOptions, add_gradients, evaluate, gradients, gradients_of},
    loss::{LossSums, LossTotals},
    loss_scale::{LossScale, unscaled},
    objective::{reference::Reference, settings::Objective, sums::ObjectiveSums},
    scores::{TargetWeights, TokenScores, token_scores},
};
use crate::{
    adapters::quantised::model_to_device,
    base::seeds::mix,
    batch::window::Window,
    ops::Reading,
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig},
    runtime::{
        accelerator::{Accelerator, TrainAccelerator},
        vision::send_ahead,
    },
    schedule::Schedule,
};

/// What a step needs besides the weights.
#[derive(Debug, Clone)]
pub struct StepSettings {
    /// Sizes of the model.
    pub config: Qwen3VlConfig,
    /// The run.
    pub train: TrainConfig,
    /// Of the loss, with weights in f16.
    pub loss_scale: Option<LossScale>,
    /// What an objective measures from.
    pub reference: Reference,
}

/// The model with what its steps need.
#[derive(Module, Debug)]
pub struct Trainee<B: Backend> {
    /// The model.
    pub model: Qwen3Vl<B>,
    #[module(skip)]
    settings: Arc<StepSettings>,
}

impl<B: Accelerator> Trainee<B> {
    /// Joins a model with its settings.
    pub fn new(model: Qwen3Vl<B>, settings: Arc<StepSettings>) -> Self {
        Self { model, settings }
    }

    /// The scale of the loss, with weights in f16.
    pub(super) fn loss_scale(&self) -> Option<&LossScale> {
        self.settings.loss_scale.as_ref()
    }

    /// The same on another device.
    pub(super) fn move_to(self, device: &B::Device) -> Self {
        Self {
            model: model_to_device(self.model, device),
            settings: self.settings,
        }
    }

    fn device(&self) -> B::Device {
        self.model.model.language_model.norm.weight.device()
    }
}

impl<B: TrainAccelerator> Trainee<B> {
    /// Sends the images of a window's first micro-batch that this thread will learn from next; those of
    /// the others are sent while the device computes it.
    pub fn send_ahead(&self, window: &Window) {
        let StepSettings { config, train, .. } = self.settings.as_ref();
        let first = window
            .parts
            .iter()
            .flatten()
            .find(|batch| batch.targets() > 0);
        // A tower that is trained takes its images another way.
        let frozen = train.freeze_vit && train.freeze_aligner;
        if let Some(batch) = first.filter(|batch| frozen && batch.images.patches() > 0) {
            let (inner, device) = (self.model.valid(), self.device());
            B::in_exact_memory(&device, None, || {
                send_ahead(&inner, &batch.images, config, &device);
            });
        }
    }
}

/// Loss sums of one device's micro-batches with their weights, still on the device.
#[derive(Debug)]
pub struct PartSums<B: Backend> {
    micro_batches: Vec<(LossSums<B>, f64)>,
    /// What an objective came to: it has been read already.
    objective: Option<ObjectiveSums>,
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

impl<B: TrainAccelerator> Trainee<B> {
    /// Gradients of a micro-batch of sequences under the run's objective, times `factor`, and what it came to.
    ///
    /// One forward pass gives the log-probabilities that the loss is a function of; they are read, its derivative is
    /// worked out on the host, and the backward pass begins with it.
    fn objective_gradients(
        &self,
        inner: &Qwen3Vl<B::InnerBackend>,
        window: &Window,
        place: usize,
        factor: f64,
        options: &GradientOptions,
    ) -> (GradientsParams, LossSums<B::InnerBackend>, ObjectiveSums) {
        let StepSettings {
            config,
            train,
            reference,
            ..
        } = self.settings.as_ref();
        let device = self.device();
        let batch = (window.parts.iter().flatten().nth(place)).expect("it is one of the window's");
        let known = window.sequences.iter().flatten().nth(place);
        let mut sequences = known.cloned().expect("an objective has sequences");
        let temperature = match train.objective {
            Objective::Grpo => train.temperature,
            _ => 1.0,
        };
        let came_to = RefCell::new(ObjectiveSums::default());
        let (new, sums) = B::in_exact_memory(&device, Some(&batch.sizes()), || {
            if train.reference_weight() > 0.0 && sequences.reference.is_empty() {
                let model = reference.apply(inner);
                let scores = token_scores(&model, config, batch, temperature, &device);
                sequences.reference = scores.log_probabilities;
            }
            let derivative = |scores: &TokenScores| {
                let (mut derivative, sums) = match train.objective {
                    Objective::Grpo => train.grpo().derivative(&sequences, &window.counts, scores),
                    _ => train.dpo().derivative(&sequences, &window.counts, scores),
                };
                *came_to.borrow_mut() = sums;
                for one in &mut derivative {
                    *one *= factor as f32;
                }
                derivative
            };
            let weights = TargetWeights::Each {
                temperature,
                derivative: &derivative,
            };
            gradients_of(&self.model, inner, config, batch, weights, options, &device)
        });
        (new, sums, came_to.into_inner())
    }
}

impl<B: TrainAccelerator> TrainStep for Trainee<B> {
    type Input = Window;
    type Output = StepOutput<B::InnerBackend>;

    /// One device's part of a window: gradients that add up over the parts to those of its loss.
    fn step(&self, window: Window) -> TrainOutput<Self::Output> {
        let StepSettings {
            config,
            train,
            loss_scale,
            ..
        } = self.settings.as_ref();
        let scale = loss_scale.as_ref().map(LossScale::factor);
        let device = self.device();
        let inner = self.model.valid();
        let mut grads = GradientsParams::new();
        let mut all_sums = Vec::new();
        let mut objective = None;
        for (place, batch) in window.parts.iter().flatten().enumerate() {
            if batch.targets() == 0 {
                continue;
            }
            let weight = match train.loss_reduction {
                LossReduction::Token => 1.0 / window.targets as f64,
                LossReduction::Micro => {
                    1.0 / (batch.targets() * window.micro_batches.max(1)) as f64
                }
            };
            // Masks would make probability ratios of what is one and the same.
            let has_dropout = train.lora_dropout > 0.0 && train.objective == Objective::Sft;
            let dropout_seed = has_dropout.then(|| {
                let step = mix(train.seed, window.step as u64);
                mix(step, (window.first_micro_batch + place) as u64)
            });
            let options = train.gradient_options(dropout_seed);
            if train.objective != Objective::Sft {
                let factor = scale.unwrap_or(1.0);
                let (new, sums, came_to) =
                    self.objective_gradients(&inner, &window, place, factor, &options);
                add_gradients(&self.model, new, &mut grads);
                objective
                    .get_or_insert_with(ObjectiveSums::default)
                    .add(&came_to);
                all_sums.push((sums, 0.0));
                continue;
            }
            let sums = B::in_exact_memory(&device, Some(&batch.sizes()), || {
                let (new, sums) = gradients(
                    &self.model,
                    &inner,
                    config,
                    batch,
                    weight * scale.unwrap_or(1.0),
                    &options,
                    &device,
                );
                add_gradients(&self.model, new, &mut grads);
                sums
            });
            all_sums.push((sums, weight));
        }
        if let Some(scale) = scale {
            grads = unscaled(&self.model, grads, scale);
        }
        TrainOutput {
            grads,
            item: StepOutput::Sums(PartSums {
                micro_batches: all_sums,
                objective,
            }),
        }
    }
}

impl<B: Accelerator> InferenceStep for Trainee<B> {
    type Input = Window;
    type Output = StepOutput<B>;

    fn step(&self, window: Window) -> StepOutput<B> {
        let device = self.device();
        let config = &self.settings.config;
        let sums = window
            .parts
            .iter()
            .flatten()
            .map(|batch| {
                let weight = 1.0 / window.targets.max(1) as f64;
                let sums = B::in_exact_memory(&device, Some(&batch.sizes()), || {
                    evaluate(&self.model, config, batch, &device)
                });
                (sums, weight)
            })
            .collect();
        StepOutput::Sums(PartSums {
            micro_batches: sums,
            objective: None,
        })
    }
}

/// The schedule as the Learner steps it.
#[derive(Debug, Clone)]
pub struct ScheduleStepper {
    schedule: Schedule,
    next: u64,
}

impl ScheduleStepper {
    /// Starts at optimizer step `next`.
    pub fn new(schedule: Schedule, next: u64) -> Self {
        Self { schedule, next }
    }
}

impl LrScheduler for ScheduleStepper {
    // The rate is a function of the step, which the checkpoint holds.
    type Record<B: Backend> = ();

    fn step(&mut self) -> LearningRate {
        self.next += 1;
        self.schedule.lr(self.next - 1)
    }

    fn to_record<B: Backend>(&self) -> Self::Record<B> {}

    fn load_record<B: Backend>(self, (): Self::Record<B>) -> Self {
        self
    }
}

/// One number of [`StepNumbers`] as a metric of the dashboard.
#[derive(Clone)]
pub struct Gauge {
    name: MetricName,
    unit: Option<&'static str>,
    higher_is_better: bool,
    precision: usize,
    read: fn(&StepNumbers) -> f64,
    state: NumericMetricState,
}

impl Gauge {
    fn new(
        name: &str,
        unit: Option<&'static str>,
        higher_is_better: bool,
        precision: usize,
        read: fn(&StepNumbers) -> f64,
    ) -> Self {
        Self {
            name: Arc::new(name.to_string()),
            unit,
            higher_is_better,
            precision,
            read,
            state: NumericMetricState::default(),
        }
    }

    /// Mean loss.
    pub fn loss() -> Self {
        Self::new("Loss", None, false, 4, |numbers| numbers.loss)
    }

    /// Token accuracy in percent.
    pub fn token_accuracy() -> Self {
        Self::new("Token accuracy", Some("%"), true, 2, |numbers| {
            numbers.token_acc * 100.0
        })
    }

    /// Learning rate.
    pub fn learning_rate() -> Self {
        Self::new("Learning rate", None, true, 8, |numbers| {
            numbers.learning_rate
        })
    }

    /// Norm of the gradient before clipping.
    pub fn gradient_norm() -> Self {
        Self::new("Gradient norm", None, false, 4, |numbers| numbers.grad_norm)
    }

    /// Samples a second.
    pub fn samples_per_second() -> Self {
        Self::new("Samples", Some("/s"), true, 2, |numbers| {
            numbers.samples_per_second
        })
    }

    /// Tokens a second.
    pub fn tokens_per_second() -> Self {
        Self::new("Tokens", Some("/s"), true, 0, |numbers| {
            numbers.tokens_per_second
        })
    }

    /// Mean reward of the rollout that a step learns from.
    pub fn reward() -> Self {
        Self::new("Reward", None, true, 4, |numbers| {
            numbers.reward.unwrap_or(f64::NAN)
        })
    }

    /// Estimated divergence from the reference, a token.
    pub fn divergence() -> Self {
        Self::new("KL", None, false, 5, |numbers| {
            of_targets(numbers, |sums| sums.kl)
        })
    }

    /// Entropy at the targets, a token.
    pub fn entropy() -> Self {
        Self::new("Entropy", None, true, 4, |numbers| {
            of_targets(numbers, |sums| sums.entropy)
        })
    }

    /// Mean margin between the implicit rewards of the answers of a pair.
    pub fn margin() -> Self {
        Self::new("Reward margin", None, true, 4, |numbers| {
            numbers.sequences.map_or(f64::NAN, |sums| {
                (sums.chosen - sums.rejected) / sums.sequences.max(1.0)
            })
        })
    }

    /// Most memory so far in GiB.
    pub fn memory() -> Self {
        Self::new("Memory", Some(" GiB"), false, 2, |numbers| {
            numbers.memory_gib
        })
    }
}

/// A mean over targets; no number where a step has none.
fn of_targets(numbers: &StepNumbers, sum: fn(&ObjectiveSums) -> f64) -> f64 {
    let mean = |sums: ObjectiveSums| sum(&sums) / sums.targets.max(1.0);
    numbers.sequences.map_or(f64::NAN, mean)
}

impl Adaptor<StepNumbers> for StepNumbers {
    fn adapt(&self) -> StepNumbers {
        *self
    }
}

impl Metric for Gauge {
    type Input = StepNumbers;

    fn name(&self) -> MetricName {
        self.name.clone()
    }

    fn attributes(&self) -> MetricAttributes {
        NumericAttributes {
            unit: self.unit.map(str::to_string),
            higher_is_better: self.higher_is_better,
        }
        .into()
    }

    fn update(&mut self, numbers: &StepNumbers, _: &MetricMetadata) -> SerializedEntry {
        if numbers.starts_validation {
            self.state.reset();
        }
        let format = FormatOptions::new(self.name()).precision(self.precision);
        let format = match self.unit {
            Some(unit) => format.unit(unit),
            None => format,
        };
        self.state
            .update((self.read)(numbers), numbers.targets.max(1), format)
    }

    fn clear(&mut self) {
        self.state.reset();
    }
}

impl Numeric for Gauge {
    fn value(&self) -> NumericEntry {
        self.state.current_value()
    }

    fn running_value(&self) -> NumericEntry {
        self.state.running_value()
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

#[cfg(test)]
mod tests {
    use burn::data::dataloader::Progress;

    use super::*;

    #[test]
    fn a_second_validation_of_an_epoch_has_a_mean_of_its_own() {
        let metadata = MetricMetadata {
            progress: Progress::new(1, 2),
            global_progress: Progress::new(1, 1),
            iteration: None,
            lr: None,
        };
        let mut gauge = Gauge::loss();
        let mut text = String::new();
        for (loss, starts_validation) in [(7.0, true), (6.0, false), (0.5, true), (0.4, false)] {
            let numbers = StepNumbers {
                loss,
                targets: 10,
                starts_validation,
                ..StepNumbers::default()
            };
            text = gauge.update(&numbers, &metadata).formatted;
        }
        assert_eq!(text, "epoch 0.4500 - batch 0.4000");
    }
}

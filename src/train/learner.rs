//! The model and the schedule as Burn's Learner steps them.

use std::{cell::RefCell, sync::Arc};

use burn::{
    module::AutodiffModule,
    optim::{GradientsParams, LearningRate, lr_scheduler::LrScheduler},
    prelude::*,
    train::{InferenceStep, TrainOutput, TrainStep},
};

use super::{
    config::{LossReduction, TrainConfig},
    gradients::{GradientOptions, add_gradients, evaluate, gradients, gradients_of},
    loss::LossSums,
    loss_scale::{LossScale, unscaled},
    objective::{reference::Reference, settings::Objective, sums::ObjectiveSums},
    scores::{TargetWeights, TokenScores, token_scores},
    step_numbers::{PartSums, StepOutput},
};
use crate::{
    adapters::quantised::model_to_device,
    base::seeds::mix,
    batch::window::Window,
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

//! One step of the loop: launched on the device or devices, checked, completed once its numbers are known.

use std::time::Instant;

use burn::train::{
    EventProcessorTraining, Learner, LearnerEvent, SupervisedTrainingEventProcessor, TrainOutput,
    TrainingItem,
};

use super::{Components, LoopState};
use crate::{
    base::trace::HOST,
    batch::window::Window,
    ops::{DeviceMemory, DeviceOps},
    runtime::accelerator::TrainAccelerator,
    train::{
        checkpoint_dir::CheckpointDir,
        gradients::differing_elements,
        learner::Trainee,
        lines::StepWork,
        loss_scale::LossScale,
        objective::sums::ObjectiveSums,
        optimizer::norm_of,
        outcome::TrainError,
        replicas::Replicas,
        step_clock::{LaunchTimes, StepClock},
        step_numbers::{StepNumbers, StepOutput, StepReading, StepTotals},
    },
};

/// Loss and gradient norm of a step.
enum LossAndNorm {
    Known(StepTotals),
    /// On their way: the next step is launched before they are waited for.
    Reading(StepReading),
}

/// With `deterministic`, steps of which one is computed twice.
const REPEATED_STEPS: usize = 50;

/// A step that has been launched on the device.
pub(super) struct Launched {
    step: usize,
    epoch: f64,
    rows: Vec<usize>,
    samples: usize,
    tokens: usize,
    learning_rate: f64,
    times: LaunchTimes,
    numbers: LossAndNorm,
    /// Factor on the loss, with weights in f16.
    loss_scale: Option<f64>,
    /// Whether the step was left out, its gradients being out of the range of f16.
    skipped: bool,
}

impl Launched {
    /// The same with the times that its launch took.
    pub(super) fn timed(self, times: LaunchTimes) -> Self {
        Self { times, ..self }
    }

    /// Whether its numbers are known: nothing is gained by launching another step first.
    pub(super) fn is_known(&self) -> bool {
        matches!(self.numbers, LossAndNorm::Known(_))
    }
}

impl<B: TrainAccelerator> LoopState<B> {
    /// Launches one step on the device or devices: gradients, clipping, optimizer.
    pub(super) fn launch(
        &mut self,
        learner: &mut Learner<Components<B>>,
        replicas: Option<&mut Replicas<B>>,
        window: Window,
        next: Option<&mut Window>,
    ) -> Result<Launched, TrainError> {
        let (step, all_targets) = (window.step, window.targets);
        let mut launched = Launched {
            step,
            epoch: window.epoch,
            rows: window.rows.clone(),
            samples: window.rows.len(),
            tokens: window.tokens,
            learning_rate: learner.lr_current(),
            times: LaunchTimes::of(|| ()).1,
            numbers: LossAndNorm::Known(StepTotals::default()),
            loss_scale: self.loss_scale.as_ref().map(LossScale::factor),
            skipped: false,
        };
        let max_norm = self.state.config.max_grad_norm;
        match replicas {
            None => {
                let config = &self.state.config;
                let again = (config.deterministic && step.is_multiple_of(REPEATED_STEPS))
                    .then(|| window.clone());
                let output = learner.train_step(window);
                if let Some(window) = again {
                    let repeated = learner.train_step(window);
                    check_repeated(&learner.model(), step, [&output, &repeated])?;
                }
                let clip = (self.optimizer).clip_next(&learner.model(), &output.grads, max_norm);
                self.memory.look::<B::InnerBackend>(&self.devices[0]);
                let reading = output.item.read_async(clip);
                if let Some(reading) = reading {
                    // With a loss scale the step is taken only once its gradients are known.
                    let is_async = B::InnerBackend::READS_ASYNC && self.loss_scale.is_none();
                    launched.numbers = if is_async {
                        LossAndNorm::Reading(reading)
                    } else {
                        LossAndNorm::Known(reading.wait())
                    };
                }
                self.leave_out(&mut launched);
                self.check_finite(&launched)?;
                if !launched.skipped {
                    learner.optimizer_step(output.grads);
                }
            }
            Some(replicas) => {
                let mut sum = StepTotals::default();
                let own = B::InnerBackend::memory_in_use(&self.devices[0]);
                let parts = replicas.learn(&learner.model(), window, next)?;
                for (rank, part) in parts.into_iter().enumerate() {
                    for piece in &part.pieces {
                        sum.totals.add(piece.totals);
                        sum.objective += piece.objective;
                        if let Some(own) = &piece.sequences {
                            sum.sequences
                                .get_or_insert_with(ObjectiveSums::default)
                                .add(own);
                        }
                    }
                    // The first device also holds what this thread put there: the weights.
                    let own = own.filter(|_| rank == replicas.first());
                    self.memory.note(part.memory.map(|memory| DeviceMemory {
                        in_use: memory.in_use + own.map_or(0, |own| own.in_use),
                        reserved: memory.reserved + own.map_or(0, |own| own.reserved),
                    }));
                }
                if sum.totals.targets != all_targets {
                    return Err(TrainError::Other(format!(
                        "step {}: {} of its {all_targets} targets were learnt from",
                        step + 1,
                        sum.totals.targets
                    )));
                }
                launched.numbers = LossAndNorm::Known(sum);
                // A loss that is no number goes before an exchange of gradients that are none.
                self.check_finite(&launched)?;
                let grads = replicas.reduce(&learner.model(), learner.lr_current())?;
                let clip = (self.optimizer).clip_next(&learner.model(), &grads, max_norm);
                if self.loss_scale.is_some() {
                    sum.norm = clip.map_or(0.0, norm_of);
                    launched.numbers = LossAndNorm::Known(sum);
                    self.leave_out(&mut launched);
                    if !launched.skipped {
                        learner.optimizer_step(grads);
                    }
                } else {
                    let norm = clip.map(B::InnerBackend::read_async);
                    learner.optimizer_step(grads);
                    if let Some(norm) = norm {
                        sum.norm = norm().first().copied().map_or(0.0, f64::from);
                    }
                    launched.numbers = LossAndNorm::Known(sum);
                }
                self.check_finite(&launched)?;
                replicas.finish_step()?;
            }
        }
        Ok(launched)
    }

    /// With a loss scale: leaves a step out whose gradients are not finite, and adapts the scale.
    fn leave_out(&mut self, launched: &mut Launched) {
        let (Some(scale), LossAndNorm::Known(known)) = (&self.loss_scale, &launched.numbers) else {
            return;
        };
        // A loss that is no number is none at any scale.
        if !known.objective.is_finite() {
            return;
        }
        let before = scale.factor();
        let finite = known.norm.is_finite();
        launched.skipped = scale.update(finite) && !finite;
        self.state.loss_scale = Some(scale.state());
        if launched.skipped {
            (self.tell)(&format!(
                "note: step {}/{}: its gradients, {before} times as large, leave the range of f16; the step is left out and the loss scaled by {}",
                launched.step + 1,
                self.total_steps,
                scale.factor()
            ));
        }
    }

    /// Refuses a step whose numbers are known and are none.
    fn check_finite(&self, launched: &Launched) -> Result<(), TrainError> {
        let LossAndNorm::Known(known) = &launched.numbers else {
            return Ok(());
        };
        for (what, value) in [
            ("the loss", known.objective),
            ("the gradient norm", known.norm),
        ] {
            if !value.is_finite() && !launched.skipped {
                return Err(TrainError::NotFinite {
                    step: launched.step + 1,
                    what,
                    value,
                    rows: launched.rows.iter().map(|row| row + 1).collect(),
                    checkpoint: last_good(&self.checkpoints, self.good_steps),
                });
            }
        }
        Ok(())
    }

    /// [`Self::complete`] for the step that is still running, if one is.
    pub(super) fn complete_pending(
        &mut self,
        pending: &mut Option<Launched>,
        processor: &mut SupervisedTrainingEventProcessor<Components<B>>,
        clock: &mut StepClock,
    ) -> Result<(), TrainError> {
        match pending.take() {
            Some(launched) => self.complete(launched, processor, clock),
            None => Ok(()),
        }
    }

    /// Waits for a step's numbers and writes them down.
    pub(super) fn complete(
        &mut self,
        mut launched: Launched,
        processor: &mut SupervisedTrainingEventProcessor<Components<B>>,
        clock: &mut StepClock,
    ) -> Result<(), TrainError> {
        let step = launched.step;
        let wait_start = Instant::now();
        let known = match launched.numbers {
            LossAndNorm::Known(known) => known,
            LossAndNorm::Reading(reading) => {
                (self.trace).span(HOST, "wait for the device", step, || reading.wait())
            }
        };
        launched.numbers = LossAndNorm::Known(known);
        self.check_finite(&launched)?;
        // The weights as they were before this step.
        self.good_steps = self.good_steps.max(step);
        self.state.step = step + 1;
        self.state.epoch = launched.epoch;

        let seconds = clock.complete(launched.times, wait_start).as_secs_f64();
        let numbers = StepNumbers {
            loss: known.objective,
            token_acc: known.totals.token_accuracy(),
            targets: known.totals.targets,
            grad_norm: if launched.skipped { 0.0 } else { known.norm },
            loss_scale: launched.loss_scale,
            skipped: launched.skipped,
            learning_rate: launched.learning_rate,
            samples_per_second: launched.samples as f64 / seconds,
            tokens_per_second: launched.tokens as f64 / seconds,
            memory_gib: self.memory.peak().map_or(0.0, |peak| peak.gib()),
            sequences: known.sequences,
            reward: (self.rollout_rows.get(&step)).and_then(|row| row.get("reward")?.as_f64()),
            starts_validation: false,
        };
        let work = StepWork {
            seconds,
            samples: launched.samples,
            tokens: launched.tokens,
        };
        self.note_step(&numbers, work)?;
        self.enter_epoch(self.steps.epoch(step), processor);
        let [within, epochs] = self.steps.progress(step + 1);
        processor.process_train(LearnerEvent::ProcessedItem(TrainingItem::new(
            StepOutput::Numbers(numbers),
            within,
            epochs,
            Some(step + 1),
            Some(launched.learning_rate),
        )));
        Ok(())
    }
}

/// Refuses a step that gives other bits when it is computed again.
fn check_repeated<B: TrainAccelerator>(
    model: &Trainee<B>,
    step: usize,
    outputs: [&TrainOutput<StepOutput<B::InnerBackend>>; 2],
) -> Result<(), TrainError> {
    let [first, second] = outputs.map(|output| output.item.totals());
    let gradients = differing_elements(model, outputs.map(|output| &output.grads));
    if gradients == 0 && first == second {
        return Ok(());
    }
    Err(TrainError::NotDeterministic {
        step: step + 1,
        gradients,
        losses: [first.loss(), second.loss()],
    })
}

/// The newest whole checkpoint of at most `steps` steps, in words.
fn last_good(checkpoints: &CheckpointDir, steps: usize) -> String {
    match checkpoints.newest_whole_before(steps as u64 + 1) {
        Ok(search) => search.found.map_or_else(
            || "none".to_string(),
            |found| format!("`{}`", found.path.display()),
        ),
        Err(error) => error.to_string(),
    }
}

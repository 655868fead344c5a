//! The loop, as a strategy of Burn's Learner: one item is one optimizer step.
//!
//! The Learner's own loop steps the schedule an item at a time, clips each tensor by itself, and
//! validates and saves once an epoch; the recipe wants windows, one common norm, and both in the
//! middle of an epoch. The Learner's other parts stay in use: steps, optimizer, schedule, metrics,
//! dashboard, interruption.

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use burn::{
    module::AutodiffModule,
    tensor::backend::AutodiffBackend,
    train::{
        EventProcessorTraining, Learner, LearnerEvent, LearningComponentsMarker,
        SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader, TrainOutput,
        TrainingComponents, TrainingItem, ValidLoader,
    },
};

use super::{
    checkpoint::TrainerState,
    checkpoint_dir::CheckpointDir,
    generation::GenerationScorer,
    gradients::differing_elements,
    learner::{ScheduleStepper, StepNumbers, StepOutput, StepReading, StepTotals, Trainee},
    lines::{StepLines, StepWork},
    loss_scale::LossScale,
    objective::{rollouts::Rollouts, sums::ObjectiveSums},
    optimizer::{AdamW, norm_of},
    outcome::{Ending, Outcome, TrainError},
    records::{MetricsLog, Row},
    renderers::RunSteps,
    replicas::Replicas,
    report_command::ReportCommand,
    step_clock::{LaunchTimes, StepClock},
    tfevents::EventWriter,
    words::Tell,
};
use crate::{
    adapters::lora::{config::LoraConfig, merge::merge_unless_quantised},
    base::trace::{HOST, Trace},
    batch::window::Window,
    cluster::Cluster,
    dataset::loader::WindowLoader,
    ops::{DeviceMemory, DeviceOps, memory::MemoryWatch},
    qwen3_vl::config::Qwen3VlConfig,
    runtime::accelerator::TrainAccelerator,
};

/// The Learner's components for a backend.
pub type Components<B> = LearningComponentsMarker<B, ScheduleStepper, Trainee<B>, AdamW<B>>;

/// Everything the loop needs that the Learner does not bring.
pub struct LoopState<B: AutodiffBackend> {
    /// Settings, counters, best value; what a checkpoint keeps.
    pub state: TrainerState,
    /// Sizes of the model.
    pub model_config: Qwen3VlConfig,
    /// The adapter's settings.
    pub lora: LoraConfig,
    /// Makes windows; the same as the Learner's loader.
    pub loader: WindowLoader,
    /// Makes validation batches, of one data set each, with what the data sets are called; empty without validation.
    pub validation: Vec<(String, WindowLoader)>,
    /// Generates and scores reports.
    pub scorer: Option<GenerationScorer<B::InnerBackend>>,
    /// Draws answers and rewards them, where the run learns from rewards.
    pub rollouts: Option<Rollouts>,
    /// Windows of the last rollout that no step has learnt from yet.
    pub queue: VecDeque<Window>,
    /// What rollouts came to, by their first step (from 0), until that step's row is written.
    pub rollout_rows: BTreeMap<usize, Row>,
    /// The optimizer, sharing its state with the Learner's.
    pub optimizer: AdamW<B>,
    /// Of the loss, with weights in f16; shared with the Learner's model.
    pub loss_scale: Option<LossScale>,
    /// Devices of the replicas, the first being the Learner's.
    pub devices: Vec<B::Device>,
    /// The processes of the run, where it has several.
    pub cluster: Option<Arc<Cluster>>,
    /// Whether this process writes: the first one alone does.
    pub writes: bool,
    /// The run's folder.
    pub checkpoints: CheckpointDir,
    /// `metrics.jsonl`.
    pub metrics: MetricsLog,
    /// TensorBoard's file, if the run reports there.
    pub events: Option<EventWriter>,
    /// The program of `report_command`, if the run has one.
    pub(super) report: Option<ReportCommand>,
    /// Where the run writes.
    pub output_dir: PathBuf,
    /// Steps of the run.
    pub total_steps: usize,
    /// How the steps are divided into epochs and processes.
    pub(super) steps: RunSteps,
    /// The epoch whose metrics Burn's logs are taking in.
    pub(super) logged_epoch: usize,
    /// Progress lines.
    pub(super) lines: StepLines,
    /// After how many steps the weights last gave a finite loss and gradient; later ones, though
    /// saved, may be ruined.
    pub good_steps: usize,
    /// Most memory seen so far.
    pub memory: MemoryWatch,
    /// Set by a signal: save and end.
    pub interrupted: Arc<AtomicBool>,
    /// Trace of the host's work over time.
    pub trace: Trace,
    /// Plain progress lines.
    pub tell: Tell,
}

/// Loss and gradient norm of a step.
enum Numbers {
    Known(StepTotals),
    /// On their way: the next step is launched before they are waited for.
    Reading(StepReading),
}

/// With `deterministic`, steps of which one is computed twice.
const REPEATED_STEPS: usize = 50;

/// A step that has been launched on the device.
struct Launched {
    step: usize,
    epoch: f64,
    rows: Vec<usize>,
    samples: usize,
    tokens: usize,
    learning_rate: f64,
    times: LaunchTimes,
    numbers: Numbers,
    /// Factor on the loss, with weights in f16.
    loss_scale: Option<f64>,
    /// Whether the step was left out, its gradients being out of the range of f16.
    skipped: bool,
}

/// The strategy; used for one run.
pub struct WindowStrategy<B: AutodiffBackend> {
    work: Mutex<Option<LoopState<B>>>,
    outcome: Mutex<Option<Result<Outcome, TrainError>>>,
}

impl<B: TrainAccelerator> WindowStrategy<B> {
    /// A strategy over prepared state.
    pub fn new(state: LoopState<B>) -> Self {
        Self {
            work: Mutex::new(Some(state)),
            outcome: Mutex::new(None),
        }
    }

    /// How the run ended; `None` before it has.
    pub fn take_outcome(&self) -> Option<Result<Outcome, TrainError>> {
        self.outcome
            .lock()
            .unwrap_or_else(|lock| lock.into_inner())
            .take()
    }
}

impl<B: TrainAccelerator> SupervisedLearningStrategy<Components<B>> for WindowStrategy<B> {
    fn fit(
        &self,
        components: TrainingComponents<Components<B>>,
        mut learner: Learner<Components<B>>,
        dataloader_train: TrainLoader<Components<B>>,
        _dataloader_valid: ValidLoader<Components<B>>,
        _starting_epoch: usize,
    ) -> (Trainee<B>, SupervisedTrainingEventProcessor<Components<B>>) {
        let mut processor = components.event_processor;
        let work = self
            .work
            .lock()
            .unwrap_or_else(|lock| lock.into_inner())
            .take();
        if let Some(mut work) = work {
            let interrupter = components.interrupter;
            let stop = || interrupter.should_stop();
            let result = work.run(&mut learner, dataloader_train, &mut processor, &stop);
            let reported = work.end_report(&result);
            let result = result.map(|ending| Outcome {
                ending,
                state: work.state,
                reported,
            });
            *self.outcome.lock().unwrap_or_else(|lock| lock.into_inner()) = Some(result);
        }
        (learner.model(), processor)
    }
}

impl<B: TrainAccelerator> LoopState<B> {
    fn run(
        &mut self,
        learner: &mut Learner<Components<B>>,
        loader: TrainLoader<Components<B>>,
        processor: &mut SupervisedTrainingEventProcessor<Components<B>>,
        stop: &dyn Fn() -> bool,
    ) -> Result<Ending, TrainError> {
        let patience = self.state.config.early_stopping_patience;
        if patience > 0 && self.state.validations_without_gain >= patience {
            return Ok(Ending::EarlyStop);
        }
        if self.rewards_part() {
            return Ok(Ending::RewardsPart);
        }
        self.enter_epoch(self.steps.epoch(self.state.step), processor);
        let mut replicas = self.replicas(learner)?;
        if self.state.step == 0 && self.scorer.is_some() {
            // What training is to be measured against; no checkpoint holds it.
            self.validate(learner, replicas.as_ref(), processor)?;
        }
        if std::mem::take(&mut self.state.validation_due) {
            self.validate_and_save(learner, replicas.as_ref(), processor)?;
            if patience > 0 && self.state.validations_without_gain >= patience {
                return Ok(Ending::EarlyStop);
            }
        }
        if let (Some(replicas), Some(_)) = (&replicas, &self.cluster) {
            // Weights and adapters that are drawn at random, or read from each machine's own files.
            replicas.compare(&learner.model(), self.state.step)?;
        }
        if self.state.config.deterministic && replicas.is_some() {
            (self.tell)("note: deterministic repeats steps on one device only; nothing is checked");
        }
        let mut windows = loader.iter();
        let mut clock = StepClock::start();
        let mut pending: Option<Launched> = None;
        let trace = self.trace.clone();
        let mut next_step = self.state.step;
        let mut ahead: Option<Window> = None;
        let mut is_last = false;
        loop {
            let mut next = ahead.take();
            if next.is_none() && !is_last && self.rollouts.is_some() {
                if self.queue.is_empty() {
                    self.complete_pending(&mut pending, processor, &mut clock)?;
                    if let Some(rows) = trace.wait_for_data(next_step, || windows.next()) {
                        self.roll_out(&rows, learner, replicas.as_ref())?;
                        clock.skip();
                    }
                }
                next = self.queue.pop_front();
            } else if next.is_none() && !is_last {
                next = trace.wait_for_data(next_step, || windows.next());
            }
            let Some(window) = next else {
                break;
            };
            let step = window.step;
            next_step = step + 1;
            let epoch = window.epoch;
            learner.lr_step();
            if window.targets == 0 {
                self.complete_pending(&mut pending, processor, &mut clock)?;
                // Every sample of the window was left out: the step is counted, the weights do not change.
                self.state.step = step + 1;
                self.state.epoch = epoch;
                (self.tell)(&format!(
                    "step {}/{}: every sample is longer than max_length; nothing learnt",
                    step + 1,
                    self.total_steps
                ));
                if step + 1 == self.total_steps {
                    self.validate_and_save(learner, replicas.as_ref(), processor)?;
                }
                continue;
            }
            if replicas.is_some() && self.rollouts.is_none() {
                // Several devices take the next step's images while they work on this one.
                ahead = trace.wait_for_data(next_step, || windows.next());
                is_last = ahead.is_none();
            }
            if let Some(replicas) = &replicas {
                replicas.set_stop(stop() || self.interrupted.load(Ordering::Relaxed));
            }
            let (launched, times) = LaunchTimes::of(|| {
                trace.span(HOST, "launch", step, || {
                    self.launch(learner, replicas.as_mut(), window, ahead.as_mut())
                })
            });
            let launched = Launched { times, ..launched? };
            if let Some(previous) = pending.replace(launched) {
                self.complete(previous, processor, &mut clock)?;
            }
            let last = step + 1 == self.total_steps;
            // Processes stop together or not at all.
            let asked = replicas
                .as_ref()
                .and_then(Replicas::stops)
                .unwrap_or_else(|| stop() || self.interrupted.load(Ordering::Relaxed));
            // A rollout is learnt from to its end: no checkpoint holds its answers.
            let between = self.queue.is_empty();
            let interrupted = between && asked;
            let due = |every: usize| every > 0 && (step + 1).is_multiple_of(every);
            let pause = last || interrupted || due(self.state.config.eval_steps);
            let known = matches!(&pending, Some(one) if matches!(one.numbers, Numbers::Known(_)));
            if pause || known || due(self.state.config.save_steps) {
                self.complete_pending(&mut pending, processor, &mut clock)?;
            }
            let mut ending = None;
            self.state.validation_due |= due(self.state.config.eval_steps) || last;
            if let Some(replicas) = &replicas
                && (self.state.validation_due || interrupted || due(self.state.config.save_steps))
            {
                replicas.compare(&learner.model(), step + 1)?;
            }
            if self.state.validation_due && !interrupted {
                let improved = self.validate_and_save(learner, replicas.as_ref(), processor)?;
                if !improved && patience > 0 && self.state.validations_without_gain >= patience {
                    ending = Some(Ending::EarlyStop);
                }
                clock.skip();
            } else if interrupted || due(self.state.config.save_steps) {
                self.save(learner)?;
                clock.skip();
            }
            if ending.is_none() && between && self.rewards_part() {
                if !self.checkpoints.path(step as u64 + 1).exists() {
                    self.complete_pending(&mut pending, processor, &mut clock)?;
                    self.save(learner)?;
                }
                ending = Some(Ending::RewardsPart);
            }
            if interrupted {
                ending = Some(Ending::Interrupted);
            }
            if let Some(ending) = ending {
                self.tell_skipped();
                self.draw()?;
                return Ok(ending);
            }
        }
        self.complete_pending(&mut pending, processor, &mut clock)?;
        if let Some(error) = self.loader.take_error() {
            // The weights trained up to the bad sample are saved.
            if self.state.step > 0 && !self.checkpoints.path(self.state.step as u64).exists() {
                self.save(learner)?;
            }
            self.draw()?;
            return Err(error.into());
        }
        if self.state.step < self.total_steps {
            self.save(learner)?;
            return Err(TrainError::Thread(
                "the thread that prepares samples ended before the run".to_string(),
            ));
        }
        self.tell_skipped();
        self.draw()?;
        Ok(Ending::Done)
    }

    /// Whether the run ends because trained and held-out rewards have parted.
    fn rewards_part(&self) -> bool {
        let patience = self.state.config.reward_patience;
        let parted = self.state.reward_watch.map_or(0, |watch| watch.parted);
        patience > 0 && parted >= patience
    }

    /// Draws answers to the questions of `rows` with the weights as they are, and queues the windows that learn from them.
    fn roll_out(
        &mut self,
        rows: &Window,
        learner: &Learner<Components<B>>,
        replicas: Option<&Replicas<B>>,
    ) -> Result<(), TrainError> {
        let Some(rollouts) = &mut self.rollouts else {
            return Ok(());
        };
        let device = &self.devices[0];
        let model = learner.model();
        let drawing = rollouts.draw::<B::InnerBackend>(rows.step, &rows.rows)?;
        let plain = model.valid();
        match replicas {
            Some(replicas) => {
                replicas.generate(&model, &drawing.scorer)?;
            }
            None => {
                let merged = merge_unless_quantised(plain.model.clone());
                for batch in 0..drawing.scorer.batches {
                    (drawing.scorer.generate)(&merged, device, batch)?;
                }
            }
        }
        let first_step = rows.step * rollouts.updates();
        let mut watch = self.state.reward_watch.unwrap_or_default();
        let rollout = rollouts.learn_from(drawing, first_step, &plain.model, device, &mut watch)?;
        self.state.reward_watch = Some(watch);
        self.rollout_rows.insert(first_step, rollout.row);
        self.queue.extend(rollout.windows);
        Ok(())
    }

    /// The other devices with their copies, if there are any.
    fn replicas(
        &self,
        learner: &Learner<Components<B>>,
    ) -> Result<Option<Replicas<B>>, TrainError> {
        if self.devices.len() < 2 && self.cluster.is_none() {
            return Ok(None);
        }
        let config = &self.state.config;
        let replicas = Replicas::start(
            &self.devices,
            &config.device,
            &learner.model(),
            &self.optimizer,
            config.max_grad_norm,
            self.cluster.clone(),
            config.patience(),
        )?;
        Ok(Some(replicas))
    }

    /// Launches one step on the device or devices: gradients, clipping, optimizer.
    fn launch(
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
            numbers: Numbers::Known(StepTotals::default()),
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
                        Numbers::Reading(reading)
                    } else {
                        Numbers::Known(reading.wait())
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
                launched.numbers = Numbers::Known(sum);
                // A loss that is no number goes before an exchange of gradients that are none.
                self.check_finite(&launched)?;
                let grads = replicas.reduce(&learner.model(), learner.lr_current())?;
                let clip = (self.optimizer).clip_next(&learner.model(), &grads, max_norm);
                if self.loss_scale.is_some() {
                    sum.norm = clip.map_or(0.0, norm_of);
                    launched.numbers = Numbers::Known(sum);
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
                    launched.numbers = Numbers::Known(sum);
                }
                self.check_finite(&launched)?;
                replicas.finish_step()?;
            }
        }
        Ok(launched)
    }

    /// With a loss scale: leaves a step out whose gradients are not finite, and adapts the scale.
    fn leave_out(&mut self, launched: &mut Launched) {
        let (Some(scale), Numbers::Known(known)) = (&self.loss_scale, &launched.numbers) else {
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
        let Numbers::Known(known) = &launched.numbers else {
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
    fn complete_pending(
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
    fn complete(
        &mut self,
        mut launched: Launched,
        processor: &mut SupervisedTrainingEventProcessor<Components<B>>,
        clock: &mut StepClock,
    ) -> Result<(), TrainError> {
        let step = launched.step;
        let wait_start = Instant::now();
        let known = match launched.numbers {
            Numbers::Known(known) => known,
            Numbers::Reading(reading) => {
                (self.trace).span(HOST, "wait for the device", step, || reading.wait())
            }
        };
        launched.numbers = Numbers::Known(known);
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

    /// Ends the epochs before `epoch` in Burn's logs and in the means of its dashboard.
    ///
    /// Both splits at once: the logs of one are begun anew whenever the other has another epoch.
    fn enter_epoch(
        &mut self,
        epoch: usize,
        processor: &mut SupervisedTrainingEventProcessor<Components<B>>,
    ) {
        if epoch > self.logged_epoch {
            processor.process_train(LearnerEvent::EndEpoch(epoch - 1));
            processor.process_valid(LearnerEvent::EndEpoch(epoch - 1));
            self.logged_epoch = epoch;
        }
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

//! The loop, as a strategy of Burn's Learner: one item is one optimizer step.
//!
//! The Learner's own loop steps the schedule an item at a time, clips each tensor by itself, and
//! validates and saves once an epoch; the recipe wants windows, one common norm, and both in the
//! middle of an epoch. The Learner's other parts stay in use: steps, optimizer, schedule, metrics,
//! dashboard, interruption.

mod step;

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use burn::{
    module::AutodiffModule,
    tensor::backend::AutodiffBackend,
    train::{
        EventProcessorTraining, Learner, LearnerEvent, LearningComponentsMarker,
        SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader,
        TrainingComponents, ValidLoader,
    },
};

use super::{
    checkpoint::TrainerState,
    checkpoint_dir::CheckpointDir,
    generation::GenerationScorer,
    learner::{ScheduleStepper, Trainee},
    lines::StepLines,
    loss_scale::LossScale,
    objective::rollouts::Rollouts,
    optimizer::AdamW,
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
    ops::memory::MemoryWatch,
    qwen3_vl::config::Qwen3VlConfig,
    runtime::accelerator::TrainAccelerator,
};
use step::Launched;

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
            let launched = launched?.timed(times);
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
            let known = pending.as_ref().is_some_and(Launched::is_known);
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

//! The loop, as a strategy of Burn's Learner: one item is one optimizer step.
//!
//! The Learner's own loop steps the schedule an item at a time, clips each tensor by itself, and
//! validates and saves once an epoch; the recipe wants windows, one common norm, and both in the
//! middle of an epoch. What the Learner brings stays in use: steps, optimizer, schedule, metrics,
//! dashboard, interruption.

use crate::kernels::{DeviceMemory, Kernels, TrainKernels};
use std::{
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use burn::{
    data::dataloader::Progress,
    optim::GradientsParams,
    tensor::backend::AutodiffBackend,
    train::{
        EventProcessorTraining, Learner, LearnerEvent, LearningComponentsMarker,
        SupervisedLearningStrategy, SupervisedTrainingEventProcessor, TrainLoader,
        TrainingComponents, TrainingItem, ValidLoader,
    },
};

use super::{
    checkpoint::{CheckpointError, TrainerState},
    checkpoint_dir::{CheckpointDir, CheckpointDirError},
    gradients::LossTotals,
    learner::{ScheduleStepper, StepNumbers, StepOutput, Trainee},
    optimizer::{AdamW, clip_global_norm},
    ranks::RankError,
    records::{MetricsLog, RecordsError},
    replicas::Replicas,
    tfevents::EventWriter,
};
use crate::{
    dataset::{
        DatasetError,
        loader::{Window, WindowLoader},
    },
    files::FileError,
    lora::config::LoraConfig,
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig},
    system::MemoryWatch,
};

/// The Learner's components for a backend.
pub type Components<B> = LearningComponentsMarker<B, ScheduleStepper, Trainee<B>, AdamW<B>>;

/// What ends a run before its time.
#[derive(Debug, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "each variant is the error of the part it names"
)]
pub enum TrainError {
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    CheckpointDir(#[from] CheckpointDirError),
    #[error(transparent)]
    Records(#[from] RecordsError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Pipeline(#[from] crate::pipeline::PipelineError),
    #[error(transparent)]
    Adapter(#[from] crate::lora::config::AdapterError),
    #[error(transparent)]
    Config(#[from] super::config::TrainConfigError),
    #[error(
        "step {step}: {what} is {value}; rows of the step (from 1): {rows:?}. The last checkpoint whose weights are known to give finite numbers is {checkpoint}; go on from it by name with a lower learning_rate, or look at these rows with `check`"
    )]
    NotFinite {
        step: usize,
        what: &'static str,
        value: f64,
        rows: Vec<usize>,
        checkpoint: String,
    },
    #[error(
        "`{}` is quantised: training wants weights in 16 or 32 bits; train on the checkpoint it was made from, the adapter fits both", .model.display()
    )]
    Quantised { model: std::path::PathBuf },
    #[error("`{data}` has no sample to validate on; is every sample longer than max_length?")]
    NoTargets { data: String },
    #[error("{0}; `--resume auto` goes on from the last checkpoint")]
    Rank(#[from] RankError),
    #[error("a thread failed: {0}; `--resume auto` goes on from the last checkpoint")]
    Thread(String),
    #[error("`{}` belongs to another run: {differences}; continue it with its own settings or choose another output_dir", .run.display())]
    OtherRun { run: PathBuf, differences: String },
    #[error("`{}` holds no whole checkpoint to continue from", .0.display())]
    NothingToResume(PathBuf),
    #[error("`{}` holds a run already; continue it with `--resume auto`, or choose another --output-dir", .0.display())]
    RunExists(PathBuf),
    #[error("{0}")]
    Other(String),
}

/// Scores of generated reports, by name.
pub type GenerationScores = Vec<(&'static str, f64)>;

/// Generates reports with the model as it is after some steps and scores them.
pub type GenerationScorer<B> =
    Box<dyn Fn(&Qwen3Vl<B>, usize) -> Result<GenerationScores, TrainError> + Send + Sync>;

/// Tells a person how the run goes: one line.
pub type Tell = Arc<dyn Fn(&str) + Send + Sync>;

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
    /// Makes validation batches.
    pub validation: Option<WindowLoader>,
    /// Generates and scores reports.
    pub scorer: Option<GenerationScorer<B::InnerBackend>>,
    /// The optimizer, sharing its state with the Learner's.
    pub optimizer: AdamW<B>,
    /// Devices of the replicas, the first being the Learner's.
    pub devices: Vec<B::Device>,
    /// The run's folder.
    pub checkpoints: CheckpointDir,
    /// `metrics.jsonl`.
    pub metrics: MetricsLog,
    /// TensorBoard's file.
    pub events: EventWriter,
    /// Where the run writes.
    pub output_dir: PathBuf,
    /// Steps of the run.
    pub total_steps: usize,
    /// After how many steps the weights last gave a finite loss and gradient; later ones, though
    /// saved, may be ruined.
    pub good_steps: usize,
    /// Most memory seen so far.
    pub memory: MemoryWatch,
    /// Set by a signal: save and end.
    pub interrupted: Arc<AtomicBool>,
    /// Plain progress lines.
    pub tell: Tell,
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// All steps were taken.
    Done,
    /// Early stopping.
    EarlyStop,
    /// A signal or the dashboard's key.
    Interrupted,
}

/// A window's loss and gradients; the latter stay with the ranks where there are several.
struct LearntWindow {
    grads: Option<GradientsParams>,
    totals: LossTotals,
    objective: f64,
}

/// The strategy; used for one run.
pub struct WindowStrategy<B: AutodiffBackend> {
    work: Mutex<Option<LoopState<B>>>,
    outcome: Mutex<Option<Result<(Ending, TrainerState), TrainError>>>,
}

impl<B: TrainKernels> WindowStrategy<B> {
    /// A strategy over prepared state.
    pub fn new(state: LoopState<B>) -> Self {
        Self {
            work: Mutex::new(Some(state)),
            outcome: Mutex::new(None),
        }
    }

    /// How the run ended; `None` before it has.
    pub fn take_outcome(&self) -> Option<Result<(Ending, TrainerState), TrainError>> {
        self.outcome
            .lock()
            .unwrap_or_else(|lock| lock.into_inner())
            .take()
    }
}

impl<B: TrainKernels> SupervisedLearningStrategy<Components<B>> for WindowStrategy<B> {
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
            let result = result.map(|ending| (ending, work.state));
            *self.outcome.lock().unwrap_or_else(|lock| lock.into_inner()) = Some(result);
        }
        (learner.model(), processor)
    }
}

impl<B: TrainKernels> LoopState<B> {
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
        if std::mem::take(&mut self.state.validation_due) {
            self.validate_and_save(learner, processor)?;
        }
        let mut windows = loader.iter();
        let mut replicas = self.replicas(learner)?;
        let mut clock = Instant::now();
        while let Some(window) = windows.next() {
            let step = window.step;
            let (rows, samples, tokens, epoch) = (
                window.rows.clone(),
                window.rows.len(),
                window.tokens,
                window.epoch,
            );
            learner.lr_step();
            if window.targets == 0 {
                // Every sample of the window was left out: the step is counted, nothing is learnt.
                self.state.step = step + 1;
                self.state.epoch = epoch;
                (self.tell)(&format!(
                    "step {}/{}: every sample is longer than max_length; nothing learnt",
                    step + 1,
                    self.total_steps
                ));
                if step + 1 == self.total_steps {
                    self.validate_and_save(learner, processor)?;
                }
                continue;
            }
            let LearntWindow {
                grads,
                totals,
                objective,
            } = self.learn(learner, replicas.as_mut(), window)?;
            let good = self.good_steps;
            let checkpoints = self.checkpoints.clone();
            let not_finite = |what, value| TrainError::NotFinite {
                step: step + 1,
                what,
                value,
                rows: rows.iter().map(|row| row + 1).collect(),
                checkpoint: last_good(&checkpoints, good),
            };
            if !objective.is_finite() {
                return Err(not_finite("the loss", objective));
            }
            let model = learner.model();
            let mut grads = match (grads, replicas.as_mut()) {
                (None, Some(replicas)) => replicas.reduce(&model)?,
                (grads, _) => grads.unwrap_or_default(),
            };
            let norm = clip_global_norm(&model, &mut grads, self.state.config.max_grad_norm);
            if !norm.is_finite() {
                return Err(not_finite("the gradient norm", norm));
            }
            drop(model);
            // The weights as they were before this step.
            self.good_steps = self.good_steps.max(step);
            learner.optimizer_step(grads);
            if let Some(replicas) = replicas.as_mut() {
                replicas.step(learner.lr_current())?;
            }
            self.state.step = step + 1;
            self.state.epoch = epoch;

            let seconds = clock.elapsed().as_secs_f64();
            clock = Instant::now();
            let numbers = StepNumbers {
                loss: objective,
                token_acc: totals.token_accuracy(),
                targets: totals.targets,
                grad_norm: norm,
                learning_rate: learner.lr_current(),
                samples_per_second: samples as f64 / seconds,
                tokens_per_second: tokens as f64 / seconds,
                memory_gib: self.memory.peak().map_or(0.0, |peak| peak.gib()),
            };
            self.note_step(&numbers)?;
            processor.process_train(LearnerEvent::ProcessedItem(TrainingItem::new(
                StepOutput::Numbers(numbers),
                windows.progress(),
                Progress::new(
                    epoch.ceil() as usize,
                    self.state.config.num_train_epochs.ceil() as usize,
                ),
                Some(step + 1),
                Some(learner.lr_current()),
            )));

            let last = step + 1 == self.total_steps;
            let interrupted = stop() || self.interrupted.load(Ordering::Relaxed);
            let due = |every: usize| every > 0 && (step + 1).is_multiple_of(every);
            let mut ending = None;
            self.state.validation_due |= due(self.state.config.eval_steps) || last;
            if self.state.validation_due && !interrupted {
                let improved = self.validate_and_save(learner, processor)?;
                if !improved && patience > 0 && self.state.validations_without_gain >= patience {
                    ending = Some(Ending::EarlyStop);
                }
                clock = Instant::now();
            } else if interrupted || due(self.state.config.save_steps) {
                self.save(learner)?;
                clock = Instant::now();
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
        if let Some(error) = self.loader.take_error() {
            // What was learnt up to the bad sample is kept.
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

    /// The other devices with their copies, if there are any.
    fn replicas(
        &self,
        learner: &Learner<Components<B>>,
    ) -> Result<Option<Replicas<B>>, TrainError> {
        if self.devices.len() < 2 {
            return Ok(None);
        }
        let config = &self.state.config;
        let replicas = Replicas::start(
            &self.devices,
            &config.device,
            &learner.model(),
            &self.optimizer,
            config.max_grad_norm,
            config.patience(),
        )?;
        Ok(Some(replicas))
    }

    /// Works out a window's loss and gradients on all devices.
    fn learn(
        &mut self,
        learner: &Learner<Components<B>>,
        replicas: Option<&mut Replicas<B>>,
        window: Window,
    ) -> Result<LearntWindow, TrainError> {
        let all_targets = window.targets;
        let learnt = match replicas {
            None => {
                let output = learner.train_step(window);
                let learnt = LearntWindow {
                    totals: output.item.totals(),
                    objective: output.item.objective(),
                    grads: Some(output.grads),
                };
                self.memory.look::<B::InnerBackend>(&self.devices[0]);
                learnt
            }
            Some(replicas) => {
                let mut sum = LearntWindow {
                    grads: None,
                    totals: LossTotals::default(),
                    objective: 0.0,
                };
                let own = B::InnerBackend::memory_in_use(&self.devices[0]);
                let parts = replicas.learn(&learner.model(), window)?;
                for (rank, part) in parts.into_iter().enumerate() {
                    sum.totals.add(part.totals);
                    sum.objective += part.objective;
                    // The first device also holds what this thread put there: the weights.
                    let own = own.filter(|_| rank == 0);
                    self.memory.note(part.memory.map(|memory| DeviceMemory {
                        in_use: memory.in_use + own.map_or(0, |own| own.in_use),
                        reserved: memory.reserved + own.map_or(0, |own| own.reserved),
                    }));
                }
                sum
            }
        };
        debug_assert_eq!(learnt.totals.targets, all_targets);
        Ok(learnt)
    }
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

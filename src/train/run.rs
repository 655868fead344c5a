//! A whole run: data, model, Learner, strategy; fresh or continued.

use crate::kernels::{Kernels, TrainKernels};
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicBool},
};

use burn::{
    module::{Module, ModuleMapper, Param},
    prelude::*,
    tensor::DType,
    train::{
        Interrupter, Learner, SupervisedTraining, TrainingStrategy, renderer::MetricsRenderer,
    },
};

use super::{
    checkpoint::{
        RANDOM_BASE, TrainerState, dtype_text, read_state, restore_optimizer, restore_weights,
        trained_params,
    },
    checkpoint_dir::{CheckpointDir, RunLock},
    config::{TrainConfig, Tuner},
    image_facts::ImageFacts,
    learner::{Gauge, ScheduleStepper, StepSettings, Trainee},
    optimizer::AdamW,
    records::MetricsLog,
    strategy::{Components, Ending, GenerationScorer, LoopState, Tell, TrainError, WindowStrategy},
    tfevents::EventWriter,
};
use crate::{
    dataset::{Dataset, loader::WindowLoader},
    files::write_atomic,
    lora::{
        attach::attach,
        base::{BaseFingerprint, check_base},
        config::LoraConfig,
        files::load_adapter_for_training,
    },
    pipeline::{PipelineError, PipelineOptions, TextAndImages, load_model},
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions, weights::LoadProgress},
    system::MemoryWatch,
};

/// Whether a run starts anew or goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// A new run; an output folder that holds checkpoints is refused.
    No,
    /// From the newest whole checkpoint of the output folder; anew where there is none.
    Auto,
    /// From this checkpoint folder.
    From(PathBuf),
}

/// What a run needs from the outside.
pub struct RunOptions {
    /// Settings.
    pub config: TrainConfig,
    /// Whether to go on.
    pub resume: Resume,
    /// Weights drawn at random in place of those in `model`, whose `config.json` counts.
    pub random_init: bool,
    /// Burn's dashboard, or a renderer that prints nothing.
    pub renderer: Option<Box<dyn MetricsRenderer>>,
    /// The Learner's stop handle, shared with the dashboard.
    pub interrupter: Interrupter,
    /// Set by a signal: save and end.
    pub interrupted: Arc<AtomicBool>,
    /// Plain progress lines.
    pub tell: Tell,
}

/// What came of a run.
pub struct RunResult<B: Backend> {
    /// How it ended.
    pub ending: Ending,
    /// Where it stands.
    pub state: TrainerState,
    /// The model as trained, adapters attached.
    pub model: Qwen3Vl<B>,
    /// Tokenizer, template, processor.
    pub parts: Arc<TextAndImages>,
    /// Folder of the last checkpoint.
    pub checkpoint: PathBuf,
}

/// Sets for each parameter whether it is trained, by its path.
struct Freeze<F> {
    path: Vec<String>,
    trained: F,
}

impl<B: Backend, F: Fn(&str) -> bool> ModuleMapper<B> for Freeze<F> {
    fn enter_module(&mut self, name: &str, _container_type: &str) {
        self.path.push(name.to_string());
    }

    fn exit_module(&mut self, _name: &str, _container_type: &str) {
        self.path.pop();
    }

    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let trained = (self.trained)(&self.path.join("."));
        param.set_require_grad(trained)
    }
}

/// Freezes what the run does not train and attaches adapters.
fn prepare_model<B: Kernels>(
    model: Qwen3Vl<B>,
    config: &TrainConfig,
) -> Result<(Qwen3Vl<B>, LoraConfig), TrainError> {
    let own = config.lora_config();
    match config.tuner {
        Tuner::Full => {
            let (vit, aligner, llm) = (config.freeze_vit, config.freeze_aligner, config.freeze_llm);
            let trained = move |path: &str| {
                let is_aligner = path.starts_with("model.visual.merger.")
                    || path.starts_with("model.visual.deepstack_merger_list.");
                if is_aligner {
                    !aligner
                } else if path.starts_with("model.visual.") {
                    !vit
                } else {
                    !llm
                }
            };
            let model = model.map(&mut Freeze {
                path: Vec::new(),
                trained,
            });
            Ok((model, own))
        }
        Tuner::Lora => {
            let frozen = model.no_grad();
            Ok(match &config.adapter {
                // Its rank, scaling and targets count; dropout is the run's.
                Some(dir) => load_adapter_for_training(frozen, dir, config.lora_dropout)?,
                None => (attach(frozen, &own, config.seed)?.0, own),
            })
        }
    }
}

/// Draws a model at random: for the first training of a small one.
fn random_model<B: Kernels>(
    config: &Qwen3VlConfig,
    seed: u64,
    dtype: DType,
    device: &B::Device,
) -> Qwen3Vl<B> {
    struct Draw;
    impl<B: Backend> ModuleMapper<B> for Draw {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            // Parameters are drawn when they are first looked at: look at them in order.
            param.map(|tensor| tensor)
        }
    }
    B::seed(device, seed);
    let options = InitOptions {
        dtype,
        ..InitOptions::default()
    };
    Qwen3Vl::new(config, &options, device).map(&mut Draw)
}

/// Finds where to go on, checks that it is the same run, and gives the checkpoint's folder.
fn find_checkpoint(
    options: &RunOptions,
    data: &Dataset,
    facts: &RunFacts,
    devices: usize,
    dtype: DType,
) -> Result<Option<(PathBuf, TrainerState)>, TrainError> {
    let run = &options.config.output_dir;
    let dir = match &options.resume {
        Resume::No => {
            let found = CheckpointDir::view(run).list()?;
            return if found.is_empty() {
                Ok(None)
            } else {
                Err(TrainError::RunExists(run.clone()))
            };
        }
        Resume::Auto => {
            if !run.is_dir() {
                return Ok(None);
            }
            let search = CheckpointDir::open(run)?.newest_whole()?;
            for damaged in &search.passed_over {
                (options.tell)(&damaged.to_string());
            }
            match search.found {
                Some(found) => found.path,
                None if search.passed_over.is_empty() => return Ok(None),
                // Starting anew would overwrite what may still be saved by hand.
                None => return Err(TrainError::NothingToResume(run.clone())),
            }
        }
        Resume::From(dir) => {
            if !dir.is_dir() {
                return Err(TrainError::NothingToResume(dir.clone()));
            }
            crate::files::verify_folder(dir, crate::files::Depth::Hashes).map_err(|damage| {
                TrainError::Other(format!(
                    "checkpoint `{}` is damaged: {damage}",
                    dir.display()
                ))
            })?;
            dir.clone()
        }
    };
    let state = read_state(&dir)?;
    let mut differences: Vec<String> = state
        .config
        .differences(&options.config)
        .into_iter()
        .map(|(key, there, here)| format!("`{key}` was {there}, is {here}"))
        .collect();
    if state.train_data != data.fingerprint() {
        differences.push("the training data has changed".to_string());
    }
    match &state.base {
        Some(base) if *base != facts.base => differences.push(format!(
            "the weights in `{}` have changed (fingerprint was {base}, is {})",
            options.config.model.display(),
            facts.base
        )),
        _ => {}
    }
    if state.train_data == data.fingerprint() {
        differences.extend(changed_images(options, data, facts, devices, &dir, &state));
    }
    // The devices may be others, but not more or fewer: they share every window.
    if state.devices != devices {
        differences.push(format!(
            "the number of devices was {}, is {devices}",
            state.devices
        ));
    }
    let dtype = dtype_text(dtype);
    if state.dtype != dtype {
        differences.push(format!("`dtype` was {}, is {dtype}", state.dtype));
    }
    if !differences.is_empty() {
        return Err(TrainError::OtherRun {
            run: dir,
            differences: differences.join("; "),
        });
    }
    Ok(Some((dir, state)))
}

/// What a run's numbers depend on besides its settings and the rows of its data.
struct RunFacts {
    images: ImageFacts,
    /// Fingerprint of the base's weights, or [`RANDOM_BASE`].
    base: String,
}

/// Says which pictures are not what the run has learnt from.
///
/// One that no step has seen yet may be another: a run that an unreadable picture ended goes on once
/// the picture is mended.
fn changed_images(
    options: &RunOptions,
    data: &Dataset,
    facts: &RunFacts,
    devices: usize,
    dir: &Path,
    state: &TrainerState,
) -> Option<String> {
    let Some(before) = dir.parent().and_then(ImageFacts::load) else {
        let changed = state.images.as_ref()? != &facts.images.digest();
        return changed.then(|| "images of the training data have changed".to_string());
    };
    let plan = options.config.window_plan(devices);
    let seen = plan.rows_before(state.step, data.len());
    let changed = facts.images.changed_in(&before, data, &seen);
    let first = changed.first()?;
    Some(format!(
        "{} of the images that were learnt from have changed, first `{first}`",
        changed.len()
    ))
}

/// Writes the resolved settings, versions and data hashes before the first step.
fn write_run_files(config: &TrainConfig, data: &BTreeMap<&str, String>) -> Result<(), TrainError> {
    let dir = &config.output_dir;
    write_atomic(&dir.join("config.toml"), |out| {
        out.write_all(config.to_toml().as_bytes())
    })?;
    let facts = serde_json::json!({
        "program": concat!("xray-qwen3vl ", env!("CARGO_PKG_VERSION")),
        "burn": "0.21.0",
        "seed": config.seed,
        "data": data,
        "arguments": std::env::args().collect::<Vec<_>>(),
    });
    write_atomic(&dir.join("run.json"), |out| {
        serde_json::to_writer_pretty(&mut *out, &facts)?;
        out.write_all(b"\n")
    })?;
    Ok(())
}

/// Trains on `devices`, the first of which holds the optimizer.
///
/// `scorer` makes the scores of generated reports when the run asks for them.
///
/// # Errors
/// [`TrainError`]; everything up to the last checkpoint is kept.
pub fn train<B: TrainKernels>(
    options: RunOptions,
    devices: Vec<B::Device>,
    dtype: DType,
    scorer: impl FnOnce(
        &TrainConfig,
        &Arc<TextAndImages>,
        &Dataset,
        &B::Device,
    ) -> GenerationScorer<B::InnerBackend>,
    on_progress: LoadProgress<'_>,
) -> Result<RunResult<B::InnerBackend>, TrainError> {
    options.config.validate()?;
    let config = options.config.clone();
    let device = devices[0].clone();
    let data = Dataset::open(&config.train_data)?;
    let validation = config.val_data.as_deref().map(Dataset::open).transpose()?;
    let run = &config.output_dir;
    // Held to the end of the run. A folder that is not there yet is made once all has been checked.
    let lock = run.is_dir().then(|| RunLock::take(run)).transpose()?;
    let facts = RunFacts {
        images: ImageFacts::of(&data),
        base: if options.random_init {
            RANDOM_BASE.to_string()
        } else if config.model.is_dir() {
            BaseFingerprint::of(&config.model)?.sha256
        } else {
            return Err(PipelineError::NoModel(config.model.clone()).into());
        },
    };
    let resumed = find_checkpoint(&options, &data, &facts, devices.len(), dtype)?;

    let pipeline = PipelineOptions {
        model: config.model.clone(),
        adapter: None,
        dtype,
        min_pixels: config.min_pixels,
        max_pixels: config.max_pixels,
    };
    let parts = Arc::new(TextAndImages::load(&pipeline)?);
    let model_config = parts.config.clone();
    let base = if options.random_init {
        random_model::<B>(&model_config, config.seed, dtype, &device)
    } else {
        load_model::<B>(&pipeline, &model_config, &device, on_progress)?
    };
    if let Some(adapter) = config.adapter.as_ref().filter(|_| resumed.is_none())
        && let Err(error) = check_base(adapter, &config.model)
    {
        // The adapter is where this run begins, not what it claims: a person may mean it.
        (options.tell)(&format!("note: {error}"));
    }
    let optimizer = AdamW::<B>::new(config.adamw());
    let (model, lora, state) = match &resumed {
        None => {
            let state = TrainerState {
                step: 0,
                epoch: 0.0,
                best: None,
                validations_without_gain: 0,
                validation_due: false,
                devices: devices.len(),
                dtype: dtype_text(dtype).to_string(),
                config: config.clone(),
                train_data: data.fingerprint().to_string(),
                images: Some(facts.images.digest()),
                base: Some(facts.base.clone()),
                version: env!("CARGO_PKG_VERSION").to_string(),
            };
            let (model, lora) = prepare_model(base, &config)?;
            (model, lora, state)
        }
        Some((dir, state)) => {
            let (model, lora) = match config.tuner {
                Tuner::Lora => load_adapter_for_training(base.no_grad(), dir, config.lora_dropout)?,
                Tuner::Full => {
                    let (model, lora) = prepare_model(base, &config)?;
                    (restore_weights(dir, model)?, lora)
                }
            };
            restore_optimizer(dir, &model, &optimizer, state.step, &device)?;
            let state = TrainerState {
                config: config.clone(),
                images: Some(facts.images.digest()),
                base: Some(facts.base.clone()),
                ..state.clone()
            };
            (model, lora, state)
        }
    };
    let trained: usize = trained_params(&model).len();
    let total_steps = config.total_steps(data.len(), devices.len());
    (options.tell)(&format!(
        "{} samples, {} optimizer steps, {trained} trained tensors{}",
        data.len(),
        total_steps,
        match &resumed {
            Some((dir, state)) => format!(
                ", going on after step {} from `{}`",
                state.step,
                dir.display()
            ),
            None => String::new(),
        }
    ));

    let loader = WindowLoader::new(
        data.clone(),
        parts.clone(),
        config.window_plan(devices.len()),
        state.step,
        config.dataloader_num_workers,
    )
    .up_to(total_steps)
    .with_patience((devices.len() > 1).then(|| config.patience()));
    let valid_loader = validation
        .clone()
        .map(|data| WindowLoader::new(data, parts.clone(), config.validation_plan(), 0, 1));
    let scorer = match &validation {
        Some(data) if config.eval_generate > 0 => Some(scorer(&config, &parts, data, &device)),
        _ => None,
    };
    let checkpoints = CheckpointDir::open(run)?;
    let _lock = match lock {
        Some(lock) => lock,
        None => RunLock::take(run)?,
    };
    for (from, to) in match &resumed {
        Some((_, state)) => checkpoints.abandon_after(state.step as u64)?,
        None => Vec::new(),
    } {
        (options.tell)(&format!(
            "`{}` lies beyond the step the run goes on from; it is now `{}`",
            from.display(),
            to.display()
        ));
    }
    if resumed.is_none() {
        let mut hashes = BTreeMap::from([("train", data.fingerprint().to_string())]);
        if let Some(data) = &validation {
            hashes.insert("val", data.fingerprint().to_string());
        }
        hashes.insert("images", facts.images.digest());
        hashes.insert("base", facts.base);
        write_run_files(&config, &hashes)?;
    }
    facts.images.save(run)?;
    let metrics_path = config.output_dir.join("metrics.jsonl");
    let metrics = match &resumed {
        Some(_) => MetricsLog::resume(&metrics_path, state.step as u64)?.0,
        None => MetricsLog::create(&metrics_path)?,
    };
    let events = EventWriter::create(
        &config.output_dir.join("tensorboard"),
        resumed.as_ref().map(|_| state.step as u64),
    )?;

    let schedule = ScheduleStepper::new(config.schedule(total_steps), state.step as u64);
    let settings = Arc::new(StepSettings {
        config: model_config.clone(),
        train: config.clone(),
    });
    let learner: Learner<Components<B>> =
        Learner::new(Trainee::new(model, settings), optimizer.clone(), schedule);
    let strategy = Arc::new(WindowStrategy::new(LoopState {
        state: state.clone(),
        model_config,
        lora,
        loader: loader.clone(),
        validation: valid_loader.clone(),
        scorer,
        optimizer,
        devices,
        checkpoints: checkpoints.clone(),
        metrics,
        events,
        output_dir: config.output_dir.clone(),
        total_steps,
        good_steps: state.step.saturating_sub(1),
        memory: MemoryWatch::default(),
        interrupted: options.interrupted,
        tell: options.tell,
    }));
    let train_loader = Arc::new(loader.clone());
    // Without a validation set the Learner still wants a loader; it is never asked.
    let valid_loader = Arc::new(valid_loader.unwrap_or(loader));
    let mut training =
        SupervisedTraining::<Components<B>>::new(&config.output_dir, train_loader, valid_loader)
            .metric_train_numeric(Gauge::loss())
            .metric_valid_numeric(Gauge::loss())
            .metric_train_numeric(Gauge::token_accuracy())
            .metric_valid_numeric(Gauge::token_accuracy())
            .metric_train_numeric(Gauge::learning_rate())
            .metric_train_numeric(Gauge::gradient_norm())
            .metric_train_numeric(Gauge::samples_per_second())
            .metric_train_numeric(Gauge::tokens_per_second())
            .metric_train_numeric(Gauge::memory())
            .num_epochs(config.num_train_epochs.ceil() as usize)
            .with_interrupter(options.interrupter)
            .with_application_logger(None)
            .with_training_strategy(TrainingStrategy::Custom(strategy.clone()));
    if let Some(renderer) = options.renderer {
        training = training.renderer(BoxedRenderer(renderer));
    }
    let result = training.launch(learner);
    let model = result.model.model;
    drop(result.renderer);
    let (ending, state) = strategy.take_outcome().unwrap_or_else(|| {
        Err(TrainError::Other(
            "the Learner ended without a result".into(),
        ))
    })?;
    let checkpoint = checkpoints.path(state.step as u64);
    Ok(RunResult {
        ending,
        state,
        model,
        parts,
        checkpoint,
    })
}

/// A renderer chosen at run time, where the Learner wants a type.
struct BoxedRenderer(Box<dyn MetricsRenderer>);

mod boxed {
    use burn::train::{
        LearnerSummary,
        metric::MetricDefinition,
        renderer::{
            EvaluationName, EvaluationProgress, MetricState, MetricsRenderer,
            MetricsRendererEvaluation, MetricsRendererTraining, ProgressType, TrainingProgress,
        },
    };

    use super::BoxedRenderer;

    impl MetricsRendererTraining for BoxedRenderer {
        fn update_train(&mut self, state: MetricState) {
            self.0.update_train(state);
        }
        fn update_valid(&mut self, state: MetricState) {
            self.0.update_valid(state);
        }
        fn render_train(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
            self.0.render_train(item, indicators);
        }
        fn render_valid(&mut self, item: TrainingProgress, indicators: Vec<ProgressType>) {
            self.0.render_valid(item, indicators);
        }
        fn on_train_end(
            &mut self,
            summary: Option<LearnerSummary>,
        ) -> Result<(), Box<dyn core::error::Error>> {
            self.0.on_train_end(summary)
        }
    }

    impl MetricsRendererEvaluation for BoxedRenderer {
        fn update_test(&mut self, name: EvaluationName, state: MetricState) {
            self.0.update_test(name, state);
        }
        fn render_test(&mut self, item: EvaluationProgress, indicators: Vec<ProgressType>) {
            self.0.render_test(item, indicators);
        }
    }

    impl MetricsRenderer for BoxedRenderer {
        fn manual_close(&mut self) {
            self.0.manual_close();
        }
        fn register_metric(&mut self, definition: MetricDefinition) {
            self.0.register_metric(definition);
        }
    }
}

/// A renderer that shows nothing: the strategy prints lines of its own.
pub struct QuietRenderer;

mod quiet {
    use burn::train::{
        metric::MetricDefinition,
        renderer::{
            EvaluationName, EvaluationProgress, MetricState, MetricsRenderer,
            MetricsRendererEvaluation, MetricsRendererTraining, ProgressType, TrainingProgress,
        },
    };

    use super::QuietRenderer;

    impl MetricsRendererTraining for QuietRenderer {
        fn update_train(&mut self, _state: MetricState) {}
        fn update_valid(&mut self, _state: MetricState) {}
        fn render_train(&mut self, _item: TrainingProgress, _indicators: Vec<ProgressType>) {}
        fn render_valid(&mut self, _item: TrainingProgress, _indicators: Vec<ProgressType>) {}
    }

    impl MetricsRendererEvaluation for QuietRenderer {
        fn update_test(&mut self, _name: EvaluationName, _state: MetricState) {}
        fn render_test(&mut self, _item: EvaluationProgress, _indicators: Vec<ProgressType>) {}
    }

    impl MetricsRenderer for QuietRenderer {
        fn manual_close(&mut self) {}
        fn register_metric(&mut self, _definition: MetricDefinition) {}
    }
}

//! A whole run: data, model, Learner, strategy; fresh or continued.

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use burn::{
    module::{Module, ModuleMapper, Param},
    prelude::*,
    tensor::DType,
    train::{Learner, SupervisedTraining, TrainingStrategy},
};

use super::{
    checkpoint::{TrainerState, dtype_text, restore_optimizer, restore_weights, trained_params},
    checkpoint_dir::{CheckpointDir, RunLock},
    config::{Reporter, TrainConfig, Tuner},
    data::RunData,
    generation::GenerationScorer,
    image_facts,
    learner::{Gauge, ScheduleStepper, StepSettings, Trainee},
    lines::StepLines,
    loss_scale::LossScale,
    objective::{
        reference::Reference,
        rollouts::Rollouts,
        settings::{Objective, ReferenceKey},
    },
    optimizer::AdamW,
    options::RunOptions,
    outcome::{Ending, Outcome, TrainError},
    processes::{self, Scratch},
    records::{METRICS, MetricsLog},
    renderers::{RunRenderer, RunSteps},
    report_command::{ReportCommand, Reported, Start},
    resume::{RunFacts, find_checkpoint},
    strategy::{Components, LoopState, WindowStrategy},
    tfevents::EventWriter,
    words::{counted, last_checkpoint},
};
use crate::{
    adapters::lora::{
        attach::attach, base::check_base, config::LoraConfig, files::load_adapter_for_training,
        saved_modules::train_saved,
    },
    base::files::{FileError, write_atomic},
    dataset::{
        DataFacts, Dataset,
        loader::{Share, WindowLoader},
    },
    ops::{memory::MemoryWatch, quantised::Quantization},
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, nn::InitOptions, weights::LoadProgress},
    runtime::{
        accelerator::{Accelerator, TrainAccelerator},
        pipeline::{PipelineOptions, TextAndImages, load_model},
    },
};

pub use super::renderers::{Dashboard, QuietRenderer};

/// Result of a run.
pub struct RunResult<B: Backend> {
    /// How it ended.
    pub ending: Ending,
    /// Its progress.
    pub state: TrainerState,
    /// The model as trained, adapters attached.
    pub model: Qwen3Vl<B>,
    /// Tokenizer, template, processor.
    pub parts: Arc<TextAndImages>,
    /// Training data.
    pub data: Dataset,
    /// Validation data.
    pub validation: Option<Dataset>,
    /// Folder of the last checkpoint.
    pub checkpoint: PathBuf,
    /// What became of `report_command`; `None` without one.
    pub reported: Option<Reported>,
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
fn prepare_model<B: Accelerator>(
    model: Qwen3Vl<B>,
    config: &TrainConfig,
    tell: &dyn Fn(&str),
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
                Some(dir) => {
                    let adapted = load_adapter_for_training(frozen, dir, config.lora_dropout)?;
                    adapted.notes.iter().for_each(|note| tell(note));
                    (adapted.model, adapted.config)
                }
                None => {
                    let (model, _) = attach(frozen, &own, config.seed)?;
                    let (model, notes) = train_saved(model, &own)?;
                    notes.iter().for_each(|note| tell(note));
                    (model, own)
                }
            })
        }
    }
}

/// Draws a model at random: for the first training of a small one.
fn random_model<B: Accelerator>(
    config: &Qwen3VlConfig,
    seed: u64,
    dtype: DType,
    device: &B::Device,
) -> Qwen3Vl<B> {
    struct Draw;
    impl<B: Backend> ModuleMapper<B> for Draw {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
            // Parameters are initialised at their first use: use them in order.
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

/// Writes the resolved settings: what `--config` takes to resume.
fn write_config(config: &TrainConfig) -> Result<(), TrainError> {
    write_atomic(&config.output_dir.join("config.toml"), |out| {
        out.write_all(config.to_toml().as_bytes())
    })?;
    Ok(())
}

/// Writes versions, data hashes and what to know of the data sets (training, then validation) before the
/// first step.
fn write_run_facts(
    config: &TrainConfig,
    data: &BTreeMap<&str, String>,
    quantization: Option<Quantization>,
    data_facts: &[DataFacts],
) -> Result<(), TrainError> {
    let dir = &config.output_dir;
    let facts = serde_json::json!({
        "program": concat!("xray-qwen3vl ", env!("CARGO_PKG_VERSION")),
        "commit": crate::base::build_info::COMMIT,
        "burn": "0.21.0",
        "seed": config.seed,
        "data": data,
        "quantization": quantization.map(|quantization| quantization.to_string()),
        "data_facts": data_facts,
        "arguments": std::env::args().collect::<Vec<_>>(),
    });
    write_atomic(&dir.join("run.json"), |out| {
        serde_json::to_writer_pretty(&mut *out, &facts)?;
        out.write_all(b"\n")
    })?;
    Ok(())
}

/// Puts aside what Burn's logs hold of the epoch that a run goes on in: they begin a file anew.
fn keep_part_of_epoch(run: &Path, steps: &RunSteps) -> Result<(), TrainError> {
    if steps.before == 0 || steps.before.is_multiple_of(steps.an_epoch.max(1)) {
        return Ok(());
    }
    let epoch = steps.epoch(steps.before);
    for split in ["train", "valid"] {
        let from = run.join(split).join(format!("epoch-{epoch}"));
        let name = format!("part-of-epoch-{epoch}-before-step-{}", steps.before + 1);
        let to = run.join(split).join(name);
        if from.is_dir() && !to.exists() {
            fs::rename(&from, &to).map_err(|cause| FileError::write(&to, cause))?;
        }
    }
    Ok(())
}

/// Trains on `devices`, the first of which holds the optimizer, together with the other processes of
/// `options.cluster`, where the run has several.
///
/// `scorer` makes the scores of generated reports when the run's config wants them.
///
/// # Errors
/// [`TrainError`]; everything up to the last checkpoint is kept.
pub fn train<B: TrainAccelerator>(
    options: RunOptions,
    devices: Vec<B::Device>,
    dtype: DType,
    scorer: impl FnOnce(
        &TrainConfig,
        &Arc<TextAndImages>,
        &Dataset,
    ) -> GenerationScorer<B::InnerBackend>,
    on_progress: LoadProgress<'_>,
) -> Result<RunResult<B::InnerBackend>, TrainError> {
    let Some(cluster) = options.cluster.clone() else {
        return train_here::<B>(options, devices, dtype, scorer, on_progress);
    };
    let trained = train_here::<B>(options, devices, dtype, scorer, on_progress);
    match &trained {
        // One that was ended by another says nothing more.
        Err(error) => cluster.fail(&error.to_string()),
        Ok(_) => cluster.finish()?,
    }
    trained
}

/// This process's part of [`train`].
fn train_here<B: TrainAccelerator>(
    options: RunOptions,
    devices: Vec<B::Device>,
    dtype: DType,
    scorer: impl FnOnce(
        &TrainConfig,
        &Arc<TextAndImages>,
        &Dataset,
    ) -> GenerationScorer<B::InnerBackend>,
    on_progress: LoadProgress<'_>,
) -> Result<RunResult<B::InnerBackend>, TrainError> {
    options.config.validate()?;
    let mut config = options.config.clone();
    let cluster = options.cluster.clone();
    let share = cluster.as_ref().map(|cluster| Share {
        first: cluster.first_device(),
        count: devices.len(),
        of: cluster.devices(),
    });
    let all_devices = share.map_or(devices.len(), |share| share.of);
    let writes = cluster.as_ref().is_none_or(|cluster| cluster.is_first());
    let quantization = config.quantization(&config.model)?;
    if options.random_init && quantization.is_some() {
        return Err(TrainError::QuantisedRandom);
    }
    let device = devices[0].clone();
    let run_data = RunData::open(&config, options.fetching)?;
    let random_init = options.random_init;
    let facts = RunFacts::gather(
        &config,
        random_init,
        quantization,
        &run_data.train,
        run_data.validation.as_ref(),
    )?;
    if let Some(cluster) = &cluster {
        processes::compare(cluster, &config, random_init, &run_data, &facts)?;
    }
    // One process writes; what the others would write is for nobody.
    let scratch = match &cluster {
        Some(cluster) if !writes => Some(Scratch::create(cluster.rank())?),
        _ => None,
    };
    if let Some(scratch) = &scratch {
        config.output_dir = scratch.path().to_path_buf();
        config.report_to.clear();
    }
    let config = config;
    let RunData {
        train: data,
        validation,
        notes,
    } = run_data;
    notes.iter().for_each(|note| (options.tell)(note));
    let run = &config.output_dir;
    // Held to the end of the run. A folder that is not there yet is made once all has been checked.
    let lock = run.is_dir().then(|| RunLock::take(run)).transpose()?;
    let mut resumed = match writes {
        true => find_checkpoint(
            &options,
            &data,
            validation.as_ref(),
            &facts,
            all_devices,
            dtype,
        )?,
        false => None,
    };
    if let Some(cluster) = &cluster {
        resumed = processes::same_checkpoint(cluster, resumed, run)?;
        if let Some((dir, _)) = resumed.as_ref().filter(|_| writes) {
            cluster.set_last(last_checkpoint(dir));
        }
    }

    let [min_pixels, max_pixels] = config.pixel_limits();
    let pipeline = PipelineOptions {
        model: config.model.clone(),
        adapter: None,
        dtype,
        quantize: quantization.map(Into::into),
        min_pixels: Some(min_pixels),
        max_pixels: Some(max_pixels),
        gguf: config.gguf_parts(),
        memory: None,
    };
    let parts = Arc::new(TextAndImages::load(&pipeline)?);
    for remark in &parts.remarks {
        (options.tell)(&format!("note: {remark}"));
    }
    let model_config = parts.config.clone();
    let (max_length, overlong) = (config.max_length, config.overlong);
    let mut data_facts = vec![data.facts(&parts, max_length, overlong)?];
    if let Some(data) = &validation {
        data_facts.push(data.facts(&parts, max_length, overlong)?);
    }
    let mut sentences: Vec<String> = data_facts.iter().flat_map(DataFacts::sentences).collect();
    // Both parts of one file have its remarks.
    sentences.dedup();
    sentences.iter().for_each(|line| (options.tell)(line));
    let base = if options.random_init {
        random_model::<B>(&model_config, config.seed, dtype, &device)
    } else {
        load_model::<B>(&pipeline, &model_config, &device, on_progress)?
    };
    if let Some(adapter) = config.adapter.as_ref().filter(|_| resumed.is_none())
        && let Err(error) = check_base(adapter, &config.model, &config.gguf_parts())
    {
        // The adapter is where this run begins, not what it claims: a person may mean it.
        (options.tell)(&format!("note: {error}"));
    }
    if config.objective == Objective::Dpo {
        // A row that is no pair is named before the first step.
        (0..data.len()).try_for_each(|row| data.rejected(row).map(|_| ()))?;
    }
    if config.objective == Objective::Grpo && share.is_some() {
        return Err(TrainError::Other(
            "objective \"grpo\" runs in one process, on any number of its devices; start it without a cluster".into(),
        ));
    }
    let rollout_plan = config.rollout_plan(devices.len())?;
    if config.objective != Objective::Sft && config.lora_dropout > 0.0 {
        (options.tell)(&format!(
            "note: lora_dropout {} is not used with objective {}: log-probabilities are compared",
            config.lora_dropout,
            config.objective.name()
        ));
    }
    // Before adapters are attached; without a reference nothing is kept.
    let needs_reference = config.reference_weight() > 0.0;
    let start = match (&config.adapter, config.reference) {
        (Some(dir), ReferenceKey::Start) if needs_reference => Some((dir.clone(), base.clone())),
        _ => None,
    };
    let optimizer = AdamW::<B>::new(config.adamw());
    let (model, lora, state) = match &resumed {
        None => {
            let state = TrainerState {
                step: 0,
                epoch: 0.0,
                best: None,
                validations_without_gain: 0,
                validation_due: false,
                devices: all_devices,
                dtype: dtype_text(dtype).to_string(),
                config: config.clone(),
                train_data: data.fingerprint().to_string(),
                images: Some(facts.images.digest()),
                base: Some(facts.base.clone()),
                trained_on: facts.trained_on.clone(),
                reward_watch: None,
                loss_scale: None,
                version: env!("CARGO_PKG_VERSION").to_string(),
            };
            let (model, lora) = prepare_model(base, &config, &*options.tell)?;
            (model, lora, state)
        }
        Some((dir, state)) => {
            let (model, lora) = match config.tuner {
                Tuner::Lora => {
                    let adapted =
                        load_adapter_for_training(base.no_grad(), dir, config.lora_dropout)?;
                    (adapted.model, adapted.config)
                }
                Tuner::Full => {
                    let (model, lora) = prepare_model(base, &config, &*options.tell)?;
                    (restore_weights(dir, model)?, lora)
                }
            };
            restore_optimizer(dir, &model, &optimizer, state.step, &device)?;
            let state = TrainerState {
                config: config.clone(),
                images: Some(facts.images.digest()),
                base: Some(facts.base.clone()),
                trained_on: facts.trained_on.clone(),
                ..state.clone()
            };
            (model, lora, state)
        }
    };
    let trained: usize = trained_params(&model).len();
    let total_steps = config.total_steps(data.len(), all_devices);
    (options.tell)(&format!(
        "{}, {}, {}{}{}",
        counted(data.len(), "sample", "samples"),
        counted(total_steps, "optimizer step", "optimizer steps"),
        counted(trained, "trained tensor", "trained tensors"),
        match quantization {
            Some(quantization) => format!(" beside weights quantised as {quantization}"),
            None => String::new(),
        },
        match &resumed {
            Some((dir, state)) => format!(
                ", going on after step {} from `{}`",
                state.step,
                dir.display()
            ),
            None => String::new(),
        }
    ));

    // A window is a rollout's questions where answers are drawn.
    let updates = config.updates_per_rollout();
    let loader = WindowLoader::new(
        data.clone(),
        parts.clone(),
        match rollout_plan {
            Some(_) => config.prompt_plan(all_devices),
            None => config.window_plan(all_devices),
        },
        state.step / updates,
        config.dataloader_num_workers,
    )
    .up_to(total_steps.div_ceil(updates))
    .with_trace(options.trace.clone())
    .shared(share)
    .with_patience((all_devices > 1).then(|| config.patience()));
    // A batch of several data sets would belong to none in their own losses.
    let valid_loaders: Vec<(String, WindowLoader)> = validation
        .iter()
        .flat_map(Dataset::split_by_name)
        .map(|(label, data)| {
            let plan = config.validation_plan();
            let loader = WindowLoader::new(data, parts.clone(), plan, 0, 1);
            (label, loader.dealt(share))
        })
        .collect();
    let scorer = match &validation {
        Some(data) if config.eval_generate > 0 => Some(scorer(&config, &parts, data)),
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
            "`{}` is later than the step the run continues from; it was renamed to `{}`",
            from.display(),
            to.display()
        ));
    }
    write_config(&config)?;
    let reference = match start {
        Some((dir, base)) => Reference::kept(base, &dir, run, resumed.is_some())?,
        None => Reference::base(),
    };
    let rollouts = rollout_plan
        .map(|plan| {
            let (reference, count) = (reference.clone(), devices.len());
            let tell = options.tell.clone();
            Rollouts::new(&config, plan, &data, &parts, reference, count, tell)
        })
        .transpose()?;
    // A run that continues in another folder has none there yet.
    if resumed.is_none() || !config.output_dir.join("run.json").exists() {
        let mut hashes = BTreeMap::from([("train", data.fingerprint().to_string())]);
        if let Some(data) = &validation {
            hashes.insert("val", data.fingerprint().to_string());
        }
        hashes.insert("images", facts.images.digest());
        hashes.insert("base", facts.base);
        write_run_facts(&config, &hashes, quantization, &data_facts)?;
    }
    facts.images.save(run, image_facts::TRAINING)?;
    if validation.is_some() {
        facts.val_images.save(run, image_facts::VALIDATION)?;
    }
    let metrics_path = config.output_dir.join(METRICS);
    let metrics = match &resumed {
        Some((dir, _)) => {
            let copy = dir.join(METRICS);
            let (log, summary) = MetricsLog::resume(&metrics_path, state.step as u64, &copy)?;
            if let Some(warning) = summary.warning(&metrics_path, &copy) {
                (options.tell)(&warning);
            }
            log
        }
        None => MetricsLog::create(&metrics_path)?,
    };
    let resumed_step = resumed.as_ref().map(|_| state.step as u64);
    let reports_to = |reporter| config.report_to.contains(&reporter);
    let events = reports_to(Reporter::Tensorboard)
        .then(|| EventWriter::create(&config.output_dir.join("tensorboard"), resumed_step))
        .transpose()?;
    let report = reports_to(Reporter::Command)
        .then(|| {
            let start = Start {
                run: &config.output_dir,
                config: serde_json::json!(config),
                step: state.step,
                total_steps,
                resumed: resumed.is_some(),
            };
            ReportCommand::start(&config.report_command, &start, options.tell.clone())
        })
        .transpose()?;

    let schedule = ScheduleStepper::new(config.schedule(total_steps), state.step as u64);
    let loss_scale = LossScale::of(dtype, state.loss_scale);
    if let Some(loss_scale) = &loss_scale {
        (options.tell)(&format!(
            "weights in f16: the loss is scaled by {} at first; a step whose gradients leave the range is left out",
            loss_scale.factor()
        ));
    }
    let settings = Arc::new(StepSettings {
        config: model_config.clone(),
        train: config.clone(),
        loss_scale: loss_scale.clone(),
        reference,
    });
    let learner: Learner<Components<B>> =
        Learner::new(Trainee::new(model, settings), optimizer.clone(), schedule);
    let steps = RunSteps {
        before: state.step,
        total: total_steps,
        an_epoch: config.steps_per_epoch(data.len(), all_devices),
    };
    keep_part_of_epoch(&config.output_dir, &steps)?;
    let strategy = Arc::new(WindowStrategy::new(LoopState {
        state: state.clone(),
        model_config,
        lora,
        loader: loader.clone(),
        validation: valid_loaders.clone(),
        scorer,
        rollouts,
        queue: VecDeque::new(),
        rollout_rows: BTreeMap::new(),
        optimizer,
        loss_scale,
        devices,
        cluster,
        writes,
        checkpoints: checkpoints.clone(),
        metrics,
        events,
        report,
        output_dir: config.output_dir.clone(),
        total_steps,
        steps,
        logged_epoch: 1,
        lines: StepLines::new(config.logging_steps, state.step, total_steps),
        good_steps: state.step.saturating_sub(1),
        memory: MemoryWatch::default(),
        interrupted: options.interrupted,
        trace: options.trace,
        tell: options.tell,
    }));
    let train_loader = Arc::new(loader.clone());
    // Without a validation set the Learner still wants a loader; it is never used.
    let valid_loader = valid_loaders.into_iter().next().map(|(_, loader)| loader);
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
    if config.objective != Objective::Sft {
        training = training.metric_train_numeric(Gauge::entropy());
    }
    if config.objective == Objective::Dpo {
        training = training.metric_train_numeric(Gauge::margin());
    }
    if config.objective == Objective::Grpo {
        training = training
            .metric_train_numeric(Gauge::reward())
            .metric_train_numeric(Gauge::divergence());
    }
    if let Some(renderer) = options.renderer {
        training = training.renderer(RunRenderer::new(renderer, steps));
    }
    let result = training.launch(learner);
    let model = result.model.model;
    drop(result.renderer);
    let Outcome {
        ending,
        state,
        reported,
    } = strategy.take_outcome().unwrap_or_else(|| {
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
        data,
        validation,
        checkpoint,
        reported,
    })
}

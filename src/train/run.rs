//! A whole run: data, model, Learner, strategy; fresh or continued.

mod files;
mod model;

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::Arc,
};

use burn::{
    prelude::*,
    tensor::DType,
    train::{Learner, SupervisedTraining, TrainingStrategy},
};

use super::{
    checkpoint::{TrainerState, dtype_text, restore_optimizer, trained_params},
    checkpoint_dir::{CheckpointDir, RunLock},
    config::TrainConfig,
    data::RunData,
    gauges::Gauge,
    generation::GenerationScorer,
    image_facts,
    learner::{ScheduleStepper, StepSettings, Trainee},
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
    renderers::{RunRenderer, RunSteps},
    report_command::Reported,
    resume::{RunFacts, find_checkpoint},
    strategy::{Components, LoopState, WindowStrategy},
    words::{counted, last_checkpoint},
};
use crate::{
    adapters::lora::base::check_base,
    dataset::{
        DataFacts, Dataset,
        loader::{Share, WindowLoader},
    },
    ops::memory::MemoryWatch,
    qwen3_vl::{Qwen3Vl, weights::LoadProgress},
    runtime::{
        accelerator::TrainAccelerator,
        pipeline::{PipelineOptions, TextAndImages, load_model},
    },
};
use files::{Writers, keep_part_of_epoch, write_config, write_run_facts};
use model::{prepare_model, random_model, restore_model};

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
    let state = match &resumed {
        None => TrainerState {
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
        },
        Some((_, state)) => TrainerState {
            config: config.clone(),
            images: Some(facts.images.digest()),
            base: Some(facts.base.clone()),
            trained_on: facts.trained_on.clone(),
            ..state.clone()
        },
    };
    let (model, lora) = match &resumed {
        None => prepare_model(base, &config, &*options.tell)?,
        Some((dir, _)) => restore_model(base, &config, dir, &*options.tell)?,
    };
    if let Some((dir, _)) = &resumed {
        restore_optimizer(dir, &model, &optimizer, state.step, &device)?;
    }
    if needs_reference && !lora.modules_to_save.is_empty() {
        return Err(TrainError::Other(format!(
            "modules_to_save {:?} are trained whole, and an objective that measures from a reference is the model without its adapter; leave them out, or set beta = 0 with objective \"grpo\"",
            lora.modules_to_save
        )));
    }
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
    let writers = Writers::open(
        &config,
        resumed.as_ref().map(|(dir, _)| dir.as_path()),
        state.step,
        total_steps,
        options.tell.clone(),
    )?;

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
        metrics: writers.metrics,
        events: writers.events,
        report: writers.report,
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

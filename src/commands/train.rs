//! `train`: one run from a config file, on one device or several.

use crate::kernels::Kernels;
use std::{
    io::{IsTerminal, stderr, stdout},
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Context, Result, bail};
use burn::{
    backend::Autodiff,
    tensor::DType,
    train::{
        Interrupter,
        renderer::{MetricsRenderer, tui::TuiMetricsRendererWrapper},
    },
};

use super::{
    UsageError,
    progress::{Progress, Unit},
    shipped,
};
use crate::{
    backend::{DeviceName, DtypeName, Replicas, ReplicatedTask, run_on_all},
    cli::TrainArgs,
    dataset::Dataset,
    evaluate::{rouge::rouge_l, segment::characters},
    files::{FileError, write_atomic},
    findings::{
        Labeler,
        score::{StudyTexts, UncertainPolicy, score},
    },
    generate::{GenerationConfig, generate},
    lora::merge::merge,
    phantom::{finding_f1, findings_in_report},
    pipeline::{PipelineOptions, TextAndImages},
    processor::message::split_thinking,
    qwen3_vl::Qwen3Vl,
    system::free_memory,
    train::{
        budget::{Budget, Form},
        config::TrainConfig,
        data::RunData,
        run::{QuietRenderer, Resume, RunOptions, RunResult, train},
        strategy::{Ending, Generated, GenerationScorer, TrainError},
        trace::Trace,
    },
};

/// The run without arguments.
const DEFAULT_CONFIG: &str = "configs/tiny.toml";

/// Runs `train`.
///
/// # Errors
/// Anything that kept the run from reaching its end; an interruption that was saved is none.
pub fn run(args: TrainArgs) -> Result<()> {
    let mut config = load_config(&args)?;
    validate_on_own_data(&args, &mut config);
    config.model = shipped(&config.model);
    for data in [Some(&mut config.train_data), config.val_data.as_mut()]
        .into_iter()
        .flatten()
    {
        if !data.starts_with("phantom:") {
            *data = shipped(Path::new(data.as_str())).display().to_string();
        }
    }
    let resume = match args.resume.as_deref() {
        None => Resume::No,
        Some("auto") => Resume::Auto,
        Some(dir) => Resume::From(dir.into()),
    };
    let names_folder = args
        .set
        .iter()
        .any(|pair| pair.trim_start().starts_with("output_dir"));
    if args.output_dir.is_none() && args.config.is_none() && !names_folder && resume == Resume::No {
        config.output_dir = free_folder(&config.output_dir);
    }
    config
        .validate()
        .map_err(|error| UsageError(error.to_string()))?;
    let names = config
        .device
        .iter()
        .map(|name| name.parse::<DeviceName>())
        .collect::<Result<Vec<_>, _>>()
        .map_err(UsageError)?;
    let dtype = match config.dtype.as_deref() {
        None => None,
        Some(name) => Some(DType::from(
            <DtypeName as clap::ValueEnum>::from_str(name, true)
                .map_err(|_| UsageError(format!("dtype `{name}`: expected bf16, f16 or f32")))?,
        )),
    };
    run_on_all(
        &names,
        dtype,
        Train {
            args,
            config,
            resume,
        },
    )?
}

fn load_config(args: &TrainArgs) -> Result<TrainConfig> {
    let path = args
        .config
        .clone()
        .unwrap_or_else(|| shipped(Path::new(DEFAULT_CONFIG)));
    let config = TrainConfig::from_file(&path).map_err(anyhow::Error::from)?;
    let mut table = toml::Table::try_from(&config).context("cannot read the settings back")?;
    let mut set = |key: &str, value: toml::Value| {
        table.insert(key.to_string(), value);
    };
    let text = |path: &PathBuf| toml::Value::String(path.display().to_string());
    if let Some(path) = &args.model {
        set("model", text(path));
    }
    if let Some(path) = &args.adapter {
        set("adapter", text(path));
    }
    if let Some(data) = &args.train_data {
        set("train_data", data.clone().into());
    }
    if let Some(data) = &args.val_data {
        set("val_data", data.clone().into());
    }
    if let Some(path) = &args.output_dir {
        set("output_dir", text(path));
    }
    if !args.device.is_empty() {
        set("device", args.device.clone().into());
    }
    if let Some(dtype) = args.dtype {
        let name = clap::ValueEnum::to_possible_value(&dtype);
        set(
            "dtype",
            name.map_or_else(String::new, |name| name.get_name().to_string())
                .into(),
        );
    }
    if let Some(seed) = args.seed {
        set("seed", (seed as i64).into());
    }
    if let Some(generate) = args.eval_generate {
        set("eval_generate", (generate as i64).into());
    }
    if let Some(reduction) = args.loss_reduction {
        let name = clap::ValueEnum::to_possible_value(&reduction);
        set(
            "loss_reduction",
            name.map_or_else(String::new, |name| name.get_name().to_string())
                .into(),
        );
    }
    if args.packing || args.packing_tokens.is_some() {
        set("packing", true.into());
    }
    if let Some(tokens) = args.packing_tokens {
        set("packing_tokens", (tokens as i64).into());
    }
    if args.deterministic {
        set("deterministic", true.into());
    }
    set_keys(&mut table, &args.set)?;
    from_table(table)
}

/// Share held out where a run is given training data of its own and no validation data.
const HELD_OUT: f64 = 0.05;

/// Drawings say nothing about films: a run that is given films to learn from does not validate on the drawings of
/// its config, but on studies held out of them.
fn validate_on_own_data(args: &TrainArgs, config: &mut TrainConfig) {
    let sample = Path::new("data/sample");
    let is_drawn = |name: &str| {
        let path = Path::new(name);
        let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
        name.starts_with("phantom:")
            || path.starts_with(sample)
            || path.starts_with(repository.join(sample))
    };
    let is_set = |key: &str| {
        let mut pairs = args.set.iter().filter_map(|pair| pair.split_once('='));
        pairs.any(|(name, _)| name.trim() == key)
    };
    let own = (args.train_data.is_some() || is_set("train_data")) && !is_drawn(&config.train_data);
    let asked = args.val_data.is_some() || is_set("val_data");
    if !own || asked || !config.val_data.as_deref().is_some_and(is_drawn) {
        return;
    }
    config.val_data = None;
    if !is_set("split_dataset_ratio") {
        config.split_dataset_ratio = HELD_OUT;
    }
}

/// Samples whose lengths stand for all when a form of the step is chosen.
const MEASURED_SAMPLES: usize = 32;

/// Chooses the form of the step that fits the budget, and tells it in a line.
fn fit_budget<B: Kernels>(
    config: &mut TrainConfig,
    budget: Budget,
    resume: &Resume,
    device: &B::Device,
    dtype: DType,
) -> Result<String> {
    let free = free_memory::<B>(device);
    let gib = budget.gib(free).map_err(UsageError)?;
    config.memory_budget = Some(gib);
    let [min_pixels, max_pixels] = config.pixel_limits();
    let parts = TextAndImages::load(&PipelineOptions {
        model: config.model.clone(),
        adapter: None,
        dtype,
        quantize: None,
        min_pixels: Some(min_pixels),
        max_pixels: Some(max_pixels),
    })?;
    let data = Dataset::open(&config.train_data)?;
    // A sample that cannot be read is named when its turn comes.
    let longest = (0..data.len())
        .step_by(data.len().div_ceil(MEASURED_SAMPLES).max(1))
        .filter_map(|row| data.encode(row, &parts, config.max_length).ok())
        .map(|sample| sample.input_ids.len())
        .max()
        .unwrap_or(config.max_length);
    // What a run has begun with decides its dropout masks, and is kept.
    let begun = match resume {
        Resume::No => None,
        Resume::Auto => Some(config.output_dir.clone()),
        Resume::From(checkpoint) => checkpoint.parent().map(Path::to_path_buf),
    };
    let begun = begun.and_then(|run| TrainConfig::from_file(&run.join("config.toml")).ok());
    let rows = begun.map(|begun| begun.row_tokens().unwrap_or(0));
    let bytes = dtype.size() as u64;
    let form = Form::choose(config, &parts.config, longest, bytes, gib, rows)?;
    form.apply(config);
    Ok(form.explain(gib, longest))
}

/// A config with single keys replaced by `KEY=VALUE` pairs.
pub(super) fn with_keys(config: &TrainConfig, pairs: &[String]) -> Result<TrainConfig> {
    let mut table = toml::Table::try_from(config).context("cannot read the settings back")?;
    set_keys(&mut table, pairs)?;
    from_table(table)
}

fn from_table(table: toml::Table) -> Result<TrainConfig> {
    table.try_into().map_err(|error: toml::de::Error| {
        UsageError(error.to_string().trim().replace('\n', " ")).into()
    })
}

fn set_keys(table: &mut toml::Table, pairs: &[String]) -> Result<()> {
    for pair in pairs {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| UsageError(format!("--set `{pair}`: expected KEY=VALUE")))?;
        let (key, value) = (key.trim(), value.trim());
        // A bare word is a string.
        let parsed = format!("v = {value}")
            .parse::<toml::Table>()
            .ok()
            .and_then(|mut table| table.remove("v"))
            .unwrap_or_else(|| value.into());
        // A whole number where a fraction is meant.
        let parsed = match (table.get(key), parsed) {
            (Some(toml::Value::Float(_)), toml::Value::Integer(whole)) => (whole as f64).into(),
            (_, parsed) => parsed,
        };
        table.insert(key.to_string(), parsed);
    }
    Ok(())
}

/// The folder itself, or the first of `NAME-2`, `NAME-3` … that is free.
fn free_folder(folder: &Path) -> PathBuf {
    (1..)
        .map(|number| match number {
            1 => folder.to_path_buf(),
            number => PathBuf::from(format!("{}-{number}", folder.display())),
        })
        .find(|folder| !folder.exists())
        .unwrap_or_else(|| folder.to_path_buf())
}

struct Train {
    args: TrainArgs,
    config: TrainConfig,
    resume: Resume,
}

impl ReplicatedTask for Train {
    type Output = Result<()>;

    fn needs_range(&self) -> bool {
        // Gradients are not scaled, and small ones would vanish.
        true
    }

    fn run<B: Kernels>(mut self, replicas: Replicas<B>) -> Result<()> {
        let Replicas { devices, dtype } = replicas;
        // What was chosen for the user is written down as if it had been asked for.
        self.config.dtype = Some(dtype_flag(dtype).to_string());
        let device = devices[0].clone();
        let budget = self.args.memory_budget;
        if let Some(budget) = budget.or(self.config.memory_budget.map(Budget::Gib)) {
            let (config, resume) = (&mut self.config, &self.resume);
            eprintln!(
                "{}",
                fit_budget::<B>(config, budget, resume, &device, dtype)?
            );
        }
        let dashboard = !self.args.no_tui && stdout().is_terminal() && stderr().is_terminal();
        let interrupter = Interrupter::new();
        let trace = Trace::new(self.args.trace.is_some());
        let renderer: Box<dyn MetricsRenderer> = if dashboard {
            Box::new(TuiMetricsRendererWrapper::new(interrupter.clone(), None))
        } else {
            Box::new(QuietRenderer)
        };
        let mut progress = (!dashboard).then(|| Progress::new("loading", 0, Unit::Bytes));
        let output_dir = self.config.output_dir.clone();
        let kept: Arc<Mutex<Vec<String>>> = Arc::default();
        let options = RunOptions {
            config: self.config,
            resume: self.resume,
            random_init: self.args.random_init,
            renderer: Some(renderer),
            interrupter,
            interrupted: watch_signals()?,
            trace: trace.clone(),
            tell: Arc::new({
                let kept = kept.clone();
                move |line: &str| {
                    if !dashboard {
                        eprintln!("{line}");
                    } else if !line.starts_with("step ") {
                        // The dashboard owns the screen; what it does not show is told afterwards.
                        kept.lock()
                            .unwrap_or_else(|lock| lock.into_inner())
                            .push(line.to_string());
                    }
                }
            }),
        };
        let started = std::time::Instant::now();
        let trace_file = self.args.trace.take();
        let result: Result<RunResult<B>, TrainError> = train::<Autodiff<B>>(
            options,
            devices,
            dtype,
            |config, parts, data| scorer::<B>(config, parts, data),
            &mut |done, total| {
                if let Some(progress) = &mut progress {
                    progress.set(done, total);
                }
            },
        );
        for line in kept
            .lock()
            .unwrap_or_else(|lock| lock.into_inner())
            .drain(..)
        {
            eprintln!("{line}");
        }
        let written = trace_file.as_ref().map_or(Ok(()), |path| trace.write(path));
        let result = result?;
        written?;
        eprintln!("{}", trace.summary());
        if let Some(progress) = progress {
            progress.finish();
        }
        let seconds = started.elapsed().as_secs_f64();
        let how = match result.ending {
            Ending::Done => "done".to_string(),
            Ending::EarlyStop => "ended early: the validation stopped getting better".to_string(),
            Ending::Interrupted => format!(
                "interrupted and saved; `--resume auto --output-dir {}` goes on",
                output_dir.display()
            ),
        };
        println!(
            "{how}: {} steps in {seconds:.0} s; checkpoint `{}`, curves `{}`",
            result.state.step,
            result.checkpoint.display(),
            output_dir.join("training.svg").display()
        );
        if result.ending == Ending::Interrupted {
            return Ok(());
        }
        if self.args.show > 0 && result.state.config.validates() {
            show_examples(&result, self.args.show, &device)?;
        }
        println!();
        match result.state.config.tuner {
            crate::train::config::Tuner::Lora => println!(
                "next: infer --model {} --adapter {} IMAGE",
                result.state.config.model.display(),
                result.checkpoint.display()
            ),
            crate::train::config::Tuner::Full => {
                println!("next: infer --model {} IMAGE", result.checkpoint.display());
            }
        }
        println!(
            "with the real model: put Qwen3-VL-8B-Instruct under model/, your data through `convert` and `check`, then train --config configs/openi-lora.toml"
        );
        Ok(())
    }
}

/// A type as `--dtype` spells it.
fn dtype_flag(dtype: DType) -> &'static str {
    match dtype {
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        _ => "f32",
    }
}

/// Turns the first SIGINT or SIGTERM into a wish to stop; a second one ends the process at once.
fn watch_signals() -> Result<Arc<AtomicBool>> {
    use signal_hook::{
        consts::{SIGINT, SIGTERM},
        iterator::Signals,
    };
    let flag = Arc::new(AtomicBool::new(false));
    let seen = flag.clone();
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch for signals")?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if seen.swap(true, Ordering::Relaxed) {
                std::process::exit(128 + signal);
            }
            eprintln!("stopping after this step and saving; once more to stop at once");
        }
    });
    Ok(flag)
}

/// Generates reports for some samples of a data set.
fn generate_reports<B: Kernels>(
    model: &Qwen3Vl<B>,
    parts: &TextAndImages,
    data: &Dataset,
    rows: Range<usize>,
    max_new_tokens: usize,
    device: &B::Device,
) -> Result<Vec<Generated>, TrainError> {
    let settings = GenerationConfig {
        max_new_tokens,
        eos_token_ids: parts.eos_token_ids.clone(),
        ..GenerationConfig::default()
    };
    let (prompts, truths): (Vec<_>, Vec<_>) = rows
        .map(|row| data.question(row, parts))
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .unzip();
    let (generations, _) = generate(
        model,
        &parts.config,
        &prompts,
        &settings,
        device,
        &mut |_, _| None,
    )
    .map_err(|error| TrainError::Other(error.to_string()))?;
    let mut all = Vec::with_capacity(generations.len());
    for (generation, truth) in generations.into_iter().zip(truths) {
        let text = parts
            .tokenizer
            .decode(&generation.token_ids, true)
            .map_err(|error| TrainError::Other(error.to_string()))?;
        let (thinking, report) = split_thinking(&text, parts.template.opens_thinking());
        all.push(Generated {
            truth: split_thinking(&truth, false).1,
            thinking,
            report,
        });
    }
    Ok(all)
}

/// The first `count` samples of a data set, some at a time.
fn batches(data: &Dataset, count: usize, batch_size: usize) -> Vec<Range<usize>> {
    let count = count.min(data.len());
    (0..count)
        .step_by(batch_size)
        .map(|from| from..(from + batch_size).min(count))
        .collect()
}

/// Mean character ROUGE-L F1 and finding F1 of some reports.
fn scores(reports: &[Generated]) -> Vec<(&'static str, f64)> {
    let rouge: f64 = reports
        .iter()
        .map(|one| rouge_l(&characters(&one.report), &characters(&one.truth)))
        .sum::<f64>()
        / reports.len().max(1) as f64;
    let texts: Vec<StudyTexts<'_>> = reports
        .iter()
        .map(|one| StudyTexts {
            truth: &one.truth,
            prediction: &one.report,
            thinking: one.thinking.as_deref(),
        })
        .collect();
    let findings = score(Labeler::built_in(), &texts, UncertainPolicy::AsPresent);
    vec![
        ("eval_rouge_l", rouge),
        ("eval_finding_f1", findings.micro.f1),
    ]
}

fn scorer<B: Kernels>(
    config: &TrainConfig,
    parts: &Arc<TextAndImages>,
    data: &Dataset,
) -> GenerationScorer<B> {
    let (parts, data, tokens) = (parts.clone(), data.clone(), config.eval_max_new_tokens);
    let batches = batches(
        &data,
        config.eval_generate,
        config.per_device_eval_batch_size,
    );
    let folder = config.output_dir.join("generated");
    let count = batches.len();
    let generate = move |model: &Qwen3Vl<B>, device: &B::Device, batch: usize| {
        generate_reports(model, &parts, &data, batches[batch].clone(), tokens, device)
    };
    let score = move |reports: Vec<Generated>, step| {
        std::fs::create_dir_all(&folder).map_err(|cause| FileError::write(&folder, cause))?;
        write_atomic(&folder.join(format!("step-{step}.jsonl")), |out| {
            for one in &reports {
                serde_json::to_writer(
                    &mut *out,
                    &serde_json::json!({
                        "truth": one.truth,
                        "report": one.report,
                        "thinking": one.thinking,
                    }),
                )?;
                out.write_all(b"\n")?;
            }
            Ok(())
        })?;
        Ok(scores(&reports))
    };
    GenerationScorer {
        batches: count,
        generate: Arc::new(generate),
        score: Box::new(score),
    }
}

/// Prints truth beside answer for held-out samples.
fn show_examples<B: Kernels>(
    result: &RunResult<B>,
    count: usize,
    device: &B::Device,
) -> Result<()> {
    let config = &result.state.config;
    let Some(data) = RunData::open(config)?.validation else {
        return Ok(());
    };
    let name = data.name();
    let model = merge(result.model.clone());
    let mut all = Vec::new();
    for rows in batches(
        &data,
        count.max(config.eval_generate),
        config.per_device_eval_batch_size,
    ) {
        all.extend(generate_reports(
            &model,
            &result.parts,
            &data,
            rows,
            config.eval_max_new_tokens,
            device,
        )?);
    }
    if all.is_empty() {
        bail!("`{name}` holds no sample to show");
    }
    for (index, one) in all.iter().take(count).enumerate() {
        println!("\nheld-out study {}", index + 1);
        println!("  truth   {}", one.truth);
        println!("  answer  {}", one.report);
    }
    println!();
    for (name, value) in scores(&all) {
        println!("{name} {value:.3} over {} held-out studies", all.len());
    }
    if name.starts_with("phantom:") || name.contains("data/sample") {
        let labels: Vec<_> = all
            .iter()
            .map(|one| {
                (
                    findings_in_report(&one.truth),
                    findings_in_report(&one.report),
                )
            })
            .collect();
        let exact = finding_f1(labels.iter().map(|(truth, stated)| (truth, stated)));
        println!("finding F1 with side and zone {:.3}", exact.f1());
    }
    Ok(())
}

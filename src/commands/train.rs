//! `train`: one run from a config file, on one device or several.

mod args;
mod ending;
mod reports;
pub(super) mod settings;
mod signals;
mod typed;

use std::{
    io::{IsTerminal, Write as _, stderr, stdout},
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use anyhow::{Result, bail};
use burn::{
    backend::Autodiff,
    tensor::DType,
    train::{
        Interrupter,
        renderer::{MetricsRenderer, tui::TuiMetricsRendererWrapper},
    },
};

use super::{
    cluster_args::visible_cards,
    models::find,
    pipeline_options::base_of_run,
    progress::{Progress, Unit, show_fetching},
    shared_args::found_adapter,
    shipped::shipped_data,
    usage::UsageError,
};
use crate::{
    accelerate::devices::{Replicas, ReplicatedTask, built_backends, has_cuda, run_on_all},
    base::{
        device_name::{DeviceName, DtypeName},
        hub::Want,
        trace::Trace,
    },
    cluster::{Cluster, Launch},
    dataset::Dataset,
    ops::memory::free_memory,
    runtime::{accelerator::Accelerator, pipeline::TextAndImages},
    train::{
        budget::{Budget, StepForm},
        config::TrainConfig,
        options::{Resume, RunOptions},
        outcome::{Ending, TrainError},
        run::{Dashboard, QuietRenderer, RunResult, train},
        words::counted,
    },
};
pub use args::TrainArgs;
use ending::{print_end, print_reports, resume_command};
use reports::{HeldOutScores, scorer};
pub use settings::flag_hint;
use signals::watch_signals;
use typed::{free_folder, load_config, validate_on_own_data};

/// Runs `train`.
///
/// # Errors
/// Anything that kept the run from reaching its end; an interruption that was saved is none.
pub fn run(args: TrainArgs) -> Result<()> {
    let mut config = load_config(&args)?;
    validate_on_own_data(&args, &mut config);
    let want = match args.random_init {
        true => Want::Description,
        false => Want::Checkpoint,
    };
    config.model = find(&config.model, want, args.download)?;
    if let Some(adapter) = &mut config.adapter {
        *adapter = found_adapter(&find(adapter, Want::Adapter, args.download)?);
    }
    for data in [Some(&mut config.train_data), config.val_data.as_mut()]
        .into_iter()
        .flatten()
    {
        *data = shipped_data(data);
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
    let launch = args.cluster.launch()?;
    if let Some(launch) = &launch {
        config.device = launch
            .devices(&config.device, visible_cards().as_deref(), has_cuda())
            .map_err(|error| UsageError(error.to_string()))?;
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
            launch,
        },
    )?
}

/// Samples whose lengths are taken for those of all when the form of a step is chosen.
const MEASURED_SAMPLES: usize = 32;

/// Chooses the form of the step that fits the budget, and describes it in a line.
fn fit_budget<B: Accelerator>(
    config: &mut TrainConfig,
    budget: Budget,
    resume: &Resume,
    device: &B::Device,
    dtype: DType,
) -> Result<String> {
    let free = free_memory::<B>(device);
    let gib = budget.gib(free).map_err(UsageError)?;
    config.memory_budget = Some(gib);
    let parts = TextAndImages::load(&base_of_run(config, config.model.clone(), dtype))?;
    let data = Dataset::open_with(&config.train_data, &config.data_options())?;
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
    let weights = (bytes, config.quantization(&config.model)?);
    let longest = config.longest_as_learnt(longest);
    let form = StepForm::choose(config, &parts.config, longest, weights, gib, rows)?;
    form.apply(config);
    Ok(form.explain(gib, longest))
}

struct Train {
    args: TrainArgs,
    config: TrainConfig,
    resume: Resume,
    /// Which process this is of several.
    launch: Option<Launch>,
}

impl ReplicatedTask for Train {
    type Output = Result<()>;

    fn needs_range(&self) -> bool {
        // Gradients are not scaled, and small ones would vanish.
        true
    }

    fn run<B: Accelerator>(mut self, replicas: Replicas<B>) -> Result<()> {
        let Replicas { devices, dtype } = replicas;
        let device = devices[0].clone();
        self.adapt_config::<B>(&device, dtype)?;
        let again = resume_command(&self.config, self.args.random_init);
        let cluster = self.meet(devices.len())?;
        // What a process that does not lead prints is prefixed with its name.
        let follower = cluster
            .as_ref()
            .filter(|cluster| !cluster.is_first())
            .map(|cluster| cluster.name(cluster.rank()));
        let dashboard = follower.is_none()
            && !self.args.no_tui
            && stdout().is_terminal()
            && stderr().is_terminal();
        let interrupter = Interrupter::new();
        let trace = Trace::new(self.args.trace.is_some());
        let killed = Arc::new(AtomicBool::new(false));
        let renderer: Box<dyn MetricsRenderer> = if dashboard {
            let tui = TuiMetricsRendererWrapper::new(interrupter.clone(), None);
            Box::new(Dashboard::new(Box::new(tui), killed.clone()))
        } else {
            Box::new(QuietRenderer)
        };
        let mut progress =
            (!dashboard && follower.is_none()).then(|| Progress::new("loading", 0, Unit::Bytes));
        let for_later: Arc<Mutex<Vec<String>>> = Arc::default();
        let options = RunOptions {
            fetching: Some(show_fetching),
            config: self.config,
            resume: self.resume,
            random_init: self.args.random_init,
            cluster: cluster.clone(),
            renderer: Some(renderer),
            interrupter,
            interrupted: watch_signals()?,
            trace: trace.clone(),
            tell: Arc::new({
                let (for_later, follower) = (for_later.clone(), follower.clone());
                move |line: &str| {
                    if let Some(name) = &follower {
                        // The first process prints the progress of all.
                        if !["step ", "validation at "]
                            .iter()
                            .any(|start| line.starts_with(start))
                        {
                            say(&format!("{name}: {line}"));
                        }
                    } else if !dashboard {
                        say(line);
                    } else if !line.starts_with("step ") {
                        // The dashboard owns the screen; what it does not show is printed afterwards.
                        for_later
                            .lock()
                            .unwrap_or_else(|lock| lock.into_inner())
                            .push(line.to_string());
                    }
                }
            }),
        };
        let started = std::time::Instant::now();
        let trace_file = self.args.trace.take();
        let result = catch_unwind(AssertUnwindSafe(|| {
            train::<Autodiff<B>>(
                options,
                devices,
                dtype,
                |config, parts, data| scorer::<B>(config, parts, data),
                &mut |done, total| {
                    if let Some(progress) = &mut progress {
                        progress.set(done, total);
                    }
                },
            )
        }));
        let result: Result<RunResult<B>, TrainError> = match result {
            Ok(result) => result,
            // Burn's dashboard ends a run at once by a panic in another thread.
            Err(_) if killed.load(Ordering::SeqCst) => {
                bail!(
                    "ended at once from the dashboard, without saving; continue from the last checkpoint, if there is one, with: {again}"
                )
            }
            Err(payload) => resume_unwind(payload),
        };
        for line in for_later
            .lock()
            .unwrap_or_else(|lock| lock.into_inner())
            .drain(..)
        {
            say(&line);
        }
        let written = trace_file.as_ref().map_or(Ok(()), |path| trace.write(path));
        let result = result?;
        written?;
        if let (Some(name), Some(cluster)) = (&follower, &cluster) {
            say(&format!(
                "{name}: {} after {}; {} has written the results",
                result.ending.name(),
                counted(result.state.step, "step", "steps"),
                cluster.name(0)
            ));
            return Ok(());
        }
        say(&trace.summary());
        if let Some(progress) = progress {
            progress.finish();
        }
        let seconds = started.elapsed().as_secs_f64();
        print_end(&result, seconds, &again);
        if result.ending == Ending::Interrupted {
            return HeldOutScores::default().save(&result, seconds);
        }
        print_reports(&result, &self.args, seconds, &device)
    }
}

impl Train {
    /// Meets the other processes of the run, where it has several.
    fn meet(&mut self, devices: usize) -> Result<Option<Arc<Cluster>>> {
        let Some(launch) = self.launch.take() else {
            return Ok(None);
        };
        let mut names = self.config.device.clone();
        names.resize(devices, "the best device".into());
        let patience = self.config.patience();
        self.args.cluster.meet(launch, names, patience).map(Some)
    }

    /// Writes down the dtype, and the form of the step that fits the budget where there is one.
    fn adapt_config<B: Accelerator>(&mut self, device: &B::Device, dtype: DType) -> Result<()> {
        // What was chosen for the user is written down like what was typed.
        self.config.dtype = Some(dtype_flag(dtype).to_string());
        let budget = self.args.memory_budget;
        if let Some(budget) = budget.or(self.config.memory_budget.map(Budget::Gib)) {
            let (config, resume) = (&mut self.config, &self.resume);
            eprintln!(
                "{}",
                fit_budget::<B>(config, budget, resume, device, dtype)?
            );
        }
        if dtype != DType::F32 && on_cpu(&self.config.device) {
            say(&format!(
                "note: {} on the CPU is slower than f32, about a third of its speed, and no more exact; `--dtype f32` takes twice the memory for the weights",
                dtype_flag(dtype)
            ));
        }
        Ok(())
    }
}

/// Writes a line to stdout, whether or not anybody is there to read it: files are still to be written.
fn print_line(line: &str) {
    let _ = writeln!(stdout(), "{line}");
}

/// Writes a line to stderr, whether or not anybody is there to read it.
fn say(line: &str) {
    let _ = writeln!(stderr(), "{line}");
}

/// Whether a run's first device is the CPU.
fn on_cpu(devices: &[String]) -> bool {
    match devices.first() {
        Some(name) => name.parse() == Ok(DeviceName::Cpu),
        None => built_backends() == ["cpu"],
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

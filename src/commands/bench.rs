//! `bench`: how fast the model is here, and how far from what the hardware allows.

use std::{
    env,
    ffi::OsString,
    fs,
    io::Write,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    process,
};

use anyhow::{Context, Result, bail};
use burn::{backend::Autodiff, tensor::DType};
use clap::{Args, Subcommand, ValueEnum};

use super::{
    bench_scale::{self, BenchScaleArgs},
    bench_serve::{self, BenchServeArgs},
    models::{DownloadArgs, find},
    progress::{Progress, Unit, loading, prepare_kernels},
    usage::UsageError,
};
use crate::{
    accelerate::devices::{Replicas, ReplicatedTask, built_backends, run_on_all},
    adapters::quantised::files::of_checkpoint,
    base::{
        device_name::{DeviceName, DtypeName},
        files::write_atomic,
        hub::Want,
        trace::Trace,
    },
    bench::{
        Bench, BenchError, Source,
        device::measure_ceilings,
        drafts::ForcedDrafts,
        operations::environment,
        report::{Record, table},
        train::{STEP_SAMPLES, TrainShape},
    },
    ops::{memory::free_memory, quantised::Quantization},
    qwen3_vl::weights::gguf::GgufParts,
    runtime::{accelerator::Accelerator, synthetic::weights::RandomSize},
    train::budget::Budget,
};

/// Set in the processes that `--table` starts: they print records and nothing else.
const CHILD_VARIABLE: &str = "XRAY_QWEN3VL_BENCH_CHILD";

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchKind {
    /// Reading a checkpoint to the device, or drawing the weights there.
    Load,
    /// The vision tower alone.
    Vision,
    /// Requests up to their first token, vision included.
    Prefill,
    /// 128 tokens after the first.
    Decode,
    /// Whole answers of 129 tokens, batch after batch, as in a batch run.
    Infer,
    /// Optimizer steps of the published LoRA recipe.
    Train,
}

/// `bench KIND …`, `bench serve …` or `bench scale …`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct BenchCommand {
    /// A server.
    #[command(subcommand)]
    pub server: Option<BenchServer>,
    /// The model.
    #[command(flatten)]
    pub model: Option<BenchArgs>,
}

/// What is measured besides the model.
#[derive(Debug, Subcommand)]
pub enum BenchServer {
    /// Send requests to a server from a number of users or at a fixed rate, and report percentiles.
    Serve(BenchServeArgs),
    /// Calculate what several machines would bring to training, from a step measured on one.
    Scale(BenchScaleArgs),
}

/// Arguments of `bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What is measured.
    #[arg(value_enum)]
    pub kind: BenchKind,
    /// Folder or name of a Qwen3-VL checkpoint, as in `infer` [default: model/tiny].
    #[arg(
        long,
        value_name = "DIR|ID|FILE.gguf",
        conflicts_with = "random_weights"
    )]
    pub model: Option<PathBuf>,
    // As below: one argument of a group that is nowhere required.
    /// With a model in GGUF: the file of its vision tower; by default the only mmproj file beside it.
    #[arg(long, value_name = "FILE.gguf", conflicts_with = "random_weights")]
    pub mmproj: Option<PathBuf>,
    // Not flattened: clap takes an optional group with a group in it for absent.
    /// Download the model if it is named by OWNER/NAME and not on this machine.
    #[arg(long)]
    pub download: bool,
    /// A model of this size with random weights drawn on the device; needs no checkpoint.
    #[arg(long, value_enum, value_name = "SIZE")]
    pub random_weights: Option<RandomSize>,
    /// Number of decoder layers of the random model.
    #[arg(long, value_name = "N", requires = "random_weights")]
    pub layers: Option<usize>,
    /// cpu, cuda, cuda:N, wgpu or wgpu:N; the default is the fastest one available. `load`, `infer` and
    /// `train` accept several (cuda:0,cuda:1) and measure the first alone, then all together.
    #[arg(long, value_name = "DEVICE,..", value_delimiter = ',')]
    pub device: Vec<DeviceName>,
    /// Dtype of the weights; the default is bf16 on CUDA, f16 on other GPUs (f32 for `train`) and f32 on the
    /// CPU.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Quantise the weights at load time, or draw them quantised: int8, int4 (groups of 64) or int4:32.
    #[arg(long, value_name = "FORMAT")]
    pub quantize: Option<Quantization>,
    /// Batch sizes, measured one after another [default: 1; decode: 1,8,32; infer: 16]. For `train`, samples
    /// of a micro-batch; a step has 16 samples per device in any case.
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    pub batch: Vec<usize>,
    /// Prompt lengths distributed as in the OpenI-zh corpus, instead of 368 tokens each.
    #[arg(long)]
    pub mixed: bool,
    /// `prefill`, `decode`, `infer`: tokens of every prompt, image included, instead of 368.
    #[arg(long, value_name = "N", conflicts_with = "mixed")]
    pub tokens: Option<usize>,
    /// Side of every image in pixels, instead of 512.
    #[arg(long, value_name = "PIXELS")]
    pub image_size: Option<NonZeroUsize>,
    /// `load`: write the random model there as a checkpoint first, and measure reading it; it is deleted
    /// afterwards. The folder is made if missing.
    #[arg(long, value_name = "DIR", requires = "random_weights")]
    pub checkpoint_in: Option<PathBuf>,
    /// Measured calls [default: 20; load and decode: 3, infer: 2, train: 5 steps].
    #[arg(long, visible_alias = "steps", value_name = "N")]
    pub samples: Option<usize>,
    /// `train`: pack the samples of a micro-batch into one row.
    #[arg(long)]
    pub packing: bool,
    /// `train`: keep all activations instead of recomputing every layer in the backward pass; faster, with
    /// more memory.
    #[arg(long)]
    pub no_recompute: bool,
    /// `train`: recompute only norms, rotary embedding and SwiGLU in the backward pass.
    #[arg(long, conflicts_with = "no_recompute")]
    pub recompute_pointwise: bool,
    /// `train`: choose --batch, --packing and recomputation as a run within this many GiB would.
    #[arg(long, value_name = "auto|GIB", conflicts_with_all = ["batch", "no_recompute", "recompute_pointwise"])]
    pub memory_budget: Option<Budget>,
    /// `train`: record the activity of the host's threads, in Chrome's tracing format.
    #[arg(long, value_name = "FILE.json")]
    pub trace: Option<PathBuf>,
    /// `decode`: also with this many tokens drafted in each step for each row.
    ///
    /// Random weights and a stranger's data say nothing about how many drafts are right, so that is set: the text that the
    /// model wrote without drafts is drafted again, as right as --tokens-per-step says. `drafts --val` counts what a store
    /// brings on reports.
    #[arg(long, value_name = "N")]
    pub drafts: Option<usize>,
    /// With --drafts: tokens that a step gives a row on average; 2.0 is what a store of OpenI's training reports gives on
    /// held-out ones with 4 drafted.
    #[arg(long, value_name = "F", default_value_t = 2.0, requires = "drafts")]
    pub tokens_per_step: f64,
    /// Also list the device's operations with count and time, from a second run that times each one
    /// separately; `cuda` and `wgpu` only.
    #[arg(long)]
    pub table: bool,
    /// Write one JSON object per measurement to this file, or to stdout instead of the table.
    #[arg(long, value_name = "FILE", num_args = 0..=1, default_missing_value = "-")]
    pub json: Option<PathBuf>,
}

/// Runs `bench`.
///
/// # Errors
/// Arguments that do not go together, a model that cannot be loaded, a file that cannot be written.
pub fn run(command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand {
            server: Some(BenchServer::Serve(args)),
            ..
        } => bench_serve::run(&args),
        BenchCommand {
            server: Some(BenchServer::Scale(args)),
            ..
        } => bench_scale::run(&args),
        BenchCommand {
            model: Some(args), ..
        } => bench_model(args),
        BenchCommand { .. } => bail!(UsageError("bench needs the name of what to measure".into())),
    }
}

fn bench_model(mut args: BenchArgs) -> Result<()> {
    check(&args)?;
    if args.random_weights.is_none() {
        let model = args.model.as_deref().unwrap_or(Path::new("model/tiny"));
        let download = DownloadArgs {
            download: args.download,
        };
        args.model = Some(find(model, Want::Checkpoint, download)?);
    }
    let json = args.json.clone();
    let is_child = env::var_os(CHILD_VARIABLE).is_some();
    let records = if args.table && !is_child {
        measure_with_operations()?
    } else {
        let (devices, dtype) = (args.device.clone(), args.dtype.map(DType::from));
        run_on_all(&devices, dtype, Measure(args))??
    };
    let lines: String = records
        .iter()
        .map(|record| record.to_json() + "\n")
        .collect();
    if is_child {
        print!("{lines}");
        return Ok(());
    }
    match json.as_deref() {
        Some(path) if path == Path::new("-") => print!("{lines}"),
        Some(path) => {
            write_atomic(path, |out: &mut dyn Write| out.write_all(lines.as_bytes()))?;
            print!("{}", table(&records));
        }
        None => print!("{}", table(&records)),
    }
    for record in &records {
        if let Some(warning) = record.warning() {
            eprintln!("WARNING: {warning}");
        }
    }
    Ok(())
}

/// Measures in one process and times the operations in another: a timed operation is waited for, and
/// neither run should find memory or time taken by the other.
fn measure_with_operations() -> Result<Vec<Record>> {
    let mut records = child(&[])?;
    let folder = env::temp_dir().join(format!("xray-qwen3vl-bench-{}", process::id()));
    fs::create_dir(&folder)
        .with_context(|| format!("cannot make the folder `{}`", folder.display()))?;
    eprintln!("once more, timing each operation");
    let timed = child(&environment(&folder.join("kernels.log")));
    let _ = fs::remove_dir_all(&folder);
    let timed = timed?;
    if timed
        .iter()
        .all(|record| record.operations.as_ref().is_none_or(Vec::is_empty))
    {
        eprintln!("the device's backend does not tell its operations: the table is empty");
    }
    for (record, timed) in records.iter_mut().zip(timed) {
        record.operations = timed.operations;
    }
    Ok(records)
}

/// Runs this very command in a process of its own and takes its records.
fn child(variables: &[(&str, OsString)]) -> Result<Vec<Record>> {
    let program = env::current_exe().context("cannot find this program's own file")?;
    let output = process::Command::new(&program)
        .args(env::args_os().skip(1))
        .env(CHILD_VARIABLE, "1")
        .envs(variables.iter().map(|(name, value)| (name, value)))
        .stderr(process::Stdio::inherit())
        .output()
        .with_context(|| format!("cannot start `{}`", program.display()))?;
    if !output.status.success() {
        bail!("the measuring process ended with {}", output.status);
    }
    // A profiler may write to stdout as well; records are the lines that read as such.
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect())
}

/// Refuses what cannot be meant.
fn check(args: &BenchArgs) -> Result<()> {
    if args.batch.contains(&0) {
        bail!(UsageError("--batch is 0, expected at least 1".into()));
    }
    if args.samples == Some(0) {
        bail!(UsageError("--samples is 0, expected at least 1".into()));
    }
    let train = args.kind == BenchKind::Train;
    let only_train = args.packing
        || args.no_recompute
        || args.recompute_pointwise
        || args.memory_budget.is_some()
        || args.trace.is_some();
    if !train && only_train {
        bail!(UsageError(
            "--packing, --no-recompute, --recompute-pointwise, --memory-budget and --trace belong to `bench train`"
                .into()
        ));
    }
    if train && let Some(batch) = args.batch.iter().find(|batch| **batch > STEP_SAMPLES) {
        bail!(UsageError(format!(
            "--batch is {batch}, a step has {STEP_SAMPLES} samples"
        )));
    }
    if args.kind == BenchKind::Load && !args.batch.is_empty() {
        bail!(UsageError("`bench load` has no --batch".into()));
    }
    if args.device.len() > 1
        && !matches!(
            args.kind,
            BenchKind::Load | BenchKind::Infer | BenchKind::Train
        )
    {
        bail!(UsageError(
            "several devices are for `bench load`, `bench infer` and `bench train`".into()
        ));
    }
    if args.checkpoint_in.is_some() && args.kind != BenchKind::Load {
        bail!(UsageError("--checkpoint-in belongs to `bench load`".into()));
    }
    if args.image_size.is_some() && args.kind == BenchKind::Load {
        bail!(UsageError("`bench load` has no --image-size".into()));
    }
    if args.table && (args.device.contains(&DeviceName::Cpu) || built_backends() == ["cpu"]) {
        bail!(UsageError(
            "--table needs `--device cuda` or `wgpu`: the CPU backend does not time its operations"
                .into()
        ));
    }
    if matches!(args.kind, BenchKind::Load | BenchKind::Vision) && args.mixed {
        bail!(UsageError(
            "--mixed is about lengths of text, which `bench load` and `bench vision` have none of"
                .into()
        ));
    }
    if let Some(drafted) = args.drafts {
        let most = 1.0 + drafted as f64;
        if args.kind != BenchKind::Decode || args.mixed {
            bail!(UsageError(
                "--drafts belongs to `bench decode` without --mixed".into()
            ));
        }
        if drafted == 0 || !(1.0..=most).contains(&args.tokens_per_step) {
            bail!(UsageError(format!(
                "--tokens-per-step is {} with {drafted} drafted, expected 1 to {most} and at least one drafted",
                args.tokens_per_step
            )));
        }
    }
    let has_prompts = matches!(
        args.kind,
        BenchKind::Prefill | BenchKind::Decode | BenchKind::Infer
    );
    if args.tokens.is_some() && !has_prompts {
        bail!(UsageError(
            "--tokens belongs to `bench prefill`, `decode` and `infer`".into()
        ));
    }
    Ok(())
}

struct Measure(BenchArgs);

impl ReplicatedTask for Measure {
    type Output = Result<Vec<Record>>;

    fn needs_range(&self) -> bool {
        self.0.kind == BenchKind::Train
    }

    fn run<B: Accelerator>(self, replicas: Replicas<B>) -> Result<Vec<Record>> {
        let args = self.0;
        let Replicas { devices, dtype } = replicas;
        let mut bench = prepare::<B>(&args, devices[0].clone(), dtype)?;
        let written = args
            .checkpoint_in
            .as_deref()
            .map(|dir| bench.write_checkpoint(dir))
            .transpose()?;
        let mut records = match args.kind {
            BenchKind::Load => loading(|on_progress| bench.load(&devices, on_progress))?,
            BenchKind::Infer => measure_answers(&args, &bench, devices.clone())?,
            BenchKind::Train => measure_training(&args, &bench, &devices, dtype)?,
            BenchKind::Vision | BenchKind::Prefill | BenchKind::Decode => {
                measure_calls(&args, &bench, dtype)?
            }
        };
        drop(written);
        if bench.is_profiled() {
            return Ok(records);
        }
        // After everything else: tuning the large matmul must not count as the model's first call.
        let ceilings = measure_ceilings::<B>(dtype, &devices[0]);
        for record in &mut records {
            record.set_ceilings(&ceilings);
        }
        Ok(records)
    }
}

/// The model and the requests that were typed; no weights yet.
fn prepare<B: Accelerator>(args: &BenchArgs, device: B::Device, dtype: DType) -> Result<Bench<B>> {
    let source = match args.random_weights {
        Some(size) => Source::Random {
            size,
            layers: args.layers,
        },
        None => {
            let gguf = GgufParts {
                mmproj: args.mmproj.clone(),
                tokenizer: None,
            };
            Source::Folder(args.model.clone().unwrap_or_default(), gguf)
        }
    };
    let mut bench =
        Bench::<B>::new(source, device, dtype, args.mixed, args.samples).map_err(usage)?;
    bench.tokens = args.tokens;
    if let Some(side) = args.image_size {
        bench.image_side = side.get();
    }
    bench.drafts = args.drafts.map(|drafted| ForcedDrafts {
        drafted,
        tokens_per_step: args.tokens_per_step,
    });
    let shortest = bench.requests().shortest();
    if let Some(tokens) = args.tokens.filter(|tokens| *tokens < shortest) {
        bail!(UsageError(format!(
            "--tokens {tokens}: a prompt with this model's image has at least {shortest}"
        )));
    }
    bench.quantize = match &bench.source {
        Source::Folder(dir, _) if dir.exists() => of_checkpoint(dir)?.or(args.quantize),
        _ => args.quantize,
    };
    Ok(bench)
}

/// The sizes typed, or those that a kind measures by default.
fn batches(args: &BenchArgs, default: &[usize]) -> Vec<usize> {
    if args.batch.is_empty() {
        default.to_vec()
    } else {
        args.batch.clone()
    }
}

fn measure_answers<B: Accelerator>(
    args: &BenchArgs,
    bench: &Bench<B>,
    devices: Vec<B::Device>,
) -> Result<Vec<Record>> {
    let (models, seconds) = loading(|on_progress| bench.models::<B>(&devices, on_progress))?;
    let models = models.into_iter().zip(devices).collect();
    let mut calls = Progress::new("calls", 0, Unit::Items);
    let mut on_call = |done, all| calls.set(done, all);
    let records = bench.answers(models, seconds, &batches(args, &[16]), &mut on_call)?;
    calls.finish();
    Ok(records)
}

fn measure_training<B: Accelerator>(
    args: &BenchArgs,
    bench: &Bench<B>,
    devices: &[B::Device],
    dtype: DType,
) -> Result<Vec<Record>> {
    let shapes = match args.memory_budget {
        Some(budget) => {
            let free = free_memory::<B>(&bench.device);
            let gib = budget.gib(free).map_err(UsageError)?;
            let (shape, line) = TrainShape::fitting(&bench.config, dtype, bench.quantize, gib)?;
            eprintln!("{line}");
            vec![shape]
        }
        None => batches(args, &[1])
            .into_iter()
            .map(|micro_batch| TrainShape {
                micro_batch,
                packing: args.packing,
                recompute: !args.no_recompute && !args.recompute_pointwise,
                recompute_pointwise: args.recompute_pointwise,
            })
            .collect(),
    };
    let (base, seconds) = loading(|on_progress| bench.model::<Autodiff<B>>(on_progress))?;
    let trace = Trace::new(args.trace.is_some());
    let mut records = Vec::new();
    for shape in shapes {
        records.push(bench.train(base.clone(), seconds, shape, &trace)?);
        if devices.len() > 1 {
            records.push(bench.train_on(base.clone(), seconds, shape, devices)?);
        }
    }
    if let Some(path) = &args.trace {
        trace.write(path)?;
    }
    Ok(records)
}

/// The vision tower, requests up to their first token, or tokens after it.
fn measure_calls<B: Accelerator>(
    args: &BenchArgs,
    bench: &Bench<B>,
    dtype: DType,
) -> Result<Vec<Record>> {
    let (model, seconds) = loading(|on_progress| bench.model::<B>(on_progress))?;
    let decoded = batches(args, &[1, 8, 32]);
    let largest = match args.kind {
        BenchKind::Vision | BenchKind::Prefill => 0,
        _ => decoded.iter().copied().max().unwrap_or(0),
    };
    let weights = (dtype, model.quantization());
    prepare_kernels::<B>(&bench.config, weights, &bench.device, largest);
    Ok(match args.kind {
        BenchKind::Vision => bench.vision(&model, seconds, &batches(args, &[1])),
        BenchKind::Prefill => bench.prefill(&model, seconds, &batches(args, &[1]))?,
        _ => bench.decode(&model, seconds, &decoded)?,
    })
}

/// A size that was typed wrong is wrong usage.
fn usage(error: BenchError) -> anyhow::Error {
    match error {
        BenchError::Size(reason) => UsageError(reason).into(),
        other => other.into(),
    }
}

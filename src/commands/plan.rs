//! `plan`: what a run will take, before anything is loaded.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::Args;
use rayon::prelude::*;

use super::{
    models::{DownloadArgs, find},
    pipeline_options::base_of_run,
    plan_cards::{CARDS, Cards},
    shipped::{shipped, shipped_data},
    train::settings::with_keys,
    usage::UsageError,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    base::{device_name::DeviceName, files::write_atomic, hub::Want, plot::histogram},
    dataset::{Dataset, DatasetError, LeftOut, loader::Overlong},
    ops::memory::free_memory,
    runtime::{accelerator::Accelerator, pipeline::TextAndImages},
    train::{
        budget::{Budget, StepForm},
        config::TrainConfig,
        plan::{Plan, Throughput},
    },
};

/// Arguments of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Config file of the run.
    #[arg(long, value_name = "FILE", default_value = "configs/tiny.toml")]
    pub config: PathBuf,
    /// Folder or name of a checkpoint instead of the config's; its weights are not read, and not downloaded.
    #[arg(long, value_name = "DIR|ID")]
    pub model: Option<PathBuf>,
    /// Downloads.
    #[command(flatten)]
    pub download: DownloadArgs,
    /// Training data instead of the config's, in every form that `train` reads.
    #[arg(long, value_name = "DATA")]
    pub train_data: Option<String>,
    /// Measured throughput, from `bench train` or an earlier run, for an estimate of the time.
    #[arg(long, value_name = "F", conflicts_with = "bench")]
    pub samples_per_second: Option<f64>,
    /// File written by `bench train --json`, whose throughput gives an estimate of the time.
    #[arg(long, value_name = "FILE.json")]
    pub bench: Option<PathBuf>,
    /// Choose settings that fit into this many GiB of device memory, or into all that is free, as `train`
    /// would.
    #[arg(long, value_name = "auto|GIB")]
    pub memory_budget: Option<Budget>,
    /// Also show what fits on cards of these sizes, in GB: weights, context, answers at once, training rows.
    #[arg(
        long,
        value_name = "GB,..",
        value_delimiter = ',',
        num_args = 0..=1,
        default_missing_value = CARDS
    )]
    pub cards: Vec<f64>,
    /// Any key of the config file, as in `train`; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Write the token histogram as SVG.
    #[arg(long, value_name = "FILE.svg")]
    pub histogram: Option<PathBuf>,
}

/// Runs `plan`.
///
/// # Errors
/// Config, tokenizer or data cannot be read; the message names the file and the row.
pub fn run(args: &PlanArgs) -> Result<()> {
    let config = TrainConfig::from_file(&shipped(&args.config))?;
    let mut config = with_keys(&config, &args.set)?;
    config
        .validate()
        .map_err(|error| UsageError(error.to_string()))?;
    let throughput = throughput(args)?;
    let model = args.model.as_ref().unwrap_or(&config.model);
    let model = find(model, Want::Description, args.download)?;
    let parts = TextAndImages::load(&base_of_run(&config, model.clone(), DType::F32))?;
    println!("{}", parts.pixel_limits());
    for remark in &parts.remarks {
        println!("note: {remark}");
    }
    let name = shipped_data(args.train_data.as_deref().unwrap_or(&config.train_data));
    let data = Dataset::open_with(&name, &config.data_options())?;
    let lengths = TokenLengths::of(&data, &parts)?;
    let device = first_device(&config)?;
    let dtype_bytes = weight_bytes(&config, device);
    let quantization = config.quantization(&model)?;
    let longest = config.longest_as_learnt(lengths.at(1.0).min(config.max_length));
    let budget = args.memory_budget;
    if let Some(budget) = budget.or(config.memory_budget.map(Budget::Gib)) {
        let gib = match budget {
            Budget::Gib(gib) => gib,
            Budget::Free => budget
                .gib(run_on(device, None, FreeMemory)?)
                .map_err(UsageError)?,
        };
        let weights = (dtype_bytes, quantization);
        let form = StepForm::choose(&config, &parts.config, longest, weights, gib, None)?;
        form.apply(&mut config);
        println!("{}", form.explain(gib, longest));
    }
    let plan = Plan::new(
        &config,
        &parts.config,
        data.len(),
        longest,
        config.device.len().max(1),
        dtype_bytes,
        quantization,
    )?;
    print!(
        "{}",
        plan.to_text(config.num_train_epochs, throughput.as_ref())
    );
    println!(
        "tokens of a sample: min {}, median {}, p95 {}, p99 {}, max {}; {} in all",
        lengths.at(0.0),
        lengths.at(0.5),
        lengths.at(0.95),
        lengths.at(0.99),
        lengths.at(1.0),
        lengths.sorted.iter().sum::<usize>()
    );
    print_overlong(&config, name, &lengths)?;
    for remark in data.remarks() {
        println!("note: {remark}");
    }
    print!("{}", bars(&lengths.sorted));
    if !args.cards.is_empty() {
        println!("{}", cards(args, &config, &parts, longest)?);
    }
    if let Some(path) = &args.histogram {
        let values: Vec<f64> = lengths.sorted.iter().map(|tokens| *tokens as f64).collect();
        let svg = histogram(&values, "tokens of a sample", "tokens");
        write_atomic(path, |out| out.write_all(svg.as_bytes()))
            .context("cannot write the histogram")?;
    }
    Ok(())
}

/// The table of `--cards`.
fn cards(
    args: &PlanArgs,
    config: &TrainConfig,
    parts: &TextAndImages,
    longest: usize,
) -> Result<String> {
    if let Some(size) = args
        .cards
        .iter()
        .find(|size| !(**size > 0.0 && size.is_finite()))
    {
        bail!(UsageError(format!(
            "--cards names a card of {size} GB, expected positive numbers such as {CARDS}"
        )));
    }
    let images = parts.images.config();
    let table = Cards {
        cards: &args.cards,
        model: &parts.config,
        config,
        longest,
        patches: images.max_pixels / images.patch_size.pow(2),
    };
    run_on(first_device(config)?, None, table)?
}

/// How fast the run will be, where that was measured or typed.
fn throughput(args: &PlanArgs) -> Result<Option<Throughput>> {
    match (&args.bench, args.samples_per_second) {
        (Some(path), _) => Ok(Some(Throughput::from_bench(path)?)),
        (None, Some(rate)) if rate > 0.0 && rate.is_finite() => Ok(Some(Throughput {
            samples_per_second: rate,
            device: None,
        })),
        (None, Some(rate)) => bail!(UsageError(format!(
            "--samples-per-second is {rate}, expected a positive number"
        ))),
        (None, None) => Ok(None),
    }
}

/// Tokens of every sample, the shortest first.
struct TokenLengths {
    sorted: Vec<usize>,
}

impl TokenLengths {
    fn of(data: &Dataset, parts: &TextAndImages) -> Result<Self, DatasetError> {
        let mut sorted: Vec<usize> = (0..data.len())
            .into_par_iter()
            .map(|row| Ok(data.encode(row, parts, usize::MAX)?.input_ids.len()))
            .collect::<Result<_, DatasetError>>()?;
        sorted.sort_unstable();
        Ok(Self { sorted })
    }

    /// The length that `share` of the samples do not exceed; a data set has at least one row.
    fn at(&self, share: f64) -> usize {
        self.sorted[((self.sorted.len() - 1) as f64 * share).round() as usize]
    }
}

/// The run's first device, where one is named.
fn first_device(config: &TrainConfig) -> Result<Option<DeviceName>> {
    let first = config.device.first().map(|name| name.parse());
    Ok(first.transpose().map_err(UsageError)?)
}

/// Bytes of a weight: as the backends choose where no dtype is named, 2 on CUDA and 4 elsewhere.
fn weight_bytes(config: &TrainConfig, device: Option<DeviceName>) -> u64 {
    let is_half = match (config.dtype.as_deref(), device) {
        (Some(dtype), _) => dtype != "f32",
        (None, Some(device)) => matches!(device, DeviceName::Cuda(_)),
        (None, None) => cfg!(feature = "cuda"),
    };
    if is_half { 2 } else { 4 }
}

/// Says what becomes of samples longer than `max_length`.
fn print_overlong(config: &TrainConfig, data: String, lengths: &TokenLengths) -> Result<()> {
    let all = lengths.sorted.len();
    let over = lengths
        .sorted
        .iter()
        .filter(|length| **length > config.max_length)
        .count();
    match config.overlong {
        Overlong::Skip if over == all => bail!(DatasetError::AllTooLong {
            file: data,
            rows: over,
            shortest: lengths.at(0.0),
            max_length: config.max_length,
        }),
        Overlong::Skip => {
            let left_out = LeftOut {
                rows: over,
                of: all,
                max_length: config.max_length,
            };
            if let Some(line) = left_out.sentence() {
                println!("{line}");
            }
        }
        Overlong::Error if over > 0 => println!(
            "{over} of {all} samples are longer than max_length {}; the run ends at the first of them (`overlong = \"skip\"` leaves them out)",
            config.max_length
        ),
        Overlong::Error => {}
    }
    Ok(())
}

/// How much memory of a device is free.
struct FreeMemory;

impl DeviceTask for FreeMemory {
    type Output = Option<u64>;

    fn run<B: Accelerator>(self, device: B::Device, _dtype: DType) -> Option<u64> {
        free_memory::<B>(&device)
    }
}

/// A histogram in text: ten bars.
fn bars(sorted: &[usize]) -> String {
    let (low, high) = (sorted[0], sorted[sorted.len() - 1]);
    let width = ((high - low) / 10 + 1).max(1);
    let mut counts = [0usize; 10];
    for length in sorted {
        counts[((length - low) / width).min(9)] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1).max(1);
    counts
        .iter()
        .enumerate()
        .filter(|(_, count)| **count > 0)
        .map(|(bin, count)| {
            let from = low + bin * width;
            format!(
                "  {from:>6}–{:<6} {:<40} {count}\n",
                from + width - 1,
                "█".repeat((count * 40).div_ceil(most))
            )
        })
        .collect()
}

//! `plan`: what a run will take, before anything is loaded.

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use rayon::prelude::*;

use super::{UsageError, shipped, train::with_keys};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    base::{device_name::DeviceName, files::write_atomic},
    cli::PlanArgs,
    dataset::{Dataset, DatasetError, LeftOut, loader::Overlong},
    ops::memory::free_memory,
    plot::histogram,
    runtime::{
        accelerator::Accelerator,
        pipeline::{PipelineOptions, TextAndImages},
    },
    train::{
        budget::{Budget, Form},
        config::TrainConfig,
        plan::{Plan, Throughput},
    },
};

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
    let throughput = match (&args.bench, args.samples_per_second) {
        (Some(path), _) => Some(Throughput::from_bench(path)?),
        (None, Some(rate)) if rate > 0.0 && rate.is_finite() => Some(Throughput {
            samples_per_second: rate,
            device: None,
        }),
        (None, Some(rate)) => bail!(UsageError(format!(
            "--samples-per-second is {rate}, expected a positive number"
        ))),
        (None, None) => None,
    };
    let [min_pixels, max_pixels] = config.pixel_limits();
    let options = PipelineOptions {
        model: shipped(args.model.as_ref().unwrap_or(&config.model)),
        adapter: None,
        dtype: DType::F32,
        quantize: None,
        min_pixels: Some(min_pixels),
        max_pixels: Some(max_pixels),
    };
    let parts = TextAndImages::load(&options)?;
    println!("{}", parts.pixel_limits());
    let name = args.train_data.as_deref().unwrap_or(&config.train_data);
    let name = if name.starts_with("phantom:") {
        name.to_string()
    } else {
        shipped(name.as_ref()).display().to_string()
    };
    let data = Dataset::open(&name)?;
    let lengths: Vec<usize> = (0..data.len())
        .into_par_iter()
        .map(|row| match data.encode(row, &parts, usize::MAX) {
            Ok(sample) => Ok(sample.input_ids.len()),
            Err(error) => Err(error),
        })
        .collect::<Result<_, DatasetError>>()?;
    let mut sorted = lengths.clone();
    sorted.sort_unstable();
    let at = |share: f64| sorted[((sorted.len() - 1) as f64 * share).round() as usize];
    let devices = config.device.len().max(1);
    let dtype_bytes = match config.dtype.as_deref() {
        Some("f32") => 4,
        Some(_) => 2,
        // As the backends choose when nothing is said: half a float on CUDA, a whole one elsewhere.
        None => {
            let first = config.device.first().map(|name| name.parse::<DeviceName>());
            let on_cuda = match first {
                Some(name) => matches!(name.map_err(UsageError)?, DeviceName::Cuda(_)),
                None => cfg!(feature = "cuda"),
            };
            if on_cuda { 2 } else { 4 }
        }
    };
    let longest = at(1.0).min(config.max_length);
    let budget = args.memory_budget;
    if let Some(budget) = budget.or(config.memory_budget.map(Budget::Gib)) {
        let gib = match budget {
            Budget::Gib(gib) => gib,
            Budget::Free => {
                let first = config.device.first().map(|name| name.parse::<DeviceName>());
                let name = first.transpose().map_err(UsageError)?;
                budget.gib(run_on(name, None, Free)?).map_err(UsageError)?
            }
        };
        let form = Form::choose(&config, &parts.config, longest, dtype_bytes, gib, None)?;
        form.apply(&mut config);
        println!("{}", form.explain(gib, longest));
    }
    let plan = Plan::new(
        &config,
        &parts.config,
        data.len(),
        longest,
        devices,
        dtype_bytes,
    )?;
    print!(
        "{}",
        plan.to_text(config.num_train_epochs, throughput.as_ref())
    );
    println!(
        "tokens of a sample: min {}, median {}, p95 {}, p99 {}, max {}; {} in all",
        at(0.0),
        at(0.5),
        at(0.95),
        at(0.99),
        at(1.0),
        lengths.iter().sum::<usize>()
    );
    let over = lengths
        .iter()
        .filter(|length| **length > config.max_length)
        .count();
    let left_out = LeftOut {
        rows: over,
        of: data.len(),
        max_length: config.max_length,
    };
    match config.overlong {
        Overlong::Skip if over == data.len() => bail!(DatasetError::AllTooLong {
            file: name,
            rows: over,
            shortest: at(0.0),
            max_length: config.max_length,
        }),
        Overlong::Skip => left_out
            .sentence()
            .iter()
            .for_each(|line| println!("{line}")),
        Overlong::Error if over > 0 => println!(
            "{over} of {} samples are longer than max_length {}; the run ends at the first of them (`overlong = \"skip\"` leaves them out)",
            data.len(),
            config.max_length
        ),
        Overlong::Error => {}
    }
    for remark in data.remarks() {
        println!("note: {remark}");
    }
    print!("{}", bars(&sorted));
    if let Some(path) = &args.histogram {
        let values: Vec<f64> = lengths.iter().map(|length| *length as f64).collect();
        let svg = histogram(&values, "tokens of a sample", "tokens");
        write_atomic(path, |out| out.write_all(svg.as_bytes()))
            .context("cannot write the histogram")?;
    }
    Ok(())
}

/// Asks a device how much of its memory is free.
struct Free;

impl DeviceTask for Free {
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

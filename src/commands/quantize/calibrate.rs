//! `quantize --calibrate`: samples for the calibration, and what it found.

use std::{path::Path, rc::Rc, sync::Arc};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::Args;

use crate::{
    adapters::quantised::{
        Formats,
        calibrate::{Calibrated, Calibration},
    },
    base::files::size_text,
    commands::{
        progress::{Progress, Unit},
        shared_args::ReadingArgs,
        usage::UsageError,
    },
    dataset::{
        Dataset,
        loader::{WindowLoader, WindowPlan},
    },
    qwen3_vl::{config::Qwen3VlConfig, weights::Checkpoint},
    runtime::{
        accelerator::Accelerator,
        pipeline::{PipelineOptions, TextAndImages},
    },
    study::counted,
};

/// Samples to calibrate on, and the limit of size.
#[derive(Debug, Args)]
pub struct CalibrateArgs {
    /// Data file, as for `train`, whose samples go through the model while it is quantised: errors go where its
    /// inputs do not notice them.
    ///
    /// Adapters that were trained on the checkpoint stay valid: no input is scaled and no norm is changed. A
    /// report with perplexity, agreement of tokens and the error of each layer is printed and written as
    /// `quantization.json`.
    #[arg(long, value_name = "DATA")]
    pub calibrate: Option<String>,
    /// Most samples that are calibrated on, spread over the file; more take longer and gain little.
    #[arg(long, value_name = "N", default_value_t = 128, requires = "calibrate")]
    pub calibration_samples: usize,
    /// Most samples beside them that are only measured; at most a quarter of all.
    #[arg(long, value_name = "N", default_value_t = 32, requires = "calibrate")]
    pub held_out_samples: usize,
    /// Most bytes of all weights, such as `6GB`: the layers that lose most by 4 bits get 8, as many as fit.
    #[arg(long, value_name = "SIZE", value_parser = size, requires = "calibrate")]
    pub max_size: Option<usize>,
    /// How the data file is read.
    #[command(flatten)]
    pub reading: ReadingArgs,
}

/// `6GB`, `5.5GiB`, `800MB`, `1000000`.
fn size(text: &str) -> Result<usize, String> {
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let unit = match unit.trim() {
        "" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "MiB" => 1_048_576.0,
        "GiB" => 1_073_741_824.0,
        _ => f64::NAN,
    };
    match number.parse::<f64>() {
        Ok(number) if number * unit >= 1.0 => Ok((number * unit) as usize),
        _ => Err(format!(
            "`{text}` is no size; expected one such as 6GB, 5.5GiB or 800MB"
        )),
    }
}

/// Rows that are spread over `len`: those to calibrate on, then those that are held out.
fn rows(len: usize, calibrated: usize, held_out: usize) -> (Vec<usize>, Vec<usize>) {
    let all = len.min(calibrated + held_out);
    let held_out = held_out.min(all / 4);
    let spread = (0..all).map(|at| at * len / all);
    let is_held = |at: usize| (at + 1) * held_out / all > at * held_out / all;
    let mut parts = (Vec::new(), Vec::new());
    for (at, row) in spread.enumerate() {
        match is_held(at) {
            true => parts.1.push(row),
            false => parts.0.push(row),
        }
    }
    parts
}

/// Calibrates the language model of a checkpoint.
pub(super) fn calibrate<B: Accelerator>(
    args: &CalibrateArgs,
    data: &str,
    (from, checkpoint): (&Path, &Rc<Checkpoint>),
    config: &Qwen3VlConfig,
    formats: Formats,
    (device, dtype): (&B::Device, DType),
) -> Result<Calibrated> {
    if args.calibration_samples == 0 {
        bail!(UsageError(
            "--calibration-samples 0: expected at least one".into()
        ));
    }
    let dataset = Dataset::open_with(data, &args.reading.options())?;
    for remark in dataset.remarks() {
        eprintln!("note: {remark}");
    }
    let parts = TextAndImages::load(&PipelineOptions::new(from.to_path_buf(), dtype))?;
    eprintln!("{}", parts.pixel_limits());
    let (chosen, held_out) = rows(
        dataset.len(),
        args.calibration_samples,
        args.held_out_samples,
    );
    let mut calibration =
        Calibration::<B>::new(checkpoint.clone(), config, formats, dtype, device)?;
    let loader = WindowLoader::new(dataset, Arc::new(parts), WindowPlan::once_in_order(1), 0, 1);
    let count = chosen.len() + held_out.len();
    let mut progress = Progress::new("samples", count as u64, Unit::Items);
    let mut tokens = 0;
    for (done, row) in chosen.iter().chain(&held_out).enumerate() {
        let window = loader.window(*row)?;
        tokens += window.tokens;
        for sample in window.parts.iter().flatten() {
            calibration.add(sample);
        }
        progress.set(done as u64 + 1, count as u64);
    }
    progress.finish();
    let text = &config.text_config;
    // Three residual streams, the widest activations, moments and factor of the widest layer, two layers.
    let wide = text.intermediate_size;
    let bytes = tokens * dtype.size() * (3 * text.hidden_size + 2 * wide)
        + 16 * wide * wide
        + 2 * dtype.size()
            * (3 * text.hidden_size * wide + 4 * text.hidden_size * text.hidden_size);
    eprintln!(
        "calibrating on {} and measuring on {}, {tokens} tokens; besides the quantised weights about {} of memory; the first layers show the time",
        counted(chosen.len(), "sample", "samples"),
        held_out.len(),
        size_text(bytes as u64)
    );
    let steps = calibration.steps(args.max_size.is_some()) as u64;
    let mut progress = Progress::new("linear layers, by input", steps, Unit::Items);
    let mut done = 0;
    let calibrated = calibration
        .run(held_out.len(), args.max_size, &mut || {
            done += 1;
            progress.set(done, steps);
        })
        .with_context(|| format!("cannot calibrate `{}` on `{data}`", from.display()))?;
    progress.finish();
    Ok(calibrated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_from_what_is_typed() {
        assert_eq!(size("6GB"), Ok(6_000_000_000));
        assert_eq!(size("1.5 MiB"), Ok(1_572_864));
        assert_eq!(size("1000"), Ok(1000));
        for bad in ["", "GB", "6TB", "-1GB", "0", "1.2.3MB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn rows_are_spread_and_in_one_part_each() {
        for (len, calibrated, held_out) in [
            (1000, 128, 32),
            (100, 128, 32),
            (5, 128, 32),
            (1, 4, 4),
            (10, 3, 0),
        ] {
            let (chosen, held) = rows(len, calibrated, held_out);
            let mut all = [chosen.clone(), held.clone()].concat();
            all.sort_unstable();
            all.dedup();
            assert_eq!(all.len(), chosen.len() + held.len());
            assert_eq!(all.len(), len.min(calibrated + held_out));
            assert!(all.iter().all(|row| *row < len));
            assert!(!chosen.is_empty() && held.len() <= held_out);
        }
        assert_eq!(rows(160, 128, 32).1.len(), 32);
    }
}

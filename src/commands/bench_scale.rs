//! `bench scale`: what several machines would bring, from a step measured on one.

use std::{fs, path::PathBuf};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::usage::UsageError;
use crate::{
    bench::{
        report::Record,
        scale::{Algorithm, ScaleModel},
    },
    runtime::synthetic::weights::RandomSize,
    train::{
        config::{TrainConfig, Tuner},
        parameters::TrainedParameters,
    },
};

/// Share of the nodes' own speed that is worth the machines.
const WORTH: f64 = 0.9;

/// Arguments of `bench scale`.
#[derive(Debug, Args)]
pub struct BenchScaleArgs {
    /// Size of the model.
    #[arg(long, value_enum, default_value_t = RandomSize::B8)]
    pub size: RandomSize,
    /// Rank of the adapters.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub lora_rank: usize,
    /// All weights of the language model are trained instead.
    #[arg(long, conflicts_with = "lora_rank")]
    pub full: bool,
    /// Seconds of a step on one node.
    #[arg(long, value_name = "SECONDS", required_unless_present = "bench")]
    pub step_seconds: Option<f64>,
    /// Samples of that step.
    #[arg(long, value_name = "N", default_value_t = 16)]
    pub step_samples: usize,
    /// Micro-batches of that step, one after the other: only the last one's backward pass can overlap with the sum.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub micro_batches: usize,
    /// File written by `bench train --json` on one node: its step, samples and micro-batches.
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["step_seconds", "step_samples", "micro_batches"])]
    pub bench: Option<PathBuf>,
    /// Numbers of nodes.
    #[arg(
        long,
        value_name = "N,N",
        value_delimiter = ',',
        default_value = "1,2,4,8,16,32,64"
    )]
    pub nodes: Vec<usize>,
    /// Rates of each node's connection.
    #[arg(
        long,
        value_name = "F,F",
        value_delimiter = ',',
        default_value = "10,25,100,400"
    )]
    pub gbit: Vec<f64>,
    /// Microseconds from one node to the next for the smallest message: some 5 with InfiniBand, 50 over TCP.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 50.0)]
    pub latency: f64,
    /// Share of a connection's rate that arrives.
    #[arg(long, value_name = "F", default_value_t = 0.85)]
    pub network_share: f64,
    /// How gradients are added up: NCCL's ring, or the chain through sockets that other devices use.
    #[arg(long, value_enum, default_value = "ring")]
    pub sum: Algorithm,
    /// Print one JSON object a step instead of the table.
    #[arg(long)]
    pub json: bool,
}

/// Runs `bench scale`.
///
/// # Errors
/// Numbers that cannot be meant; a file that is none of `bench train`.
pub(super) fn run(args: &BenchScaleArgs) -> Result<()> {
    let model = model(args)?;
    let steps = args
        .gbit
        .iter()
        .flat_map(|gbit| args.nodes.iter().map(|nodes| model.step(*nodes, *gbit)));
    if args.json {
        for step in steps {
            println!("{}", serde_json::to_string(&step)?);
        }
        return Ok(());
    }
    println!(
        "{} trained parameters, {:.1} MB of gradients; a step of {} samples in {:.3} s on one node; {} µs, {:.0} % of the rate",
        model.parameters,
        model.parameters as f64 * 4.0 / 1e6,
        model.step_samples,
        model.step_seconds,
        args.latency,
        100.0 * args.network_share
    );
    println!(
        "\n| Gbit/s | nodes | MB sent | sum ms (latency) | step ms | in buckets ms | samples/s | efficiency | in buckets |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- | --- |");
    for step in steps {
        println!(
            "| {} | {} | {:.1} | {:.1} ({:.1}) | {:.1} | {:.1} | {:.1} | {:.3} | {:.3} |",
            step.gbit_per_second,
            step.nodes,
            step.bytes_sent / 1e6,
            1e3 * step.sum_seconds,
            1e3 * step.latency_seconds,
            1e3 * step.step_seconds,
            1e3 * step.overlapped_seconds,
            step.samples_per_second,
            step.efficiency,
            step.overlapped_efficiency
        );
    }
    let most = args.nodes.iter().copied().max().unwrap_or(1);
    if most > 1 {
        limits(args, &model, most)?;
    }
    Ok(())
}

/// Up to which rank the adapters' gradients fit.
fn limits(args: &BenchScaleArgs, model: &ScaleModel, nodes: usize) -> Result<()> {
    let a_rank = parameters(args, 1, false)?;
    println!(
        "\nUp to where {nodes} nodes keep {WORTH} of their speed, and rank {} is:",
        args.lora_rank
    );
    println!("\n| Gbit/s | parameters | as a rank | in buckets | as a rank |");
    println!("| --- | --- | --- | --- | --- |");
    for gbit in &args.gbit {
        let fits = |is_overlapped| model.most_parameters(nodes, *gbit, WORTH, is_overlapped);
        let (plain, buckets) = (fits(false), fits(true));
        println!(
            "| {gbit} | {:.1} M | {} | {:.1} M | {} |",
            plain as f64 / 1e6,
            plain / a_rank.max(1),
            buckets as f64 / 1e6,
            buckets / a_rank.max(1)
        );
    }
    Ok(())
}

fn parameters(args: &BenchScaleArgs, lora_rank: usize, full: bool) -> Result<u64> {
    let config = args.size.config(None).map_err(UsageError)?;
    let run = TrainConfig {
        tuner: if full { Tuner::Full } else { Tuner::Lora },
        lora_rank,
        ..TrainConfig::default()
    };
    Ok(TrainedParameters::of(&run, &config)?.all())
}

fn model(args: &BenchScaleArgs) -> Result<ScaleModel> {
    let (step_seconds, step_samples, micro_batches) = match (&args.bench, args.step_seconds) {
        (Some(path), _) => measured(path)?,
        (None, Some(seconds)) => (seconds, args.step_samples as f64, args.micro_batches),
        (None, None) => bail!(UsageError("--step-seconds or --bench is missing".into())),
    };
    let positive = [
        ("--step-seconds", step_seconds),
        ("--network-share", args.network_share),
        ("--step-samples", step_samples),
    ];
    let positive = positive
        .into_iter()
        .chain(args.gbit.iter().map(|gbit| ("--gbit", *gbit)));
    for (name, value) in positive {
        if !(value > 0.0 && value.is_finite()) {
            bail!(UsageError(format!(
                "{name} is {value}, expected a number above 0"
            )));
        }
    }
    if args.network_share > 1.0 || args.latency < 0.0 || !args.latency.is_finite() {
        bail!(UsageError(
            "--network-share is at most 1, and --latency at least 0".into()
        ));
    }
    if args.nodes.contains(&0) || args.lora_rank == 0 {
        bail!(UsageError("--nodes and --lora-rank are at least 1".into()));
    }
    let layers = args.size.config(None).map_err(UsageError)?;
    Ok(ScaleModel {
        step_seconds,
        step_samples,
        micro_batches,
        parameters: parameters(args, args.lora_rank, args.full)?,
        buckets: layers.text_config.num_hidden_layers,
        latency_seconds: args.latency * 1e-6,
        network_share: args.network_share,
        algorithm: args.sum,
    })
}

/// Seconds, samples and micro-batches of a step that `bench train` measured on one device.
fn measured(path: &PathBuf) -> Result<(f64, f64, usize)> {
    let text =
        fs::read_to_string(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    let records = text
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Record>, _>>()
        .with_context(|| format!("`{}` was not written by `bench --json`", path.display()))?;
    let record = records.iter().find(|record| record.bench == "train");
    let Some(record) = record else {
        bail!("`{}` holds no measurement of `bench train`", path.display());
    };
    let (seconds, rate) = (record.median_seconds, record.samples_per_second);
    let samples = (rate.unwrap_or(0.0) * seconds).round();
    let micro_batches = (samples / record.batch.max(1) as f64).ceil().max(1.0);
    Ok((seconds, samples, micro_batches as usize))
}

//! `score`: log-probabilities of given answers, as training computes them.

use std::{
    fs::File,
    io::{BufWriter, Write, stdout},
    path::PathBuf,
};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::Args;
use serde_json::{Value, json};

use super::{
    pipeline_options::pipeline_options,
    progress::{Progress, Unit, loading},
    shared_args::{ModelArgs, ReadingArgs, one_device},
    shell::unless_closed,
    shipped::shipped_data,
    usage::UsageError,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    adapters::lora::files::attach_adapter,
    base::hub::Want,
    dataset::{
        Dataset,
        loader::{WindowLoader, WindowPlan},
    },
    runtime::{
        accelerator::Accelerator,
        pipeline::{PipelineOptions, TextAndImages, load_model},
    },
    train::scores::{TokenScores, token_scores},
};

/// Arguments of `score`.
#[derive(Debug, Args)]
pub struct ScoreArgs {
    /// Model and device.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Data file in a form that `train` reads, or `phantom:SEED:FROM..TO[:STYLE]`; its answers are scored.
    #[arg(value_name = "DATA")]
    pub data: String,
    /// How the data are read.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// File for the lines; stdout without it.
    #[arg(long, value_name = "FILE.jsonl")]
    pub output: Option<PathBuf>,
    /// Score the rejected answer of each row as well (`rejected_response`, `rejected_messages`).
    #[arg(long)]
    pub rejected: bool,
    /// Also list each token with its log-probability.
    #[arg(long)]
    pub tokens: bool,
    /// Divides the logits.
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub temperature: f64,
    /// Rows that go through the model together.
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub batch_size: usize,
    /// Use only this many rows, the first.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

/// Runs `score`: a JSON line a row.
///
/// # Errors
/// Whatever keeps a row from being read or a line from being written.
pub fn run(mut args: ScoreArgs) -> Result<()> {
    for (name, value) in [
        ("--batch-size", args.batch_size),
        ("--limit", args.limit.unwrap_or(1)),
    ] {
        if value == 0 {
            bail!(UsageError(format!("{name} is 0, expected at least 1")));
        }
    }
    if !(args.temperature > 0.0 && args.temperature.is_finite()) {
        bail!(UsageError(format!(
            "--temperature is {}, expected more than 0",
            args.temperature
        )));
    }
    args.model.find(Want::Checkpoint)?;
    let options = pipeline_options(&args.model, DType::F32);
    args.model
        .adapter
        .check_base(&options.model, &options.gguf)?;
    let device = one_device(&args.model.device)?;
    let mut reading = args.reading.options();
    reading.pairs = args.rejected;
    let data = Dataset::open_with(&shipped_data(&args.data), &reading)?;
    for remark in data.remarks() {
        eprintln!("note: {remark}");
    }
    let dtype = args.model.load.dtype.map(DType::from);
    run_on(
        device,
        dtype,
        Scoring {
            args,
            options,
            data,
        },
    )?
}

struct Scoring {
    args: ScoreArgs,
    options: PipelineOptions,
    data: Dataset,
}

impl DeviceTask for Scoring {
    type Output = Result<()>;

    fn run<B: Accelerator>(self, device: B::Device, dtype: DType) -> Result<()> {
        let Self {
            args,
            options,
            data,
        } = self;
        let options = PipelineOptions { dtype, ..options };
        let parts = std::sync::Arc::new(TextAndImages::load(&options)?);
        if let Some(limits) = parts.pixel_limits_to_know() {
            eprintln!("{limits}");
        }
        let base =
            loading(|on_progress| load_model::<B>(&options, &parts.config, &device, on_progress))?;
        // Beside its weights, as in training: merged they would be rounded once more.
        let model = match &options.adapter {
            Some(dir) => {
                let adapted = attach_adapter(base, dir)?;
                adapted
                    .notes
                    .iter()
                    .for_each(|note| eprintln!("note: {note}"));
                adapted.model
            }
            None => base,
        };
        let batch_size = if args.rejected { 1 } else { args.batch_size };
        let plan = WindowPlan {
            max_length: parts.config.text_config.max_position_embeddings,
            ..WindowPlan::once_in_order(batch_size)
        };
        let loader = WindowLoader::new(data.clone(), parts.clone(), plan.clone(), 0, 1);
        let count = data.len().min(args.limit.unwrap_or(usize::MAX));
        let mut out: Box<dyn Write> = match &args.output {
            Some(path) => {
                let file = File::create(path);
                let file = file.with_context(|| format!("cannot write `{}`", path.display()))?;
                Box::new(BufWriter::new(file))
            }
            None => Box::new(stdout()),
        };
        let mut progress = Progress::new("rows", count as u64, Unit::Items);
        let rows: Vec<usize> = (0..count).collect();
        for rows in rows.chunks(args.batch_size) {
            let mut groups = Vec::new();
            for row in rows {
                groups.push(match args.rejected {
                    true => {
                        let pair = data.encode_pair(*row, &parts, plan.max_length)?;
                        pair.into_iter().map(|one| (*row, one)).collect::<Vec<_>>()
                    }
                    false => vec![(*row, data.encode(*row, &parts, plan.max_length)?)],
                });
            }
            let made = loader.batches(&groups)?;
            let mut next = rows.iter();
            for (batch, sequences) in made.batches.iter().zip(&made.sequences) {
                let scores = B::in_exact_memory(&device, Some(&batch.sizes()), || {
                    token_scores(&model, &parts.config, batch, args.temperature, &device)
                });
                let ids: Vec<u32> = batch
                    .targets_with_rows()
                    .into_iter()
                    .map(|(_, id)| id as u32)
                    .collect();
                let mut ranges = sequences.ranges().into_iter();
                while let Some(range) = ranges.next() {
                    let Some(row) = next.next() else { break };
                    let text = data.text(*row);
                    let mut line = json!({"row": data.row(*row), "name": text.name});
                    let own = scored(&parts, &scores, &ids, range, args.tokens)?;
                    line["answer"] = text.answer.into();
                    extend(&mut line, own);
                    if args.rejected
                        && let Some(range) = ranges.next()
                    {
                        let mut own = scored(&parts, &scores, &ids, range, args.tokens)?;
                        own["answer"] = data.rejected(*row)?.last_answer().into();
                        line["rejected"] = own;
                    }
                    let text = format!("{line}\n");
                    unless_closed(out.write_all(text.as_bytes())).context("cannot write")?;
                }
            }
            progress.set((rows[rows.len() - 1] + 1) as u64, count as u64);
        }
        unless_closed(out.flush()).context("cannot write")?;
        progress.finish();
        Ok(())
    }
}

fn extend(line: &mut Value, more: Value) {
    if let (Value::Object(line), Value::Object(more)) = (line, more) {
        line.extend(more);
    }
}

/// What is said of one answer: all its targets, the end token among them.
fn scored(
    parts: &TextAndImages,
    scores: &TokenScores,
    ids: &[u32],
    range: std::ops::Range<usize>,
    tokens: bool,
) -> Result<Value> {
    let logs = &scores.log_probabilities[range.clone()];
    let sum: f64 = logs.iter().map(|log| f64::from(*log)).sum();
    let entropy: f64 = scores.entropies[range.clone()]
        .iter()
        .map(|one| f64::from(*one))
        .sum();
    let count = logs.len().max(1) as f64;
    let mut value = json!({
        "tokens": logs.len(),
        "log_probability": sum,
        "mean_log_probability": sum / count,
        "mean_entropy": entropy / count,
    });
    if tokens {
        let each = ids[range].iter().zip(logs).map(|(id, log)| {
            let token = parts.tokenizer.decode(&[*id], false)?;
            Ok(json!({"id": id, "token": token, "log_probability": log}))
        });
        value["token_log_probabilities"] = each.collect::<Result<Vec<_>>>()?.into();
    }
    Ok(value)
}

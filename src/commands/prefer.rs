//! `prefer`: pairs of a better and a worse answer from a model's own samples, by reward.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use burn::tensor::DType;
use clap::Args;
use serde_json::{Value, json};

use super::{
    pipeline_options::pipeline_options,
    progress::{Progress, Unit, loading, prepare_kernels},
    shared_args::{ModelArgs, ReadingArgs, one_device},
    shipped::{shipped, shipped_data},
    usage::UsageError,
};
use crate::{
    accelerate::devices::{DeviceTask, run_on},
    base::{files::write_atomic, hub::Want, seeds::mix},
    dataset::Dataset,
    eval::text::{lcs, segment::characters},
    processor::{
        message::{Part, split_thinking},
        sample::{Conversation, IMAGE_TAG, escaped},
    },
    runtime::{
        accelerator::Accelerator,
        generate::{FinishReason, GenerationConfig, SamplingConfig, generate},
        pipeline::{Pipeline, PipelineOptions},
    },
    study::counted,
    train::{
        config::TrainConfig,
        objective::rewards::{Answered, RewardConfig, Rewards},
    },
};

/// Arguments of `prefer`.
#[derive(Debug, Args)]
pub struct PreferArgs {
    /// Model and device.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Data file in a form that `train` reads, with true reports.
    #[arg(value_name = "DATA")]
    pub data: String,
    /// How the data are read.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// File for the pairs: rows with `rejected_response`, for `train` with `objective = "dpo"`.
    #[arg(long, value_name = "FILE.jsonl")]
    pub output: PathBuf,
    /// Config of a run whose `rewards` judge the answers; without it, finding F1 with side.
    #[arg(long, value_name = "FILE.toml")]
    pub config: Option<PathBuf>,
    /// Answers that are drawn about each row.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub samples: usize,
    /// Temperature of the draws.
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub temperature: f32,
    /// Most tokens of an answer.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_new_tokens: usize,
    /// Leave a row out whose best and worst answers are nearer to each other than this.
    #[arg(long, value_name = "F", default_value_t = 0.1)]
    pub margin: f64,
    /// Answers at once.
    #[arg(long, value_name = "N", default_value_t = 32)]
    pub batch_size: usize,
    /// Seed of the draws.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub sampling_seed: u64,
    /// Use only this many rows, the first.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
}

/// Runs `prefer`.
///
/// # Errors
/// Whatever keeps a row from being read, an answer from being judged or the file from being written.
pub fn run(mut args: PreferArgs) -> Result<()> {
    if args.samples < 2 {
        bail!(UsageError(
            "--samples is below 2: a pair has two answers".into()
        ));
    }
    if args.temperature <= 0.0 {
        bail!(UsageError(
            "--temperature is 0: all answers would be the same".into()
        ));
    }
    args.model.find(Want::Checkpoint)?;
    let options = pipeline_options(&args.model, DType::F32);
    args.model
        .adapter
        .check_base(&options.model, &options.gguf)?;
    let device = one_device(&args.model.device)?;
    let name = shipped_data(&args.data);
    let data = Dataset::open_with(&name, &args.reading.options())?;
    if data.drawn_findings(0).is_some() {
        bail!(UsageError(format!(
            "`{name}` is drawn, and its images are no files that rows can name; `phantoms --output DIR` writes them"
        )));
    }
    for remark in data.remarks() {
        eprintln!("note: {remark}");
    }
    let (list, rules) = match &args.config {
        Some(path) => {
            let config = TrainConfig::from_file(&shipped(path))?;
            if config.rewards.is_empty() {
                bail!(UsageError(format!("`{}` has no `rewards`", path.display())));
            }
            (config.rewards, config.reward_rules)
        }
        None => (vec![RewardConfig::default()], None),
    };
    let dtype = args.model.load.dtype.map(DType::from);
    let work = Preferring {
        args,
        options,
        data,
        list,
        rules,
    };
    run_on(device, dtype, work)?
}

struct Preferring {
    args: PreferArgs,
    options: PipelineOptions,
    data: Dataset,
    list: Vec<RewardConfig>,
    rules: Option<String>,
}

impl DeviceTask for Preferring {
    type Output = Result<()>;

    fn run<B: Accelerator>(self, device: B::Device, dtype: DType) -> Result<()> {
        let Self {
            args,
            options,
            data,
            list,
            rules,
        } = self;
        let options = PipelineOptions { dtype, ..options };
        let pipeline = loading(|on_progress| Pipeline::<B>::load(&options, device, on_progress))?;
        for note in &pipeline.notes {
            eprintln!("note: {note}");
        }
        let parts = &pipeline.parts;
        let weights = (dtype, pipeline.model.quantization());
        prepare_kernels::<B>(&parts.config, weights, &pipeline.device, args.batch_size);
        let count = data.len().min(args.limit.unwrap_or(usize::MAX));
        let truths: Vec<String> = (0..count).filter_map(|row| data.text(row).answer).collect();
        if truths.len() < count {
            bail!(
                "`{}`: a row has no true report to judge answers by",
                data.name()
            );
        }
        let texts = truths.iter().map(String::as_str);
        let mut rewards = Rewards::new(&list, rules.as_deref(), texts)?;
        let at_once = (args.batch_size / args.samples).max(1);
        let rows: Vec<usize> = (0..count).collect();
        let mut lines: Vec<String> = Vec::new();
        let mut same = 0;
        let mut progress = Progress::new("rows", count as u64, Unit::Items);
        for rows in rows.chunks(at_once) {
            let questions = rows.iter().map(|row| data.question(*row, parts));
            let (prompts, truths): (Vec<_>, Vec<_>) = questions
                .collect::<Result<Vec<_>, _>>()?
                .into_iter()
                .unzip();
            let each = |row: &usize| {
                let of_row = mix(args.sampling_seed, *row as u64);
                (0..args.samples as u64).map(move |answer| mix(of_row, answer))
            };
            let settings = GenerationConfig {
                max_new_tokens: args.max_new_tokens,
                eos_token_ids: parts.eos_token_ids.clone(),
                sampling: SamplingConfig {
                    temperature: args.temperature,
                    ..SamplingConfig::default()
                },
                num_return_sequences: args.samples,
                seeds: rows.iter().flat_map(each).collect(),
                ..GenerationConfig::default()
            };
            let none = &mut |_, _| None;
            let device = &pipeline.device;
            let (drawn, _) = generate(
                &pipeline.model,
                &parts.config,
                &prompts,
                &settings,
                device,
                none,
            )?;
            for ((row, truth), drawn) in rows.iter().zip(truths).zip(drawn.chunks(args.samples)) {
                let truth = split_thinking(&truth, false).1;
                let mut answered = Vec::new();
                let mut whole = Vec::new();
                for one in drawn {
                    let text = parts.tokenizer.decode(&one.token_ids, true)?;
                    let inside = parts.template.opens_thinking();
                    let (thinking, answer) = split_thinking(&text, inside);
                    answered.push(Answered {
                        row: *row,
                        truth: truth.clone(),
                        answer,
                        thinking,
                        ended: one.finish_reason == FinishReason::Stop,
                    });
                    whole.push(text);
                }
                let table = rewards.of(&answered)?;
                let Some((best, worst)) = best_pair(&table.totals, &answered, &whole) else {
                    same += 1;
                    continue;
                };
                let margin = table.totals[best] - table.totals[worst];
                if margin < args.margin || whole[best] == whole[worst] {
                    same += 1;
                    continue;
                }
                let conversation = data.read(*row, parts)?.conversation;
                let images = data.text(*row).images;
                let line = pair(&conversation, &images, &whole[best], &whole[worst], margin)?;
                lines.push(line.to_string());
            }
            progress.set((rows[rows.len() - 1] + 1) as u64, count as u64);
        }
        progress.finish();
        if lines.is_empty() {
            bail!(
                "no row has answers that differ by {} in reward; more --samples, a higher --temperature or a lower --margin find some",
                args.margin
            );
        }
        write_atomic(&args.output, |out| {
            lines.iter().try_for_each(|line| writeln!(out, "{line}"))
        })?;
        eprintln!(
            "{} in `{}`; {} left out, whose answers are all as good",
            counted(lines.len(), "pair", "pairs"),
            args.output.display(),
            counted(same, "row", "rows")
        );
        Ok(())
    }
}

/// The best and the worst of some answers; of several that are as good those whose texts have most in common, so that a
/// pair differs in little but what is rewarded. The better one has ended by itself; an empty text is neither.
fn best_pair(rewards: &[f64], answered: &[Answered], whole: &[String]) -> Option<(usize, usize)> {
    let usable = |index: &usize| !whole[*index].trim().is_empty();
    let all: Vec<usize> = (0..rewards.len()).filter(usable).collect();
    let ended = all.iter().copied().filter(|index| answered[*index].ended);
    let of = |index: usize| rewards[index];
    let most = ended.clone().map(of).max_by(f64::total_cmp)?;
    let least = all.iter().copied().map(of).min_by(f64::total_cmp)?;
    let pairs = ended.filter(|index| of(*index) == most).flat_map(|best| {
        let worst = all.iter().copied().filter(|index| of(*index) == least);
        worst.map(move |worst| (best, worst))
    });
    let alike = |(best, worst): &(usize, usize)| -> usize {
        let [best, worst] = [best, worst].map(|index| characters(&whole[*index]));
        // Twice what they share, less what they do not.
        (4 * lcs::length(&best, &worst)).saturating_sub(best.len() + worst.len())
    };
    pairs.max_by_key(alike)
}

/// A row of a preference file; image paths are absolute, since the file may be in another folder than the data.
fn pair(
    conversation: &Conversation,
    images: &[PathBuf],
    chosen: &str,
    rejected: &str,
    margin: f64,
) -> Result<Value> {
    let mut messages = Vec::new();
    if let Some(system) = &conversation.system {
        messages.push(json!({"role": "system", "content": system}));
    }
    let last = conversation.turns.len().saturating_sub(1);
    for (index, turn) in conversation.turns.iter().enumerate() {
        let words = turn.question.iter().map(|part| match part {
            Part::Image => IMAGE_TAG.to_owned(),
            Part::Text { text } => escaped(text),
        });
        messages.push(json!({"role": "user", "content": words.collect::<String>()}));
        let answer = match &turn.answer {
            Some(answer) if index < last => escaped(answer),
            _ => escaped(chosen),
        };
        messages.push(json!({"role": "assistant", "content": answer}));
    }
    let whole = |path: &PathBuf| -> Result<String> {
        let path = path.canonicalize();
        let path = path.context("an image of the data is gone")?;
        Ok(Path::new(&path).display().to_string())
    };
    let images = images.iter().map(whole).collect::<Result<Vec<_>>>()?;
    Ok(json!({
        "messages": messages,
        "images": images,
        "rejected_response": escaped(rejected),
        "margin": (margin * 1e6).round() / 1e6,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equals_the_most_alike_are_a_pair() {
        let texts = [
            "心影不大。左侧气胸。",
            "心脏大小正常。左侧气胸。",
            "心影不大。右侧气胸。",
            "右侧气胸。",
        ];
        let whole = texts.map(str::to_owned);
        let answered = texts.map(|text| Answered {
            row: 0,
            truth: String::new(),
            answer: text.to_owned(),
            thinking: None,
            ended: true,
        });
        assert_eq!(
            best_pair(&[1.0, 1.0, 0.0, 0.0], &answered, &whole),
            Some((0, 2))
        );
        let mut cut = answered.clone();
        cut[0].ended = false;
        assert_eq!(
            best_pair(&[1.0, 0.5, 0.0, 0.0], &cut, &whole).map(|pair| pair.0),
            Some(1)
        );
    }
}

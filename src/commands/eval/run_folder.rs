//! What a folder of a training run has to say.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::args::EvalArgs;
use crate::{
    commands::progress::show_fetching,
    eval::report::page::PageRollout,
    train::{
        chart::{chart_rows, training_chart},
        config::{TrainConfig, Tuner},
        data::RunData,
        records::{METRICS, read_rows},
    },
};

/// The curves of a run, drawn anew from its `metrics.jsonl`.
pub(super) fn curves(dir: &Path) -> Result<String> {
    let path = dir.join(METRICS);
    let rows = chart_rows(read_rows(&path)?.rows);
    if rows.is_empty() {
        bail!(
            "`{}` holds no step; expected --run to name the folder of a run (`output_dir`)",
            path.display()
        );
    }
    Ok(training_chart(&rows))
}

/// The rollout of a run that was written last; `None` where the run draws no answers.
pub(super) fn last_rollout(dir: &Path) -> Result<Option<PageRollout>> {
    /// Answers on the page.
    const SHOWN: usize = 16;
    let Ok(entries) = std::fs::read_dir(dir.join("rollouts")) else {
        return Ok(None);
    };
    let step_of = |path: &Path| -> Option<usize> {
        let name = path.file_name()?.to_str()?;
        name.strip_prefix("step-")?
            .strip_suffix(".jsonl")?
            .parse()
            .ok()
    };
    let paths = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        Some((step_of(&path)?, path))
    });
    let Some((step, path)) = paths.max() else {
        return Ok(None);
    };
    let wrong = || format!("`{}` is damaged; remove it", path.display());
    let text = std::fs::read_to_string(&path).with_context(wrong)?;
    let answers = text.lines().take(SHOWN).map(serde_json::from_str);
    Ok(Some(PageRollout {
        step,
        answers: answers.collect::<Result<_, _>>().with_context(wrong)?,
    }))
}

/// Takes model, adapter and data sets of a run where none are named; gives the data of one that held its validation
/// rows out of its training data.
pub(super) fn choose(dir: &Path, args: &mut EvalArgs) -> Result<Option<RunData>> {
    let config = TrainConfig::from_file(&dir.join("config.toml"))?;
    let checkpoint = best_checkpoint(dir)?;
    eprintln!("evaluating `{}`", checkpoint.display());
    match config.tuner {
        Tuner::Lora => {
            args.model = Some(config.model.clone());
            args.adapter.adapter.get_or_insert(checkpoint);
        }
        Tuner::Full => args.model = Some(checkpoint),
    }
    if args.load.quantize.is_none()
        && let Some(quantization) = config.quantize.as_ref().and_then(|text| text.parse().ok())
    {
        eprintln!("weights quantised as in the run: {quantization}");
        args.load.quantize = Some(quantization);
    }
    let [min_pixels, max_pixels] = config.pixel_limits();
    args.load.min_pixels.get_or_insert(min_pixels);
    args.load.max_pixels.get_or_insert(max_pixels);
    args.reading.columns.get_or_insert(config.columns.clone());
    args.reading.allow_image_urls |= config.allow_image_urls;
    args.reading.seed = config.seed;
    if args.data.is_none() && args.train_data.is_none() && config.split_dataset_ratio > 0.0 {
        let run = RunData::open(&config, Some(show_fetching))?;
        args.data = run.validation.as_ref().map(|data| data.name().to_owned());
        args.train_data = Some(config.train_data);
        return Ok(Some(run));
    }
    if args.data.is_none() {
        let data = config.val_data.with_context(|| {
            format!(
                "the run in `{}` has no validation data; name a test set with --data",
                dir.display()
            )
        })?;
        args.data = Some(data);
    }
    args.train_data.get_or_insert(config.train_data);
    Ok(None)
}

/// The checkpoint that `best.json` names, else the last one.
fn best_checkpoint(dir: &Path) -> Result<PathBuf> {
    let best = std::fs::read_to_string(dir.join("best.json"))
        .ok()
        .and_then(|text| serde_json::from_str::<Value>(&text).ok())
        .and_then(|best| best.get("step")?.as_u64());
    if let Some(step) = best {
        let path = dir.join(format!("checkpoint-{step}"));
        if path.is_dir() {
            return Ok(path);
        }
    }
    let entries = std::fs::read_dir(dir)
        .with_context(|| format!("cannot read the folder `{}`", dir.display()))?;
    let last = entries.filter_map(|entry| {
        let path = entry.ok()?.path();
        let step: u64 = path
            .file_name()?
            .to_str()?
            .strip_prefix("checkpoint-")?
            .parse()
            .ok()?;
        path.join("COMPLETE.json").is_file().then_some((step, path))
    });
    match last.max() {
        Some((_, path)) => Ok(path),
        None => bail!("`{}` holds no whole checkpoint to evaluate", dir.display()),
    }
}

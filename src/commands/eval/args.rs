//! The arguments of `eval`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::{
    base::device_name::DeviceName,
    commands::{
        shared_args::{AdapterArgs, GenerationArgs, LoadArgs, StudyArgs},
        usage::UsageError,
    },
    eval::findings::UncertainPolicy,
};

/// What a doubtful finding counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Uncertain {
    /// As there: it asks the reader to act.
    Present,
    /// As not there.
    Absent,
    /// The class is left out for that report.
    LeaveOut,
}

impl From<Uncertain> for UncertainPolicy {
    fn from(choice: Uncertain) -> Self {
        match choice {
            Uncertain::Present => Self::AsPresent,
            Uncertain::Absent => Self::AsAbsent,
            Uncertain::LeaveOut => Self::LeaveOut,
        }
    }
}

/// Arguments of `eval`.
#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    /// Predictions, one JSON object a line, as `infer --output`, ms-swift, LLaMA-Factory or vLLM write them.
    ///
    /// Without it, the model writes the reports now.
    #[arg(value_name = "PREDICTIONS.jsonl")]
    pub predictions: Option<PathBuf>,
    /// Test set: JSONL in ms-swift's form, or `phantom:SEED:FROM..TO`. Predictions that hold their references
    /// do without.
    #[arg(long, value_name = "DATA")]
    pub data: Option<String>,
    /// Training set of the baselines; without it they take the test set's own reports.
    #[arg(long, value_name = "DATA")]
    pub train_data: Option<String>,
    /// Folder of a run: its curves go into the page; without predictions and model, its best checkpoint and its
    /// data are evaluated.
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Folder of a Qwen3-VL checkpoint; `model/tiny` without predictions. With predictions it only finds the
    /// nearest training image.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Adapter of the model.
    #[command(flatten)]
    pub adapter: AdapterArgs,
    /// cpu, cuda, cuda:N, wgpu or wgpu:N; by default the best one that answers.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceName>,
    /// How the weights are loaded.
    #[command(flatten)]
    pub load: LoadArgs,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Samples that go through the model at once.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch_size: usize,
    /// Studies: intervals and tests are drawn by them.
    #[command(flatten)]
    pub studies: StudyArgs,
    /// Only the first reports of the test set.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Only the baselines that need no image: no model is loaded.
    #[arg(long, conflicts_with_all = ["predictions", "model", "run"])]
    pub baselines_only: bool,
    /// Do not let the model write about swapped images, which takes as long as the reports themselves.
    #[arg(long)]
    pub no_swapped: bool,
    /// Do not look for the nearest training image.
    #[arg(long)]
    pub no_neighbour: bool,
    /// Another run's predictions on the same test set, to be compared pair by pair.
    #[arg(long, value_name = "OTHER.jsonl")]
    pub compare: Option<PathBuf>,
    /// Key of the answer in the predictions, if it is an unusual one.
    #[arg(long, value_name = "KEY")]
    pub prediction_key: Option<String>,
    /// Key of the reference in the predictions, if it is an unusual one.
    #[arg(long, value_name = "KEY")]
    pub reference_key: Option<String>,
    /// What a doubtful finding counts as, in truth and answer alike.
    #[arg(long, value_enum, default_value = "present")]
    pub uncertain: Uncertain,
    /// Draws of the intervals.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub resamples: usize,
    /// Every score on the terminal; files hold them always.
    #[arg(long)]
    pub all: bool,
    /// Write all scores and cases as JSON.
    #[arg(long, value_name = "FILE.json")]
    pub json: Option<PathBuf>,
    /// Write the page: one file that needs nothing beside it.
    #[arg(long, value_name = "FILE.html")]
    pub html: Option<PathBuf>,
    /// Cases in the page's gallery, the worst first.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub gallery: usize,
    /// Folder of the films, where the predictions name them by other paths.
    #[arg(long, value_name = "DIR")]
    pub images_dir: Option<PathBuf>,
    /// Keep the reports the model wrote, as predictions that `eval` reads.
    #[arg(long, value_name = "FILE.jsonl", conflicts_with_all = ["predictions", "baselines_only"])]
    pub output: Option<PathBuf>,
}

impl EvalArgs {
    /// What can be said to be wrong before anything is read.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |text: &str| -> Result<()> { bail!(UsageError(text.into())) };
        if self.batch_size == 0 {
            wrong("--batch-size is 0, expected at least 1")?;
        }
        if self.resamples == 0 {
            wrong("--resamples is 0, expected at least 1 (1000 is usual)")?;
        }
        if self.limit == Some(0) {
            wrong("--limit is 0, expected at least 1")?;
        }
        // Before hours of generation, not after.
        for path in [&self.json, &self.html, &self.output].into_iter().flatten() {
            let folder = path.parent().unwrap_or(Path::new(""));
            if !folder.as_os_str().is_empty() && !folder.is_dir() {
                wrong(&format!(
                    "`{}`: its folder is not there; make `{}` first",
                    path.display(),
                    folder.display()
                ))?;
            }
        }
        if self.predictions.is_none() && self.prediction_key.is_some() && self.compare.is_none() {
            wrong("--prediction-key: expected PREDICTIONS.jsonl or --compare to read it from")?;
        }
        if self.adapter.adapter.is_some() && self.predictions.is_some() && self.model.is_none() {
            wrong(
                "--adapter: the predictions are there already; name its base with --model, or leave it out",
            )?;
        }
        if self.adapter.adapter.is_some() && self.baselines_only {
            wrong("--adapter: --baselines-only loads no model; leave one of them out")?;
        }
        Ok(())
    }
}

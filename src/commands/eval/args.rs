//! The arguments of `eval`.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use super::export::ExportForm;
use crate::{
    base::device_name::DeviceName,
    commands::{
        models::DownloadArgs,
        shared_args::{AdapterArgs, GenerationArgs, LoadArgs, ReadingArgs, StudyArgs},
        usage::UsageError,
    },
    eval::{findings::UncertainPolicy, text::TextLanguage},
};

/// What a doubtful finding counts as.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Uncertain {
    /// As present: it calls for action.
    Present,
    /// As absent.
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

/// What the words of the text scores are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Words {
    /// Those of jieba.
    Chinese,
    /// Whole words in lower case, without signs.
    English,
}

impl From<Words> for TextLanguage {
    fn from(choice: Words) -> Self {
        match choice {
            Words::Chinese => Self::Chinese,
            Words::English => Self::English,
        }
    }
}

/// Arguments of `eval`.
#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    /// Predictions, one JSON object per line, as written by `infer --output`, ms-swift, LLaMA-Factory or
    /// vLLM.
    ///
    /// Without it, the model generates the reports.
    #[arg(value_name = "PREDICTIONS.jsonl")]
    pub predictions: Option<PathBuf>,
    /// Test set: a data file that `train` reads, or `phantom:SEED:FROM..TO`. Not needed for predictions that
    /// contain their references.
    #[arg(long, value_name = "DATA")]
    pub data: Option<String>,
    /// Training set of the baselines; without it they use the reports of the test set.
    #[arg(long, value_name = "DATA")]
    pub train_data: Option<String>,
    /// How the data files are read.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Folder of a training run, whose curves are shown on the page. Without predictions and model, its best
    /// checkpoint is evaluated on its validation data.
    #[arg(long, value_name = "DIR")]
    pub run: Option<PathBuf>,
    /// Folder or name of a Qwen3-VL checkpoint, as in `infer` [default without predictions: model/tiny]. With
    /// predictions it is only used to find the nearest training image.
    #[arg(long, value_name = "DIR|ID")]
    pub model: Option<PathBuf>,
    /// Downloads.
    #[command(flatten)]
    pub download: DownloadArgs,
    /// Adapter of the model.
    #[command(flatten)]
    pub adapter: AdapterArgs,
    /// cpu, cuda, cuda:N, wgpu or wgpu:N; the default is the fastest one available.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceName>,
    /// How the weights are loaded.
    #[command(flatten)]
    pub load: LoadArgs,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Number of samples processed together.
    #[arg(long, value_name = "N", default_value_t = 8)]
    pub batch_size: usize,
    /// Studies: intervals and tests are drawn by them.
    #[command(flatten)]
    pub studies: StudyArgs,
    /// Evaluate only this many reports, the first of the test set.
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Score only the baselines that need no image; no model is loaded.
    #[arg(long, conflicts_with_all = ["predictions", "model", "run"])]
    pub baselines_only: bool,
    /// Skip the reports on images swapped between studies, which take as long as the reports themselves.
    #[arg(long)]
    pub no_swapped: bool,
    /// Skip the baseline of the nearest training image.
    #[arg(long)]
    pub no_neighbour: bool,
    /// Predictions of another model on the same test set, to compare pair by pair.
    #[arg(long, value_name = "OTHER.jsonl")]
    pub compare: Option<PathBuf>,
    /// Key of the rows by whose values the scores are also given, such as the view, age or site; may be repeated.
    /// Without it, keys with the usual names are used, and reported. Ages become bands.
    #[arg(long, value_name = "KEY", conflicts_with = "no_subgroups")]
    pub subgroup: Vec<String>,
    /// Give no scores by subgroup.
    #[arg(long)]
    pub no_subgroups: bool,
    /// Probabilities of findings about the same images, as `infer --findings --output` writes them; without it, those
    /// of the predictions, where they have some.
    #[arg(long, value_name = "FILE.jsonl", conflicts_with = "baselines_only")]
    pub probabilities: Option<PathBuf>,
    /// Key of the answer in the predictions, if it is not found by itself.
    #[arg(long, value_name = "KEY")]
    pub prediction_key: Option<String>,
    /// Key of the reference in the predictions, if it is not found by itself.
    #[arg(long, value_name = "KEY")]
    pub reference_key: Option<String>,
    /// How an uncertain finding is counted, in reference and, without --uncertain-answer, in the answer.
    #[arg(long, value_enum, default_value = "present")]
    pub uncertain: Uncertain,
    /// How an uncertain finding of the answer is counted, where that differs from --uncertain: with `absent`,
    /// hedging a certain finding costs.
    #[arg(long, value_enum)]
    pub uncertain_answer: Option<Uncertain>,
    /// Language of the reports, which decides what a word of the text scores is; guessed from the references when not
    /// given.
    #[arg(long, value_enum)]
    pub language: Option<Words>,
    /// Table of words that findings are read with: `openi` (machine-translated), `hospital`, `english`, or a file in
    /// the form of theirs; guessed from the references when not given.
    #[arg(long, value_name = "NAME|FILE.toml")]
    pub rules: Option<String>,
    /// Send every reference with its answer to this judge, a server of OpenAI's form such as http://HOST:PORT/v1, which
    /// names errors of GREEN's six kinds. Nothing is sent without it; the page says where the reports went.
    #[arg(long, value_name = "URL", conflicts_with = "baselines_only")]
    pub judge: Option<String>,
    /// Model of the judge; not needed where its server has one.
    #[arg(long, value_name = "NAME", requires = "judge")]
    pub judge_model: Option<String>,
    /// Name of the environment variable that holds the judge's key.
    #[arg(long, value_name = "VARIABLE", requires = "judge")]
    pub judge_key_env: Option<String>,
    /// Have the judge look at phantoms' reports with planted errors as well, and report how many it finds.
    #[arg(long, requires = "judge")]
    pub judge_check: bool,
    /// Requests to the judge at a time.
    #[arg(long, value_name = "N", default_value_t = 4, requires = "judge")]
    pub judge_concurrency: usize,
    /// Longest wait for one answer of the judge.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 120,
        requires = "judge"
    )]
    pub judge_timeout_seconds: u64,
    /// Keep the judge's answers here, so that a run that ended early goes on [default: beside --json, --html or --output, with
    /// the ending judge.jsonl].
    #[arg(long, value_name = "FILE.jsonl", requires = "judge")]
    pub judge_cache: Option<PathBuf>,
    /// Write references and answers for another program: `radeval` has the lists `references` and `hypotheses`; `rexrank`
    /// has by study `section_findings`, `section_impression` (from the headings) and `model_prediction`.
    #[arg(long, num_args = 2, value_names = ["radeval|rexrank", "FILE.json"])]
    pub export: Vec<String>,
    /// Bootstrap samples for the confidence intervals.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    pub resamples: usize,
    /// Print every score; files always contain all of them.
    #[arg(long)]
    pub all: bool,
    /// Write all scores and cases as JSON.
    #[arg(long, value_name = "FILE.json")]
    pub json: Option<PathBuf>,
    /// Write the results as an HTML page, a single file.
    #[arg(long, value_name = "FILE.html")]
    pub html: Option<PathBuf>,
    /// Number of cases in the page's gallery, the worst first.
    #[arg(long, value_name = "N", default_value_t = 24)]
    pub gallery: usize,
    /// Folder of the images, if the paths in the predictions are not valid here.
    #[arg(long, value_name = "DIR")]
    pub images_dir: Option<PathBuf>,
    /// Save the generated reports as predictions that `eval` can read.
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
        if self.judge_concurrency == 0 {
            wrong("--judge-concurrency is 0, expected at least 1")?;
        }
        if self.judge_timeout_seconds == 0 {
            wrong("--judge-timeout-seconds is 0, expected at least 1")?;
        }
        if let [form, _] = &self.export[..] {
            ExportForm::named(form)?;
        }
        if self.limit == Some(0) {
            wrong("--limit is 0, expected at least 1")?;
        }
        // Before hours of generation, not after.
        let exported = self.export.get(1).map(PathBuf::from);
        let files = [
            &self.json,
            &self.html,
            &self.output,
            &self.judge_cache,
            &exported,
        ];
        for path in files.into_iter().flatten() {
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

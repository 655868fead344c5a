//! `convert`: a corpus of reports and images to training and validation files.

use std::io::{Write, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::check::image_processor;
use super::models::{DownloadArgs, find};
use super::shared_args::{ReadingArgs, StudyArgs};
use super::shell::unless_closed;
use super::shipped::shipped;
use super::usage::UsageError;
use crate::base::hub::Want;
use crate::dataset::convert::{ConvertOptions, CorpusKeys, Split, convert, read_prompts};
use crate::processor::tokenizer::Tokenizer;

/// What stays on one side of the split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SplitName {
    /// All images of a study, and all studies of a patient where patients are known.
    #[value(alias = "study")]
    Uid,
    /// Single rows, as published: views of one study, and their common report, can be on both sides.
    Image,
}

impl From<SplitName> for Split {
    fn from(name: SplitName) -> Self {
        match name {
            SplitName::Uid => Self::Uid,
            SplitName::Image => Self::Image,
        }
    }
}

/// Arguments of `convert`.
#[derive(Debug, Clone, Args)]
pub struct ConvertArgs {
    /// Corpus: OpenI-zh's `annotations` or `img`/`prompt`/`label` rows, any data file that `train` reads, or JSON
    /// rows with other keys, given by --image-key and --report-key.
    #[arg(value_name = "INPUT.json")]
    pub input: PathBuf,
    /// Key of the image (a path or a list of paths) in a corpus of another format: JSON rows, one per line,
    /// as a list, or as lists under keys such as `train`.
    #[arg(long, value_name = "KEY", requires = "report_key")]
    pub image_key: Option<String>,
    /// Key of the report in a corpus of another format.
    #[arg(long, value_name = "KEY", requires = "image_key")]
    pub report_key: Option<String>,
    /// How rows are read that `train` reads.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Folder of the images; not needed for JSONL rows whose paths are valid.
    ///
    /// The path of a row is looked for below it, then the path without its leading folders one by one, then
    /// the file name in any folder. A file that matches two paths is an error.
    #[arg(long, value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Folder for train.jsonl, val.jsonl, missing.txt, summary.json and histograms; new or empty.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Questions to draw from, one per line; the default are the twelve of the published training.
    ///
    /// JSONL rows keep the question they have unless this is given.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// Seed of the questions, the order and the split; 42 is the published one.
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// Share of the rows for validation; 0 puts all into train.jsonl.
    #[arg(long, value_name = "F", default_value_t = 0.05)]
    pub val_ratio: f64,
    /// What stays on one side of the split.
    #[arg(long, value_enum, default_value = "uid")]
    pub split: SplitName,
    /// Studies.
    #[command(flatten)]
    pub studies: StudyArgs,
    /// Distilled reasoning by image_id (JSON or JSONL): answers become `<think>` blocks with the report.
    ///
    /// Rows without reasoning are left out and listed in missing.txt.
    #[arg(long, value_name = "FILE")]
    pub thinking: Option<PathBuf>,
    /// Folder or name of the checkpoint to be trained; its tokenizer is used to count tokens.
    #[arg(long, value_name = "DIR|ID")]
    pub model: Option<PathBuf>,
    /// Downloads; of the model, all but the weights.
    #[command(flatten)]
    pub download: DownloadArgs,
}

/// Runs `convert`; the summary goes to stdout.
///
/// # Errors
/// Anything that kept the files from being written.
pub fn run(args: ConvertArgs) -> Result<()> {
    if !(0.0..1.0).contains(&args.val_ratio) {
        let ratio = args.val_ratio;
        bail!(UsageError(format!(
            "--val-ratio is {ratio}, expected 0 or more and less than 1"
        )));
    }
    let model = args.model.as_deref();
    let model = model.map(|model| find(model, Want::Description, args.download));
    let model = model.transpose()?;
    let tokenizer = match &model {
        Some(model) => Some(Tokenizer::from_folder(model)?),
        None => None,
    };
    let processor = image_processor(model.as_deref(), None, None)?;
    let prompts = match &args.prompts {
        Some(path) => {
            let prompts = read_prompts(path);
            Some(prompts.with_context(|| format!("questions of `{}`", path.display()))?)
        }
        None => None,
    };
    let options = ConvertOptions {
        keys: args
            .image_key
            .zip(args.report_key)
            .map(|(image, report)| CorpusKeys { image, report }),
        reading: args.reading.options(),
        input: shipped(&args.input),
        images: args.images.as_deref().map(shipped),
        output: args.output,
        prompts,
        seed: args.seed,
        val_ratio: args.val_ratio,
        split: args.split.into(),
        studies: args.studies.rule()?,
        thinking: args.thinking,
    };
    let summary = convert(&options, tokenizer.as_ref(), &processor)?;
    unless_closed(write!(stdout().lock(), "{summary}")).context("cannot print the summary")
}

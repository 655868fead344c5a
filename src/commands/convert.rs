//! `convert`: a corpus of reports and images to training and validation files.

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use super::check::{expect_once, image_processor};
use super::models::{DownloadArgs, find};
use super::progress::{Progress, Unit};
use super::shared_args::{ReadingArgs, StudyArgs};
use super::shell::unless_closed;
use super::shipped::shipped;
use super::usage::UsageError;
use crate::base::hub::Want;
use crate::dataset::convert::{
    ConvertOptions, CorpusForm, CorpusKeys, Sections, Split, Views, convert, read_prompts,
};
use crate::dataset::files_like;
use crate::processor::tokenizer::Tokenizer;

/// What stays on one side of the split.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum SplitName {
    /// All images of a study, and all studies of a patient where patients are known.
    #[value(alias = "study")]
    Uid,
    /// Single rows, as published for OpenI-zh: views of one study, and their common report, can be on both sides.
    Image,
    /// What the corpus says itself: its training, validation and test part.
    Official,
}

impl From<SplitName> for Split {
    fn from(name: SplitName) -> Self {
        match name {
            SplitName::Uid => Self::Uid,
            SplitName::Image => Self::Image,
            SplitName::Official => Self::Official,
        }
    }
}

/// What becomes of several views of a study.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ViewsName {
    /// One row with all images.
    All,
    /// A row for each frontal image (PA and AP).
    Frontal,
    /// A row for each image, as in the published training.
    OnePerImage,
}

impl From<ViewsName> for Views {
    fn from(name: ViewsName) -> Self {
        match name {
            ViewsName::All => Self::All,
            ViewsName::Frontal => Self::Frontal,
            ViewsName::OnePerImage => Self::OnePerImage,
        }
    }
}

/// Which sections of a report are the answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum SectionsName {
    /// The findings alone; rows without are left out.
    Findings,
    /// The impression alone; rows without are left out.
    Impression,
    /// Both, each after its heading; the whole report where it is not divided.
    #[default]
    Both,
}

impl From<SectionsName> for Sections {
    fn from(name: SectionsName) -> Self {
        match name {
            SectionsName::Findings => Self::Findings,
            SectionsName::Impression => Self::Impression,
            SectionsName::Both => Self::Both,
        }
    }
}

/// Arguments of `convert`.
#[derive(Debug, Clone, Args)]
pub struct ConvertArgs {
    /// Corpus: its folder, its table or list, or a data file.
    ///
    /// Which corpus it is, is guessed from its files and reported: OpenI-zh (`annotations`, or
    /// `img`/`prompt`/`label`), R2Gen's annotation.json (IU X-Ray, MIMIC-CXR), the Indiana collection of Kaggle,
    /// MIMIC-CXR and MIMIC-CXR-JPG, CheXpert Plus, PadChest, ROCO, VinDr-CXR, JSON rows or a table (CSV) with columns
    /// such as `image` and `report`, or 文件名, 影像所见 and 影像诊断, and any data file that `train` reads. Tables may be
    /// packed with gzip, and in UTF-8, UTF-16 or GB18030. Several of one form go into one output; an `id` that two files
    /// have gets the name of its file. A `*` in a file name stands for any text, in quotes as well.
    #[arg(value_name = "SOURCE", required_unless_present = "source_json", num_args = 1..)]
    pub source: Vec<PathBuf>,
    /// The same as SOURCE, as the published script has it.
    ///
    /// With this flag rows are split one by one, as that script does, unless --split is given.
    #[arg(
        long,
        alias = "source_json",
        value_name = "FILE",
        conflicts_with = "source"
    )]
    pub source_json: Option<PathBuf>,
    /// Which corpus it is: openi-zh, xrayglm, messages, r2gen, indiana, mimic-cxr, chexpert-plus, padchest, roco,
    /// vindr-cxr, rows (JSON) or table (CSV); guessed by default.
    #[arg(long, value_name = "NAME")]
    pub corpus: Option<CorpusForm>,
    /// Key of the image (a path or a list of paths) in a corpus of another format: JSON rows, one per line,
    /// as a list, or as lists under keys such as `train`.
    #[arg(long, alias = "image_key", value_name = "KEY", requires = "report_key")]
    pub image_key: Option<String>,
    /// Key of the report in a corpus of another format.
    #[arg(long, alias = "report_key", value_name = "KEY", requires = "image_key")]
    pub report_key: Option<String>,
    /// How rows are read that `train` reads.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Folder of the images; by default they are looked for in the folder of the corpus. Rows in ms-swift's format name
    /// their own.
    ///
    /// The path of a row is looked for below it or below one of its first folders, then the path without its leading
    /// folders one by one, then the file name in any folder, if only one has it. `.jpg` and `.png` are
    /// found for `.dcm`, and `.dcm.png`. A file that matches two paths is an error.
    #[arg(long, aliases = ["images_dir", "images-dir"], value_name = "DIR")]
    pub images: Option<PathBuf>,
    /// Folder for train.jsonl, val.jsonl, test.jsonl (of a corpus with such a part), missing.txt, summary.json and
    /// histograms; new or empty.
    #[arg(long, aliases = ["output_dir", "output-dir"], value_name = "DIR")]
    pub output: PathBuf,
    /// Replace the files of an earlier conversion in the output folder; other files in it stay.
    #[arg(long)]
    pub overwrite: bool,
    /// Convert even if more than half of the rows have no image or no text.
    #[arg(long, alias = "allow_missing")]
    pub allow_missing: bool,
    /// Question; may be given several times, and one is drawn for each row.
    ///
    /// The default are the twelve of the published training, in the language of the reports (Chinese, English or
    /// Spanish). JSONL rows keep the question they have unless this or --prompts is given.
    #[arg(long, value_name = "TEXT", conflicts_with = "prompts")]
    pub prompt: Vec<String>,
    /// Questions to draw from, one per line.
    #[arg(long, value_name = "FILE")]
    pub prompts: Option<PathBuf>,
    /// What becomes of several views of a study; the default is one-per-image for corpora, and `all` for JSON rows and
    /// tables, whose rows stay as they are.
    #[arg(long, value_enum)]
    pub views: Option<ViewsName>,
    /// Which sections of a report are the answer.
    #[arg(long, value_enum, default_value = "both")]
    pub sections: SectionsName,
    /// Seed of the questions, the order and the split; 42 is the published one.
    #[arg(long, value_name = "N", default_value_t = 42)]
    pub seed: u64,
    /// Share of the rows for validation, 0.05 by default; 0 puts all into train.jsonl.
    #[arg(long, aliases = ["val_ratio", "split_ratio", "split-ratio"], value_name = "F")]
    pub val_ratio: Option<f64>,
    /// What stays on one side of the split; the default is the corpus' own split where it has one, else uid.
    #[arg(long, value_enum)]
    pub split: Option<SplitName>,
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
    if let Some(ratio) = args.val_ratio.filter(|ratio| !(0.0..1.0).contains(ratio)) {
        bail!(UsageError(format!(
            "--val-ratio is {ratio}, expected 0 or more and less than 1"
        )));
    }
    let model = args.model.as_deref();
    let model = model.map(|model| find(model, Want::Description, args.download));
    let model = model.transpose()?;
    let as_script = args.source_json.is_some();
    let mut inputs = Vec::new();
    for source in args.source.iter().chain(&args.source_json) {
        for file in files_like(&shipped(source))? {
            expect_once(&inputs, &file)?;
            inputs.push(file);
        }
    }
    let Some((input, more_inputs)) = inputs.split_first() else {
        bail!(UsageError("SOURCE is missing".into()));
    };
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
        None => Some(args.prompt).filter(|prompts| !prompts.is_empty()),
    };
    let by_script = as_script && args.split.is_none();
    let options = ConvertOptions {
        corpus: args.corpus,
        keys: args
            .image_key
            .zip(args.report_key)
            .map(|(image, report)| CorpusKeys { image, report }),
        reading: args.reading.options(),
        images: args.images.as_deref().map(shipped),
        overwrite: args.overwrite,
        allow_missing: args.allow_missing,
        prompts,
        views: args.views.map(Into::into),
        sections: args.sections.into(),
        seed: args.seed,
        val_ratio: args.val_ratio,
        split: match args.split {
            None if by_script => Some(Split::Image),
            split => split.map(Into::into),
        },
        studies: args.studies.rule()?,
        thinking: args.thinking,
        more_inputs: more_inputs.to_vec(),
        ..ConvertOptions::new(input, args.output)
    };
    let progress = Mutex::new(Progress::new("rows", 0, Unit::Items));
    let summary = convert(&options, tokenizer.as_ref(), &processor, &|done, total| {
        if let Ok(mut progress) = progress.lock() {
            progress.set(done as u64, total as u64);
        }
    });
    if let Ok(progress) = progress.into_inner() {
        progress.finish();
    }
    let summary = summary?;
    let mut text = summary.to_string();
    if by_script {
        text.push_str(
            "note: --source_json splits rows one by one, as the published script does; `--split uid` keeps the views of a study on one side\n",
        );
    }
    unless_closed(write!(stdout().lock(), "{text}")).context("cannot print the summary")
}

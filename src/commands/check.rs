//! `check`: whether data files can be trained on, before anything is loaded for it.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::models::{DownloadArgs, find};
use super::progress::{Progress, Unit};
use super::shared_args::{ReadingArgs, StudyArgs};
use super::shell::unless_closed;
use super::shipped::shipped_data;
use super::usage::UsageError;
use crate::base::files::is_same_file;
use crate::base::hub::Want;
use crate::dataset::check::{Check, CheckReport};
use crate::dataset::data_names;
use crate::processor::chat::ChatTemplate;
use crate::processor::patches::{ImageProcessor, ImageProcessorConfig};
use crate::processor::tokenizer::Tokenizer;
use crate::study::counted;

/// Arguments of `check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Training data, as `train` takes it: data files in any form that it reads, several with commas or blanks between
    /// them, each perhaps with a name, a weight and a number of rows (`zh=a.jsonl:2,b.parquet#500`).
    ///
    /// All rows are checked, each once, whatever its weight.
    #[arg(value_name = "DATA", required = true, num_args = 1..)]
    pub data: Vec<String>,
    /// Validation data, as well; also checked for images, studies and reports that are in the training data.
    #[arg(long, value_name = "VAL")]
    pub val: Option<String>,
    /// How the data files are read.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Studies, which are not to be on both sides.
    #[command(flatten)]
    pub studies: StudyArgs,
    /// Folder or name of the checkpoint to be trained; its tokenizer counts the tokens.
    #[arg(long, value_name = "DIR|ID", default_value = "model/tiny")]
    pub model: PathBuf,
    /// Downloads; of the model, all but the weights.
    #[command(flatten)]
    pub download: DownloadArgs,
    /// Maximum number of tokens of a sample, image tokens included.
    #[arg(long, value_name = "N", default_value_t = 2048)]
    pub max_length: usize,
    /// Smallest size an image is scaled to, in pixels.
    #[arg(long, value_name = "PIXELS")]
    pub min_pixels: Option<usize>,
    /// Largest size an image is scaled to, in pixels; 1,024 pixels are one token.
    #[arg(long, value_name = "PIXELS")]
    pub max_pixels: Option<usize>,
    /// Print one JSON object per problem, and one with counts at the end.
    #[arg(long)]
    pub json: bool,
}

/// Runs `check`: findings go to stdout, one a line.
///
/// # Errors
/// Any error found, counted in the message; or files that cannot be read at all.
pub fn run(args: CheckArgs) -> Result<()> {
    if args.max_length == 0 {
        bail!(UsageError("--max-length is 0, expected at least 1".into()));
    }
    let model = find(&args.model, Want::Description, args.download)?;
    let tokenizer = Tokenizer::from_folder(&model)
        .context("the tokens of the samples cannot be counted; hint: `--model` names the folder of a checkpoint")?;
    let template = ChatTemplate::find(&model, None)?;
    let processor = image_processor(Some(&model), args.min_pixels, args.max_pixels)?;
    let check = Check {
        tokenizer: &tokenizer,
        processor: &processor,
        max_length: args.max_length,
        opens_thinking: template.map(|template| template.opens_thinking()),
        studies: args.studies.rule()?,
        options: args.reading.options(),
    };
    let train = data_files(&args.data)?;
    let val = match &args.val {
        Some(val) => data_files(std::slice::from_ref(val))?,
        None => Vec::new(),
    };
    let progress = Mutex::new(Progress::new("images", 0, Unit::Items));
    let report = check.run(&train, &val, &|done, total| {
        if let Ok(mut progress) = progress.lock() {
            progress.set(done as u64, total as u64);
        }
    });
    if let Ok(progress) = progress.into_inner() {
        progress.finish();
    }
    let report = report?;
    unless_closed(print(&report, args.json)).context("cannot print the findings")?;
    if report.errors > 0 {
        bail!(
            "{} errors and {} warnings in {}; every one is listed above",
            report.errors,
            report.warnings,
            names(&report)
        );
    }
    Ok(())
}

/// The files of the data sets that some texts name.
fn data_files(texts: &[String]) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for text in texts {
        for name in data_names(&shipped_data(text))? {
            if name.is_drawn() {
                eprintln!(
                    "`{}` is drawn and no file: there is nothing to check",
                    name.path
                );
                continue;
            }
            for file in name.files()?.into_iter().map(PathBuf::from) {
                expect_once(&files, &file)?;
                files.push(file);
            }
        }
    }
    if files.is_empty() {
        bail!(UsageError(format!(
            "`{}` names no data file",
            texts.join(" ")
        )));
    }
    Ok(files)
}

/// Refuses a file that is among `files` already.
pub(super) fn expect_once(files: &[PathBuf], file: &Path) -> Result<()> {
    if files.iter().any(|other| is_same_file(other, file)) {
        bail!(UsageError(format!(
            "`{}` is named twice; name each file once",
            file.display()
        )));
    }
    Ok(())
}

fn names(report: &CheckReport) -> String {
    let names: Vec<String> = report
        .files
        .iter()
        .map(|file| format!("`{}`", file.file.display()))
        .collect();
    names.join(" and ")
}

fn print(report: &CheckReport, json: bool) -> std::io::Result<()> {
    let mut out = stdout().lock();
    for finding in &report.findings {
        if json {
            writeln!(out, "{}", serde_json::to_string(finding)?)?;
        } else {
            writeln!(out, "{finding}")?;
        }
    }
    if json {
        return writeln!(out, "{}", serde_json::to_string(report)?);
    }
    for file in &report.files {
        writeln!(
            out,
            "{}: {}",
            file.file.display(),
            counted(file.rows, "row", "rows")
        )?;
    }
    if let Some(tokens) = &report.row_tokens {
        writeln!(
            out,
            "tokens a row: {} to {}, {:.0} on average",
            tokens.min, tokens.max, tokens.mean
        )?;
    }
    if report.too_long > 0 {
        let rows: usize = report.files.iter().map(|file| file.rows).sum();
        let share = 100.0 * report.too_long as f64 / rows as f64;
        writeln!(
            out,
            "{} of {rows} rows ({share:.1} %) longer than max_length: training ends at the first, or leaves them out with `overlong = \"skip\"`",
            report.too_long
        )?;
    }
    if let Some(study) = &report.study {
        writeln!(out, "{}", study.english())?;
    }
    writeln!(
        out,
        "{}, {}, {}",
        counted(report.images, "image", "images"),
        counted(report.errors, "error", "errors"),
        counted(report.warnings, "warning", "warnings")
    )
}

/// The image sizes of a checkpoint at the pixel limits of the training recipe, or at those given.
pub(super) fn image_processor(
    model: Option<&Path>,
    min_pixels: Option<usize>,
    max_pixels: Option<usize>,
) -> Result<ImageProcessor> {
    let mut config = match model {
        Some(model) if model.join("preprocessor_config.json").is_file() => {
            ImageProcessorConfig::from_dir(model)?
        }
        _ => ImageProcessorConfig::default(),
    };
    if let Some(pixels) = min_pixels {
        config.min_pixels = pixels;
    }
    if let Some(pixels) = max_pixels {
        config.max_pixels = pixels;
    }
    Ok(ImageProcessor::new(config)?)
}

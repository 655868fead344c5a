//! `check`: whether data files can be trained on, before anything is loaded for it.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use clap::Args;

use super::progress::{Progress, Unit};
use super::shared_args::{ReadingArgs, StudyArgs};
use super::shell::{shipped, unless_closed};
use super::usage::UsageError;
use crate::dataset::check::{Check, CheckReport};
use crate::processor::chat::ChatTemplate;
use crate::processor::patches::{ImageProcessor, ImageProcessorConfig};
use crate::processor::tokenizer::Tokenizer;

/// Arguments of `check`.
#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    /// Data file: JSONL, JSON, CSV, TSV or Parquet, in any form that `train` reads.
    #[arg(value_name = "DATA")]
    pub data: PathBuf,
    /// Validation file; also checked for images, studies and reports that are in the data file.
    #[arg(long, value_name = "VAL")]
    pub val: Option<PathBuf>,
    /// How the data files are read.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Studies, which are not to be on both sides.
    #[command(flatten)]
    pub studies: StudyArgs,
    /// Folder of the checkpoint to be trained; its tokenizer counts the tokens.
    #[arg(long, value_name = "DIR", default_value = "model/tiny")]
    pub model: PathBuf,
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
    let model = shipped(&args.model);
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
    let progress = Mutex::new(Progress::new("images", 0, Unit::Items));
    let report = check.run(&args.data, args.val.as_deref(), &|done, total| {
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
        writeln!(out, "{}: {} rows", file.file.display(), file.rows)?;
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
        "{} images, {} errors, {} warnings",
        report.images, report.errors, report.warnings
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

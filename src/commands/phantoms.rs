//! `phantoms`: a data set of synthetic studies as files.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::{
    base::files::size_text,
    phantom::{Dialect, PROMPTS, write_dataset},
    study::counted,
};

/// Arguments of `phantoms`.
#[derive(Debug, Args)]
pub struct PhantomsArgs {
    /// Folder to write; must be new or empty.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Seed of the studies.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// First study.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub from: u64,
    /// Number of studies.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub count: u64,
    /// Short reports instead of full ones.
    #[arg(long)]
    pub plain: bool,
}

/// Runs `phantoms`.
///
/// # Errors
/// The folder cannot be written, or holds something already.
pub fn run(args: &PhantomsArgs) -> Result<()> {
    let dialect = if args.plain {
        Dialect::Plain
    } else {
        Dialect::House
    };
    let range = args.from..args.from.saturating_add(args.count);
    let summary = write_dataset(&args.output, args.seed, range, dialect, &PROMPTS)?;
    println!(
        "{}, {} of them normal, {}, {} of images; `{}`",
        counted(summary.samples, "study", "studies"),
        summary.normal,
        counted(summary.findings, "finding", "findings"),
        size_text(summary.image_bytes),
        summary.samples_file.display()
    );
    Ok(())
}

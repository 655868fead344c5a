//! `phantoms`: a data set of synthetic studies as files.

use anyhow::Result;

use crate::{
    base::files::size_text,
    cli::PhantomsArgs,
    commands::counted,
    phantom::{Dialect, PROMPTS, write_dataset},
};

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

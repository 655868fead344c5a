//! `phantoms`: a data set of synthetic studies as files.

use anyhow::Result;

use crate::{
    cli::PhantomsArgs,
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
        "{} studies, {} of them normal, {} findings, {} KiB of images; `{}`",
        summary.samples,
        summary.normal,
        summary.findings,
        summary.image_bytes / 1024,
        summary.samples_file.display()
    );
    Ok(())
}

//! `clean`: translation defects of a corpus, row by row, and a corrected copy; nothing changes in silence.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fs,
    io::{Write, stdout},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use serde_json::json;

use super::usage::UsageError;
use crate::{
    base::{files::write_atomic, text_file::read_text},
    eval::clean::{
        Correction, Defect, TermTable, apply, correct_json, count_defects, read_rows, to_jsonl,
        unified_diff,
    },
};

/// Arguments of `clean`.
#[derive(Debug, Clone, Args)]
pub struct CleanArgs {
    /// Corpus: OpenI-zh's `annotations` or `img`/`prompt`/`label` rows, or JSON or JSONL in ms-swift's
    /// format.
    #[arg(value_name = "INPUT.json")]
    pub input: PathBuf,
    /// The English reports that the corpus was translated from, in the same formats; some defects are only
    /// found with them.
    #[arg(long, value_name = "FILE.json")]
    pub english: Option<PathBuf>,
    /// Write a corrected copy, and the changes beside it as FILE.diff.
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Write the changes as a unified diff, also without a corrected copy.
    #[arg(long, value_name = "FILE.diff")]
    pub diff: Option<PathBuf>,
    /// Write every defect found, one JSON object per line.
    #[arg(long, value_name = "FILE.jsonl")]
    pub report: Option<PathBuf>,
    /// Only these defects, by name; may be given several times.
    #[arg(long, value_name = "NAME")]
    pub only: Vec<String>,
    /// Not these defects; may be given several times.
    #[arg(long, value_name = "NAME")]
    pub skip: Vec<String>,
    /// Table of terms to use instead of the built-in one, TOML in the same format.
    #[arg(long, value_name = "FILE.toml")]
    pub terms: Option<PathBuf>,
    /// Print only the counts.
    #[arg(long)]
    pub summary: bool,
    /// Print one JSON object per defect, and one with counts at the end.
    #[arg(long)]
    pub json: bool,
}

/// Runs `clean`: places and counts go to stdout.
///
/// # Errors
/// Files that cannot be read or written, with file and row; defects that no term has.
pub fn run(args: &CleanArgs) -> Result<()> {
    let own_table = args.terms.as_deref().map(read_terms).transpose()?;
    let table = own_table.as_ref().unwrap_or_else(|| TermTable::built_in());
    let wanted = wanted_names(args, table)?;
    check_paths(args)?;
    let text = read(&args.input)?;
    let sources: BTreeMap<String, String> = match &args.english {
        Some(path) => read_rows(&name(path), &read(path)?, &BTreeMap::new())?
            .into_iter()
            .map(|row| (row.id, row.text))
            .collect(),
        None => BTreeMap::new(),
    };
    let file = name(&args.input);
    let rows = read_rows(&file, &text, &sources)?;
    if args.english.is_some() {
        let known = rows.iter().filter(|row| row.source.is_some()).count();
        eprintln!("{known} of {} rows have their English report", rows.len());
    }
    let mut defects = table.find_defects(&rows);
    defects.retain(|defect| wanted.contains(&defect.defect));
    let corrections = apply(&rows, &defects)?;
    print(args, rows.len(), &defects, &corrections).context("cannot write to stdout")?;

    if let Some(path) = &args.report {
        let lines = to_jsonl(&defects)?;
        write_atomic(path, |out| out.write_all(lines.as_bytes()))?;
    }
    let diff = unified_diff(&corrections);
    let beside = args.output.as_deref().map(diff_of);
    for path in args.diff.iter().chain(&beside) {
        write_atomic(path, |out| out.write_all(diff.as_bytes()))?;
        eprintln!("changes: `{}`", path.display());
    }
    if let Some(path) = &args.output {
        let corrected = correct_json(&file, &text, &corrections)?;
        write_atomic(path, |out| out.write_all(corrected.as_bytes()))?;
        eprintln!("corrected copy: `{}`", path.display());
    }
    Ok(())
}

fn name(path: &Path) -> String {
    path.display().to_string()
}

fn read(path: &Path) -> Result<String> {
    const LIMIT: u64 = 4 << 30;
    Ok(read_text(path, LIMIT)?.text)
}

fn read_terms(path: &Path) -> Result<TermTable> {
    let text = fs::read_to_string(path)
        .with_context(|| format!("cannot read the terms `{}`", path.display()))?;
    TermTable::from_toml(&text).with_context(|| format!("`{}`", path.display()))
}

/// Names of the defects to look for.
fn wanted_names(args: &CleanArgs, table: &TermTable) -> Result<BTreeSet<String>> {
    let known: BTreeSet<String> = table.defects().map(str::to_owned).collect();
    if let Some(unknown) = args
        .only
        .iter()
        .chain(&args.skip)
        .find(|n| !known.contains(*n))
    {
        let known: Vec<&str> = known.iter().map(String::as_str).collect();
        bail!(UsageError(format!(
            "`{unknown}` is no defect of the term table; expected one of {}",
            known.join(", ")
        )));
    }
    let all = known.into_iter();
    Ok(all
        .filter(|name| args.only.is_empty() || args.only.contains(name))
        .filter(|name| !args.skip.contains(name))
        .collect())
}

fn diff_of(output: &Path) -> PathBuf {
    let mut path = OsString::from(output.as_os_str());
    path.push(".diff");
    PathBuf::from(path)
}

/// The corpus itself stays as it is.
fn check_paths(args: &CleanArgs) -> Result<()> {
    let same = |a: &Path, b: &Path| match (a.canonicalize(), b.canonicalize()) {
        (Ok(a), Ok(b)) => a == b,
        _ => a == b,
    };
    let written = [&args.output, &args.diff, &args.report];
    for path in written.into_iter().flatten() {
        let inputs = std::iter::once(&args.input).chain(&args.english);
        if let Some(input) = inputs.into_iter().find(|input| same(input, path)) {
            bail!(UsageError(format!(
                "`{}` would be overwritten; name another file",
                input.display()
            )));
        }
    }
    Ok(())
}

fn print(
    args: &CleanArgs,
    rows: usize,
    defects: &[Defect],
    corrections: &[Correction],
) -> std::io::Result<()> {
    let mut out = stdout().lock();
    for defect in defects.iter().filter(|_| !args.summary) {
        if args.json {
            writeln!(out, "{}", serde_json::to_string(defect)?)?;
            continue;
        }
        let after = defect.after.as_ref().map_or_else(
            || "left to a reader".to_owned(),
            |after| format!("→ {after}"),
        );
        writeln!(
            out,
            "{} row {} ({}): {}: {} {after} | {}",
            defect.file,
            defect.row + 1,
            defect.id,
            defect.defect,
            defect.before,
            defect.sentence.trim()
        )?;
    }
    let counts = count_defects(defects);
    if args.json {
        let counts = json!({
            "rows": rows,
            "rows_corrected": corrections.len(),
            "places": defects.len(),
            "defects": counts,
        });
        return writeln!(out, "{counts}");
    }
    let proposed: BTreeMap<&str, usize> =
        defects
            .iter()
            .filter(|d| d.after.is_some())
            .fold(BTreeMap::new(), |mut counts, defect| {
                *counts.entry(defect.defect.as_str()).or_default() += 1;
                counts
            });
    if !counts.is_empty() {
        writeln!(
            out,
            "{:<36} {:>7} {:>7} {:>7} {:>9}",
            "defect", "places", "rows", "studies", "proposed"
        )?;
    }
    for (name, count) in &counts {
        let proposed = proposed.get(name.as_str()).copied().unwrap_or(0);
        writeln!(
            out,
            "{name:<36} {:>7} {:>7} {:>7} {proposed:>9}",
            count.places, count.rows, count.studies
        )?;
    }
    writeln!(
        out,
        "{} places in {rows} rows; a correction is proposed for {} of them, in {} rows",
        defects.len(),
        defects.iter().filter(|d| d.after.is_some()).count(),
        corrections.len()
    )
}

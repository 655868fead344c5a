//! `infer --show-tags`: the technical tags of DICOM files, and nothing of the patient.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use crate::{
    base::files::{expect_file, name::text_of},
    processor::image::{DecodeLimits, read_bytes, technical},
};

/// Prints the tags of each file, a line each, or with `as_json` one object a file.
///
/// # Errors
/// Files that cannot be read or are not DICOM; the others are listed all the same.
pub(super) fn show<'a>(images: impl Iterator<Item = &'a PathBuf>, as_json: bool) -> Result<()> {
    let limits = DecodeLimits::default();
    let mut failed = Vec::new();
    for path in images {
        let name = path.display().to_string();
        let tags = expect_file(path)
            .map_err(anyhow::Error::from)
            .and_then(|()| {
                let bytes = read_bytes(path, &limits)?;
                Ok(technical(&bytes, &name, &limits)?)
            });
        match tags {
            Ok(tags) => print(path, tags, as_json).context("cannot write to stdout")?,
            Err(error) => failed.push(error),
        }
    }
    let count = failed.len();
    match failed.into_iter().next() {
        None => Ok(()),
        Some(error) if count == 1 => Err(error),
        Some(error) => bail!("{count} files have no tags to show, the first: {error:#}"),
    }
}

fn print(path: &Path, tags: Vec<(&'static str, String)>, as_json: bool) -> std::io::Result<()> {
    let mut out = stdout().lock();
    if as_json {
        let tags: Map<String, Value> = tags
            .into_iter()
            .map(|(tag, value)| (tag.to_owned(), value.into()))
            .collect();
        let (name, encoding) = text_of(&[path]);
        let mut object = json!({ "image": name, "tags": tags });
        if let Some(encoding) = encoding {
            object["image_encoding"] = encoding.into();
        }
        return writeln!(out, "{object}");
    }
    writeln!(out, "{}", path.display())?;
    for (tag, value) in tags {
        writeln!(out, "  {tag}: {value}")?;
    }
    Ok(())
}

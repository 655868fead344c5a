//! A data set that a name means, or one file of it: where its samples come from.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    error::DatasetError,
    reader::{ColumnsSeen, DataOptions, Plain, read_file},
    unused_keys::UnusedKeys,
};
use crate::{
    phantom::{Dialect, PhantomStudies},
    processor::{
        row_keys::REJECTED_KEYS,
        sample::{Sample, SampleError},
    },
    study::counted,
};

/// Most rows of a data set that is one of several, or counts with a part of its rows.
pub(super) const MOST_ROWS: usize = 1 << 28;

/// Where samples come from.
#[derive(Debug, Clone)]
pub(super) enum SampleSource {
    Rows {
        samples: Arc<Vec<Sample>>,
        /// Line of each sample, from 1.
        lines: Arc<Vec<usize>>,
        folder: PathBuf,
    },
    Phantoms {
        studies: Arc<[PhantomStudies; 4]>,
        range: Range<u64>,
        words_only: bool,
    },
}

/// One file or one range of phantoms.
#[derive(Debug)]
pub(super) struct DataPart {
    /// The path, or `phantom:…`.
    pub(super) name: String,
    /// What it is called among several.
    pub(super) label: String,
    pub(super) source: SampleSource,
    pub(super) fingerprint: String,
    pub(super) remarks: Vec<String>,
    pub(super) columns: ColumnsSeen,
}

impl DataPart {
    pub(super) fn open(
        name: &str,
        label: &str,
        options: &DataOptions,
    ) -> Result<Self, DatasetError> {
        if name.starts_with("phantom:") {
            return Self::phantoms(name, label);
        }
        let path = Path::new(name);
        let file = read_file(path, options, Plain::Drop, true)?;
        let (mut samples, mut lines) = (Vec::new(), Vec::new());
        let mut unused = UnusedKeys::default();
        for (number, row) in file.rows {
            let (mut sample, _) = row.map_err(|fault| SampleError {
                file: path.to_owned(),
                row: number,
                fault,
            })?;
            let mut unknown = std::mem::take(&mut sample.unknown_keys);
            if options.pairs {
                unknown.retain(|key| key != "margin" && !REJECTED_KEYS.contains(&key.as_str()));
            }
            unused.add(number, unknown);
            samples.push(sample);
            lines.push(number);
        }
        if samples.is_empty() {
            return Err(DatasetError::Empty(name.to_string()));
        }
        let unasked = samples
            .iter()
            .filter(|sample: &&Sample| !sample.conversation.has_question());
        let unasked = unasked.count();
        let mut remarks = file.remarks;
        if unasked > 0 {
            remarks.push(format!(
                "{} no question, and an answer that is learnt without one",
                counted(unasked, "row has", "rows have")
            ));
        }
        let remarks = remarks.into_iter();
        let remarks = remarks.map(|remark| format!("`{name}`: {remark}"));
        let unused = unused
            .sentences()
            .map(|(line, sentence)| format!("`{name}` row {line}: {sentence}"));
        Ok(Self {
            name: name.to_owned(),
            label: label.to_owned(),
            remarks: remarks.chain(unused).collect(),
            source: SampleSource::Rows {
                samples: Arc::new(samples),
                lines: Arc::new(lines),
                folder: path.parent().unwrap_or(Path::new("")).to_path_buf(),
            },
            fingerprint: format!("sha256:{}{}", file.sha256, options.fingerprint()),
            columns: file.columns,
        })
    }

    fn phantoms(name: &str, label: &str) -> Result<Self, DatasetError> {
        let wrong = || DatasetError::Phantom(name.to_string());
        let mut parts = name.split(':').skip(1);
        let seed: u64 = parts
            .next()
            .and_then(|seed| seed.parse().ok())
            .ok_or_else(wrong)?;
        let (from, to) = parts
            .next()
            .and_then(|range| range.split_once(".."))
            .ok_or_else(wrong)?;
        let range = from.parse().map_err(|_| wrong())?..to.parse().map_err(|_| wrong())?;
        let dialects = match parts.next() {
            None | Some("plain") => [Dialect::Plain; 4],
            Some("terse") => [Dialect::Terse; 4],
            Some("house") => [Dialect::House; 4],
            // Another hospital's reports; one in four is the department's without its picture, which keeps its
            // words known.
            Some("partial") => [
                Dialect::Partial,
                Dialect::Partial,
                Dialect::Partial,
                Dialect::House,
            ],
            // For a first training: two terse reports, which teach the eye, one with wording of its own,
            // and one of the department's without its picture, which teaches words alone.
            Some("mixed") => [
                Dialect::Terse,
                Dialect::Plain,
                Dialect::Terse,
                Dialect::House,
            ],
            Some(_) => return Err(wrong()),
        };
        if range.is_empty() {
            return Err(DatasetError::Empty(name.to_string()));
        }
        Ok(Self {
            name: name.to_owned(),
            label: label.to_owned(),
            source: SampleSource::Phantoms {
                studies: Arc::new(
                    dialects.map(|dialect| PhantomStudies::new(seed).with_dialect(dialect)),
                ),
                range,
                words_only: name.ends_with(":mixed") || name.ends_with(":partial"),
            },
            fingerprint: name.to_string(),
            remarks: Vec::new(),
            columns: ColumnsSeen::default(),
        })
    }

    pub(super) fn len(&self) -> usize {
        match &self.source {
            SampleSource::Rows { samples, .. } => samples.len(),
            SampleSource::Phantoms { range, .. } => (range.end - range.start) as usize,
        }
    }
}

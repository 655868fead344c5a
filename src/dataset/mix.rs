//! Several data sets under one name: `NAME=PATH:WEIGHT#ROWS`, separated by commas; a `*` in the last part of a
//! path stands for the files of one data set, as `train-*.parquet`.
//!
//! A weight says how often the rows of a data set come in an epoch: 2 is twice each, 0.5 half of them, drawn by
//! seed. `#N` takes N rows, more than there are by repeating them, as ms-swift's data sets.

use std::fmt;
use std::path::{Path, PathBuf};

use super::error::DatasetError;
use super::python_random::PythonRandom;

/// Largest weight, and most rows of a data set by `#N`.
const MAX_WEIGHT: f64 = 1000.0;
const MAX_ROWS: usize = 1 << 32;

/// One data set of several.
#[derive(Debug, Clone, PartialEq)]
pub struct DataName {
    /// What metrics and messages call it; the path by default.
    pub label: Option<String>,
    /// A path, or `phantom:…`.
    pub path: String,
    /// How often its rows come in an epoch.
    pub weight: f64,
    /// Rows that are taken, before the weight.
    pub rows: Option<usize>,
}

impl fmt::Display for DataName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(label) = &self.label {
            write!(f, "{label}=")?;
        }
        f.write_str(&self.path)?;
        if self.weight != 1.0 {
            write!(f, ":{}", self.weight)?;
        }
        match self.rows {
            Some(rows) => write!(f, "#{rows}"),
            None => Ok(()),
        }
    }
}

/// The data sets that a text names. A text that is the path of a file is that file.
///
/// # Errors
/// [`DatasetError::Name`].
pub fn data_names(text: &str) -> Result<Vec<DataName>, DatasetError> {
    let plain = |path: &str| DataName {
        label: None,
        path: path.to_owned(),
        weight: 1.0,
        rows: None,
    };
    if Path::new(text).exists() {
        return Ok(vec![plain(text)]);
    }
    let entries: Vec<&str> = text.split(',').map(str::trim).collect();
    let mut names = Vec::new();
    for entry in &entries {
        let wrong = |reason: &str| DatasetError::Name {
            name: (*entry).to_owned(),
            reason: reason.to_owned(),
        };
        if entry.is_empty() {
            return Err(wrong("is empty; expected names separated by single commas"));
        }
        if Path::new(entry).exists() {
            names.push(plain(entry));
            continue;
        }
        let mut name = plain(entry);
        if let Some((path, rows)) = entry.rsplit_once('#') {
            let rows = rows
                .parse()
                .ok()
                .filter(|rows| (1..=MAX_ROWS).contains(rows));
            name.rows = Some(
                rows.ok_or_else(|| wrong("does not end with `#N`, a number of rows above 0"))?,
            );
            name.path = path.to_owned();
        }
        // `phantom:SEED:FROM..TO` ends with a part of its own.
        let is_phantom = name.path.starts_with("phantom:") || name.path.contains("=phantom:");
        let parts = name.path.split(':').count();
        if let Some((path, weight)) = name.path.rsplit_once(':')
            && (!is_phantom || parts > 3)
            && let Ok(weight) = weight.parse::<f64>()
        {
            if !(weight > 0.0 && weight <= MAX_WEIGHT) {
                return Err(wrong("has a weight that is not above 0 and at most 1000"));
            }
            name.weight = weight;
            name.path = path.to_owned();
        }
        if !Path::new(&name.path).exists()
            && let Some((label, path)) = name.path.split_once('=')
        {
            let is_label = |c: char| c.is_alphanumeric() || "-_.".contains(c);
            if label.is_empty() || !label.chars().all(is_label) {
                return Err(wrong(
                    "has a name of other signs than letters, digits, `-`, `_` and `.` before its `=`",
                ));
            }
            name.label = Some(label.to_owned());
            name.path = path.to_owned();
        }
        names.push(name);
    }
    let mut labels: Vec<&str> = names.iter().map(DataName::label).collect();
    labels.sort_unstable();
    if let Some(pair) = labels.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(DatasetError::Name {
            name: text.to_owned(),
            reason: format!(
                "names `{}` twice; a weight repeats a data set: `{}:2`",
                pair[0], pair[0]
            ),
        });
    }
    Ok(names)
}

/// As a text of [`data_names`], each path replaced by `map`; a text that names no data sets stays as it is.
pub fn map_paths(text: &str, map: impl Fn(&str) -> String) -> String {
    match data_names(text) {
        Err(_) => text.to_owned(),
        Ok(mut names) => {
            for name in &mut names {
                name.path = map(&name.path);
            }
            let names: Vec<String> = names.iter().map(DataName::to_string).collect();
            names.join(",")
        }
    }
}

impl DataName {
    /// What metrics and messages call it.
    pub fn label(&self) -> &str {
        self.label.as_deref().unwrap_or(&self.path)
    }

    /// Its files: several, in the order of their names, where the last part of the path has a `*`.
    ///
    /// # Errors
    /// [`DatasetError::Name`] if no file fits.
    pub fn files(&self) -> Result<Vec<String>, DatasetError> {
        let files = files_like(Path::new(&self.path))?;
        let texts = files
            .into_iter()
            .filter_map(|file| file.to_str().map(str::to_owned));
        Ok(texts.collect())
    }

    /// Whether it is drawn, and no file.
    pub fn is_drawn(&self) -> bool {
        self.path.starts_with("phantom:")
    }

    /// Whether all its rows come once.
    pub fn is_plain(&self) -> bool {
        self.weight == 1.0 && self.rows.is_none()
    }

    /// How many rows come of a data set of `len`.
    pub(super) fn wanted(&self, len: usize) -> usize {
        let rows = self.rows.unwrap_or(len);
        (rows as f64 * self.weight).round() as usize
    }

    /// Which of `len` rows come, in their order; a part of them is drawn by `seed`.
    pub(super) fn chosen(&self, len: usize, seed: u64) -> Vec<usize> {
        let wanted = self.wanted(len);
        let mut chosen = Vec::with_capacity(wanted);
        for _ in 0..wanted.checked_div(len).unwrap_or(0) {
            chosen.extend(0..len);
        }
        let rest = wanted.checked_rem(len).unwrap_or(0);
        if rest > 0 {
            let mut order: Vec<usize> = (0..len).collect();
            PythonRandom::new(seed).shuffle(&mut order);
            order.truncate(rest);
            order.sort_unstable();
            chosen.extend(order);
        }
        chosen
    }
}

/// The files that a path stands for, in the order of their names: several where its last part has a `*`.
///
/// # Errors
/// [`DatasetError`] if no file fits, or the folder cannot be read.
pub fn files_like(path: &Path) -> Result<Vec<PathBuf>, DatasetError> {
    let pattern = path.file_name().and_then(|name| name.to_str());
    let pattern = match pattern.filter(|pattern| pattern.contains('*')) {
        Some(pattern) if !path.exists() => pattern,
        _ => return Ok(vec![path.to_owned()]),
    };
    let folder = path.parent().unwrap_or(Path::new(""));
    let look_in = if folder.as_os_str().is_empty() {
        Path::new(".")
    } else {
        folder
    };
    let entries = std::fs::read_dir(look_in).map_err(|cause| DatasetError::Read {
        path: look_in.to_owned(),
        cause,
    })?;
    let mut files: Vec<PathBuf> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let file = folder.join(&name);
            (matches(pattern, &name) && file.is_file()).then_some(file)
        })
        .collect();
    files.sort();
    if files.is_empty() {
        return Err(DatasetError::Name {
            name: path.display().to_string(),
            reason: "matches no file".to_owned(),
        });
    }
    Ok(files)
}

/// Whether a name fits a pattern in which `*` stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    let mut pieces = pattern.split('*');
    let first = pieces.next().unwrap_or_default();
    let Some(mut rest) = name.strip_prefix(first) else {
        return false;
    };
    let mut pieces = pieces.peekable();
    while let Some(piece) = pieces.next() {
        if pieces.peek().is_none() {
            return rest.ends_with(piece);
        }
        match rest.find(piece) {
            Some(at) => rest = &rest[at + piece.len()..],
            None => return false,
        }
    }
    rest.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_weights_rows_and_labels() {
        let shown = |text: &str| -> Vec<String> {
            let names = data_names(text).unwrap();
            names
                .iter()
                .map(|name| {
                    let rows = name.rows.map_or_else(String::new, |rows| rows.to_string());
                    format!("{}|{}|{}|{rows}", name.label(), name.path, name.weight)
                })
                .collect()
        };
        for (text, names) in [
            ("a.jsonl", &["a.jsonl|a.jsonl|1|"][..]),
            (
                "a.jsonl:2,b.parquet",
                &["a.jsonl|a.jsonl|2|", "b.parquet|b.parquet|1|"],
            ),
            ("zh=a.jsonl:0.5#30", &["zh|a.jsonl|0.5|30"]),
            ("C:\\x\\a.jsonl#3", &["C:\\x\\a.jsonl|C:\\x\\a.jsonl|1|3"]),
            ("phantom:11:0..8", &["phantom:11:0..8|phantom:11:0..8|1|"]),
            (
                "phantom:11:0..8:house:3",
                &["phantom:11:0..8:house|phantom:11:0..8:house|3|"],
            ),
            ("p=phantom:11:0..8:2", &["p|phantom:11:0..8|2|"]),
        ] {
            assert_eq!(shown(text), names, "{text}");
            assert_eq!(map_paths(text, str::to_owned), text);
        }
        for (text, says) in [
            ("a.jsonl,,b.jsonl", "is empty"),
            ("a.jsonl#0", "`#N`"),
            ("a.jsonl:0", "above 0"),
            ("a.jsonl:-1", "above 0"),
            ("a b=a.jsonl", "other signs"),
            ("a.jsonl,a.jsonl", "`a.jsonl` twice"),
        ] {
            let error = data_names(text).unwrap_err().to_string();
            assert!(error.contains(says), "{text}: {error}");
        }
    }

    #[test]
    fn a_star_stands_for_any_text() {
        for (pattern, name, fits) in [
            ("*", "a", true),
            ("train-*.parquet", "train-0001-of-2.parquet", true),
            ("train-*-of-*.parquet", "train-0001-of-2.parquet", true),
            ("train-*.parquet", "test-0001.parquet", false),
            ("train-*.parquet", "train-1.jsonl", false),
            ("a*b*c", "a-c-b", false),
            ("a", "a", true),
            ("a", "ab", false),
            ("*.a*.a", ".a", false),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
    }

    #[test]
    fn a_weight_repeats_and_draws() {
        let chosen = |text: &str, seed| data_names(text).unwrap()[0].chosen(4, seed);
        assert_eq!(chosen("a", 1), [0, 1, 2, 3]);
        assert_eq!(chosen("a:2", 1), [0, 1, 2, 3, 0, 1, 2, 3]);
        let half = chosen("a:0.5", 1);
        assert_eq!(half.len(), 2);
        assert!(half[0] < half[1]);
        assert_eq!(half, chosen("a:0.5", 1));
        assert!((2..20).any(|seed| chosen("a:0.5", seed) != half));
        assert_eq!(chosen("a#6", 1)[..4], [0, 1, 2, 3]);
        assert_eq!(chosen("a#6", 1).len(), 6);
        assert_eq!(chosen("a:0.5#6", 1).len(), 3);
    }
}

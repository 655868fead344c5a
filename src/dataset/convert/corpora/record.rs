//! What every corpus is read into, and what of it becomes rows.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Map, Value};

use super::super::corpus::{Body, CorpusRow, stem_of};
use super::super::error::ConvertError;
use super::super::files::FileIndex;
use super::super::selection::{Part, Sections, Views};
use super::language::Language;
use crate::processor::sample::IMAGE_TAG;

/// How an image was taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Projection {
    Frontal,
    /// Lateral, oblique, of another part of the body.
    Other,
    Unknown,
}

impl Projection {
    /// The projection of this name. PA and AP are frontal, as corpora of chest X-rays count them.
    pub(super) fn of(name: Option<&str>) -> Self {
        let Some(name) = name else {
            return Self::Unknown;
        };
        match name.trim().to_lowercase().as_str() {
            "" | "unk" | "unknown" | "excluder" => Self::Unknown,
            "pa" | "ap" | "ap_horizontal" | "frontal" | "front" | "正位" | "后前位" | "前后位"
            | "胸部正位" | "胸部后前位" | "胸部前后位" => Self::Frontal,
            _ => Self::Other,
        }
    }
}

/// How a corpus names an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Picture {
    /// By a path, or a name.
    Path(String),
    /// By the number of its examination, which files or a folder begin with.
    Number(String),
    /// In the row itself, kept as a file.
    Kept {
        /// As the row calls it, or `sha256:…`.
        name: String,
        /// The file.
        path: PathBuf,
    },
}

/// One image of a study.
#[derive(Debug, Clone)]
pub(super) struct View {
    /// Row of the corpus that names it.
    pub(super) number: usize,
    pub(super) picture: Picture,
    pub(super) projection: Projection,
}

/// The texts of a report.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Report {
    pub(super) findings: Option<String>,
    pub(super) impression: Option<String>,
    /// The report where it is not divided.
    pub(super) whole: Option<String>,
}

/// One study of a corpus, or one row of it.
#[derive(Debug, Clone)]
pub(super) struct Record {
    pub(super) file: Arc<Path>,
    pub(super) views: Vec<View>,
    pub(super) report: Report,
    pub(super) study: Option<String>,
    pub(super) patient: Option<String>,
    pub(super) part: Option<Part>,
    /// Keys with a short text, and those that say nothing to training.
    pub(super) keys: BTreeMap<String, String>,
    pub(super) unused: Vec<String>,
    /// `objects` of the row, whose answer holds their tags.
    pub(super) objects: Option<Map<String, Value>>,
}

impl Record {
    pub(super) fn new(file: &Arc<Path>) -> Self {
        Self {
            file: file.clone(),
            views: Vec::new(),
            report: Report::default(),
            study: None,
            patient: None,
            part: None,
            keys: BTreeMap::new(),
            unused: Vec::new(),
            objects: None,
        }
    }
}

/// A corpus as it was read.
#[derive(Debug, Default)]
pub(super) struct Records {
    pub(super) records: Vec<Record>,
    /// Tables and lists that were read, the main one first.
    pub(super) files: Vec<Arc<Path>>,
    /// The corpus' own rule for studies and patients, in words.
    pub(super) study_rule: Option<&'static str>,
    pub(super) remarks: Vec<String>,
}

impl Records {
    /// Joins the views of one study with one report, by study, patient, report and part.
    pub(super) fn by_study(mut self) -> Self {
        let mut places = HashMap::new();
        let mut joined: Vec<Record> = Vec::new();
        for record in self.records {
            if record.study.is_none() {
                joined.push(record);
                continue;
            }
            let key = (
                record.patient.clone(),
                record.study.clone(),
                record.report.clone(),
                record.part,
            );
            match places.get(&key) {
                None => {
                    places.insert(key, joined.len());
                    joined.push(record);
                }
                Some(at) => {
                    let first: &mut Record = &mut joined[*at];
                    first.views.extend(record.views);
                }
            }
        }
        self.records = joined;
        self
    }
}

impl Sections {
    pub(super) fn answer(self, report: &Report, language: Language) -> Option<String> {
        match self {
            Self::Findings => report.findings.clone(),
            Self::Impression => report.impression.clone(),
            Self::Both => {
                let parts = [&report.findings, &report.impression];
                let parts: Vec<String> = parts
                    .into_iter()
                    .zip(language.headings())
                    .filter_map(|(text, heading)| Some(format!("{heading}{}", text.as_ref()?)))
                    .collect();
                if parts.is_empty() {
                    report.whole.clone()
                } else {
                    Some(parts.join("\n"))
                }
            }
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Findings => "no findings",
            Self::Impression => "no impression",
            Self::Both => "no report",
        }
    }
}

/// A row that is left out before its image is looked for.
#[derive(Debug)]
pub(in crate::dataset::convert) struct LeftRow {
    pub(in crate::dataset::convert) file: Arc<Path>,
    pub(in crate::dataset::convert) number: usize,
    pub(in crate::dataset::convert) image: String,
    pub(in crate::dataset::convert) reason: LeftReason,
}

/// Why a row is left out before its image is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::dataset::convert) enum LeftReason {
    /// It has no text, or not the sections wanted.
    Report(&'static str),
    /// It shows no frontal view.
    View(&'static str),
    /// The corpus' own split does not name it.
    Part,
}

impl LeftReason {
    pub(in crate::dataset::convert) fn words(self) -> &'static str {
        match self {
            Self::Report(words) | Self::View(words) => words,
            Self::Part => "in no part of the split of the corpus",
        }
    }
}

/// Rows, those left out, and the language.
pub(super) struct Rows {
    pub(super) rows: Vec<CorpusRow>,
    pub(super) left_out: Vec<LeftRow>,
    pub(super) language: Language,
    pub(super) with_marks: usize,
}

/// What is wanted of the records.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) views: Views,
    pub(super) sections: Sections,
    /// Whether rows outside the corpus' own split are left out.
    pub(super) by_part: bool,
    /// Whether rows name the corpus' own studies and patients.
    pub(super) by_study: bool,
}

/// Marks that stand for words that were taken out of English reports.
const MARKS: [&str; 2] = ["XXXX", "___"];

/// Makes rows of records.
pub(super) fn rows_of(
    records: Vec<Record>,
    wanted: Wanted,
    index: &mut FileIndex,
) -> Result<Rows, ConvertError> {
    let texts = records.iter().filter(|record| record.objects.is_none());
    let language = Language::of(texts.filter_map(|record| {
        let report = &record.report;
        let text = report.findings.as_ref().or(report.impression.as_ref());
        text.or(report.whole.as_ref()).map(String::as_str)
    }));
    let mut found = Rows {
        rows: Vec::new(),
        left_out: Vec::new(),
        language,
        with_marks: 0,
    };
    for mut record in records {
        let views = std::mem::take(&mut record.views);
        let views = expanded(views, index)?;
        let answer = if record.objects.is_some() {
            record.report.whole.clone()
        } else {
            wanted.sections.answer(&record.report, language)
        };
        let reason = if wanted.by_part && record.part.is_none() {
            Some(LeftReason::Part)
        } else if answer.is_none() {
            Some(LeftReason::Report(wanted.sections.words()))
        } else {
            None
        };
        let answer = match (reason, answer) {
            (None, Some(answer)) => answer,
            (reason, _) => {
                let reason = reason.unwrap_or(LeftReason::Part);
                left(&mut found, &record, &views, wanted.views, reason);
                continue;
            }
        };
        if answer.contains(IMAGE_TAG) {
            return Err(ConvertError::Form {
                path: record.file.to_path_buf(),
                row: views.first().map_or(1, |view| view.number),
                what: "the report".into(),
                expected: "a report without `<image>`".into(),
            });
        }
        let kept = match wanted.views {
            Views::All | Views::OnePerImage => views,
            Views::Frontal => {
                let (frontal, other): (Vec<_>, Vec<_>) = views
                    .into_iter()
                    .partition(|view| view.projection == Projection::Frontal);
                for view in other {
                    let words = match view.projection {
                        Projection::Unknown => "view not known",
                        _ => "not frontal",
                    };
                    let reason = LeftReason::View(words);
                    left(&mut found, &record, &[view], wanted.views, reason);
                }
                frontal
            }
        };
        let groups: Vec<Vec<Shown>> = match wanted.views {
            Views::All => vec![kept],
            _ if kept.is_empty() && wanted.views == Views::Frontal => Vec::new(),
            _ if kept.is_empty() => vec![kept],
            _ => kept.into_iter().map(|view| vec![view]).collect(),
        };
        for group in groups {
            found.with_marks += usize::from(MARKS.iter().any(|mark| answer.contains(mark)));
            found.rows.push(row(&record, &group, &answer, wanted));
        }
    }
    Ok(found)
}

fn row(record: &Record, views: &[Shown], answer: &str, wanted: Wanted) -> CorpusRow {
    let mut keys = record.keys.clone();
    if wanted.by_study {
        for (key, value) in [("study", &record.study), ("patient", &record.patient)] {
            if let Some(value) = value {
                keys.insert(key.to_owned(), value.clone());
            }
        }
    }
    CorpusRow {
        file: record.file.clone(),
        number: views.first().map_or(1, |view| view.number),
        images: views.iter().map(|view| view.name.clone()).collect(),
        kept: views
            .iter()
            .enumerate()
            .filter_map(|(index, view)| Some((index, view.kept.clone()?)))
            .collect(),
        keys,
        unused: record.unused.clone(),
        part: record.part,
        body: match &record.objects {
            None => Body::Report(answer.to_owned()),
            Some(objects) => Body::Objects {
                answer: answer.to_owned(),
                objects: objects.clone(),
            },
        },
    }
}

/// An image of a row.
struct Shown {
    /// Row of the corpus that names it.
    number: usize,
    /// Its path or name.
    name: String,
    /// Its file, where the row itself held it.
    kept: Option<PathBuf>,
    projection: Projection,
}

/// Views with the paths of their images; a number of an examination becomes all its files.
fn expanded(views: Vec<View>, index: &mut FileIndex) -> Result<Vec<Shown>, ConvertError> {
    let mut found = Vec::with_capacity(views.len());
    for view in views {
        let shown = |name, kept| Shown {
            number: view.number,
            name,
            kept,
            projection: view.projection,
        };
        match view.picture {
            Picture::Path(path) => found.push(shown(path, None)),
            Picture::Kept { name, path } => found.push(shown(name, Some(path))),
            Picture::Number(name) => {
                let mut paths = index.of_number(&name)?;
                if paths.is_empty() {
                    paths.push(name);
                }
                found.extend(paths.into_iter().map(|path| shown(path, None)));
            }
        }
    }
    Ok(found)
}

/// Lists what would have been rows as left out.
fn left(found: &mut Rows, record: &Record, views: &[Shown], wanted: Views, reason: LeftReason) {
    let mut list = |number, image| {
        found.left_out.push(LeftRow {
            file: record.file.clone(),
            number,
            image,
            reason,
        });
    };
    if wanted == Views::All || views.is_empty() {
        let images: Vec<&str> = views.iter().map(|view| view.name.as_str()).collect();
        list(
            views.first().map_or(1, |view| view.number),
            images.join(" "),
        );
    } else {
        for view in views {
            list(view.number, view.name.clone());
        }
    }
}

/// The name before the view of an image of OpenI-zh: `2` of `2_1`.
pub(super) fn before_view(image: &str) -> Option<&str> {
    stem_of(image).split_once('_').map(|(study, _)| study)
}

/// A text of a corpus: spaces around it and at the ends of lines taken away, nothing if it is empty.
pub(super) fn clean(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().map(str::trim_end).collect();
    let text = lines.join("\n");
    let text = text.trim();
    let nothing = ["", "nan", "null", "无", "none"];
    (!nothing.contains(&text.to_lowercase().as_str())).then(|| text.to_owned())
}

/// As [`clean`], in one line: for reports that were wrapped by a printer.
pub(super) fn one_line(text: &str) -> Option<String> {
    let words: Vec<&str> = text.split_whitespace().collect();
    clean(&words.join(" "))
}

//! Corpora as they are published, read into rows.
//!
//! [`read`] finds out which corpus a file or a folder is, reads it by the corpus' own rules (studies, patients, split,
//! views, sections), and makes rows of it as the options want.

mod chexpert;
mod detect;
mod indiana;
mod json;
mod language;
mod mimic;
mod mimic_sections;
mod named;
mod padchest;
mod parquet;
mod record;
mod roco;
mod table;
mod vindr;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::corpus::CorpusRow;
use super::error::ConvertError;
use super::files::FileIndex;
use super::form::CorpusForm;
use super::options::ConvertOptions;
use super::selection::{Part, Sections, Views};
use super::training::training_rows;
use crate::dataset::rows::starts_as_parquet;
use detect::{Detected, detect};
use json::JsonCorpus;
pub(super) use language::BOX_PROMPTS;
pub use language::Language;
pub(super) use record::{LeftReason, LeftRow};
use record::{Picture, Projection, Record, Records, Wanted, before_view, rows_of};
pub(super) use table::text_of;

/// A corpus with its rows.
pub(super) struct Corpus {
    pub(super) form: CorpusForm,
    /// The file whose rows are numbered, or the folder.
    pub(super) main: Arc<Path>,
    /// Tables and lists that were read.
    pub(super) files: Vec<Arc<Path>>,
    /// The images of the rows, where they are not named by paths seen from the corpus.
    pub(super) root: PathBuf,
    pub(super) rows: Vec<CorpusRow>,
    pub(super) left_out: Vec<LeftRow>,
    pub(super) remarks: Vec<String>,
    /// Absent for rows of `messages`, which stay as they are.
    pub(super) views: Option<Views>,
    pub(super) sections: Option<Sections>,
    pub(super) language: Option<Language>,
    /// Whether some row is in the corpus' own validation or test part.
    pub(super) has_split: bool,
    /// The corpus' own rule for studies, where it was used.
    pub(super) study_rule: Option<&'static str>,
}

/// Reads the corpus that the options name. `index` is of the folder of images.
///
/// # Errors
/// [`ConvertError`] names file, row and column.
pub(super) fn read(
    options: &ConvertOptions,
    index: &mut FileIndex,
) -> Result<Corpus, ConvertError> {
    let input = &options.input;
    let wanted = match &options.keys {
        Some(_) => Some(CorpusForm::Keys),
        None if options.corpus == Some(CorpusForm::Keys) => return Err(ConvertError::NoKeys),
        None => options.corpus,
    };
    let Detected { form, files } = detect(input, wanted, &options.output)?;
    let main = files.first().cloned().unwrap_or_else(|| input.clone());
    let root = root_of(input);
    let store = &options.reading.store;
    if wanted.is_none_or(|wanted| wanted == CorpusForm::Messages)
        && matches!(
            form,
            CorpusForm::Messages | CorpusForm::Rows | CorpusForm::Table | CorpusForm::Keys
        )
        // Rows that training reads as they are, in any file.
        && let Some(rows) = training_rows(&main, &options.reading)?
    {
        return messages(options, main.as_path().into(), root, rows);
    }
    let (form, records) = match form {
        CorpusForm::Indiana => (form, indiana::read(&main)?),
        CorpusForm::ChexpertPlus => (form, chexpert::read(&main)?),
        CorpusForm::Padchest => (form, padchest::read(&main)?),
        CorpusForm::Roco => (form, roco::read(&files)?),
        CorpusForm::VindrCxr => (form, vindr::read(&files)?),
        CorpusForm::MimicCxr => (form, mimic::read(&root)?),
        CorpusForm::Rows | CorpusForm::Table | CorpusForm::Keys if starts_as_parquet(&main) => {
            parquet::read(&files, options.keys.as_ref(), store)?
        }
        CorpusForm::Table => (form, named::table(&main, store)?),
        _ => {
            // A guess by the start of the file is made again by the whole of it.
            match json::read(&main, options.keys.as_ref(), wanted, store)? {
                JsonCorpus::Messages(rows) => {
                    return messages(options, main.as_path().into(), root, rows);
                }
                JsonCorpus::Records(form, records) => (form, records),
            }
        }
    };
    of_records(options, form, main.as_path().into(), root, records, index)
}

/// The folder that a corpus is in.
pub(super) fn root_of(input: &Path) -> PathBuf {
    if input.is_dir() {
        return input.to_owned();
    }
    match input.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn messages(
    options: &ConvertOptions,
    main: Arc<Path>,
    root: PathBuf,
    rows: Vec<CorpusRow>,
) -> Result<Corpus, ConvertError> {
    if options.views.is_some() || options.sections != Sections::default() {
        return Err(ConvertError::NotForMessages);
    }
    Ok(Corpus {
        form: CorpusForm::Messages,
        files: vec![main.clone()],
        main,
        root,
        rows,
        left_out: Vec::new(),
        remarks: Vec::new(),
        views: None,
        sections: None,
        language: None,
        has_split: false,
        study_rule: None,
    })
}

fn of_records(
    options: &ConvertOptions,
    form: CorpusForm,
    main: Arc<Path>,
    root: PathBuf,
    mut records: Records,
    index: &mut FileIndex,
) -> Result<Corpus, ConvertError> {
    let as_listed = matches!(
        form,
        CorpusForm::Keys | CorpusForm::Rows | CorpusForm::Table
    );
    let views = options.views.unwrap_or(if as_listed {
        Views::All
    } else {
        Views::OnePerImage
    });
    let all = &records.records;
    if all.is_empty() {
        return Err(ConvertError::Empty(main.to_path_buf()));
    }
    check_sections(options, form, all)?;
    let known = |record: &Record| {
        let mut views = record.views.iter();
        views.any(|view| view.projection != Projection::Unknown)
    };
    if views == Views::Frontal && !all.iter().any(known) {
        return Err(ConvertError::NoViews(form.name()));
    }
    let has_split = all
        .iter()
        .any(|record| matches!(record.part, Some(Part::Val | Part::Test)));
    if views == Views::All {
        records = together(records, form);
    }
    let wanted = Wanted {
        views,
        sections: options.sections,
        by_part: has_split && options.split.is_none_or(|split| split.is_official()),
        by_study: !options.studies.is_given(),
    };
    let (files, study_rule) = (records.files, records.study_rule);
    let mut remarks = records.remarks;
    let found = rows_of(records.records, wanted, index)?;
    if found.with_marks > 0 {
        remarks.push(format!(
            "{} rows hold `XXXX` or `___`, which stand for words that were taken out of the reports",
            found.with_marks
        ));
    }
    Ok(Corpus {
        form,
        main: files.first().cloned().unwrap_or(main),
        files,
        root,
        rows: found.rows,
        left_out: found.left_out,
        remarks,
        views: Some(views),
        sections: Some(options.sections),
        language: Some(found.language),
        has_split,
        study_rule: study_rule.filter(|_| !options.studies.is_given()),
    })
}

/// Refuses a section of reports that are not divided.
fn check_sections(
    options: &ConvertOptions,
    form: CorpusForm,
    records: &[Record],
) -> Result<(), ConvertError> {
    let (name, there) = match options.sections {
        Sections::Both => return Ok(()),
        Sections::Findings => (
            "findings",
            records
                .iter()
                .any(|record| record.report.findings.is_some()),
        ),
        Sections::Impression => (
            "impression",
            records
                .iter()
                .any(|record| record.report.impression.is_some()),
        ),
    };
    if there {
        Ok(())
    } else {
        Err(ConvertError::NoSection {
            corpus: form.name(),
            section: name,
        })
    }
}

/// Rows of OpenI-zh are one an image: those of one study with one text become one record.
fn together(mut records: Records, form: CorpusForm) -> Records {
    if !matches!(form, CorpusForm::Annotations | CorpusForm::Prompts) {
        return records;
    }
    for record in &mut records.records {
        if let [view] = &record.views[..]
            && let Picture::Path(path) = &view.picture
        {
            record.study = before_view(path).map(str::to_owned);
        }
    }
    let rows = records.records.len();
    let mut records = records.by_study();
    let joined = records.records.len();
    records.remarks.push(format!(
        "{rows} rows became {joined}: views of one study, by the name before `_`, whose reports are equal to the letter"
    ));
    for record in &mut records.records {
        record.study = None;
    }
    records
}

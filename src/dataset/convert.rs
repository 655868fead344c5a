//! A corpus of reports and images to training and validation files in ms-swift's form.
//!
//! The steps: a corpus as it is published, or rows of any known form ([`CorpusForm`]) → rows whose images are there → a
//! question each, drawn by seed → the corpus' own split, or one that keeps studies and patients whole
//! ([`crate::study`]) → `train.jsonl`, `val.jsonl`, perhaps `test.jsonl`, `missing.txt`, histograms and
//! `summary.json`. Draws follow Python's generator, so [`Split::Image`] with the published seed gives the published
//! rows. Images are neither copied nor changed, and nothing is left out without a line in `missing.txt`.

mod corpora;
mod corpus;
mod error;
mod files;
mod form;
mod images;
mod inputs;
mod line;
mod options;
mod parts;
mod selection;
mod summary;
#[cfg(test)]
mod tests;
mod thinking;
mod training;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::{
    base::{
        files::{sha256_file, write_atomic},
        text_file::read_text,
    },
    processor::{patches::ImageProcessor, sample::IMAGE_TAG, tokenizer::Tokenizer},
    study::{StudyFacts, StudyRow, counted},
};

pub use corpora::Language;
use corpora::{BOX_PROMPTS, Corpus, LeftReason};
use corpus::Body;
pub use error::ConvertError;
pub use form::{CorpusForm, CorpusKeys};
use images::Unusable;
use inputs::Inputs;
use line::UsableRow;
pub use options::{ConvertOptions, PROMPTS, Split, VAL_RATIO};
use parts::{FILES, count_studies, parts, prepare_output, shown, split_of};
use selection::Part;
pub use selection::{Sections, Views};
use summary::Measures;
pub use summary::{LeftOutRows, PartCount, Spread, Summary};
use thinking::Thinking;

use super::python_random::PythonRandom;

/// A share of rows without image above which the result begins with a warning.
const MUCH_MISSING: f64 = 0.1;

/// Rows of one reason that `summary.json` names; `missing.txt` names all.
const MOST_NAMED: usize = 20;

/// Most bytes of a file of questions.
const LONGEST_PROMPTS: u64 = 16 << 20;

/// A row that is left out: its file, its number, its image and why.
struct LeftOut {
    file: Arc<Path>,
    number: usize,
    image: String,
    reason: String,
    /// The reason without what differs from row to row.
    kind: &'static str,
}

/// Converts a corpus.
///
/// Of the image files only headers are read. With a tokenizer, tokens are counted as training will
/// take them. The same input, images, folders and options give the same bytes. `progress` hears of the rows whose images
/// were looked at, and of all rows.
///
/// # Errors
/// [`ConvertError`] names the file and the row. `missing.txt` is there also when no row was left.
pub fn convert(
    options: &ConvertOptions,
    tokenizer: Option<&Tokenizer>,
    processor: &ImageProcessor,
    progress: &dyn Fn(usize, usize),
) -> Result<Summary, ConvertError> {
    if let Some(prompts) = &options.prompts {
        check_prompts(prompts)?;
    }
    if let Some(ratio) = options
        .val_ratio
        .filter(|ratio| !(0.0..1.0).contains(ratio))
    {
        return Err(ConvertError::ValRatio(ratio));
    }
    let Inputs {
        mut corpus,
        mut sources,
    } = inputs::read(options)?;
    let prompts = questions(options, &corpus);
    let mut thinking = match &options.thinking {
        Some(path) => Some(Thinking::read(path)?),
        None => None,
    };
    let count: usize = sources.iter().map(|source| source.rows.len()).sum();
    let mut summary = empty_summary(options, &corpus, count, processor)?;
    let output = prepare_output(options)?;
    tell_choices(options, &corpus, &mut summary);

    let mut unused: BTreeMap<String, usize> = BTreeMap::new();
    let rows = sources.iter().flat_map(|source| &source.rows);
    for key in rows.flat_map(|row| &row.unused) {
        *unused.entry(key.clone()).or_default() += 1;
    }

    let mut left_out = Vec::new();
    for left in std::mem::take(&mut corpus.left_out) {
        *match left.reason {
            LeftReason::Report(_) => &mut summary.rows_without_report,
            LeftReason::View(_) => &mut summary.rows_not_frontal,
            LeftReason::Part => &mut summary.rows_without_part,
        } += 1;
        left_out.push(LeftOut {
            file: left.file,
            number: left.number,
            image: left.image,
            reason: left.reason.words().to_owned(),
            kind: left.reason.words(),
        });
    }
    let mut usable = Vec::new();
    let main = corpus.main.clone();
    let mut done = 0;
    for source in &mut sources {
        let rows = std::mem::take(&mut source.rows);
        let mut finder = source.finder(options, &output, processor);
        finder.look_up(&rows)?;
        for row in rows {
            done += 1;
            progress(done, count);
            let mut leave = |row: &corpus::CorpusRow, image: String, reason: String, kind| {
                left_out.push(LeftOut {
                    file: row.file.clone(),
                    number: row.number,
                    image,
                    reason,
                    kind,
                });
            };
            match finder.images(&row)? {
                Err(reason) => {
                    let (count, kind) = match reason {
                        Unusable::NotFound(_) | Unusable::Several(..) => {
                            (&mut summary.rows_without_image, "image not found")
                        }
                        Unusable::Unreadable(..) => (
                            &mut summary.rows_with_unusable_image,
                            "image cannot be used",
                        ),
                    };
                    *count += 1;
                    leave(&row, reason.image().to_owned(), reason.to_string(), kind);
                }
                Ok(images) => {
                    check_boxes(&row, &images)?;
                    let answer = match &mut thinking {
                        None => Some(row.report().to_owned()),
                        Some(thinking) => thinking.answer(row.id(), row.report()),
                    };
                    match answer {
                        Some(answer) => usable.push(UsableRow {
                            row,
                            images,
                            question: None,
                            answer,
                        }),
                        None => {
                            summary.rows_without_thinking += 1;
                            let kind = "no reasoning for this image";
                            leave(&row, row.images.join(" "), kind.to_owned(), kind);
                        }
                    }
                }
            }
        }
    }
    summary.thinking_unused = thinking.map_or_else(Vec::new, |thinking| thinking.unused());
    let missing = output.join("missing.txt");
    write_atomic(&missing, |out| {
        for left in &left_out {
            if left.file != main {
                write!(out, "{} ", left.file.display())?;
            }
            writeln!(out, "row {}\t{}\t{}", left.number, left.image, left.reason)?;
        }
        Ok(())
    })?;
    summary.left_out = by_file(&left_out);
    refuse_much_missing(options, &corpus, &summary, usable.len(), &left_out, missing)?;

    let mut random = PythonRandom::new(options.seed);
    for usable in &mut usable {
        let keeps = match &usable.row.body {
            Body::Report(_) | Body::Objects { .. } => false,
            Body::Messages { sample, .. } => {
                let conversation = &sample.conversation;
                let asks = options.prompts.is_none() && conversation.has_question();
                asks || conversation.turns.len() != 1
            }
        };
        if keeps {
            summary.questions_kept += 1;
        } else {
            let question = random.below(prompts.len());
            usable.question = Some(question);
            *summary
                .questions
                .entry(prompts[question].clone())
                .or_default() += 1;
        }
    }
    random.shuffle(&mut usable);
    let rows: Vec<StudyRow> = usable.iter().map(UsableRow::study_row).collect();
    let studies = options.studies.studies(&rows)?;
    let parts = parts(options, &mut random, &usable, &studies.groups, &mut summary)?;

    let mut measures = Measures::default();
    let mut lines: BTreeMap<_, Vec<String>> = BTreeMap::new();
    for (at, (usable, part)) in usable.iter().zip(&parts).enumerate() {
        let line = usable.line(
            &prompts,
            options.studies.is_given().then_some((&studies, at)),
        );
        usable.measure(&line, tokenizer, processor, &mut measures)?;
        lines.entry(*part).or_default().push(line);
    }
    count_studies(&mut summary, studies, &parts, corpus.study_rule);
    warn(&mut summary, unused);
    summary.characters = Spread::of(&measures.characters);
    summary.answer_tokens = Spread::of(&measures.answer_tokens);
    summary.row_tokens = Spread::of(&measures.row_tokens);
    summary.image_width = Spread::of(&measures.image_width);
    summary.image_height = Spread::of(&measures.image_height);
    summary.vision_tokens = Spread::of(&measures.vision_tokens);

    for (part, name) in FILES {
        if part == Part::Test && !lines.contains_key(&part) {
            continue;
        }
        let lines = lines.remove(&part).unwrap_or_default();
        write_atomic(&output.join(name), |out| {
            lines.iter().try_for_each(|line| writeln!(out, "{line}"))
        })?;
    }
    for (name, drawing) in measures.histograms() {
        if let Some(drawing) = drawing {
            write_atomic(&output.join(name), |out| out.write_all(drawing.as_bytes()))?;
        }
    }
    // Last, so that it is never about files that are not there yet.
    write_atomic(&output.join("summary.json"), |out| {
        serde_json::to_writer_pretty(&mut *out, &summary)?;
        writeln!(out)
    })?;
    Ok(summary)
}

/// Reads a file of questions, one a line; blank lines are passed over.
///
/// # Errors
/// [`ConvertError::Text`], or [`ConvertError::Prompts`] if there is none or one holds `<image>`.
pub fn read_prompts(path: &Path) -> Result<Vec<String>, ConvertError> {
    let text = read_text(path, LONGEST_PROMPTS)?.text;
    let lines = text.lines().map(str::trim);
    let prompts: Vec<String> = lines
        .filter(|line| !line.is_empty())
        .map(str::to_owned)
        .collect();
    check_prompts(&prompts)?;
    Ok(prompts)
}

fn check_prompts(prompts: &[String]) -> Result<(), ConvertError> {
    if prompts.iter().all(|prompt| prompt.trim().is_empty()) {
        return Err(ConvertError::Prompts("is empty"));
    }
    if prompts.iter().any(|prompt| prompt.contains(IMAGE_TAG)) {
        return Err(ConvertError::Prompts("holds `<image>`, which is added"));
    }
    Ok(())
}

/// The questions to draw from: those wanted, or those in the language of the reports.
fn questions(options: &ConvertOptions, corpus: &Corpus) -> Vec<String> {
    if let Some(prompts) = &options.prompts {
        return prompts.clone();
    }
    let prompts: &[&str] = match corpus.language {
        _ if corpus.form == CorpusForm::VindrCxr => &BOX_PROMPTS,
        Some(language) => language.prompts(),
        None => &PROMPTS,
    };
    prompts.iter().map(|prompt| (*prompt).to_owned()).collect()
}

/// Says what was decided by default.
fn tell_choices(options: &ConvertOptions, corpus: &Corpus, summary: &mut Summary) {
    summary.remarks.extend(corpus.remarks.iter().cloned());
    if let Some(language) = corpus.language
        && options.prompts.is_none()
        && corpus.form != CorpusForm::VindrCxr
    {
        summary.remarks.push(format!(
            "the reports are in {0}, so the questions are; `--prompt` or `--prompts` gives others",
            language.english()
        ));
    }
    if summary.split == Split::Official && options.split.is_none() {
        summary.remarks.push(
            "the corpus' own split is kept; `--split uid` draws another, by study and patient"
                .into(),
        );
    }
    if let Some(views) = corpus.views
        && options.views.is_none()
    {
        let words = match views {
            Views::OnePerImage => {
                "each image is a row of its own, as in the published training; `--views all` makes one row of a study"
            }
            _ => {
                "images that one row lists stay together; `--views one-per-image` makes a row of each"
            }
        };
        summary.remarks.push(words.to_owned());
    }
}

/// Refuses boxes in pixels of an image that may be a smaller copy.
fn check_boxes(row: &corpus::CorpusRow, images: &[images::FoundImage]) -> Result<(), ConvertError> {
    let Body::Objects { objects, .. } = &row.body else {
        return Ok(());
    };
    let in_pixels = objects.get("bbox_type").and_then(Value::as_str) == Some("real");
    let copy = images.iter().find(|image| {
        let name = image.name.to_lowercase();
        !name.ends_with(".dicom") && !name.ends_with(".dcm")
    });
    match copy {
        Some(image) if in_pixels => Err(ConvertError::BoxSizes {
            path: row.file.to_path_buf(),
            row: row.number,
            image: image.name.clone(),
        }),
        _ => Ok(()),
    }
}

/// The rows left out by file and reason.
fn by_file(left_out: &[LeftOut]) -> Vec<LeftOutRows> {
    let mut found: BTreeMap<(String, &str), Vec<usize>> = BTreeMap::new();
    for left in left_out {
        let key = (shown(&left.file), left.kind);
        found.entry(key).or_default().push(left.number);
    }
    let found = found.into_iter();
    found
        .map(|((file, reason), mut rows)| LeftOutRows {
            file,
            reason: reason.to_owned(),
            rows: rows.len(),
            first: {
                rows.truncate(MOST_NAMED);
                rows
            },
        })
        .collect()
}

/// Ends a conversion that has no rows left, or less than half of them without being allowed to.
fn refuse_much_missing(
    options: &ConvertOptions,
    corpus: &Corpus,
    summary: &Summary,
    usable: usize,
    left_out: &[LeftOut],
    missing: std::path::PathBuf,
) -> Result<(), ConvertError> {
    let path = corpus.main.to_path_buf();
    let reason_of = |kinds: &[&str]| {
        let mut left = left_out.iter();
        let first = left.find(|left| kinds.is_empty() || kinds.contains(&left.kind));
        first.map_or_else(String::new, |left| left.reason.clone())
    };
    if usable == 0 {
        return Err(ConvertError::NoneLeft {
            path,
            rows: summary.rows_read,
            reason: reason_of(&[]),
            missing,
        });
    }
    let images = summary.rows_without_image + summary.rows_with_unusable_image;
    // Many reports lack a section that was asked for by name.
    let texts = match options.sections {
        Sections::Both => summary.rows_without_report,
        Sections::Findings | Sections::Impression => 0,
    };
    if 2 * (images + texts) > summary.rows_read && !options.allow_missing {
        return Err(ConvertError::MostMissing {
            path,
            left: images + texts,
            rows: summary.rows_read,
            reason: reason_of(&["image not found", "image cannot be used", "no report"]),
            missing,
        });
    }
    Ok(())
}

/// Warns of what has to be looked at.
fn warn(summary: &mut Summary, unused: BTreeMap<String, usize>) {
    for (key, count) in unused {
        summary.warnings.push(format!(
            "the key `{key}` of {} says nothing to training",
            counted(count, "row", "rows")
        ));
    }
    if summary.rows_without_image as f64 > MUCH_MISSING * summary.rows_read as f64 {
        summary.warnings.push(format!(
            "{} of {} have no image and are left out; hint: `--images` names the folder that holds them all, missing.txt lists them",
            summary.rows_without_image,
            counted(summary.rows_read, "row", "rows"),
        ));
    }
}

fn empty_summary(
    options: &ConvertOptions,
    corpus: &Corpus,
    rows: usize,
    processor: &ImageProcessor,
) -> Result<Summary, ConvertError> {
    let mut files = BTreeMap::new();
    let mut first = None;
    for file in &corpus.files {
        let hash = sha256_file(file)?;
        first.get_or_insert_with(|| hash.clone());
        files.insert(shown(file), hash);
    }
    Ok(Summary {
        form: corpus.form,
        guessed: options.corpus.is_none() && options.keys.is_none(),
        input_sha256: first.unwrap_or_default(),
        files,
        views: corpus.views,
        sections: corpus.sections,
        language: corpus.language,
        seed: options.seed,
        split: split_of(options, corpus)?,
        val_ratio: Some(options.val_ratio.unwrap_or(VAL_RATIO)),
        rows_read: rows + corpus.left_out.len(),
        rows_without_report: 0,
        rows_not_frontal: 0,
        rows_without_part: 0,
        rows_without_image: 0,
        rows_with_unusable_image: 0,
        rows_without_thinking: 0,
        left_out: Vec::new(),
        thinking_unused: Vec::new(),
        train: PartCount::default(),
        val: PartCount::default(),
        test: None,
        studies_in_both: 0,
        patients_in_both: 0,
        study: StudyFacts::default(),
        remarks: Vec::new(),
        warnings: Vec::new(),
        questions: BTreeMap::new(),
        questions_kept: 0,
        characters: None,
        answer_tokens: None,
        row_tokens: None,
        image_width: None,
        image_height: None,
        vision_tokens: None,
        min_pixels: processor.config().min_pixels,
        max_pixels: processor.config().max_pixels,
    })
}

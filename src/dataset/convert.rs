//! A corpus of reports and images to training and validation files in ms-swift's form.
//!
//! The steps: rows of any published form ([`CorpusForm`]) → rows whose images are there → a question
//! each, drawn by seed → a split that keeps studies and patients whole ([`crate::study`]) → `train.jsonl`,
//! `val.jsonl`, `missing.txt`, histograms and `summary.json`. Draws follow Python's generator, so
//! [`Split::Image`] with the published seed gives the published rows. Images are neither copied nor
//! changed, and nothing is left out without a line in `missing.txt`.

mod corpus;
mod error;
mod images;
mod options;
mod summary;
#[cfg(test)]
mod tests;
mod thinking;
mod training;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use crate::{
    base::files::{FileError, sha256_file, write_atomic},
    processor::{
        patches::ImageProcessor,
        sample::{IMAGE_TAG, escaped, parse_line},
        supervised::encode_supervised,
        tokenizer::Tokenizer,
    },
    study::{PATIENT_KEYS, STUDY_KEYS, Studies, StudyFacts, StudyRow, counted},
};

use corpus::{Body, CorpusRow};
pub use corpus::{CorpusForm, CorpusKeys};
pub use error::ConvertError;
use images::{FoundImage, ImageFinder, Unusable};
pub use options::{ConvertOptions, PROMPTS, Split};
use summary::Measures;
pub use summary::{PartCount, Spread, Summary};
use thinking::Thinking;

use super::python_random::PythonRandom;
use super::split;

/// A share of rows without image above which the result begins with a warning.
const MUCH_MISSING: f64 = 0.1;

/// A row with its images found.
struct UsableRow {
    row: CorpusRow,
    images: Vec<FoundImage>,
    question: Option<usize>,
    answer: String,
}

/// Converts a corpus.
///
/// Of the image files only headers are read. With a tokenizer, tokens are counted as training will
/// take them. The same input, images, folders and options give the same bytes.
///
/// # Errors
/// [`ConvertError`] names the file and the row. `missing.txt` is there also when no row was left.
pub fn convert(
    options: &ConvertOptions,
    tokenizer: Option<&Tokenizer>,
    processor: &ImageProcessor,
) -> Result<Summary, ConvertError> {
    let prompts = questions(options)?;
    if !(0.0..1.0).contains(&options.val_ratio) {
        return Err(ConvertError::ValRatio(options.val_ratio));
    }
    let (form, rows) = match &options.keys {
        Some(keys) => corpus::read_keyed(&options.input, keys)?,
        None => corpus::read(&options.input, &options.reading)?,
    };
    if rows.is_empty() {
        return Err(ConvertError::Empty(options.input.clone()));
    }
    let folder = options.images.as_deref();
    if folder.is_some_and(|folder| !folder.is_dir())
        || (folder.is_none() && form != CorpusForm::Messages)
    {
        return Err(ConvertError::NoImages(options.images.clone()));
    }
    let mut thinking = match &options.thinking {
        Some(path) => Some(Thinking::read(path)?),
        None => None,
    };
    let output = prepare_output(options)?;
    let mut summary = empty_summary(options, form, rows.len(), processor)?;

    let mut unused: BTreeMap<String, usize> = BTreeMap::new();
    for key in rows.iter().flat_map(|row| &row.unused) {
        *unused.entry(key.clone()).or_default() += 1;
    }

    let mut usable = Vec::new();
    let mut left_out = Vec::new();
    let mut finder = ImageFinder::new(options, &output, processor);
    for row in rows {
        match finder.images(&row)? {
            Err(reason) => {
                let count = match reason {
                    Unusable::NotFound(_) => &mut summary.rows_without_image,
                    Unusable::Unreadable(..) => &mut summary.rows_with_unusable_image,
                };
                *count += 1;
                left_out.push((row.number, reason.image().to_owned(), reason.to_string()));
            }
            Ok(images) => {
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
                        let reason = "no reasoning for this image".to_owned();
                        left_out.push((row.number, row.images.join(" "), reason));
                    }
                }
            }
        }
    }
    summary.thinking_unused = thinking.map_or_else(Vec::new, |thinking| thinking.unused());
    let missing = output.join("missing.txt");
    write_atomic(&missing, |out| {
        for (number, image, reason) in &left_out {
            writeln!(out, "row {number}\t{image}\t{reason}")?;
        }
        Ok(())
    })?;
    if usable.is_empty() {
        return Err(ConvertError::NoneLeft {
            path: options.input.clone(),
            rows: summary.rows_read,
            reason: left_out.swap_remove(0).2,
            missing,
        });
    }

    let mut random = PythonRandom::new(options.seed);
    for usable in &mut usable {
        let keeps = match &usable.row.body {
            Body::Report(_) => false,
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
    let rows: Vec<StudyRow> = usable
        .iter()
        .map(|usable| usable.study_row(options))
        .collect();
    let studies = options.studies.studies(&rows)?;
    let in_val = in_validation(options, &mut random, &studies.groups)?;

    let mut measures = Measures::default();
    let mut lines = [Vec::new(), Vec::new()];
    for (at, (usable, in_val)) in usable.iter().zip(&in_val).enumerate() {
        let line = usable.line(
            &prompts,
            options.studies.is_given().then_some((&studies, at)),
        );
        measure(usable, &line, options, tokenizer, processor, &mut measures)?;
        lines[usize::from(*in_val)].push(line);
    }
    count_studies(&mut summary, studies, &in_val);
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
    summary.characters = Spread::of(&measures.characters);
    summary.answer_tokens = Spread::of(&measures.answer_tokens);
    summary.row_tokens = Spread::of(&measures.row_tokens);
    summary.image_width = Spread::of(&measures.image_width);
    summary.image_height = Spread::of(&measures.image_height);
    summary.vision_tokens = Spread::of(&measures.vision_tokens);

    for (name, lines) in ["train.jsonl", "val.jsonl"].into_iter().zip(&lines) {
        write_atomic(&output.join(name), |out| {
            lines.iter().try_for_each(|line| writeln!(out, "{line}"))
        })?;
    }
    for (name, drawing) in measures.histograms() {
        let path = output.join(name);
        match drawing {
            Some(drawing) => write_atomic(&path, |out| out.write_all(drawing.as_bytes()))?,
            // One of an earlier conversion would be taken for this one's.
            None if path.exists() => {
                fs::remove_file(&path).map_err(|cause| FileError::write(&path, cause))?;
            }
            None => {}
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
/// [`ConvertError::Read`], or [`ConvertError::Prompts`] if there is none or one holds `<image>`.
pub fn read_prompts(path: &Path) -> Result<Vec<String>, ConvertError> {
    let text = corpus::read_text(path)?;
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

fn questions(options: &ConvertOptions) -> Result<Vec<String>, ConvertError> {
    let prompts = match &options.prompts {
        Some(prompts) => prompts.clone(),
        None => PROMPTS.iter().map(|prompt| (*prompt).to_owned()).collect(),
    };
    check_prompts(&prompts)?;
    Ok(prompts)
}

/// Makes the output folder, which must be empty, and gives its canonical path.
fn prepare_output(options: &ConvertOptions) -> Result<PathBuf, ConvertError> {
    let failed = |cause| FileError::write(&options.output, cause);
    let holds_something = match fs::read_dir(&options.output) {
        Ok(mut entries) => entries.next().is_some(),
        Err(_) => options.output.exists(),
    };
    if holds_something {
        return Err(ConvertError::Exists(options.output.clone()));
    }
    fs::create_dir_all(&options.output).map_err(failed)?;
    Ok(options.output.canonicalize().map_err(failed)?)
}

/// Whether each row is for validation.
fn in_validation(
    options: &ConvertOptions,
    random: &mut PythonRandom,
    groups: &[usize],
) -> Result<Vec<bool>, ConvertError> {
    let chosen = match options.split {
        Split::Uid => split::hold_out(groups, options.val_ratio, random),
        Split::Image => split::wanted(groups.len(), options.val_ratio)
            .map(|wanted| (0..groups.len()).map(|row| row < wanted).collect()),
    };
    chosen.map_err(ConvertError::CannotSplit)
}

/// Fills in the studies and patients of each part.
fn count_studies(summary: &mut Summary, studies: Studies, in_val: &[bool]) {
    let side = |wanted: bool| {
        let rows = in_val.iter().enumerate();
        rows.filter(move |(_, val)| **val == wanted)
            .map(|(row, _)| row)
    };
    let ids = |wanted| -> BTreeSet<&String> { side(wanted).map(|row| &studies.ids[row]).collect() };
    let patients = |wanted| -> BTreeSet<&String> {
        side(wanted)
            .filter_map(|row| studies.patients[row].as_ref())
            .collect()
    };
    for (part, wanted) in [(&mut summary.train, false), (&mut summary.val, true)] {
        *part = PartCount {
            rows: side(wanted).count(),
            studies: ids(wanted).len(),
        };
    }
    summary.studies_in_both = ids(false).intersection(&ids(true)).count();
    summary.patients_in_both = patients(false).intersection(&patients(true)).count();
    summary.warnings = studies.doubts.iter().map(|doubt| doubt.english()).collect();
    summary.study = studies.facts;
}

fn empty_summary(
    options: &ConvertOptions,
    form: CorpusForm,
    rows_read: usize,
    processor: &ImageProcessor,
) -> Result<Summary, ConvertError> {
    Ok(Summary {
        form,
        input_sha256: sha256_file(&options.input)?,
        seed: options.seed,
        split: options.split,
        val_ratio: options.val_ratio,
        rows_read,
        rows_without_image: 0,
        rows_with_unusable_image: 0,
        rows_without_thinking: 0,
        thinking_unused: Vec::new(),
        train: PartCount::default(),
        val: PartCount::default(),
        studies_in_both: 0,
        patients_in_both: 0,
        study: StudyFacts::default(),
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

impl UsableRow {
    /// What the row says of its study.
    fn study_row(&self, options: &ConvertOptions) -> StudyRow {
        StudyRow {
            name: format!("`{}` row {}", options.input.display(), self.row.number),
            keys: self.row.keys.clone(),
            images: self
                .images
                .iter()
                .map(|image| image.study_path.clone())
                .collect(),
            folder: String::new(),
        }
    }

    /// The row as a line of the output. With `studies`, which a rule of the user gave, it names its study for those
    /// who read it later.
    fn line(&self, prompts: &[String], studies: Option<(&Studies, usize)>) -> String {
        let images: Vec<&str> = self
            .images
            .iter()
            .map(|image| image.name.as_str())
            .collect();
        let question = |question: usize| {
            let marks = IMAGE_TAG.repeat(images.len());
            format!("{marks}{}", prompts[question])
        };
        let mut row = match &self.row.body {
            Body::Report(_) => Map::from_iter([(
                "messages".to_owned(),
                json!([
                    {"role": "user", "content": question(self.question.unwrap_or_default())},
                    {"role": "assistant", "content": escaped(&self.answer)},
                ]),
            )]),
            Body::Messages { row, .. } => {
                let mut row = row.clone();
                if let Some(Value::Array(messages)) = row.get_mut("messages") {
                    let is_user = |message: &Value| message["role"] == "user";
                    // An answer without a question gets the one that was drawn.
                    if let Some(own) = self.question.filter(|_| !messages.iter().any(is_user)) {
                        let mut roles = messages.iter().map(|message| &message["role"]);
                        let at = roles.position(|role| role != "system").unwrap_or(0);
                        let message = json!({"role": "user", "content": question(own)});
                        messages.insert(at, message);
                    }
                    for message in messages.iter_mut() {
                        let content = match message.get("role").and_then(Value::as_str) {
                            Some("user") => self.question.map(question),
                            _ => None,
                        };
                        if let Some(content) = content {
                            message["content"] = content.into();
                        }
                    }
                    // A checked row ends with its answer, which stays as it was written unless it is new.
                    let new = self.answer != self.row.report();
                    if let Some(last) = messages.last_mut().filter(|_| new) {
                        last["content"] = escaped(&self.answer).into();
                    }
                }
                row
            }
        };
        row.insert("images".into(), json!(images));
        let names = |keys: &[&str]| keys.iter().any(|key| self.row.keys.contains_key(*key));
        if let Some((studies, at)) = studies {
            if !names(&STUDY_KEYS) {
                row.insert("study".into(), json!(studies.ids[at]));
            }
            if let Some(patient) = studies.patients[at]
                .as_ref()
                .filter(|_| !names(&PATIENT_KEYS))
            {
                row.insert("patient".into(), json!(patient));
            }
        }
        Value::Object(row).to_string()
    }
}

fn measure(
    usable: &UsableRow,
    line: &str,
    options: &ConvertOptions,
    tokenizer: Option<&Tokenizer>,
    processor: &ImageProcessor,
    measures: &mut Measures,
) -> Result<(), ConvertError> {
    measures.characters.push(usable.answer.chars().count());
    for image in &usable.images {
        measures.image_width.push(image.width);
        measures.image_height.push(image.height);
        measures
            .vision_tokens
            .push(processor.num_tokens(image.grid));
    }
    let number = usable.row.number;
    // What is written is read back as training will read it, before it is written.
    let sample = parse_line(line, &options.input, number)?;
    if let Some(tokenizer) = tokenizer {
        let grids: Vec<[usize; 3]> = usable.images.iter().map(|image| image.grid).collect();
        let merge_size = processor.config().merge_size;
        let ids = encode_supervised(tokenizer, &sample.conversation, &grids, merge_size).map_err(
            |cause| ConvertError::Encode {
                path: options.input.clone(),
                row: number,
                cause,
            },
        )?;
        measures.row_tokens.push(ids.input_ids.len());
        let answer = tokenizer.encode(&usable.answer)?;
        measures.answer_tokens.push(answer.len());
    }
    Ok(())
}

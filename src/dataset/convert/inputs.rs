//! The corpora of one conversion: one, or several of one form.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use super::corpora::{self, Corpus};
use super::corpus::{Body, CorpusRow};
use super::error::ConvertError;
use super::files::FileIndex;
use super::form::CorpusForm;
use super::images::ImageFinder;
use super::options::ConvertOptions;
use crate::{processor::patches::ImageProcessor, study::counted};

/// The rows of one input, and where their images are looked for.
pub(super) struct Source {
    pub(super) rows: Vec<CorpusRow>,
    main: Arc<Path>,
    root: PathBuf,
    form: CorpusForm,
    index: FileIndex,
}

/// All inputs: what they are together, without rows, and the rows of each.
pub(super) struct Inputs {
    pub(super) corpus: Corpus,
    pub(super) sources: Vec<Source>,
}

impl Source {
    /// What finds the images of its rows.
    pub(super) fn finder<'a>(
        &'a mut self,
        options: &ConvertOptions,
        output: &'a Path,
        processor: &'a ImageProcessor,
    ) -> ImageFinder<'a> {
        // Rows of messages name their own images.
        let beside = (options.images.is_none() && self.form == CorpusForm::Messages)
            .then(|| self.root.clone());
        ImageFinder::new(&self.main, beside, &mut self.index, output, processor)
    }
}

/// Reads all inputs that the options name.
///
/// # Errors
/// [`ConvertError`] names file, row and column, or the inputs that are of two forms or languages.
pub(super) fn read(options: &ConvertOptions) -> Result<Inputs, ConvertError> {
    let mut inputs: Option<Inputs> = None;
    for input in options.inputs() {
        let folder = match &options.images {
            Some(folder) if !folder.is_dir() => return Err(ConvertError::NoImages(folder.clone())),
            Some(folder) => folder.clone(),
            None => corpora::root_of(input),
        };
        let mut index = FileIndex::new(folder);
        let alone = ConvertOptions {
            input: input.clone(),
            more_inputs: Vec::new(),
            ..options.clone()
        };
        let mut corpus = corpora::read(&alone, &mut index)?;
        if corpus.rows.is_empty() && corpus.left_out.is_empty() {
            return Err(ConvertError::Empty(corpus.main.to_path_buf()));
        }
        let source = Source {
            rows: std::mem::take(&mut corpus.rows),
            main: corpus.main.clone(),
            root: corpus.root.clone(),
            form: corpus.form,
            index,
        };
        match &mut inputs {
            None => {
                inputs = Some(Inputs {
                    corpus,
                    sources: vec![source],
                });
            }
            Some(all) => {
                let (first, other) = (&all.corpus, &corpus);
                let differ = |what, first: &str, other: &str| ConvertError::Inputs {
                    first: all.corpus.main.to_path_buf(),
                    other: corpus.main.to_path_buf(),
                    what,
                    names: [first.to_owned(), other.to_owned()],
                };
                if first.form != other.form {
                    return Err(differ("forms", first.form.name(), other.form.name()));
                }
                if let (Some(one), Some(two)) = (first.language, other.language)
                    && one != two
                    && options.prompts.is_none()
                {
                    return Err(differ("languages", one.english(), two.english()));
                }
                join(&mut all.corpus, corpus);
                all.sources.push(source);
            }
        }
    }
    let mut inputs = inputs.ok_or_else(|| ConvertError::Empty(options.input.clone()))?;
    if let Some(remark) = part_names(&mut inputs.sources) {
        inputs.corpus.remarks.push(remark);
    }
    Ok(inputs)
}

/// Adds what is known of a further corpus of the same form.
fn join(all: &mut Corpus, other: Corpus) {
    all.files.extend(other.files);
    all.left_out.extend(other.left_out);
    all.has_split |= other.has_split;
    for remark in other.remarks {
        if !all.remarks.contains(&remark) {
            all.remarks.push(remark);
        }
    }
}

/// Puts the name of its file before an `id` that an earlier file has too; a sentence about it.
fn part_names(sources: &mut [Source]) -> Option<String> {
    if sources.len() == 1 {
        return None;
    }
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let (mut renamed, mut example) = (0, None);
    for source in sources {
        let stem = source
            .main
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy();
        let mut own: BTreeMap<String, String> = BTreeMap::new();
        for row in &mut source.rows {
            let Body::Messages { row, .. } = &mut row.body else {
                continue;
            };
            let id = match row.get("id") {
                Some(Value::String(id)) => id.clone(),
                Some(Value::Number(id)) => id.to_string(),
                _ => continue,
            };
            let mut name = own.get(&id).unwrap_or(&id).clone();
            while seen.contains(&name) {
                name = format!("{stem}-{name}");
            }
            if name != id {
                renamed += 1;
                example.get_or_insert_with(|| name.clone());
                row.insert("id".to_owned(), name.as_str().into());
            }
            own.insert(id, name);
        }
        seen.extend(own.into_values());
    }
    let example = example?;
    Some(format!(
        "{} the `id` of a row in an earlier file, and got the name of their file before it, as `{example}`",
        counted(renamed, "row has", "rows have")
    ))
}

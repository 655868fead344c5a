//! A row with its images as a line of the output, and what is measured of it.

use serde_json::{Map, Value, json};

use super::corpus::{Body, CorpusRow};
use super::error::ConvertError;
use super::images::FoundImage;
use super::selection::Part;
use super::summary::Measures;
use crate::{
    processor::{
        patches::ImageProcessor,
        sample::{IMAGE_TAG, escaped, parse_line},
        supervised::encode_supervised,
        tokenizer::Tokenizer,
    },
    study::{PATIENT_KEYS, STUDY_KEYS, Studies, StudyRow},
};

/// A row with its images found.
pub(super) struct UsableRow {
    pub(super) row: CorpusRow,
    pub(super) images: Vec<FoundImage>,
    pub(super) question: Option<usize>,
    pub(super) answer: String,
}

impl UsableRow {
    /// What the row says of its study.
    pub(super) fn study_row(&self) -> StudyRow {
        StudyRow {
            name: format!("`{}` row {}", self.row.file.display(), self.row.number),
            keys: self.row.keys.clone(),
            images: self
                .images
                .iter()
                .map(|image| image.study_path.clone())
                .collect(),
            folder: String::new(),
        }
    }

    /// The part that the corpus' own split has it in.
    pub(super) fn part(&self) -> Part {
        self.row.part.unwrap_or(Part::Train)
    }

    /// The row as a line of the output. It names its study for those who read it later where the row does, and with
    /// `studies`, which a rule of the user gave.
    pub(super) fn line(&self, prompts: &[String], studies: Option<(&Studies, usize)>) -> String {
        let images: Vec<&str> = self
            .images
            .iter()
            .map(|image| image.name.as_str())
            .collect();
        let question = |question: usize| {
            let marks = IMAGE_TAG.repeat(images.len());
            format!("{marks}{}", prompts[question])
        };
        let asked = |answer: &str| {
            json!([
                {"role": "user", "content": question(self.question.unwrap_or_default())},
                {"role": "assistant", "content": answer},
            ])
        };
        let mut row = match &self.row.body {
            Body::Report(_) => {
                Map::from_iter([("messages".to_owned(), asked(&escaped(&self.answer)))])
            }
            Body::Objects { answer, objects } => {
                let mut row = Map::from_iter([("messages".to_owned(), asked(answer))]);
                if !objects.is_empty() {
                    row.insert("objects".into(), Value::Object(objects.clone()));
                }
                row
            }
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
        if !matches!(self.row.body, Body::Messages { .. }) {
            for keys in [&STUDY_KEYS, &PATIENT_KEYS] {
                let named = keys
                    .iter()
                    .find_map(|key| self.row.keys.get_key_value(*key));
                if let Some((key, value)) = named {
                    row.insert(key.clone(), json!(value));
                }
            }
        }
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

    /// Reads the line back as training will read it, before it is written, and measures it.
    pub(super) fn measure(
        &self,
        line: &str,
        tokenizer: Option<&Tokenizer>,
        processor: &ImageProcessor,
        measures: &mut Measures,
    ) -> Result<(), ConvertError> {
        measures.characters.push(self.answer.chars().count());
        for image in &self.images {
            measures.image_width.push(image.width);
            measures.image_height.push(image.height);
            measures
                .vision_tokens
                .push(processor.num_tokens(image.grid));
        }
        let (path, number) = (&self.row.file, self.row.number);
        let sample = parse_line(line, path, number)?;
        let sizes: Vec<(usize, usize)> = self
            .images
            .iter()
            .map(|image| (image.width, image.height))
            .collect();
        let placed = sample.placed(&sizes).map_err(|cause| ConvertError::Boxes {
            path: path.to_path_buf(),
            row: number,
            cause,
        })?;
        if let Some(tokenizer) = tokenizer {
            let grids: Vec<[usize; 3]> = self.images.iter().map(|image| image.grid).collect();
            let merge_size = processor.config().merge_size;
            let ids =
                encode_supervised(tokenizer, &placed, &grids, merge_size).map_err(|cause| {
                    ConvertError::Encode {
                        path: path.to_path_buf(),
                        row: number,
                        cause,
                    }
                })?;
            measures.row_tokens.push(ids.input_ids.len());
            let answer = placed.last_answer().unwrap_or(&self.answer);
            measures.answer_tokens.push(tokenizer.encode(answer)?.len());
        }
        Ok(())
    }
}

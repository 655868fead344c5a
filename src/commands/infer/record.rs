//! What `infer` writes about a report, as a line of JSON.

use std::{
    collections::{BTreeMap, HashSet},
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::{
    args::InferArgs,
    findings_args::settings_key,
    task::{Task, TaskKey, TaskKind},
};
use crate::{
    base::files::name,
    dataset::AskedQuestion,
    eval::{
        findings::Finding,
        probability::{judged::UNCALIBRATED, read::FindingRecord},
    },
    processor::{
        message::Message,
        remark::{Remark, RemarkKind},
    },
    runtime::{generate::FinishReason, pipeline::Answer},
};

/// How every record begins.
pub(super) const RECORD_START: &str = "{\"image\":\"";

/// One line of `--json` and `--output`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The image as it was named; several with `--together`, separated by `;`.
    pub image: String,
    /// `percent` where `image` is for a name that is not UTF-8: `%` and two hexadecimal digits are
    /// a byte of it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image_encoding: Option<String>,
    /// SHA-256 of the file, 64 hexadecimal digits; `;` between several. Absent if one cannot be read.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image_sha256: Option<String>,
    /// The data file as it was named, where the report is the answer to a row of it.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub data: Option<String>,
    /// `percent` where `data` is for a name that is not UTF-8, as `image_encoding`.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub data_encoding: Option<String>,
    /// Number of the row, from 1.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub row: Option<usize>,
    /// Hash of the row: of its messages, the names of its images and its other keys.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub row_sha256: Option<String>,
    /// What the row calls itself.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub id: Option<Value>,
    /// The study that the row names.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub study: Option<String>,
    /// The patient that the row names.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub patient: Option<String>,
    /// The question; of a row its last one.
    pub prompt: String,
    /// The system message of a row, its own or that of --system.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub system: Option<String>,
    /// The answer that the row has, which the model was not shown.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub reference: Option<String>,
    /// Distinguishes runs whose answers may differ: a hash of model, adapter and generation settings.
    #[serde(default)]
    pub settings: String,
    /// The report; empty where the error is about it.
    #[serde(default)]
    pub report: String,
    /// The reasoning before it, for models that think.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub thinking: Option<String>,
    /// Why it ended: `stop`, `length` (--max-new-tokens) or `repetition` (the same tokens over and over).
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub finish_reason: Option<FinishReason>,
    /// What a reader should know about the image; empty where there is nothing.
    #[serde(default)]
    pub remarks: Vec<RecordRemark>,
    /// Whether the probabilities of findings are calibrated; absent without --findings.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub calibrated: Option<bool>,
    /// The table of words that findings were read from the report with.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub findings_rules: Option<String>,
    /// Probability, decision and what the report says, by class.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub findings: Option<BTreeMap<Finding, FindingRecord>>,
    /// Tokens of the prompt, image included.
    #[serde(default)]
    pub prompt_tokens: usize,
    /// Tokens of the answer.
    #[serde(default)]
    pub completion_tokens: usize,
    /// Seconds from reading the image to the last token, shared evenly by a batch.
    #[serde(default)]
    pub seconds: f64,
    /// Why there is no report, or why its findings have no probabilities.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub error: Option<String>,
}

/// Code of remarks on how the model was read, which concern every report.
const MODEL_REMARK: &str = "model";

/// Code of remarks on keys of a row that nothing uses.
const UNUSED_KEY: &str = "unused_key";

/// Something about an image, or the model, that is no error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RecordRemark {
    /// The same word for the same kind of remark.
    pub code: String,
    /// A sentence about the image.
    pub text: String,
    /// Which image it is about, where a report is about several.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub image: Option<String>,
}

/// Prints remarks to stderr, those that concern the whole run once.
#[derive(Debug, Default)]
pub(crate) struct RemarkPrinter(Mutex<HashSet<String>>);

impl RemarkPrinter {
    /// Prints the remarks of a record.
    pub(crate) fn print(&self, record: &Record) {
        let mut printed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for remark in &record.remarks {
            // Printed when the model was loaded.
            if remark.code == MODEL_REMARK {
                continue;
            }
            let about = match &remark.image {
                Some(image) => format!("`{image}`"),
                None => record.label(),
            };
            let of_the_run = [
                RemarkKind::SubjectNotStated.code(),
                UNCALIBRATED,
                UNUSED_KEY,
            ];
            if !of_the_run.contains(&remark.code.as_str()) {
                eprintln!("{about}: {}", remark.text);
            } else if printed.insert(remark.text.clone()) {
                eprintln!("{about}: {} (said once)", remark.text);
            }
        }
    }
}

impl RecordRemark {
    /// A remark on how the model was read.
    pub(crate) fn of_model(text: &str) -> Self {
        Self {
            code: MODEL_REMARK.to_owned(),
            text: text.to_owned(),
            image: None,
        }
    }

    /// As a record holds it; `image` where a report is about several.
    pub(super) fn of(remark: &Remark, image: Option<String>) -> Self {
        Self {
            code: remark.kind().code().to_owned(),
            text: remark.to_string(),
            image,
        }
    }
}

impl Record {
    /// One without an answer.
    pub(crate) fn new(args: &InferArgs, task: &Task) -> Self {
        let settings = settings_hash(args, task.kind());
        let Some(row) = &task.row else {
            let (image, encoding) = name::text_of(&task.images);
            return Self {
                image,
                image_encoding: encoding.map(str::to_owned),
                prompt: args.prompt().to_owned(),
                settings,
                ..Self::default()
            };
        };
        let (data, encoding) = name::text_of(&[&row.file]);
        let record = Self {
            data: Some(data),
            data_encoding: encoding.map(str::to_owned),
            row: Some(row.number),
            settings,
            ..Self::default()
        };
        match &row.question {
            Err(reason) => Self {
                error: Some(reason.to_string()),
                ..record
            },
            Ok(question) => Self {
                image: question.sample.images.join(";"),
                row_sha256: Some(question.sha256.clone()),
                id: question.id.clone(),
                study: question.study.clone(),
                patient: question.patient.clone(),
                prompt: question.text(),
                system: question
                    .system()
                    .or(args.system.as_deref())
                    .map(str::to_owned),
                // With boxes once the sizes of the images are known.
                reference: question
                    .reference()
                    .filter(|_| !question.sample.has_boxes())
                    .map(str::to_owned),
                remarks: unused_keys(&question.sample.unknown_keys),
                ..record
            },
        }
    }

    /// Takes over the question of its row; gives the messages.
    pub(crate) fn ask(&mut self, asked: AskedQuestion) -> Vec<Message> {
        self.prompt = asked.prompt;
        self.reference = asked.reference;
        asked.messages
    }

    /// Takes over an answer that took `seconds`.
    pub(crate) fn fill(&mut self, answer: Answer, seconds: f64) {
        self.report = answer.report;
        self.thinking = answer.thinking;
        self.finish_reason = Some(answer.finish_reason);
        self.prompt_tokens = answer.prompt_tokens;
        self.completion_tokens = answer.completion_tokens;
        self.set_seconds(seconds);
    }

    /// Tenths of a millisecond are enough.
    pub(crate) fn set_seconds(&mut self, seconds: f64) {
        self.seconds = (seconds * 1e4).round() / 1e4;
    }

    /// The key of this record in its run, if it belongs to a task of this kind.
    pub(super) fn key(&self, kind: TaskKind) -> Option<TaskKey> {
        match (kind, &self.data, self.row) {
            (TaskKind::Images(images), None, None) => {
                let encoding = self.image_encoding.as_deref();
                let paths = name::paths_of(&self.image, encoding, images > 1);
                let places = paths.iter().map(|path| name::place_of(path));
                Some(TaskKey::Images(places.collect()))
            }
            (TaskKind::Rows, Some(data), Some(row)) => {
                let encoding = self.data_encoding.as_deref();
                let path = name::paths_of(data, encoding, false).pop()?;
                Some(TaskKey::Row(name::place_of(&path), row))
            }
            _ => None,
        }
    }

    /// What a message calls it.
    pub(crate) fn label(&self) -> String {
        match (&self.data, self.row) {
            (Some(data), Some(row)) => format!("`{data}` row {row}"),
            _ => format!("`{}`", self.image),
        }
    }
}

fn unused_keys(keys: &[String]) -> Vec<RecordRemark> {
    let remark = |key: &String| RecordRemark {
        code: UNUSED_KEY.to_owned(),
        text: format!("the key `{key}` of the row is not used"),
        image: None,
    };
    keys.iter().map(remark).collect()
}

/// What decides an answer besides image and question.
pub(super) fn settings_hash(args: &InferArgs, kind: TaskKind) -> String {
    let (model, load, generation) = (&args.model, &args.model.load, &args.generation);
    let mut text = format!(
        "{:?} {:?} {:?} {:?} {:?} {:?} {generation:?}",
        model.model,
        model.adapter.adapter,
        load.dtype,
        load.min_pixels,
        load.max_pixels,
        args.system
    );
    if let Some(quantization) = load.quantize {
        text.push_str(&format!(" {quantization}"));
    }
    if let Some(memory) = load.memory {
        text.push_str(&format!(" memory {memory:?}"));
    }
    for part in [&load.gguf.mmproj, &load.gguf.tokenizer]
        .into_iter()
        .flatten()
    {
        text.push_str(&format!(" {part:?}"));
    }
    if let Some(server) = &args.server {
        text = format!("{text} {server:?} {:?}", args.server_model);
    }
    if let Some(frame) = args.frame {
        text.push_str(&format!(" frame {frame}"));
    }
    match kind {
        TaskKind::Images(0 | 1) => {}
        TaskKind::Images(images) => text.push_str(&format!(" {images} images together")),
        // The question of rows without one counts; what a row says itself is in its hash.
        TaskKind::Rows => text.push_str(&format!(" rows {:?}", args.prompt())),
    }
    text.push_str(&settings_key(&args.findings));
    let hash = Sha256::digest(text.as_bytes());
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

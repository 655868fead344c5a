//! What `infer` writes about a report, as a line of JSON.

use std::{
    collections::{BTreeMap, HashSet},
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{
    args::InferArgs,
    findings::{UNCALIBRATED, settings_key},
};
use crate::{
    base::files::name,
    eval::{findings::Finding, probability::read::FindingRecord},
    processor::remark::{Remark, RemarkKind},
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
    /// The question.
    pub prompt: String,
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
    /// Prints the remarks of a record; `image` is what it is about where a remark names none.
    pub(crate) fn print(&self, image: &str, remarks: &[RecordRemark]) {
        let mut printed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for remark in remarks {
            // Printed when the model was loaded.
            if remark.code == MODEL_REMARK {
                continue;
            }
            let image = remark.image.as_deref().unwrap_or(image);
            let of_the_run = [RemarkKind::SubjectNotStated.code(), UNCALIBRATED];
            if !of_the_run.contains(&remark.code.as_str()) {
                eprintln!("`{image}`: {}", remark.text);
            } else if printed.insert(remark.text.clone()) {
                eprintln!("`{image}`: {} (said once)", remark.text);
            }
        }
    }
}

impl RecordRemark {
    /// A remark on how the model was read.
    pub(super) fn of_model(text: &str) -> Self {
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
    pub(crate) fn new(args: &InferArgs, images: &[PathBuf]) -> Self {
        let (image, encoding) = name::text_of(images);
        Self {
            image,
            image_encoding: encoding.map(str::to_owned),
            prompt: args.prompt.clone(),
            settings: settings_hash(args, images.len()),
            ..Self::default()
        }
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

    /// Where the images are, however they were named; a record is about `images` of them.
    pub(super) fn places(&self, images: usize) -> Vec<PathBuf> {
        let encoding = self.image_encoding.as_deref();
        name::paths_of(&self.image, encoding, images > 1)
            .iter()
            .map(|path| name::place_of(path))
            .collect()
    }
}

/// What decides an answer besides image and question.
pub(super) fn settings_hash(args: &InferArgs, images: usize) -> String {
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
    for part in [&load.mmproj, &load.tokenizer].into_iter().flatten() {
        text.push_str(&format!(" {part:?}"));
    }
    if let Some(server) = &args.server {
        text = format!("{text} {server:?} {:?}", args.server_model);
    }
    if let Some(frame) = args.frame {
        text.push_str(&format!(" frame {frame}"));
    }
    if images > 1 {
        text.push_str(&format!(" {images} images together"));
    }
    text.push_str(&settings_key(&args.findings));
    let hash = Sha256::digest(text.as_bytes());
    hash[..8].iter().map(|byte| format!("{byte:02x}")).collect()
}

//! What the probabilities of findings of a served model rest on: a calibration beside its files.

use std::path::{Path, PathBuf};

use crate::{
    adapters::lora::{base::BaseFingerprint, files::adapter_hash},
    eval::{
        findings::RuleSet,
        probability::calibration::{AskedModel, CALIBRATION_FILE, Calibration, CalibrationError},
    },
    qwen3_vl::weights::gguf::GgufParts,
};

/// What probabilities of a model rest on.
#[derive(Debug, Clone)]
pub enum FindingBasis {
    /// A calibration, and the model as it is here.
    Calibrated {
        /// The calibration.
        calibration: Box<Calibration>,
        /// Weights and settings of the model; prompt and system message are those of a request.
        here: Box<AskedModel>,
    },
    /// None, and why.
    Uncalibrated(String),
}

/// Where a model's files are.
#[derive(Debug, Clone, Default)]
pub struct FindingFiles {
    /// Folder of the base; `None` for weights that were drawn.
    pub model: Option<PathBuf>,
    /// Files that go with the base in GGUF.
    pub gguf: GgufParts,
    /// Folder of the adapter that was merged into the base at the start.
    pub merged: Option<PathBuf>,
    /// Quantisation at load time, by name.
    pub quantize: Option<String>,
}

impl FindingBasis {
    /// Finds the calibration of the base, or with `adapter` of that on the base.
    ///
    /// # Errors
    /// A calibration that is damaged, weights that cannot be read.
    pub fn find(files: &FindingFiles, adapter: Option<&Path>) -> Result<Self, CalibrationError> {
        let none = |why: &str| Ok(Self::Uncalibrated(why.to_owned()));
        let Some(model) = &files.model else {
            return none("the weights of this model are random");
        };
        if adapter.is_some() && files.merged.is_some() {
            return none("an adapter on a base that has another one merged is not calibrated");
        }
        let adapter = adapter.or(files.merged.as_deref());
        let folder = adapter.unwrap_or(model);
        if !folder.is_dir() {
            return none("a model in one file has no calibration.json beside it that is its own");
        }
        let path = folder.join(CALIBRATION_FILE);
        let Some(calibration) = Calibration::load(&path)? else {
            return none(
                "there is no calibration.json beside the model or adapter; `calibrate` makes one",
            );
        };
        let made_for = &calibration.model;
        if !made_for.form.is_of_sentences() && RuleSet::built_in(&made_for.rules).is_none() {
            return none(
                "its calibration reads drawn reports with a table of words that is a file; make one with a built-in table",
            );
        }
        let unread = |reason: String| CalibrationError::Damaged {
            path: path.clone(),
            reason,
        };
        let base =
            BaseFingerprint::of(model, &files.gguf).map_err(|error| unread(error.to_string()))?;
        let hash = adapter.map(adapter_hash).transpose();
        let here = AskedModel {
            base: base.sha256,
            adapter: hash.map_err(|error| unread(error.to_string()))?,
            quantize: files.quantize.clone(),
            ..AskedModel::default()
        };
        Ok(Self::Calibrated {
            calibration: Box::new(calibration),
            here: Box::new(here),
        })
    }
}

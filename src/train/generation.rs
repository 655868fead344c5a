//! Reports that are generated and scored in the middle of a run.

use std::sync::Arc;

use burn::{prelude::Backend, tensor::backend::BackendTypes};
use serde::{Deserialize, Serialize};

use super::outcome::TrainError;
use crate::qwen3_vl::Qwen3Vl;

/// Scores of generated reports, by name.
pub type GenerationScores = Vec<(&'static str, f64)>;

/// A generated report beside the true one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Generated {
    /// The reference report of the data set.
    pub truth: String,
    /// The reasoning before the report, for models that think.
    pub thinking: Option<String>,
    /// The generated report.
    pub report: String,
}

/// Reports of a batch, by its number, with a merged model on a device.
pub type GenerateBatch<B> = dyn Fn(&Qwen3Vl<B>, &<B as BackendTypes>::Device, usize) -> Result<Vec<Generated>, TrainError>
    + Send
    + Sync;

/// Generates reports with the model as it is after some steps and scores them.
pub struct GenerationScorer<B: Backend> {
    /// How many batches there are.
    pub batches: usize,
    /// Generates one of them; they are shared out among the devices.
    pub generate: Arc<GenerateBatch<B>>,
    /// Scores all reports, in the order of the batches.
    pub score:
        Box<dyn Fn(Vec<Generated>, usize) -> Result<GenerationScores, TrainError> + Send + Sync>,
}

//! What a run needs from the outside.

use std::{
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
};

use burn::train::{Interrupter, renderer::MetricsRenderer};

use super::{config::TrainConfig, words::Tell};
use crate::{base::trace::Trace, cluster::Cluster, dataset::Fetching};

/// Whether a run starts anew or resumes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Resume {
    /// A new run; an output folder that holds checkpoints is refused.
    No,
    /// From the newest whole checkpoint of the output folder; anew where there is none.
    Auto,
    /// From this checkpoint folder.
    From(PathBuf),
}

/// What a run needs from the outside.
pub struct RunOptions {
    /// Settings.
    pub config: TrainConfig,
    /// Whether to resume.
    pub resume: Resume,
    /// Called while images are fetched from the web.
    pub fetching: Option<Fetching>,
    /// Weights drawn at random in place of those in `model`, whose `config.json` counts.
    pub random_init: bool,
    /// The processes of the run, where it has several.
    pub cluster: Option<Arc<Cluster>>,
    /// Burn's dashboard, or a renderer that prints nothing.
    pub renderer: Option<Box<dyn MetricsRenderer>>,
    /// The Learner's stop handle, shared with the dashboard.
    pub interrupter: Interrupter,
    /// Set by a signal: save and end.
    pub interrupted: Arc<AtomicBool>,
    /// Trace of the host's work over time.
    pub trace: Trace,
    /// Plain progress lines.
    pub tell: Tell,
}

//! How a run ends: at its end, early, interrupted, or with an error.

use std::path::PathBuf;

use super::{
    checkpoint::{CheckpointError, TrainerState},
    checkpoint_dir::CheckpointDirError,
    ranks::RankError,
    records::RecordsError,
    report_command::Reported,
};
use crate::{
    base::files::FileError, cluster::ClusterError, dataset::DatasetError,
    ops::quantised::Quantization,
};

/// What ends a run before its time.
#[derive(Debug, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "each variant is the error of the part it names"
)]
pub enum TrainError {
    #[error(transparent)]
    Dataset(#[from] DatasetError),
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    #[error(transparent)]
    CheckpointDir(#[from] CheckpointDirError),
    #[error(transparent)]
    Records(#[from] RecordsError),
    #[error(transparent)]
    ReportCommand(#[from] super::report_command::ReportCommandError),
    #[error(transparent)]
    File(#[from] FileError),
    #[error(transparent)]
    Pipeline(#[from] crate::runtime::pipeline::PipelineError),
    #[error(transparent)]
    Adapter(#[from] crate::adapters::lora::config::AdapterError),
    #[error(transparent)]
    Base(#[from] crate::adapters::lora::base::BaseError),
    #[error(transparent)]
    Config(#[from] super::config::TrainConfigError),
    #[error(
        "step {step}: {what} is {value}; rows of the step (from 1): {rows:?}. The last checkpoint whose weights are known to give finite numbers is {checkpoint}; start another run from its weights (`--adapter`, with everything trained `--model`) with a lower learning_rate, or look at these rows with `check`"
    )]
    NotFinite {
        step: usize,
        what: &'static str,
        value: f64,
        rows: Vec<usize>,
        checkpoint: String,
    },
    #[error(
        "`{}` is quantised, and `tuner = \"full\"` trains the weights themselves, in 16 or 32 bits; train an adapter (`tuner = \"lora\"`), or take the checkpoint it was made from", .model.display()
    )]
    QuantisedFull { model: PathBuf },
    #[error(
        "`{}` is quantised as {found}, and `quantize` is \"{key}\"; leave the key out, or take the checkpoint it was made from", .model.display()
    )]
    QuantisedOtherwise {
        model: PathBuf,
        found: Quantization,
        key: String,
    },
    #[error("random weights are not quantised; leave out --random-init or `quantize`")]
    QuantisedRandom,
    #[error(
        "step {step} gave other bits when it was computed again: {gradients} elements of its gradients differ, losses {losses:?}; this device or one of the operations that `tuner`, `use_dora` and `dtype` call for sums in no fixed order, so leave out --deterministic or change them"
    )]
    NotDeterministic {
        step: usize,
        gradients: u64,
        losses: [f64; 2],
    },
    #[error("`{data}` has no sample to validate on; is every sample longer than max_length?")]
    NoTargets { data: String },
    #[error(
        "{0}; continue from the last checkpoint with `xray-qwen3vl train --config OUTPUT_DIR/config.toml --resume auto`"
    )]
    Rank(RankError),
    #[error("{}{}", .0, go_on(.0))]
    Process(ClusterError),
    #[error(
        "a thread failed: {0}; continue from the last checkpoint with `xray-qwen3vl train --config OUTPUT_DIR/config.toml --resume auto`"
    )]
    Thread(String),
    #[error("`{}` belongs to another run: {differences}; continue it with its own settings or choose another output_dir", .run.display())]
    OtherRun { run: PathBuf, differences: String },
    #[error("`{}` holds no whole checkpoint to continue from", .0.display())]
    NothingToResume(PathBuf),
    #[error("`{run}` holds a run already; continue it with `xray-qwen3vl train --config {run}/config.toml --resume auto`, or choose another --output-dir", run = .0.display())]
    RunExists(PathBuf),
    #[error("{0}")]
    Other(String),
}

/// What to do where the processes of a run have ended together.
fn go_on(error: &ClusterError) -> &'static str {
    match error {
        ClusterError::Ended(_) => "; the same command with `--resume auto` on all nodes goes on",
        _ => "",
    }
}

// Not by `#[from]`: their texts are in that of the variant, and would be printed a second time as its cause.
impl From<RankError> for TrainError {
    fn from(error: RankError) -> Self {
        match error {
            RankError::Process(error) => Self::Process(error),
            error => Self::Rank(error),
        }
    }
}

impl From<ClusterError> for TrainError {
    fn from(error: ClusterError) -> Self {
        Self::Process(error)
    }
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Ending {
    /// All steps were taken.
    Done,
    /// Early stopping.
    EarlyStop,
    /// Trained and held-out rewards have parted.
    RewardsPart,
    /// A signal or the dashboard's key.
    Interrupted,
}

impl Ending {
    /// Its name in files.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::EarlyStop => "early_stop",
            Self::RewardsPart => "rewards_part",
            Self::Interrupted => "interrupted",
        }
    }
}

/// How a run ended, with what.
pub struct Outcome {
    /// How it ended.
    pub ending: Ending,
    /// Its progress.
    pub state: TrainerState,
    /// What became of `report_command`.
    pub reported: Option<Reported>,
}

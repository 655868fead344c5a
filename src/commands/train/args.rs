//! The arguments of `train`.

use std::path::PathBuf;

use clap::Args;

use crate::{
    base::device_name::DtypeName,
    train::{budget::Budget, config::LossReduction},
};

/// Arguments of `train`; everything else is a key of the config file.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Settings of the run, TOML; `configs/openi-lora.toml` explains every key.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Base checkpoint folder.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Adapter to start from.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Training data: JSONL in ms-swift's form.
    #[arg(long, value_name = "FILE.jsonl")]
    pub train_data: Option<String>,
    /// Validation data.
    ///
    /// Without it, a run on --train-data of its own holds out 5 % of the rows, in whole studies
    /// (`--set split_dataset_ratio=F`; 0 validates on nothing).
    #[arg(long, value_name = "FILE.jsonl")]
    pub val_data: Option<String>,
    /// Where checkpoints, metrics and curves go.
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Devices, separated by commas: cuda:0,cuda:1 or cpu,cpu.
    #[arg(long, value_name = "DEVICES", value_delimiter = ',')]
    pub device: Vec<String>,
    /// Type of the base weights; adapters are f32.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Seed of order, adapters and dropout, the same on every device.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Generate and score this many held-out reports before the first step, at each validation and, with the
    /// images swapped between studies, at the end.
    #[arg(long, value_name = "N")]
    pub eval_generate: Option<usize>,
    /// What the loss of a step is the mean of.
    #[arg(long, value_enum)]
    pub loss_reduction: Option<LossReduction>,
    /// Join the samples of a step into rows of up to max_length tokens in place of padding.
    #[arg(long)]
    pub packing: bool,
    /// Tokens of a packed row, in place of max_length; implies --packing.
    #[arg(long, value_name = "N")]
    pub packing_tokens: Option<usize>,
    /// Choose what fits so many GiB of the device, or all that is free: tokens of a packed row, and what
    /// is computed again in the backward pass. Samples of a step and the loss stay as configured.
    #[arg(long, value_name = "auto|GIB")]
    pub memory_budget: Option<Budget>,
    /// Compute every 50th step twice, and end in an error where loss or gradients differ in a bit: 2 % more
    /// time. All sums have a fixed order in any case, on one device.
    #[arg(long)]
    pub deterministic: bool,
    /// Any other key of the config file; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Go on: `auto` from the newest whole checkpoint of the output folder, or a checkpoint folder. Settings
    /// as before, `--config DIR/config.toml` holds them; a finished run takes a higher max_steps.
    #[arg(long, value_name = "auto|DIR")]
    pub resume: Option<String>,
    /// Draw the weights at random; only `config.json` and the tokenizer of the model are read.
    #[arg(long)]
    pub random_init: bool,
    /// Write what loader threads and the device's host thread did when, in the form of Chrome's tracing.
    #[arg(long, value_name = "FILE.json")]
    pub trace: Option<PathBuf>,
    /// Plain progress lines, some 50 a run (`--set logging_steps=N`), in place of the dashboard. There, q and
    /// then s saves and ends as Ctrl-C does; q and then k ends at once, all since the last checkpoint is lost.
    #[arg(long)]
    pub no_tui: bool,
    /// Print this many held-out truths beside answers at the end.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub show: usize,
}

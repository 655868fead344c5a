//! The arguments of `train`.

use std::path::PathBuf;

use clap::Args;

use crate::{
    base::device_name::DtypeName,
    commands::{cluster_args::ClusterArgs, models::DownloadArgs, shared_args::GgufArgs},
    dataset::Columns,
    train::{budget::Budget, config::LossReduction, objective::settings::Objective},
};

/// Arguments of `train`; everything else is a key of the config file.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Config file of the run, TOML; `configs/openi-lora.toml` explains every key.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of the base checkpoint, or its name on Hugging Face or ModelScope (OWNER/NAME, NAME@REVISION) if
    /// it was downloaded; or a GGUF file.
    #[arg(long, value_name = "DIR|ID|FILE.gguf")]
    pub model: Option<PathBuf>,
    /// Files that go with a GGUF.
    #[command(flatten)]
    pub gguf: GgufArgs,
    /// Folder or name of a PEFT adapter to start from, or the folder of a run, whose best checkpoint is used.
    #[arg(long, value_name = "DIR|ID")]
    pub adapter: Option<PathBuf>,
    /// Downloads.
    #[command(flatten)]
    pub download: DownloadArgs,
    /// Training data: JSONL, JSON, CSV, TSV or Parquet (also .gz), in the forms of ms-swift, LLaMA-Factory, LLaVA or
    /// OpenAI; several with commas.
    ///
    /// Each is `[NAME=]PATH[:WEIGHT][#ROWS]`: a weight of 2 repeats its rows twice an epoch, 0.5 draws half of them;
    /// `#500` takes 500 rows. `data/README.md` lists what is read.
    #[arg(long, value_name = "DATA")]
    pub train_data: Option<String>,
    /// Validation data.
    ///
    /// Without it, a run on --train-data of its own holds out 5 % of the rows, in whole studies
    /// (`--set split_dataset_ratio=F`; 0 validates on nothing).
    #[arg(long, value_name = "DATA")]
    pub val_data: Option<String>,
    /// Columns of the data files under other names, ours first: `images=image_path,response=report`.
    #[arg(long, value_name = "OURS=THEIRS,…")]
    pub columns: Option<Columns>,
    /// Fetch images that rows name by an address on the web, once, into a cache folder.
    #[arg(long)]
    pub allow_image_urls: bool,
    /// Folder for checkpoints, metrics and curves.
    #[arg(long, value_name = "DIR")]
    pub output_dir: Option<PathBuf>,
    /// Devices, separated by commas: cuda:0,cuda:1 or cpu,cpu.
    #[arg(long, value_name = "DEVICES", value_delimiter = ',')]
    pub device: Vec<String>,
    /// Dtype of the base weights; adapters are always f32.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Seed of the sample order, the initial adapters and dropout; the same on every device.
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Number of held-out reports to generate and score before the first step, at each validation and, with
    /// the images swapped between studies, at the end.
    #[arg(long, value_name = "N")]
    pub eval_generate: Option<usize>,
    /// What is minimised: sft imitates the answers of the data, dpo prefers one answer of a row to another, grpo rewards
    /// the model's own answers (the config names the rewards).
    #[arg(long, value_enum)]
    pub objective: Option<Objective>,
    /// What the loss of a step is averaged over.
    #[arg(long, value_enum)]
    pub loss_reduction: Option<LossReduction>,
    /// Concatenate the samples of a step into rows of up to max_length tokens instead of padding them.
    #[arg(long)]
    pub packing: bool,
    /// Tokens of a packed row instead of max_length; implies --packing.
    #[arg(long, value_name = "N")]
    pub packing_tokens: Option<usize>,
    /// Choose settings that fit into this many GiB of device memory, or into all that is free: tokens of a
    /// packed row, and what is recomputed in the backward pass. The samples of a step and the loss stay as
    /// configured.
    #[arg(long, value_name = "auto|GIB")]
    pub memory_budget: Option<Budget>,
    /// Compute every 50th step twice, and end with an error if loss or gradients differ in a bit; takes 2 %
    /// more time. On one device all sums have a fixed order with or without this option.
    #[arg(long)]
    pub deterministic: bool,
    /// Any other key of the config file; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Continue a run: `auto` from the newest complete checkpoint of its folder, or from a checkpoint folder.
    /// The settings have to be the same: `--config DIR/config.toml` has them. A finished run can be extended
    /// with a higher max_steps.
    #[arg(long, value_name = "auto|DIR")]
    pub resume: Option<String>,
    /// Start from random weights; of the model, only `config.json` and the tokenizer are read.
    #[arg(long)]
    pub random_init: bool,
    /// Record the activity of the loader threads and of the thread that drives the device, in Chrome's
    /// tracing format.
    #[arg(long, value_name = "FILE.json")]
    pub trace: Option<PathBuf>,
    /// Print some 50 progress lines (`--set logging_steps=N` changes that) instead of the dashboard. In the
    /// dashboard, q and then s saves and ends as Ctrl-C does; q and then k ends at once without saving.
    #[arg(long)]
    pub no_tui: bool,
    /// Number of held-out reports to print beside the model's at the end.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub show: usize,
    /// Several machines, which train one model together.
    #[command(flatten)]
    pub cluster: ClusterArgs,
}

//! What can be typed: clap types only.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::{
    base::device_name::{DeviceName, DtypeName},
    ops::quantised::{Quantization, cache::CacheFormat},
    train::{budget::Budget, config::LossReduction},
};

/// The question the published system asks.
pub const DEFAULT_PROMPT: &str = "通过这张胸部X光影像可以诊断出什么？";

/// Fine-tunes Qwen3-VL on chest X-rays and writes Chinese radiology reports.
///
/// For research. Nothing it writes is a diagnosis.
#[derive(Debug, Parser)]
#[command(name = "xray-qwen3vl", version)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program does.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Write reports about images.
    ///
    /// Without arguments, about the repository's sample image, with the repository's tiny model.
    ///
    /// Each line of --json and --output is an object with these keys: `image` (the name as given; `;`
    /// between several), `image_encoding` (`percent` where the name is not UTF-8: `%` and two digits are a
    /// byte), `image_sha256`, `prompt`, `settings` (a hash of what else decides the answer), `report`,
    /// `thinking`, `finish_reason` (`stop`, `length`, `repetition`), `remarks` (a list of `code` and `text`:
    /// what a reader should know about the image), `prompt_tokens`, `completion_tokens`, `seconds`, `error`.
    Infer(InferArgs),
    /// Fine-tune a model.
    ///
    /// Without arguments, the tiny model on the sample data set, both from the repository: a minute or two on
    /// two CPU cores.
    Train(TrainArgs),
    /// Merge an adapter into its base model and write the result as a checkpoint.
    ///
    /// The written checkpoint is read back and compared with base plus adapter on a test input. Without an
    /// adapter, a checkpoint is rewritten in another dtype.
    Merge(MergeArgs),
    /// Quantise a checkpoint to 8 or 4 bits, for cards with less memory.
    ///
    /// The result loads without the original and takes adapters that were trained on the original. Every
    /// byte is read back and the model is run once before the command ends.
    Quantize(QuantizeArgs),
    /// Estimate a run before anything is loaded: parameters, memory, steps, tokens, time.
    Plan(PlanArgs),
    /// Score a model's reports, or a file of predictions, beside baselines: text metrics and findings.
    ///
    /// Without arguments, the tiny model that comes with the repository on the sample data set.
    Eval(Box<crate::commands::eval::EvalArgs>),
    /// Turn the OpenI-zh corpus, or any data set in a known form, into train.jsonl and val.jsonl.
    Convert(crate::commands::convert::ConvertArgs),
    /// Report the translation defects of a corpus, row by row, and propose a corrected copy.
    Clean(crate::commands::clean::CleanArgs),
    /// Validate a data set before a model is loaded.
    Check(crate::commands::check::CheckArgs),
    /// Draw a data set of synthetic chest radiographs with Chinese reports.
    Phantoms(PhantomsArgs),
    /// Write the config and tokenizer of the tiny model, for training it from random weights.
    InitTiny(InitTinyArgs),
    /// Serve a model to many people: OpenAI's API and a web page, in one process.
    ///
    /// Without arguments, the tiny model that comes with the repository at http://127.0.0.1:7860.
    Serve(crate::commands::serve::ServeArgs),
    /// List the devices of this machine, and check for each of their dtypes that results agree with the CPU.
    Doctor(crate::commands::doctor::DoctorArgs),
    /// Measure speed and memory of the model on this machine beside the hardware's limits, or of a server.
    Bench(BenchCommand),
}

/// `bench KIND …`, or `bench serve …`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
pub struct BenchCommand {
    /// A server.
    #[command(subcommand)]
    pub server: Option<BenchServer>,
    /// The model.
    #[command(flatten)]
    pub model: Option<crate::commands::bench::BenchArgs>,
}

/// What is measured besides the model.
#[derive(Debug, Subcommand)]
pub enum BenchServer {
    /// Send requests to a server from a number of users or at a fixed rate, and report percentiles.
    Serve(crate::commands::bench_serve::BenchServeArgs),
}

/// Which model, where.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Folder of a Qwen3-VL checkpoint, as published.
    #[arg(long, value_name = "DIR", default_value = "model/tiny")]
    pub model: PathBuf,
    /// Folder of a PEFT LoRA adapter. It is merged into the weights at load time; with quantised weights it
    /// stays separate.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Use the adapter even if it was trained on a different base model.
    #[arg(long)]
    pub any_base: bool,
    /// cpu, cuda, cuda:N, wgpu or wgpu:N; the default is the fastest one available. `infer` accepts several
    /// (cuda:0,cuda:1) and loads the model on each.
    #[arg(long, value_name = "DEVICE,..", value_delimiter = ',')]
    pub device: Vec<DeviceName>,
    /// Dtype of the weights; the default is bf16 on CUDA, f16 on other GPUs and f32 on the CPU.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Quantise the weights at load time: int8, int4 (groups of 64) or int4:32.
    ///
    /// The 8B model takes 8.8 GB as int8 and 5.3 GB as int4. `quantize` writes such a checkpoint to disk.
    #[arg(long, value_name = "FORMAT")]
    pub quantize: Option<Quantization>,
    /// Smallest size an image is scaled to, in pixels; by default that of the adapter's training, else the
    /// checkpoint's.
    #[arg(long, value_name = "PIXELS")]
    pub min_pixels: Option<usize>,
    /// Largest size an image is scaled to, in pixels, by default likewise; 1,024 pixels are one token.
    #[arg(long, value_name = "PIXELS")]
    pub max_pixels: Option<usize>,
}

/// How answers are generated.
#[derive(Debug, Clone, Args)]
pub struct GenerationArgs {
    /// Maximum number of tokens to generate.
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0 always takes the most likely token (greedy decoding).
    #[arg(
        long,
        value_name = "F",
        default_value_t = 0.0,
        allow_negative_numbers = true
    )]
    pub temperature: f32,
    /// Sample from the N most likely tokens; 0 means all.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub top_k: usize,
    /// Sample from the smallest set of tokens whose probabilities add up to this (nucleus sampling).
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub top_p: f32,
    /// Sample from tokens whose probability is at least this fraction of the highest.
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub min_p: f32,
    /// Penalty on tokens that occurred before; 1 means none, higher values make them less likely.
    #[arg(long, value_name = "F", default_value_t = 1.0)]
    pub repetition_penalty: f32,
    /// Do not end an answer that repeats itself.
    ///
    /// By default generation ends, with finish reason `repetition`, once the last tokens are one piece of up
    /// to 96 tokens at least four times in a row, and at least 32 tokens long. Hugging Face's `generate` has no such
    /// rule and goes on to the token limit; with this option both give the same text. Answers that follow a
    /// JSON schema are never ended this way.
    #[arg(long)]
    pub no_repetition_stop: bool,
    /// Seed of the random sampling.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
    /// Stop before this text is generated; can be given several times.
    #[arg(long, value_name = "TEXT")]
    pub stop: Vec<String>,
    /// Format of the key/value cache; int8 halves its memory and makes each token slower.
    #[arg(long, value_enum, default_value = "float")]
    pub kv_cache: CacheFormat,
}

/// Arguments of `infer`.
#[derive(Debug, Args)]
pub struct InferArgs {
    /// Images: PNG, JPEG, WebP, BMP, TIFF or DICOM. One report is written for each.
    #[arg(value_name = "IMAGE", conflicts_with = "images_dir")]
    pub images: Vec<PathBuf>,
    /// All images of a folder, sorted by name: files with the usual endings, and DICOM files of any name.
    ///
    /// What is skipped is counted on stderr.
    #[arg(long, value_name = "DIR")]
    pub images_dir: Option<PathBuf>,
    /// With --images-dir, also the images of all folders below it.
    #[arg(long, requires = "images_dir")]
    pub recursive: bool,
    /// Write a single report about all images (the views of one study).
    #[arg(long)]
    pub together: bool,
    /// Frame of multi-frame DICOM files or page of multi-page TIFF files, counted from 1.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub frame: Option<u32>,
    /// List the technical tags of DICOM files instead of writing reports; no patient data, no model needed.
    #[arg(long, conflicts_with_all = ["output", "stream"])]
    pub show_tags: bool,
    /// Question to the model.
    #[arg(long, value_name = "TEXT", default_value = DEFAULT_PROMPT)]
    pub prompt: String,
    /// System message.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Model and device.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Print the report while it is being generated.
    #[arg(long, conflicts_with_all = ["json", "output"])]
    pub stream: bool,
    /// Print one JSON object per report, with the keys that `help infer` lists.
    #[arg(long)]
    pub json: bool,
    /// Batch run: append one JSON object per report to this file.
    ///
    /// Started again, the run continues: images that have a report are skipped, except where the file has
    /// changed since (by SHA-256) or the report failed. Each image has one record; the report of an image that
    /// was exchanged is moved to FILE.replaced. Damaged lines are moved to FILE.damaged. `/dev/stdout` prints the
    /// lines and has nothing to continue from.
    #[arg(long, value_name = "FILE.jsonl")]
    pub output: Option<PathBuf>,
    /// Number of images processed together.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub batch_size: usize,
    /// Print timings, throughput and memory use to stderr.
    #[arg(long)]
    pub verbose: bool,
    /// Send the images to a server (`serve`, or another one with OpenAI's API) instead of loading a model;
    /// --batch-size is the number of concurrent requests.
    #[arg(long, value_name = "URL")]
    pub server: Option<String>,
    /// Model or adapter to use on the server; the default is its base model.
    #[arg(long, value_name = "NAME", requires = "server")]
    pub server_model: Option<String>,
    /// API key for the server.
    #[arg(long, value_name = "KEY", env = "XRAY_API_KEY", hide_env_values = true)]
    pub api_key: Option<String>,
}

/// Arguments of `train`; everything else is a key of the config file.
#[derive(Debug, Args)]
pub struct TrainArgs {
    /// Config file of the run, TOML; `configs/openi-lora.toml` explains every key.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of the base checkpoint.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Folder of a PEFT adapter to start from.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Training data: JSONL in ms-swift's format.
    #[arg(long, value_name = "FILE.jsonl")]
    pub train_data: Option<String>,
    /// Validation data.
    ///
    /// Without it, a run on --train-data of its own holds out 5 % of the rows, in whole studies
    /// (`--set split_dataset_ratio=F`; 0 validates on nothing).
    #[arg(long, value_name = "FILE.jsonl")]
    pub val_data: Option<String>,
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
}

/// Arguments of `init-tiny`.
#[derive(Debug, Args)]
pub struct InitTinyArgs {
    /// Folder to write.
    #[arg(long, value_name = "DIR", default_value = "artifacts/tiny-init")]
    pub output: PathBuf,
    /// Seed of the reports that the tokenizer is trained on.
    #[arg(long, value_name = "N", default_value_t = 7)]
    pub seed: u64,
}

/// Arguments of `phantoms`.
#[derive(Debug, Args)]
pub struct PhantomsArgs {
    /// Folder to write; must be new or empty.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Seed of the studies.
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// First study.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub from: u64,
    /// Number of studies.
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub count: u64,
    /// Short reports instead of full ones.
    #[arg(long)]
    pub plain: bool,
}

/// Arguments of `merge`.
#[derive(Debug, Args)]
pub struct MergeArgs {
    /// Folder of the base checkpoint.
    #[arg(long, value_name = "DIR", default_value = "model/tiny")]
    pub model: PathBuf,
    /// Folder of a PEFT adapter.
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
    /// Merge even if the adapter was trained on, or its config names, a different base model.
    #[arg(long)]
    pub any_base: bool,
    /// Folder to write; must not exist.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Dtype of the written weights; the default is that of the base.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Device used for merging.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceName>,
}

/// Arguments of `quantize`.
#[derive(Debug, Args)]
pub struct QuantizeArgs {
    /// Checkpoint folder, weights in 16 or 32 bits.
    #[arg(long, value_name = "DIR", default_value = "model/tiny")]
    pub model: PathBuf,
    /// Folder to write; must not exist.
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// 8: half the memory, almost the same answers. 4: a quarter of the memory, answers can differ.
    #[arg(long, value_name = "N")]
    pub bits: usize,
    /// With 4 bits, number of weights per scale, 64 or 32; 32 is more precise and 6 % larger [default: 64].
    #[arg(long, value_name = "N")]
    pub group: Option<usize>,
    /// Device used to test the result.
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceName>,
}

/// Arguments of `plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    /// Config file of the run.
    #[arg(long, value_name = "FILE", default_value = "configs/tiny.toml")]
    pub config: PathBuf,
    /// Checkpoint folder instead of the config's; its weights are not read.
    #[arg(long, value_name = "DIR")]
    pub model: Option<PathBuf>,
    /// Training data instead of the config's.
    #[arg(long, value_name = "FILE.jsonl")]
    pub train_data: Option<String>,
    /// Measured throughput, from `bench train` or an earlier run, for an estimate of the time.
    #[arg(long, value_name = "F", conflicts_with = "bench")]
    pub samples_per_second: Option<f64>,
    /// File written by `bench train --json`, whose throughput gives an estimate of the time.
    #[arg(long, value_name = "FILE.json")]
    pub bench: Option<PathBuf>,
    /// Choose settings that fit into this many GiB of device memory, or into all that is free, as `train`
    /// would.
    #[arg(long, value_name = "auto|GIB")]
    pub memory_budget: Option<Budget>,
    /// Any key of the config file, as in `train`; may be given several times.
    #[arg(long, value_name = "KEY=VALUE")]
    pub set: Vec<String>,
    /// Write the token histogram as SVG.
    #[arg(long, value_name = "FILE.svg")]
    pub histogram: Option<PathBuf>,
}

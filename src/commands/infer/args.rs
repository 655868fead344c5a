//! The arguments of `infer`.

use std::path::PathBuf;

use clap::Args;

use super::findings_args::FindingsArgs;
use crate::commands::{
    cluster_args::ClusterArgs,
    shared_args::{GenerationArgs, ModelArgs, ReadingArgs},
};

/// The question the published system asks.
pub const DEFAULT_PROMPT: &str = "通过这张胸部X光影像可以诊断出什么？";

/// Arguments of `infer`.
#[derive(Debug, Args)]
pub struct InferArgs {
    /// Images: PNG, JPEG, WebP, BMP, GIF, TIFF, JPEG 2000, JPEG-LS, PNM, NIfTI and NRRD, or DICOM. One
    /// report is written for each. Or data files in any form that `train` reads: one report for each row.
    ///
    /// A row of a data file (.jsonl, .json, .csv, .tsv, .parquet, also .gz) brings its own images, question and system
    /// message. Its last answer is not shown to the model and becomes `reference` in the record, so that `eval OUT.jsonl`
    /// scores the reports. A row with images alone gets the question of --prompt.
    #[arg(value_name = "IMAGE|DATA", conflicts_with = "images_dir")]
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
    /// Frame of multi-frame DICOM files, page of multi-page TIFF files, or plane of NIfTI and NRRD volumes (along their
    /// third and further axes), counted from 1.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub frame: Option<u32>,
    /// List the technical tags of DICOM files instead of writing reports; no patient data, no model needed.
    #[arg(long, conflicts_with_all = ["output", "stream"])]
    pub show_tags: bool,
    /// How data files are read.
    #[command(flatten)]
    pub reading: ReadingArgs,
    /// Question to the model; of rows of data files, only for those that have none [default: 通过这张胸部X光影像可以诊断出什么？].
    #[arg(long, value_name = "TEXT")]
    pub prompt: Option<String>,
    /// System message; of rows of data files, only for those that have none.
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,
    /// Model and device.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Generation.
    #[command(flatten)]
    pub generation: GenerationArgs,
    /// Probabilities of findings.
    #[command(flatten)]
    pub findings: FindingsArgs,
    /// Print the report while it is being generated.
    #[arg(long, conflicts_with_all = ["json", "output"])]
    pub stream: bool,
    /// Print one JSON object per report, with the keys that `help infer` lists.
    #[arg(long)]
    pub json: bool,
    /// Batch run: append one JSON object per report to this file.
    ///
    /// Started again, the run continues: images and rows that have a report are skipped, except where the file or the
    /// row has changed since (by SHA-256) or the report failed. Each image or row has one record; the report of an image that
    /// was exchanged is moved to FILE.replaced. Damaged lines are moved to FILE.damaged. `/dev/stdout` prints the
    /// lines and has nothing to continue from.
    #[arg(long, value_name = "FILE.jsonl")]
    pub output: Option<PathBuf>,
    /// Number of reports written together.
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
    /// Several machines, which write the reports of one --output.
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Seconds that nodes wait for each other before all end with an error.
    #[arg(long, value_name = "SECONDS", default_value_t = 1800.0)]
    pub cluster_timeout: f64,
}

impl InferArgs {
    /// The question that was typed, or the published one.
    pub(crate) fn prompt(&self) -> &str {
        self.prompt.as_deref().unwrap_or(DEFAULT_PROMPT)
    }
}

//! Flags that several commands have, each defined once: model, adapter, weights, generation, studies.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use super::{
    models::{DownloadArgs, find},
    progress::show_fetching,
    usage::UsageError,
};
use crate::{
    adapters::lora::{
        base::{BaseError, check_base},
        folder::{AdapterFolder, find_adapter},
    },
    base::{
        device_name::{DeviceName, DtypeName},
        hub::Want,
    },
    dataset::{Columns, DataOptions, ImageStore},
    ops::{
        memory::Budget,
        quantised::{Packing, cache::CacheFormat},
    },
    qwen3_vl::weights::gguf::GgufParts,
    runtime::generate::{GenerationConfig, SamplingConfig},
    study::StudyRule,
};

/// Which model, where.
#[derive(Debug, Clone, Args)]
pub struct ModelArgs {
    /// Folder of a Qwen3-VL checkpoint, or its name on Hugging Face or ModelScope
    /// (Qwen/Qwen3-VL-8B-Instruct, NAME@REVISION) if it was downloaded; `hf:` or `ms:` before it chooses the hub.
    ///
    /// As published: safetensors or files of PyTorch (pytorch_model.bin, read without running anything), in 16 or 32
    /// bits or quantised (fp8, AWQ, GPTQ, compressed-tensors, bitsandbytes); or a GGUF file, or a folder with one and
    /// its mmproj file.
    #[arg(long, value_name = "DIR|ID|FILE.gguf", default_value = "model/tiny")]
    pub model: PathBuf,
    /// Downloads.
    #[command(flatten)]
    pub download: DownloadArgs,
    /// Adapter of the model.
    #[command(flatten)]
    pub adapter: AdapterArgs,
    /// cpu, cuda, cuda:N, wgpu or wgpu:N; the default is the fastest one available. `infer` accepts several
    /// (cuda:0,cuda:1) and loads the model on each.
    #[arg(long, value_name = "DEVICE,..", value_delimiter = ',')]
    pub device: Vec<DeviceName>,
    /// How the weights are loaded.
    #[command(flatten)]
    pub load: LoadArgs,
}

/// An adapter beside its base.
#[derive(Debug, Clone, Args)]
pub struct AdapterArgs {
    /// Folder or name of a PEFT LoRA adapter, or the folder of a run, whose best checkpoint is used. It is merged into
    /// the weights at load time; with quantised weights it stays separate.
    #[arg(long, value_name = "DIR|ID")]
    pub adapter: Option<PathBuf>,
    /// Use the adapter even if it was trained on a different base model.
    #[arg(long)]
    pub any_base: bool,
}

impl ModelArgs {
    /// Replaces names by folders; `want` is what is needed of the model.
    ///
    /// # Errors
    /// Nothing of that name, or a download that fails.
    pub(super) fn find(&mut self, want: Want) -> Result<()> {
        self.model = find(&self.model, want, self.download)?;
        self.adapter.find(self.download)
    }
}

impl AdapterArgs {
    /// Replaces a name by a folder, and goes from a folder to the adapter in it, and says so where they are two.
    ///
    /// # Errors
    /// Nothing of that name, or a download that fails.
    pub(super) fn find(&mut self, download: DownloadArgs) -> Result<()> {
        if let Some(adapter) = &mut self.adapter {
            *adapter = found_adapter(&find(adapter, Want::Adapter, download)?);
        }
        Ok(())
    }

    /// Checks that the adapter, if there is one, was trained on `model`.
    ///
    /// # Errors
    /// Another base model, unless `--any-base` allows it.
    pub(super) fn check_base(&self, model: &Path, parts: &GgufParts) -> Result<(), BaseError> {
        match &self.adapter {
            Some(adapter) if !self.any_base => check_base(adapter, model, parts),
            _ => Ok(()),
        }
    }
}

/// The adapter that a folder leads to, named on stderr where it is not the folder itself.
pub(super) fn found_adapter(named: &Path) -> PathBuf {
    let AdapterFolder { dir, note } = find_adapter(named);
    if let Some(note) = note {
        eprintln!("{note}");
    }
    dir
}

/// How weights and images are loaded.
#[derive(Debug, Clone, Args)]
pub struct LoadArgs {
    /// Dtype of the weights; the default is bf16 on CUDA, f16 on other GPUs and f32 on the CPU.
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeName>,
    /// Quantise the weights at load time: int8, int4 (groups of 64), int4:32 or int4:128, or `keep`.
    ///
    /// The 8B model takes 8.8 GB as int8 and 5.3 GB as int4. `quantize` writes such a checkpoint to disk.
    /// `keep` leaves packed what another tool (AWQ, GPTQ, compressed-tensors, GGUF) has quantised, where that is
    /// held exactly, and quantises nothing else. `int4:64:zero` adds a zero point a group.
    #[arg(long, value_name = "FORMAT")]
    pub quantize: Option<Packing>,
    /// Device memory to stay within: GiB, or `auto` for what is free.
    ///
    /// Chooses the first form of the weights that fits beside the keys and values of the answers: as --dtype says,
    /// int8, then int4; then fewer answers at once (`serve`: fewer tokens in its cache). What was chosen is a remark of
    /// every result. `plan --cards` shows the choice for cards of several sizes.
    #[arg(long, value_name = "auto|GIB")]
    pub memory: Option<Budget>,
    /// Smallest size an image is scaled to, in pixels; by default that of the adapter's training, else the
    /// checkpoint's.
    #[arg(long, value_name = "PIXELS")]
    pub min_pixels: Option<usize>,
    /// Largest size an image is scaled to, in pixels, by default likewise; 1,024 pixels are one token.
    #[arg(long, value_name = "PIXELS")]
    pub max_pixels: Option<usize>,
    /// Files that go with a GGUF.
    #[command(flatten)]
    pub gguf: GgufArgs,
}

/// Files that go with a model in GGUF.
#[derive(Debug, Clone, Default, Args)]
pub struct GgufArgs {
    /// With a model in GGUF: the file of its vision tower; by default the only mmproj file beside it.
    #[arg(long, value_name = "FILE.gguf")]
    pub mmproj: Option<PathBuf>,
    /// Folder whose tokenizer, chat template, image processor and end tokens are used in place of the model's;
    /// for a GGUF that lacks them. By default a GGUF's own are used, then the files beside it.
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
}

impl GgufArgs {
    /// As the library takes them.
    pub(super) fn parts(&self) -> GgufParts {
        GgufParts {
            mmproj: self.mmproj.clone(),
            tokenizer: self.tokenizer.clone(),
        }
    }
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
    /// Format of the key/value cache; int8 halves its memory, and outside CUDA makes each token slower.
    #[arg(long, value_enum, default_value = "float")]
    pub kv_cache: CacheFormat,
}

/// What was typed as the library takes it.
///
/// # Errors
/// [`UsageError`] for a value out of range.
pub(super) fn generation_config(args: &GenerationArgs) -> Result<GenerationConfig> {
    let sampling = SamplingConfig {
        temperature: args.temperature,
        top_k: args.top_k,
        top_p: args.top_p,
        min_p: args.min_p,
        repetition_penalty: args.repetition_penalty,
        seed: args.seed,
    };
    if let Err(reason) = sampling.check() {
        bail!(UsageError(reason));
    }
    if args.max_new_tokens == 0 {
        bail!(UsageError(
            "--max-new-tokens is 0, expected at least 1".into()
        ));
    }
    Ok(GenerationConfig {
        max_new_tokens: args.max_new_tokens,
        sampling,
        stop_on_repetition: !args.no_repetition_stop,
        kv_cache: args.kv_cache,
        ..GenerationConfig::default()
    })
}

/// Where the study of an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StudyFrom {
    /// In its folder.
    Folder,
    /// Before the first `_` of its file name.
    Name,
    /// Nowhere: every image is a study of its own.
    Image,
}

/// How data files are read.
#[derive(Debug, Clone, Args)]
pub struct ReadingArgs {
    /// Columns of the data files under other names, ours first: `images=image_path,response=report`.
    #[arg(long, value_name = "OURS=THEIRS,…")]
    pub columns: Option<Columns>,
    /// Fetch images that rows name by an address on the web, once, into a cache folder.
    #[arg(long)]
    pub allow_image_urls: bool,
    /// Draws rows of data sets that count with a part of them; that of a run where there is one.
    #[arg(skip = 42_u64)]
    pub seed: u64,
}

impl ReadingArgs {
    /// As the reader takes them.
    pub(super) fn options(&self) -> DataOptions {
        DataOptions {
            columns: self.columns.clone().unwrap_or_default(),
            allow_image_urls: self.allow_image_urls,
            seed: self.seed,
            columns_may_be_absent: false,
            pairs: false,
            store: ImageStore::default().with_progress(Some(show_fetching)),
        }
    }
}

/// What a study is, where rows do not name it.
#[derive(Debug, Clone, Args)]
pub struct StudyArgs {
    /// Key of a row that names its study.
    ///
    /// Without it, `study`, `study_id` or `uid` count where a row has them, and `patient`, `patient_id` or
    /// `subject_id` for the patient. Without any rule, studies are guessed from the paths of all images, and the
    /// guess is reported with its count.
    #[arg(long, alias = "study_key", value_name = "KEY", group = "study_rule")]
    pub study_key: Option<String>,
    /// Expression whose first group is the study in the path of an image, such as `(p[0-9]+/s[0-9]+)/`.
    ///
    /// Groups named `study` and `patient` name both.
    #[arg(long, alias = "study_regex", value_name = "RE", group = "study_rule")]
    pub study_regex: Option<String>,
    /// Where the study of an image is written.
    #[arg(long, alias = "study_from", value_enum, group = "study_rule")]
    pub study_from: Option<StudyFrom>,
}

impl StudyArgs {
    /// The rule typed; the guess without one.
    ///
    /// # Errors
    /// An expression that is none, or has no group.
    pub fn rule(&self) -> Result<StudyRule> {
        if let Some(key) = &self.study_key {
            return Ok(StudyRule::Key(key.clone()));
        }
        if let Some(regex) = &self.study_regex {
            let rule = StudyRule::regex(regex);
            return Ok(rule.map_err(|error| UsageError(format!("--study-regex: {error}")))?);
        }
        Ok(match self.study_from {
            None => StudyRule::Guess,
            Some(StudyFrom::Folder) => StudyRule::Folder,
            Some(StudyFrom::Name) => StudyRule::Name,
            Some(StudyFrom::Image) => StudyRule::Image,
        })
    }
}

/// The device of a command that works on one.
pub(super) fn one_device(devices: &[DeviceName]) -> Result<Option<DeviceName>> {
    match devices {
        [] => Ok(None),
        [device] => Ok(Some(*device)),
        [..] => bail!(UsageError(
            "--device names several devices, expected one".into()
        )),
    }
}

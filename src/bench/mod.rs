//! Measuring the model as it is used: loading, vision, prefill, decode, training.
//!
//! Everything goes through the calls that `infer` and `train` make, on requests of OpenI's shape, and
//! is set against what the device can do at best in the same run. Nothing is printed here.

pub mod clock;
pub mod count;
pub mod device;
pub mod drafts;
pub mod infer;
pub mod operations;
pub mod report;
pub mod scale;
pub mod train;
pub mod train_devices;

use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    time::Instant,
};

use burn::{prelude::*, tensor::DType};

use crate::{
    adapters::quantised::{memory::weight_bytes, model_to_device},
    base::{
        device_name::DeviceKind,
        files::FileError,
        system::{available_memory, peak_memory},
    },
    ops::quantised::Quantization,
    qwen3_vl::{
        Qwen3Vl,
        config::{ConfigError, Qwen3VlConfig},
        nn::InitOptions,
        weights::{
            LoadProgress, MAX_SHARD_BYTES, checkpoint_files_with,
            gguf::{GgufParts, is_gguf},
            parameter_shapes, save_checkpoint,
        },
    },
    runtime::{
        accelerator::Accelerator,
        pipeline::{PipelineError, PipelineOptions, load_models},
        synthetic::{
            requests::{IMAGE_SIDE, Requests},
            weights::{RandomSize, draw},
        },
    },
    train::{checkpoint::dtype_text, parameters::base_parameters},
};
use device::{DeviceFacts, MemoryWatch};
use operations::OperationLog;
use report::Record;

/// Seed of weights and requests: a bench measures the same thing each time.
pub const SEED: u64 = 7;

/// What keeps a measurement from being made.
#[derive(Debug, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "each variant is the error of the part it names"
)]
pub enum BenchError {
    #[error(transparent)]
    Pipeline(#[from] PipelineError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Generate(#[from] crate::runtime::generate::GenerateError),
    #[error(transparent)]
    Positions(#[from] crate::batch::positions::PositionError),
    #[error(transparent)]
    Adapter(#[from] crate::adapters::lora::config::AdapterError),
    #[error(transparent)]
    TrainConfig(#[from] crate::train::config::TrainConfigError),
    #[error(transparent)]
    Rank(#[from] crate::train::ranks::RankError),
    #[error(transparent)]
    Spread(#[from] crate::runtime::spread::SpreadError),
    #[error(transparent)]
    File(#[from] crate::base::files::FileError),
    #[error(
        "the text with drafts is not that without: an engine's sums depend on the rows of its steps"
    )]
    Drafts,
    #[error("{0}")]
    Size(String),
    #[error(
        "the random {size} model needs about {need:.1} GiB of memory as {dtype:?}, {free:.1} GiB are free; try a smaller --random-weights, --layers or --dtype bf16"
    )]
    Memory {
        size: &'static str,
        need: f64,
        free: f64,
        dtype: DType,
    },
}

/// Where the weights come from.
#[derive(Debug, Clone, PartialEq)]
pub enum Source {
    /// A checkpoint: a folder or a GGUF file, and the other files of a GGUF.
    Folder(PathBuf, GgufParts),
    /// Drawn on the device.
    Random {
        /// Size of the model.
        size: RandomSize,
        /// Decoder layers, when fewer than the published number.
        layers: Option<usize>,
    },
}

impl Source {
    /// Sizes of the model.
    ///
    /// # Errors
    /// The folder's `config.json` cannot be used, or the model cannot have so many layers.
    pub fn config(&self) -> Result<Qwen3VlConfig, BenchError> {
        match self {
            Self::Folder(dir, _) if !dir.is_dir() && !is_gguf(dir) => {
                Err(PipelineError::NoModel(dir.clone()).into())
            }
            Self::Folder(dir, gguf) => Ok(Qwen3VlConfig::from_model(dir, gguf)?),
            Self::Random { size, layers } => size.config(*layers).map_err(BenchError::Size),
        }
    }

    /// Name in the records.
    pub fn name(&self) -> String {
        match self {
            Self::Folder(dir, _) => dir.display().to_string(),
            Self::Random { size, .. } => format!("random {}", size.name()),
        }
    }

    /// Bytes that loading reads (the checkpoint's files) or writes (`drawn` weights).
    fn load_bytes(&self, drawn: f64) -> Result<f64, BenchError> {
        match self {
            Self::Folder(dir, gguf) => Ok(checkpoint_files_with(dir, gguf)
                .map_err(PipelineError::from)?
                .iter()
                .filter_map(|file| file.metadata().ok())
                .map(|file| file.len() as f64)
                .sum()),
            Self::Random { .. } => Ok(drawn),
        }
    }
}

/// A folder that goes with its name.
#[derive(Debug)]
pub struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    fn in_dir(dir: &Path) -> Result<Self, FileError> {
        let folder = dir.join(format!("xray-qwen3vl-bench-{}", std::process::id()));
        std::fs::create_dir(&folder).map_err(|cause| FileError::write(&folder, cause))?;
        Ok(Self(folder))
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A device with everything a measurement needs to know about it.
#[derive(Debug)]
pub struct Bench<B: Backend> {
    /// Where the weights come from.
    pub source: Source,
    /// Sizes of the model.
    pub config: Qwen3VlConfig,
    /// Where the work is done.
    pub device: B::Device,
    /// Type of the weights.
    pub dtype: DType,
    /// Who the device is.
    pub facts: DeviceFacts,
    /// Lengths as OpenI-zh has them, in place of one length.
    pub mixed: bool,
    /// Tokens of every prompt, in place of 368; training has its own lengths.
    pub tokens: Option<usize>,
    /// Side of every image, in pixels.
    pub image_side: usize,
    /// Measured calls; each kind of measurement has its own default.
    pub samples: Option<usize>,
    /// How weights are quantised while they are loaded or drawn.
    pub quantize: Option<Quantization>,
    /// What is drafted besides, in measurements of decoding.
    pub drafts: Option<drafts::ForcedDrafts>,
    memory: MemoryWatch,
    operations: RefCell<Option<OperationLog>>,
}

impl<B: Accelerator> Bench<B> {
    /// Prepares measurements; nothing is loaded yet.
    ///
    /// # Errors
    /// The model's sizes cannot be read.
    pub fn new(
        source: Source,
        device: B::Device,
        dtype: DType,
        mixed: bool,
        samples: Option<usize>,
    ) -> Result<Self, BenchError> {
        let config = source.config()?;
        let facts = DeviceFacts::of::<B>(&device);
        let memory = MemoryWatch::start(&facts);
        Ok(Self {
            source,
            config,
            device,
            dtype,
            facts,
            mixed,
            tokens: None,
            image_side: IMAGE_SIDE,
            samples,
            quantize: None,
            drafts: None,
            memory,
            operations: RefCell::new(OperationLog::from_environment()),
        })
    }

    /// Loads or draws the model and waits for it: the model and the seconds it took.
    ///
    /// `A` is the backend or its autodiff form.
    ///
    /// # Errors
    /// The checkpoint cannot be loaded, or the host has no room for a model on the CPU.
    pub fn model<A: Accelerator<Device = B::Device>>(
        &self,
        on_progress: LoadProgress<'_>,
    ) -> Result<(Qwen3Vl<A>, f64), BenchError> {
        let (mut models, seconds) =
            self.models::<A>(std::slice::from_ref(&self.device), on_progress)?;
        Ok((models.remove(0), seconds))
    }

    /// [`Bench::model`] on each of some devices: files are read once, a drawn model is copied.
    ///
    /// # Errors
    /// As [`Bench::model`].
    pub fn models<A: Accelerator<Device = B::Device>>(
        &self,
        devices: &[B::Device],
        on_progress: LoadProgress<'_>,
    ) -> Result<(Vec<Qwen3Vl<A>>, f64), BenchError> {
        let start = Instant::now();
        let models = match &self.source {
            Source::Folder(dir, gguf) => {
                let options = PipelineOptions {
                    quantize: self.quantize.map(Into::into),
                    gguf: gguf.clone(),
                    ..PipelineOptions::new(dir.clone(), self.dtype)
                };
                load_models::<A>(&options, &self.config, devices, on_progress)?
            }
            Source::Random { size, .. } => {
                self.check_host_memory(*size)?;
                let first = draw::<A>(&self.config, SEED, self.dtype, self.quantize, &devices[0]);
                let copies = devices[1..]
                    .iter()
                    .map(|device| model_to_device(first.clone(), device))
                    .collect::<Vec<_>>();
                // What was drawn on the way: the pages are not those of what is measured.
                devices.iter().for_each(B::memory_cleanup);
                std::iter::once(first).chain(copies).collect()
            }
        };
        for device in devices {
            let _ = B::sync(device);
        }
        Ok((models, start.elapsed().as_secs_f64()))
    }

    /// Draws the model, writes it as a checkpoint to a new folder in `dir`, and measures that from then on;
    /// the folder is there as long as what is returned.
    ///
    /// # Errors
    /// As [`Bench::model`]; the files cannot be written.
    pub fn write_checkpoint(&mut self, dir: &Path) -> Result<TemporaryFolder, BenchError> {
        // Floats, to be quantised when they are loaded.
        let quantize = self.quantize.take();
        let model = self.model::<B>(&mut |_, _| {});
        self.quantize = quantize;
        let (model, _) = model?;
        std::fs::create_dir_all(dir).map_err(|cause| FileError::write(dir, cause))?;
        let folder = TemporaryFolder::in_dir(dir)?;
        let config = folder.0.join("config.json");
        let text = self.config.to_published_json(dtype_text(self.dtype));
        std::fs::write(&config, text).map_err(|cause| FileError::write(&config, cause))?;
        save_checkpoint(&model, &folder.0, MAX_SHARD_BYTES)?;
        self.source = Source::Folder(folder.0.clone(), GgufParts::default());
        Ok(folder)
    }

    /// The process ends when the CPU's memory runs out, so free memory is checked before.
    fn check_host_memory(&self, size: RandomSize) -> Result<(), BenchError> {
        const GIB: f64 = (1u64 << 30) as f64;
        let need = self.weight_bytes();
        match available_memory() {
            Some(free) if B::KIND == DeviceKind::Cpu && need > free as f64 => {
                Err(BenchError::Memory {
                    size: size.name(),
                    need: need / GIB,
                    free: free as f64 / GIB,
                    dtype: self.dtype,
                })
            }
            _ => Ok(()),
        }
    }

    /// Bytes of all weights on the device.
    fn weight_bytes(&self) -> f64 {
        count::weight_bytes(&self.config, self.dtype.size()) - self.saved_bytes("")
    }

    /// Bytes that quantisation saves on the weights whose path begins with `prefix`.
    fn saved_bytes(&self, prefix: &str) -> f64 {
        let Some(quantization) = self.quantize else {
            return 0.0;
        };
        let model = Qwen3Vl::<B>::new(&self.config, &InitOptions::default(), &self.device);
        let mut shapes = parameter_shapes(&model);
        shapes.retain(|path, _| path.starts_with(prefix));
        let bytes = |quantization| weight_bytes(&shapes, quantization, self.dtype.size());
        (bytes(None) - bytes(Some(quantization))) as f64
    }

    /// Bytes that quantisation saves on one pass through the language model and its head.
    fn saved_text_bytes(&self) -> f64 {
        let head = if self.config.tie_word_embeddings {
            "model.language_model.embed_tokens."
        } else {
            "lm_head."
        };
        self.saved_bytes("model.language_model.layers.") + self.saved_bytes(head)
    }

    /// A record with all that is known before the measurement; forgets earlier peaks of memory.
    fn record(&self, bench: &str, name: String, batch: usize) -> Record {
        self.memory.take_peak_gib();
        let image_side = (self.image_side != IMAGE_SIDE).then_some(self.image_side);
        let mut record = Record {
            bench: bench.to_string(),
            name: [
                name,
                if self.mixed {
                    "_mixed".into()
                } else {
                    String::new()
                },
                image_side.map_or_else(String::new, |side| format!("_i{side}")),
            ]
            .concat(),
            model: self.source.name(),
            layers: self.config.text_config.num_hidden_layers,
            parameters: base_parameters(&self.config),
            dtype: match self.quantize {
                None => dtype_text(self.dtype).to_string(),
                Some(quantization) => format!("{} ({quantization})", dtype_text(self.dtype)),
            },
            program: format!(
                "xray-qwen3vl {} on burn 0.21.0, built with {}",
                env!("CARGO_PKG_VERSION"),
                crate::accelerate::devices::built_backends().join(", ")
            ),
            batch,
            mixed: self.mixed,
            image_side,
            ..Record::default()
        };
        record.set_device(&self.facts);
        record
    }

    /// Requests of the configured lengths and images.
    pub fn requests(&self) -> Requests<'_> {
        Requests::new(&self.config, self.mixed, SEED)
            .with_image_side(self.image_side)
            .with_tokens(self.tokens)
    }

    /// Measured calls: as configured, or `default`; one where operations are timed.
    fn samples(&self, default: usize) -> usize {
        match self.operations.borrow().as_ref() {
            Some(_) => 1,
            None => self.samples.unwrap_or(default),
        }
    }

    /// Whether operations are timed one by one, so that no other time means anything.
    pub fn is_profiled(&self) -> bool {
        self.operations.borrow().is_some()
    }

    /// Lets the table of operations begin here, in a profiled process.
    fn mark_operations(&self) {
        if let Some(log) = self.operations.borrow_mut().as_mut() {
            let _ = B::sync(&self.device);
            log.mark();
        }
    }

    /// Writes the operations since the mark, in a profiled process.
    fn note_operations(&self, record: &mut Record) {
        record.operations = self
            .operations
            .borrow()
            .as_ref()
            .map(OperationLog::since_mark);
    }

    /// Writes the memory peaks of a measurement that has ended.
    fn note_memory(&self, record: &mut Record) {
        let gib = |bytes: u64| bytes as f64 / (1u64 << 30) as f64;
        record.device_memory_peak_gib = self.memory.take_peak_gib();
        if let Some(memory) = B::memory_in_use(&self.device) {
            record.device_memory_reserved_gib = Some(gib(memory.reserved));
            record.device_memory_in_use_gib = Some(gib(memory.in_use));
        }
        record.host_memory_peak_gib = peak_memory().map(gib);
    }

    /// Bytes of an element of the weights.
    fn element(&self) -> usize {
        self.dtype.size()
    }
}

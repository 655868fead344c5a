//! A model ready for inference: weights, processor, tokenizer and template of one checkpoint.

mod sources;

use std::path::{Path, PathBuf};

use burn::{prelude::*, tensor::DType};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::{
    adapters::{
        lora::{
            config::AdapterError,
            files::{attach_adapter, trained_pixel_limits},
            merge::merge_unless_quantised,
        },
        quantised::{
            Formats,
            files::formats_of,
            load::{kept_formats, load_packed, quantise},
            memory::bytes_in_formats,
        },
    },
    base::{
        device_name::{DeviceKind, dtype_text},
        files::hint::folder_hint,
        hub::repo_of_folder,
    },
    batch::images::ImageInput,
    ops::{
        compact,
        memory::{Budget, free_memory},
        quantised::{Format, Packing, Quantization, cache::CacheFormat},
    },
    processor::{
        chat::{ChatError, ChatTemplate, RenderOptions, encode_chat},
        image::{ImageError, RgbImage},
        message::{Content, Message, Role, split_thinking},
        patches::{ImageProcessor, ImageProcessorConfig},
        tokenizer::{Tokenizer, TokenizerError},
    },
    qwen3_vl::{
        Qwen3Vl,
        config::{ConfigError, Qwen3VlConfig},
        nn::InitOptions,
        weights::{
            Checkpoint, LoadProgress, WeightsError,
            gguf::{self, GgufParts},
            load_opened, parameter_shapes,
        },
    },
    runtime::{
        accelerator::Accelerator,
        fit::{CacheWish, Fit, InferenceMemory, TooSmall},
        generate::{
            FinishReason, GenerateError, GenerationConfig, PREFILL_TOKENS, Prompt, PromptState,
            Timing, generate_and_keep, text::TextStream,
        },
    },
};

use sources::{image_config, remarks, tokenizer};

/// Why a model cannot be loaded or run.
#[derive(Debug, thiserror::Error)]
#[allow(
    missing_docs,
    reason = "each variant is the error of the part it names"
)]
pub enum PipelineError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    #[error(transparent)]
    Chat(#[from] ChatError),
    #[error(transparent)]
    Image(#[from] ImageError),
    #[error(transparent)]
    Generate(#[from] GenerateError),
    #[error("`{}` is not the folder of a checkpoint; expected `config.json`, `tokenizer.json` and `model.safetensors` (or shards with their index) in it; `model/README.md` says how to download one{}", .0.display(), folder_hint(.0, "config.json"))]
    NoModel(PathBuf),
    #[error("`{}` holds no whole tokenizer; name the folder of the original checkpoint with --tokenizer, or put its `tokenizer.json` beside the file", .0.display())]
    GgufTokenizer(PathBuf),
    #[error("`{}`: `{key}` is {found} for the image processor and {expected} in the vision_config of config.json; the two must agree", .path.display())]
    Patches {
        path: PathBuf,
        key: &'static str,
        found: usize,
        expected: usize,
    },
    #[error("`{}`: {reason}; copy the file of the published checkpoint, or remove it: then `config.json` and the tokenizer say what ends an answer", .path.display())]
    GenerationConfig { path: PathBuf, reason: String },
    #[error(
        "the tokenizer in `{}` has {found} tokens, the model only {expected}; do they belong together?",
        .path.display()
    )]
    VocabSize {
        path: PathBuf,
        found: usize,
        expected: usize,
    },
    #[error(transparent)]
    TooSmall(#[from] TooSmall),
    #[error("--memory: {0}")]
    Budget(String),
    #[error(
        "the model needs about {need:.1} GiB of memory as {}, {free:.1} GiB are free; try `--dtype bf16` or `--quantize int8`, a smaller model, or close other programs",
        dtype_text(*.dtype)
    )]
    Memory { need: f64, free: f64, dtype: DType },
}

/// What to load and how.
#[derive(Debug, Clone)]
pub struct PipelineOptions {
    /// Checkpoint folder.
    pub model: PathBuf,
    /// PEFT adapter folder, merged into the weights; on quantised weights it stays separate.
    pub adapter: Option<PathBuf>,
    /// Type of the weights on the device.
    pub dtype: DType,
    /// Quantise the weights of a 16-bit checkpoint while they are loaded; one that is quantised on the disk
    /// stays as it is.
    pub quantize: Option<Packing>,
    /// Smallest image the model is shown, in pixels; when absent, see [`LimitsFrom`].
    pub min_pixels: Option<usize>,
    /// Largest image the model is shown, in pixels; when absent, see [`LimitsFrom`].
    pub max_pixels: Option<usize>,
    /// Files that go with a model in GGUF, where they are named.
    pub gguf: GgufParts,
    /// Memory to stay within: `quantize` is chosen where it is absent, and how many tokens can be kept.
    pub memory: Option<MemoryLimit>,
}

/// Memory of a device that a model and its work may take.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryLimit {
    /// How much.
    pub budget: Budget,
    /// What is wanted beside the weights.
    pub room: Room,
    /// Format of keys and values, where it is fixed.
    pub kv_cache: Option<CacheFormat>,
}

/// Room for keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Room {
    /// For answers that are computed together.
    Answers {
        /// How many.
        rows: usize,
        /// Images of each, of the largest size.
        images: usize,
        /// Tokens of each beside its images.
        text: usize,
    },
    /// For a cache that requests share.
    Shared {
        /// Tokens that are wanted.
        tokens: usize,
        /// Fewest tokens that are of use.
        least: usize,
        /// Tokens of a prompt that go through the layers at once.
        at_once: usize,
    },
}

/// Who says between how many pixels an image is scaled, the first that does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LimitsFrom {
    /// The caller, one limit or both.
    Options,
    /// The training run of the adapter.
    Adapter,
    /// The checkpoint's `processor_config.json` or `preprocessor_config.json`.
    Checkpoint,
    /// Nobody: the training recipe's are taken.
    Recipe,
}

impl std::fmt::Display for LimitsFrom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Options => "as given",
            Self::Adapter => "as in the training of the adapter",
            Self::Checkpoint => "as the checkpoint's processor files say",
            Self::Recipe => "the recipe's, since the checkpoint has no processor file",
        })
    }
}

/// Text side of a checkpoint: all that is needed to make prompts and read answers.
#[derive(Debug, Clone)]
pub struct TextAndImages {
    /// Sizes.
    pub config: Qwen3VlConfig,
    /// Image processor: images to patches.
    pub images: ImageProcessor,
    /// Text to ids.
    pub tokenizer: Tokenizer,
    /// Messages to text.
    pub template: ChatTemplate,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Where the pixel limits of `images` come from.
    pub limits_from: LimitsFrom,
    /// Pixel limits of the checkpoint itself.
    checkpoint_limits: [usize; 2],
    /// What a reader of the results should know about how the checkpoint was read.
    pub remarks: Vec<String>,
}

impl TextAndImages {
    /// [`Self::pixel_limits`] where somebody may expect others: unless they were given, or those of the
    /// checkpoint and the recipe are the same.
    pub fn pixel_limits_to_know(&self) -> Option<String> {
        let limits = |config: &ImageProcessorConfig| [config.min_pixels, config.max_pixels];
        let ours = limits(self.images.config());
        let recipe = limits(&ImageProcessorConfig::default());
        let expected = ours == recipe && ours == self.checkpoint_limits;
        (self.limits_from != LimitsFrom::Options && !expected).then(|| self.pixel_limits())
    }

    /// The pixel limits in force and where they come from, as one sentence for a log.
    pub fn pixel_limits(&self) -> String {
        let ImageProcessorConfig {
            min_pixels,
            max_pixels,
            ..
        } = self.images.config();
        format!(
            "images are scaled to between {min_pixels} and {max_pixels} pixels, {}",
            self.limits_from
        )
    }

    /// Reads everything of a checkpoint but its weights.
    ///
    /// # Errors
    /// [`PipelineError`] names the file.
    pub fn load(options: &PipelineOptions) -> Result<Self, PipelineError> {
        let dir = &options.model;
        if !dir.join("config.json").is_file() && !gguf::is_model(dir) {
            return Err(PipelineError::NoModel(dir.clone()));
        }
        let config = Qwen3VlConfig::from_model(dir, &options.gguf)?;
        Self::load_for(options, config)
    }

    /// [`Self::load`] for a model of other sizes than the folder's.
    ///
    /// # Errors
    /// [`PipelineError`] names the file.
    pub fn load_for(
        options: &PipelineOptions,
        config: Qwen3VlConfig,
    ) -> Result<Self, PipelineError> {
        let pair = gguf::find(&options.model, &options.gguf)?;
        // Files of the original checkpoint beside a GGUF, or where they are said to be.
        let dir = match (&options.gguf.tokenizer, &pair) {
            (Some(dir), _) => dir.as_path(),
            (None, Some(pair)) => pair.folder(),
            (None, None) => &options.model,
        };
        let mut remarks = remarks(options, &config)?;
        let (mut image_config, mut limits_from) = image_config(&config, pair.as_ref(), dir)?;
        let checkpoint_limits = [image_config.min_pixels, image_config.max_pixels];
        let trained = options.adapter.as_deref().map(trained_pixel_limits);
        if let Some([min_pixels, max_pixels]) = trained.transpose()?.flatten() {
            image_config.min_pixels = min_pixels;
            image_config.max_pixels = max_pixels;
            limits_from = LimitsFrom::Adapter;
        }
        if let Some(pixels) = options.min_pixels {
            image_config.min_pixels = pixels;
        }
        if let Some(pixels) = options.max_pixels {
            image_config.max_pixels = pixels;
        }
        if options.min_pixels.is_some() || options.max_pixels.is_some() {
            limits_from = LimitsFrom::Options;
        }
        check_patches(dir, &image_config, &config)?;
        let images = ImageProcessor::new(image_config)?;
        let tokenizer = tokenizer(options, pair.as_ref(), dir, &mut remarks)?;
        if tokenizer.vocab_size() > config.text_config.vocab_size {
            return Err(PipelineError::VocabSize {
                path: dir.to_path_buf(),
                found: tokenizer.vocab_size(),
                expected: config.text_config.vocab_size,
            });
        }
        // The adapter's own template goes before the base's.
        let mut found = None;
        let adapter = options.adapter.as_deref();
        let named = options.gguf.tokenizer.as_deref();
        for folder in adapter.into_iter().chain(named) {
            if found.is_none() {
                found = ChatTemplate::find(folder, None)?;
            }
        }
        if found.is_none()
            && let Some(pair) = &pair
            && let Some(source) = pair.chat_template()
        {
            let origin = pair.main_file().display().to_string();
            found = Some(ChatTemplate::new(source, origin)?);
        }
        if found.is_none() {
            found = ChatTemplate::find(dir, None)?;
        }
        let template = match found {
            Some(template) => template,
            // A checkpoint without a template: the published folder names distinguish the two kinds.
            None if is_thinking_folder(&options.model) => ChatTemplate::thinking()?,
            None => ChatTemplate::instruct()?,
        };
        let eos_token_ids = eos_token_ids(dir, &config, &tokenizer)?;
        Ok(Self {
            config,
            images,
            tokenizer,
            template,
            eos_token_ids,
            limits_from,
            checkpoint_limits,
            remarks,
        })
    }

    /// Patches of an image, as the model takes them.
    ///
    /// # Errors
    /// [`PipelineError::Image`].
    pub fn image_input(&self, picture: &RgbImage) -> Result<ImageInput, PipelineError> {
        let patches = self.images.process(picture)?;
        Ok(ImageInput {
            pixel_values: patches.pixel_values.into(),
            image_grid_thw: vec![patches.grid_thw],
        })
    }

    /// A prompt that asks `question` about `images`, under an optional system message.
    ///
    /// # Errors
    /// [`PipelineError::Chat`].
    pub fn prompt(
        &self,
        system: Option<&str>,
        question: &str,
        images: ImageInput,
    ) -> Result<Prompt, PipelineError> {
        let mut messages = Vec::new();
        if let Some(system) = system {
            messages.push(Message {
                role: Role::System,
                content: Content::Text(system.to_string()),
                reasoning_content: None,
            });
        }
        messages.push(Message::question(images.image_grid_thw.len(), question));
        self.chat_prompt(&messages, images)
    }

    /// A prompt from whole messages; `images` in the order of their places.
    ///
    /// # Errors
    /// [`PipelineError::Chat`].
    pub fn chat_prompt(
        &self,
        messages: &[Message],
        images: ImageInput,
    ) -> Result<Prompt, PipelineError> {
        let input_ids = encode_chat(
            &self.tokenizer,
            &self.template,
            messages,
            RenderOptions::generation(),
            &images.image_grid_thw,
            self.config.vision_config.spatial_merge_size,
        )?;
        Ok(Prompt { input_ids, images })
    }
}

/// Whether the folder's own name, not its parents', says that the model thinks.
fn is_thinking_folder(dir: &Path) -> bool {
    let dir = dir.canonicalize().unwrap_or_else(|_| dir.to_path_buf());
    let name =
        repo_of_folder(&dir).or_else(|| Some(dir.file_name()?.to_string_lossy().into_owned()));
    name.is_some_and(|name| name.to_lowercase().contains("thinking"))
}

/// Checks that the image processor's patches are those that the vision tower reads.
fn check_patches(
    dir: &Path,
    images: &ImageProcessorConfig,
    config: &Qwen3VlConfig,
) -> Result<(), PipelineError> {
    let vision = &config.vision_config;
    for (key, found, expected) in [
        ("patch_size", images.patch_size, vision.patch_size),
        (
            "temporal_patch_size",
            images.temporal_patch_size,
            vision.temporal_patch_size,
        ),
        ("merge_size", images.merge_size, vision.spatial_merge_size),
        ("channels", 3, vision.in_channels),
    ] {
        if found != expected {
            return Err(PipelineError::Patches {
                path: dir.to_path_buf(),
                key,
                found,
                expected,
            });
        }
    }
    Ok(())
}

/// End tokens of a checkpoint: those of `generation_config.json`, else of `config.json`, and always
/// the end of a message.
///
/// # Errors
/// [`PipelineError::GenerationConfig`]: an answer would not end where the checkpoint says.
fn eos_token_ids(
    dir: &Path,
    config: &Qwen3VlConfig,
    tokenizer: &Tokenizer,
) -> Result<Vec<u32>, PipelineError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(u32),
        Many(Vec<u32>),
    }
    let path = dir.join("generation_config.json");
    let wrong = |reason: String| PipelineError::GenerationConfig {
        path: path.clone(),
        reason,
    };
    let mut ids = vec![tokenizer.special().im_end];
    let named = match std::fs::read_to_string(&path) {
        Ok(text) => {
            let tree: Map<String, Value> =
                serde_json::from_str(&text).map_err(|cause| wrong(cause.to_string()))?;
            tree.get("eos_token_id")
                .filter(|ids| !ids.is_null())
                .cloned()
        }
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => None,
        Err(cause) => return Err(wrong(cause.to_string())),
    };
    match named {
        Some(found) => match serde_json::from_value(found.clone()) {
            Ok(Ids::One(id)) => ids.push(id),
            Ok(Ids::Many(list)) => ids.extend(list),
            Err(_) => {
                return Err(wrong(format!(
                    "key `eos_token_id` is {found}, expected a token's number or a list of them"
                )));
            }
        },
        None => ids.extend(config.text_config.eos_token_id),
    }
    ids.push(tokenizer.special().endoftext);
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// A whole answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// What is meant for the reader.
    pub report: String,
    /// The reasoning before it, for models that think.
    pub thinking: Option<String>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Tokens of the answer, end token included.
    pub completion_tokens: usize,
}

/// A loaded model with all that belongs to it.
#[derive(Debug)]
pub struct Pipeline<B: Backend> {
    /// Weights with their adapter, merged unless they are quantised.
    pub model: Qwen3Vl<B>,
    /// Tokenizer, template, image processor.
    pub parts: TextAndImages,
    /// Device that the weights are on.
    pub device: B::Device,
    /// What a person should know about how the adapter's files were read, and what was chosen for its memory.
    pub notes: Vec<String>,
    /// What was chosen for [`PipelineOptions::memory`].
    pub fit: Option<Fit>,
}

impl<B: Accelerator> Pipeline<B> {
    /// Loads a checkpoint and its adapter.
    ///
    /// # Errors
    /// [`PipelineError`] names the file, and the key or tensor.
    pub fn load(
        options: &PipelineOptions,
        device: B::Device,
        on_progress: LoadProgress<'_>,
    ) -> Result<Self, PipelineError> {
        Ok(Self::load_on(options, &[device], on_progress)?.remove(0))
    }

    /// [`Pipeline::load`] on each of some devices, from one reading of the files.
    ///
    /// # Errors
    /// [`PipelineError`] names the file, and the key or tensor.
    pub fn load_on(
        options: &PipelineOptions,
        devices: &[B::Device],
        on_progress: LoadProgress<'_>,
    ) -> Result<Vec<Self>, PipelineError> {
        let parts = TextAndImages::load(options)?;
        let fit = fit_memory::<B>(options, &parts, devices)?;
        let mut options = options.clone();
        if let (Some(fit), None) = (fit, options.quantize) {
            options.quantize = fit.quantization.map(Packing::To);
        }
        let options = &options;
        let models = load_models::<B>(options, &parts.config, devices, on_progress)?;
        models
            .into_iter()
            .zip(devices)
            .map(|(model, device)| {
                let (model, mut notes) = match &options.adapter {
                    Some(dir) => {
                        let adapted = attach_adapter(model, dir)?;
                        (merge_unless_quantised(adapted.model), adapted.notes)
                    }
                    None => (model, Vec::new()),
                };
                notes.extend(fit.map(|fit| fit.to_string()));
                Ok(Self {
                    model,
                    parts: parts.clone(),
                    device: device.clone(),
                    notes,
                    fit,
                })
            })
            .collect()
    }

    /// Answers a batch of prompts; `on_text` gets each row's new text as it comes. Several answers to a prompt follow
    /// one another: see [`GenerationConfig::num_return_sequences`].
    ///
    /// # Errors
    /// [`PipelineError::Generate`].
    pub fn answer(
        &self,
        prompts: &[Prompt],
        settings: &GenerationConfig,
        stop: &[String],
        on_text: &mut dyn FnMut(usize, &str),
    ) -> Result<(Vec<Answer>, Timing), PipelineError> {
        self.answer_and_keep(prompts, settings, stop, None, on_text)
    }

    /// Puts a prompt through the model, for continuations of it.
    ///
    /// # Errors
    /// [`PipelineError::Generate`].
    pub fn prompt_state(&self, prompt: &Prompt) -> Result<PromptState<B>, PipelineError> {
        let config = &self.parts.config;
        Ok(PromptState::of_prompt(
            &self.model,
            config,
            prompt,
            &self.device,
        )?)
    }

    /// [`Pipeline::answer`], with the prompts as they are after their prefill appended to `kept`.
    ///
    /// # Errors
    /// [`PipelineError::Generate`].
    pub fn answer_and_keep(
        &self,
        prompts: &[Prompt],
        settings: &GenerationConfig,
        stop: &[String],
        kept: Option<&mut Vec<PromptState<B>>>,
        on_text: &mut dyn FnMut(usize, &str),
    ) -> Result<(Vec<Answer>, Timing), PipelineError> {
        let mut settings = settings.clone();
        settings
            .eos_token_ids
            .extend_from_slice(&self.parts.eos_token_ids);
        let copies = settings.num_return_sequences.max(1);
        let mut streams: Vec<TextStream> = (0..prompts.len() * copies)
            .map(|_| TextStream::new(&self.parts.tokenizer, stop))
            .collect();
        let (generations, timing) = generate_and_keep(
            &self.model,
            &self.parts.config,
            prompts,
            &settings,
            &self.device,
            kept,
            &mut |row, token| {
                let piece = streams[row].push(token);
                if !piece.is_empty() {
                    on_text(row, &piece);
                }
                streams[row].stopped().then_some(FinishReason::Stop)
            },
        )?;
        let starts_inside = self.parts.template.opens_thinking();
        let answers = generations
            .into_iter()
            .zip(&mut streams)
            .enumerate()
            .map(|(row, (generation, stream))| {
                let rest = stream.finish();
                if !rest.is_empty() {
                    on_text(row, &rest);
                }
                let (thinking, report) = split_thinking(stream.text(), starts_inside);
                Answer {
                    report,
                    thinking,
                    finish_reason: generation.finish_reason,
                    prompt_tokens: prompts[row / copies].input_ids.len(),
                    completion_tokens: generation.token_ids.len(),
                }
            })
            .collect();
        Ok((answers, timing))
    }
}

/// What fits into [`PipelineOptions::memory`] on the fullest of some devices; `None` where there is no limit.
///
/// # Errors
/// [`PipelineError::TooSmall`], [`PipelineError::Budget`].
pub fn fit_memory<B: Accelerator>(
    options: &PipelineOptions,
    parts: &TextAndImages,
    devices: &[B::Device],
) -> Result<Option<Fit>, PipelineError> {
    let (Some(limit), Some(device)) = (&options.memory, devices.first()) else {
        return Ok(None);
    };
    let free = devices.iter().map(free_memory::<B>).min().flatten();
    let gib = limit.budget.gib(free).map_err(PipelineError::Budget)?;
    // On the host all copies share one memory.
    let copies = if B::KIND == DeviceKind::Cpu {
        devices.len()
    } else {
        1
    };
    let budget = (gib / copies as f64 * (1u64 << 30) as f64) as u64;
    let init = InitOptions {
        dtype: options.dtype,
        ..InitOptions::default()
    };
    let shapes = parameter_shapes(&Qwen3Vl::<B>::new(&parts.config, &init, device));
    let memory = InferenceMemory::new(&parts.config, shapes, options.dtype.size(), B::KIND);
    let packed = match (formats_of(&options.model)?, options.quantize) {
        (Some(formats), _) => Some(formats),
        (None, Some(Packing::Keep)) => {
            let checkpoint = Checkpoint::open_with(&options.model, &options.gguf)?;
            Some(kept_formats(&checkpoint))
        }
        (None, _) => None,
    };
    let quantised = [Format::Int8, Format::Int4 { group: 64 }];
    let every = quantised.map(|layers| Some(Quantization { layers }));
    let (memory, allowed) = match (packed, options.quantize) {
        (Some(formats), _) => (memory.with_packed_weights(&formats), vec![None]),
        (None, Some(Packing::To(typed))) => (memory, vec![Some(typed)]),
        (None, _) => (memory, [None].into_iter().chain(every).collect()),
    };
    let images = parts.images.config();
    let patches = images.max_pixels / images.patch_size.pow(2);
    let (tokens, least, at_once) = match limit.room {
        Room::Shared {
            tokens,
            least,
            at_once,
        } => (tokens, least, at_once),
        Room::Answers {
            rows,
            images: count,
            text,
        } => {
            let row = count * patches / images.merge_size.pow(2) + text;
            (rows * row, row, PREFILL_TOKENS.min(rows * row))
        }
    };
    let wish = CacheWish {
        tokens,
        least,
        format: limit.kv_cache,
        at_once,
        patches,
    };
    Ok(Some(memory.choose(budget, &allowed, &wish)?))
}

/// Loads the weights of a checkpoint, adapter aside.
///
/// # Errors
/// [`PipelineError::Weights`], [`PipelineError::Memory`].
pub fn load_model<B: Accelerator>(
    options: &PipelineOptions,
    config: &Qwen3VlConfig,
    device: &B::Device,
    on_progress: LoadProgress<'_>,
) -> Result<Qwen3Vl<B>, PipelineError> {
    let mut models = load_models(options, config, std::slice::from_ref(device), on_progress)?;
    Ok(models.remove(0))
}

/// [`load_model`] on each of some devices: the files are read once.
///
/// # Errors
/// [`PipelineError::Weights`], [`PipelineError::Memory`].
pub fn load_models<B: Accelerator>(
    options: &PipelineOptions,
    config: &Qwen3VlConfig,
    devices: &[B::Device],
    on_progress: LoadProgress<'_>,
) -> Result<Vec<Qwen3Vl<B>>, PipelineError> {
    let init = InitOptions {
        dtype: options.dtype,
        ..InitOptions::default()
    };
    let on_disk = formats_of(&options.model)?;
    // Of files that this program quantised all is kept in any case.
    let wanted = options
        .quantize
        .filter(|wanted| on_disk.is_none() || *wanted != Packing::Keep);
    let checkpoint = match (&on_disk, wanted) {
        (None, Some(_)) => Some(Checkpoint::open_with(&options.model, &options.gguf)?),
        _ => None,
    };
    let formats = match (&on_disk, wanted, &checkpoint) {
        (Some(formats), ..) => Some(formats.clone()),
        (None, Some(Packing::To(quantization)), _) => Some(quantization.into()),
        (None, Some(Packing::Keep), Some(checkpoint)) => Some(kept_formats(checkpoint)),
        _ => None,
    };
    let mut models: Vec<Qwen3Vl<B>> = devices
        .iter()
        .map(|device| Qwen3Vl::new(config, &init, device))
        .collect();
    if let Some(model) = models.first()
        && B::KIND == DeviceKind::Cpu
    {
        let copies = models.len();
        check_host_memory(options, model, formats.as_ref(), copies)?;
    }
    if let Some(formats) = formats {
        if let (Some(Packing::To(wanted)), Some(_)) = (wanted, &on_disk)
            && formats != Formats::from(wanted)
        {
            return Err(PipelineError::Weights(WeightsError::Quantization {
                path: options.model.clone(),
                reason: format!(
                    "the weights are packed as {formats} already; leave out --quantize, or take the checkpoint they were made from"
                ),
            }));
        }
        let dtype = options.dtype;
        for model in &mut models {
            let (fresh, tell) = (model.clone(), &mut *on_progress);
            let formats = formats.clone();
            *model = match &checkpoint {
                Some(checkpoint) => quantise(fresh, checkpoint, formats, dtype, tell)?,
                None => load_packed(fresh, &options.model, formats, dtype, tell)?,
            };
        }
        let arranged = models.into_iter().map(|model| B::arrange(model, config));
        return Ok(arranged.collect());
    }
    let checkpoint = Checkpoint::open_with(&options.model, &options.gguf)?;
    load_opened(&mut models, &checkpoint, options.dtype, on_progress)?;
    Ok(models.into_iter().map(compact).collect())
}

/// The process ends when the CPU's memory runs out, so free memory is checked before.
fn check_host_memory<B: Accelerator>(
    options: &PipelineOptions,
    model: &Qwen3Vl<B>,
    formats: Option<&Formats>,
    copies: usize,
) -> Result<(), PipelineError> {
    const GIB: f64 = (1u64 << 30) as f64;
    // What is wrong with the files is said before what they need.
    Checkpoint::open_with(&options.model, &options.gguf)?;
    let dtype = options.dtype;
    let shapes = parameter_shapes(model);
    let floats = Formats::default();
    let bytes = bytes_in_formats(&shapes, formats.unwrap_or(&floats), dtype.size());
    let need = (bytes * copies) as f64 / GIB;
    match crate::base::system::available_memory() {
        Some(free) if need > free as f64 / GIB => Err(PipelineError::Memory {
            need,
            free: free as f64 / GIB,
            dtype,
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::processor::patches::PREPROCESSOR_FILE;

    /// The text side of `model/tiny`, copied to a folder that tests may change.
    fn folder() -> (tempfile::TempDir, PipelineOptions) {
        let dir = tempfile::tempdir().unwrap();
        let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("model/tiny");
        for entry in fs::read_dir(tiny).unwrap() {
            let path = entry.unwrap().path();
            if path
                .extension()
                .is_none_or(|ending| ending != "safetensors")
            {
                fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        let options = PipelineOptions {
            model: dir.path().to_path_buf(),
            adapter: None,
            dtype: DType::F32,
            quantize: None,
            min_pixels: None,
            max_pixels: None,
            gguf: GgufParts::default(),
            memory: None,
        };
        (dir, options)
    }

    #[test]
    fn pixel_limits_come_from_whoever_says_them_first() {
        let (dir, mut options) = folder();
        let limits = |options: &PipelineOptions| {
            let parts = TextAndImages::load(options).unwrap();
            let config = parts.images.config();
            (config.min_pixels, config.max_pixels, parts.limits_from)
        };
        let published = r#"{"size": {"shortest_edge": 65536, "longest_edge": 16777216}}"#;
        fs::write(dir.path().join(PREPROCESSOR_FILE), published).unwrap();
        assert_eq!(
            limits(&options),
            (65_536, 16_777_216, LimitsFrom::Checkpoint)
        );
        let to_know = |options: &PipelineOptions| {
            TextAndImages::load(options).unwrap().pixel_limits_to_know()
        };
        assert!(to_know(&options).is_some_and(|line| line.contains("65536 and 16777216")));
        // An adapter of another program says nothing …
        let adapter = dir.path().join("adapter");
        fs::create_dir(&adapter).unwrap();
        options.adapter = Some(adapter.clone());
        fs::write(adapter.join("trainer_state.json"), r#"{"global_step": 3}"#).unwrap();
        assert_eq!(limits(&options).2, LimitsFrom::Checkpoint);
        // … ms-swift's what it was trained with, and ours the recipe's or its own.
        fs::write(adapter.join("args.json"), r#"{"max_pixels": 802816}"#).unwrap();
        assert_eq!(limits(&options), (4096, 802_816, LimitsFrom::Adapter));
        let state = r#"{"config": {"lora_rank": 8, "min_pixels": 2048}}"#;
        fs::write(adapter.join("trainer_state.json"), state).unwrap();
        assert_eq!(limits(&options), (2048, 1_003_520, LimitsFrom::Adapter));
        options.max_pixels = Some(5000);
        options.min_pixels = Some(4000);
        assert_eq!(limits(&options), (4000, 5000, LimitsFrom::Options));
        assert_eq!(to_know(&options), None);
        options = PipelineOptions {
            adapter: None,
            min_pixels: None,
            max_pixels: None,
            ..options
        };
        fs::remove_file(dir.path().join(PREPROCESSOR_FILE)).unwrap();
        assert_eq!(limits(&options), (4096, 1_003_520, LimitsFrom::Recipe));
        assert_eq!(to_know(&options), None);
    }

    #[test]
    fn a_damaged_generation_config_is_an_error() {
        let (dir, options) = folder();
        let path = dir.path().join("generation_config.json");
        for text in [
            "{",
            "[]",
            r#"{"eos_token_id": "im_end"}"#,
            r#"{"eos_token_id": [-1]}"#,
        ] {
            fs::write(&path, text).unwrap();
            let error = TextAndImages::load(&options).unwrap_err().to_string();
            assert!(error.contains("generation_config.json"), "{text}: {error}");
        }
        fs::write(&path, r#"{"eos_token_id": [7, 9]}"#).unwrap();
        let ids = TextAndImages::load(&options).unwrap().eos_token_ids;
        assert!(ids.contains(&7) && ids.contains(&9));
        fs::remove_file(&path).unwrap();
        TextAndImages::load(&options).unwrap();
    }
}

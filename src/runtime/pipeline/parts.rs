//! The text side of a checkpoint: tokenizer, template, image processor and what ends an answer.

use std::path::Path;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::{
    error::PipelineError,
    options::{LimitsFrom, PipelineOptions},
    sources::{image_config, remarks, tokenizer},
};
use crate::{
    adapters::lora::files::trained_pixel_limits,
    base::hub::repo_of_folder,
    batch::images::ImageInput,
    processor::{
        chat::{ChatTemplate, RenderOptions, encode_chat},
        image::RgbImage,
        message::{Content, Message, Role},
        patches::{ImageProcessor, ImageProcessorConfig},
        tokenizer::Tokenizer,
    },
    qwen3_vl::{config::Qwen3VlConfig, weights::gguf},
    runtime::generate::Prompt,
};

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

#[cfg(test)]
mod tests {
    use std::fs;

    use burn::tensor::DType;

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
        let options = PipelineOptions::new(dir.path().to_path_buf(), DType::F32);
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

//! Where tokenizer and image processor of a model come from, and what to say about its weights.

use std::path::Path;

use super::{
    error::PipelineError,
    options::{LimitsFrom, PipelineOptions},
};
use crate::{
    adapters::quantised::load::kept_remark,
    processor::{
        patches::{ImageProcessorConfig, PREPROCESSOR_FILE, PROCESSOR_FILE},
        tokenizer::{Tokenizer, TokenizerError},
    },
    qwen3_vl::{
        config::Qwen3VlConfig,
        weights::{Checkpoint, WeightsError, gguf::GgufPair},
    },
};

/// The image processor: of the files in `dir`, of a GGUF's metadata, or the recipe's.
pub(super) fn image_config(
    config: &Qwen3VlConfig,
    pair: Option<&GgufPair>,
    dir: &Path,
) -> Result<(ImageProcessorConfig, LimitsFrom), PipelineError> {
    let has_file = [PREPROCESSOR_FILE, PROCESSOR_FILE]
        .iter()
        .any(|name| dir.join(name).is_file());
    if has_file {
        let published = ImageProcessorConfig::published(dir)?;
        return Ok((published, LimitsFrom::Checkpoint));
    }
    let mut recipe = ImageProcessorConfig {
        patch_size: config.vision_config.patch_size,
        temporal_patch_size: config.vision_config.temporal_patch_size,
        merge_size: config.vision_config.spatial_merge_size,
        ..ImageProcessorConfig::default()
    };
    let Some(keys) = pair.map(GgufPair::images) else {
        return Ok((recipe, LimitsFrom::Recipe));
    };
    recipe.image_mean = keys.image_mean.unwrap_or(recipe.image_mean);
    recipe.image_std = keys.image_std.unwrap_or(recipe.image_std);
    let [min_pixels, max_pixels] = keys.limits;
    recipe.min_pixels = min_pixels.unwrap_or(recipe.min_pixels);
    recipe.max_pixels = max_pixels.unwrap_or(recipe.max_pixels);
    let limits_from = match keys.limits {
        [None, None] => LimitsFrom::Recipe,
        _ => LimitsFrom::Checkpoint,
    };
    Ok((recipe, limits_from))
}

/// What a reader of the results should know about how the weights are read. A folder without weights has
/// none; what is wrong with weights is said when they are loaded.
pub(super) fn remarks(
    options: &PipelineOptions,
    config: &Qwen3VlConfig,
) -> Result<Vec<String>, PipelineError> {
    let mut remarks = match Checkpoint::open_with(&options.model, &options.gguf) {
        Ok(checkpoint) => {
            let mut remarks = checkpoint.remarks().to_vec();
            let kept = options
                .quantize
                .map(|format| kept_remark(&checkpoint, format));
            remarks.extend(kept.flatten());
            remarks
        }
        // Nobody could read these; files that are still to come are no matter of tokenizer and images.
        Err(error @ (WeightsError::Quantization { .. } | WeightsError::Gguf { .. })) => {
            return Err(error.into());
        }
        Err(_) => Vec::new(),
    };
    remarks.extend(config.head_remark(&options.model));
    Ok(remarks)
}

/// The tokenizer: of the folder `dir`, or of a GGUF that holds all of it.
pub(super) fn tokenizer(
    options: &PipelineOptions,
    pair: Option<&GgufPair>,
    dir: &Path,
    remarks: &mut Vec<String>,
) -> Result<Tokenizer, PipelineError> {
    let Some(pair) = pair.filter(|_| options.gguf.tokenizer.is_none()) else {
        return Ok(Tokenizer::from_folder(dir)?);
    };
    let path = pair.main_file();
    let (tokenizer, origin) = match pair.tokenizer_json() {
        Some(bytes) => (Tokenizer::from_bytes(&bytes, path)?, "its own"),
        None => match Tokenizer::from_folder(dir) {
            Ok(tokenizer) => (tokenizer, "that of the files beside it"),
            Err(TokenizerError::NotFound { .. }) => {
                return Err(PipelineError::GgufTokenizer(path.to_path_buf()));
            }
            Err(error) => return Err(error.into()),
        },
    };
    remarks.push(format!(
        "the tokenizer of the GGUF is {origin}; `--tokenizer DIR` takes another"
    ));
    Ok(tokenizer)
}

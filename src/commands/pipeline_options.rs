//! What is loaded for a command.

use std::path::{Path, PathBuf};

use burn::tensor::DType;

use super::shared_args::{AdapterArgs, LoadArgs, ModelArgs};
use crate::{
    runtime::{
        generate::GenerationConfig,
        pipeline::{MemoryLimit, PipelineOptions, Room},
    },
    train::config::TrainConfig,
};

/// Tokens of a question, its template and an answer, where no length is given.
const ROOM_FOR_TEXT: usize = 1024;

/// Tokens of a question and its template beside the answer.
const ROOM_FOR_QUESTION: usize = 512;

/// Asks for room for `rows` answers at once about `images` images each, where memory is limited.
pub(super) fn room_for_answers(
    options: &mut PipelineOptions,
    rows: usize,
    images: usize,
    question: usize,
    generation: &GenerationConfig,
) {
    if let Some(limit) = &mut options.memory {
        let text = question.max(ROOM_FOR_QUESTION) + generation.max_new_tokens;
        limit.room = Room::Answers { rows, images, text };
        limit.kv_cache = Some(generation.kv_cache);
    }
}

/// The model that was typed, once [`ModelArgs::find`] has found its folder.
pub(super) fn pipeline_options(args: &ModelArgs, dtype: DType) -> PipelineOptions {
    with_adapter(&args.model, &args.adapter, &args.load, dtype)
}

/// A model with an adapter, loaded as `load` says.
pub(super) fn with_adapter(
    model: &Path,
    adapter: &AdapterArgs,
    load: &LoadArgs,
    dtype: DType,
) -> PipelineOptions {
    PipelineOptions {
        model: model.to_path_buf(),
        adapter: adapter.adapter.clone(),
        dtype,
        quantize: load.quantize,
        min_pixels: load.min_pixels,
        max_pixels: load.max_pixels,
        gguf: load.gguf.parts(),
        memory: load.memory.map(|budget| MemoryLimit {
            budget,
            room: Room::Answers {
                rows: 1,
                images: 1,
                text: ROOM_FOR_TEXT,
            },
            kv_cache: None,
        }),
    }
}

/// The base of a training run, with images at the run's sizes.
pub(super) fn base_of_run(config: &TrainConfig, model: PathBuf, dtype: DType) -> PipelineOptions {
    let [min_pixels, max_pixels] = config.pixel_limits();
    PipelineOptions {
        min_pixels: Some(min_pixels),
        max_pixels: Some(max_pixels),
        gguf: config.gguf_parts(),
        ..PipelineOptions::new(model, dtype)
    }
}

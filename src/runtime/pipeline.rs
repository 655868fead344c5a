//! A model ready for inference: weights, processor, tokenizer and template of one checkpoint.

mod error;
mod load;
mod options;
mod parts;
mod sources;

use burn::prelude::*;

use crate::{
    adapters::lora::{files::attach_adapter, merge::merge_unless_quantised},
    ops::quantised::Packing,
    processor::message::split_thinking,
    qwen3_vl::{Qwen3Vl, weights::LoadProgress},
    runtime::{
        accelerator::Accelerator,
        fit::Fit,
        generate::{
            FinishReason, GenerationConfig, Prompt, PromptState, Timing, generate_and_keep,
            text::TextStream,
        },
    },
};

pub use error::PipelineError;
pub use load::{fit_memory, load_model, load_models};
pub use options::{LimitsFrom, MemoryLimit, PipelineOptions, Room};
pub use parts::TextAndImages;

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
    /// one another: see [`GenerationConfig::samples`].
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
        let samples = settings.samples.max(1);
        let mut streams: Vec<TextStream> = (0..prompts.len() * samples)
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
                    prompt_tokens: prompts[row / samples].input_ids.len(),
                    completion_tokens: generation.token_ids.len(),
                }
            })
            .collect();
        Ok((answers, timing))
    }
}

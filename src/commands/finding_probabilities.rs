//! A model's own probabilities of findings: what `calibrate` and `infer --findings` share.

use anyhow::{Context, Result, bail};

use crate::{
    adapters::lora::{base::BaseFingerprint, files::adapter_hash},
    commands::usage::UsageError,
    eval::probability::{
        calibration::AskedModel,
        evidence::{ClassEvidence, of_sentences},
        logit::{DRAWN_TOKENS, ScoreForm, SentenceContext},
        sentences::FindingSentences,
        wordings,
    },
    runtime::{
        accelerator::Accelerator,
        generate::{GenerationConfig, Prompt, PromptState, SamplingConfig},
        pipeline::{Pipeline, PipelineOptions, TextAndImages},
    },
};

/// The sentences of all classes for a model; `lead` begins the answer before each of them.
///
/// # Errors
/// A tokenizer that fails.
pub(super) fn sentences(parts: &TextAndImages, lead: &str) -> Result<FindingSentences> {
    let opens_thinking = parts.template.opens_thinking();
    Ok(FindingSentences::new(
        &parts.tokenizer,
        opens_thinking,
        lead,
    )?)
}

/// Asks the model about a prompt that went through it; with `report`, its answer, also after each clause of that.
pub(super) fn ask<B: Accelerator>(
    sentences: &FindingSentences,
    pipeline: &Pipeline<B>,
    prompt: PromptState<B>,
    report: Option<&str>,
) -> Result<Vec<ClassEvidence>> {
    let places = sentences.places(report)?;
    let found = prompt
        .continuation_log_probabilities(
            &pipeline.model,
            &pipeline.parts.config,
            &places.tokens,
            &places.ends,
            sentences.tokens(),
            &pipeline.device,
        )
        .context("the findings cannot be asked for")?;
    Ok(of_sentences(found))
}

/// Reports that are drawn at once.
pub(super) const DRAWN_AT_ONCE: usize = 32;

/// Draws `count` reports about the images of a prompt, at temperature 1, from seed 0 on: the same for every image.
///
/// # Errors
/// A prompt that leaves no room for an answer, an output that is not a number.
pub(super) fn draw<B: Accelerator>(
    pipeline: &Pipeline<B>,
    prompt: &Prompt,
    count: usize,
) -> Result<Vec<String>> {
    let context = pipeline.parts.config.text_config.max_position_embeddings;
    let left = context.saturating_sub(prompt.input_ids.len());
    let mut reports = Vec::with_capacity(count);
    while reports.len() < count {
        let settings = GenerationConfig {
            max_new_tokens: DRAWN_TOKENS.min(left),
            num_return_sequences: DRAWN_AT_ONCE.min(count - reports.len()),
            sampling: SamplingConfig {
                temperature: 1.0,
                seed: reports.len() as u64,
                ..SamplingConfig::default()
            },
            ..GenerationConfig::default()
        };
        let prompts = std::slice::from_ref(prompt);
        let (answers, _) = pipeline
            .answer(prompts, &settings, &[], &mut |_, _| {})
            .context("no reports can be drawn for the findings")?;
        reports.extend(answers.into_iter().map(|answer| answer.report));
    }
    Ok(reports)
}

/// Refuses weights that were quantised to fit the memory: probabilities are calibrated for weights as they are named.
///
/// # Errors
/// A usage error that names the option.
pub(super) fn expect_named_weights<B: Accelerator>(
    options: &PipelineOptions,
    pipeline: &Pipeline<B>,
) -> Result<()> {
    let chosen = pipeline.fit.and_then(|fit| fit.quantization);
    if let (Some(format), None) = (chosen, options.quantize) {
        bail!(UsageError(format!(
            "--memory quantises the weights to {format}, of which probabilities of findings have to know: give --quantize {format} itself"
        )));
    }
    Ok(())
}

/// Prompt and form of the score that findings are computed with.
pub(super) struct AskedHow<'a> {
    /// The question.
    pub(super) prompt: &'a str,
    pub(super) system: Option<&'a str>,
    /// Begins the answer before fixed sentences.
    pub(super) lead: &'a str,
    pub(super) context: SentenceContext,
    pub(super) form: ScoreForm,
    /// Reports drawn of an image.
    pub(super) draws: usize,
    /// Identity of the table of words that these are read with.
    pub(super) rules: &'a str,
}

/// What logits of a model depend on, as a calibration records it.
pub(super) fn asked_model(
    options: &PipelineOptions,
    parts: &TextAndImages,
    asked: &AskedHow,
) -> Result<AskedModel> {
    let limits = parts.images.config();
    let sentences = asked.form.is_of_sentences();
    Ok(AskedModel {
        base: BaseFingerprint::of(&options.model, &options.gguf)?.sha256,
        adapter: options.adapter.as_deref().map(adapter_hash).transpose()?,
        quantize: options.quantize.map(|format| format.to_string()),
        pixels: [limits.min_pixels, limits.max_pixels],
        prompt: asked.prompt.to_owned(),
        system: asked.system.map(str::to_owned),
        lead: asked.lead.to_owned(),
        context: asked.context,
        form: asked.form,
        wordings: if sentences {
            wordings::fingerprint()
        } else {
            String::new()
        },
        draws: if sentences { 0 } else { asked.draws },
        rules: if sentences {
            String::new()
        } else {
            asked.rules.to_owned()
        },
    })
}

//! A model's own probabilities of findings: what `calibrate` and `infer --findings` share.

use anyhow::{Context, Result, bail};

use crate::{
    adapters::lora::{base::BaseFingerprint, files::adapter_hash},
    commands::usage::UsageError,
    eval::probability::{
        calibration::AskedModel,
        logit::{ScoreForm, SentenceContext},
        sentences::{ClassLogProbabilities, FindingSentences, by_class},
        wordings,
    },
    runtime::{
        accelerator::Accelerator,
        generate::PromptState,
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
) -> Result<Vec<ClassLogProbabilities>> {
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
    Ok(by_class(found))
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

/// What logits of a model depend on, as a calibration records it.
pub(super) fn asked_model(
    options: &PipelineOptions,
    parts: &TextAndImages,
    prompt: &str,
    system: Option<&str>,
    lead: &str,
    context: SentenceContext,
    form: ScoreForm,
) -> Result<AskedModel> {
    let limits = parts.images.config();
    Ok(AskedModel {
        base: BaseFingerprint::of(&options.model, &options.gguf)?.sha256,
        adapter: options.adapter.as_deref().map(adapter_hash).transpose()?,
        quantize: options.quantize.map(|format| format.to_string()),
        pixels: [limits.min_pixels, limits.max_pixels],
        prompt: prompt.to_owned(),
        system: system.map(str::to_owned),
        lead: lead.to_owned(),
        context,
        form,
        wordings: wordings::fingerprint(),
    })
}

//! A model's own probabilities of findings: what `calibrate` and `infer --findings` share.

use anyhow::{Context, Result};

use crate::{
    adapters::lora::{base::BaseFingerprint, files::adapter_hash},
    eval::{
        findings::Finding,
        probability::{
            calibration::AskedModel,
            logit::{ScoreForm, class_logit},
            wordings::{self, WORDINGS},
        },
    },
    runtime::{
        accelerator::Accelerator,
        continuations::continuation_log_probabilities,
        generate::Prompt,
        pipeline::{Pipeline, PipelineOptions, TextAndImages},
    },
};

/// The sentences of all classes as tokens.
pub(super) struct FindingSentences {
    /// What comes between prompt and sentences: the end of an empty reasoning, and the lead.
    opening: Vec<u32>,
    sentences: Vec<Vec<u32>>,
}

/// Log-probabilities of the sentences of one class, token by token.
pub(super) struct ClassLogProbabilities {
    pub(super) finding: Finding,
    stated: Vec<Vec<f32>>,
    denied: Vec<Vec<f32>>,
}

impl ClassLogProbabilities {
    /// The logit of the class.
    pub(super) fn logit(&self, form: ScoreForm) -> f64 {
        class_logit(form, &self.stated, &self.denied)
    }
}

impl FindingSentences {
    /// Encodes the sentences for a model; `lead` begins the answer before each of them.
    pub(super) fn new(parts: &TextAndImages, lead: &str) -> Result<Self> {
        let mut opening = Vec::new();
        if parts.template.opens_thinking() {
            // Reports follow the reasoning; an empty one is what the template writes where there is none.
            opening = parts.tokenizer.encode("\n</think>\n\n")?;
        }
        opening.extend(parts.tokenizer.encode_plain(lead)?);
        let texts = WORDINGS
            .iter()
            .flat_map(|class| class.stated.iter().chain(class.denied));
        let sentences = texts
            .map(|text| parts.tokenizer.encode_plain(text))
            .collect::<Result<_, _>>()?;
        Ok(Self { opening, sentences })
    }

    /// Asks the model about one prompt.
    pub(super) fn ask<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        prompt: &Prompt,
    ) -> Result<Vec<ClassLogProbabilities>> {
        let opened;
        let prompt = if self.opening.is_empty() {
            prompt
        } else {
            opened = Prompt {
                input_ids: [&prompt.input_ids[..], &self.opening].concat(),
                images: prompt.images.clone(),
            };
            &opened
        };
        let found = continuation_log_probabilities(
            &pipeline.model,
            &pipeline.parts.config,
            prompt,
            &self.sentences,
            &pipeline.device,
        )
        .context("the findings cannot be asked for")?;
        let mut found = found.into_iter();
        let classes = WORDINGS.iter().map(|class| ClassLogProbabilities {
            finding: class.finding,
            stated: found.by_ref().take(class.stated.len()).collect(),
            denied: found.by_ref().take(class.denied.len()).collect(),
        });
        Ok(classes.collect())
    }
}

/// What logits of a model depend on, as a calibration records it.
pub(super) fn asked_model(
    options: &PipelineOptions,
    parts: &TextAndImages,
    prompt: &str,
    system: Option<&str>,
    lead: &str,
    form: ScoreForm,
) -> Result<AskedModel> {
    let limits = parts.images.config();
    Ok(AskedModel {
        base: BaseFingerprint::of(&options.model)?.sha256,
        adapter: options.adapter.as_deref().map(adapter_hash).transpose()?,
        quantize: options.quantize.map(|format| format.to_string()),
        pixels: [limits.min_pixels, limits.max_pixels],
        prompt: prompt.to_owned(),
        system: system.map(str::to_owned),
        lead: lead.to_owned(),
        form,
        wordings: wordings::fingerprint(),
    })
}

//! A model's own probabilities of findings: what `calibrate` and `infer --findings` share.

use anyhow::{Context, Result};

use crate::{
    adapters::lora::{base::BaseFingerprint, files::adapter_hash},
    eval::{
        findings::Finding,
        probability::{
            calibration::AskedModel,
            logit::{ScoreForm, SentenceContext, class_logit},
            wordings::{self, WORDINGS},
        },
    },
    runtime::{
        accelerator::Accelerator,
        continuations::continuation_log_probabilities_after,
        generate::Prompt,
        pipeline::{Pipeline, PipelineOptions, TextAndImages},
    },
};

/// Most sentences of a report after which classes are asked for: a bound on the time that an endless one takes.
const MOST_PLACES: usize = 24;

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
    pub(super) fn logit(&self, form: ScoreForm, context: SentenceContext) -> f64 {
        class_logit(form, context, &self.stated, &self.denied)
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

    /// Asks the model about one prompt; with `report`, its answer, also after each sentence of that.
    pub(super) fn ask<B: Accelerator>(
        &self,
        pipeline: &Pipeline<B>,
        prompt: &Prompt,
        report: Option<&str>,
    ) -> Result<Vec<ClassLogProbabilities>> {
        let mut answer = self.opening.clone();
        let mut ends = vec![answer.len()];
        let sentences = report.map(sentences_of).unwrap_or_default();
        for sentence in sentences.into_iter().take(MOST_PLACES) {
            answer.extend(pipeline.parts.tokenizer.encode_plain(sentence)?);
            ends.push(answer.len());
        }
        let places = continuation_log_probabilities_after(
            &pipeline.model,
            &pipeline.parts.config,
            prompt,
            &answer,
            &ends,
            &self.sentences,
            &pipeline.device,
        )
        .context("the findings cannot be asked for")?;
        let mut classes: Vec<ClassLogProbabilities> = WORDINGS
            .iter()
            .map(|class| ClassLogProbabilities {
                finding: class.finding,
                stated: Vec::new(),
                denied: Vec::new(),
            })
            .collect();
        for found in places {
            let mut found = found.into_iter();
            for (class, wordings) in classes.iter_mut().zip(&WORDINGS) {
                class
                    .stated
                    .extend(found.by_ref().take(wordings.stated.len()));
                class
                    .denied
                    .extend(found.by_ref().take(wordings.denied.len()));
            }
        }
        Ok(classes)
    }
}

/// Sentences and clauses of a report, each with its end: normal reports deny findings after a comma.
fn sentences_of(report: &str) -> Vec<&str> {
    let ends = ['。', '；', ';', '\n', '，', ',', '：'];
    report.split_inclusive(ends).collect()
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

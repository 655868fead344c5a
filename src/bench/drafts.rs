//! Drafted decoding at an acceptance that is set.
//!
//! The model writes its answers once without drafts. Then it writes them again, while somebody who knows them drafts as many
//! right tokens as make up the acceptance, and wrong ones after them: everything runs as in use, and the text has to be the same.

use std::sync::Arc;

use super::{
    Bench, BenchError,
    clock::{Lap, measure},
    infer::{DECODE_STEPS, DECODE_WARM_UP},
    report::Record,
};
use crate::{
    qwen3_vl::Qwen3Vl,
    runtime::{
        accelerator::Accelerator,
        generate::{
            GenerationConfig, Prompt, Timing,
            drafts::{Draft, Drafter, DrafterSource, Drafts, SequenceText},
            generate,
        },
    },
};

/// What is drafted in a measurement.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ForcedDrafts {
    /// Tokens drafted in each step.
    pub drafted: usize,
    /// Tokens that a step gives on average, one of them not drafted.
    pub tokens_per_step: f64,
}

/// Prompts with the tokens that the model will write.
#[derive(Debug)]
struct Known {
    answers: Vec<(Vec<u32>, Vec<u32>)>,
    vocab: u32,
    right_per_step: f64,
}

#[derive(Debug)]
struct Source(Arc<Known>);

impl DrafterSource for Source {
    fn drafter(&self) -> Box<dyn Drafter> {
        Box::new(ForcedDrafter {
            known: self.0.clone(),
            steps: 0,
        })
    }
}

struct ForcedDrafter {
    known: Arc<Known>,
    steps: usize,
}

impl Drafter for ForcedDrafter {
    fn draft(&mut self, text: SequenceText<'_>, most: usize) -> Draft {
        let Known {
            answers,
            vocab,
            right_per_step,
        } = &*self.known;
        let found = answers.iter().find(|(prompt, _)| prompt == text.prompt);
        let Some((_, answer)) = found else {
            return Draft::default();
        };
        // So many that the mean comes out, as evenly as whole numbers go.
        let right = |steps: usize| (steps as f64 * right_per_step).floor() as usize;
        let now = right(self.steps + 1) - right(self.steps);
        self.steps += 1;
        let rest = &answer[text.answer.len().min(answer.len())..];
        let wrong = |at: usize| (rest.get(at).copied().unwrap_or(0) + 1) % vocab;
        let token = |at: usize| match rest.get(at) {
            Some(token) if at < now => *token,
            _ => wrong(at),
        };
        Draft {
            tokens: (0..most).map(token).collect(),
            matched: usize::MAX,
        }
    }
}

impl<B: Accelerator> Bench<B> {
    /// The steps of [`Bench::decode`] with drafts, beside those of the same engine without; `undrafted` is the record to
    /// compare with.
    ///
    /// # Errors
    /// [`BenchError::Generate`]; [`BenchError::Drafts`] where the text is another with drafts.
    pub(super) fn decode_drafted(
        &self,
        model: &Qwen3Vl<B>,
        load_seconds: f64,
        prompts: &[Prompt],
        forced: ForcedDrafts,
        undrafted: &Record,
    ) -> Result<Vec<Record>, BenchError> {
        let length = prompts.first().map_or(0, |prompt| prompt.input_ids.len());
        let batch = prompts.len();
        let mut records = Vec::new();
        let mut plain = Vec::new();
        for drafted in [0, forced.drafted] {
            let source = Source(Arc::new(Known {
                answers: plain.clone(),
                vocab: self.config.text_config.vocab_size as u32,
                right_per_step: forced.tokens_per_step - 1.0,
            }));
            let settings = GenerationConfig {
                max_new_tokens: DECODE_STEPS + 1,
                stop_on_repetition: false,
                drafts: Some(Drafts {
                    most: drafted,
                    source: Some(Arc::new(source)),
                    ..Drafts::default()
                }),
                ..GenerationConfig::default()
            };
            let name = format!("decode_b{batch}_s{length}_n{DECODE_STEPS}_drafted{drafted}");
            let mut record = self.record("decode", name, batch);
            let mut last: Option<(Vec<Vec<u32>>, Timing)> = None;
            let laps = measure(DECODE_WARM_UP, self.samples(3), |call| {
                if call == DECODE_WARM_UP + 1 {
                    self.mark_operations();
                }
                let (model, config, device) = (model, &self.config, &self.device);
                let (answers, timing) =
                    generate(model, config, prompts, &settings, device, &mut |_, _| None)?;
                let tokens = answers.into_iter().map(|answer| answer.token_ids);
                last = Some((tokens.collect(), timing));
                Ok::<_, BenchError>(Lap {
                    seconds: timing.decode_seconds,
                    stall_seconds: 0.0,
                    samples: batch as f64,
                    tokens: timing.decoded_tokens as f64,
                    ..Lap::default()
                })
            })?;
            self.finish(&mut record, &laps, load_seconds);
            record.samples_per_second = None;
            if let Some((answers, timing)) = last {
                let counts = timing.drafts;
                let per_step = counts.tokens as f64 / counts.steps.max(1) as f64;
                record.tokens_per_step = (counts.steps > 0).then_some(per_step);
                let prompts = prompts.iter().map(|prompt| prompt.input_ids.clone());
                let answers: Vec<_> = prompts.zip(answers).collect();
                if drafted == 0 {
                    plain = answers;
                } else if plain != answers {
                    return Err(BenchError::Drafts);
                }
            }
            record.times_undrafted = (record.tokens_per_second)
                .zip(undrafted.tokens_per_second)
                .map(|(with, without)| with / without);
            records.push(record);
        }
        Ok(records)
    }
}

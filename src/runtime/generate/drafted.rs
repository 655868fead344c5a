//! Generation where each step verifies drafted tokens: [`super::drafts`].

use rayon::prelude::*;

use super::{
    answer::{
        FinishReason, GenerateError, Generation, GenerationConfig, Prompt, Timing, end_of,
        prefilled_at_once,
    },
    backend::{
        AdapterId, Chunk, DecodeBackend, Pick, ServingDecoder, ServingLimits, SlotId, StepRow,
        Stepped,
    },
    drafts::{DraftCounts, DraftSession, Drafts, SequenceText, share_of_rows},
    sampler::Sampler,
    slots::PlainDecoder,
};
use crate::{
    batch::positions::{Positions, rope_index},
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, vision::VisionOutput},
    runtime::accelerator::{Accelerator, Decoder},
};

/// Tokens that a slot's room is counted in.
const BLOCK: usize = 256;

/// One answer on its way.
struct Row {
    place: usize,
    slot: SlotId,
    /// Position of a token beyond its place in prompt and answer.
    delta: i64,
    sampler: Sampler,
    session: DraftSession,
}

/// [`super::generate`] with drafts.
pub(super) fn generate_drafted<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    prompts: &[Prompt],
    settings: &GenerationConfig,
    drafts: &Drafts,
    device: &B::Device,
    on_token: &mut dyn FnMut(usize, u32) -> Option<FinishReason>,
) -> Result<(Vec<Generation>, Timing), GenerateError> {
    let room = |prompt: &Prompt| {
        let tokens = prompt.input_ids.len() + settings.max_new_tokens;
        tokens.next_multiple_of(BLOCK)
    };
    let at_once = prefilled_at_once(model);
    let limits = ServingLimits {
        rows: (prompts.len() * (1 + drafts.most)).min(B::CHEAP_ROWS),
        cache_tokens: prompts.iter().map(room).sum::<usize>() + BLOCK,
        prefill_chunk: at_once,
        adapters: false,
        kv_cache: settings.kv_cache,
        warm_up: false,
    };
    let engine = B::serving_decoder(model, config, &limits, &mut |_, _| {});
    let mut engine = match engine.map_err(GenerateError::Device)? {
        Some(engine) => engine,
        None => {
            let plain = PlainDecoder::new(model.clone(), config.clone(), device.clone());
            Box::new(plain.with_cache(settings.kv_cache)) as ServingDecoder<B>
        }
    };
    let mut timing = Timing {
        prompt_tokens: prompts.iter().map(|prompt| prompt.input_ids.len()).sum(),
        ..Timing::default()
    };
    let mut clock = std::time::Instant::now();
    let mut lap = |device: &B::Device| {
        // Kernels are asynchronous: synchronise before reading the clock.
        let _ = B::sync(device);
        let seconds = clock.elapsed().as_secs_f64();
        clock = std::time::Instant::now();
        seconds
    };
    let images: Vec<_> = prompts
        .iter()
        .map(|prompt| {
            let shown = !prompt.images.image_grid_thw.is_empty();
            shown.then(|| engine.encode_image(AdapterId::BASE, &prompt.images))
        })
        .collect();
    timing.vision_seconds = lap(device);

    let mut results: Vec<Generation> = prompts
        .iter()
        .map(|_| Generation {
            token_ids: Vec::new(),
            finish_reason: FinishReason::Length,
        })
        .collect();
    let mut rows = Vec::with_capacity(prompts.len());
    let vocab = config.text_config.vocab_size;
    for (place, (prompt, features)) in prompts.iter().zip(images).enumerate() {
        let slot = engine.start(AdapterId::BASE, room(prompt));
        let (logits, delta) = prefill(&mut engine, slot, prompt, features, config, at_once)?;
        let mut row = Row {
            place,
            slot,
            delta,
            sampler: Sampler::new(&settings.sampling, &prompt.input_ids),
            session: DraftSession::new(drafts, &[], vocab),
        };
        let tokens = &mut results[place].token_ids;
        tokens.push(row.sampler.next(finite(&logits)?));
        match end_of(place, tokens, settings, on_token) {
            Some(reason) => results[place].finish_reason = reason,
            None => rows.push(row),
        }
    }
    timing.prefill_seconds = lap(device);

    while !rows.is_empty() {
        let share = share_of_rows(engine.cheap_rows(), rows.len());
        let drafted: Vec<Vec<u32>> = rows
            .par_iter_mut()
            .map(|row| {
                let text = SequenceText {
                    prompt: &prompts[row.place].input_ids,
                    answer: &results[row.place].token_ids,
                };
                // The step gives a token beyond the drafted ones.
                let most = settings.max_new_tokens - text.answer.len() - 1;
                row.session.propose(text, share.min(most))
            })
            .collect();
        let mut step = Vec::with_capacity(rows.len());
        for (row, drafted) in rows.iter_mut().zip(&drafted) {
            let tokens = &results[row.place].token_ids;
            let held = prompts[row.place].input_ids.len() + tokens.len() - 1;
            let newest = tokens.last().copied();
            let choices = row.sampler.choices(1 + drafted.len());
            let fed = newest.into_iter().chain(drafted.iter().copied());
            step.extend(
                fed.zip(choices)
                    .enumerate()
                    .map(|(at, (token, choice))| StepRow {
                        slot: row.slot,
                        token,
                        position: (held + at) as i64 + row.delta,
                        pick: Pick::Token(choice),
                    }),
            );
        }
        let mut stepped = engine.step(&step).into_iter();
        let mut staying = Vec::with_capacity(rows.len());
        for (mut row, drafted) in rows.into_iter().zip(&drafted) {
            let of_row: Vec<Stepped> = stepped.by_ref().take(1 + drafted.len()).collect();
            let result = &mut results[row.place];
            let before = result.token_ids.len();
            let (mut accepted, mut ended) = (0, None);
            for (at, one) in of_row.into_iter().enumerate() {
                let token = match one {
                    Stepped::Logits(logits) => row.sampler.next(finite(&logits)?),
                    Stepped::Token(token) => {
                        let token = token.ok_or(GenerateError::NotFinite)?;
                        row.sampler.take(token);
                        token
                    }
                };
                result.token_ids.push(token);
                let is_right = drafted.get(at) == Some(&token);
                accepted += usize::from(is_right);
                ended = end_of(row.place, &result.token_ids, settings, on_token);
                if ended.is_some() || !is_right {
                    break;
                }
            }
            let given = result.token_ids.len() - before;
            timing.decoded_tokens += given;
            row.session.note(drafted.len(), accepted, given);
            match ended {
                Some(reason) => {
                    result.finish_reason = reason;
                    timing.drafts.add(row.session.counts());
                    engine.free(row.slot);
                }
                None => {
                    if given < 1 + drafted.len() {
                        let held = prompts[row.place].input_ids.len() + result.token_ids.len() - 1;
                        engine.truncate(row.slot, held);
                    }
                    staying.push(row);
                }
            }
        }
        rows = staying;
    }
    timing.decode_seconds = lap(device);
    Ok((results, timing))
}

/// Goes on with one answer to its end, a decoder verifying what is drafted for it.
pub(super) fn verify_to_end(
    decoder: &mut dyn Decoder,
    mut session: DraftSession,
    prompt: &[u32],
    result: &mut Generation,
    settings: &GenerationConfig,
    on_token: &mut dyn FnMut(usize, u32) -> Option<FinishReason>,
) -> Result<DraftCounts, GenerateError> {
    loop {
        let answer = &result.token_ids;
        let left = settings.max_new_tokens - answer.len();
        let most = decoder.most_verified().min(left) - 1;
        let drafted = session.propose(SequenceText { prompt, answer }, most);
        let newest = answer.last().copied();
        let fed: Vec<u32> = newest.into_iter().chain(drafted.iter().copied()).collect();
        let chosen = decoder.verify(&fed).map_err(GenerateError::Device)?;
        let (mut accepted, mut given, mut ended) = (0, 0, None);
        for (at, token) in chosen.into_iter().enumerate() {
            let token = token.ok_or(GenerateError::NotFinite)?;
            result.token_ids.push(token);
            given += 1;
            let is_right = drafted.get(at) == Some(&token);
            accepted += usize::from(is_right);
            ended = end_of(0, &result.token_ids, settings, on_token);
            if ended.is_some() || !is_right {
                break;
            }
        }
        session.note(drafted.len(), accepted, given);
        decoder.keep(given);
        if let Some(reason) = ended {
            result.finish_reason = reason;
            return Ok(session.counts());
        }
    }
}

fn finite(logits: &[f32]) -> Result<&[f32], GenerateError> {
    match logits.iter().any(|value| value.is_nan()) {
        true => Err(GenerateError::NotFinite),
        false => Ok(logits),
    }
}

/// Puts a prompt into a slot; gives the logits after it, and the position of a token beyond its place.
fn prefill<B: Accelerator>(
    engine: &mut ServingDecoder<B>,
    slot: SlotId,
    prompt: &Prompt,
    features: Option<VisionOutput<B>>,
    config: &Qwen3VlConfig,
    at_once: usize,
) -> Result<(Vec<f32>, i64), GenerateError> {
    let ids = &prompt.input_ids;
    let image_token = config.image_token_id;
    let merge = config.vision_config.spatial_merge_size;
    let (positions, delta) = rope_index(ids, &prompt.images.image_grid_thw, image_token, merge)?;
    let image_tokens = |ids: &[u32]| ids.iter().filter(|id| **id == image_token).count();
    let mut logits = None;
    for (piece, input_ids) in ids.chunks(at_once).enumerate() {
        let range = piece * at_once..piece * at_once + input_ids.len();
        let first = image_tokens(&ids[..range.start]);
        let here = image_tokens(input_ids);
        let chunk = Chunk {
            input_ids,
            positions: Positions {
                axes: std::array::from_fn(|axis| positions.axes[axis][range.clone()].to_vec()),
            },
            features: features
                .iter()
                .filter(|_| here > 0)
                .map(|features| (features.clone(), first..first + here))
                .collect(),
            wants_logits: range.end == ids.len(),
        };
        logits = engine.prefill(slot, &chunk);
    }
    Ok((logits.ok_or(GenerateError::Empty)?, delta))
}

#[cfg(all(test, feature = "flex"))]
#[path = "drafted_tests.rs"]
mod tests;

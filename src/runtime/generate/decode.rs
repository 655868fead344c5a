//! Prefill, cached steps, stopping.

use burn::{prelude::*, tensor::DType};

use super::{
    answer::{
        FinishReason, GenerateError, Generation, GenerationConfig, Prompt, Timing, end_of,
        prefilled_at_once,
    },
    drafted::{generate_drafted, verify_to_end},
    drafts::DraftSession,
    prompt_state::PromptState,
    sampler::{Sampler, SamplingConfig},
};
use crate::{
    batch::{
        images::ImageInput,
        positions::Positions,
        text::{Padding, TextInput},
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, key_values::KeyValueCache},
    runtime::{
        accelerator::{Accelerator, DecodeStart, Decoder},
        vision::encode_images,
    },
};

/// Runs one batch of prompts to the end.
///
/// Every row equals the row alone: rows are padded on the left, padding is hidden, and each row has
/// its own sampler. `on_token` gets the row and each new token, end token excluded, and says whether
/// to go on: `Some(reason)` ends the row.
///
/// # Errors
/// [`GenerateError`], before anything is computed but for [`GenerateError::NotFinite`].
pub fn generate<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    prompts: &[Prompt],
    settings: &GenerationConfig,
    device: &B::Device,
    on_token: &mut dyn FnMut(usize, u32) -> Option<FinishReason>,
) -> Result<(Vec<Generation>, Timing), GenerateError> {
    generate_and_keep(model, config, prompts, settings, device, None, on_token)
}

/// [`generate`], with the prompts as they are after their prefill appended to `kept`, for continuations of them; where
/// tokens are drafted, none is.
///
/// # Errors
/// As [`generate`].
pub fn generate_and_keep<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    prompts: &[Prompt],
    settings: &GenerationConfig,
    device: &B::Device,
    kept: Option<&mut Vec<PromptState<B>>>,
    on_token: &mut dyn FnMut(usize, u32) -> Option<FinishReason>,
) -> Result<(Vec<Generation>, Timing), GenerateError> {
    check_prompts(config, prompts, settings)?;
    let greedy =
        settings.sampling.temperature == 0.0 && settings.sampling.repetition_penalty == 1.0;
    let is_alone = settings.num_return_sequences <= 1;
    let drafts = (settings.drafts.as_ref()).filter(|_| is_alone && is_drafted::<B>(prompts.len()));
    if let Some(drafts) = drafts
        && !(B::DECODER_VERIFIES && greedy)
    {
        return generate_drafted(model, config, prompts, settings, drafts, device, on_token);
    }
    let mut timing = Timing::default();
    let mut clock = std::time::Instant::now();
    let mut lap = |device: &B::Device| {
        // Kernels are asynchronous: synchronise before reading the clock.
        let _ = B::sync(device);
        let seconds = clock.elapsed().as_secs_f64();
        clock = std::time::Instant::now();
        seconds
    };

    let mut rows: Vec<Vec<u32>> = prompts
        .iter()
        .map(|prompt| prompt.input_ids.clone())
        .collect();
    let grids: Vec<_> = prompts
        .iter()
        .map(|prompt| prompt.images.image_grid_thw.clone())
        .collect();
    let (input, mut deltas) = TextInput::padded(&rows, &grids, config, Padding::Left, 0)?;
    timing.prompt_tokens = rows.iter().map(Vec::len).sum();
    let mut images = ImageInput::default();
    prompts
        .iter()
        .for_each(|prompt| images.extend(&prompt.images));
    let vision =
        (!images.image_grid_thw.is_empty()).then(|| encode_images(model, &images, config, device));
    timing.vision_seconds = lap(device);

    let layers = config.text_config.num_hidden_layers;
    // A decoder takes over buffers that hold the whole request.
    let decodes = B::HAS_DECODER;
    let room = input.seq() + settings.max_new_tokens + DECODER_ROOM;
    let reserved = if decodes { room } else { 0 };
    let mut cache = KeyValueCache::with_format(layers, reserved, settings.kv_cache);
    let columns = (prefilled_at_once(model) / rows.len()).max(LEAST_PREFILL_COLUMNS);
    let hidden = model.prefill(&input, vision.as_ref(), config, &mut cache, columns, device);
    drop(vision);
    if let Some(kept) = kept {
        // Before a token of an answer is written: copies, since the answers go on in these buffers.
        kept.extend((0..rows.len()).map(|row| {
            let of_row = (row, rows[row].len(), deltas[row]);
            PromptState::of_row(&cache, &hidden, input.seq(), of_row, device)
        }));
    }
    let mut logits = logits_on_host(model, hidden)?;
    let copies = settings.num_return_sequences.max(1);
    if copies > 1 {
        let each = |row: usize| std::iter::repeat_n(row, copies);
        let from: Vec<usize> = (0..rows.len()).flat_map(each).collect();
        cache.select_rows(&from, device);
        logits = from.iter().map(|row| logits[*row].clone()).collect();
        deltas = from.iter().map(|row| deltas[*row]).collect();
        rows = from.iter().map(|row| rows[*row].clone()).collect();
    }
    timing.prefill_seconds = lap(device);

    assert!(
        settings.seeds.is_empty() || settings.seeds.len() == rows.len(),
        "{} seeds for {} answers",
        settings.seeds.len(),
        rows.len()
    );
    let nothing = Generation {
        token_ids: Vec::new(),
        finish_reason: FinishReason::Length,
    };
    let mut results = vec![nothing; rows.len()];
    let sampler = |(index, row): (usize, &Vec<u32>)| {
        let next = settings.sampling.seed.wrapping_add((index % copies) as u64);
        let sampling = SamplingConfig {
            seed: settings.seeds.get(index).copied().unwrap_or(next),
            ..settings.sampling.clone()
        };
        Sampler::new(&sampling, row)
    };
    let mut samplers: Vec<Sampler> = rows.iter().enumerate().map(sampler).collect();
    // Rows of the batch that go on, by their place among the answers.
    let mut active: Vec<usize> = (0..rows.len()).collect();
    let mut next = Next::Logits(logits);
    let mut decoder: Option<Box<dyn Decoder>> = None;
    let mut decoder_tried = !decodes;
    let mut places: Vec<usize> = Vec::new();
    loop {
        let mut stays = Vec::with_capacity(active.len());
        for (place, row) in active.iter().copied().enumerate() {
            let token = match &next {
                Next::Logits(logits) => samplers[row].next(&logits[place]),
                Next::Tokens(tokens) => tokens[place],
            };
            let result = &mut results[row];
            result.token_ids.push(token);
            let ended = end_of(row, &result.token_ids, settings, on_token);
            match ended {
                Some(reason) => result.finish_reason = reason,
                None => stays.push(place),
            }
        }
        if stays.is_empty() {
            break;
        }
        let position = |row: usize, tokens: &[u32]| -> i64 {
            (rows[row].len() + tokens.len() - 1) as i64 + deltas[row]
        };
        let last_token = |row: usize| results[row].token_ids[results[row].token_ids.len() - 1];
        if stays.len() < active.len() && decoder.is_none() {
            cache.select_rows(&stays, device);
            active = stays.iter().map(|place| active[*place]).collect();
            stays = (0..active.len()).collect();
        }
        if !decoder_tried {
            decoder_tried = true;
            let start = DecodeStart {
                tokens: active.iter().map(|row| last_token(*row)).collect(),
                positions: active
                    .iter()
                    .map(|row| position(*row, &results[*row].token_ids))
                    .collect(),
                most_steps: settings.max_new_tokens,
                sampling: settings.sampling.clone(),
                draws: if settings.sampling.temperature == 0.0 {
                    Vec::new()
                } else {
                    let draws = |row: &usize| samplers[*row].clone().draws(settings.max_new_tokens);
                    active.iter().map(draws).collect()
                },
                seen: if settings.sampling.repetition_penalty == 1.0 {
                    Vec::new()
                } else {
                    let seen = |row: &usize| [&rows[*row][..], &results[*row].token_ids].concat();
                    active.iter().map(seen).collect()
                },
            };
            decoder = B::decoder(model, config, &cache, &start);
            places = active.clone();
            if let (Some(drafts), Some(decoder), [row]) = (drafts, &mut decoder, &places[..])
                && decoder.most_verified() > 1
            {
                let (prompt, result) = (&rows[*row], &mut results[*row]);
                let vocab = config.text_config.vocab_size;
                let session = DraftSession::new(drafts, &[], vocab);
                timing.drafts =
                    verify_to_end(&mut **decoder, session, prompt, result, settings, on_token)?;
                timing.decoded_tokens += timing.drafts.tokens;
                break;
            }
        }
        timing.decoded_tokens += stays.len();
        if let Some(decoder) = &mut decoder {
            // The decoder keeps its rows; those that have ended are ignored.
            let stayed: Vec<usize> = stays.iter().map(|place| active[*place]).collect();
            let tokens = decoder.next_tokens().map_err(GenerateError::Device)?;
            let chosen = places
                .iter()
                .zip(tokens)
                .filter(|(row, _)| stayed.contains(row));
            next = Next::Tokens(
                chosen
                    .map(|(_, token)| token.ok_or(GenerateError::NotFinite))
                    .collect::<Result<_, _>>()?,
            );
            active = stayed;
            continue;
        }
        let mut step = TextInput {
            input_ids: Vec::with_capacity(active.len()),
            segments: vec![vec![0]; active.len()],
            positions: Positions::default(),
            image_token_id: config.image_token_id,
        };
        for row in &active {
            step.input_ids.push(vec![last_token(*row)]);
            step.positions
                .push([position(*row, &results[*row].token_ids); 3]);
        }
        // A drawn image placeholder is a plain token here: there is no feature to put in its place.
        let hidden = model.hidden_states(&step, None, config, Some(&mut cache), None, device);
        next = Next::Logits(logits_on_host(model, hidden)?);
    }
    drop(decoder);
    timing.decode_seconds = lap(device);
    Ok((results, timing))
}

/// Whether tokens are drafted for a batch of so many rows, if there is something to draft from: in a large one the rows
/// themselves fill a step.
pub fn is_drafted<B: Accelerator>(rows: usize) -> bool {
    match B::DECODER_VERIFIES {
        true => rows == 1,
        false => 2 * rows <= B::CHEAP_ROWS,
    }
}

/// Tokens of a prompt that go through the layers at once, at least: each time all quantised weights are dequantised again.
const LEAST_PREFILL_COLUMNS: usize = 128;

/// Tokens a decoder may run ahead of what is read.
const DECODER_ROOM: usize = 8;

/// Source of the next tokens, one entry an active row.
enum Next {
    /// To be sampled from.
    Logits(Vec<Vec<f32>>),
    /// Chosen already.
    Tokens(Vec<u32>),
}

/// Checks settings and prompts before anything is computed.
///
/// # Errors
/// [`GenerateError`]: what does not fit the model.
pub(in crate::runtime) fn check_prompts(
    config: &Qwen3VlConfig,
    prompts: &[Prompt],
    settings: &GenerationConfig,
) -> Result<(), GenerateError> {
    settings.sampling.check().map_err(GenerateError::Sampling)?;
    let text = &config.text_config;
    for prompt in prompts {
        let ids = &prompt.input_ids;
        if ids.is_empty() {
            return Err(GenerateError::Empty);
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= text.vocab_size) {
            return Err(GenerateError::UnknownToken {
                id: *id,
                vocab_size: text.vocab_size,
            });
        }
        if ids.len().saturating_add(settings.max_new_tokens) > text.max_position_embeddings {
            return Err(GenerateError::TooLong {
                prompt: ids.len(),
                image: ids
                    .iter()
                    .filter(|id| **id == config.image_token_id)
                    .count(),
                new: settings.max_new_tokens,
                context: text.max_position_embeddings,
            });
        }
    }
    Ok(())
}

fn logits_on_host<B: Accelerator>(
    model: &Qwen3Vl<B>,
    hidden: Tensor<B, 2>,
) -> Result<Vec<Vec<f32>>, GenerateError> {
    let logits = model.logits(hidden);
    let [_, vocab] = logits.dims();
    debug_assert_eq!(logits.dtype(), DType::F32);
    let values: Vec<f32> = logits
        .into_data()
        .to_vec()
        .map_err(|_| GenerateError::NotFinite)?;
    if values.iter().any(|value| value.is_nan()) {
        return Err(GenerateError::NotFinite);
    }
    Ok(values.chunks(vocab).map(<[f32]>::to_vec).collect())
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    #[test]
    fn several_answers_to_prompts_are_those_of_each_prompt_and_seed_alone() {
        use burn_flex::Flex;

        use crate::{qwen3_vl::nn::InitOptions, runtime::synthetic::weights::RandomSize};

        let device = Default::default();
        let config = RandomSize::Tiny.config(None).unwrap();
        let model = Qwen3Vl::<Flex>::new(&config, &InitOptions::default(), &device);
        let prompt = |input_ids: &[u32]| Prompt {
            input_ids: input_ids.to_vec(),
            images: ImageInput::default(),
        };
        let prompts = [prompt(&[1, 2, 3]), prompt(&[4, 5, 6, 7, 8])];
        let answers = |prompts: &[Prompt], seed: u64, num_return_sequences: usize| {
            let settings = GenerationConfig {
                max_new_tokens: 12,
                num_return_sequences,
                sampling: SamplingConfig {
                    temperature: 1.0,
                    repetition_penalty: 1.1,
                    seed,
                    ..SamplingConfig::default()
                },
                ..GenerationConfig::default()
            };
            // Rows end at different times.
            let mut told = vec![0; prompts.len() * num_return_sequences];
            let (answers, timing) = generate(
                &model,
                &config,
                prompts,
                &settings,
                &device,
                &mut |row, _| {
                    told[row] += 1;
                    (told[row] == 5 + row % 3).then_some(FinishReason::Cancelled)
                },
            )
            .unwrap();
            let tokens = answers.into_iter().map(|one| one.token_ids);
            (tokens.collect::<Vec<_>>(), timing.prompt_tokens)
        };
        let (several, prompt_tokens) = answers(&prompts, 40, 3);
        assert_eq!((several.len(), prompt_tokens), (6, 8));
        for (row, found) in several.iter().enumerate() {
            let (alone, _) = answers(&prompts[row / 3..=row / 3], 40 + (row % 3) as u64, 1);
            let both = found.len().min(alone[0].len());
            assert!(both >= 5);
            assert_eq!(found[..both], alone[0][..both], "row {row}");
        }
        assert_ne!(several[0], several[1], "seeds differ");
    }

    #[test]
    fn an_answer_that_repeats_ends_unless_that_is_switched_off() {
        use burn::module::{Module, ModuleMapper, Param};
        use burn_flex::Flex;

        use crate::{qwen3_vl::nn::InitOptions, runtime::synthetic::weights::RandomSize};

        /// With all weights zero every token is as likely as the first, which is taken.
        struct Zero;
        impl ModuleMapper<Flex> for Zero {
            fn map_float<const D: usize>(
                &mut self,
                param: Param<Tensor<Flex, D>>,
            ) -> Param<Tensor<Flex, D>> {
                Param::initialized(param.id, param.val().zeros_like())
            }
        }
        let device = Default::default();
        let config = RandomSize::Tiny.config(None).unwrap();
        let model = Qwen3Vl::<Flex>::new(&config, &InitOptions::default(), &device).map(&mut Zero);
        let prompt = Prompt {
            input_ids: vec![1, 2, 3],
            images: ImageInput::default(),
        };
        let answer = |stop_on_repetition: bool| {
            let settings = GenerationConfig {
                max_new_tokens: 40,
                stop_on_repetition,
                ..GenerationConfig::default()
            };
            let prompts = std::slice::from_ref(&prompt);
            let (mut answers, _) =
                generate(&model, &config, prompts, &settings, &device, &mut |_, _| {
                    None
                })
                .unwrap();
            let answer = answers.remove(0);
            (answer.token_ids, answer.finish_reason)
        };
        assert_eq!(answer(true), (vec![0; 32], FinishReason::Repetition));
        assert_eq!(answer(false), (vec![0; 40], FinishReason::Length));
    }
}

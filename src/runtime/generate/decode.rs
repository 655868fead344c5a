//! Prefill, cached steps, stopping.

use burn::{prelude::*, tensor::DType};

use super::{
    drafted::{generate_drafted, verify_to_end},
    drafts::{DraftCounts, DraftSession, Drafts},
    prompt_state::PromptState,
    sampler::{Sampler, SamplingConfig},
};
use crate::{
    batch::{
        images::ImageInput,
        positions::{PositionError, Positions},
        text::{Padding, TextInput},
    },
    ops::quantised::cache::CacheFormat,
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, key_values::KeyValueCache},
    runtime::{
        accelerator::{Accelerator, DecodeStart, Decoder},
        vision::encode_images,
    },
};

/// When generation ends and how tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationConfig {
    /// Most tokens to add to a prompt; at least one is added.
    pub max_new_tokens: usize,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Ends an answer that repeats itself, where the reference goes on: see [`REPEATS`]. To be switched
    /// off where a grammar forces the answer.
    pub stop_on_repetition: bool,
    /// How tokens are chosen.
    pub sampling: SamplingConfig,
    /// Answers to each prompt, at least 1, whose keys and values are computed once; answers to one prompt follow each
    /// other.
    pub num_return_sequences: usize,
    /// A seed for each answer; empty where the first answer to a prompt has the one in `sampling`, and each later one
    /// the next.
    pub seeds: Vec<u64>,
    /// How keys and values are stored.
    pub kv_cache: CacheFormat,
    /// What tokens are drafted from, where they are; it changes the speed alone.
    pub drafts: Option<Drafts>,
}

impl Default for GenerationConfig {
    fn default() -> Self {
        Self {
            max_new_tokens: 512,
            eos_token_ids: Vec::new(),
            stop_on_repetition: true,
            sampling: SamplingConfig::default(),
            num_return_sequences: 1,
            seeds: Vec::new(),
            kv_cache: CacheFormat::default(),
            drafts: None,
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end token or a stop string.
    Stop,
    /// `max_new_tokens`.
    Length,
    /// The same tokens repeatedly; [`GenerationConfig::stop_on_repetition`].
    Repetition,
    /// The caller wanted no more.
    Cancelled,
}

/// One prompt with its images.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Prompt {
    /// Token ids, image placeholders expanded.
    pub input_ids: Vec<u32>,
    /// Images in the order of their placeholders.
    pub images: ImageInput,
}

/// Result of one prompt.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// New tokens, the end token included.
    pub token_ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
}

/// Why generation cannot start or continue.
#[derive(Debug, thiserror::Error)]
pub enum GenerateError {
    /// Prompt and answer do not fit the positions the model was trained for.
    #[error(
        "the prompt has {prompt} tokens ({image} of them image tokens) and may grow by {new}; the model's context is {context}. Shorten the prompt, lower `--max-new-tokens` or `--max-pixels`"
    )]
    TooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// Image tokens among them.
        image: usize,
        /// `max_new_tokens`.
        new: usize,
        /// Longest sequence.
        context: usize,
    },
    /// A prompt without a token.
    #[error("the prompt is empty")]
    Empty,
    /// A token the model does not have.
    #[error(
        "the prompt holds token {id}, the model has {vocab_size} tokens; does the tokenizer belong to the model?"
    )]
    UnknownToken {
        /// The token.
        id: u32,
        /// Tokens of the model.
        vocab_size: usize,
    },
    /// Image tokens and images do not agree.
    #[error(transparent)]
    Positions(#[from] PositionError),
    /// The model answers with NaN.
    #[error(
        "the model's output is not a number; weights and dtype do not go together, try `--dtype f32` or `--dtype bf16`"
    )]
    NotFinite,
    /// The device refuses to go on.
    #[error(
        "the device failed while decoding: {0}; a smaller batch (`--batch-size`) needs less memory"
    )]
    Device(String),
    /// A sampling setting out of range.
    #[error("{0}")]
    Sampling(String),
}

/// Seconds spent in the parts of one call.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Timing {
    /// Vision tower.
    pub vision_seconds: f64,
    /// Language model over the prompt, up to the first token.
    pub prefill_seconds: f64,
    /// All steps after the first token.
    pub decode_seconds: f64,
    /// Tokens of all prompts.
    pub prompt_tokens: usize,
    /// Tokens generated after the first of each row.
    pub decoded_tokens: usize,
    /// What was drafted.
    pub drafts: DraftCounts,
}

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

/// Whether an answer is over with its last token, which `on_token` gets unless it is an end token.
pub(super) fn end_of(
    row: usize,
    tokens: &[u32],
    settings: &GenerationConfig,
    on_token: &mut dyn FnMut(usize, u32) -> Option<FinishReason>,
) -> Option<FinishReason> {
    let token = *tokens.last()?;
    if settings.eos_token_ids.contains(&token) {
        Some(FinishReason::Stop)
    } else if let Some(reason) = on_token(row, token) {
        Some(reason)
    } else if tokens.len() >= settings.max_new_tokens {
        Some(FinishReason::Length)
    } else if settings.stop_on_repetition && goes_round(tokens) {
        Some(FinishReason::Repetition)
    } else {
        None
    }
}

/// Tokens of all prompts that go through the layers at once: a long context takes no more activations than
/// that, and a batch of usual prompts still goes in one pass.
pub const PREFILL_TOKENS: usize = 8192;

/// The same with quantised weights: who quantises is short of memory. Tokens of a prompt at least, since each time
/// all weights are dequantised again.
const PACKED_PREFILL_TOKENS: usize = 512;
const LEAST_PREFILL_COLUMNS: usize = 128;

/// Tokens of prompts that go through the layers of a model at once.
pub(super) fn prefilled_at_once<B: Accelerator>(model: &Qwen3Vl<B>) -> usize {
    match model.quantization() {
        Some(_) => PACKED_PREFILL_TOKENS,
        None => PREFILL_TOKENS,
    }
}

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

/// Longest piece whose repeats are looked for, in tokens.
pub const LONGEST_CYCLE: usize = 96;

/// How often a piece is repeated at least until an answer is ended for it, the repeats being
/// [`LEAST_REPEATED`] tokens or more.
pub const REPEATS: usize = 4;

/// Tokens that the repeats of a piece have at least until an answer is ended for them.
pub const LEAST_REPEATED: usize = 32;

/// Whether the answer ends in repeats of one piece of up to [`LONGEST_CYCLE`] tokens.
///
/// Transformers has no such rule: its answers go on to the end token or the token limit.
pub(crate) fn goes_round(tokens: &[u32]) -> bool {
    (1..=LONGEST_CYCLE).any(|cycle| {
        let need = (REPEATS * cycle).max(LEAST_REPEATED);
        tokens.len() >= need && {
            let tail = &tokens[tokens.len() - need..];
            tail[cycle..] == tail[..need - cycle]
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cycle_is_distinguished_from_a_repeated_phrase() {
        assert!(goes_round(&[5; 32]));
        assert!(!goes_round(&[5; 31]));
        let cycle: Vec<u32> = (0..20).collect();
        assert!(goes_round(&cycle.repeat(4)));
        assert!(!goes_round(&cycle.repeat(3)));
        let mut broken = cycle.repeat(4);
        broken[70] = 99;
        assert!(!goes_round(&broken));
        assert!(!goes_round(&(0..400).collect::<Vec<u32>>()));
    }

    #[cfg(feature = "flex")]
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

    #[cfg(feature = "flex")]
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

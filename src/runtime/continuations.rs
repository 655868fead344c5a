//! How likely given continuations of one prompt are: the prompt runs once, the continuations share its cache.

use burn::{
    prelude::*,
    tensor::{TensorData, activation::log_softmax},
};

use super::{
    accelerator::Accelerator,
    generate::{GenerateError, GenerationConfig, Prompt, PromptState, check_prompts},
    vision::encode_images,
};
use crate::{
    batch::{
        positions::Positions,
        text::{Padding, TextInput},
    },
    qwen3_vl::{Qwen3Vl, config::Qwen3VlConfig, key_values::KeyValueCache},
};

/// Tokens of all rows that are kept at once: the cache of the prompt is repeated for each continuation. With the
/// 8B model they take 2.4 GB in 16 bits.
const CACHED_TOKENS: usize = 16_384;

/// Rows of logits at once: with the published vocabulary 39 MB in f32.
const LOGIT_ROWS: usize = 64;

/// Tokens of a prompt that go through quantised weights at once; see `generate`.
const PACKED_COLUMNS: usize = 512;

/// The log-probability of each token of each continuation, given the prompt and the tokens before it.
///
/// # Errors
/// [`GenerateError`]: a prompt or continuation that does not fit the model, or an output that is not a number.
pub fn continuation_log_probabilities<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    prompt: &Prompt,
    continuations: &[Vec<u32>],
    device: &B::Device,
) -> Result<Vec<Vec<f32>>, GenerateError> {
    // Before the prompt goes through.
    check(config, prompt, &[], continuations)?;
    let state = PromptState::of_prompt(model, config, prompt, device)?;
    let mut found =
        state.continuation_log_probabilities(model, config, &[], &[0], continuations, device)?;
    Ok(found.remove(0))
}

impl<B: Accelerator> PromptState<B> {
    /// Puts a prompt through the model.
    ///
    /// # Errors
    /// [`GenerateError`]: a prompt that does not fit the model.
    pub fn of_prompt(
        model: &Qwen3Vl<B>,
        config: &Qwen3VlConfig,
        prompt: &Prompt,
        device: &B::Device,
    ) -> Result<Self, GenerateError> {
        check(config, prompt, &[], &[])?;
        let rows = std::slice::from_ref(&prompt.input_ids);
        let grids = std::slice::from_ref(&prompt.images.image_grid_thw);
        let (input, deltas) = TextInput::padded(rows, grids, config, Padding::Left, 0)?;
        let held = input.seq();
        let vision = (!prompt.images.image_grid_thw.is_empty())
            .then(|| encode_images(model, &prompt.images, config, device));
        let mut cache = KeyValueCache::new(config.text_config.num_hidden_layers);
        let columns = match model.quantization() {
            Some(_) => PACKED_COLUMNS.min(held),
            None => held,
        };
        let vision = vision.as_ref();
        let last = model.prefill(&input, vision, config, &mut cache, columns, device);
        Ok(Self {
            cache,
            last,
            held,
            delta: deltas[0],
            tokens: held,
        })
    }

    /// The log-probability of each token of each continuation after the prompt and the first `ends[i]` tokens of
    /// `answer`, `[end][continuation][token]`.
    ///
    /// The keys and values of prompt and answer are computed once. Each continuation counts alone: neither the others
    /// nor the rest of the answer change it.
    ///
    /// # Errors
    /// [`GenerateError`]: an answer or continuation that does not fit the model, or an output that is not a number.
    ///
    /// # Panics
    /// If an end is after the answer.
    pub fn continuation_log_probabilities(
        mut self,
        model: &Qwen3Vl<B>,
        config: &Qwen3VlConfig,
        answer: &[u32],
        ends: &[usize],
        continuations: &[Vec<u32>],
        device: &B::Device,
    ) -> Result<Vec<Vec<Vec<f32>>>, GenerateError> {
        let longest = check_added(config, self.tokens, answer, continuations)?;
        let (held, delta) = (self.held, self.delta);
        let room = held + answer.len() + longest;
        // Last hidden state of the prompt and of each token of the answer: what a continuation begins after.
        let mut before = self.last;
        if !answer.is_empty() {
            let step = after(&[answer], held, delta, config.image_token_id);
            let cache = Some(&mut self.cache);
            let hidden = model.hidden_states(&step, None, config, cache, None, device);
            before = Tensor::cat(vec![before, hidden], 0);
        }
        let firsts: Vec<usize> = (0..continuations.len())
            .filter(|row| !continuations[*row].is_empty())
            .collect();
        let targets: Vec<u32> = firsts.iter().map(|row| continuations[*row][0]).collect();
        let longer: Vec<usize> = (0..continuations.len())
            .filter(|row| continuations[*row].len() > 1)
            .collect();
        let at_once = (CACHED_TOKENS / room).max(1);
        let mut all = Vec::with_capacity(ends.len());
        for end in ends {
            assert!(*end <= answer.len(), "end {end} of {} tokens", answer.len());
            let mut found: Vec<Vec<f32>> = vec![Vec::new(); continuations.len()];
            let places = vec![*end as i32; targets.len()];
            let first = of_targets(model, &before, &places, &targets, device)?;
            for (row, value) in firsts.iter().zip(first) {
                found[*row].push(value);
            }
            for group in longer.chunks(at_once) {
                let texts: Vec<&[u32]> = group
                    .iter()
                    .map(|row| &continuations[*row][..continuations[*row].len() - 1])
                    .collect();
                let mut cache = self.cache.clone();
                cache.truncate(held + end);
                // New buffers: the shared ones are not written to.
                cache.select_rows(&vec![0; group.len()], device);
                let step = after(&texts, held + end, delta, config.image_token_id);
                let width = step.seq();
                let hidden =
                    model.hidden_states(&step, None, config, Some(&mut cache), None, device);
                let mut places = Vec::new();
                let mut targets = Vec::new();
                for (row, text) in texts.iter().enumerate() {
                    places.extend((0..text.len()).map(|column| (row * width + column) as i32));
                    targets.extend_from_slice(&continuations[group[row]][1..]);
                }
                let mut values = of_targets(model, &hidden, &places, &targets, device)?.into_iter();
                for (row, text) in group.iter().zip(&texts) {
                    found[*row].extend(values.by_ref().take(text.len()));
                }
            }
            all.push(found);
        }
        Ok(all)
    }
}

/// [`continuation_log_probabilities`] in the plain way: every continuation with the whole prompt before it, one after
/// the other, without a cache.
///
/// # Errors
/// As [`continuation_log_probabilities`].
pub fn whole_log_probabilities<B: Accelerator>(
    model: &Qwen3Vl<B>,
    config: &Qwen3VlConfig,
    prompt: &Prompt,
    continuations: &[Vec<u32>],
    device: &B::Device,
) -> Result<Vec<Vec<f32>>, GenerateError> {
    check(config, prompt, &[], continuations)?;
    let vision = (!prompt.images.image_grid_thw.is_empty())
        .then(|| encode_images(model, &prompt.images, config, device));
    let grids = std::slice::from_ref(&prompt.images.image_grid_thw);
    continuations
        .iter()
        .map(|continuation| {
            let row = [&prompt.input_ids[..], continuation].concat();
            let (input, _) = TextInput::padded(&[row], grids, config, Padding::Right, 0)?;
            let hidden = model.hidden_states(&input, vision.as_ref(), config, None, None, device);
            let before = prompt.input_ids.len() - 1;
            let places: Vec<i32> = (0..continuation.len())
                .map(|at| (before + at) as i32)
                .collect();
            of_targets(model, &hidden, &places, continuation, device)
        })
        .collect()
}

/// Checks prompt, answer and continuations; returns the length of the longest.
fn check(
    config: &Qwen3VlConfig,
    prompt: &Prompt,
    answer: &[u32],
    continuations: &[Vec<u32>],
) -> Result<usize, GenerateError> {
    let settings = GenerationConfig::default();
    let settings = GenerationConfig {
        max_new_tokens: 0,
        ..settings
    };
    check_prompts(config, std::slice::from_ref(prompt), &settings)?;
    check_added(config, prompt.input_ids.len(), answer, continuations)
}

/// Checks what comes after a prompt of `prompt` tokens; returns the length of the longest continuation.
fn check_added(
    config: &Qwen3VlConfig,
    prompt: usize,
    answer: &[u32],
    continuations: &[Vec<u32>],
) -> Result<usize, GenerateError> {
    let longest = continuations.iter().map(Vec::len).max().unwrap_or(0);
    let new = answer.len() + longest;
    let text = &config.text_config;
    if prompt.saturating_add(new) > text.max_position_embeddings {
        return Err(GenerateError::TooLong {
            prompt,
            image: 0,
            new,
            context: text.max_position_embeddings,
        });
    }
    let vocab_size = text.vocab_size;
    match (continuations.iter().flatten().chain(answer)).find(|id| **id as usize >= vocab_size) {
        Some(id) => Err(GenerateError::UnknownToken {
            id: *id,
            vocab_size,
        }),
        None => Ok(longest),
    }
}

/// Texts after `held` tokens of one sequence, a row each, padded on the right.
fn after(texts: &[&[u32]], held: usize, delta: i64, image_token_id: u32) -> TextInput {
    let width = texts.iter().map(|text| text.len()).max().unwrap_or(0);
    let mut step = TextInput {
        input_ids: Vec::with_capacity(texts.len()),
        segments: Vec::with_capacity(texts.len()),
        positions: Positions::default(),
        image_token_id,
    };
    for text in texts {
        let tokens = text.len();
        let mut ids = text.to_vec();
        ids.resize(width, 0);
        let mut segments = vec![0; tokens];
        segments.resize(width, -1);
        step.input_ids.push(ids);
        step.segments.push(segments);
        for column in 0..width {
            let position = (held + column) as i64 + delta;
            step.positions.push(if column < tokens {
                [position; 3]
            } else {
                [0; 3]
            });
        }
    }
    step
}

/// Log-probability of `targets[i]` after the hidden state in row `places[i]`.
fn of_targets<B: Accelerator>(
    model: &Qwen3Vl<B>,
    hidden: &Tensor<B, 2>,
    places: &[i32],
    targets: &[u32],
    device: &B::Device,
) -> Result<Vec<f32>, GenerateError> {
    let mut found = Vec::with_capacity(targets.len());
    for (places, targets) in places.chunks(LOGIT_ROWS).zip(targets.chunks(LOGIT_ROWS)) {
        let rows = Tensor::<B, 1, Int>::from_ints(places, device);
        let logits = model.logits(hidden.clone().select(0, rows));
        let targets: Vec<i32> = targets.iter().map(|id| *id as i32).collect();
        let shape = [targets.len(), 1];
        let targets = Tensor::<B, 2, Int>::from_data(TensorData::new(targets, shape), device);
        let values = log_softmax(logits, 1).gather(1, targets).into_data();
        found.extend(values.iter::<f32>());
    }
    if found.iter().any(|value| value.is_nan()) {
        return Err(GenerateError::NotFinite);
    }
    Ok(found)
}

//! A request's settings: checked, and completed from the server's defaults.

use std::collections::BTreeMap;

use super::{
    ServeConfig,
    engine::Penalties,
    error::ApiError,
    types::{AnswerForm, ChatRequest},
};
use crate::runtime::generate::SamplingConfig;

/// Most stop texts, and the longest of them in bytes.
const MAX_STOPS: usize = 16;
const LONGEST_STOP: usize = 256;

/// Largest `top_logprobs`, as OpenAI has it.
const MAX_TOP_LOGPROBS: usize = 20;

/// Most entries of `logit_bias`.
const MAX_BIASES: usize = 1024;

/// Settings of a request besides its messages.
#[derive(Debug, Clone, PartialEq)]
pub struct RequestSettings {
    /// How tokens are chosen; the seed is that of the first answer.
    pub sampling: SamplingConfig,
    /// Changes of the logits.
    pub penalties: Penalties,
    /// Most tokens, if the request sets it.
    pub max_new_tokens: Option<usize>,
    /// Number of answers.
    pub choices: usize,
    /// Stop texts.
    pub stop: Vec<String>,
    /// Number of likeliest tokens whose probabilities are sent, if any.
    pub logprobs: Option<usize>,
    /// Sends the answer as it grows.
    pub stream: bool,
    /// Ends a stream with token counts.
    pub include_usage: bool,
    /// Goes on after end tokens, for measurements.
    pub ignore_eos: bool,
    /// Form of the answer.
    pub form: Option<AnswerForm>,
    /// Tokens that end an answer besides the model's own.
    pub stop_token_ids: Vec<u32>,
    /// Tokens before which none of these is taken.
    pub min_new_tokens: usize,
    /// The only tokens that may be chosen, if not all.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Fields of the request that were passed over.
    pub ignored: Vec<String>,
}

impl RequestSettings {
    /// Checks a request; `vocab_size` is the model's.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field.
    pub fn new(
        request: &ChatRequest,
        config: &ServeConfig,
        vocab_size: usize,
    ) -> Result<Self, ApiError> {
        let choices = request.n.unwrap_or(1);
        if choices == 0 || choices > config.max_choices {
            return Err(ApiError::invalid(
                "n",
                format!("`n` is {choices}, expected 1 to {}", config.max_choices),
            ));
        }
        Ok(Self {
            sampling: sampling(request, &config.sampling)?,
            penalties: penalties(request, vocab_size)?,
            max_new_tokens: max_new_tokens(request, config)?,
            choices,
            stop: stop(request)?,
            logprobs: logprobs(request)?,
            stream: request.stream.unwrap_or(false),
            include_usage: request.include_usage,
            ignore_eos: request.ignore_eos.unwrap_or(false),
            form: request.form.clone(),
            stop_token_ids: token_ids("stop_token_ids", &request.stop_token_ids, vocab_size)?,
            min_new_tokens: min_new_tokens(request, config)?,
            allowed_token_ids: allowed_token_ids(request, vocab_size)?,
            ignored: request.ignored.clone(),
        })
    }

    /// Settings of answer `index`: answers to one request differ in their seeds.
    pub fn sampling_of(&self, index: usize) -> SamplingConfig {
        SamplingConfig {
            seed: self.sampling.seed.wrapping_add(index as u64),
            ..self.sampling.clone()
        }
    }
}

fn sampling(request: &ChatRequest, defaults: &SamplingConfig) -> Result<SamplingConfig, ApiError> {
    let top_k = match request.top_k {
        // -1 is how others write "all".
        Some(-1) => 0,
        Some(top_k) => usize::try_from(top_k).map_err(|_| {
            ApiError::invalid("top_k", format!("`top_k` is {top_k}, expected -1 or more"))
        })?,
        None => defaults.top_k,
    };
    let sampling = SamplingConfig {
        temperature: request.temperature.unwrap_or(defaults.temperature),
        top_k,
        top_p: request.top_p.unwrap_or(defaults.top_p),
        min_p: request.min_p.unwrap_or(defaults.min_p),
        repetition_penalty: request
            .repetition_penalty
            .unwrap_or(defaults.repetition_penalty),
        seed: match request.seed {
            Some(seed) => seed as u64,
            // 0 is the default: no seed was set.
            None if defaults.seed != 0 => defaults.seed,
            None => rand::random(),
        },
    };
    sampling.check().map_err(|reason| {
        let field = reason.split(' ').next().unwrap_or_default().to_owned();
        ApiError::invalid(field, reason)
    })?;
    Ok(sampling)
}

fn penalties(request: &ChatRequest, vocab_size: usize) -> Result<Penalties, ApiError> {
    let range = |name: &str, value: Option<f32>| {
        let value = value.unwrap_or(0.0);
        if (-2.0..=2.0).contains(&value) {
            Ok(value)
        } else {
            Err(ApiError::invalid(
                name,
                format!("`{name}` is {value}, expected -2 to 2"),
            ))
        }
    };
    Ok(Penalties {
        frequency: range("frequency_penalty", request.frequency_penalty)?,
        presence: range("presence_penalty", request.presence_penalty)?,
        bias: match &request.logit_bias {
            Some(bias) => logit_bias(bias, vocab_size)?,
            None => Vec::new(),
        },
    })
}

fn logit_bias(
    bias: &BTreeMap<String, f32>,
    vocab_size: usize,
) -> Result<Vec<(u32, f32)>, ApiError> {
    let wrong = |reason: String| ApiError::invalid("logit_bias", reason);
    if bias.len() > MAX_BIASES {
        return Err(wrong(format!(
            "`logit_bias` has {} entries, at most {MAX_BIASES} are taken",
            bias.len()
        )));
    }
    bias.iter()
        .map(|(id, value)| {
            let id = id
                .parse::<u32>()
                .ok()
                .filter(|id| (*id as usize) < vocab_size);
            match id {
                Some(id) if (-100.0..=100.0).contains(value) => Ok((id, *value)),
                _ => Err(wrong(format!(
                    "`logit_bias` maps token ids below {vocab_size} to numbers from -100 to 100"
                ))),
            }
        })
        .collect()
}

fn max_new_tokens(request: &ChatRequest, config: &ServeConfig) -> Result<Option<usize>, ApiError> {
    let (name, value) = match (request.max_completion_tokens, request.max_tokens) {
        (Some(value), _) => ("max_completion_tokens", value),
        (None, Some(value)) => ("max_tokens", value),
        (None, None) => return Ok(None),
    };
    if value == 0 || value > config.max_new_tokens {
        return Err(ApiError::invalid(
            name,
            format!(
                "`{name}` is {value}, expected 1 to {}",
                config.max_new_tokens
            ),
        ));
    }
    Ok(Some(value))
}

fn min_new_tokens(request: &ChatRequest, config: &ServeConfig) -> Result<usize, ApiError> {
    let least = request.min_tokens.unwrap_or(0);
    let most = max_new_tokens(request, config)?.unwrap_or(config.default_new_tokens);
    if least > most {
        return Err(ApiError::invalid(
            "min_tokens",
            format!(
                "`min_tokens` is {least}, expected at most the {most} tokens the answer may have"
            ),
        ));
    }
    Ok(least)
}

fn token_ids(name: &str, ids: &[u32], vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    match ids.iter().find(|id| **id as usize >= vocab_size) {
        Some(id) => Err(ApiError::invalid(
            name,
            format!("`{name}` has {id}, expected token ids below {vocab_size}"),
        )),
        None => Ok(ids.to_vec()),
    }
}

fn allowed_token_ids(
    request: &ChatRequest,
    vocab_size: usize,
) -> Result<Option<Vec<u32>>, ApiError> {
    let name = "allowed_token_ids";
    let Some(ids) = &request.allowed_token_ids else {
        return Ok(None);
    };
    if ids.is_empty() {
        return Err(ApiError::invalid(
            name,
            format!("`{name}` is empty, expected at least one token id"),
        ));
    }
    if request.form.is_some() {
        return Err(ApiError::invalid(
            name,
            format!("`{name}` cannot be followed together with a form of the answer"),
        ));
    }
    token_ids(name, ids, vocab_size).map(Some)
}

fn stop(request: &ChatRequest) -> Result<Vec<String>, ApiError> {
    let stop = request.stop.clone();
    let fits = |text: &String| !text.is_empty() && text.len() <= LONGEST_STOP;
    if stop.len() > MAX_STOPS || !stop.iter().all(fits) {
        return Err(ApiError::invalid(
            "stop",
            format!("`stop` takes at most {MAX_STOPS} texts of 1 to {LONGEST_STOP} bytes"),
        ));
    }
    Ok(stop)
}

fn logprobs(request: &ChatRequest) -> Result<Option<usize>, ApiError> {
    let top = request.top_logprobs.unwrap_or(0);
    if top > MAX_TOP_LOGPROBS {
        return Err(ApiError::invalid(
            "top_logprobs",
            format!("`top_logprobs` is {top}, expected 0 to {MAX_TOP_LOGPROBS}"),
        ));
    }
    match request.logprobs {
        Some(true) => Ok(Some(top)),
        _ if top > 0 => Err(ApiError::invalid(
            "top_logprobs",
            "`top_logprobs` needs `logprobs` to be true",
        )),
        _ => Ok(None),
    }
}

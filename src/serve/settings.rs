//! A request's settings: checked, and completed from the server's defaults.

use std::collections::BTreeMap;

use super::{
    ServeConfig,
    engine::Penalties,
    error::ApiError,
    types::{AnswerForm, GenerationFields},
};
use crate::runtime::generate::SamplingConfig;

/// Most stop texts, and the longest of them in bytes.
const MAX_STOPS: usize = 16;
const LONGEST_STOP: usize = 256;

/// Largest `top_logprobs`, as OpenAI has it.
const MAX_TOP_LOGPROBS: usize = 20;

/// Largest `prompt_logprobs`; each token of the prompt has so many entries.
const MAX_PROMPT_LOGPROBS: usize = 20;

/// Most `bad_words`, and the longest of them in bytes.
const MAX_BAD_WORDS: usize = 64;
const LONGEST_BAD_WORD: usize = 128;

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
    /// Sends token counts with every chunk.
    pub continuous_usage: bool,
    /// Number of likeliest tokens whose probabilities are sent for each token of the prompt, if any.
    pub prompt_logprobs: Option<usize>,
    /// Writes tokens as `token_id:…` where log probabilities are sent.
    pub tokens_as_ids: bool,
    /// Ends an answer after a stop text instead of before it.
    pub include_stop: bool,
    /// Writes control tokens into the answer.
    pub keep_special: bool,
    /// Texts that the answer does not contain.
    pub bad_words: Vec<String>,
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
    /// What the answer is expected to be, which makes it faster where it is.
    pub prediction: Option<String>,
}

impl RequestSettings {
    /// Checks a request; `vocab_size` is the model's.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names the field.
    pub fn new(
        request: &GenerationFields,
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
            continuous_usage: request.continuous_usage_stats,
            prompt_logprobs: prompt_logprobs(request)?,
            tokens_as_ids: request.return_tokens_as_token_ids,
            include_stop: request.include_stop_str_in_output,
            keep_special: request.keep_special_tokens,
            bad_words: bad_words(request)?,
            ignore_eos: request.ignore_eos.unwrap_or(false),
            form: request.form.clone(),
            stop_token_ids: token_ids("stop_token_ids", &request.stop_token_ids, vocab_size)?,
            min_new_tokens: min_new_tokens(request, config)?,
            allowed_token_ids: allowed_token_ids(request, vocab_size)?,
            prediction: request.prediction.clone(),
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

fn sampling(
    request: &GenerationFields,
    defaults: &SamplingConfig,
) -> Result<SamplingConfig, ApiError> {
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

fn penalties(request: &GenerationFields, vocab_size: usize) -> Result<Penalties, ApiError> {
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

fn max_new_tokens(
    request: &GenerationFields,
    config: &ServeConfig,
) -> Result<Option<usize>, ApiError> {
    let given = [
        ("max_completion_tokens", request.max_completion_tokens),
        ("max_tokens", request.max_tokens),
        ("max_output_tokens", request.max_output_tokens),
    ];
    let given = given
        .into_iter()
        .find_map(|(name, value)| Some((name, value?)));
    let Some((name, value)) = given else {
        return Ok(None);
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

fn min_new_tokens(request: &GenerationFields, config: &ServeConfig) -> Result<usize, ApiError> {
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
    request: &GenerationFields,
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

fn stop(request: &GenerationFields) -> Result<Vec<String>, ApiError> {
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

fn logprobs(request: &GenerationFields) -> Result<Option<usize>, ApiError> {
    match request.logprobs {
        Some(top) if top > MAX_TOP_LOGPROBS => Err(ApiError::invalid(
            "top_logprobs",
            format!("`top_logprobs` is {top}, expected 0 to {MAX_TOP_LOGPROBS}"),
        )),
        logprobs => Ok(logprobs),
    }
}

fn prompt_logprobs(request: &GenerationFields) -> Result<Option<usize>, ApiError> {
    let name = "prompt_logprobs";
    match request.prompt_logprobs {
        Some(top) if top > MAX_PROMPT_LOGPROBS => Err(ApiError::invalid(
            name,
            format!("`{name}` is {top}, expected 0 to {MAX_PROMPT_LOGPROBS}"),
        )),
        Some(_) if request.stream == Some(true) => Err(ApiError::invalid(
            name,
            format!("`{name}` is not sent with `stream`; ask for the whole answer"),
        )),
        top => Ok(top),
    }
}

fn bad_words(request: &GenerationFields) -> Result<Vec<String>, ApiError> {
    let words = request.bad_words.clone();
    let name = "bad_words";
    let fits = |text: &String| !text.is_empty() && text.len() <= LONGEST_BAD_WORD;
    if words.len() > MAX_BAD_WORDS || !words.iter().all(fits) {
        return Err(ApiError::invalid(
            name,
            format!(
                "`{name}` takes at most {MAX_BAD_WORDS} texts of 1 to {LONGEST_BAD_WORD} bytes"
            ),
        ));
    }
    if !words.is_empty() && request.form.is_some() {
        return Err(ApiError::invalid(
            name,
            format!("`{name}` cannot be followed together with a form of the answer"),
        ));
    }
    Ok(words)
}

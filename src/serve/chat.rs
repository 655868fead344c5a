//! `POST /v1/chat/completions`.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    body::Body,
    extract::{Extension, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    App,
    auth::Peer,
    body::{check_json_size, read_body, take},
    content::{Asking, prepare},
    engine::{Done, Event, Submission, TokenLogprob},
    error::ApiError,
    reasoning::{Piece, ReasoningSplitter},
    settings::RequestSettings,
    share::Share,
    stream,
    types::{ChatRequest, LogprobEntry, PromptTokensDetails, Usage},
};
use crate::{generate::FinishReason, processor::tokenizer::Tokenizer};

/// What every response to one request repeats.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

/// Writes one line to the log when a request is over, however it ends.
pub(super) struct RequestLog {
    pub(super) id: String,
    started: Instant,
    pub(super) images: usize,
    pub(super) prompt_tokens: usize,
    pub(super) completion_tokens: usize,
    pub(super) outcome: &'static str,
}

impl Drop for RequestLog {
    fn drop(&mut self) {
        log::info!(
            "{} {}: {} image(s), {} + {} tokens, {:.3} s",
            self.id,
            self.outcome,
            self.images,
            self.prompt_tokens,
            self.completion_tokens,
            self.started.elapsed().as_secs_f64()
        );
    }
}

/// Answers a chat request, whole or as a stream.
///
/// # Errors
/// [`ApiError`].
pub async fn completions(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let started = Instant::now();
    let deadline = started + app.config.request_timeout;
    expect_json(&headers)?;
    // A full server does not read what it will not answer. The place itself is taken when the body is
    // there: whoever sends slowly must not hold one.
    app.engine.check_room(peer.client)?;
    let (request, memory): (ChatRequest, _) = read_json(&app, peer.client, body).await?;
    let model = app.models.find(request.model.as_deref())?;
    let vocab_size = app.parts.config.text_config.vocab_size;
    let settings = RequestSettings::new(&request, &app.config, vocab_size)?;
    let mut places = app.engine.reserve(peer.client, settings.choices)?;
    let header = Header {
        id: format!("chatcmpl-{:032x}", rand::random::<u128>()),
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        model: request
            .model
            .clone()
            .unwrap_or_else(|| app.models.base().to_owned()),
    };
    let mut log = RequestLog {
        id: header.id.clone(),
        started,
        images: 0,
        prompt_tokens: 0,
        completion_tokens: 0,
        outcome: "refused",
    };
    let asking = Asking {
        client: peer.client,
        memory,
    };
    let prepared = tokio::time::timeout_at(
        deadline.into(),
        prepare(&app, &model, request.messages, asking),
    )
    .await
    .map_err(|_| ApiError::from(super::engine::Failure::Deadline))??;
    let prompt = Arc::new(prepared);
    log.images = prompt.images.len();
    log.prompt_tokens = prompt.len();
    log.outcome = "left";
    let max_new_tokens = room(&app, &settings, prompt.len())?;
    let eos_token_ids = if settings.ignore_eos {
        Vec::new()
    } else {
        app.parts.eos_token_ids.clone()
    };
    let mut receivers = Vec::with_capacity(settings.choices);
    for index in 0..settings.choices {
        let submission = Submission {
            adapter: model.adapter,
            prompt: prompt.clone(),
            max_new_tokens,
            eos_token_ids: eos_token_ids.clone(),
            sampling: settings.sampling_of(index),
            penalties: settings.penalties.clone(),
            stop: settings.stop.clone(),
            stop_on_repetition: app.config.stop_on_repetition && !settings.ignore_eos,
            logprobs: settings.logprobs,
            constraint: match &settings.schema {
                Some(schema) => Some(constraint(&app, schema.clone(), &model.template).await?),
                None => None,
            },
            deadline,
            client: peer.client,
        };
        receivers.push(app.engine.submit(submission, &mut places, started)?);
    }
    let answers = Answers {
        header,
        log,
        receivers,
        opens_thinking: model.template.opens_thinking(),
        settings,
        tokenizer: app.parts.tokenizer.clone(),
    };
    if answers.settings.stream {
        stream::respond(answers).await
    } else {
        Ok(Json(collect(answers).await?).into_response())
    }
}

/// What is being answered.
pub(super) struct Answers {
    pub(super) header: Header,
    pub(super) log: RequestLog,
    pub(super) receivers: Vec<UnboundedReceiver<Event>>,
    pub(super) opens_thinking: bool,
    pub(super) settings: RequestSettings,
    pub(super) tokenizer: Tokenizer,
}

async fn constraint(
    app: &Arc<App>,
    schema: Value,
    template: &crate::processor::chat::ChatTemplate,
) -> Result<Box<dyn super::engine::TokenConstraint>, ApiError> {
    let (app, thinks) = (app.clone(), template.opens_thinking());
    // Reading a vocabulary or a large schema takes a while.
    tokio::task::spawn_blocking(move || {
        let grammar = app.grammar().ok_or_else(ApiError::internal)?;
        grammar.json(schema, thinks).map_err(|reason| {
            let reason: String = reason.chars().take(300).collect();
            ApiError::invalid(
                "response_format",
                format!("the JSON schema cannot be followed: {reason}"),
            )
        })
    })
    .await
    .map_err(|_| ApiError::internal())?
}

/// Tokens an answer may have: as asked, or what is left of context and cache.
fn room(app: &App, settings: &RequestSettings, prompt: usize) -> Result<usize, ApiError> {
    let context = app.context();
    let left = context.saturating_sub(prompt);
    let wanted = settings.max_new_tokens;
    if left == 0 || wanted.is_some_and(|wanted| wanted > left) {
        return Err(ApiError::invalid(
            "messages",
            format!(
                "the prompt has {prompt} tokens and the answer may have {}; this server takes {context} together",
                wanted.unwrap_or(1)
            ),
        )
        .with_code("context_length_exceeded"));
    }
    Ok(wanted.unwrap_or(app.config.default_new_tokens.min(left)))
}

pub(super) fn expect_json(headers: &HeaderMap) -> Result<(), ApiError> {
    let json = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.split(';').next())
        .is_some_and(|kind| kind.trim().eq_ignore_ascii_case("application/json"));
    if json {
        Ok(())
    } else {
        // A page of another origin cannot send this type without asking first.
        Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "expected the header `Content-Type: application/json`",
        ))
    }
}

/// Reads a JSON body; see [`read_body`].
pub(super) async fn read_json<T: serde::de::DeserializeOwned>(
    app: &App,
    client: u64,
    body: Body,
) -> Result<(T, Share), ApiError> {
    let (bytes, mut memory) = read_body(app, client, body).await?;
    check_json_size(&bytes)?;
    // The text, and what is made of it.
    take(&mut memory, 2 * bytes.len()).await?;
    let value = serde_json::from_slice(&bytes).map_err(|error| {
        let reason: String = error.to_string().chars().take(300).collect();
        ApiError::new(
            StatusCode::BAD_REQUEST,
            format!("the body is not a request: {reason}"),
        )
    })?;
    Ok((value, memory))
}

/// The whole answer as one object.
async fn collect(mut answers: Answers) -> Result<Value, ApiError> {
    let mut choices = Vec::with_capacity(answers.receivers.len());
    let mut usage = Usage::default();
    for (index, receiver) in answers.receivers.iter_mut().enumerate() {
        let mut splitter = ReasoningSplitter::new(answers.opens_thinking);
        let mut pieces = Vec::new();
        let mut logprobs = Vec::new();
        let done = loop {
            match receiver.recv().await {
                Some(Event::Token { text, logprob }) => {
                    pieces.extend(splitter.push(&text));
                    logprobs.extend(logprob.map(|one| entry(&answers.tokenizer, &one)));
                }
                Some(Event::Done(done)) => break done,
                Some(Event::Failed(failure)) => {
                    answers.log.outcome = "failed";
                    return Err(failure.into());
                }
                None => {
                    answers.log.outcome = "failed";
                    return Err(ApiError::internal());
                }
            }
        };
        pieces.extend(splitter.push(&done.text));
        pieces.extend(splitter.finish());
        let (mut reasoning, mut content) = (String::new(), String::new());
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => reasoning.push_str(&text),
                Piece::Answer(text) => content.push_str(&text),
            }
        }
        count(&mut usage, answers.log.prompt_tokens, &done);
        let reasoning = (!reasoning.is_empty()).then_some(reasoning);
        let logprobs = answers
            .settings
            .logprobs
            .map(|_| json!({"content": logprobs}));
        choices.push(json!({
            "index": index,
            "message": {
                "role": "assistant",
                "content": content,
                "reasoning_content": reasoning,
            },
            "logprobs": logprobs,
            "finish_reason": finish_reason(done.reason),
            "stop_reason": stop_reason(done.reason),
        }));
    }
    answers.log.completion_tokens = usage.completion_tokens;
    answers.log.outcome = "done";
    Ok(json!({
        "id": answers.header.id,
        "object": "chat.completion",
        "created": answers.header.created,
        "model": answers.header.model,
        "choices": choices,
        "usage": usage,
    }))
}

/// Adds one answer to the counts; the prompt counts once.
pub(super) fn count(usage: &mut Usage, prompt_tokens: usize, done: &Done) {
    usage.prompt_tokens = prompt_tokens;
    usage.completion_tokens += done.completion_tokens;
    usage.total_tokens = prompt_tokens + usage.completion_tokens;
    let cached = &mut usage.prompt_tokens_details;
    if *cached == PromptTokensDetails::default() {
        cached.cached_tokens = done.cached_tokens;
    }
}

/// OpenAI's word; an answer that went round in circles was cut off like one that grew too long.
pub(super) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::Cancelled => "stop",
        FinishReason::Length | FinishReason::Repetition => "length",
    }
}

/// What OpenAI has no word for.
pub(super) fn stop_reason(reason: FinishReason) -> Option<&'static str> {
    (reason == FinishReason::Repetition).then_some("repetition")
}

/// A log probability with the texts of its tokens.
pub(super) fn entry(tokenizer: &Tokenizer, found: &TokenLogprob) -> LogprobEntry {
    let one = |id: u32, logprob: f32| {
        let bytes = tokenizer.bytes_of(id, false);
        LogprobEntry {
            token: String::from_utf8_lossy(&bytes).into_owned(),
            // JSON has no infinity; OpenAI writes this for the impossible.
            logprob: logprob.max(-9999.0),
            bytes,
            top_logprobs: None,
        }
    };
    LogprobEntry {
        top_logprobs: Some(
            found
                .top
                .iter()
                .map(|(id, logprob)| one(*id, *logprob))
                .collect(),
        ),
        ..one(found.id, found.logprob)
    }
}

/// Time between signs of life on a stream that has nothing to say.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(10);

//! `POST /v1/chat/completions`.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    Json,
    body::Body,
    extract::{Extension, State},
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    App,
    audit::RequestRecord,
    auth::Peer,
    body::{check_json_size, read_body, take},
    content::{Requester, prepare},
    engine::{Done, Event, Submission, TokenConstraint, TokenLogprob},
    error::ApiError,
    fields::{Fields, parse_body},
    grammar::TokenRules,
    reasoning::{Piece, ReasoningSplitter},
    settings::RequestSettings,
    share::Share,
    stream,
    types::{AnswerForm, ChatRequest, ImageRemark, LogprobEntry, PromptTokensDetails, Usage},
};
use crate::{
    processor::{chat::ChatTemplate, tokenizer::Tokenizer},
    runtime::generate::FinishReason,
};

/// What every response to one request repeats.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

/// Answers a chat request, whole or as a stream.
///
/// # Errors
/// [`ApiError`].
pub(super) async fn completions(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Extension(record): Extension<Arc<RequestRecord>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let started = Instant::now();
    let deadline = started + app.config.request_timeout;
    expect_json(&headers)?;
    // A full server does not read what it will not answer. The place itself is taken when the body is
    // there: whoever sends slowly must not hold one.
    app.engine.check_room(peer.client)?;
    let (fields, memory) = read_json(&app, peer.client, body).await?;
    let request = ChatRequest::read(fields, app.config.lenient)?;
    let mut model = app.models.find(request.model.as_deref())?;
    record.facts().model = Some(
        request
            .model
            .clone()
            .unwrap_or_else(|| app.models.base().to_owned()),
    );
    if let Some(enable) = request.enable_thinking {
        model.template = with_thinking(&model.template, enable)?;
    }
    let vocab_size = app.parts.config.text_config.vocab_size;
    let settings = RequestSettings::new(&request, &app.config, vocab_size)?;
    let mut places = app.engine.reserve(peer.client, settings.choices)?;
    let header = Header {
        id: format!("chatcmpl-{}", record.id()),
        created: SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs()),
        model: request
            .model
            .clone()
            .unwrap_or_else(|| app.models.base().to_owned()),
    };
    let requester = Requester {
        client: peer.client,
        memory,
    };
    let prepared = tokio::time::timeout_at(
        deadline.into(),
        prepare(&app, &model, request.messages, requester),
    )
    .await
    .map_err(|_| ApiError::from(super::engine::Failure::Deadline))??;
    let prompt = Arc::new(prepared);
    {
        let mut facts = record.facts();
        facts.images = prompt.images.len();
        facts.prompt_tokens = prompt.len();
    }
    let max_new_tokens = room(&app, &settings, prompt.len())?;
    let mut eos_token_ids = match settings.ignore_eos {
        true => Vec::new(),
        false => app.parts.eos_token_ids.clone(),
    };
    eos_token_ids.extend(&settings.stop_token_ids);
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
            constraint: constraint(&app, &settings, &eos_token_ids, &model.template).await?,
            deadline,
            client: peer.client,
        };
        receivers.push(app.engine.submit(submission, &mut places, started)?);
    }
    // Until it is known to have ended otherwise.
    record.facts().outcome = Some("left");
    let answers = Answers {
        header,
        record,
        prompt_tokens: prompt.len(),
        remarks: prompt.remarks.clone(),
        receivers,
        opens_thinking: model.template.opens_thinking(),
        settings,
        tokenizer: app.parts.tokenizer.clone(),
    };
    let ignored = ignored_header(&answers.settings.ignored);
    let mut response = if answers.settings.stream {
        stream::respond(answers).await?
    } else {
        Json(collect(answers).await?).into_response()
    };
    if let Some(ignored) = ignored {
        response.headers_mut().insert("x-ignored-fields", ignored);
    }
    Ok(response)
}

/// Names of fields that were passed over, as a header.
fn ignored_header(names: &[String]) -> Option<HeaderValue> {
    if names.is_empty() {
        return None;
    }
    let names: Vec<String> = names
        .iter()
        .map(|name| name.escape_default().to_string())
        .collect();
    let text: String = names.join(", ").chars().take(2000).collect();
    HeaderValue::from_str(&text).ok()
}

/// A template with `enable_thinking` set.
fn with_thinking(template: &ChatTemplate, enable: bool) -> Result<ChatTemplate, ApiError> {
    let name = "chat_template_kwargs.enable_thinking";
    let wrong = |reason: &str| ApiError::invalid(name, format!("`{name}` {reason}"));
    template
        .with_thinking(enable)
        .map_err(|_| wrong("is not taken by the model's chat template"))?
        .ok_or_else(|| wrong("is not read by the model's chat template; leave it out"))
}

/// What is being answered.
pub(super) struct Answers {
    pub(super) header: Header,
    pub(super) record: Arc<RequestRecord>,
    pub(super) prompt_tokens: usize,
    /// What a reader should know about the images.
    pub(super) remarks: Vec<ImageRemark>,
    pub(super) receivers: Vec<UnboundedReceiver<Event>>,
    pub(super) opens_thinking: bool,
    pub(super) settings: RequestSettings,
    pub(super) tokenizer: Tokenizer,
}

/// The constraint on each token, if the request has one.
async fn constraint(
    app: &Arc<App>,
    settings: &RequestSettings,
    eos_token_ids: &[u32],
    template: &ChatTemplate,
) -> Result<Option<Box<dyn TokenConstraint>>, ApiError> {
    let form = match &settings.form {
        Some(form) => Some(form_constraint(app, form.clone(), template).await?),
        None => None,
    };
    if settings.min_new_tokens == 0 && settings.allowed_token_ids.is_none() {
        return Ok(form);
    }
    Ok(Some(Box::new(TokenRules {
        end_tokens: eos_token_ids.to_vec(),
        min_new_tokens: settings.min_new_tokens,
        allowed: settings.allowed_token_ids.clone(),
        form,
        written: 0,
    })))
}

async fn form_constraint(
    app: &Arc<App>,
    form: AnswerForm,
    template: &ChatTemplate,
) -> Result<Box<dyn TokenConstraint>, ApiError> {
    let (app, thinks) = (app.clone(), template.opens_thinking());
    // Reading a vocabulary or a large schema takes a while.
    tokio::task::spawn_blocking(move || {
        let grammar = app.grammar().ok_or_else(ApiError::internal)?;
        grammar.constraint(&form, thinks).map_err(|reason| {
            let what = match form {
                AnswerForm::Json(_) => "the JSON schema",
                AnswerForm::Regex(_) => "the regular expression",
                AnswerForm::Choice(_) => "the list of choices",
            };
            ApiError::invalid(
                "response_format",
                format!("{what} cannot be followed: {reason}"),
            )
        })
    })
    .await
    .map_err(|_| ApiError::internal())?
}

/// Tokens an answer may have: the requested number, or what is left of context and cache.
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
        // A page of another origin cannot send this type without a preflight request.
        Err(ApiError::new(
            StatusCode::UNSUPPORTED_MEDIA_TYPE,
            "expected the header `Content-Type: application/json`",
        ))
    }
}

/// Reads a JSON body; see [`read_body`].
pub(super) async fn read_json(
    app: &App,
    client: u64,
    body: Body,
) -> Result<(Fields, Share), ApiError> {
    let (bytes, mut memory) = read_body(app, client, body).await?;
    check_json_size(&bytes)?;
    // The text, and what is made of it.
    take(&mut memory, 2 * bytes.len()).await?;
    Ok((parse_body(&bytes)?, memory))
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
                    answers.record.facts().outcome = Some("failed");
                    return Err(failure.into());
                }
                None => {
                    answers.record.facts().outcome = Some("failed");
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
        count(&mut usage, answers.prompt_tokens, &done);
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
    {
        let mut facts = answers.record.facts();
        facts.completion_tokens = usage.completion_tokens;
        facts.outcome = Some("done");
    }
    let mut answer = json!({
        "id": answers.header.id,
        "object": "chat.completion",
        "created": answers.header.created,
        "model": answers.header.model,
        "choices": choices,
        "usage": usage,
    });
    answers.note(&mut answer);
    Ok(answer)
}

impl Answers {
    /// Adds what a client should know besides the answer: remarks on the images, and fields that were
    /// passed over.
    pub(super) fn note(&self, answer: &mut Value) {
        answer["remarks"] = json!(self.remarks);
        if !self.settings.ignored.is_empty() {
            answer["ignored_fields"] = json!(self.settings.ignored);
        }
    }
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

/// OpenAI's value; an answer that went round in circles was cut off like one that grew too long.
pub(super) fn finish_reason(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::Cancelled => "stop",
        FinishReason::Length | FinishReason::Repetition => "length",
    }
}

/// A reason that OpenAI has no value for.
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

/// Time between keep-alive comments on a stream without events.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(10);

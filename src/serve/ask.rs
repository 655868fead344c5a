//! From a request to answers under way: the prompt is made, its answers are submitted to the engine.

use std::{
    sync::Arc,
    time::{Instant, SystemTime, UNIX_EPOCH},
};

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    App,
    answer::{AnswerReader, Answers, Header},
    audit::RequestRecord,
    auth::Peer,
    body::{check_json_size, read_body, take},
    content::{Asked, Requester, prepare},
    engine::{
        Continuations, Event, Failure, Penalties, PreparedPrompt, QueuePlace, Submission,
        TokenConstraint,
    },
    error::ApiError,
    fields::{Fields, parse_body},
    findings::{FindingRequest, FindingWork},
    form_parser::FormError,
    grammar::Constraint,
    models::ModelEntry,
    settings::RequestSettings,
    share::Share,
    token_rules::{BadWords, TokenRules},
    types::{ChatRequest, ToolUse},
};
use crate::{
    eval::probability::logit::DRAWN_TOKENS,
    runtime::generate::{SamplingConfig, backend::AdapterId, text::StreamOptions},
};

/// Tokens of a prediction at most: it is searched before each step.
const MAX_PREDICTED: usize = 16_384;

/// Who asks, and since when.
pub(super) struct Call {
    pub(super) client: u64,
    pub(super) record: Arc<RequestRecord>,
    pub(super) started: Instant,
}

impl Call {
    /// Begins an answer: checks the form of the request, reads its body and says who asks.
    ///
    /// # Errors
    /// [`ApiError`]: no JSON, a full queue, a body that is too large or broken.
    pub(super) async fn begin(
        app: &App,
        peer: Peer,
        record: Arc<RequestRecord>,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<(Self, Fields, Share), ApiError> {
        let call = Self {
            client: peer.client,
            record,
            started: Instant::now(),
        };
        expect_json(headers)?;
        // A full server does not read what it will not answer. The place itself is taken when the body is
        // there: whoever sends slowly must not hold one.
        app.engine.check_room(peer.client)?;
        let (fields, memory) = read_json(app, peer.client, body).await?;
        Ok((call, fields, memory))
    }

    /// When the answer must be there.
    pub(super) fn deadline(&self, app: &App) -> Instant {
        self.started + app.config.request_timeout
    }

    /// Looks a model up, and notes its name for the log.
    ///
    /// # Errors
    /// [`ApiError`] of status 404.
    pub(super) fn model(&self, app: &App, name: Option<&str>) -> Result<ModelEntry, ApiError> {
        let model = app.models.find(name)?;
        self.record.facts().model = Some(name.unwrap_or(app.models.base()).to_owned());
        Ok(model)
    }

    /// What responses repeat; `prefix` is that of the kind of response.
    pub(super) fn header(&self, app: &App, prefix: &str, model: Option<&str>) -> Header {
        let created = SystemTime::now().duration_since(UNIX_EPOCH);
        Header {
            id: format!("{prefix}{}", self.record.id()),
            created: created.map_or(0, |since| since.as_secs()),
            model: model.unwrap_or(app.models.base()).to_owned(),
        }
    }
}

/// Answers to be written to one prompt.
pub(super) struct Task<'a> {
    pub(super) adapter: AdapterId,
    pub(super) prompt: Arc<PreparedPrompt>,
    pub(super) settings: &'a RequestSettings,
    pub(super) rules: &'a Rules,
    pub(super) max_new_tokens: usize,
    /// Number of the first answer, by which seeds differ.
    pub(super) first: usize,
    /// Tokens of what the answer is expected to be.
    pub(super) prediction: Vec<u32>,
}

/// What is asked of a prompt besides its answer.
type Besides = Option<Continuations>;

/// Submits `count` reports to be drawn about the images of a prompt, as `infer --findings` draws them.
///
/// # Errors
/// [`ApiError`]: a full queue, a server that stops.
fn submit_draws(
    app: &App,
    call: &Call,
    adapter: AdapterId,
    prompt: &Arc<PreparedPrompt>,
    count: usize,
) -> Result<Vec<UnboundedReceiver<Event>>, ApiError> {
    let mut places = app.engine.reserve(call.client, count)?;
    let left = app.context() - prompt.len();
    let mut receivers = Vec::with_capacity(count);
    for seed in 0..count as u64 {
        let submission = Submission {
            adapter,
            prompt: prompt.clone(),
            max_new_tokens: DRAWN_TOKENS.min(left),
            eos_token_ids: app.parts.eos_token_ids.clone(),
            sampling: SamplingConfig {
                temperature: 1.0,
                seed,
                ..SamplingConfig::default()
            },
            penalties: Penalties::default(),
            stop: Vec::new(),
            shown: StreamOptions::default(),
            stop_on_repetition: true,
            logprobs: None,
            prompt_logprobs: None,
            constraint: None,
            prediction: Vec::new(),
            continuations: None,
            deadline: call.deadline(app),
            client: call.client,
        };
        receivers.push(app.engine.submit(submission, &mut places, call.started)?);
    }
    Ok(receivers)
}

/// What answers are held to.
pub(super) struct Rules {
    constraint: Option<Constraint>,
    bad_words: Option<Arc<BadWords>>,
    eos_token_ids: Vec<u32>,
}

impl Rules {
    /// Reads the form of the answer and the schemas of functions.
    ///
    /// # Errors
    /// [`ApiError`] of status 400 that names what cannot be followed.
    pub(super) async fn new(
        app: &Arc<App>,
        settings: &RequestSettings,
        tools: &ToolUse,
        opens_thinking: bool,
    ) -> Result<Self, ApiError> {
        let mut eos_token_ids = match settings.ignore_eos {
            true => Vec::new(),
            false => app.parts.eos_token_ids.clone(),
        };
        eos_token_ids.extend(&settings.stop_token_ids);
        let has_tools = !tools.callable().is_empty();
        for (name, is_set) in [
            ("allowed_token_ids", settings.allowed_token_ids.is_some()),
            ("bad_words", !settings.bad_words.is_empty()),
        ] {
            if has_tools && is_set {
                return Err(ApiError::invalid(
                    name,
                    format!("`{name}` cannot be followed together with `tools`"),
                ));
            }
        }
        let mut rules = Self {
            constraint: None,
            bad_words: None,
            eos_token_ids,
        };
        if settings.form.is_none() && !has_tools && settings.bad_words.is_empty() {
            return Ok(rules);
        }
        let (app, form, tools) = (app.clone(), settings.form.clone(), tools.clone());
        let bad_words = settings.bad_words.clone();
        // Reading a vocabulary or a large schema takes a while.
        let made = tokio::task::spawn_blocking(move || {
            let grammar = app.grammar().ok_or_else(ApiError::internal)?;
            let constraint = grammar
                .constraint(form.as_ref(), &tools, opens_thinking)
                .map_err(|FormError { param, reason }| ApiError::invalid(param, reason))?;
            let words = (!bad_words.is_empty()).then(|| Arc::new(grammar.bad_words(&bad_words)));
            Ok::<_, ApiError>((constraint, words))
        });
        let (constraint, words) = made.await.map_err(|_| ApiError::internal())??;
        rules.constraint = Some(constraint);
        rules.bad_words = words;
        Ok(rules)
    }

    /// What the client should know of them.
    pub(super) fn remarks(&self) -> impl Iterator<Item = serde_json::Value> {
        let remarks = self.constraint.iter().flat_map(|one| &one.remarks);
        remarks.map(super::types::AnswerRemark::json)
    }

    /// The constraint on each token of one answer, if there is any.
    fn of_answer(&self, settings: &RequestSettings) -> Option<Box<dyn TokenConstraint>> {
        let form = self.constraint.as_ref().and_then(Constraint::of_answer);
        if settings.min_new_tokens == 0
            && settings.allowed_token_ids.is_none()
            && self.bad_words.is_none()
        {
            return form;
        }
        Some(Box::new(TokenRules {
            end_tokens: self.eos_token_ids.clone(),
            min_new_tokens: settings.min_new_tokens,
            allowed: settings.allowed_token_ids.clone(),
            bad_words: self.bad_words.clone().map(|words| (words, Vec::new())),
            form,
            written: 0,
        }))
    }
}

/// Submits all answers to one prompt; the first brings what is asked `besides`.
///
/// # Errors
/// [`ApiError`], where the server stops.
pub(super) fn submit(
    app: &App,
    call: &Call,
    task: &Task<'_>,
    mut besides: Besides,
    places: &mut QueuePlace,
) -> Result<Vec<UnboundedReceiver<Event>>, ApiError> {
    let settings = task.settings;
    let mut receivers = Vec::with_capacity(settings.choices);
    for index in task.first..task.first + settings.choices {
        let submission = Submission {
            adapter: task.adapter,
            prompt: task.prompt.clone(),
            max_new_tokens: task.max_new_tokens,
            eos_token_ids: task.rules.eos_token_ids.clone(),
            sampling: settings.sampling_of(index),
            penalties: settings.penalties.clone(),
            stop: settings.stop.clone(),
            shown: StreamOptions {
                include_stop: settings.include_stop,
                keep_special: settings.keep_special,
            },
            stop_on_repetition: app.config.stop_on_repetition && !settings.ignore_eos,
            logprobs: settings.logprobs,
            // The same for all answers: the first brings them.
            prompt_logprobs: settings.prompt_logprobs.filter(|_| index == task.first),
            constraint: task.rules.of_answer(settings),
            prediction: task.prediction.clone(),
            continuations: besides.take(),
            deadline: call.deadline(app),
            client: call.client,
        };
        receivers.push(app.engine.submit(submission, places, call.started)?);
    }
    Ok(receivers)
}

/// Asks the engine for the answers to a conversation; `prefix` is that of the response's id.
///
/// # Errors
/// [`ApiError`].
pub(super) async fn ask(
    app: &Arc<App>,
    call: &Call,
    request: ChatRequest,
    memory: Share,
    prefix: &str,
) -> Result<Answers, ApiError> {
    let model = call.model(app, request.model.as_deref())?;
    let vocab_size = app.parts.config.text_config.vocab_size;
    let settings = RequestSettings::new(&request.generation, &app.config, vocab_size)?;
    let findings = FindingRequest::new(&request, &settings)?;
    let mut places = app.engine.reserve(call.client, settings.choices)?;
    let header = call.header(app, prefix, request.model.as_deref());
    let asked = Asked {
        messages: request.messages,
        tools: request.tools.described().to_vec(),
        options: request.prompt,
    };
    let requester = Requester {
        client: call.client,
        memory,
    };
    let preparing = prepare(app, &model, asked, requester);
    let prepared = tokio::time::timeout_at(call.deadline(app).into(), preparing)
        .await
        .map_err(|_| ApiError::from(Failure::Deadline))??;
    let prompt_tokens = prepared.prompt.len();
    {
        let mut facts = call.record.facts();
        facts.images = prepared.prompt.images.len();
        facts.prompt_tokens = prompt_tokens;
    }
    let max_new_tokens = room(app, settings.max_new_tokens, prompt_tokens, "messages")?
        .unwrap_or(app.config.default_new_tokens)
        .min(app.context() - prompt_tokens);
    let (work, findings) = findings
        .map(|findings| findings.ask(app, &model, &prepared, max_new_tokens))
        .transpose()?
        .unzip();
    let (besides, draws) = match work {
        Some(FindingWork::Sentences(continuations)) => (Some(continuations), 0),
        Some(FindingWork::Draws(count)) => (None, count),
        None => (None, 0),
    };
    let prediction = predicted(app, settings.prediction.clone()).await?;
    let prompt = Arc::new(prepared.prompt);
    let tools = &request.tools;
    let rules = Rules::new(app, &settings, tools, prepared.opens_thinking).await?;
    let task = Task {
        adapter: model.adapter,
        prompt: prompt.clone(),
        settings: &settings,
        rules: &rules,
        max_new_tokens,
        first: 0,
        prediction,
    };
    let mut receivers = submit(app, call, &task, besides, &mut places)?;
    if draws > 0 {
        receivers.extend(submit_draws(app, call, model.adapter, &prompt, draws)?);
    }
    // Until it is known to have ended otherwise.
    call.record.facts().outcome = Some("left");
    let mut remarks: Vec<serde_json::Value> = prompt
        .remarks
        .iter()
        .map(|remark| serde_json::json!(remark))
        .collect();
    remarks.extend(rules.remarks());
    Ok(Answers {
        header,
        record: call.record.clone(),
        prompt_tokens: prompt.len(),
        remarks,
        ignored: request.ignored,
        receivers,
        reader: AnswerReader::new(prepared.opens_thinking, !tools.callable().is_empty()),
        settings,
        findings,
        tokenizer: app.parts.tokenizer.clone(),
    })
}

/// Tokens of what an answer is expected to be, with the one that ends it.
///
/// # Errors
/// [`ApiError`] of status 400.
async fn predicted(app: &Arc<App>, text: Option<String>) -> Result<Vec<u32>, ApiError> {
    let Some(text) = text.filter(|text| !text.is_empty()) else {
        return Ok(Vec::new());
    };
    let app = app.clone();
    let encoded = tokio::task::spawn_blocking(move || {
        let ids = app.parts.tokenizer.encode_plain(&text);
        let end = app.parts.tokenizer.special().im_end;
        ids.map(|ids| [&ids[..], &[end]].concat())
    });
    let ids = encoded
        .await
        .map_err(|_| ApiError::internal())?
        .map_err(|error| ApiError::invalid("prediction", error.to_string()))?;
    if ids.len() > MAX_PREDICTED {
        return Err(ApiError::invalid(
            "prediction",
            format!(
                "`prediction` has {} tokens, at most {MAX_PREDICTED} are taken",
                ids.len()
            ),
        ));
    }
    Ok(ids)
}

/// Checks that prompt and answer fit together; returns the number of tokens that was asked for.
///
/// # Errors
/// [`ApiError`] of status 400.
pub(super) fn room(
    app: &App,
    wanted: Option<usize>,
    prompt: usize,
    param: &str,
) -> Result<Option<usize>, ApiError> {
    let context = app.context();
    let left = context.saturating_sub(prompt);
    if left == 0 || wanted.is_some_and(|wanted| wanted > left) {
        return Err(ApiError::invalid(
            param,
            format!(
                "the prompt has {prompt} tokens and the answer may have {}; this server takes {context} together",
                wanted.unwrap_or(1)
            ),
        )
        .with_code("context_length_exceeded"));
    }
    Ok(wanted)
}

/// Refuses a body that is not said to be JSON.
///
/// # Errors
/// [`ApiError`] of status 415.
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
///
/// # Errors
/// [`ApiError`].
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

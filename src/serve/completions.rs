//! `POST /v1/completions`: text that goes on, without a chat template.

use std::{collections::BTreeMap, sync::Arc};

use axum::{
    Json,
    body::Body,
    extract::{Extension, State},
    http::HeaderMap,
    response::Response,
};
use serde_json::{Map, Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    App,
    answer::{AnswerReader, Answers, count, finish_reason, next_event, stop_reason, with_ignored},
    ask::{Call, Rules, Task, room, submit},
    audit::RequestRecord,
    auth::Peer,
    content::prepare_text,
    engine::{Done, Event, Failure, PreparedPrompt, TokenLogprob},
    error::ApiError,
    settings::RequestSettings,
    stream::{self, Events, StreamForm},
    types::{CompletionRequest, LogprobEntry, PromptText, ToolUse, Usage},
};

/// Tokens of an answer when the request names no number, as OpenAI has it.
const DEFAULT_NEW_TOKENS: usize = 16;

/// Answers a request, whole or as a stream.
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
    let (call, fields, memory) = Call::begin(&app, peer, record, &headers, body).await?;
    let request = CompletionRequest::read(fields, app.config.lenient)?;
    let mut completion = start(&app, &call, request).await?;
    drop(memory);
    let ignored = completion.answers.ignored.clone();
    if completion.answers.settings.stream {
        let receivers = std::mem::take(&mut completion.answers.receivers);
        let (record, prompt_tokens) = (call.record, completion.answers.prompt_tokens);
        let response = stream::respond(receivers, completion, record, prompt_tokens).await?;
        return Ok(with_ignored(response, &ignored));
    }
    let answer = collect(completion).await?;
    Ok(with_ignored(Json(answer), &ignored))
}

/// Answers under way, and their prompts.
struct Completion {
    answers: Answers,
    /// The prompt of each answer's place divided by the number of answers to a prompt.
    prompts: Vec<Echoed>,
    echo: bool,
    /// Nothing is written after the prompt.
    only_prompt: bool,
    /// Letters of each answer so far, its prompt included where that is sent.
    offsets: Vec<usize>,
}

/// A prompt as it is sent back.
struct Echoed {
    prompt: Arc<PreparedPrompt>,
    text: String,
}

async fn start(
    app: &Arc<App>,
    call: &Call,
    mut request: CompletionRequest,
) -> Result<Completion, ApiError> {
    let model = call.model(app, request.model.as_deref())?;
    let vocab_size = app.parts.config.text_config.vocab_size;
    // A prompt that is scored: OpenAI's way is no new token, and the engine writes at least one.
    let only_prompt = request.echo && request.generation.max_tokens == Some(0);
    if only_prompt {
        request.generation.max_tokens = Some(1);
    }
    let mut settings = RequestSettings::new(&request.generation, &app.config, vocab_size)?;
    if request.echo && settings.logprobs.is_some() {
        settings.prompt_logprobs = settings.prompt_logprobs.max(settings.logprobs);
    }
    let count = request.prompts.len() * settings.choices;
    if count > app.engine.limits().max_queue {
        return Err(ApiError::invalid(
            "prompt",
            format!(
                "the request asks for {count} answers; this server takes {} at once",
                app.engine.limits().max_queue
            ),
        ));
    }
    let mut places = app.engine.reserve(call.client, count)?;
    let rules = Rules::new(app, &settings, &ToolUse::default(), false).await?;
    let (mut prompts, mut receivers, mut tokens) = (Vec::new(), Vec::new(), 0);
    for (number, text) in request.prompts.into_iter().enumerate() {
        let preparing = prepare_text(app, call.client, text.clone(), request.truncate);
        let prompt = tokio::time::timeout_at(call.deadline(app).into(), preparing)
            .await
            .map_err(|_| ApiError::from(Failure::Deadline))??;
        let prompt = Arc::new(prompt);
        tokens += prompt.len();
        let wanted = room(app, settings.max_new_tokens, prompt.len(), "prompt")?;
        let left = app.context() - prompt.len();
        let task = Task {
            adapter: model.adapter,
            prompt: prompt.clone(),
            settings: &settings,
            rules: &rules,
            max_new_tokens: wanted.unwrap_or(DEFAULT_NEW_TOKENS.min(left)),
            first: number * settings.choices,
            prediction: Vec::new(),
        };
        receivers.extend(submit(app, call, &task, None, &mut places)?);
        let text = match text {
            PromptText::Text(text) if request.truncate.is_none() => text,
            _ => decoded(app, &prompt.input_ids)?,
        };
        prompts.push(Echoed { prompt, text });
    }
    {
        let mut facts = call.record.facts();
        facts.prompt_tokens = tokens;
        // Until it is known to have ended otherwise.
        facts.outcome = Some("left");
    }
    let answers = Answers {
        findings: None,
        header: call.header(app, "cmpl-", request.model.as_deref()),
        record: call.record.clone(),
        prompt_tokens: tokens,
        remarks: rules.remarks().collect(),
        ignored: request.ignored,
        receivers,
        reader: AnswerReader::new(false, false),
        settings,
        tokenizer: app.parts.tokenizer.clone(),
    };
    Ok(Completion {
        offsets: vec![0; answers.receivers.len()],
        answers,
        prompts,
        echo: request.echo,
        only_prompt,
    })
}

fn decoded(app: &App, ids: &[u32]) -> Result<String, ApiError> {
    app.parts.tokenizer.decode(ids, false).map_err(|error| {
        log::error!("token ids could not be decoded: {error}");
        ApiError::internal()
    })
}

/// OpenAI's lists of log probabilities.
#[derive(Default)]
struct Lists {
    tokens: Vec<String>,
    token_logprobs: Vec<Option<f32>>,
    top_logprobs: Vec<Option<BTreeMap<String, f32>>>,
    text_offset: Vec<usize>,
}

impl Lists {
    fn push(&mut self, entry: LogprobEntry, offset: &mut usize) {
        let top = entry.top_logprobs.into_iter().flatten();
        let top = top.map(|one| (one.token, one.logprob)).collect();
        self.push_text(entry.token, Some((entry.logprob, top)), offset);
    }

    fn push_text(
        &mut self,
        text: String,
        found: Option<(f32, BTreeMap<String, f32>)>,
        offset: &mut usize,
    ) {
        self.text_offset.push(*offset);
        *offset += text.chars().count();
        self.tokens.push(text);
        let (logprob, top) = found.unzip();
        self.token_logprobs.push(logprob);
        self.top_logprobs.push(top);
    }

    fn json(self) -> Value {
        json!({
            "tokens": self.tokens,
            "token_logprobs": self.token_logprobs,
            "top_logprobs": self.top_logprobs,
            "text_offset": self.text_offset,
        })
    }
}

impl Completion {
    fn prompt_of(&self, index: usize) -> &Echoed {
        &self.prompts[index / self.answers.settings.choices]
    }

    /// Lists of the prompt's tokens; `found` are those from the second on.
    fn of_prompt(&self, index: usize, found: &[TokenLogprob], offset: &mut usize) -> Lists {
        let mut lists = Lists::default();
        if let Some(first) = self.prompt_of(index).prompt.input_ids.first() {
            let bytes = self.answers.tokenizer.bytes_of(*first, false);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            lists.push_text(text, None, offset);
        }
        for one in found {
            lists.push(self.answers.entry(one), offset);
        }
        lists
    }

    fn usage(&self, usage: &Usage) -> Value {
        let mut usage = usage.clone();
        if self.only_prompt {
            usage.completion_tokens = 0;
            usage.total_tokens = usage.prompt_tokens;
        }
        json!(usage)
    }

    fn object(&self, choices: Value) -> Value {
        let header = &self.answers.header;
        json!({
            "id": header.id,
            "object": "text_completion",
            "created": header.created,
            "model": header.model,
            "choices": choices,
        })
    }

    fn send(&self, choice: Value, notes: bool, out: &mut Events) {
        let mut chunk = self.object(json!([choice]));
        if notes {
            self.answers.note(&mut chunk);
        }
        out.data(chunk.to_string());
    }

    fn piece(&self, index: usize, text: &str, logprobs: Option<Lists>, out: &mut Events) {
        let choice = json!({
            "index": index,
            "text": text,
            "logprobs": logprobs.map(Lists::json),
            "finish_reason": null,
        });
        self.send(choice, false, out);
    }
}

async fn collect(mut completion: Completion) -> Result<Value, ApiError> {
    let receivers: Vec<UnboundedReceiver<Event>> =
        std::mem::take(&mut completion.answers.receivers);
    let mut choices = Vec::with_capacity(receivers.len());
    let mut usage = Usage::default();
    let mut of_prompt: Vec<TokenLogprob> = Vec::new();
    for (index, mut receiver) in receivers.into_iter().enumerate() {
        let answers = &completion.answers;
        let settings = &answers.settings;
        let is_first = index % settings.choices == 0;
        let mut text = String::new();
        let mut entries = Vec::new();
        let done = loop {
            match next_event(&mut receiver, &answers.record).await? {
                Event::Prompt(found) => of_prompt = found,
                Event::Token {
                    text: more,
                    logprob,
                } => {
                    text.push_str(&more);
                    entries.extend(logprob.map(|one| answers.entry(&one)));
                }
                Event::Done(done) => break done,
                Event::Failed(failure) => return Err(failure.into()),
            }
        };
        text.push_str(&done.text);
        if completion.only_prompt {
            text.clear();
            entries.clear();
        }
        let mut offset = 0;
        let mut lists = Lists::default();
        if completion.echo {
            text.insert_str(0, &completion.prompt_of(index).text);
            if settings.logprobs.is_some() {
                lists = completion.of_prompt(index, &of_prompt, &mut offset);
            }
        }
        for entry in entries {
            lists.push(entry, &mut offset);
        }
        count(&mut usage, answers.prompt_tokens, &done);
        let mut choice = json!({
            "index": index,
            "text": text,
            "logprobs": settings.logprobs.map(|_| lists.json()),
            "finish_reason": finish_reason(done.reason, 0),
            "stop_reason": stop_reason(done.reason),
        });
        if settings.prompt_logprobs.is_some() && is_first {
            choice["prompt_logprobs"] = answers.prompt_logprobs(&of_prompt);
        }
        choices.push(choice);
    }
    completion.answers.done(usage.completion_tokens);
    let mut answer = completion.object(choices.into());
    answer["usage"] = completion.usage(&usage);
    completion.answers.note(&mut answer);
    Ok(answer)
}

impl StreamForm for Completion {
    fn begin(&mut self, out: &mut Events) {
        let with_logprobs = self.answers.settings.logprobs.is_some();
        for index in 0..self.offsets.len() {
            if self.echo && !with_logprobs {
                self.piece(index, &self.prompt_of(index).text, None, out);
            }
        }
    }

    fn prompt(&mut self, index: usize, found: &[TokenLogprob], out: &mut Events) {
        if !self.echo {
            return;
        }
        // The first answer to a prompt brings the log probabilities for all of them.
        for index in index..index + self.answers.settings.choices {
            let mut offset = 0;
            let lists = self.of_prompt(index, found, &mut offset);
            self.offsets[index] = offset;
            self.piece(index, &self.prompt_of(index).text, Some(lists), out);
        }
    }

    fn token(&mut self, index: usize, text: &str, logprob: Option<TokenLogprob>, out: &mut Events) {
        if self.only_prompt {
            return;
        }
        let lists = logprob.map(|one| {
            let mut lists = Lists::default();
            lists.push(self.answers.entry(&one), &mut self.offsets[index]);
            lists
        });
        if !text.is_empty() || lists.is_some() {
            self.piece(index, text, lists, out);
        }
    }

    fn done(&mut self, index: usize, done: &Done, out: &mut Events) {
        let text = match self.only_prompt {
            true => "",
            false => &done.text,
        };
        let mut choice = Map::new();
        choice.insert("index".into(), index.into());
        choice.insert("text".into(), text.into());
        choice.insert("logprobs".into(), Value::Null);
        choice.insert("finish_reason".into(), finish_reason(done.reason, 0).into());
        choice.insert("stop_reason".into(), stop_reason(done.reason).into());
        self.send(choice.into(), true, out);
    }

    fn end(&mut self, usage: &Usage, out: &mut Events) {
        if self.answers.settings.include_usage || self.answers.settings.continuous_usage {
            let mut chunk = self.object(json!([]));
            chunk["usage"] = self.usage(usage);
            out.data(chunk.to_string());
        }
        out.data("[DONE]".into());
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.data(error.body().to_string());
    }
}

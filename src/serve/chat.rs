//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Extension, State},
    http::HeaderMap,
    response::Response,
};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    App,
    answer::{
        AnswerReader, Answers, Piece, count, finish_reason, next_event, stop_reason, with_ignored,
    },
    ask::{Call, ask},
    audit::RequestRecord,
    auth::Peer,
    engine::{Done, Event, TokenLogprob},
    error::ApiError,
    findings::FIELD,
    stream::{self, Events, StreamForm},
    types::{ChatRequest, Usage},
};

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
    let (call, fields, memory) = Call::begin(&app, peer, record, &headers, body).await?;
    let request = ChatRequest::read(fields, app.config.lenient)?;
    let mut answers = ask(&app, &call, request, memory, "chatcmpl-").await?;
    let ignored = answers.ignored.clone();
    if answers.settings.stream {
        let receivers = std::mem::take(&mut answers.receivers);
        let (record, prompt_tokens) = (answers.record.clone(), answers.prompt_tokens);
        let form = ChatStream::new(answers, receivers.len());
        let response = stream::respond(receivers, form, record, prompt_tokens).await?;
        return Ok(with_ignored(response, &ignored));
    }
    Ok(with_ignored(Json(collect(answers).await?), &ignored))
}

/// One answer as it was put together.
#[derive(Default)]
struct Message {
    reasoning: String,
    content: String,
    calls: Vec<(String, String, String)>,
}

impl Message {
    fn take(&mut self, pieces: Vec<Piece>) {
        for piece in pieces {
            match piece {
                Piece::Reasoning(text) => self.reasoning.push_str(&text),
                Piece::Text(text) => self.content.push_str(&text),
                Piece::Call { id, name, .. } => self.calls.push((id, name, String::new())),
                Piece::Arguments { text, .. } => {
                    if let Some((_, _, arguments)) = self.calls.last_mut() {
                        arguments.push_str(&text);
                    }
                }
            }
        }
    }

    fn json(self) -> Value {
        let reasoning = (!self.reasoning.is_empty()).then_some(self.reasoning);
        // OpenAI sends no content beside calls, where there is none.
        let content = (self.calls.is_empty() || !self.content.is_empty()).then_some(self.content);
        let mut message = json!({
            "role": "assistant",
            "content": content,
            "reasoning_content": reasoning,
        });
        if !self.calls.is_empty() {
            let call = |(id, name, arguments): (String, String, String)| {
                json!({
                    "id": id,
                    "type": "function",
                    "function": {"name": name, "arguments": arguments},
                })
            };
            message["tool_calls"] = self.calls.into_iter().map(call).collect();
        }
        message
    }
}

/// The whole answer as one object.
pub(super) async fn collect(mut answers: Answers) -> Result<Value, ApiError> {
    let mut choices = Vec::with_capacity(answers.receivers.len());
    let mut usage = Usage::default();
    let mut of_prompt = None;
    let mut receivers = std::mem::take(&mut answers.receivers);
    let drawn = receivers.split_off(answers.settings.choices.min(receivers.len()));
    let mut drawn = Some(drawn);
    for (index, mut receiver) in receivers.into_iter().enumerate() {
        let mut reader = answers.reader.clone();
        let mut message = Message::default();
        let mut logprobs = Vec::new();
        let mut done = loop {
            match next_event(&mut receiver, &answers.record).await? {
                Event::Prompt(found) => of_prompt = Some(answers.prompt_logprobs(&found)),
                Event::Token { text, logprob } => {
                    message.take(reader.push(&text));
                    logprobs.extend(logprob.map(|one| answers.entry(&one)));
                }
                Event::Done(done) => break done,
                Event::Failed(failure) => return Err(failure.into()),
            }
        };
        message.take(reader.push(&done.text));
        message.take(reader.finish());
        count(&mut usage, answers.prompt_tokens, &done);
        let calls = message.calls.len();
        let wanted = answers.settings.logprobs;
        let mut reports = Vec::new();
        for receiver in drawn.take().into_iter().flatten() {
            reports.push(drawn_report(&answers, receiver).await?);
        }
        let findings = answers.findings(&mut done, reports, &message.content);
        let mut choice = json!({
            "index": index,
            "message": message.json(),
            "logprobs": wanted.map(|_| json!({"content": logprobs})),
            "finish_reason": finish_reason(done.reason, calls),
            "stop_reason": stop_reason(done.reason),
        });
        if let Some(findings) = findings {
            choice[FIELD] = findings;
        }
        choices.push(choice);
    }
    answers.done(usage.completion_tokens);
    let mut answer = json!({
        "id": answers.header.id,
        "object": "chat.completion",
        "created": answers.header.created,
        "model": answers.header.model,
        "choices": choices,
        "usage": usage,
    });
    if let Some(of_prompt) = of_prompt {
        answer["prompt_logprobs"] = of_prompt;
    }
    answers.note(&mut answer);
    Ok(answer)
}

/// A report that was drawn for probabilities of findings, without its reasoning.
///
/// # Errors
/// [`ApiError`], when it broke off.
async fn drawn_report(
    answers: &Answers,
    mut receiver: UnboundedReceiver<Event>,
) -> Result<String, ApiError> {
    let mut reader = answers.reader.clone();
    let mut message = Message::default();
    loop {
        match next_event(&mut receiver, &answers.record).await? {
            Event::Token { text, .. } => message.take(reader.push(&text)),
            Event::Done(done) => {
                message.take(reader.push(&done.text));
                message.take(reader.finish());
                return Ok(message.content);
            }
            Event::Prompt(_) => {}
            Event::Failed(failure) => return Err(failure.into()),
        }
    }
}

/// Chunks of a stream.
struct ChatStream {
    answers: Answers,
    readers: Vec<AnswerReader>,
    /// Tokens of each answer so far.
    tokens: Vec<usize>,
    /// The text of the answer so far, where its findings are asked for: there is one then.
    report: String,
    /// Reports that are drawn for probabilities of findings, as far as they are.
    drawn: Vec<String>,
    /// Those among them that are not whole.
    open_draws: usize,
    /// The end of the answer, which waits for these.
    waiting: Option<Done>,
}

impl ChatStream {
    /// `count` answers and drawn reports.
    fn new(answers: Answers, count: usize) -> Self {
        let choices = answers.settings.choices.min(count);
        Self {
            readers: vec![answers.reader.clone(); count],
            tokens: vec![0; choices],
            report: String::new(),
            drawn: vec![String::new(); count - choices],
            open_draws: count - choices,
            waiting: None,
            answers,
        }
    }

    /// More text of the drawn report that comes as answer `index`; `last` ends it.
    fn take_drawn(&mut self, index: usize, text: &str, last: bool) {
        let mut pieces = self.readers[index].push(text);
        if last {
            pieces.extend(self.readers[index].finish());
        }
        let report = &mut self.drawn[index - self.tokens.len()];
        for piece in pieces {
            if let Piece::Text(text) = piece {
                report.push_str(&text);
            }
        }
    }

    /// The last chunk of answer `index`.
    fn close(&mut self, index: usize, done: &Done, out: &mut Events) {
        let reason = finish_reason(done.reason, self.readers[index].calls());
        let finish = Some((reason, stop_reason(done.reason)));
        let report = std::mem::take(&mut self.report);
        let drawn = std::mem::take(&mut self.drawn);
        let findings = self.answers.findings(&mut done.clone(), drawn, &report);
        self.chunk(index, json!({}), None, finish, findings, out);
    }

    fn chunk(
        &self,
        index: usize,
        delta: Value,
        logprobs: Option<Value>,
        finish: Option<(&'static str, Option<&'static str>)>,
        findings: Option<Value>,
        out: &mut Events,
    ) {
        let delta_begins = delta.get("role").is_some();
        let mut choice = json!({
            "index": index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish.map(|(reason, _)| reason),
        });
        if let Some((_, Some(reason))) = finish {
            choice["stop_reason"] = reason.into();
        }
        if let Some(findings) = findings {
            choice[FIELD] = findings;
        }
        let usage = self.answers.settings.continuous_usage.then(|| {
            let written = self.tokens.iter().sum();
            Usage {
                prompt_tokens: self.answers.prompt_tokens,
                completion_tokens: written,
                total_tokens: self.answers.prompt_tokens + written,
                ..Usage::default()
            }
        });
        // In the first chunk for clients that show the stream, in the last for those that read the end.
        let notes = finish.is_some() || delta_begins;
        self.send(json!([choice]), usage.as_ref(), notes, out);
    }

    fn send(&self, choices: Value, usage: Option<&Usage>, notes: bool, out: &mut Events) {
        let header = &self.answers.header;
        let mut chunk = json!({
            "id": header.id,
            "object": "chat.completion.chunk",
            "created": header.created,
            "model": header.model,
            "choices": choices,
        });
        if let Some(usage) = usage {
            chunk["usage"] = json!(usage);
        }
        if notes {
            self.answers.note(&mut chunk);
        }
        out.data(chunk.to_string());
    }

    fn pieces(
        &mut self,
        index: usize,
        pieces: Vec<Piece>,
        mut logprobs: Option<Value>,
        out: &mut Events,
    ) {
        if pieces.is_empty() && logprobs.is_some() {
            let delta = json!({"content": ""});
            self.chunk(index, delta, logprobs.take(), None, None, out);
        }
        for piece in pieces {
            if let (Piece::Text(text), true) = (&piece, self.answers.findings.is_some()) {
                self.report.push_str(text);
            }
            let delta = match piece {
                Piece::Reasoning(text) => json!({"reasoning_content": text}),
                Piece::Text(text) => json!({"content": text}),
                Piece::Call { index, id, name } => json!({"tool_calls": [{
                    "index": index,
                    "id": id,
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }]}),
                Piece::Arguments { index, text } => json!({"tool_calls": [{
                    "index": index,
                    "function": {"arguments": text},
                }]}),
            };
            self.chunk(index, delta, logprobs.take(), None, None, out);
        }
    }
}

impl StreamForm for ChatStream {
    fn begin(&mut self, out: &mut Events) {
        for index in 0..self.tokens.len() {
            let delta = json!({"role": "assistant", "content": ""});
            self.chunk(index, delta, None, None, None, out);
        }
    }

    fn token(&mut self, index: usize, text: &str, logprob: Option<TokenLogprob>, out: &mut Events) {
        if index >= self.tokens.len() {
            self.take_drawn(index, text, false);
            return;
        }
        self.tokens[index] += 1;
        let pieces = self.readers[index].push(text);
        let logprobs = logprob.map(|one| json!({"content": [self.answers.entry(&one)]}));
        self.pieces(index, pieces, logprobs, out);
    }

    fn done(&mut self, index: usize, done: &Done, out: &mut Events) {
        if index >= self.tokens.len() {
            self.take_drawn(index, &done.text, true);
            self.open_draws -= 1;
            if self.open_draws == 0
                && let Some(done) = self.waiting.take()
            {
                self.close(0, &done, out);
            }
            return;
        }
        self.tokens[index] = done.completion_tokens;
        let mut pieces = self.readers[index].push(&done.text);
        pieces.extend(self.readers[index].finish());
        self.pieces(index, pieces, None, out);
        if self.open_draws > 0 {
            self.waiting = Some(done.clone());
            return;
        }
        self.close(index, done, out);
    }

    fn counts(&self, index: usize) -> bool {
        index < self.tokens.len()
    }

    fn end(&mut self, usage: &Usage, out: &mut Events) {
        if self.answers.settings.include_usage {
            self.send(json!([]), Some(usage), false, out);
        }
        out.data("[DONE]".into());
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        out.data(error.body().to_string());
    }
}

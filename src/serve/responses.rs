//! `POST /v1/responses`: OpenAI's newer form of a conversation. Nothing is stored.

use std::sync::Arc;

use axum::{
    Json,
    body::Body,
    extract::{Extension, State},
    http::HeaderMap,
    response::Response,
};
use serde_json::{Map, Value, json};

use super::{
    App,
    answer::{Answers, Piece, count, next_event, random_id, stop_reason, with_ignored},
    ask::{Call, ask},
    audit::RequestRecord,
    auth::Peer,
    engine::{Done, Event, TokenLogprob},
    error::ApiError,
    request::ResponsesRequest,
    stream::{self, Events, StreamForm},
    types::Usage,
};
use crate::runtime::generate::FinishReason;

/// Answers a request, whole or as a stream.
///
/// # Errors
/// [`ApiError`].
pub(super) async fn responses(
    State(app): State<Arc<App>>,
    Extension(peer): Extension<Peer>,
    Extension(record): Extension<Arc<RequestRecord>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (call, fields, memory) = Call::begin(&app, peer, record, &headers, body).await?;
    let request = ResponsesRequest::read(fields, app.config.lenient)?;
    let mut answers = ask(&app, &call, request.chat, memory, "resp_").await?;
    let ignored = answers.ignored.clone();
    let receivers = std::mem::take(&mut answers.receivers);
    let (record, prompt_tokens) = (answers.record.clone(), answers.prompt_tokens);
    let is_stream = answers.settings.stream;
    let mut form = Responding::new(answers, request.repeated);
    if is_stream {
        let response = stream::respond(receivers, form, record, prompt_tokens).await?;
        return Ok(with_ignored(response, &ignored));
    }
    let mut unread = Events::default();
    let mut usage = Usage::default();
    for mut receiver in receivers {
        loop {
            match next_event(&mut receiver, &record).await? {
                Event::Prompt(_) => {}
                Event::Token { text, logprob } => form.token(0, &text, logprob, &mut unread),
                Event::Done(done) => {
                    form.done(0, &done, &mut unread);
                    count(&mut usage, prompt_tokens, &done);
                    break;
                }
                Event::Failed(failure) => return Err(failure.into()),
            }
            unread = Events::default();
        }
    }
    form.answers.done(usage.completion_tokens);
    let response = form.response(Some(&usage));
    Ok(with_ignored(Json(response), &ignored))
}

/// An item of the output under way.
enum Item {
    Reasoning {
        id: String,
        text: String,
    },
    Message {
        id: String,
        text: String,
        logprobs: Vec<Value>,
    },
    Call {
        id: String,
        call_id: String,
        name: String,
        arguments: String,
    },
}

impl Item {
    fn id(&self) -> &str {
        match self {
            Self::Reasoning { id, .. } | Self::Message { id, .. } | Self::Call { id, .. } => id,
        }
    }

    /// The part of a message or of reasoning.
    fn part(&self, is_begin: bool) -> Option<Value> {
        let so_far = |text: &str| match is_begin {
            true => String::new(),
            false => text.to_owned(),
        };
        match self {
            Self::Reasoning { text, .. } => {
                Some(json!({"type": "reasoning_text", "text": so_far(text)}))
            }
            Self::Message { text, logprobs, .. } => Some(json!({
                "type": "output_text",
                "text": so_far(text),
                "annotations": [],
                "logprobs": logprobs,
            })),
            Self::Call { .. } => None,
        }
    }

    fn json(&self, status: &str) -> Value {
        let is_begin = status == "in_progress";
        let content: Vec<Value> = match is_begin {
            true => Vec::new(),
            false => self.part(false).into_iter().collect(),
        };
        match self {
            Self::Reasoning { id, .. } => json!({
                "id": id, "type": "reasoning", "summary": [], "content": content, "status": status,
            }),
            Self::Message { id, .. } => json!({
                "id": id, "type": "message", "role": "assistant", "status": status, "content": content,
            }),
            Self::Call {
                id,
                call_id,
                name,
                arguments,
            } => json!({
                "id": id, "type": "function_call", "status": status,
                "call_id": call_id, "name": name, "arguments": arguments,
            }),
        }
    }
}

/// A response under way; as a stream, every step of it is an event.
struct Responding {
    answers: Answers,
    repeated: Map<String, Value>,
    /// Items that are complete.
    output: Vec<Value>,
    item: Option<Item>,
    /// Events so far.
    sequence: usize,
    reasoning_tokens: usize,
    reason: Option<FinishReason>,
}

impl Responding {
    fn new(answers: Answers, repeated: Map<String, Value>) -> Self {
        Self {
            answers,
            repeated,
            output: Vec::new(),
            item: None,
            sequence: 0,
            reasoning_tokens: 0,
            reason: None,
        }
    }

    fn emit(&mut self, name: &'static str, mut event: Value, out: &mut Events) {
        event["type"] = name.into();
        event["sequence_number"] = self.sequence.into();
        self.sequence += 1;
        out.named(name, event.to_string());
    }

    /// An event about the item under way.
    fn emit_of_item(&mut self, name: &'static str, mut event: Value, out: &mut Events) {
        if let Some(item) = &self.item {
            event["item_id"] = item.id().into();
        }
        event["output_index"] = self.output.len().into();
        self.emit(name, event, out);
    }

    fn open(&mut self, item: Item, out: &mut Events) {
        self.close("completed", out);
        let begun = item.json("in_progress");
        let part = item.part(true);
        self.item = Some(item);
        let added = json!({"output_index": self.output.len(), "item": begun});
        self.emit("response.output_item.added", added, out);
        if let Some(part) = part {
            let added = json!({"content_index": 0, "part": part});
            self.emit_of_item("response.content_part.added", added, out);
        }
    }

    /// Ends the item under way.
    fn close(&mut self, status: &str, out: &mut Events) {
        let Some(item) = &self.item else {
            return;
        };
        let (whole, part) = (item.json(status), item.part(false));
        match item {
            Item::Reasoning { text, .. } => {
                let done = json!({"content_index": 0, "text": text});
                self.emit_of_item("response.reasoning_text.done", done, out);
            }
            Item::Message { text, logprobs, .. } => {
                let done = json!({"content_index": 0, "text": text, "logprobs": logprobs});
                self.emit_of_item("response.output_text.done", done, out);
            }
            Item::Call {
                name, arguments, ..
            } => {
                let done = json!({"name": name, "arguments": arguments});
                self.emit_of_item("response.function_call_arguments.done", done, out);
            }
        }
        if let Some(part) = part {
            let done = json!({"content_index": 0, "part": part});
            self.emit_of_item("response.content_part.done", done, out);
        }
        let done = json!({"output_index": self.output.len(), "item": whole});
        self.emit("response.output_item.done", done, out);
        self.output.push(whole);
        self.item = None;
    }

    fn open_message(&mut self, out: &mut Events) {
        let item = Item::Message {
            id: format!("msg_{}", random_id()),
            text: String::new(),
            logprobs: Vec::new(),
        };
        self.open(item, out);
    }

    fn take(&mut self, pieces: Vec<Piece>, mut logprob: Option<Value>, out: &mut Events) {
        for piece in pieces {
            match piece {
                Piece::Reasoning(more) => {
                    if !matches!(self.item, Some(Item::Reasoning { .. })) {
                        let item = Item::Reasoning {
                            id: format!("rs_{}", random_id()),
                            text: String::new(),
                        };
                        self.open(item, out);
                    }
                    if let Some(Item::Reasoning { text, .. }) = &mut self.item {
                        text.push_str(&more);
                    }
                    let delta = json!({"content_index": 0, "delta": more});
                    self.emit_of_item("response.reasoning_text.delta", delta, out);
                }
                Piece::Text(more) => {
                    if !matches!(self.item, Some(Item::Message { .. })) {
                        self.open_message(out);
                    }
                    let new: Vec<Value> = logprob.take().into_iter().collect();
                    if let Some(Item::Message { text, logprobs, .. }) = &mut self.item {
                        text.push_str(&more);
                        logprobs.extend(new.iter().cloned());
                    }
                    let delta = json!({"content_index": 0, "delta": more, "logprobs": new});
                    self.emit_of_item("response.output_text.delta", delta, out);
                }
                Piece::Call { id, name, .. } => {
                    let item = Item::Call {
                        id: format!("fc_{}", random_id()),
                        call_id: id,
                        name,
                        arguments: String::new(),
                    };
                    self.open(item, out);
                }
                Piece::Arguments { text, .. } => {
                    if let Some(Item::Call { arguments, .. }) = &mut self.item {
                        arguments.push_str(&text);
                    }
                    let delta = json!({"delta": text});
                    self.emit_of_item("response.function_call_arguments.delta", delta, out);
                }
            }
        }
        // A token without text of its own, such as a part of a letter.
        if let (Some(one), Some(Item::Message { logprobs, .. })) = (logprob, &mut self.item) {
            logprobs.push(one);
        }
    }

    /// The response as it is by now; with `usage` when it is over.
    fn response(&self, usage: Option<&Usage>) -> Value {
        let cut = matches!(
            self.reason,
            Some(FinishReason::Length | FinishReason::Repetition)
        );
        let status = match (usage, cut) {
            (None, _) => "in_progress",
            (Some(_), true) => "incomplete",
            (Some(_), false) => "completed",
        };
        let header = &self.answers.header;
        let mut response = json!({
            "id": header.id,
            "object": "response",
            "created_at": header.created,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": cut.then(|| json!({"reason": "max_output_tokens"})),
            "model": header.model,
            "output": self.output,
            "previous_response_id": null,
            "service_tier": "default",
            "stop_reason": self.reason.and_then(stop_reason),
            "store": false,
            "truncation": "disabled",
            "usage": usage.map(|usage| json!({
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
                "total_tokens": usage.total_tokens,
            })),
        });
        for (name, value) in &self.repeated {
            response[name] = value.clone();
        }
        let sampling = &self.answers.settings.sampling;
        for (name, value) in [
            ("temperature", sampling.temperature),
            ("top_p", sampling.top_p),
        ] {
            if response[name].is_null() {
                response[name] = value.into();
            }
        }
        self.answers.note(&mut response);
        response
    }
}

impl StreamForm for Responding {
    fn begin(&mut self, out: &mut Events) {
        for name in ["response.created", "response.in_progress"] {
            let event = json!({"response": self.response(None)});
            self.emit(name, event, out);
        }
    }

    fn token(
        &mut self,
        _index: usize,
        text: &str,
        logprob: Option<TokenLogprob>,
        out: &mut Events,
    ) {
        let pieces = self.answers.reader.push(text);
        self.reasoning_tokens += usize::from(self.answers.reader.is_reasoning());
        let logprob = logprob.map(|one| json!(self.answers.entry(&one)));
        self.take(pieces, logprob, out);
    }

    fn done(&mut self, _index: usize, done: &Done, out: &mut Events) {
        let mut pieces = self.answers.reader.push(&done.text);
        pieces.extend(self.answers.reader.finish());
        self.take(pieces, None, out);
        self.reason = Some(done.reason);
        if self.output.is_empty() && self.item.is_none() {
            self.open_message(out);
        }
        let status = match done.reason {
            FinishReason::Length | FinishReason::Repetition => "incomplete",
            FinishReason::Stop | FinishReason::Cancelled => "completed",
        };
        self.close(status, out);
    }

    fn end(&mut self, usage: &Usage, out: &mut Events) {
        let response = self.response(Some(usage));
        let name = match response["status"] == "incomplete" {
            true => "response.incomplete",
            false => "response.completed",
        };
        self.emit(name, json!({"response": response}), out);
    }

    fn fail(&mut self, error: &ApiError, out: &mut Events) {
        let mut response = self.response(None);
        response["status"] = "failed".into();
        let code = error.code.unwrap_or("server_error");
        response["error"] = json!({"code": code, "message": error.message});
        self.emit("response.failed", json!({"response": response}), out);
    }
}

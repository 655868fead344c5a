//! An answer as server-sent events, while it grows.

use std::{collections::VecDeque, convert::Infallible};

use axum::{
    http::{HeaderName, HeaderValue, header},
    response::{
        IntoResponse, Response,
        sse::{self, KeepAlive, Sse},
    },
};
use futures_util::{
    StreamExt,
    stream::{self, BoxStream, SelectAll},
};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    chat::{Answers, KEEP_ALIVE, count, entry, finish_reason, stop_reason},
    engine::Event,
    error::ApiError,
    reasoning::{Piece, ReasoningSplitter},
    types::Usage,
};

/// A stream under way. Dropping it drops the receivers, which ends the sequences.
struct Running {
    answers: Answers,
    events: SelectAll<BoxStream<'static, (usize, Event)>>,
    splitters: Vec<ReasoningSplitter>,
    /// Data of events that are ready to be sent.
    ready: VecDeque<String>,
    open: usize,
    usage: Usage,
    over: bool,
}

fn events_of(
    index: usize,
    receiver: UnboundedReceiver<Event>,
) -> BoxStream<'static, (usize, Event)> {
    stream::unfold(receiver, move |mut receiver| async move {
        let event = receiver.recv().await?;
        Some(((index, event), receiver))
    })
    .boxed()
}

/// Starts the stream.
///
/// # Errors
/// [`ApiError`], when the first answer fails before its first token: until then the status is not sent.
pub(super) async fn respond(mut answers: Answers) -> Result<Response, ApiError> {
    let receivers = std::mem::take(&mut answers.receivers);
    let count = receivers.len();
    let opens_thinking = answers.opens_thinking;
    let mut running = Running {
        events: receivers
            .into_iter()
            .enumerate()
            .map(|(index, receiver)| events_of(index, receiver))
            .collect(),
        splitters: vec![ReasoningSplitter::new(opens_thinking); count],
        ready: VecDeque::new(),
        open: count,
        usage: Usage::default(),
        over: false,
        answers,
    };
    // Clients that give up before the first token are noticed by the connection, which drops this.
    // One that must wait long gets its headers before, so that nothing on the way loses patience.
    let first = tokio::time::timeout(KEEP_ALIVE, running.events.next()).await;
    if let Ok(Some((_, Event::Failed(failure)))) = first {
        running.answers.record.facts().outcome = Some("failed");
        return Err(failure.into());
    }
    for index in 0..count {
        running.chunk(
            index,
            json!({"role": "assistant", "content": ""}),
            None,
            None,
        );
    }
    match first {
        Ok(Some((index, event))) => running.take(index, event),
        Ok(None) => return Err(ApiError::internal()),
        Err(_) => {}
    }
    let events = stream::unfold(running, |mut running| async move {
        let data = running.next().await?;
        let event = sse::Event::default().data(data);
        Some((Ok::<_, Infallible>(event), running))
    });
    let keep_alive = KeepAlive::new().interval(KEEP_ALIVE).text("waiting");
    let mut response = Sse::new(events).keep_alive(keep_alive).into_response();
    let headers = response.headers_mut();
    for (name, value) in [
        // Some clients read a stream without a charset as Latin-1.
        (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
        (header::CACHE_CONTROL, "no-store"),
        // Asks proxies not to buffer the stream.
        (HeaderName::from_static("x-accel-buffering"), "no"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    Ok(response)
}

impl Running {
    async fn next(&mut self) -> Option<String> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Some(data);
            }
            if self.over {
                return None;
            }
            match self.events.next().await {
                Some((index, event)) => self.take(index, event),
                None => self.fail(&ApiError::internal()),
            }
        }
    }

    fn take(&mut self, index: usize, event: Event) {
        match event {
            Event::Token { text, logprob } => {
                self.answers.record.facts().completion_tokens += 1;
                let pieces = self.splitters[index].push(&text);
                let mut logprobs =
                    logprob.map(|one| json!({"content": [entry(&self.answers.tokenizer, &one)]}));
                if pieces.is_empty() && logprobs.is_some() {
                    self.chunk(index, json!({"content": ""}), logprobs.take(), None);
                }
                self.pieces(index, pieces, logprobs);
            }
            Event::Done(done) => {
                let mut pieces = self.splitters[index].push(&done.text);
                pieces.extend(self.splitters[index].finish());
                self.pieces(index, pieces, None);
                self.chunk(
                    index,
                    json!({}),
                    None,
                    Some((finish_reason(done.reason), stop_reason(done.reason))),
                );
                count(&mut self.usage, self.answers.prompt_tokens, &done);
                self.open -= 1;
                if self.open == 0 {
                    self.finish();
                }
            }
            Event::Failed(failure) => self.fail(&failure.into()),
        }
    }

    fn pieces(&mut self, index: usize, pieces: Vec<Piece>, mut logprobs: Option<Value>) {
        for piece in pieces {
            let delta = match piece {
                Piece::Reasoning(text) => json!({"reasoning_content": text}),
                Piece::Answer(text) => json!({"content": text}),
            };
            self.chunk(index, delta, logprobs.take(), None);
        }
    }

    fn chunk(
        &mut self,
        index: usize,
        delta: Value,
        logprobs: Option<Value>,
        finish: Option<(&'static str, Option<&'static str>)>,
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
        // In the first chunk for clients that show the stream, in the last for those that read the end.
        let notes = finish.is_some() || delta_begins;
        self.send(json!([choice]), None, notes);
    }

    fn send(&mut self, choices: Value, usage: Option<&Usage>, notes: bool) {
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
        self.ready.push_back(chunk.to_string());
    }

    fn finish(&mut self) {
        if self.answers.settings.include_usage {
            let usage = self.usage.clone();
            self.send(json!([]), Some(&usage), false);
        }
        self.ready.push_back("[DONE]".into());
        let mut facts = self.answers.record.facts();
        facts.completion_tokens = self.usage.completion_tokens;
        facts.outcome = Some("done");
        drop(facts);
        self.over = true;
    }

    /// The status is long sent; the error is an event of its own, as OpenAI does it.
    fn fail(&mut self, error: &ApiError) {
        self.ready.push_back(error.body().to_string());
        self.answers.record.facts().outcome = Some("failed");
        self.over = true;
    }
}

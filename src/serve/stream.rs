//! Answers as server-sent events, while they grow; what an event looks like is that of a [`StreamForm`].

use std::{collections::VecDeque, convert::Infallible, sync::Arc, time::Duration};

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
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    answer::count,
    audit::RequestRecord,
    engine::{Done, Event, TokenLogprob},
    error::ApiError,
    types::Usage,
};

/// Time between keep-alive comments on a stream without events.
const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Events that are ready to be sent.
#[derive(Default)]
pub(super) struct Events(VecDeque<(Option<&'static str>, String)>);

impl Events {
    /// Appends an event without a name.
    pub(super) fn data(&mut self, data: String) {
        self.0.push_back((None, data));
    }

    /// Appends an event with a name.
    pub(super) fn named(&mut self, name: &'static str, data: String) {
        self.0.push_back((Some(name), data));
    }
}

/// How a stream is written.
pub(super) trait StreamForm: Send + 'static {
    /// Before the first token.
    fn begin(&mut self, out: &mut Events);

    /// The log probabilities of a prompt.
    fn prompt(&mut self, _index: usize, _found: &[TokenLogprob], _out: &mut Events) {}

    /// A token of answer `index`.
    fn token(&mut self, index: usize, text: &str, logprob: Option<TokenLogprob>, out: &mut Events);

    /// The end of answer `index`.
    fn done(&mut self, index: usize, done: &Done, out: &mut Events);

    /// Whether what comes as answer `index` is one: its tokens count.
    fn counts(&self, _index: usize) -> bool {
        true
    }

    /// The end of all.
    fn end(&mut self, usage: &Usage, out: &mut Events);

    /// The status is long sent; the error is an event of its own, as OpenAI does it.
    fn fail(&mut self, error: &ApiError, out: &mut Events);
}

/// A stream under way. Dropping it drops the receivers, which ends the sequences.
struct Running<F> {
    form: F,
    record: Arc<RequestRecord>,
    prompt_tokens: usize,
    events: SelectAll<BoxStream<'static, (usize, Event)>>,
    ready: Events,
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

/// Starts the stream of answers.
///
/// # Errors
/// [`ApiError`], when the first answer fails before its first token: until then the status is not sent.
pub(super) async fn respond<F: StreamForm>(
    receivers: Vec<UnboundedReceiver<Event>>,
    form: F,
    record: Arc<RequestRecord>,
    prompt_tokens: usize,
) -> Result<Response, ApiError> {
    let mut running = Running {
        open: receivers.len(),
        events: receivers
            .into_iter()
            .enumerate()
            .map(|(index, receiver)| events_of(index, receiver))
            .collect(),
        form,
        record,
        prompt_tokens,
        ready: Events::default(),
        usage: Usage::default(),
        over: false,
    };
    // Clients that give up before the first token are noticed by the connection, which drops this.
    // One that must wait long gets its headers before, so that nothing on the way loses patience.
    let first = tokio::time::timeout(KEEP_ALIVE, running.events.next()).await;
    if let Ok(Some((_, Event::Failed(failure)))) = first {
        running.record.facts().outcome = Some("failed");
        return Err(failure.into());
    }
    running.form.begin(&mut running.ready);
    match first {
        Ok(Some((index, event))) => running.take(index, event),
        Ok(None) => return Err(ApiError::internal()),
        Err(_) => {}
    }
    let events = stream::unfold(running, |mut running| async move {
        let (name, data) = running.next().await?;
        let event = match name {
            Some(name) => sse::Event::default().event(name),
            None => sse::Event::default(),
        };
        Some((Ok::<_, Infallible>(event.data(data)), running))
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

impl<F: StreamForm> Running<F> {
    async fn next(&mut self) -> Option<(Option<&'static str>, String)> {
        loop {
            if let Some(data) = self.ready.0.pop_front() {
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
            Event::Prompt(found) => self.form.prompt(index, &found, &mut self.ready),
            Event::Token { text, logprob } => {
                if self.form.counts(index) {
                    self.record.facts().completion_tokens += 1;
                }
                self.form.token(index, &text, logprob, &mut self.ready);
            }
            Event::Done(done) => {
                self.form.done(index, &done, &mut self.ready);
                if self.form.counts(index) {
                    count(&mut self.usage, self.prompt_tokens, &done);
                }
                self.open -= 1;
                if self.open == 0 {
                    self.form.end(&self.usage, &mut self.ready);
                    let mut facts = self.record.facts();
                    facts.completion_tokens = self.usage.completion_tokens;
                    facts.outcome = Some("done");
                    drop(facts);
                    self.over = true;
                }
            }
            Event::Failed(failure) => self.fail(&failure.into()),
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.form.fail(error, &mut self.ready);
        self.record.facts().outcome = Some("failed");
        self.over = true;
    }
}

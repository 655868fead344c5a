//! Answers under way: what their text is made of, and the parts that all forms of response share.

use std::sync::Arc;

use axum::{
    http::HeaderValue,
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};
use tokio::sync::mpsc::UnboundedReceiver;

use super::{
    audit::RequestRecord,
    engine::{Done, Event, TokenLogprob},
    error::ApiError,
    findings::{AskedFindings, FoundFindings},
    reasoning::{self, ReasoningSplitter},
    settings::RequestSettings,
    tool_calls::{CallPiece, CallSplitter},
    types::{LogprobEntry, PromptTokensDetails, Usage},
};
use crate::{processor::tokenizer::Tokenizer, runtime::generate::FinishReason};

/// What every response to one request repeats.
#[derive(Debug, Clone)]
pub(super) struct Header {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

/// What is being answered.
pub(super) struct Answers {
    pub(super) header: Header,
    pub(super) record: Arc<RequestRecord>,
    pub(super) prompt_tokens: usize,
    /// What a client should know besides the answer.
    pub(super) remarks: Vec<Value>,
    /// Fields of the request that were passed over.
    pub(super) ignored: Vec<String>,
    /// Of the answers, and after them of reports that are drawn for probabilities of findings.
    pub(super) receivers: Vec<UnboundedReceiver<Event>>,
    pub(super) reader: AnswerReader,
    pub(super) settings: RequestSettings,
    /// How probabilities of findings are returned, where the request has the field.
    pub(super) findings: Option<AskedFindings>,
    pub(super) tokenizer: Tokenizer,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Piece {
    /// Belongs to the reasoning.
    Reasoning(String),
    /// Meant for the reader.
    Text(String),
    /// A call of a function begins.
    Call {
        /// Number of the call, from 0.
        index: usize,
        id: String,
        name: String,
    },
    /// More of a call's arguments.
    Arguments { index: usize, text: String },
}

/// Takes the text of one answer apart.
#[derive(Debug, Clone)]
pub(super) struct AnswerReader {
    reasoning: ReasoningSplitter,
    /// Where the request has functions that may be called.
    calls: Option<CallSplitter>,
}

impl AnswerReader {
    /// `opens_thinking`: the prompt opened the reasoning; `calls`: functions may be called.
    pub(super) fn new(opens_thinking: bool, calls: bool) -> Self {
        Self {
            reasoning: ReasoningSplitter::new(opens_thinking),
            calls: calls.then(CallSplitter::default),
        }
    }

    /// Takes text and gives what is certain by now.
    pub(super) fn push(&mut self, text: &str) -> Vec<Piece> {
        let pieces = self.reasoning.push(text);
        self.sort(pieces, false)
    }

    /// Gives what was held back at the end of the text.
    pub(super) fn finish(&mut self) -> Vec<Piece> {
        let pieces = self.reasoning.finish();
        self.sort(pieces, true)
    }

    /// Number of calls so far.
    pub(super) fn calls(&self) -> usize {
        self.calls.as_ref().map_or(0, CallSplitter::calls)
    }

    /// Whether the text is inside of the reasoning.
    pub(super) fn is_reasoning(&self) -> bool {
        self.reasoning.is_inside()
    }

    fn sort(&mut self, pieces: Vec<reasoning::Piece>, last: bool) -> Vec<Piece> {
        let mut sorted = Vec::new();
        for piece in pieces {
            match (piece, &mut self.calls) {
                (reasoning::Piece::Reasoning(text), _) => sorted.push(Piece::Reasoning(text)),
                (reasoning::Piece::Answer(text), None) => sorted.push(Piece::Text(text)),
                (reasoning::Piece::Answer(text), Some(calls)) => {
                    sorted.extend(calls.push(&text).into_iter().map(Piece::from));
                }
            }
        }
        if let (true, Some(calls)) = (last, &mut self.calls) {
            sorted.extend(calls.finish().into_iter().map(Piece::from));
        }
        sorted
    }
}

impl From<CallPiece> for Piece {
    fn from(piece: CallPiece) -> Self {
        match piece {
            CallPiece::Text(text) => Self::Text(text),
            CallPiece::Begin { index, name } => Self::Call {
                index,
                id: format!("call_{}", random_id()),
                name,
            },
            CallPiece::Arguments { index, text } => Self::Arguments { index, text },
        }
    }
}

/// Letters of an id that nothing else has.
pub(super) fn random_id() -> String {
    format!("{:024x}", rand::random::<u128>() >> 32)
}

/// The next event of an answer that is not its end.
///
/// # Errors
/// [`ApiError`], when the answer broke off.
pub(super) async fn next_event(
    receiver: &mut UnboundedReceiver<Event>,
    record: &RequestRecord,
) -> Result<Event, ApiError> {
    let error = match receiver.recv().await {
        Some(Event::Failed(failure)) => failure.into(),
        Some(event) => return Ok(event),
        None => ApiError::internal(),
    };
    record.facts().outcome = Some("failed");
    Err(error)
}

impl Answers {
    /// Adds what a client should know besides the answer: remarks, and fields that were passed over.
    pub(super) fn note(&self, answer: &mut Value) {
        answer["remarks"] = json!(self.remarks);
        if !self.ignored.is_empty() {
            answer["ignored_fields"] = json!(self.ignored);
        }
    }

    /// The probabilities of findings of an answer whose text, without its reasoning, is `report`; what they give a
    /// client to know is added to the remarks. `drawn` are the reports that were drawn for them.
    pub(super) fn findings(
        &mut self,
        done: &mut Done,
        drawn: Vec<String>,
        report: &str,
    ) -> Option<Value> {
        let found = match done.continuations.take() {
            Some(found) => FoundFindings::Sentences(found),
            None if drawn.is_empty() => return None,
            None => FoundFindings::Reports(drawn),
        };
        let (object, remarks) = self.findings.as_ref()?.told(found, report);
        self.remarks.extend(remarks);
        Some(object)
    }

    /// Writes down that all was sent.
    pub(super) fn done(&self, completion_tokens: usize) {
        let mut facts = self.record.facts();
        facts.completion_tokens = completion_tokens;
        facts.outcome = Some("done");
    }

    /// A log probability as responses have it.
    pub(super) fn entry(&self, found: &TokenLogprob) -> LogprobEntry {
        let text = |id: u32, bytes: &[u8]| match self.settings.tokens_as_ids {
            true => format!("token_id:{id}"),
            false => String::from_utf8_lossy(bytes).into_owned(),
        };
        let one = |id: u32, logprob: f32| {
            let bytes = self.tokenizer.bytes_of(id, false);
            LogprobEntry {
                token: text(id, &bytes),
                // JSON has no infinity; OpenAI writes this for the impossible.
                logprob: logprob.max(-9999.0),
                bytes,
                top_logprobs: None,
            }
        };
        let top = found.top.iter();
        LogprobEntry {
            top_logprobs: Some(top.map(|(id, logprob)| one(*id, *logprob)).collect()),
            ..one(found.id, found.logprob)
        }
    }

    /// Log probabilities of a prompt as vLLM has them: for each token, by id, the token itself and the
    /// likeliest; null for the first.
    pub(super) fn prompt_logprobs(&self, found: &[TokenLogprob]) -> Value {
        let one = |id: u32, logprob: f32, rank: usize| {
            let bytes = self.tokenizer.bytes_of(id, false);
            json!({
                "logprob": logprob.max(-9999.0),
                "rank": rank,
                "decoded_token": String::from_utf8_lossy(&bytes),
            })
        };
        let of_token = |token: &TokenLogprob| {
            let mut entries = serde_json::Map::new();
            entries.insert(
                token.id.to_string(),
                one(token.id, token.logprob, token.rank),
            );
            for (place, (id, logprob)) in token.top.iter().enumerate() {
                entries
                    .entry(id.to_string())
                    .or_insert_with(|| one(*id, *logprob, place + 1));
            }
            Value::from(entries)
        };
        let tokens = found.iter().map(of_token);
        std::iter::once(Value::Null).chain(tokens).collect()
    }
}

/// Adds the header with the names of fields that were passed over.
pub(super) fn with_ignored(response: impl IntoResponse, names: &[String]) -> Response {
    let mut response = response.into_response();
    if names.is_empty() {
        return response;
    }
    let names: Vec<String> = names
        .iter()
        .map(|name| name.escape_default().to_string())
        .collect();
    let text: String = names.join(", ").chars().take(2000).collect();
    if let Ok(value) = HeaderValue::from_str(&text) {
        response.headers_mut().insert("x-ignored-fields", value);
    }
    response
}

/// Adds one answer to the counts; the prompt counts once.
pub(super) fn count(usage: &mut Usage, prompt_tokens: usize, done: &Done) {
    usage.prompt_tokens = prompt_tokens;
    usage.completion_tokens += done.completion_tokens;
    usage.total_tokens = prompt_tokens + usage.completion_tokens;
    let drafted = &mut usage.completion_tokens_details;
    drafted.accepted_prediction_tokens += done.drafts.accepted;
    drafted.rejected_prediction_tokens += done.drafts.drafted - done.drafts.accepted;
    let cached = &mut usage.prompt_tokens_details;
    if *cached == PromptTokensDetails::default() {
        cached.cached_tokens = done.cached_tokens;
    }
}

/// OpenAI's value; an answer that went round in circles was cut off like one that grew too long.
pub(super) fn finish_reason(reason: FinishReason, calls: usize) -> &'static str {
    match reason {
        FinishReason::Stop | FinishReason::Cancelled if calls > 0 => "tool_calls",
        FinishReason::Stop | FinishReason::Cancelled => "stop",
        FinishReason::Length | FinishReason::Repetition => "length",
    }
}

/// A reason that OpenAI has no value for.
pub(super) fn stop_reason(reason: FinishReason) -> Option<&'static str> {
    (reason == FinishReason::Repetition).then_some("repetition")
}

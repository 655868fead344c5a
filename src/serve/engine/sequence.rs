//! One answer on its way: from logits to a token, its text, and whether it was the last.

use std::{collections::HashMap, ops::Range, sync::Arc, time::Instant};

use tokio::sync::mpsc::UnboundedSender;

use super::{
    Done, Event, Failure, PreparedPrompt, Submission, TokenLogprob, prompt::token_key,
    scoring::Scoring,
};
use crate::{
    batch::positions::Positions,
    processor::tokenizer::Tokenizer,
    runtime::generate::{
        FinishReason,
        backend::{AdapterId, Pick, SlotId, StepRow, Stepped},
        drafts::{DraftCounts, DraftSession, SequenceText},
        goes_round,
        sampler::Sampler,
        text::TextStream,
    },
};

/// Tokens drafted for a sequence whose logits come to the host, at most: each row has a vocabulary of them.
const MOST_DRAFTED_BY_LOGITS: usize = 3;

/// Decides which tokens may come next, for instance those that lead to valid JSON.
pub trait TokenConstraint: Send {
    /// Sets the logits of tokens that are not allowed to minus infinity.
    ///
    /// # Errors
    /// A reason for the log; the answer breaks off.
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String>;

    /// Takes the chosen token; returns whether the answer is complete with it.
    ///
    /// # Errors
    /// A reason for the log; the answer breaks off.
    fn accept(&mut self, token: u32) -> Result<bool, String>;

    /// Whether the answer is free text at this place, so that repetition is the model's fault: a form may
    /// require one piece over and over.
    fn is_free(&self) -> bool;
}

/// OpenAI's changes of the logits.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Penalties {
    /// Taken off for every time a token was generated.
    pub frequency: f32,
    /// Taken off once for a token that was generated.
    pub presence: f32,
    /// Added to the logits of tokens.
    pub bias: Vec<(u32, f32)>,
}

impl Penalties {
    fn apply(&self, logits: &mut [f32], counts: &HashMap<u32, u32>) {
        for (id, bias) in &self.bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        if self.frequency == 0.0 && self.presence == 0.0 {
            return;
        }
        for (id, count) in counts {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit -= self.frequency * *count as f32 + self.presence;
            }
        }
    }
}

/// How far a sequence is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Tokens in the cache so far: of the prompt, and of the answer where it was preempted.
    Prefill(usize),
    /// The newest token, not in the cache yet.
    Decode(u32),
    /// The answer is complete; its continuations are not.
    Score,
}

/// A sequence with a place in the batch.
pub(super) struct Sequence {
    pub(super) adapter: AdapterId,
    pub(super) client: u64,
    pub(super) prompt: Arc<PreparedPrompt>,
    pub(super) phase: Phase,
    pub(super) slot: Option<SlotId>,
    /// Tokens of the cache's budget that it holds; grows with the answer.
    pub(super) reserved: usize,
    /// Tokens of the prompt that the first prefill took from another sequence; `None` before it.
    pub(super) cached_tokens: Option<usize>,
    /// Number in the order of arrival.
    pub(super) arrived: u64,
    pub(super) deadline: Instant,
    pub(super) submitted: Instant,
    /// When its newest token came.
    pub(super) last_token: Option<Instant>,
    pub(super) generated: Vec<u32>,
    /// Continuations of the prompt, once the answer is complete.
    pub(super) scoring: Option<Scoring>,
    /// The text of the answer so far, where continuations follow.
    text: String,
    events: UnboundedSender<Event>,
    submission: Submission,
    sampler: Sampler,
    /// Where tokens are drafted.
    session: Option<DraftSession>,
    /// Tokens drafted in the step that is under way.
    drafted: Vec<u32>,
    stream: TextStream,
    counts: HashMap<u32, u32>,
    /// Those of the prompt's tokens so far; `None` where they are not wanted, or were sent.
    prompt_logprobs: Option<Vec<TokenLogprob>>,
}

impl Sequence {
    pub(super) fn new(
        submission: Submission,
        events: UnboundedSender<Event>,
        submitted: Instant,
        arrived: u64,
        tokenizer: &Tokenizer,
        session: Option<DraftSession>,
    ) -> Self {
        Self {
            adapter: submission.adapter,
            client: submission.client,
            prompt: submission.prompt.clone(),
            phase: Phase::Prefill(0),
            slot: None,
            reserved: 0,
            cached_tokens: None,
            arrived,
            deadline: submission.deadline,
            submitted,
            last_token: None,
            generated: Vec::new(),
            scoring: None,
            text: String::new(),
            sampler: Sampler::new(&submission.sampling, &submission.prompt.input_ids),
            stream: TextStream::with(tokenizer, &submission.stop, submission.shown),
            session,
            drafted: Vec::new(),
            prompt_logprobs: submission.prompt_logprobs.map(|_| Vec::new()),
            counts: HashMap::new(),
            events,
            submission,
        }
    }

    /// Whether nobody reads the answer any more.
    pub(super) fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Tokens of prompt and answer so far; of the prompt alone where the answer is over.
    pub(super) fn len(&self) -> usize {
        match &self.scoring {
            Some(_) => self.prompt.len(),
            None => self.prompt.len() + self.generated.len(),
        }
    }

    /// Tokens that its slot has to have room for now.
    pub(super) fn room(&self) -> usize {
        match &self.scoring {
            Some(scoring) => scoring.root_len(),
            None => self.len(),
        }
    }

    /// Most tokens it may ever have.
    pub(super) fn max_len(&self) -> usize {
        match &self.scoring {
            Some(scoring) => scoring.root_len(),
            None => self.prompt.len() + self.submission.max_new_tokens,
        }
    }

    /// Position of the newest token.
    pub(super) fn position(&self) -> i64 {
        (self.len() - 1) as i64 + self.prompt.delta
    }

    /// Tokens `range` of prompt and answer, with their positions.
    pub(super) fn tokens(&self, range: Range<usize>) -> (Vec<u32>, Positions) {
        let prompt = self.prompt.len();
        let of_prompt = range.start.min(prompt)..range.end.min(prompt);
        let mut positions = self.prompt.positions_of(of_prompt.clone());
        let mut ids = self.prompt.input_ids[of_prompt].to_vec();
        for at in range.start.max(prompt)..range.end {
            ids.push(self.generated[at - prompt]);
            positions.push([at as i64 + self.prompt.delta; 3]);
        }
        (ids, positions)
    }

    /// Keys of all tokens.
    pub(super) fn keys(&self) -> Vec<u128> {
        let mut keys = self.prompt.keys.clone();
        if self.scoring.is_none() {
            keys.extend(self.generated.iter().map(|id| token_key(*id)));
        }
        keys
    }

    /// Keys of the tokens in the cache.
    pub(super) fn held_keys(&self) -> Vec<u128> {
        let mut keys = self.keys();
        match self.phase {
            Phase::Prefill(held) => keys.truncate(held),
            // The newest is on its way there.
            Phase::Decode(_) => keys.truncate(self.len() - 1),
            Phase::Score => match self.scoring.as_ref().and_then(Scoring::held_after_prompt) {
                Some(after) => keys.extend(after.iter().map(|id| token_key(*id))),
                None => keys.truncate(self.prompt.len() - 1),
            },
        }
        keys
    }

    /// Whether the logits after each token of the prompt are wanted, so that it goes through the model
    /// token by token and shares nothing.
    pub(super) fn wants_prompt_logits(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// Takes the logits after the prompt's token `at`; sends them all once they are complete.
    pub(super) fn take_prompt_logits(&mut self, at: usize, logits: &[f32]) {
        let next = self.prompt.input_ids.get(at + 1).copied();
        let top = self.submission.prompt_logprobs.unwrap_or(0);
        if let (Some(found), Some(next)) = (&mut self.prompt_logprobs, next) {
            // A preempted sequence begins again.
            found.truncate(at);
            found.push(logprob_of(logits, next, top));
        }
        self.send_prompt_logprobs();
    }

    /// Sends the log probabilities of the prompt once they are complete.
    pub(super) fn send_prompt_logprobs(&mut self) {
        let complete = |found: &mut Vec<TokenLogprob>| found.len() + 1 >= self.prompt.len();
        if let Some(found) = self.prompt_logprobs.take_if(complete) {
            let _ = self.events.send(Event::Prompt(found));
        }
    }

    /// Forgets slot and cache; what was generated stays and goes through the model again. The slots of rows of the work
    /// after the answer have to be given up by now.
    pub(super) fn restart(&mut self) {
        self.slot = None;
        self.reserved = 0;
        self.phase = Phase::Prefill(0);
    }

    /// Keys of the prompt's tokens that are in the cache once the prompt is through: all, but for the
    /// last where a step puts it there.
    pub(super) fn held_prompt(&self) -> &[u128] {
        let without_last = self.generated.is_empty() || self.scoring.is_some();
        &self.prompt.keys[..self.prompt.len() - usize::from(without_last)]
    }

    /// Where prefill ends: before the last token, if a step can take that, which is text.
    pub(super) fn prefill_end(&self) -> usize {
        let last = self.len() - 1;
        let (_, position) = self.tokens(last..last + 1);
        let is_text = position.axes.iter().all(|axis| axis[0] == self.position());
        last + usize::from(!is_text)
    }

    /// What comes when the first `held` tokens are in the cache.
    pub(super) fn phase_after(&self, held: usize) -> Phase {
        if self.scoring.is_some() && held + 1 == self.len() {
            return Phase::Score;
        }
        let last = self.generated.last().or(self.prompt.input_ids.last());
        match last {
            Some(last) if held + 1 == self.len() && held == self.prefill_end() => {
                Phase::Decode(*last)
            }
            _ => Phase::Prefill(held),
        }
    }

    /// Sends the reader the failure; nothing follows it.
    pub(super) fn fail(&self, failure: Failure) {
        let _ = self.events.send(Event::Failed(failure));
    }

    /// Rows of the next step for the newest token, `token`, and at most `share` tokens drafted after it.
    pub(super) fn step_rows(&mut self, slot: SlotId, token: u32, share: usize) -> Vec<StepRow> {
        let reads_logits = self.reads_logits();
        let share = match reads_logits {
            true => share.min(MOST_DRAFTED_BY_LOGITS),
            false => share,
        };
        // The step gives a token beyond the drafted ones, and nobody makes room for what may be wrong.
        let left = self.submission.max_new_tokens - self.generated.len();
        let most = share
            .min(left.saturating_sub(1))
            .min(self.reserved.saturating_sub(self.len()));
        let text = SequenceText {
            prompt: &self.prompt.input_ids,
            answer: &self.generated,
        };
        let session = self.session.as_mut();
        self.drafted = session.map_or_else(Vec::new, |session| session.propose(text, most));
        let picks: Vec<Pick> = match reads_logits {
            true => vec![Pick::Logits; 1 + self.drafted.len()],
            false => {
                let choices = self.sampler.choices(1 + self.drafted.len());
                choices.into_iter().map(Pick::Token).collect()
            }
        };
        let position = self.position();
        let fed = std::iter::once(token).chain(self.drafted.iter().copied());
        fed.zip(picks)
            .zip(position..)
            .map(|((token, pick), position)| StepRow {
                slot,
                token,
                position,
                pick,
            })
            .collect()
    }

    /// Whether logits are changed or reported, so that they have to come to the host.
    fn reads_logits(&self) -> bool {
        let submission = &self.submission;
        submission.logprobs.is_some()
            || submission.constraint.is_some()
            || submission.penalties != Penalties::default()
    }

    /// What was drafted so far, and what became of it.
    pub(super) fn draft_counts(&self) -> DraftCounts {
        let session = self.session.as_ref();
        session.map_or_else(DraftCounts::default, DraftSession::counts)
    }

    /// Takes the results of the rows of a step in turn, up to the first that its drafted token does not equal; returns `None`
    /// when the sequence goes on.
    ///
    /// # Errors
    /// [`Failure`], for the reader.
    pub(super) fn advance_all(&mut self, stepped: Vec<Stepped>) -> Result<Option<Done>, Failure> {
        let drafted = std::mem::take(&mut self.drafted);
        let computed = stepped.len().saturating_sub(1);
        let before = self.generated.len();
        let (mut accepted, mut outcome) = (0, Ok(None));
        for (at, one) in stepped.into_iter().enumerate() {
            outcome = self.advance(one);
            let is_right =
                self.generated.len() > before + at && self.generated.last() == drafted.get(at);
            accepted += usize::from(is_right && at < computed);
            if !is_right || !matches!(outcome, Ok(None)) {
                break;
            }
        }
        if let Some(session) = &mut self.session {
            session.note(computed, accepted, self.generated.len() - before);
        }
        if let Ok(Some(done)) = &mut outcome {
            done.drafts = self.draft_counts();
        }
        outcome
    }

    /// Takes the result of a row; returns `None` when the sequence goes on.
    ///
    /// # Errors
    /// [`Failure`], for the reader.
    pub(super) fn advance(&mut self, stepped: Stepped) -> Result<Option<Done>, Failure> {
        match stepped {
            Stepped::Logits(logits) => self.choose(logits),
            Stepped::Token(None) => Err(Failure::NotFinite),
            Stepped::Token(Some(token)) => {
                self.sampler.take(token);
                Ok(self.append(token, None, false))
            }
        }
    }

    /// Chooses the next token.
    fn choose(&mut self, mut logits: Vec<f32>) -> Result<Option<Done>, Failure> {
        if logits.iter().any(|value| value.is_nan()) {
            return Err(Failure::NotFinite);
        }
        let plain = self.submission.logprobs.map(|_| logits.clone());
        self.submission.penalties.apply(&mut logits, &self.counts);
        if let Some(constraint) = &mut self.submission.constraint {
            constraint.mask(&mut logits).map_err(|reason| {
                log::error!("constraint: {reason}");
                Failure::Internal
            })?;
        }
        let token = self.sampler.next(&logits);
        let complete = match &mut self.submission.constraint {
            Some(constraint) => constraint.accept(token).map_err(|reason| {
                log::error!("constraint: {reason}");
                Failure::Internal
            })?,
            None => false,
        };
        let logprob = plain
            .zip(self.submission.logprobs)
            .map(|(logits, top)| logprob_of(&logits, token, top));
        Ok(self.append(token, logprob, complete))
    }

    /// Appends a token and sends it to the reader; `complete` when nothing may follow.
    fn append(
        &mut self,
        token: u32,
        logprob: Option<TokenLogprob>,
        complete: bool,
    ) -> Option<Done> {
        *self.counts.entry(token).or_default() += 1;
        self.generated.push(token);
        self.phase = Phase::Decode(token);
        let ended = if self.submission.eos_token_ids.contains(&token) {
            // The end token is no text and has no place among the reported ones, unless it is shown.
            if self.submission.shown.include_stop {
                let text = self.stream.push(token);
                self.note(&text);
                let _ = self.events.send(Event::Token { text, logprob });
            }
            Some(FinishReason::Stop)
        } else {
            let text = self.stream.push(token);
            self.note(&text);
            let _ = self.events.send(Event::Token { text, logprob });
            if complete || self.stream.stopped() {
                Some(FinishReason::Stop)
            } else if self.generated.len() >= self.submission.max_new_tokens {
                Some(FinishReason::Length)
            } else if self.submission.stop_on_repetition
                && self
                    .submission
                    .constraint
                    .as_ref()
                    .is_none_or(|form| form.is_free())
                && goes_round(&self.generated)
            {
                Some(FinishReason::Repetition)
            } else {
                None
            }
        };
        ended.map(|reason| Done {
            text: self.stream.finish(),
            reason,
            completion_tokens: self.generated.len(),
            cached_tokens: self.cached_tokens.unwrap_or(0),
            continuations: None,
            drafts: self.draft_counts(),
        })
    }

    /// Keeps text that continuations may need.
    fn note(&mut self, text: &str) {
        if self.submission.continuations.is_some() {
            self.text.push_str(text);
        }
    }

    /// Goes over from an answer that ended with `done` to its continuations; gives `done` back where there are none.
    ///
    /// # Errors
    /// [`Failure`], for the reader.
    pub(super) fn begin_scoring(&mut self, done: Done) -> Result<Option<Done>, Failure> {
        let Some(asked) = self.submission.continuations.take() else {
            return Ok(Some(done));
        };
        self.text.push_str(&done.text);
        let places = (asked.places)(&self.text).map_err(|reason| {
            log::error!("continuations: {reason}");
            Failure::Internal
        })?;
        self.scoring = Some(Scoring::new(
            asked.tokens,
            places,
            &self.prompt.input_ids,
            self.prompt.delta,
            done,
        ));
        self.phase = Phase::Score;
        Ok(None)
    }

    /// Sends the reader the end of the answer.
    pub(super) fn finish(&self, done: Done) {
        let _ = self.events.send(Event::Done(done));
    }
}

fn logprob_of(logits: &[f32], token: u32, top: usize) -> TokenLogprob {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits
        .iter()
        .map(|logit| f64::from(*logit - max).exp())
        .sum();
    let log_sum = max + sum.ln() as f32;
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    let by_logit = |a: &u32, b: &u32| {
        logits[*b as usize]
            .total_cmp(&logits[*a as usize])
            .then(a.cmp(b))
    };
    let top = top.min(order.len());
    if top < order.len() {
        order.select_nth_unstable_by(top, by_logit);
        order.truncate(top);
    }
    order.sort_by(by_logit);
    let of = |id: u32| {
        logits
            .get(id as usize)
            .map_or(f32::NEG_INFINITY, |logit| logit - log_sum)
    };
    let chosen = logits.get(token as usize).copied();
    let before = |logit: &&f32| chosen.is_none_or(|chosen| **logit > chosen);
    TokenLogprob {
        id: token,
        logprob: of(token),
        rank: 1 + logits.iter().filter(before).count(),
        top: order.into_iter().map(|id| (id, of(id))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_probabilities_are_those_of_the_softmax() {
        let logits = [0.0, 2f32.ln(), 0.0];
        let found = logprob_of(&logits, 2, 2);
        assert!((found.logprob - 0.25f32.ln()).abs() < 1e-6);
        assert_eq!((found.rank, found.top.len()), (2, 2));
        assert_eq!(found.top[0].0, 1);
        assert!((found.top[0].1 - 0.5f32.ln()).abs() < 1e-6);
        assert_eq!(found.top[1].0, 0);
    }

    #[test]
    fn penalties_count_what_was_generated() {
        let penalties = Penalties {
            frequency: 0.5,
            presence: 1.0,
            bias: vec![(0, 3.0), (9, 1.0)],
        };
        let mut logits = [0.0, 0.0, 0.0];
        penalties.apply(&mut logits, &HashMap::from([(1, 2)]));
        assert_eq!(logits, [3.0, -2.0, 0.0]);
    }
}

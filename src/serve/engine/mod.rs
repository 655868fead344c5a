//! One worker owns the device; requests join and leave its batch at token boundaries.
//!
//! Handlers prepare a [`PreparedPrompt`], [`Engine::submit`] it and read [`Event`]s from a channel.
//! Dropping the channel is how a request is cancelled. The worker knows neither HTTP nor pictures.

mod prefix;
mod prompt;
mod scheduler;
mod scoring;
mod sequence;
#[cfg(test)]
mod tests;

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::Instant,
};

use tokio::sync::{mpsc::UnboundedReceiver, mpsc::UnboundedSender, oneshot, watch};

pub use prompt::{Patches, PreparedPrompt};
pub(super) use scheduler::cost_of;
pub use scoring::{Continuations, Places};
pub use sequence::{Penalties, TokenConstraint};

use super::metrics::Metrics;
use crate::{
    processor::tokenizer::Tokenizer,
    runtime::generate::{
        FinishReason, SamplingConfig,
        backend::{AdapterId, DecodeBackend, LoadedAdapter},
        drafts::{DraftCounts, Drafts},
        text::StreamOptions,
    },
};
use scheduler::Worker;

/// What the engine may take.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineLimits {
    /// Sequences in the batch.
    pub max_running: usize,
    /// Tokens in the key/value cache: running sequences with what they hold, and kept ones.
    pub cache_tokens: usize,
    /// Sequences that wait.
    pub max_queue: usize,
    /// Tokens of a prompt that go through the model between two steps of the batch.
    pub prefill_chunk: usize,
    /// Keeps finished sequences for prompts that begin alike.
    pub prefix_cache: bool,
    /// What tokens are drafted from.
    pub drafts: EngineDrafts,
}

/// What the engine drafts tokens from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct EngineDrafts {
    /// For the base; where `beside_adapters` is not set, for adapters too.
    pub base: Option<Drafts>,
    /// An adapter is drafted for from the store in its own folder, if there is one.
    pub beside_adapters: bool,
    /// Tokens drafted for a sequence in one step, at most.
    pub most: usize,
    /// Finished answers are drafted from as well.
    pub grow: bool,
}

/// One sequence to be generated.
pub struct Submission {
    /// Base or adapter.
    pub adapter: AdapterId,
    /// The prompt.
    pub prompt: Arc<PreparedPrompt>,
    /// Most tokens to add; at least one.
    pub max_new_tokens: usize,
    /// Tokens that end the answer.
    pub eos_token_ids: Vec<u32>,
    /// How tokens are chosen.
    pub sampling: SamplingConfig,
    /// Changes of the logits before that.
    pub penalties: Penalties,
    /// Ends the answer before one of these.
    pub stop: Vec<String>,
    /// What is shown besides plain text.
    pub shown: StreamOptions,
    /// Ends an answer that repeats itself.
    pub stop_on_repetition: bool,
    /// Log probabilities of the chosen and this many likeliest tokens.
    pub logprobs: Option<usize>,
    /// Log probabilities of the prompt's tokens and this many likeliest in their places.
    pub prompt_logprobs: Option<usize>,
    /// Which tokens are allowed.
    pub constraint: Option<Box<dyn TokenConstraint>>,
    /// What the answer is expected to be, to draft from; empty where nothing is.
    pub prediction: Vec<u32>,
    /// Continuations whose log-probabilities are computed once the answer is there; the prompt must end in text.
    pub continuations: Option<Continuations>,
    /// When the answer must be there.
    pub deadline: Instant,
    /// The client; places are shared out fairly between different clients.
    pub client: u64,
}

/// Log probability of a token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub id: u32,
    /// Natural logarithm of its probability under the model, before sampling settings.
    pub logprob: f32,
    /// Its place among all tokens, the likeliest being 1.
    pub rank: usize,
    /// The likeliest tokens with theirs.
    pub top: Vec<(u32, f32)>,
}

/// What happens to a submission.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The prompt is through: log probabilities of its tokens from the second on, if requested.
    Prompt(Vec<TokenLogprob>),
    /// One token more; `text` is what can be shown now.
    Token {
        /// May be empty, when a character is not whole or may be part of a stop text.
        text: String,
        /// If requested.
        logprob: Option<TokenLogprob>,
    },
    /// The answer is over.
    Done(Done),
    /// There will be no more.
    Failed(Failure),
}

/// End of an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Done {
    /// What was still held back.
    pub text: String,
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens generated, end token included.
    pub completion_tokens: usize,
    /// Tokens of the prompt that were in the cache already.
    pub cached_tokens: usize,
    /// Log-probabilities of the continuations that were asked for, `[place][continuation][token]`.
    pub continuations: Option<Vec<Vec<Vec<f32>>>>,
    /// Tokens that were drafted for it, and those of them that were right.
    pub drafts: DraftCounts,
}

/// Why an answer broke off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The deadline passed.
    Deadline,
    /// Something in the program failed; the others go on.
    Internal,
    /// The model answers with NaN.
    NotFinite,
    /// The server stops.
    Stopping,
    /// The adapter was unloaded while the prompt was prepared.
    Unloaded,
}

/// Why a submission was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The queue is full.
    #[error("the server is busy: {0} requests wait already")]
    Busy(usize),
    /// The server stops or has stopped.
    #[error("the server is stopping")]
    Stopping,
}

/// A place in the queue; dropping it gives it back.
#[derive(Debug)]
pub struct QueuePlace {
    queue: Arc<Queue>,
    client: u64,
    count: usize,
}

/// Places in the queue, and who has them.
#[derive(Debug, Default)]
struct Queue {
    /// All that are taken.
    waiting: AtomicUsize,
    by_client: Mutex<HashMap<u64, usize>>,
}

impl Queue {
    fn by_client(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        self.by_client
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `count` places of `limit` can be had; the last eighth only by a client with few.
    ///
    /// # Errors
    /// [`Refusal::Busy`].
    fn check(&self, held: usize, count: usize, limit: usize) -> Result<(), Refusal> {
        let waiting = self.waiting.load(Ordering::SeqCst);
        let spare = limit / 8;
        let all = waiting + count;
        if all + spare <= limit || (held + count <= spare && all <= limit) {
            Ok(())
        } else {
            Err(Refusal::Busy(waiting))
        }
    }
}

impl QueuePlace {
    /// Takes one of several places out.
    fn split(&mut self) -> Self {
        assert!(self.count > 0, "more sequences than places");
        self.count -= 1;
        Self {
            queue: self.queue.clone(),
            client: self.client,
            count: 1,
        }
    }
}

impl Drop for QueuePlace {
    fn drop(&mut self) {
        let mut held = self.queue.by_client();
        if let Some(of_client) = held.get_mut(&self.client) {
            *of_client -= self.count;
            if *of_client == 0 {
                held.remove(&self.client);
            }
        }
        self.queue.waiting.fetch_sub(self.count, Ordering::SeqCst);
    }
}

enum Command {
    Run {
        submission: Box<Submission>,
        events: UnboundedSender<Event>,
        place: QueuePlace,
        submitted: Instant,
    },
    Load {
        dir: PathBuf,
        reply: oneshot::Sender<Result<LoadedAdapter, String>>,
    },
    Unload {
        adapter: AdapterId,
        reply: oneshot::Sender<()>,
    },
    /// Finish what there is, then end.
    Drain,
    /// End now.
    Abort,
}

/// The handlers' side of the worker; cheap to clone.
#[derive(Clone)]
pub struct Engine {
    commands: mpsc::Sender<Command>,
    queue: Arc<Queue>,
    stopping: Arc<AtomicBool>,
    end: watch::Receiver<Option<End>>,
    limits: Arc<EngineLimits>,
}

/// How the worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It was stopped.
    Stopped,
    /// The device does not work any more.
    DeviceLost,
}

/// Whatever ends the worker, nothing more may be sent to it, and whoever waits for that learns why.
struct Ending {
    stopping: Arc<AtomicBool>,
    end: watch::Sender<Option<End>>,
    /// A panic of the worker itself leaves this as it was.
    how: End,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.end.send_replace(Some(self.how));
    }
}

impl Engine {
    /// Starts the worker on a thread of its own.
    ///
    /// # Errors
    /// When the system gives no thread.
    pub fn start<D>(
        device: D,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(Self, JoinHandle<()>)>
    where
        D: DecodeBackend + Send + 'static,
    {
        // What is reserved are whole blocks: a request that `limits` lets in must fit an empty cache.
        let limits = EngineLimits {
            cache_tokens: scheduler::whole_blocks(limits.cache_tokens),
            ..limits
        };
        let (commands, received) = mpsc::channel();
        let (end, ended) = watch::channel(None);
        let engine = Self {
            commands,
            queue: Arc::default(),
            stopping: Arc::new(AtomicBool::new(false)),
            end: ended,
            limits: Arc::new(limits.clone()),
        };
        let stopping = engine.stopping.clone();
        let thread = std::thread::Builder::new()
            .name("engine".into())
            .spawn(move || {
                let mut ending = Ending {
                    stopping,
                    end,
                    how: End::DeviceLost,
                };
                if Worker::new(device, tokenizer, limits, metrics)
                    .run(&received)
                    .is_ok()
                {
                    ending.how = End::Stopped;
                }
            })?;
        Ok((engine, thread))
    }

    /// The limits it was started with, the cache in whole blocks.
    pub fn limits(&self) -> &EngineLimits {
        &self.limits
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> usize {
        self.queue.waiting.load(Ordering::Relaxed)
    }

    /// Whether there is room in the queue for `client` at this moment; nothing is taken.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn check_room(&self, client: u64) -> Result<(), Refusal> {
        if self.is_stopping() {
            return Err(Refusal::Stopping);
        }
        let held = self.queue.by_client().get(&client).copied().unwrap_or(0);
        self.queue.check(held, 1, self.limits.max_queue)
    }

    /// Takes places in the queue for `client`, to be had before any work is put into a request.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn reserve(&self, client: u64, count: usize) -> Result<QueuePlace, Refusal> {
        if self.is_stopping() {
            return Err(Refusal::Stopping);
        }
        let mut all = self.queue.by_client();
        let held = all.get(&client).copied().unwrap_or(0);
        self.queue.check(held, count, self.limits.max_queue)?;
        all.insert(client, held + count);
        self.queue.waiting.fetch_add(count, Ordering::SeqCst);
        drop(all);
        Ok(QueuePlace {
            queue: self.queue.clone(),
            client,
            count,
        })
    }

    /// Hands a submission to the worker; `place` loses one of its places to it.
    ///
    /// # Errors
    /// [`Refusal::Stopping`].
    ///
    /// # Panics
    /// If `place` has none left.
    pub fn submit(
        &self,
        submission: Submission,
        place: &mut QueuePlace,
        submitted: Instant,
    ) -> Result<UnboundedReceiver<Event>, Refusal> {
        let (events, receiver) = tokio::sync::mpsc::unbounded_channel();
        self.commands
            .send(Command::Run {
                submission: Box::new(submission),
                events,
                place: place.split(),
                submitted,
            })
            .map_err(|_| Refusal::Stopping)?;
        Ok(receiver)
    }

    /// Loads an adapter between two steps.
    ///
    /// # Errors
    /// The loader's reason, as text.
    pub async fn load_adapter(&self, dir: PathBuf) -> Result<LoadedAdapter, String> {
        let (reply, answer) = oneshot::channel();
        let stopping = || Refusal::Stopping.to_string();
        self.commands
            .send(Command::Load { dir, reply })
            .map_err(|_| stopping())?;
        answer.await.map_err(|_| stopping())?
    }

    /// Drops an adapter as soon as no sequence uses it; the caller has made sure that none is added.
    pub async fn unload_adapter(&self, adapter: AdapterId) {
        let (reply, answer) = oneshot::channel();
        if self
            .commands
            .send(Command::Unload { adapter, reply })
            .is_ok()
        {
            let _ = answer.await;
        }
    }

    /// Takes nothing new, finishes what there is, then ends the worker.
    pub fn drain(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let _ = self.commands.send(Command::Drain);
    }

    /// Ends the worker at the next token boundary.
    pub fn abort(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        let _ = self.commands.send(Command::Abort);
    }

    /// Waits until the worker has ended, and returns how.
    pub async fn ended(&self) -> End {
        let mut end = self.end.clone();
        let ended = end.wait_for(Option::is_some).await;
        // The worker sends the reason before it drops the sender.
        ended.ok().and_then(|end| *end).unwrap_or(End::DeviceLost)
    }

    /// How the worker ended, if it has.
    pub fn end(&self) -> Option<End> {
        *self.end.borrow()
    }

    /// Whether nothing new is taken.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }
}

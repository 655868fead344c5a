//! The worker's loop: who joins the batch, whose prompt goes on, one step for all the others.

mod continuations;
mod drafts;
mod room;
mod steps;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    time::Instant,
};

use tokio::sync::oneshot;

use super::{
    Command, EngineLimits, Event, Failure, QueuePlace,
    prefix::PrefixCache,
    scoring::Scoring,
    sequence::{Phase, Sequence},
};
use crate::{
    base::panics::panic_text,
    processor::tokenizer::Tokenizer,
    runtime::generate::{
        backend::{AdapterId, DecodeBackend, SlotId},
        drafts::Drafts,
    },
    serve::metrics::{Metrics, as_gauge},
};

/// Sequences take the budget in blocks of this many tokens, as buffers grow.
const BLOCK: usize = 256;

/// What a sequence of `tokens` tokens takes of the budget.
pub(in crate::serve) fn cost_of(tokens: usize) -> usize {
    tokens.next_multiple_of(BLOCK)
}

/// Tokens of the whole blocks that fit in so many.
pub(super) fn whole_blocks(tokens: usize) -> usize {
    tokens / BLOCK * BLOCK
}

struct Queued {
    sequence: Sequence,
    /// Given back when the sequence joins the batch; a preempted one has none.
    _place: Option<QueuePlace>,
}

/// The features of the images of one prompt, as far as they are still needed.
type ImageFeatures<F> = HashMap<usize, F>;

/// Owns the device.
pub(super) struct Worker<D: DecodeBackend> {
    device: D,
    tokenizer: Tokenizer,
    limits: EngineLimits,
    metrics: Arc<Metrics>,
    queue: VecDeque<Queued>,
    running: Vec<Sequence>,
    /// Features of the prompt that is being prefilled, always the first of `running` in that phase.
    features: ImageFeatures<D::Features>,
    prefixes: PrefixCache,
    /// Those on the device besides the base.
    adapters: HashSet<AdapterId>,
    unloads: Vec<(AdapterId, oneshot::Sender<()>)>,
    draining: bool,
    /// Sequences that have arrived.
    arrivals: u64,
    /// When each client last had a sequence join the batch, in joins since the start.
    turns: HashMap<u64, u64>,
    joins: u64,
    /// Device calls that failed since one last went well.
    failures: u32,
    /// Turns of continuations so far.
    scoring_turns: u64,
    /// What is drafted from, for the base and adapters that have something.
    drafts: HashMap<AdapterId, Drafts>,
    /// Ids below this can be drafted.
    vocab: usize,
}

impl<D: DecodeBackend> Worker<D> {
    pub(super) fn new(
        device: D,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        metrics: Arc<Metrics>,
    ) -> Self {
        let vocab = tokenizer
            .vocabulary()
            .last()
            .map_or(0, |(id, _)| *id as usize + 1);
        let mut this = Self {
            device,
            tokenizer,
            limits,
            metrics,
            queue: VecDeque::new(),
            running: Vec::new(),
            features: HashMap::new(),
            prefixes: PrefixCache::default(),
            adapters: HashSet::new(),
            unloads: Vec::new(),
            draining: false,
            arrivals: 0,
            turns: HashMap::new(),
            joins: 0,
            failures: 0,
            scoring_turns: 0,
            drafts: HashMap::new(),
            vocab,
        };
        let base = this.limits.drafts.base.clone();
        this.set_drafts(AdapterId::BASE, base);
        this
    }

    /// Works until there is nothing to wait for.
    ///
    /// # Errors
    /// When the device does not work any more.
    pub(super) fn run(mut self, commands: &mpsc::Receiver<Command>) -> Result<(), DeviceLost> {
        let ended = self.work(commands);
        let failure = match ended {
            Ok(()) => Failure::Stopping,
            Err(DeviceLost) => Failure::Internal,
        };
        let queued = self.queue.drain(..).map(|queued| queued.sequence);
        for sequence in self.running.drain(..).chain(queued) {
            sequence.fail(failure);
        }
        self.publish();
        ended
    }

    fn work(&mut self, commands: &mpsc::Receiver<Command>) -> Result<(), DeviceLost> {
        while self.receive(commands) {
            self.sweep();
            self.grow();
            self.admit();
            // Before any token goes out: who sees one must find its sequence counted.
            self.publish();
            let rows = self.begin_step();
            self.prefill();
            self.step(&rows);
            self.score();
            self.finish_unloads();
            self.free_unawaited();
            self.publish();
            self.check_device()?;
        }
        Ok(())
    }

    /// Takes all commands there are, waiting for one when there is nothing else to do; `false` ends
    /// the worker.
    fn receive(&mut self, commands: &mpsc::Receiver<Command>) -> bool {
        loop {
            let idle = self.running.is_empty() && self.queue.is_empty();
            let command = if idle {
                if self.draining {
                    return false;
                }
                match commands.recv() {
                    Ok(command) => command,
                    Err(_) => return false,
                }
            } else {
                match commands.try_recv() {
                    Ok(command) => command,
                    Err(mpsc::TryRecvError::Empty) => return true,
                    Err(mpsc::TryRecvError::Disconnected) => {
                        self.draining = true;
                        return true;
                    }
                }
            };
            match command {
                Command::Run {
                    submission,
                    events,
                    place,
                    submitted,
                } => {
                    let adapter = submission.adapter;
                    if adapter != AdapterId::BASE && !self.adapters.contains(&adapter) {
                        let _ = events.send(Event::Failed(Failure::Unloaded));
                        continue;
                    }
                    self.arrivals += 1;
                    let session = self.draft_session(&submission);
                    self.queue.push_back(Queued {
                        sequence: Sequence::new(
                            *submission,
                            events,
                            submitted,
                            self.arrivals,
                            &self.tokenizer,
                            session,
                        ),
                        _place: Some(place),
                    });
                }
                Command::Load { dir, reply } => {
                    let device = &mut self.device;
                    let loaded = guarded(|| device.load_adapter(&dir))
                        .and_then(|loaded| loaded.map_err(|error| error.to_string()));
                    if let Ok(adapter) = &loaded {
                        self.adapters.insert(adapter.id);
                        self.find_drafts(adapter.id, &dir);
                    }
                    if let Err(Ok(adapter)) = reply.send(loaded) {
                        // The caller is gone, and nobody else knows its number.
                        self.adapters.remove(&adapter.id);
                        self.drafts.remove(&adapter.id);
                        let device = &mut self.device;
                        let _ = guarded(|| device.unload_adapter(adapter.id));
                    }
                }
                Command::Unload { adapter, reply } => {
                    self.unloads.push((adapter, reply));
                    self.finish_unloads();
                }
                Command::Drain => self.draining = true,
                Command::Abort => return false,
            }
        }
    }

    /// Ends what nobody waits for any more.
    fn sweep(&mut self) {
        let now = Instant::now();
        let metrics = &self.metrics;
        self.queue.retain(|queued| {
            if queued.sequence.is_cancelled() {
                metrics.cancelled.inc();
                return false;
            }
            if now >= queued.sequence.deadline {
                queued.sequence.fail(Failure::Deadline);
                metrics.failed.inc();
                return false;
            }
            true
        });
        let mut place = 0;
        while place < self.running.len() {
            let sequence = &self.running[place];
            if sequence.is_cancelled() {
                self.metrics.cancelled.inc();
                self.drop_sequence(place);
            } else if now >= sequence.deadline {
                sequence.fail(Failure::Deadline);
                self.metrics.failed.inc();
                self.drop_sequence(place);
            } else {
                place += 1;
            }
        }
    }

    /// Takes a sequence out of the batch and gives its slot back.
    fn drop_sequence(&mut self, place: usize) {
        let mut sequence = self.running.remove(place);
        if matches!(sequence.phase, Phase::Prefill(_)) {
            self.features.clear();
        }
        let rows = sequence.scoring.as_mut().map(Scoring::release);
        self.free(rows.into_iter().flatten().chain(sequence.slot));
    }

    fn free(&mut self, slots: impl IntoIterator<Item = SlotId>) {
        for slot in slots {
            let device = &mut self.device;
            let _ = guarded(|| device.free(slot));
        }
    }

    fn finish_unloads(&mut self) {
        let mut place = 0;
        while place < self.unloads.len() {
            let adapter = self.unloads[place].0;
            let used = self
                .running
                .iter()
                .any(|sequence| sequence.adapter == adapter)
                || self
                    .queue
                    .iter()
                    .any(|queued| queued.sequence.adapter == adapter);
            if used {
                place += 1;
                continue;
            }
            let kept = self.prefixes.evict_adapter(adapter);
            self.free(kept);
            self.adapters.remove(&adapter);
            self.drafts.remove(&adapter);
            let device = &mut self.device;
            let _ = guarded(|| device.unload_adapter(adapter));
            let (_, reply) = self.unloads.swap_remove(place);
            let _ = reply.send(());
        }
    }

    fn publish(&self) {
        self.metrics.running.set(as_gauge(self.running.len()));
        self.metrics
            .cache_running_tokens
            .set(as_gauge(self.in_use()));
        self.metrics
            .cache_kept_tokens
            .set(as_gauge(self.prefixes.cost()));
        self.metrics
            .cache_kept_sequences
            .set(as_gauge(self.prefixes.len()));
    }
}

/// The device does not work any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DeviceLost;

/// Runs work that may panic; a panic's first line is the error.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| panic_text(payload.as_ref()))
}

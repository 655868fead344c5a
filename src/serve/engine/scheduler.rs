//! The worker's loop: who joins the batch, whose prompt goes on, one step for all the others.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    time::Instant,
};

use rayon::prelude::*;
use tokio::sync::{mpsc::UnboundedSender, oneshot};

use super::{
    Command, Done, EngineLimits, Event, Failure, QueuePlace, Submission,
    prefix::{PrefixCache, SHORTEST, shared_prefix},
    sequence::{Phase, Sequence},
};
use crate::{
    backend::panic_text,
    generate::backend::{AdapterId, Chunk, DecodeBackend, SlotId, StepRow, Stepped},
    processor::tokenizer::Tokenizer,
    serve::metrics::Metrics,
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
    submission: Box<Submission>,
    events: UnboundedSender<Event>,
    submitted: Instant,
    /// Given back when the sequence joins the batch.
    _place: QueuePlace,
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
}

impl<D: DecodeBackend> Worker<D> {
    pub(super) fn new(
        device: D,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        metrics: Arc<Metrics>,
    ) -> Self {
        Self {
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
        }
    }

    pub(super) fn run(mut self, commands: &mpsc::Receiver<Command>) {
        while self.receive(commands) {
            self.sweep();
            self.admit();
            // Before any token goes out: who sees one must find its sequence counted.
            self.publish();
            let rows = self.begin_step();
            self.prefill();
            self.step(&rows);
            self.finish_unloads();
            self.publish();
        }
        for sequence in &self.running {
            sequence.fail(Failure::Stopping);
        }
        for queued in &self.queue {
            let _ = queued.events.send(Event::Failed(Failure::Stopping));
        }
        self.running.clear();
        self.queue.clear();
        self.publish();
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
                    self.queue.push_back(Queued {
                        submission,
                        events,
                        submitted,
                        _place: place,
                    });
                }
                Command::Load { dir, reply } => {
                    let device = &mut self.device;
                    let loaded = guarded(|| device.load_adapter(&dir))
                        .and_then(|loaded| loaded.map_err(|error| error.to_string()));
                    self.adapters.extend(loaded.as_ref().ok());
                    if let Err(Ok(adapter)) = reply.send(loaded) {
                        // Whoever asked is gone, and nobody else knows its number.
                        self.adapters.remove(&adapter);
                        let device = &mut self.device;
                        let _ = guarded(|| device.unload_adapter(adapter));
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
            if queued.events.is_closed() {
                metrics.cancelled.add(1);
                return false;
            }
            if now >= queued.submission.deadline {
                let _ = queued.events.send(Event::Failed(Failure::Deadline));
                metrics.failed.add(1);
                return false;
            }
            true
        });
        let mut place = 0;
        while place < self.running.len() {
            let sequence = &self.running[place];
            if sequence.is_cancelled() {
                self.metrics.cancelled.add(1);
                self.drop_sequence(place);
            } else if now >= sequence.deadline {
                sequence.fail(Failure::Deadline);
                self.metrics.failed.add(1);
                self.drop_sequence(place);
            } else {
                place += 1;
            }
        }
    }

    /// Takes a sequence out of the batch and gives its slot back.
    fn drop_sequence(&mut self, place: usize) {
        let sequence = self.running.remove(place);
        if matches!(sequence.phase, Phase::Prefill(_)) {
            self.features.clear();
        }
        self.free(sequence.slot);
    }

    fn free(&mut self, slots: impl IntoIterator<Item = SlotId>) {
        for slot in slots {
            let device = &mut self.device;
            let _ = guarded(|| device.free(slot));
        }
    }

    /// Lets waiting sequences join while there is room.
    ///
    /// The next one is that of the asker with the fewest sequences in the batch, the oldest among
    /// equals. If it does not fit, nobody overtakes it: a long prompt must not wait for ever.
    fn admit(&mut self) {
        while self.running.len() < self.limits.max_running {
            let running = |client: u64| {
                self.running
                    .iter()
                    .filter(|sequence| sequence.client == client)
                    .count()
            };
            let Some(next) = self
                .queue
                .iter()
                .enumerate()
                .min_by_key(|(place, queued)| (running(queued.submission.client), *place))
                .map(|(place, _)| place)
            else {
                return;
            };
            let submission = &self.queue[next].submission;
            let reserved = cost_of(submission.prompt.len() + submission.max_new_tokens);
            let in_use: usize = self.running.iter().map(|sequence| sequence.reserved).sum();
            if in_use + reserved > self.limits.cache_tokens {
                return;
            }
            while in_use + self.prefixes.cost() + reserved > self.limits.cache_tokens {
                let evicted = self.prefixes.evict();
                self.free(evicted);
            }
            if let Some(queued) = self.queue.remove(next) {
                self.running.push(Sequence::new(
                    *queued.submission,
                    queued.events,
                    queued.submitted,
                    reserved,
                    &self.tokenizer,
                ));
            }
        }
    }

    /// Puts as many tokens of prompts through the model as go between two steps, oldest prompt first.
    fn prefill(&mut self) {
        let mut budget = self.limits.prefill_chunk;
        while budget > 0 {
            match self.prefill_next(budget) {
                Some(tokens) => budget -= tokens.clamp(1, budget),
                None => return,
            }
        }
    }

    /// Puts at most `budget` tokens of the oldest unfinished prompt through the model; gives their
    /// number, `None` when no prompt is unfinished.
    fn prefill_next(&mut self, budget: usize) -> Option<usize> {
        let place = self
            .running
            .iter()
            .position(|sequence| matches!(sequence.phase, Phase::Prefill(_)))?;
        let computed = {
            let this = &mut *self;
            guarded(|| this.prefill_chunk(place, budget))
        };
        match computed {
            Ok((tokens, Some(logits))) => {
                self.features.clear();
                let outcome = advance(&mut self.running[place], Stepped::Logits(logits));
                self.settle(vec![(place, outcome)]);
                Some(tokens)
            }
            Ok((tokens, None)) => Some(tokens),
            Err(reason) => {
                log::error!("prefill failed: {reason}");
                self.features.clear();
                self.running[place].fail(Failure::Internal);
                self.metrics.failed.add(1);
                self.drop_sequence(place);
                // A full device is the likeliest reason.
                let kept = self.prefixes.clear();
                self.free(kept);
                Some(1)
            }
        }
    }

    /// Number of tokens computed, and the logits behind the prompt when that was the last of it. Its
    /// last token is left to the step of the batch, which chooses the next one where logits stay on the
    /// device, and computes a token the same way whether or not the rest was in the cache.
    fn prefill_chunk(&mut self, place: usize, budget: usize) -> (usize, Option<Vec<f32>>) {
        let prompt = self.running[place].prompt.clone();
        let adapter = self.running[place].adapter;
        let slot = match self.running[place].slot {
            Some(slot) => slot,
            None => self.begin(place),
        };
        let Phase::Prefill(from) = self.running[place].phase else {
            return (0, None);
        };
        let to = self.running[place].prefill_end().min(from + budget);
        let mut features = Vec::new();
        for (index, image) in prompt.images.iter().enumerate() {
            let end = image.first_token + image.tokens;
            let range = from.max(image.first_token)..to.min(end);
            if range.is_empty() {
                continue;
            }
            if !self.features.contains_key(&index) {
                let encoded = self.device.encode_image(adapter, &image.input);
                self.features.insert(index, encoded);
                self.metrics.images_encoded.add(1);
            }
            let of_image = range.start - image.first_token..range.end - image.first_token;
            features.push((self.features[&index].clone(), of_image));
            if to >= end {
                self.features.remove(&index);
            }
        }
        let chunk = Chunk {
            input_ids: &prompt.input_ids[from..to],
            positions: prompt.positions_of(from..to),
            features,
            wants_logits: to == prompt.len(),
        };
        let logits = self.device.prefill(slot, &chunk);
        self.metrics.prompt_tokens.add((to - from) as u64);
        let phase = self.running[place].phase_behind(to);
        self.running[place].phase = phase;
        if matches!(phase, Phase::Decode(_)) {
            self.features.clear();
        }
        (to - from, logits)
    }

    /// Gives a sequence its slot, with as much of its prompt as lies in the cache already.
    fn begin(&mut self, place: usize) -> SlotId {
        let sequence = &self.running[place];
        let (adapter, capacity) = (sequence.adapter, sequence.reserved);
        let prompt = sequence.prompt.clone();
        // The last token always goes through the model: its logits are wanted.
        let usable = &prompt.keys[..prompt.len() - 1];
        let kept = if self.limits.prefix_cache {
            self.prefixes.find(adapter, usable)
        } else {
            None
        };
        // A sequence still running may share more: other answers to the same question, for one.
        let live = self
            .running
            .iter()
            .filter(|other| other.adapter == adapter && self.limits.prefix_cache)
            .filter_map(|other| match (other.phase, other.slot) {
                (Phase::Decode(_), Some(slot)) => {
                    Some((slot, shared_prefix(other.held_prompt(), usable)))
                }
                _ => None,
            })
            .filter(|(_, shared)| *shared >= SHORTEST)
            .max_by_key(|(_, shared)| *shared);
        let best = kept.into_iter().chain(live).max_by_key(|found| found.1);
        let (slot, shared) = match best {
            Some((source, shared)) => (self.device.fork(source, shared, capacity), shared),
            None => (self.device.start(adapter, capacity), 0),
        };
        let sequence = &mut self.running[place];
        sequence.slot = Some(slot);
        sequence.cached_tokens = shared;
        sequence.phase = sequence.phase_behind(shared);
        self.metrics.cached_tokens.add(shared as u64);
        if shared > 0 {
            self.metrics.prefix_hits.add(1);
        }
        self.metrics.prefix_lookups.add(1);
        slot
    }

    /// Lets the device start on one token more for every sequence whose prompt is through.
    fn begin_step(&mut self) -> Vec<StepRow> {
        let rows: Vec<StepRow> = self
            .running
            .iter_mut()
            .filter_map(|sequence| match (sequence.phase, sequence.slot) {
                (Phase::Decode(token), Some(slot)) => Some(StepRow {
                    slot,
                    token,
                    position: sequence.position(),
                    pick: sequence.pick(),
                }),
                _ => None,
            })
            .collect();
        if !rows.is_empty() {
            let device = &mut self.device;
            // A failure comes again when the results are asked for, and is told then.
            let _ = guarded(|| device.begin_step(&rows));
        }
        rows
    }

    /// Ends the step of these rows.
    fn step(&mut self, step: &[StepRow]) {
        if step.is_empty() {
            return;
        }
        let device = &mut self.device;
        let computed: Vec<Result<Stepped, Failure>> = match guarded(|| device.step(step)) {
            Ok(stepped) => stepped.into_iter().map(Ok).collect(),
            Err(reason) => {
                log::error!("a step of {} rows failed: {reason}", step.len());
                let kept = self.prefixes.clear();
                self.free(kept);
                self.step_alone(step)
            }
        };
        // Prompts have gone through since: places are those of now.
        let mut stepped: HashMap<SlotId, Result<Stepped, Failure>> =
            step.iter().map(|row| row.slot).zip(computed).collect();
        let outcomes: Vec<(usize, Outcome)> = self
            .running
            .iter_mut()
            .enumerate()
            .filter_map(|(place, sequence)| {
                let stepped = stepped.remove(&sequence.slot?)?;
                Some((place, sequence, stepped))
            })
            .collect::<Vec<_>>()
            .into_par_iter()
            .map(|(place, sequence, stepped)| {
                (
                    place,
                    stepped.and_then(|stepped| advance(sequence, stepped)),
                )
            })
            .collect();
        self.settle(outcomes);
    }

    /// After a step that failed: each row by itself, so that only the guilty one ends.
    fn step_alone(&mut self, rows: &[StepRow]) -> Vec<Result<Stepped, Failure>> {
        rows.iter()
            .map(|row| {
                let device = &mut self.device;
                match guarded(|| device.step(std::slice::from_ref(row)).pop()) {
                    Ok(Some(stepped)) => Ok(stepped),
                    Ok(None) => Err(Failure::Internal),
                    Err(reason) => {
                        log::error!("the step of one row failed: {reason}");
                        Err(Failure::Internal)
                    }
                }
            })
            .collect()
    }

    /// Counts new tokens and takes sequences that are over out of the batch.
    fn settle(&mut self, mut outcomes: Vec<(usize, Outcome)>) {
        let now = Instant::now();
        // From the back, so that places stay true.
        outcomes.sort_by_key(|(place, _)| std::cmp::Reverse(*place));
        for (place, outcome) in outcomes {
            let sequence = &mut self.running[place];
            if outcome.is_ok() {
                self.metrics.generated_tokens.add(1);
                match sequence.last_token.replace(now) {
                    Some(last) => self.metrics.per_token.observe(now - last),
                    None => self.metrics.first_token.observe(now - sequence.submitted),
                }
            }
            match outcome {
                Ok(None) => {}
                Ok(Some(done)) => {
                    sequence.finish(done);
                    self.metrics.finished.add(1);
                    self.retire(place);
                }
                Err(failure) => {
                    sequence.fail(failure);
                    self.metrics.failed.add(1);
                    self.drop_sequence(place);
                }
            }
        }
    }

    /// Takes a finished sequence out of the batch; its keys and values stay for the next question.
    fn retire(&mut self, place: usize) {
        let sequence = self.running.remove(place);
        let Some(slot) = sequence.slot else {
            return;
        };
        let unloading = self.unloads.iter().any(|(id, _)| *id == sequence.adapter);
        if !self.limits.prefix_cache || unloading {
            self.free(Some(slot));
            return;
        }
        let keys = sequence.cached_keys();
        let cost = cost_of(keys.len());
        let superfluous = self.prefixes.keep(slot, sequence.adapter, keys, cost);
        self.free(superfluous);
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
                    .any(|queued| queued.submission.adapter == adapter);
            if used {
                place += 1;
                continue;
            }
            let kept = self.prefixes.evict_adapter(adapter);
            self.free(kept);
            self.adapters.remove(&adapter);
            let device = &mut self.device;
            let _ = guarded(|| device.unload_adapter(adapter));
            let (_, reply) = self.unloads.swap_remove(place);
            let _ = reply.send(());
        }
    }

    fn publish(&self) {
        let in_use: usize = self.running.iter().map(|sequence| sequence.reserved).sum();
        self.metrics.running.set(self.running.len() as u64);
        self.metrics.cache_running_tokens.set(in_use as u64);
        self.metrics
            .cache_kept_tokens
            .set(self.prefixes.cost() as u64);
        self.metrics
            .cache_kept_sequences
            .set(self.prefixes.len() as u64);
    }
}

type Outcome = Result<Option<Done>, Failure>;

fn advance(sequence: &mut Sequence, stepped: Stepped) -> Outcome {
    guarded(|| sequence.advance(stepped)).unwrap_or_else(|reason| {
        log::error!("choosing a token failed: {reason}");
        Err(Failure::Internal)
    })
}

/// Runs work that may panic; a panic's first line is the error.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| panic_text(payload.as_ref()))
}

//! The worker's loop: who joins the batch, whose prompt goes on, one step for all the others.

mod drafts;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    time::Instant,
};

use rayon::prelude::*;
use tokio::sync::oneshot;

use super::{
    Command, Done, EngineLimits, Event, Failure, QueuePlace,
    prefix::{PrefixCache, SHORTEST, shared_prefix},
    scoring::{Scoring, Turn},
    sequence::{Phase, Sequence},
};
use crate::{
    base::panics::panic_text,
    batch::positions::Positions,
    processor::tokenizer::Tokenizer,
    runtime::generate::{
        backend::{AdapterId, Chunk, DecodeBackend, SlotId, StepRow, Stepped},
        drafts::{DraftCounts, Drafts, share_of_rows},
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

/// Tokens of the budget that one token takes whose logits are read.
const TOKEN_BY_TOKEN: usize = 64;

/// Rows of what is asked besides an answer, at most; and those that kept sequences give way to.
const MOST_ROWS: usize = 64;
const FEW_ROWS: usize = 8;

/// Failed device calls in a row after which the device is tried by itself.
const FAILURES: u32 = 3;

/// Clients whose last turn is remembered, at most.
const MAX_TURNS: usize = 1024;

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
    /// Turns of what is asked besides answers.
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

    /// Lets waiting sequences join while there is room.
    ///
    /// The next one is that of the client with the fewest sequences in the batch; among equals the
    /// client whose last turn is longest ago, and of its sequences the oldest. If it does not fit,
    /// nobody overtakes it: a long prompt must not wait for ever.
    fn admit(&mut self) {
        while let Some(next) = self.next_queued() {
            let Some(victims) = self.room_for(&self.queue[next].sequence) else {
                return;
            };
            let Some(Queued { mut sequence, .. }) = self.queue.remove(next) else {
                return;
            };
            victims
                .into_iter()
                .for_each(|arrived| self.preempt(arrived));
            sequence.reserved = cost_of(sequence.room());
            self.release_rows_for(sequence.reserved);
            self.evict_for(sequence.reserved);
            self.joins += 1;
            if self.turns.len() >= MAX_TURNS {
                self.turns.clear();
            }
            self.turns.insert(sequence.client, self.joins);
            self.running.push(sequence);
        }
    }

    fn next_queued(&self) -> Option<usize> {
        let mut running: HashMap<u64, usize> = HashMap::new();
        for sequence in &self.running {
            *running.entry(sequence.client).or_default() += 1;
        }
        let count = |of: &HashMap<u64, usize>, client| of.get(&client).copied().unwrap_or(0);
        self.queue
            .iter()
            .enumerate()
            .min_by_key(|(_, queued)| {
                let sequence = &queued.sequence;
                let turn = self.turns.get(&sequence.client).copied().unwrap_or(0);
                (count(&running, sequence.client), turn, sequence.arrived)
            })
            .map(|(place, _)| place)
    }

    /// Which sequences (by order of arrival) have to make way so that `next` fits; `None` when it does
    /// not fit. Only for a client that has nothing in the batch does anybody make way, and only those
    /// that have several there.
    fn room_for(&self, next: &Sequence) -> Option<Vec<u64>> {
        let mut staying: Vec<&Sequence> = self.running.iter().collect();
        let first = self.first();
        let is_new = staying.iter().all(|other| other.client != next.client);
        let mut victims = Vec::new();
        loop {
            let taken: usize = staying
                .iter()
                .map(|other| {
                    // Rows besides an answer make way for anybody, but for those of the first.
                    let reserved = match other.scoring {
                        Some(_) if Some(other.arrived) != first => cost_of(other.room()),
                        _ => other.reserved,
                    };
                    // Everybody may grow by a block before somebody has to be preempted.
                    let growth = cost_of(other.max_len()).saturating_sub(reserved);
                    reserved + growth.min(BLOCK)
                })
                .sum();
            if staying.len() < self.limits.max_running
                && taken + cost_of(next.room()) <= self.limits.cache_tokens
            {
                return Some(victims);
            }
            let victim = is_new.then(|| greediest(&staying, 2)).flatten()?;
            victims.push(staying.swap_remove(victim).arrived);
        }
    }

    /// Drops kept sequences until `tokens` more fit.
    fn evict_for(&mut self, tokens: usize) {
        let in_use = self.in_use();
        while in_use + self.prefixes.cost() + tokens > self.limits.cache_tokens {
            let evicted = self.prefixes.evict();
            if evicted.is_none() {
                return;
            }
            self.free(evicted);
        }
    }

    fn in_use(&self) -> usize {
        self.running.iter().map(|sequence| sequence.reserved).sum()
    }

    /// Gives sequences the blocks that their next token needs. When the cache is full, the youngest of
    /// the client with the most sequences is preempted; the oldest of all never is, so every answer
    /// comes to its end.
    fn grow(&mut self) {
        let mut order: Vec<u64> = self.running.iter().map(|one| one.arrived).collect();
        order.sort_unstable();
        for arrived in order {
            while let Some(place) = self.running.iter().position(|one| one.arrived == arrived) {
                let sequence = &self.running[place];
                let needed = cost_of(sequence.room());
                let more = needed.saturating_sub(sequence.reserved);
                if more == 0 {
                    break;
                }
                self.release_rows_for(more);
                if self.in_use() + more <= self.limits.cache_tokens || self.running.len() == 1 {
                    self.evict_for(more);
                    self.running[place].reserved = needed;
                    break;
                }
                let all: Vec<&Sequence> = self.running.iter().collect();
                let Some(victim) = greediest(&all, 1).map(|place| all[place].arrived) else {
                    break;
                };
                self.preempt(victim);
            }
        }
    }

    /// Puts a sequence of the batch back into the queue. What it generated stays its own; its keys and
    /// values are kept as long as there is room for them, and computed again if there is not.
    fn preempt(&mut self, arrived: u64) {
        let Some(place) = self.running.iter().position(|one| one.arrived == arrived) else {
            return;
        };
        let mut sequence = self.running.remove(place);
        if matches!(sequence.phase, Phase::Prefill(_)) {
            self.features.clear();
        }
        self.put_by(&sequence);
        let rows = sequence.scoring.as_mut().map(Scoring::restart);
        self.free(rows.into_iter().flatten());
        sequence.restart();
        self.metrics.preempted.inc();
        self.queue.push_front(Queued {
            sequence,
            _place: None,
        });
    }

    /// Number of the sequence in the batch that arrived first: it always goes on, so everything comes to its end.
    fn first(&self) -> Option<u64> {
        self.running.iter().map(|one| one.arrived).min()
    }

    /// Takes rows of what is asked besides answers away, but for those of the first sequence, until `tokens` more fit
    /// beside the sequences, if that is enough.
    fn release_rows_for(&mut self, tokens: usize) {
        let first = self.first();
        while self.in_use() + tokens > self.limits.cache_tokens {
            let youngest = self
                .running
                .iter_mut()
                .filter(|one| Some(one.arrived) != first)
                .filter(|one| one.scoring.as_ref().is_some_and(|work| work.rows() > 0))
                .max_by_key(|one| one.arrived);
            let Some(sequence) = youngest else {
                return;
            };
            let rows = sequence.scoring.as_mut().map(Scoring::release);
            sequence.reserved = cost_of(sequence.room());
            self.free(rows.into_iter().flatten());
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
                self.failures = 0;
                self.features.clear();
                let outcome = advance(&mut self.running[place], vec![Stepped::Logits(logits)]);
                self.apply_outcomes(vec![Advanced {
                    place,
                    tokens: 1,
                    rows: 1,
                    drafts: DraftCounts::default(),
                    outcome,
                }]);
                Some(tokens)
            }
            Ok((tokens, None)) => {
                self.failures = 0;
                Some(tokens)
            }
            Err(reason) => {
                log::error!("prefill failed: {reason}");
                self.failures += 1;
                self.features.clear();
                self.running[place].fail(Failure::Internal);
                self.metrics.failed.inc();
                self.drop_sequence(place);
                // A full device is the likeliest reason.
                let kept = self.prefixes.clear();
                self.free(kept);
                Some(1)
            }
        }
    }

    /// Number of tokens computed, and the logits after the prompt when that was the last of it. Its
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
            prompt.give_up_patches();
            return (0, None);
        };
        let by_token = self.running[place].wants_prompt_logits();
        let budget = if by_token { 1 } else { budget };
        let to = self.running[place].prefill_end().min(from + budget);
        let mut features = Vec::new();
        for (index, image) in prompt.images.iter().enumerate() {
            let end = image.first_token + image.tokens;
            let range = from.max(image.first_token)..to.min(end);
            if range.is_empty() {
                continue;
            }
            if !self.features.contains_key(&index) {
                let encoded = self.device.encode_image(adapter, &image.patches.get());
                self.features.insert(index, encoded);
                self.metrics.images_encoded.inc();
            }
            let of_image = range.start - image.first_token..range.end - image.first_token;
            features.push((self.features[&index].clone(), of_image));
            if to >= end {
                self.features.remove(&index);
            }
        }
        let (input_ids, positions) = self.running[place].tokens(from..to);
        let chunk = Chunk {
            input_ids: &input_ids,
            positions,
            features,
            wants_logits: by_token || to == self.running[place].len(),
        };
        let mut logits = self.device.prefill(slot, &chunk);
        if by_token {
            if let Some(logits) = &logits {
                self.running[place].take_prompt_logits(from, logits);
            }
            logits = logits.filter(|_| to == self.running[place].len());
        }
        self.metrics.prompt_tokens.inc_by((to - from) as u64);
        let phase = self.running[place].phase_after(to);
        self.running[place].phase = phase;
        if to >= prompt.len() || !matches!(phase, Phase::Prefill(_)) {
            self.features.clear();
            prompt.give_up_patches();
        }
        // A call of the device for a single token takes about as long as one for a few.
        let cost = if by_token { TOKEN_BY_TOKEN } else { to - from };
        (cost, logits)
    }

    /// Gives a sequence its slot, with as much of its prompt as is in the cache already.
    fn begin(&mut self, place: usize) -> SlotId {
        let sequence = &self.running[place];
        let (adapter, capacity) = (sequence.adapter, sequence.reserved);
        let keys = sequence.keys();
        // The last token always goes through the model: its logits are wanted.
        let usable = &keys[..keys.len() - 1];
        let shares = self.limits.prefix_cache && !sequence.wants_prompt_logits();
        let kept = if shares {
            self.prefixes.find(adapter, usable)
        } else {
            None
        };
        // A sequence still running may share more: other answers to the same question, for one.
        let live = self
            .running
            .iter()
            .filter(|other| other.adapter == adapter && shares)
            .filter_map(|other| match (other.phase, other.slot) {
                (Phase::Decode(_) | Phase::Score, Some(slot)) => {
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
        sequence.send_prompt_logprobs();
        sequence.cached_tokens.get_or_insert(shared);
        sequence.phase = sequence.phase_after(shared);
        self.metrics.cached_tokens.inc_by(shared as u64);
        if shared > 0 {
            self.metrics.prefix_hits.inc();
        }
        self.metrics.prefix_lookups.inc();
        slot
    }

    /// Lets the device start on one token more for every sequence whose prompt is through, and on tokens drafted after it as
    /// far as the step has rows to spare.
    fn begin_step(&mut self) -> Vec<StepRow> {
        let mut decoding: Vec<(&mut Sequence, SlotId, u32)> = self
            .running
            .iter_mut()
            .filter_map(|sequence| match (sequence.phase, sequence.slot) {
                (Phase::Decode(token), Some(slot)) => Some((sequence, slot, token)),
                _ => None,
            })
            .collect();
        let share = share_of_rows(self.device.cheap_rows(), decoding.len());
        // Looking up what to draft takes tens of microseconds a sequence.
        let of_sequences: Vec<Vec<StepRow>> = decoding
            .par_iter_mut()
            .map(|(sequence, slot, token)| sequence.step_rows(*slot, *token, share))
            .collect();
        let rows = of_sequences.concat();
        if !rows.is_empty() {
            let device = &mut self.device;
            // A failure comes again when the results are read, and is handled there.
            let _ = guarded(|| device.begin_step(&rows));
        }
        rows
    }

    /// Ends the step of these rows.
    fn step(&mut self, step: &[StepRow]) {
        if step.is_empty() {
            return;
        }
        let of_slots = step.chunk_by(|a, b| a.slot == b.slot);
        let device = &mut self.device;
        let computed: Vec<Result<Vec<Stepped>, Failure>> = match guarded(|| device.step(step)) {
            Ok(stepped) => {
                self.failures = 0;
                let mut stepped = stepped.into_iter();
                let of_slots = of_slots.clone();
                of_slots
                    .map(|rows| Ok(stepped.by_ref().take(rows.len()).collect()))
                    .collect()
            }
            Err(reason) => {
                log::error!("a step of {} rows failed: {reason}", step.len());
                let kept = self.prefixes.clear();
                self.free(kept);
                // Drafts can wait.
                let newest: Vec<StepRow> = of_slots.clone().map(|rows| rows[0]).collect();
                let stepped = self.step_alone(&newest).into_iter();
                stepped.map(|one| one.map(|one| vec![one])).collect()
            }
        };
        // Prompts have gone through since: places are those of now.
        let mut stepped: HashMap<SlotId, Result<Vec<Stepped>, Failure>> =
            of_slots.map(|rows| rows[0].slot).zip(computed).collect();
        let advanced: Vec<Advanced> = self
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
                let drafts = sequence.draft_counts();
                let before = sequence.generated.len();
                let rows = stepped.as_ref().map_or(0, Vec::len);
                let outcome = stepped.and_then(|stepped| advance(sequence, stepped));
                Advanced {
                    place,
                    tokens: sequence.generated.len() - before,
                    rows,
                    drafts: sequence.draft_counts().since(drafts),
                    outcome,
                }
            })
            .collect();
        for one in &advanced {
            self.metrics
                .drafted_tokens
                .inc_by(one.drafts.drafted as u64);
            self.metrics
                .accepted_tokens
                .inc_by(one.drafts.accepted as u64);
            let sequence = &self.running[one.place];
            // What was drafted wrongly goes; the newest token is not there yet.
            if let (true, true, Some(slot)) =
                (one.outcome.is_ok(), one.tokens < one.rows, sequence.slot)
            {
                let (device, held) = (&mut self.device, sequence.len() - 1);
                device.truncate(slot, held);
            }
        }
        self.apply_outcomes(advanced);
    }

    /// After a step that failed: each row by itself, so that only the guilty one ends.
    fn step_alone(&mut self, rows: &[StepRow]) -> Vec<Result<Stepped, Failure>> {
        let stepped: Vec<Result<Stepped, Failure>> = rows
            .iter()
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
            .collect();
        if stepped.iter().any(Result::is_ok) {
            self.failures = 0;
        } else {
            self.failures += 1;
        }
        stepped
    }

    /// After several failures in a row: tries one token of our own, which no request can spoil.
    ///
    /// # Errors
    /// When that fails as well.
    fn check_device(&mut self) -> Result<(), DeviceLost> {
        // A full cache would refuse the token; sequences end, and the next failure checks again.
        if self.failures < FAILURES || self.in_use() + BLOCK > self.limits.cache_tokens {
            return Ok(());
        }
        self.evict_for(BLOCK);
        let device = &mut self.device;
        let tried = guarded(|| {
            let slot = device.start(AdapterId::BASE, BLOCK);
            let mut positions = Positions::default();
            positions.push([0; 3]);
            let chunk = Chunk {
                input_ids: &[0],
                positions,
                features: Vec::new(),
                wants_logits: true,
            };
            let logits = device.prefill(slot, &chunk);
            device.free(slot);
            logits.is_some()
        });
        match tried {
            Ok(true) => {
                self.failures = 0;
                Ok(())
            }
            Ok(false) => Err(DeviceLost),
            Err(reason) => {
                log::error!(
                    "the device failed {} times in a row and does not work any more: {reason}",
                    self.failures
                );
                Err(DeviceLost)
            }
        }
    }

    /// Counts new tokens and takes sequences that are over out of the batch.
    fn apply_outcomes(&mut self, mut advanced: Vec<Advanced>) {
        let now = Instant::now();
        // From the back, so that places stay true.
        advanced.sort_by_key(|one| std::cmp::Reverse(one.place));
        for one in advanced {
            let (place, outcome) = (one.place, one.outcome);
            let sequence = &mut self.running[place];
            if outcome.is_ok() {
                self.metrics.generated_tokens.inc_by(one.tokens as u64);
                match sequence.last_token.replace(now) {
                    // Tokens of one step share its time.
                    Some(last) => (0..one.tokens).for_each(|_| {
                        self.metrics.per_token((now - last) / one.tokens as u32);
                    }),
                    None => self.metrics.first_token(now - sequence.submitted),
                }
            }
            if matches!(outcome, Ok(Some(_))) && self.limits.drafts.grow {
                self.grow_drafts(place);
            }
            let sequence = &mut self.running[place];
            match outcome {
                Ok(None) => {}
                Ok(Some(done)) => {
                    let keys = sequence.held_keys();
                    match sequence.begin_scoring(done) {
                        Ok(None) => self.fork_for_scoring(place, keys),
                        Err(failure) => {
                            sequence.fail(failure);
                            self.metrics.failed.inc();
                            self.drop_sequence(place);
                        }
                        Ok(Some(done)) => {
                            // Whoever sees the end must find it counted.
                            self.metrics.finished.inc();
                            sequence.finish(done);
                            self.retire(place);
                        }
                    }
                }
                Err(failure) => {
                    sequence.fail(failure);
                    self.metrics.failed.inc();
                    self.drop_sequence(place);
                }
            }
        }
    }

    /// Forks the prompt of a sequence whose answer is there, and keeps prompt and answer, `keys`, as any answer is kept.
    fn fork_for_scoring(&mut self, place: usize, keys: Vec<u128>) {
        let sequence = &self.running[place];
        let (adapter, needed) = (sequence.adapter, cost_of(sequence.room()));
        let (tokens, answered) = (sequence.prompt.len() - 1, sequence.slot);
        let device = &mut self.device;
        let forked = guarded(|| answered.map(|slot| device.fork(slot, tokens, needed)));
        let (Ok(Some(root)), Some(answered)) = (forked, answered) else {
            log::error!("the prompt of an answer could not be forked");
            sequence.fail(Failure::Internal);
            self.metrics.failed.inc();
            self.drop_sequence(place);
            return;
        };
        let sequence = &mut self.running[place];
        let arrived = sequence.arrived;
        sequence.slot = Some(root);
        let before = std::mem::replace(&mut sequence.reserved, needed);
        self.keep(answered, adapter, keys);
        self.release_rows_for(0);
        if self.in_use() > self.limits.cache_tokens {
            self.running[place].reserved = before;
            self.preempt(arrived);
        }
        self.evict_for(0);
    }

    /// One turn of what is asked besides answers, of the sequence whose last turn is longest ago among those that have
    /// room.
    fn score(&mut self) {
        let waiting = self.running.iter().filter_map(|one| {
            let work = one.scoring.as_ref()?;
            (one.phase == Phase::Score).then_some((work.last_turn, one.arrived))
        });
        let mut waiting: Vec<(u64, u64)> = waiting.collect();
        waiting.sort_unstable();
        let with_room = waiting
            .into_iter()
            .find_map(|(_, arrived)| Some((arrived, self.room_for_rows(arrived)?)));
        if let Some((arrived, rows)) = with_room {
            self.score_one(arrived, rows);
        }
    }

    /// One turn of one sequence, with at most `rows` rows.
    fn score_one(&mut self, arrived: u64, rows: usize) {
        let Some(place) = self.running.iter().position(|one| one.arrived == arrived) else {
            return;
        };
        self.scoring_turns += 1;
        let sequence = &mut self.running[place];
        let (root_cost, slot) = (cost_of(sequence.room()), sequence.slot);
        let (Some(work), Some(root)) = (&mut sequence.scoring, slot) else {
            return;
        };
        work.last_turn = self.scoring_turns;
        let row_cost = cost_of(work.row_len());
        let device = &mut self.device;
        let turn = guarded(|| work.turn(device, root, rows, row_cost));
        sequence.reserved = root_cost + work.rows() * row_cost;
        match turn {
            Ok(Turn::Went(tokens)) => {
                self.failures = 0;
                self.metrics.scored_tokens.inc_by(tokens as u64);
            }
            Ok(Turn::NoRoom) => {}
            Ok(Turn::Complete) => {
                let done = Done {
                    continuations: Some(work.take()),
                    ..work.done.clone()
                };
                self.metrics.scored(work.began.elapsed());
                self.metrics.finished.inc();
                sequence.finish(done);
                self.drop_sequence(place);
            }
            Ok(Turn::NotFinite) => {
                sequence.fail(Failure::NotFinite);
                self.metrics.failed.inc();
                self.drop_sequence(place);
            }
            Err(reason) => {
                log::error!("continuations of a prompt failed: {reason}");
                self.failures += 1;
                sequence.fail(Failure::Internal);
                self.metrics.failed.inc();
                self.drop_sequence(place);
                let kept = self.prefixes.clear();
                self.free(kept);
            }
        }
    }

    /// How many rows the sequence may have at once, and sets their room aside; `None` where there is none now. Kept
    /// sequences give way to a few rows only, and others in the batch to one, if this sequence came first.
    fn room_for_rows(&mut self, arrived: u64) -> Option<usize> {
        let most = self.limits.max_running.min(self.limits.prefill_chunk);
        loop {
            let place = self.running.iter().position(|one| one.arrived == arrived)?;
            let work = self.running[place].scoring.as_ref()?;
            let cost = cost_of(work.row_len());
            let there = work.rows();
            let free = self.limits.cache_tokens.saturating_sub(self.in_use());
            let unused = free.saturating_sub(self.prefixes.cost());
            let few = (free / cost).min(FEW_ROWS.saturating_sub(there));
            let more = match self.queue.is_empty() {
                true => few.max(unused / cost),
                false => few,
            };
            let rows = (there + more).min(most.clamp(1, MOST_ROWS)).max(there);
            if rows > 0 {
                self.running[place].reserved += (rows - there) * cost;
                self.evict_for(0);
                return Some(rows);
            }
            if self.running.len() == 1 {
                // More than the cache; requests are checked for that.
                log::error!("continuations of a prompt do not fit the cache");
                self.running[place].fail(Failure::Internal);
                self.metrics.failed.inc();
                self.drop_sequence(place);
                return None;
            }
            if self.first() != Some(arrived) {
                return None;
            }
            let before = self.running.len();
            self.release_rows_for(cost);
            if self.in_use() + cost > self.limits.cache_tokens {
                let all: Vec<&Sequence> = self.running.iter().collect();
                let victim = greediest(&all, 1).map(|place| all[place].arrived)?;
                self.preempt(victim);
                debug_assert!(self.running.len() < before);
            }
        }
    }

    /// Takes a finished sequence out of the batch.
    fn retire(&mut self, place: usize) {
        let sequence = self.running.remove(place);
        self.put_by(&sequence);
    }

    /// Keeps the keys and values of a sequence that has left the batch, for the next question or its
    /// own return; frees them where nothing is kept.
    fn put_by(&mut self, sequence: &Sequence) {
        let Some(slot) = sequence.slot else {
            return;
        };
        self.keep(slot, sequence.adapter, sequence.held_keys());
    }

    /// Keeps the keys and values of the tokens `keys`, or frees them where nothing is kept.
    fn keep(&mut self, slot: SlotId, adapter: AdapterId, keys: Vec<u128>) {
        let unloading = self.unloads.iter().any(|(id, _)| *id == adapter);
        if !self.limits.prefix_cache || unloading || keys.is_empty() {
            self.free(Some(slot));
            return;
        }
        let cost = cost_of(keys.len());
        let superfluous = self.prefixes.keep(slot, adapter, keys, cost);
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

/// Place of the youngest sequence of the client that has the most, `fewest` of them at least.
fn greediest(sequences: &[&Sequence], fewest: usize) -> Option<usize> {
    let count = |client| sequences.iter().filter(|one| one.client == client).count();
    (0..sequences.len())
        .map(|place| (count(sequences[place].client), place))
        .filter(|(count, _)| *count >= fewest)
        .max_by_key(|(count, place)| (*count, sequences[*place].arrived))
        .map(|(_, place)| place)
}

type Outcome = Result<Option<Done>, Failure>;

/// What a step gave a sequence.
struct Advanced {
    place: usize,
    /// New tokens, and the rows that were computed for them.
    tokens: usize,
    rows: usize,
    drafts: DraftCounts,
    outcome: Outcome,
}

fn advance(sequence: &mut Sequence, stepped: Vec<Stepped>) -> Outcome {
    guarded(|| sequence.advance_all(stepped)).unwrap_or_else(|reason| {
        log::error!("choosing a token failed: {reason}");
        Err(Failure::Internal)
    })
}

/// Runs work that may panic; a panic's first line is the error.
fn guarded<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|payload| panic_text(payload.as_ref()))
}

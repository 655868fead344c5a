//! Room in the batch and in the cache of keys and values: who joins, who grows, who makes way, what is kept.

use std::{collections::HashMap, sync::Arc};

use super::{BLOCK, Queued, Worker, cost_of};
use crate::{
    runtime::generate::backend::{AdapterId, DecodeBackend, SlotId},
    serve::engine::{
        PreparedPrompt,
        scoring::Scoring,
        sequence::{Phase, Sequence},
    },
};

/// Clients whose last turn is remembered, at most.
const MAX_TURNS: usize = 1024;

impl<D: DecodeBackend> Worker<D> {
    /// Lets waiting sequences join while there is room.
    ///
    /// The next one is that of the client with the fewest sequences in the batch; among equals the
    /// client whose last turn is longest ago, and of its sequences the oldest. If it does not fit,
    /// nobody overtakes it: a long prompt must not wait for ever.
    pub(super) fn admit(&mut self) {
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
                    // Rows of continuations make way for anybody, but for those of the first sequence.
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
    pub(super) fn evict_for(&mut self, tokens: usize) {
        let in_use = self.in_use();
        while in_use + self.prefixes.cost() + tokens > self.limits.cache_tokens {
            let evicted = self.prefixes.evict();
            if evicted.is_none() {
                return;
            }
            self.free(evicted);
        }
    }

    pub(super) fn in_use(&self) -> usize {
        self.running.iter().map(|sequence| sequence.reserved).sum()
    }

    /// Gives sequences the blocks that their next token needs. When the cache is full, the youngest of
    /// the client with the most sequences is preempted; the oldest of all never is, so every answer
    /// comes to its end.
    pub(super) fn grow(&mut self) {
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
    pub(super) fn preempt(&mut self, arrived: u64) {
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
    pub(super) fn first(&self) -> Option<u64> {
        self.running.iter().map(|one| one.arrived).min()
    }

    /// Frees rows of continuations, but for those of the first sequence, until `tokens` more fit
    /// beside the sequences, if that is enough.
    pub(super) fn release_rows_for(&mut self, tokens: usize) {
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

    /// Takes a finished sequence out of the batch.
    pub(super) fn retire(&mut self, place: usize) {
        let sequence = self.running.remove(place);
        self.put_by(&sequence);
    }

    /// Keeps the keys and values of a sequence that has left the batch, for the next question or its
    /// own return; frees them where nothing is kept.
    fn put_by(&mut self, sequence: &Sequence) {
        let Some(slot) = sequence.slot else {
            return;
        };
        let (adapter, prompt) = (sequence.adapter, sequence.prompt.clone());
        self.keep(slot, adapter, &prompt, sequence.held_keys());
    }

    /// Keeps the keys and values of the tokens `keys`, `prompt` first, or frees them where nothing is kept. Without a cache of
    /// prefixes they are kept for the other sequences of their own request, as long as one has not begun.
    pub(super) fn keep(
        &mut self,
        slot: SlotId,
        adapter: AdapterId,
        prompt: &Arc<PreparedPrompt>,
        keys: Vec<u128>,
    ) {
        let unloading = self.unloads.iter().any(|(id, _)| *id == adapter);
        let cached = self.limits.prefix_cache;
        if !(cached || self.is_awaited(Arc::as_ptr(prompt))) || unloading || keys.is_empty() {
            self.free(Some(slot));
            return;
        }
        let cost = cost_of(keys.len());
        let only = (!cached).then(|| Arc::downgrade(prompt));
        let superfluous = self.prefixes.keep(slot, adapter, keys, cost, only);
        self.free(superfluous);
    }

    /// Whether a sequence of this prompt has not begun.
    fn is_awaited(&self, prompt: *const PreparedPrompt) -> bool {
        let waiting = self.queue.iter().map(|queued| &queued.sequence);
        let mut waiting = waiting.chain(self.running.iter().filter(|one| one.slot.is_none()));
        waiting.any(|one| std::ptr::eq(Arc::as_ptr(&one.prompt), prompt))
    }

    /// Frees what was kept for sequences of one request that have all begun.
    pub(super) fn free_unawaited(&mut self) {
        if self.limits.prefix_cache || self.prefixes.len() == 0 {
            return;
        }
        let mut prefixes = std::mem::take(&mut self.prefixes);
        let freed = prefixes.evict_unawaited(|only| self.is_awaited(only.as_ptr()));
        self.prefixes = prefixes;
        self.free(freed);
    }
}

/// Place of the youngest sequence of the client that has the most, `fewest` of them at least.
pub(super) fn greediest(sequences: &[&Sequence], fewest: usize) -> Option<usize> {
    let count = |client| sequences.iter().filter(|one| one.client == client).count();
    (0..sequences.len())
        .map(|place| (count(sequences[place].client), place))
        .filter(|(count, _)| *count >= fewest)
        .max_by_key(|(count, place)| (*count, sequences[*place].arrived))
        .map(|(_, place)| place)
}

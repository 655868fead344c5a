//! Continuations of a prompt whose answer is there, a turn at a time in the rows that are free.

use super::{Worker, cost_of, guarded, room::greediest};
use crate::{
    runtime::generate::backend::DecodeBackend,
    serve::engine::{
        Done, Failure,
        scoring::Turn,
        sequence::{Phase, Sequence},
    },
};

/// Most rows of continuations at once, and how many of them evict kept sequences.
const MOST_ROWS: usize = 64;

const FEW_ROWS: usize = 8;

impl<D: DecodeBackend> Worker<D> {
    /// Forks the prompt of a sequence whose answer is there, and keeps prompt and answer, `keys`, as any answer is kept.
    pub(super) fn fork_for_scoring(&mut self, place: usize, keys: Vec<u128>) {
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
        let prompt = sequence.prompt.clone();
        self.keep(answered, adapter, &prompt, keys);
        self.release_rows_for(0);
        if self.in_use() > self.limits.cache_tokens {
            self.running[place].reserved = before;
            self.preempt(arrived);
        }
        self.evict_for(0);
    }

    /// One turn of continuations, of the sequence whose last turn is longest ago among those that have
    /// room.
    pub(super) fn score(&mut self) {
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
}

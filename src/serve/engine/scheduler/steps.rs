//! The device's calls for answers: prompts in chunks, one token more for each sequence of the batch, and what comes of them.

use std::{collections::HashMap, sync::Arc, time::Instant};

use rayon::prelude::*;

use super::{BLOCK, DeviceLost, Worker, guarded};
use crate::{
    batch::positions::Positions,
    runtime::generate::{
        backend::{AdapterId, Chunk, DecodeBackend, SlotId, StepRow, Stepped},
        drafts::{DraftCounts, share_of_rows},
    },
    serve::engine::{
        Done, Failure,
        prefix::{SHORTEST, shared_prefix},
        sequence::{Phase, Sequence},
    },
};

/// Tokens of the budget that one token takes whose logits are read.
const TOKEN_BY_TOKEN: usize = 64;

/// Failed device calls in a row after which the device is tried by itself.
const FAILURES: u32 = 3;

type Outcome = Result<Option<Done>, Failure>;

impl<D: DecodeBackend> Worker<D> {
    /// Puts as many tokens of prompts through the model as go between two steps, oldest prompt first.
    pub(super) fn prefill(&mut self) {
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
        let prompt = sequence.prompt.clone();
        let shares = !sequence.wants_prompt_logits();
        let kept = if shares {
            self.prefixes.find(adapter, &prompt, usable)
        } else {
            None
        };
        // Without a cache of prefixes the sequences of one request still share theirs: its image is encoded once.
        let shares_all = self.limits.prefix_cache;
        let shares_with = |other: &Sequence| shares_all || Arc::ptr_eq(&other.prompt, &prompt);
        // A sequence still running may share more: other answers to the same question, for one.
        let live = self
            .running
            .iter()
            .filter(|other| other.adapter == adapter && shares && shares_with(other))
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
    pub(super) fn begin_step(&mut self) -> Vec<StepRow> {
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
    pub(super) fn step(&mut self, step: &[StepRow]) {
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
    pub(super) fn check_device(&mut self) -> Result<(), DeviceLost> {
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
}

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

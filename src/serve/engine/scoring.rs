//! Continuations of a prompt besides its answer: their log-probabilities; they share the prompt's keys and
//! values.
//!
//! The rows of this work are forks of the prompt's slot, so the prompt goes through the model once. They go in steps of
//! their own, one a turn of the worker: the batch of the others is made up as if they were not there.

use std::{sync::Arc, time::Instant};

use super::Done;
use crate::{
    batch::positions::Positions,
    runtime::generate::backend::{Chunk, DecodeBackend, Pick, SlotId, StepRow, Stepped},
};

/// Tokens between a prompt and its continuations, and after how many of them these are put.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// The tokens.
    pub tokens: Vec<u32>,
    /// Ends in `tokens`, rising; at least one.
    pub ends: Vec<usize>,
}

/// Finds places for continuations in the text of an answer, or says why there are none.
pub type FindPlaces = Box<dyn FnOnce(&str) -> Result<Places, String> + Send>;

/// Continuations of a prompt whose log-probabilities are wanted when its answer is there.
pub struct Continuations {
    /// Their tokens; none is empty.
    pub tokens: Arc<Vec<Vec<u32>>>,
    /// Where they are put, given the text of the answer; or why that cannot be said, for the log.
    pub places: FindPlaces,
}

/// A continuation on its way.
struct Row {
    continuation: usize,
    slot: SlotId,
    /// Tokens of it in the slot.
    fed: usize,
}

/// Continuations of one prompt, as far as they are.
pub(super) struct Scoring {
    continuations: Arc<Vec<Vec<u32>>>,
    places: Places,
    /// The prompt's last token, with which the tokens after it begin.
    last: u32,
    /// Tokens of the prompt before that one.
    prompt: usize,
    delta: i64,
    /// Tokens in the slot that rows are forked from.
    held: usize,
    /// The next continuation of the current place.
    next: usize,
    rows: Vec<Row>,
    /// `[place][continuation][token]`; the last place is the current one.
    found: Vec<Vec<Vec<f32>>>,
    /// The end of the answer, which waits for this.
    pub(super) done: Done,
    pub(super) began: Instant,
    /// Number of its last turn among all.
    pub(super) last_turn: u64,
}

/// What a turn came to.
pub(super) enum Turn {
    /// Tokens went through the model.
    Went(usize),
    /// There was no room for a row.
    NoRoom,
    /// The model answers with NaN.
    NotFinite,
    /// All is there.
    Complete,
}

impl Scoring {
    /// `prompt` are its tokens; `delta` the position after it less their number.
    ///
    /// # Panics
    /// If the prompt is empty.
    pub(super) fn new(
        continuations: Arc<Vec<Vec<u32>>>,
        places: Places,
        prompt: &[u32],
        delta: i64,
        done: Done,
    ) -> Self {
        let before = prompt.len() - 1;
        Self {
            continuations,
            places,
            last: prompt[before],
            prompt: before,
            delta,
            held: before,
            next: 0,
            rows: Vec::new(),
            found: Vec::new(),
            done,
            began: Instant::now(),
            last_turn: 0,
        }
    }

    /// Tokens that the slot of the prompt holds at most.
    pub(super) fn root_len(&self) -> usize {
        self.prompt + 1 + self.places.tokens.len()
    }

    /// Tokens that a row holds at most.
    pub(super) fn row_len(&self) -> usize {
        let longest = self.continuations.iter().map(Vec::len).max();
        self.root_len() + longest.unwrap_or(0)
    }

    /// Tokens after the prompt that its slot holds; `None` where the prompt's own last token is not there yet.
    pub(super) fn held_after_prompt(&self) -> Option<&[u32]> {
        let after = self.held.checked_sub(self.prompt + 1)?;
        Some(&self.places.tokens[..after])
    }

    /// Rows under way.
    pub(super) fn rows(&self) -> usize {
        self.rows.len()
    }

    /// Gives up the rows and begins again from a slot that holds the prompt but for its last token. What is complete
    /// stays.
    pub(super) fn restart(&mut self) -> Vec<SlotId> {
        self.held = self.prompt;
        self.release()
    }

    /// Gives up the rows; their continuations begin again.
    pub(super) fn release(&mut self) -> Vec<SlotId> {
        self.next = 0;
        let rows = std::mem::take(&mut self.rows);
        if let Some(found) = self.found.last_mut() {
            // The first token is read off the prompt's slot.
            rows.iter()
                .for_each(|row| found[row.continuation].truncate(1));
        }
        rows.into_iter().map(|row| row.slot).collect()
    }

    /// The log-probabilities, once all are there.
    pub(super) fn take(&mut self) -> Vec<Vec<Vec<f32>>> {
        std::mem::take(&mut self.found)
    }

    /// Places that are complete.
    fn place(&self) -> usize {
        let whole = |found: &Vec<Vec<f32>>| {
            let all = found.iter().zip(self.continuations.iter());
            all.into_iter()
                .all(|(found, tokens)| found.len() == tokens.len())
        };
        self.found.iter().take_while(|found| whole(found)).count()
    }

    /// One turn: the prompt's slot goes on to the next place, or rows go on by a token. `rows` are allowed at once, each
    /// in a slot of `capacity` tokens.
    pub(super) fn turn<D: DecodeBackend>(
        &mut self,
        device: &mut D,
        root: SlotId,
        rows: usize,
        capacity: usize,
    ) -> Turn {
        let place = self.place();
        if place == self.places.ends.len() {
            return Turn::Complete;
        }
        let end = self.prompt + 1 + self.places.ends[place];
        if self.found.len() == place || self.held < end {
            return self.advance_root(device, root, place, end);
        }
        while self.rows.len() < rows {
            let incomplete = |at: &usize| {
                let tokens = self.continuations[*at].len();
                self.found[place][*at].len() < tokens
            };
            let Some(at) = (self.next..self.continuations.len()).find(incomplete) else {
                break;
            };
            self.next = at + 1;
            self.rows.push(Row {
                continuation: at,
                slot: device.fork(root, end, capacity),
                fed: 0,
            });
        }
        if self.rows.is_empty() {
            return Turn::NoRoom;
        }
        self.step_rows(device, place, end)
    }

    /// Puts the tokens before the next place through, and reads how likely each continuation begins there.
    fn advance_root<D: DecodeBackend>(
        &mut self,
        device: &mut D,
        root: SlotId,
        place: usize,
        end: usize,
    ) -> Turn {
        self.next = 0;
        let token = |at: usize| match at.checked_sub(self.prompt + 1) {
            Some(after) => self.places.tokens[after],
            None => self.last,
        };
        let tokens: Vec<u32> = (self.held..end).map(token).collect();
        let Some((last, before)) = tokens.split_last() else {
            // Two places at one end.
            if let Some(found) = self.found.last().cloned() {
                self.found.push(found);
            }
            return Turn::Went(0);
        };
        if !before.is_empty() {
            let mut positions = Positions::default();
            for at in self.held..end - 1 {
                positions.push([at as i64 + self.delta; 3]);
            }
            let chunk = Chunk {
                input_ids: before,
                positions,
                features: Vec::new(),
                wants_logits: false,
            };
            let _ = device.prefill(root, &chunk);
        }
        let row = StepRow {
            slot: root,
            token: *last,
            position: (end - 1) as i64 + self.delta,
            pick: Pick::Logits,
        };
        let stepped = device.step(std::slice::from_ref(&row)).pop();
        let went = tokens.len();
        self.held = end;
        let Some(likely) = stepped.and_then(LogSoftmax::of) else {
            return Turn::NotFinite;
        };
        if self.found.len() == place {
            let first = |tokens: &Vec<u32>| vec![likely.of_token(tokens[0])];
            self.found
                .push(self.continuations.iter().map(first).collect());
        }
        Turn::Went(went)
    }

    fn step_rows<D: DecodeBackend>(&mut self, device: &mut D, place: usize, end: usize) -> Turn {
        let step: Vec<StepRow> = self
            .rows
            .iter()
            .map(|row| StepRow {
                slot: row.slot,
                token: self.continuations[row.continuation][row.fed],
                position: (end + row.fed) as i64 + self.delta,
                pick: Pick::Logits,
            })
            .collect();
        let stepped = device.step(&step);
        for (row, stepped) in self.rows.iter_mut().zip(stepped) {
            let Some(likely) = LogSoftmax::of(stepped) else {
                return Turn::NotFinite;
            };
            row.fed += 1;
            let next = self.continuations[row.continuation][row.fed];
            self.found[place][row.continuation].push(likely.of_token(next));
        }
        let over = |row: &Row| row.fed + 1 == self.continuations[row.continuation].len();
        let (over, going): (Vec<Row>, Vec<Row>) =
            std::mem::take(&mut self.rows).into_iter().partition(over);
        self.rows = going;
        over.into_iter().for_each(|row| device.free(row.slot));
        Turn::Went(step.len())
    }
}

/// Logits with what makes log-probabilities of them.
struct LogSoftmax {
    logits: Vec<f32>,
    log_sum: f64,
}

impl LogSoftmax {
    /// `None` where the logits are not numbers.
    fn of(stepped: Stepped) -> Option<Self> {
        let Stepped::Logits(logits) = stepped else {
            return None;
        };
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|l| f64::from(*l - max).exp()).sum();
        let log_sum = f64::from(max) + sum.ln();
        log_sum.is_finite().then_some(Self { logits, log_sum })
    }

    fn of_token(&self, token: u32) -> f32 {
        let logit = self.logits.get(token as usize).copied();
        (f64::from(logit.unwrap_or(f32::NEG_INFINITY)) - self.log_sum) as f32
    }
}

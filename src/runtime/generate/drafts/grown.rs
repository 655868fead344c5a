//! Texts that were written lately, of bounded number, beside a store that is read.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::index::{Continuation, SuffixIndex};

/// Tokens kept at most; with their index 8 bytes each. The oldest texts go first.
const MOST_TOKENS: usize = 1 << 18;

/// The index is made again when this share of its texts is new.
const SHARE: usize = 8;

/// Texts that are drafted from as they come; cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Grown {
    state: Arc<Mutex<State>>,
}

#[derive(Debug, Default)]
struct State {
    texts: VecDeque<Vec<u32>>,
    tokens: usize,
    /// Texts that came since the index was made.
    fresh: usize,
    index: Arc<SuffixIndex>,
    /// Whether a thread makes one.
    busy: bool,
}

impl Grown {
    /// A panic while the lock is held leaves a consistent state, so a poisoned lock is used.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a text that was written to its end. The index is made on rayon's threads, so that nobody waits.
    pub fn add(&self, text: &[u32]) {
        let mut state = self.state();
        if text.is_empty() || text.len() > MOST_TOKENS / 2 {
            return;
        }
        state.tokens += text.len();
        state.texts.push_back(text.to_vec());
        state.fresh += 1;
        while state.tokens > MOST_TOKENS {
            state.tokens -= state.texts.pop_front().map_or(0, |oldest| oldest.len());
        }
        if state.busy || state.fresh * SHARE < state.texts.len() {
            return;
        }
        state.busy = true;
        state.fresh = 0;
        let texts: Vec<Vec<u32>> = state.texts.iter().cloned().collect();
        drop(state);
        let this = self.clone();
        rayon::spawn(move || {
            let index = SuffixIndex::new(texts.iter().map(Vec::as_slice));
            let mut state = this.state();
            state.index = Arc::new(index);
            state.busy = false;
        });
    }

    /// As [`SuffixIndex::continuation`].
    pub(super) fn continuation(&self, context: &[u32]) -> Option<Continuation> {
        let index = self.state().index.clone();
        index.continuation(context)
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{super::index::START, *};

    fn settled(grown: &Grown) {
        let started = Instant::now();
        while grown.state().busy {
            assert!(started.elapsed() < Duration::from_secs(60), "no index yet");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn what_was_written_is_drafted_and_the_oldest_forgotten() {
        let grown = Grown::default();
        assert_eq!(grown.continuation(&[START]), None);
        grown.add(&[5, 6, 7]);
        settled(&grown);
        let next = grown.continuation(&[START, 5]).unwrap();
        assert_eq!((next.token, next.matched), (6, 2));
        // Two texts of half the room each push it out.
        let long: Vec<u32> = (100..100 + (MOST_TOKENS / 2) as u32).collect();
        for _ in 0..2 {
            grown.add(&long);
            settled(&grown);
        }
        assert_eq!(grown.continuation(&[START, 5, 6]), None);
        assert!(grown.state().tokens <= MOST_TOKENS);
        assert_eq!(grown.continuation(&[150]).unwrap().token, 151);
        // A text as long as all that is kept would push out everything else.
        grown.add(&vec![1; MOST_TOKENS]);
        assert_eq!(grown.state().texts.len(), 2);
    }
}

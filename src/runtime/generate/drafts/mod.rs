//! Drafted ("speculative") decoding without a second model.
//!
//! A [`Drafter`] proposes the tokens that may follow; one step of the model computes what follows each of them, and
//! those before the first wrong one are kept, with the model's own choice after them. A row is chosen with the sequence's
//! own settings and its own random number, exactly as without drafts, and a drafted token is kept only where it is what was
//! chosen: so a draft changes how many tokens a step gives, never which.
//!
//! Source: Leviathan, Kalman, Matias 2023, "Fast inference from transformers via speculative decoding"; drafts out of
//! stored texts: He et al. 2024, "REST: retrieval-based speculative decoding"; out of the prompt: Saxena 2023, "Prompt lookup
//! decoding"; how far to go: Oliaro et al. 2025, "SuffixDecoding".

mod drafters;
mod file;
mod grown;
mod index;
mod session;

use std::{fmt::Debug, sync::Arc};

pub use file::{DRAFTS_FILE, DraftStore, DraftsError};
pub use grown::Grown;
pub use session::{DraftCounts, DraftSession, replay, share_of_rows};

/// Tokens drafted for a sequence in one step, by default at most: with the newest one a step of eight rows, which on a GPU
/// takes hardly longer than one of two.
pub const MOST_DRAFTED: usize = 7;

/// A sequence as a drafter sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceText<'a> {
    /// Tokens of the prompt.
    pub prompt: &'a [u32],
    /// Tokens of the answer so far.
    pub answer: &'a [u32],
}

/// Tokens that may follow.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Draft {
    /// In order; none where nothing is known.
    pub tokens: Vec<u32>,
    /// Tokens before them that the drafter knew: of several drafts the one that knew most is taken.
    pub matched: usize,
}

/// Proposes tokens for one sequence. What it proposes changes the speed alone, so it may be anything: texts as here, or a
/// head that was trained for it.
pub trait Drafter: Send {
    /// At most `most` tokens that may follow.
    fn draft(&mut self, text: SequenceText<'_>, most: usize) -> Draft;
}

/// Drafters besides those of this module, one for each sequence.
pub trait DrafterSource: Debug + Send + Sync {
    /// For a sequence that begins.
    fn drafter(&self) -> Box<dyn Drafter>;
}

/// What sequences are drafted from; cheap to clone.
#[derive(Debug, Clone)]
pub struct Drafts {
    /// Texts that are read.
    pub store: Option<Arc<DraftStore>>,
    /// Texts that were written by this process.
    pub grown: Option<Grown>,
    /// Drafters of the caller's own.
    pub source: Option<Arc<dyn DrafterSource>>,
    /// Tokens drafted for a sequence in one step, at most.
    pub most: usize,
}

impl Default for Drafts {
    /// From the sequence itself alone.
    fn default() -> Self {
        Self {
            store: None,
            grown: None,
            source: None,
            most: MOST_DRAFTED,
        }
    }
}

/// Stores are the same where they are one.
impl PartialEq for Drafts {
    fn eq(&self, other: &Self) -> bool {
        let same = match (&self.store, &other.store) {
            (Some(one), Some(other)) => Arc::ptr_eq(one, other),
            (one, other) => one.is_none() && other.is_none(),
        };
        let own = [&self.source, &other.source].map(Option::is_some);
        let grown = [&self.grown, &other.grown].map(Option::is_some);
        same && self.most == other.most && own[0] == own[1] && grown[0] == grown[1]
    }
}

impl Drafts {
    /// Drafts from a store.
    pub fn from_store(store: DraftStore) -> Self {
        Self {
            store: Some(Arc::new(store)),
            ..Self::default()
        }
    }
}

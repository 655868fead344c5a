//! What the worker drafts tokens from: stores beside adapters, and answers that have come to their end.

use std::path::Path;

use super::Worker;
use crate::{
    runtime::generate::{
        backend::{AdapterId, DecodeBackend},
        drafts::{DRAFTS_FILE, DraftSession, DraftStore, Drafts, Grown},
    },
    serve::engine::Submission,
};

impl<D: DecodeBackend> Worker<D> {
    /// What an adapter is drafted for from; where answers are added, even without a store.
    pub(super) fn set_drafts(&mut self, adapter: AdapterId, drafts: Option<Drafts>) {
        let grows = self.limits.drafts.grow;
        let Some(mut drafts) = drafts.or_else(|| grows.then(Drafts::default)) else {
            return;
        };
        // Adapters write differently.
        drafts.grown = grows.then(Grown::default);
        self.drafts.insert(adapter, drafts);
    }

    /// Takes the store in an adapter's folder, or that of all.
    pub(super) fn find_drafts(&mut self, adapter: AdapterId, dir: &Path) {
        let settings = self.limits.drafts.clone();
        if !settings.beside_adapters {
            self.set_drafts(adapter, settings.base);
            return;
        }
        let path = dir.join(DRAFTS_FILE);
        let store = path
            .is_file()
            .then(|| DraftStore::load(&path, &self.tokenizer));
        let drafts = match store {
            None => None,
            Some(Ok(store)) => {
                log::info!("tokens are drafted from `{}`", path.display());
                Some(Drafts {
                    most: settings.most,
                    ..Drafts::from_store(store)
                })
            }
            // Answers are the same without.
            Some(Err(error)) => {
                log::warn!("nothing is drafted: {error}");
                None
            }
        };
        self.set_drafts(adapter, drafts);
    }

    /// The drafts of a sequence, if there is something to draft from.
    pub(super) fn draft_session(&self, submission: &Submission) -> Option<DraftSession> {
        let drafts = self.drafts.get(&submission.adapter).cloned();
        let expected = !submission.prediction.is_empty();
        let drafts = drafts.or_else(|| expected.then(Drafts::default))?;
        Some(DraftSession::new(
            &drafts,
            &submission.prediction,
            self.vocab,
        ))
    }

    /// Adds the answer of a sequence that has come to its end.
    pub(super) fn grow_drafts(&mut self, place: usize) {
        let sequence = &self.running[place];
        let drafts = self.drafts.get(&sequence.adapter);
        if let Some(grown) = drafts.and_then(|drafts| drafts.grown.as_ref()) {
            grown.add(&sequence.generated);
        }
    }
}

//! Finished sequences that are still in the cache, so that a prompt with the same beginning goes on
//! from there: the second question about an image needs neither the vision tower nor the image's tokens.

use std::sync::{Arc, Weak};

use super::PreparedPrompt;
use crate::runtime::generate::backend::{AdapterId, SlotId};

/// Fewest tokens worth being taken over.
pub(super) const SHORTEST: usize = 16;

/// One kept sequence.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) slot: SlotId,
    pub(super) adapter: AdapterId,
    /// Keys of the tokens held.
    pub(super) keys: Vec<u128>,
    /// What it takes of the cache's budget, in tokens.
    pub(super) cost: usize,
    /// The request that alone may go on from it; `None` where every one may.
    only: Option<Weak<PreparedPrompt>>,
    last_used: u64,
}

/// The kept sequences, in no order.
#[derive(Debug, Default)]
pub(super) struct PrefixCache {
    kept: Vec<Kept>,
    clock: u64,
}

impl PrefixCache {
    /// Tokens of the budget in use.
    pub(super) fn cost(&self) -> usize {
        self.kept.iter().map(|kept| kept.cost).sum()
    }

    /// Number of kept sequences.
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    /// The sequence that shares the longest beginning with `keys`, the keys of `prompt` at first, and that number of tokens.
    pub(super) fn find(
        &mut self,
        adapter: AdapterId,
        prompt: &Arc<PreparedPrompt>,
        keys: &[u128],
    ) -> Option<(SlotId, usize)> {
        let may = |only: &Weak<PreparedPrompt>| std::ptr::eq(only.as_ptr(), Arc::as_ptr(prompt));
        let (best, shared) = self
            .kept
            .iter_mut()
            .filter(|kept| kept.adapter == adapter && kept.only.as_ref().is_none_or(may))
            .map(|kept| {
                let shared = shared_prefix(&kept.keys, keys);
                (kept, shared)
            })
            .max_by_key(|(kept, shared)| (*shared, kept.last_used))?;
        if shared < SHORTEST {
            return None;
        }
        self.clock += 1;
        best.last_used = self.clock;
        Some((best.slot, shared))
    }

    /// Keeps a sequence, for all prompts or for `only` one; gives the slots of those that it makes superfluous.
    pub(super) fn keep(
        &mut self,
        slot: SlotId,
        adapter: AdapterId,
        keys: Vec<u128>,
        cost: usize,
        only: Option<Weak<PreparedPrompt>>,
    ) -> Vec<SlotId> {
        let is_same = |other: &Option<Weak<PreparedPrompt>>| match (&only, other) {
            (Some(only), Some(other)) => only.ptr_eq(other),
            (only, other) => only.is_none() && other.is_none(),
        };
        let superfluous = self.take(|kept| {
            kept.adapter == adapter && is_same(&kept.only) && keys.starts_with(&kept.keys)
        });
        self.clock += 1;
        self.kept.push(Kept {
            slot,
            adapter,
            keys,
            cost,
            only,
            last_used: self.clock,
        });
        superfluous
    }

    /// Gives up the sequence that was not used for longest.
    pub(super) fn evict(&mut self) -> Option<SlotId> {
        let oldest = self
            .kept
            .iter()
            .enumerate()
            .min_by_key(|(_, kept)| kept.last_used)
            .map(|(place, _)| place)?;
        Some(self.kept.swap_remove(oldest).slot)
    }

    /// Gives up all sequences of one adapter.
    pub(super) fn evict_adapter(&mut self, adapter: AdapterId) -> Vec<SlotId> {
        self.take(|kept| kept.adapter == adapter)
    }

    /// Gives up what only one request may go on from, where `awaits` says of it that it does not.
    pub(super) fn evict_unawaited(
        &mut self,
        awaits: impl Fn(&Weak<PreparedPrompt>) -> bool,
    ) -> Vec<SlotId> {
        self.take(|kept| kept.only.as_ref().is_some_and(|only| !awaits(only)))
    }

    /// Gives up everything.
    pub(super) fn clear(&mut self) -> Vec<SlotId> {
        self.take(|_| true)
    }

    fn take(&mut self, wanted: impl Fn(&Kept) -> bool) -> Vec<SlotId> {
        let (gone, stays) = std::mem::take(&mut self.kept).into_iter().partition(wanted);
        self.kept = stays;
        let gone: Vec<Kept> = gone;
        gone.into_iter().map(|kept| kept.slot).collect()
    }
}

/// Tokens at the beginning of both.
pub(super) fn shared_prefix(a: &[u128], b: &[u128]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompt() -> Arc<PreparedPrompt> {
        Arc::new(PreparedPrompt {
            input_ids: Vec::new(),
            positions: Default::default(),
            delta: 0,
            images: Vec::new(),
            keys: Vec::new(),
            patch_memory: Default::default(),
            memory: None,
            remarks: Vec::new(),
        })
    }

    #[test]
    fn what_is_kept_for_one_request_is_found_by_no_other() {
        let (mut cache, asked, other) = (PrefixCache::default(), prompt(), prompt());
        let only = Some(Arc::downgrade(&asked));
        cache.keep(SlotId(1), AdapterId::BASE, keys(0..20), 256, only);
        let longer = cache.keep(SlotId(2), AdapterId::BASE, keys(0..40), 256, None);
        assert!(longer.is_empty(), "that of the request stays");
        assert_eq!(cache.evict_unawaited(|_| true), []);
        cache.evict_adapter(AdapterId(9));
        let found =
            |cache: &mut PrefixCache, asked| cache.find(AdapterId::BASE, asked, &keys(0..20));
        assert!(found(&mut cache, &asked).is_some());
        assert_eq!(found(&mut cache, &other), Some((SlotId(2), 20)));
        assert_eq!(cache.evict_unawaited(|_| false), [SlotId(1)]);
        assert_eq!(cache.len(), 1);
    }

    fn keys(range: std::ops::Range<u128>) -> Vec<u128> {
        range.collect()
    }

    #[test]
    fn the_longest_beginning_of_the_same_adapter_wins() {
        let (mut cache, asked) = (PrefixCache::default(), prompt());
        let other = AdapterId(7);
        cache.keep(SlotId(1), AdapterId::BASE, keys(0..20), 256, None);
        cache.keep(
            SlotId(2),
            AdapterId::BASE,
            [keys(0..30), keys(90..99)].concat(),
            256,
            None,
        );
        cache.keep(SlotId(3), other, keys(0..100), 256, None);
        assert_eq!(
            cache.find(AdapterId::BASE, &asked, &keys(0..50)),
            Some((SlotId(2), 30))
        );
        assert_eq!(
            cache.find(other, &asked, &keys(0..50)),
            Some((SlotId(3), 50))
        );
        assert_eq!(cache.find(AdapterId::BASE, &asked, &keys(5..50)), None);
    }

    #[test]
    fn the_least_used_goes_first_and_a_longer_one_replaces_its_beginning() {
        let (mut cache, asked) = (PrefixCache::default(), prompt());
        cache.keep(SlotId(1), AdapterId::BASE, keys(0..20), 256, None);
        cache.keep(SlotId(2), AdapterId::BASE, keys(100..120), 256, None);
        assert!(cache.find(AdapterId::BASE, &asked, &keys(0..20)).is_some());
        assert_eq!(
            cache.keep(SlotId(3), AdapterId::BASE, keys(0..40), 256, None),
            [SlotId(1)]
        );
        assert_eq!(cache.cost(), 512);
        assert_eq!(cache.evict(), Some(SlotId(2)));
        assert_eq!(cache.evict(), Some(SlotId(3)));
        assert_eq!(cache.evict(), None);
    }
}

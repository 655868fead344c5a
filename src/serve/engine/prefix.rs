//! Finished sequences that are still in the cache, so that a prompt with the same beginning goes on
//! from there: the second question about an image needs neither the vision tower nor the image's tokens.

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

    /// The sequence that shares the longest beginning with `keys`, and that number of tokens.
    pub(super) fn find(&mut self, adapter: AdapterId, keys: &[u128]) -> Option<(SlotId, usize)> {
        let (best, shared) = self
            .kept
            .iter_mut()
            .filter(|kept| kept.adapter == adapter)
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

    /// Keeps a sequence; gives the slots of those that it makes superfluous.
    pub(super) fn keep(
        &mut self,
        slot: SlotId,
        adapter: AdapterId,
        keys: Vec<u128>,
        cost: usize,
    ) -> Vec<SlotId> {
        let superfluous = self.take(|kept| kept.adapter == adapter && keys.starts_with(&kept.keys));
        self.clock += 1;
        self.kept.push(Kept {
            slot,
            adapter,
            keys,
            cost,
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

    fn keys(range: std::ops::Range<u128>) -> Vec<u128> {
        range.collect()
    }

    #[test]
    fn the_longest_beginning_of_the_same_adapter_wins() {
        let mut cache = PrefixCache::default();
        let other = AdapterId(7);
        cache.keep(SlotId(1), AdapterId::BASE, keys(0..20), 256);
        cache.keep(
            SlotId(2),
            AdapterId::BASE,
            [keys(0..30), keys(90..99)].concat(),
            256,
        );
        cache.keep(SlotId(3), other, keys(0..100), 256);
        assert_eq!(
            cache.find(AdapterId::BASE, &keys(0..50)),
            Some((SlotId(2), 30))
        );
        assert_eq!(cache.find(other, &keys(0..50)), Some((SlotId(3), 50)));
        assert_eq!(cache.find(AdapterId::BASE, &keys(5..50)), None);
    }

    #[test]
    fn the_least_used_goes_first_and_a_longer_one_replaces_its_beginning() {
        let mut cache = PrefixCache::default();
        cache.keep(SlotId(1), AdapterId::BASE, keys(0..20), 256);
        cache.keep(SlotId(2), AdapterId::BASE, keys(100..120), 256);
        assert!(cache.find(AdapterId::BASE, &keys(0..20)).is_some());
        assert_eq!(
            cache.keep(SlotId(3), AdapterId::BASE, keys(0..40), 256),
            [SlotId(1)]
        );
        assert_eq!(cache.cost(), 512);
        assert_eq!(cache.evict(), Some(SlotId(2)));
        assert_eq!(cache.evict(), Some(SlotId(3)));
        assert_eq!(cache.evict(), None);
    }
}

//! A suffix array over the token ids of texts: what followed the longest known end of a context, and how often.
//!
//! Source: Manber and Myers 1993, "Suffix arrays: a new method for on-line string searches".

use rayon::prelude::*;

/// Stands before every text and after the last one; no token has this id.
pub(super) const START: u32 = u32::MAX;

/// Longest context that is looked up, in tokens. On held-out reports of OpenI-zh longer ones draft no better.
pub(super) const LONGEST_CONTEXT: usize = 8;

/// Places of a context that are looked at, at most, evenly spread: a comma has a fifth of all.
const MOST_PLACES: usize = 256;

/// What most often followed a context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Continuation {
    pub(super) token: u32,
    /// Tokens of the context that it is known after.
    pub(super) matched: usize,
    /// Times it followed, of the places that were looked at.
    pub(super) count: usize,
    pub(super) of: usize,
}

/// Texts and the order of their suffixes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct SuffixIndex {
    /// `START text START text … START`.
    pub(super) text: Vec<u32>,
    /// Places in `text`, sorted by the tokens that begin there: the first `LONGEST_CONTEXT + 1` tokens, then the place.
    pub(super) order: Vec<u32>,
}

impl SuffixIndex {
    /// Whether an index can hold `texts` texts of so many `tokens` together: its places are 32 bits wide.
    pub(super) fn holds(texts: usize, tokens: usize) -> bool {
        // Each text has its `START`, and the last one another after it.
        u32::try_from(tokens.saturating_add(texts).saturating_add(1)).is_ok()
    }

    /// The index of some texts; empty ones are left out.
    ///
    /// # Panics
    /// If the texts are more than it [holds](Self::holds), or a token is `START`.
    pub(super) fn new<'a>(texts: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut text = Vec::new();
        for one in texts.into_iter().filter(|one| !one.is_empty()) {
            assert!(!one.contains(&START), "{START} is no token");
            text.push(START);
            text.extend_from_slice(one);
        }
        if !text.is_empty() {
            text.push(START);
        }
        let places = u32::try_from(text.len()).expect("the caller counts the tokens");
        let mut order: Vec<u32> = (0..places).collect();
        order.par_sort_unstable_by(|a, b| {
            let [left, right] = [a, b].map(|place| head(&text, *place, LONGEST_CONTEXT + 1));
            left.cmp(right).then(a.cmp(b))
        });
        Self { text, order }
    }

    /// What most often followed the longest known end of `context`, which is [`START`] and a text's first tokens, or
    /// the last tokens of a longer one; `None` where not even the last token is known. Of equals the lower id.
    pub(super) fn continuation(&self, context: &[u32]) -> Option<Continuation> {
        let longest = context.len().min(LONGEST_CONTEXT);
        let end_of = |matched: usize| &context[context.len() - matched..];
        // Whoever knows an end knows every shorter one.
        let (mut known, mut unknown) = (0, longest + 1);
        while known + 1 < unknown {
            let middle = known.midpoint(unknown);
            match self.places(end_of(middle)).is_empty() {
                true => unknown = middle,
                false => known = middle,
            }
        }
        // The end of a text is no continuation; where nothing else follows, a shorter end may know more.
        (1..=known)
            .rev()
            .find_map(|matched| self.most_frequent(end_of(matched)))
    }

    /// Which places, in order, begin with `context`.
    fn places(&self, context: &[u32]) -> std::ops::Range<usize> {
        let head = |place: &u32| head(&self.text, *place, context.len());
        let first = self.order.partition_point(|place| head(place) < context);
        let rest = &self.order[first..];
        first..first + rest.partition_point(|place| head(place) == context)
    }

    fn most_frequent(&self, context: &[u32]) -> Option<Continuation> {
        let places = self.places(context);
        let stride = places.len().div_ceil(MOST_PLACES).max(1);
        let (mut best, mut of): (Option<(u32, usize)>, usize) = (None, 0);
        let mut run: (u32, usize) = (START, 0);
        for place in self.order[places].iter().step_by(stride) {
            let next = self.text.get(*place as usize + context.len());
            let Some(next) = next.copied().filter(|next| *next != START) else {
                continue;
            };
            of += 1;
            // Places of one continuation follow each other.
            run = if run.0 == next {
                (next, run.1 + 1)
            } else {
                (next, 1)
            };
            if best.is_none_or(|(_, count)| run.1 > count) {
                best = Some(run);
            }
        }
        best.map(|(token, count)| Continuation {
            token,
            matched: context.len(),
            count,
            of,
        })
    }
}

/// The tokens from a place on, at most `tokens` of them.
fn head(text: &[u32], place: u32, tokens: usize) -> &[u32] {
    let rest = &text[place as usize..];
    &rest[..tokens.min(rest.len())]
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use rand::{Rng, SeedableRng};

    use super::*;

    #[test]
    fn the_longest_known_end_speaks_and_then_the_majority() {
        let texts: [&[u32]; 4] = [&[1, 2, 3, 9], &[1, 2, 4, 9], &[1, 2, 4, 8], &[5, 2, 3, 9]];
        let index = SuffixIndex::new(texts);
        let after = |context: &[u32]| {
            let found = index.continuation(context);
            found.map(|found| (found.token, found.matched, found.count, found.of))
        };
        assert_eq!(after(&[START]), Some((1, 1, 3, 4)));
        assert_eq!(after(&[START, 1, 2]), Some((4, 3, 2, 3)));
        assert_eq!(after(&[START, 5, 2]), Some((3, 3, 1, 1)));
        // Nobody knows 7 before 2, so 2 alone counts: 3 and 4 are equals.
        assert_eq!(after(&[7, 2]), Some((3, 1, 2, 4)));
        assert_eq!(after(&[7]), None);
        // 9 only ever ends a text.
        assert_eq!(after(&[3, 9]), None);
        assert_eq!(after(&[]), None);
        assert_eq!(SuffixIndex::new([]).continuation(&[START]), None);
    }

    #[test]
    fn places_are_32_bits_wide() {
        let most = u32::MAX as usize;
        assert!(SuffixIndex::holds(3, most - 4));
        assert!(!SuffixIndex::holds(3, most - 3));
        assert!(!SuffixIndex::holds(1, usize::MAX));
    }

    /// Against counts of all n-grams in a table.
    #[test]
    fn it_equals_a_table_of_all_contexts() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let texts: Vec<Vec<u32>> = (0..40)
            .map(|_| {
                let length = random.random_range(1..40);
                (0..length).map(|_| random.random_range(0..6)).collect()
            })
            .collect();
        let index = SuffixIndex::new(texts.iter().map(Vec::as_slice));
        let mut table: HashMap<Vec<u32>, HashMap<u32, usize>> = HashMap::new();
        for text in &texts {
            let text = [&[START], &text[..]].concat();
            for at in 1..text.len() {
                for matched in 1..=LONGEST_CONTEXT.min(at) {
                    let context = text[at - matched..at].to_vec();
                    *table
                        .entry(context)
                        .or_default()
                        .entry(text[at])
                        .or_default() += 1;
                }
            }
        }
        for _ in 0..2000 {
            let length = random.random_range(1..12);
            let context: Vec<u32> = (0..length).map(|_| random.random_range(0..7)).collect();
            let ends = (0..context.len()).filter(|from| context.len() - from <= LONGEST_CONTEXT);
            let known = ends.map(|from| &context[from..]);
            let expected = known
                .filter_map(|end| Some((end, table.get(end)?)))
                .next()
                .map(|(end, counts)| {
                    let best = counts
                        .iter()
                        .max_by_key(|(token, count)| (**count, u32::MAX - **token));
                    let (token, count) = best.unwrap();
                    (*token, end.len(), *count, counts.values().sum::<usize>())
                });
            let found = index.continuation(&context);
            let found = found.map(|found| (found.token, found.matched, found.count, found.of));
            assert_eq!(found, expected, "{context:?}");
        }
    }
}

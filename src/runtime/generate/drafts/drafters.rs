//! Who proposes tokens: stores of texts, a text that is expected, the sequence itself.

use std::sync::Arc;

use super::{
    Draft, Drafter, SequenceText,
    file::DraftStore,
    grown::Grown,
    index::{LONGEST_CONTEXT, START},
};

/// Least tokens that a sequence has to repeat of itself until it is thought to go on repeating.
const LEAST_REPEATED: usize = 3;

/// Tokens of a sequence in which repeats are looked for, at most.
const SEARCHED: usize = 8192;

/// Least chance of a draft's last token, as the counts have it; what is less likely costs more than it brings.
const LEAST_CHANCE: f64 = 0.1;

/// Drafts what most often followed in stored texts.
#[derive(Debug, Clone)]
pub(super) struct StoreDrafter {
    pub(super) store: Option<Arc<DraftStore>>,
    pub(super) grown: Option<Grown>,
}

impl Drafter for StoreDrafter {
    fn draft(&mut self, text: SequenceText<'_>, most: usize) -> Draft {
        let from = text.answer.len().saturating_sub(LONGEST_CONTEXT);
        let start = (from == 0).then_some(START);
        let mut context: Vec<u32> = start
            .into_iter()
            .chain(text.answer[from..].iter().copied())
            .collect();
        let mut draft = Draft::default();
        let mut chance = 1.0;
        while draft.tokens.len() < most {
            let stored = self
                .store
                .as_ref()
                .and_then(|store| store.index.continuation(&context));
            let grown = self
                .grown
                .as_ref()
                .and_then(|grown| grown.continuation(&context));
            let best = stored
                .into_iter()
                .chain(grown)
                .max_by_key(|next| (next.matched, next.of));
            let Some(next) = best else {
                break;
            };
            chance *= next.count as f64 / next.of as f64;
            if chance < LEAST_CHANCE {
                break;
            }
            if draft.tokens.is_empty() {
                draft.matched = next.matched;
            }
            draft.tokens.push(next.token);
            context.push(next.token);
        }
        draft
    }
}

/// Drafts a text that the answer is expected to resemble.
#[derive(Debug, Clone)]
pub(super) struct PredictionDrafter {
    /// `START` and the text.
    text: Vec<u32>,
}

impl PredictionDrafter {
    pub(super) fn new(prediction: &[u32]) -> Self {
        Self {
            text: [&[START], prediction].concat(),
        }
    }
}

impl Drafter for PredictionDrafter {
    fn draft(&mut self, text: SequenceText<'_>, most: usize) -> Draft {
        let answer = &text.answer[text.answer.len().saturating_sub(LONGEST_CONTEXT)..];
        let start = (answer.len() == text.answer.len()).then_some(START);
        let context: Vec<u32> = start.into_iter().chain(answer.iter().copied()).collect();
        // Of equals the one that is nearest to where the answer is.
        let place = text.answer.len() + 1;
        after_longest_match(&self.text, &context, 1, most, |at| at.abs_diff(place))
    }
}

/// Drafts what followed the sequence's last tokens earlier on, in prompt or answer ("prompt lookup").
#[derive(Debug, Clone, Copy)]
pub(super) struct RepeatDrafter;

impl Drafter for RepeatDrafter {
    fn draft(&mut self, text: SequenceText<'_>, most: usize) -> Draft {
        let all = [text.prompt, text.answer].concat();
        let all = &all[all.len().saturating_sub(SEARCHED)..];
        let context = &all[all.len().saturating_sub(LONGEST_CONTEXT)..];
        // Of equals the latest.
        after_longest_match(all, context, LEAST_REPEATED, most, |at| all.len() - at)
    }
}

/// The tokens after the place in `text` where the most of the last tokens of `context` occur, `least` at least; of equals
/// the place with the least `distance`.
fn after_longest_match(
    text: &[u32],
    context: &[u32],
    least: usize,
    most: usize,
    distance: impl Fn(usize) -> usize,
) -> Draft {
    let matched = |at: usize| {
        let pairs = text[..at].iter().rev().zip(context.iter().rev());
        pairs.take_while(|(one, other)| one == other).count()
    };
    let places = (1..text.len()).map(|at| (matched(at), at));
    let best = places
        .filter(|(matched, _)| *matched >= least)
        .max_by_key(|(matched, at)| (*matched, usize::MAX - distance(*at)));
    best.map_or_else(Draft::default, |(matched, at)| Draft {
        tokens: text[at..].iter().copied().take(most).collect(),
        matched,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text<'a>(prompt: &'a [u32], answer: &'a [u32]) -> SequenceText<'a> {
        SequenceText { prompt, answer }
    }

    #[test]
    fn a_store_goes_on_as_long_as_it_is_likely() {
        let mut texts = vec![vec![1, 2, 3, 4]; 3];
        texts.push(vec![1, 2, 5, 6]);
        let mut drafter = StoreDrafter {
            store: Some(Arc::new(DraftStore::new(&texts))),
            grown: None,
        };
        let mut draft = |answer: &[u32], most| drafter.draft(text(&[9, 9], answer), most);
        let first = draft(&[], 8);
        assert_eq!((first.tokens, first.matched), (vec![1, 2, 3, 4], 1));
        assert_eq!(draft(&[], 2).tokens, [1, 2]);
        assert_eq!(draft(&[1, 2, 5], 8).tokens, [6]);
        assert!(draft(&[7], 8).tokens.is_empty());
        // Each of twenty beginnings has a twentieth of the chance.
        let texts: Vec<Vec<u32>> = (10..30).map(|first| vec![first, 1]).collect();
        let mut drafter = StoreDrafter {
            store: Some(Arc::new(DraftStore::new(&texts))),
            grown: None,
        };
        assert!(drafter.draft(text(&[], &[]), 8).tokens.is_empty());
        assert_eq!(drafter.draft(text(&[], &[17]), 8).tokens, [1]);
    }

    #[test]
    fn a_prediction_is_followed_where_the_answer_is() {
        let mut drafter = PredictionDrafter::new(&[1, 2, 3, 1, 2, 4, 5]);
        let mut draft = |answer: &[u32]| drafter.draft(text(&[], answer), 2).tokens;
        assert_eq!(draft(&[]), [1, 2]);
        assert_eq!(draft(&[1, 2]), [3, 1]);
        assert_eq!(draft(&[1, 2, 3, 1, 2]), [4, 5]);
        // Another word, and then on with the expected.
        assert_eq!(draft(&[1, 2, 3, 8, 2]), [4, 5]);
        assert_eq!(draft(&[8]), [0u32; 0]);
        assert_eq!(draft(&[1, 2, 3, 1, 2, 4, 5]), [0u32; 0]);
    }

    #[test]
    fn a_sequence_repeats_itself_after_three_tokens() {
        let draft =
            |prompt: &[u32], answer: &[u32]| RepeatDrafter.draft(text(prompt, answer), 3).tokens;
        assert_eq!(draft(&[1, 2, 3, 4, 5], &[1, 2, 3]), [4, 5, 1]);
        assert_eq!(draft(&[1, 2, 3, 4, 5], &[2, 3]), [0u32; 0]);
        // The latest of two.
        assert_eq!(draft(&[1, 2, 3, 4, 1, 2, 3, 7], &[1, 2, 3]), [7, 1, 2]);
        assert_eq!(draft(&[], &[]), [0u32; 0]);
    }
}

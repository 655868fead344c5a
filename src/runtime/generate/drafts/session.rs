//! The drafts of one sequence: which, how many, and what became of them.

use rayon::prelude::*;

use super::{
    Draft, Drafter, Drafts, SequenceText,
    drafters::{PredictionDrafter, RepeatDrafter, StoreDrafter},
};

/// Steps in a row whose drafts were all wrong until a sequence is left alone for a while.
const MOST_MISSES: u32 = 8;

/// Steps that it is left alone for at first and at most, twice as many each time.
const PAUSES: [u32; 2] = [4, 64];

/// Drafted tokens and those among them that were right.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DraftCounts {
    /// Tokens that were computed ahead.
    pub drafted: usize,
    /// Those that were kept.
    pub accepted: usize,
    /// Steps of the model.
    pub steps: usize,
    /// Tokens that these steps gave.
    pub tokens: usize,
}

impl DraftCounts {
    /// Without those of an earlier time.
    pub fn since(self, before: Self) -> Self {
        Self {
            drafted: self.drafted - before.drafted,
            accepted: self.accepted - before.accepted,
            steps: self.steps - before.steps,
            tokens: self.tokens - before.tokens,
        }
    }

    /// Adds those of another sequence.
    pub fn add(&mut self, other: Self) {
        self.drafted += other.drafted;
        self.accepted += other.accepted;
        self.steps += other.steps;
        self.tokens += other.tokens;
    }
}

/// Drafts for one sequence.
pub struct DraftSession {
    drafters: Vec<Box<dyn Drafter>>,
    most: usize,
    /// Ids below this can be fed to the model.
    vocab: usize,
    misses: u32,
    /// Steps without drafts to come, and how many there will be the next time.
    pause: u32,
    next_pause: u32,
    counts: DraftCounts,
}

impl std::fmt::Debug for DraftSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DraftSession")
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl DraftSession {
    /// For a sequence of a model with `vocab` tokens; `prediction` is what its answer is expected to be, if that is known.
    pub fn new(drafts: &Drafts, prediction: &[u32], vocab: usize) -> Self {
        let mut drafters: Vec<Box<dyn Drafter>> = Vec::new();
        // Of two that know as much the first is taken.
        drafters.extend(drafts.source.iter().map(|source| source.drafter()));
        if !prediction.is_empty() {
            drafters.push(Box::new(PredictionDrafter::new(prediction)));
        }
        if drafts.store.is_some() || drafts.grown.is_some() {
            drafters.push(Box::new(StoreDrafter {
                store: drafts.store.clone(),
                grown: drafts.grown.clone(),
            }));
        }
        drafters.push(Box::new(RepeatDrafter));
        Self::of(drafters, drafts.most, vocab)
    }

    /// With drafters of one's own.
    pub fn of(drafters: Vec<Box<dyn Drafter>>, most: usize, vocab: usize) -> Self {
        Self {
            drafters,
            most,
            vocab,
            misses: 0,
            pause: 0,
            next_pause: PAUSES[0],
            counts: DraftCounts::default(),
        }
    }

    /// Tokens that may follow, at most `most`; none where drafts were wrong lately.
    pub fn propose(&mut self, text: SequenceText<'_>, most: usize) -> Vec<u32> {
        let most = most.min(self.most);
        if most == 0 {
            return Vec::new();
        }
        if self.pause > 0 {
            self.pause -= 1;
            return Vec::new();
        }
        let mut best = Draft::default();
        for drafter in &mut self.drafters {
            let draft = drafter.draft(text, most);
            if !draft.tokens.is_empty() && draft.matched > best.matched {
                best = draft;
            }
        }
        let known = |id: &u32| (*id as usize) < self.vocab;
        best.tokens
            .into_iter()
            .take(most)
            .take_while(known)
            .collect()
    }

    /// Takes what became of a step: how many tokens were drafted for it, how many of these were right, and how many it
    /// gave in all.
    pub fn note(&mut self, drafted: usize, accepted: usize, tokens: usize) {
        self.counts.add(DraftCounts {
            drafted,
            accepted,
            steps: 1,
            tokens,
        });
        if accepted > 0 {
            self.misses = 0;
            self.next_pause = PAUSES[0];
        } else if drafted > 0 {
            self.misses += 1;
            if self.misses >= MOST_MISSES {
                self.misses = 0;
                self.pause = self.next_pause;
                self.next_pause = (2 * self.next_pause).min(PAUSES[1]);
            }
        }
    }

    /// So far.
    pub fn counts(&self) -> DraftCounts {
        self.counts
    }
}

/// What drafts would bring if a model wrote just these texts, each with a prompt that nothing can be drafted from; the first
/// token comes of the prompt.
pub fn replay(drafts: &Drafts, texts: &[Vec<u32>]) -> DraftCounts {
    let one = |text: &Vec<u32>| {
        let mut session = DraftSession::new(drafts, &[], usize::MAX);
        let mut at = 1;
        while at < text.len() {
            let (answer, rest) = text.split_at(at);
            let drafted = session.propose(
                SequenceText {
                    prompt: &[],
                    answer,
                },
                rest.len() - 1,
            );
            let right = drafted
                .iter()
                .zip(rest)
                .take_while(|(one, other)| one == other);
            let accepted = right.count();
            session.note(drafted.len(), accepted, accepted + 1);
            at += accepted + 1;
        }
        session.counts()
    };
    let mut all = DraftCounts::default();
    for counts in texts.par_iter().map(one).collect::<Vec<_>>() {
        all.add(counts);
    }
    all
}

/// Tokens to draft for each of `sequences` sequences of a step that may have `rows` rows.
pub fn share_of_rows(rows: usize, sequences: usize) -> usize {
    (rows / sequences.max(1)).saturating_sub(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Always(Vec<u32>, usize);
    impl Drafter for Always {
        fn draft(&mut self, _text: SequenceText<'_>, most: usize) -> Draft {
            Draft {
                tokens: self.0.iter().copied().take(most).collect(),
                matched: self.1,
            }
        }
    }

    const NOTHING: SequenceText<'static> = SequenceText {
        prompt: &[],
        answer: &[],
    };

    #[test]
    fn the_drafter_that_knows_most_is_asked_and_unknown_tokens_cut() {
        let drafters: Vec<Box<dyn Drafter>> = vec![
            Box::new(Always(vec![1], 2)),
            Box::new(Always(vec![2, 3, 99, 4], 3)),
            Box::new(Always(vec![], 9)),
            Box::new(Always(vec![5], 3)),
        ];
        let mut session = DraftSession::of(drafters, 7, 50);
        assert_eq!(session.propose(NOTHING, 7), [2, 3]);
        assert_eq!(session.propose(NOTHING, 1), [2]);
        assert!(session.propose(NOTHING, 0).is_empty());
    }

    #[test]
    fn wrong_drafts_pause_and_right_ones_go_on() {
        let mut session = DraftSession::of(vec![Box::new(Always(vec![1, 2, 3], 1))], 7, 50);
        let drafted_steps = |session: &mut DraftSession, steps: usize, right: usize| {
            (0..steps)
                .filter(|_| {
                    let drafted = session.propose(NOTHING, 7).len();
                    session.note(drafted, right.min(drafted), 1 + right.min(drafted));
                    drafted > 0
                })
                .count()
        };
        assert_eq!(drafted_steps(&mut session, 50, 2), 50);
        let counts = session.counts();
        assert_eq!((counts.drafted, counts.accepted), (150, 100));
        assert_eq!((counts.steps, counts.tokens), (50, 150));
        // Eight steps, a pause of 4, eight, a pause of 8, …
        assert_eq!(drafted_steps(&mut session, 8 + 4 + 8 + 8 + 8 + 16, 0), 24);
        // Eight drafted steps of 72 are what remains in the end.
        drafted_steps(&mut session, 1000, 0);
        assert!(drafted_steps(&mut session, 720, 0) <= 88);
        while session.propose(NOTHING, 7).is_empty() {}
        session.note(3, 3, 4);
        assert_eq!(drafted_steps(&mut session, 20, 1), 20);
    }

    #[test]
    fn a_replayed_text_is_drafted_from_its_like() {
        let text: Vec<u32> = (0..30).collect();
        let drafts = Drafts::from_store(crate::runtime::generate::drafts::DraftStore::new(
            std::slice::from_ref(&text),
        ));
        let known = replay(&drafts, std::slice::from_ref(&text));
        // 29 tokens in steps of 8, the last of 5.
        assert_eq!((known.steps, known.tokens, known.accepted), (4, 29, 25));
        let unknown = replay(&drafts, &[(100..130).collect()]);
        assert_eq!(
            (unknown.steps, unknown.tokens, unknown.drafted),
            (29, 29, 0)
        );
    }

    #[test]
    fn many_sequences_leave_no_rows_for_drafts() {
        let shares = [1, 2, 3, 8, 16, 17, 32, 64].map(|sequences| share_of_rows(32, sequences));
        assert_eq!(shares, [31, 15, 9, 3, 1, 0, 0, 0]);
    }
}

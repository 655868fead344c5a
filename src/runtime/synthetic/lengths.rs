//! How long the reports of OpenI-zh are: the lengths of `--mixed`.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Tokens of a conversation besides image and answer: chat markers and the published question.
pub const QUESTION_TOKENS: usize = 21;
/// The fixed shape: with the 256 tokens of a 512×512 image 368 in all, 92 of them the answer.
pub const FIXED: TextLength = TextLength {
    text: 112,
    answer: 92,
};

/// Tokens of the shortest answer, the first entry of [`ANSWERS`].
const SHORTEST_ANSWER: usize = 21;

/// How many of the 6,423 reports of OpenI-zh have each length: entry `i` counts the answers of
/// `SHORTEST_ANSWER + i` tokens, `<|im_end|>` and the line break after it included.
///
/// Counted once with Qwen3's published tokenizer over the labels of `openi-zh-prompt.json`
/// (github.com/leeguandong/XrayQwenVL, `data/`; machine-translated captions of the Open-i chest X-ray
/// collection), which is not part of this repository. The mean is 65.1 tokens.
#[rustfmt::skip]
const ANSWERS: &[u32] = &[
    4, 2, 4, 10, 18, 5, 8, 18, 19, 25, 19, 6, 31, 39, 39, 49, 59, 59, 80, 67,
    62, 69, 80, 98, 92, 92, 137, 148, 143, 143, 141, 120, 147, 121, 124, 135, 111, 124, 129, 144,
    143, 163, 128, 132, 134, 112, 139, 127, 125, 134, 121, 119, 104, 92, 73, 72, 80, 89, 76, 84,
    64, 80, 62, 70, 59, 47, 39, 53, 42, 48, 53, 42, 40, 34, 29, 33, 26, 30, 15, 19,
    22, 22, 17, 18, 17, 16, 16, 6, 11, 22, 13, 22, 6, 13, 11, 10, 7, 6, 10, 3,
    10, 6, 0, 4, 6, 6, 0, 8, 5, 1, 3, 9, 4, 1, 3, 0, 3, 3, 0, 4,
    0, 1, 0, 0, 0, 0, 0, 0, 3, 2, 3, 0, 0, 2, 0, 1, 1, 0, 4, 0,
    0, 0, 0, 0, 1, 0, 0, 1, 1, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    0, 0, 0, 1, 1,
];

/// Text tokens of one conversation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextLength {
    /// All tokens that are no image tokens.
    pub text: usize,
    /// Those of the answer, the targets of training.
    pub answer: usize,
}

/// Draws the lengths of conversations, one after another.
#[derive(Debug, Clone)]
pub struct Lengths {
    random: Option<ChaCha8Rng>,
}

impl Lengths {
    /// Always [`FIXED`].
    pub fn fixed() -> Self {
        Self { random: None }
    }

    /// Lengths as often as OpenI-zh has them.
    pub fn mixed(seed: u64) -> Self {
        Self {
            random: Some(ChaCha8Rng::seed_from_u64(seed)),
        }
    }

    /// The next conversation's length.
    pub fn draw(&mut self) -> TextLength {
        let Some(random) = &mut self.random else {
            return FIXED;
        };
        let all: u32 = ANSWERS.iter().sum();
        let mut left = random.random_range(0..all);
        let mut bin = 0;
        while left >= ANSWERS[bin] {
            left -= ANSWERS[bin];
            bin += 1;
        }
        let answer = SHORTEST_ANSWER + bin;
        TextLength {
            text: QUESTION_TOKENS + answer,
            answer,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_the_published_counts() {
        let all: u32 = ANSWERS.iter().sum();
        let tokens: usize = ANSWERS
            .iter()
            .enumerate()
            .map(|(i, count)| (SHORTEST_ANSWER + i) * *count as usize)
            .sum();
        // 6,423 reports of 405,061 tokens, two marks after each.
        assert_eq!(all, 6423);
        assert_eq!(tokens, 405_061 + 2 * 6423);
    }

    #[test]
    fn drawn_lengths_have_the_mean_of_the_table() {
        let mut lengths = Lengths::mixed(1);
        let draws: Vec<usize> = (0..20_000).map(|_| lengths.draw().answer).collect();
        let mean = draws.iter().sum::<usize>() as f64 / draws.len() as f64;
        // The deviation of a length is about 20: 0.14 for the mean of so many.
        assert!((mean - 417_907.0 / 6423.0).abs() < 0.7, "{mean}");
        assert!(draws.iter().all(|length| (21..=225).contains(length)));
    }
}

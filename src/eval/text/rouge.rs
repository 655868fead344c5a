//! ROUGE: F1 of the n-grams, or of the longest common subsequence, that a prediction shares with
//! its reference.
//!
//! Three kinds, all fractions 0 to 1. The plain one ([`rouge_n`], [`rouge_l`]) takes token lists
//! and counts repeats, as the original definition does. [`rouge_package`] and [`rouge_chinese`]
//! give what the Python packages of these names print, which training programs report: they count a
//! repeated n-gram once, split the text into sentences, and the first takes ROUGE-L over sets of
//! words.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use regex::Regex;

use super::lcs;
use super::ngrams::{Overlap, distinct, repeated};
use super::segment::{constant_regex, is_python_space, python_split};

/// F1 of single tokens, of pairs, and of the longest common subsequence.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Rouge {
    /// F1 of single tokens.
    pub rouge_1: f64,
    /// F1 of pairs of neighbours.
    pub rouge_2: f64,
    /// F1 of the longest common subsequence.
    pub rouge_l: f64,
}

/// Plain ROUGE-N: F1 of n-grams of `order` tokens, repeats counted; 0 where either side has none.
#[must_use]
pub fn rouge_n<T: Ord>(prediction: &[T], reference: &[T], order: usize) -> f64 {
    f1(repeated(prediction, reference, order))
}

/// Plain ROUGE-L: F1 of the longest common subsequence; 0 where either side is empty.
#[must_use]
pub fn rouge_l<T: Eq>(prediction: &[T], reference: &[T]) -> f64 {
    let matches = lcs::length(prediction, reference);
    f1(Overlap {
        matches,
        prediction: prediction.len(),
        reference: reference.len(),
    })
}

/// The harmonic mean of precision and recall, 0 without a match.
pub(in crate::eval) fn f1(overlap: Overlap) -> f64 {
    let sides = overlap.prediction + overlap.reference;
    if sides == 0 {
        0.0
    } else {
        2.0 * overlap.matches as f64 / sides as f64
    }
}

/// `Rouge().get_scores(prediction, reference)` of the package `rouge`, for words separated by spaces.
///
/// Sentences end at `.` alone, also inside `1.5`. Where a text holds nothing but full stops the
/// package raises an error; here it scores 0.
///
/// Source: `rouge/rouge_score.py`, rouge 1.0.1.
#[must_use]
pub fn rouge_package(prediction: &str, reference: &str) -> Rouge {
    let sentences = |text| -> Vec<Vec<_>> {
        let parts = str::split(text, '.').filter(|part| !part.is_empty());
        parts.map(words_of_sentence).collect()
    };
    let (prediction, reference) = (sentences(prediction), sentences(reference));
    if prediction.is_empty() || reference.is_empty() {
        return Rouge::default();
    }
    let mut shared = BTreeSet::new();
    for wanted in &reference {
        for given in &prediction {
            shared.extend(lcs::tokens(wanted, given).into_iter().copied());
        }
    }
    let (prediction, reference) = (prediction.concat(), reference.concat());
    let single = distinct(&prediction, &reference, 1);
    Rouge {
        rouge_1: f1_of_packages(single),
        rouge_2: f1_of_packages(distinct(&prediction, &reference, 2)),
        rouge_l: f1_of_packages(Overlap {
            matches: shared.len(),
            ..single
        }),
    }
}

/// `Rouge().get_scores(prediction, reference)` of the package `rouge-chinese`, for words separated by
/// spaces.
///
/// Source: `rouge_chinese/rouge.py` and `rouge_score.py`, rouge-chinese 1.0.3.
#[must_use]
pub fn rouge_chinese(prediction: &str, reference: &str) -> Rouge {
    let (prediction, reference) = (chinese_sentences(prediction), chinese_sentences(reference));
    let words = |text| -> Vec<_> {
        let parts = str::split(text, '\n').filter(|part| !part.is_empty());
        parts.flat_map(words_of_sentence).collect()
    };
    let (prediction, reference) = (words(&prediction), words(&reference));
    if prediction.is_empty() || reference.is_empty() {
        return Rouge::default();
    }
    let matches = lcs::length(&prediction, &reference);
    Rouge {
        rouge_1: f1_of_packages(distinct(&prediction, &reference, 1)),
        rouge_2: f1_of_packages(distinct(&prediction, &reference, 2)),
        rouge_l: f1_of_packages(Overlap {
            matches,
            prediction: prediction.len(),
            reference: reference.len(),
        }),
    }
}

/// The words of a sentence; both packages give one of white space a single word, the empty one.
fn words_of_sentence(sentence: &str) -> Vec<&str> {
    let words: Vec<&str> = python_split(sentence).collect();
    if words.is_empty() { vec![""] } else { words }
}

/// Puts a line end after each sentence, as `cut_sent` of rouge-chinese.
fn chinese_sentences(text: &str) -> String {
    static ENDS: LazyLock<[(Regex, &str); 4]> = LazyLock::new(|| {
        [
            (constant_regex(r"([。！？?])([^”’])"), "$1\n$2"),
            (constant_regex(r"(\.{6})([^”’])"), "$1\n$2"),
            (constant_regex(r"(…{2})([^”’])"), "$1\n$2"),
            (constant_regex(r"([。！？?][”’])([^，。！？?])"), "$1\n$2"),
        ]
    });
    let mut text = text.to_owned();
    for (pattern, replacement) in &*ENDS {
        if let std::borrow::Cow::Owned(cut) = pattern.replace_all(&text, *replacement) {
            text = cut;
        }
    }
    text.truncate(text.trim_end_matches(is_python_space).len());
    text
}

/// F1 as both packages have it: a small number in the divisor keeps it from 0, so equal texts score
/// just below 1.
fn f1_of_packages(overlap: Overlap) -> f64 {
    let share = |of: usize| {
        if of == 0 {
            0.0
        } else {
            overlap.matches as f64 / of as f64
        }
    };
    let (precision, recall) = (share(overlap.prediction), share(overlap.reference));
    2.0 * ((precision * recall) / (precision + recall + 1e-8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_scores_by_hand() {
        let (prediction, reference) = ([1, 1, 2, 3], [1, 2, 3, 4, 5]);
        assert!((rouge_n(&prediction, &reference, 1) - 2.0 * 3.0 / 9.0).abs() < 1e-12);
        assert!((rouge_n(&prediction, &reference, 2) - 2.0 * 2.0 / 7.0).abs() < 1e-12);
        assert!((rouge_l(&prediction, &reference) - 2.0 * 3.0 / 9.0).abs() < 1e-12);
        assert_eq!(rouge_l::<u32>(&[], &[]), 0.0);
        assert_eq!(rouge_l(&[1], &[1]), 1.0);
    }

    #[test]
    fn the_packages_count_a_repeat_once() {
        let scores = rouge_package("肺 肺 清", "肺 清");
        assert!((scores.rouge_1 - 1.0).abs() < 1e-7);
        // The package's longest subsequence is a set as well; its Chinese brother's is a list.
        assert!((scores.rouge_l - 1.0).abs() < 1e-7);
        assert!((rouge_chinese("肺 肺 清", "肺 清").rouge_l - 0.8).abs() < 1e-7);
    }

    #[test]
    fn a_text_of_full_stops_scores_zero() {
        assert_eq!(rouge_package("...", "肺"), Rouge::default());
        assert_eq!(rouge_package("肺", ""), Rouge::default());
        assert_eq!(rouge_chinese("", "肺"), Rouge::default());
    }

    #[test]
    fn sentences_end_where_the_package_ends_them() {
        assert_eq!(
            chinese_sentences("a 。 b ？ ” c ....... d \n"),
            "a 。\n b ？\n ” c ......\n. d"
        );
        assert_eq!(words_of_sentence("  "), [""]);
    }
}

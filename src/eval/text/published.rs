//! The text scores that training programs print, reproduced pair by pair, so that a run can be put
//! beside theirs.
//!
//! Fractions, 0 to 1; the programs print them in per cent. They differ in tokens, in ROUGE package
//! and in what they do with empty texts, so their numbers do not compare with each other.

use super::bleu::nltk_method3;
use super::rouge::{Rouge, rouge_chinese, rouge_package};
use super::segment::{CutText, python_split};

/// What a training program makes of one pair.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PublishedPair {
    /// ROUGE F1, by the program's package.
    pub rouge: Rouge,
    /// Sentence BLEU-4 of nltk, smoothing method 3.
    pub bleu_4: f64,
}

/// ms-swift 4 (`--metric nlg`): everything on jieba words; an empty prediction scores 0, a pair
/// without reference is left out (`None`).
///
/// Source: `compute_rouge_bleu`, ms-swift, `swift/metrics/nlg.py`.
#[must_use]
pub fn ms_swift(prediction: &CutText<'_>, reference: &CutText<'_>) -> Option<PublishedPair> {
    let (prediction, reference) = (without_spaces(prediction), without_spaces(reference));
    if reference.is_empty() {
        return None;
    }
    if prediction.is_empty() {
        return Some(PublishedPair::default());
    }
    Some(PublishedPair {
        rouge: rouge_package(&prediction.join(" "), &reference.join(" ")),
        bleu_4: nltk_method3(&prediction, &reference),
    })
}

/// ms-swift 3 (`--metric nlg`): ROUGE on jieba words, BLEU on characters; a pair with an empty side
/// is left out (`None`), which flatters a model that says nothing.
///
/// Source: `compute_rouge_bleu`, ms-swift, `swift/plugin/metric.py`.
#[must_use]
pub fn ms_swift_3(prediction: &CutText<'_>, reference: &CutText<'_>) -> Option<PublishedPair> {
    if prediction.text.is_empty() || reference.text.is_empty() {
        return None;
    }
    Some(PublishedPair {
        rouge: rouge_package(&prediction.tokens.join(" "), &reference.tokens.join(" ")),
        bleu_4: bleu_on_characters(prediction.text, reference.text),
    })
}

/// LLaMA-Factory (`predict_with_generate`): ROUGE of `rouge-chinese` on jieba words, BLEU on
/// characters with white space; empty texts score 0, and each pair is rounded to four digits of its
/// percentage.
///
/// Source: `ComputeSimilarity`, LLaMA-Factory, `src/llamafactory/train/sft/metric.py`.
#[must_use]
pub fn llama_factory(prediction: &CutText<'_>, reference: &CutText<'_>) -> PublishedPair {
    let blank = |text| python_split(text).next().is_none();
    let rouge = if blank(prediction.text) || blank(reference.text) {
        Rouge::default()
    } else {
        rouge_chinese(&prediction.tokens.join(" "), &reference.tokens.join(" "))
    };
    let rounded = |fraction: f64| round(fraction * 100.0, 4) / 100.0;
    PublishedPair {
        rouge: Rouge {
            rouge_1: rounded(rouge.rouge_1),
            rouge_2: rounded(rouge.rouge_2),
            rouge_l: rounded(rouge.rouge_l),
        },
        bleu_4: rounded(bleu_on_characters(prediction.text, reference.text)),
    }
}

fn bleu_on_characters(prediction: &str, reference: &str) -> f64 {
    let characters = |text: &str| text.chars().collect::<Vec<_>>();
    nltk_method3(&characters(prediction), &characters(reference))
}

/// Words of jieba stripped of ordinary spaces; line ends stay, as in the source.
fn without_spaces<'a>(text: &CutText<'a>) -> Vec<&'a str> {
    text.tokens
        .iter()
        .map(|word| word.trim_matches(' '))
        .filter(|word| !word.is_empty())
        .collect()
}

/// `value` to so many decimals as Python's `round`: by its exact decimal value, a tie to the even
/// digit.
pub(super) fn round(value: f64, decimals: usize) -> f64 {
    // Formatting rounds by the exact value; multiplying and dividing would not.
    format!("{value:.decimals$}").parse().unwrap_or(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn empty_sides_as_each_program_treats_them() {
        let [empty, space, line, lung] = ["", " ", " \n", "肺"].map(CutText::new);
        assert_eq!(ms_swift(&lung, &empty), None);
        assert_eq!(ms_swift(&empty, &lung), Some(PublishedPair::default()));
        assert_eq!(ms_swift(&space, &lung), Some(PublishedPair::default()));
        assert_eq!(ms_swift_3(&empty, &lung), None);
        assert_eq!(llama_factory(&empty, &lung), PublishedPair::default());
        assert_eq!(llama_factory(&line, &lung).rouge, Rouge::default());
    }

    #[test]
    fn equal_texts_score_one_but_for_the_packages_small_number() {
        let text = &CutText::new("双肺纹理清晰，心影不大。");
        for pair in [
            ms_swift(text, text),
            ms_swift_3(text, text),
            Some(llama_factory(text, text)),
        ] {
            let pair = pair.expect("both sides hold text");
            assert!((pair.bleu_4 - 1.0).abs() < 1e-12);
            assert!((pair.rouge.rouge_l - 1.0).abs() < 1e-7);
        }
    }

    #[test]
    fn rounding_is_pythons() {
        assert_eq!(round(2.675, 2), 2.67);
        assert_eq!(round(0.125, 2), 0.12);
        assert_eq!(round(f64::NAN, 2).to_string(), "NaN");
    }
}

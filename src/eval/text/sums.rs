//! What one pair adds to each text metric, so that any weighting of studies is a sum and a few
//! divisions.

use super::bleu::{BleuCounts, MAX_ORDER, Smoothing};
use super::chrf::{CHRF_ORDER, ChrfCounts};
use super::cider::CiderD;
use super::language::{TextLanguage, english_words};
use super::meteor::meteor;
use super::ngrams::{Overlap, repeated};
use super::published::{self, PublishedPair};
use super::rouge::{f1, rouge_l};
use super::scores::{PublishedScores, SacrebleuZhScores, TextScores, UnitScores};
use super::segment::{CutText, Vocabulary, characters, sacrebleu_zh};

/// One pair, or a weighted sum of many.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct TextSums {
    pairs: f64,
    characters: UnitSums,
    words: UnitSums,
    zh: BleuCounts,
    zh_sentence: [f64; MAX_ORDER],
    ms_swift: PublishedSums,
    ms_swift_3: PublishedSums,
    llama_factory: PublishedSums,
}

#[derive(Debug, Clone, Copy, Default)]
struct UnitSums {
    bleu: BleuCounts,
    chrf: ChrfCounts,
    /// Sentence BLEU-1 to 4, ROUGE-1, 2, L, METEOR, CIDEr-D.
    sums: [f64; 9],
}

#[derive(Debug, Clone, Copy, Default)]
struct PublishedSums {
    /// ROUGE-1, 2, L, BLEU-4.
    sums: [f64; 4],
    pairs: f64,
}

/// The sums of `pairs` of prediction and reference, in their order. Rarity of n-grams (CIDEr-D) is counted over all their
/// references.
pub(super) fn of_pairs(pairs: &[[&str; 2]], language: TextLanguage) -> Vec<TextSums> {
    let cuts: Vec<[CutText<'_>; 2]> = pairs.iter().map(|pair| pair.map(CutText::new)).collect();
    let by_character = unit_sums(&cuts, |cut| characters(cut.text));
    let by_word = match language {
        TextLanguage::Chinese => unit_sums(&cuts, CutText::words),
        TextLanguage::English => unit_sums_in(&cuts, |cut| english_words(cut.text), true),
    };
    cuts.iter()
        .zip(by_character.into_iter().zip(by_word))
        .map(|([prediction, reference], (characters, words))| {
            let zh = zh_counts(prediction.text, reference.text);
            TextSums {
                pairs: 1.0,
                characters,
                words,
                zh,
                zh_sentence: std::array::from_fn(|at| zh.sentence(at + 1, Smoothing::Exponential)),
                ms_swift: PublishedSums::of(published::ms_swift(prediction, reference)),
                ms_swift_3: PublishedSums::of(published::ms_swift_3(prediction, reference)),
                llama_factory: PublishedSums::of(Some(published::llama_factory(
                    prediction, reference,
                ))),
            }
        })
        .collect()
}

fn zh_counts(prediction: &str, reference: &str) -> BleuCounts {
    let (prediction, reference) = (sacrebleu_zh(prediction), sacrebleu_zh(reference));
    // An empty text has no token; splitting it would give the empty one.
    let tokens = |text| {
        str::split(text, ' ')
            .filter(|token| !token.is_empty())
            .collect::<Vec<_>>()
    };
    BleuCounts::of(&tokens(&prediction), &tokens(&reference))
}

fn unit_sums<'a>(
    cuts: &[[CutText<'a>; 2]],
    tokens: fn(&CutText<'a>) -> Vec<&'a str>,
) -> Vec<UnitSums> {
    unit_sums_in(cuts, tokens, false)
}

/// `lower`: tokens that differ in case alone are equal for every metric.
fn unit_sums_in<'a>(
    cuts: &[[CutText<'a>; 2]],
    tokens: fn(&CutText<'a>) -> Vec<&'a str>,
    lower: bool,
) -> Vec<UnitSums> {
    let mut vocabulary = Vocabulary::default();
    let mut numbers = |cut: &CutText<'a>| {
        let numbers = vocabulary.numbers(&tokens(cut));
        match lower {
            true => vocabulary.lowercase(&numbers),
            false => numbers,
        }
    };
    let numbered: Vec<[Vec<u32>; 2]> = cuts
        .iter()
        .map(|pair| pair.each_ref().map(&mut numbers))
        .collect();
    let cider = CiderD::new(numbered.iter().map(|[_, reference]| reference.as_slice()));
    numbered
        .iter()
        .map(|[prediction, reference]| UnitSums::of(prediction, reference, &vocabulary, &cider))
        .collect()
}

impl UnitSums {
    fn of(prediction: &[u32], reference: &[u32], vocabulary: &Vocabulary, cider: &CiderD) -> Self {
        // Counted once, for three metrics use them.
        let overlaps: [Overlap; CHRF_ORDER] =
            std::array::from_fn(|at| repeated(prediction, reference, at + 1));
        let [first, second, third, fourth, ..] = overlaps;
        let bleu = BleuCounts::from_overlaps(
            &[first, second, third, fourth],
            prediction.len(),
            reference.len(),
        );
        let sentence = |order| bleu.sentence(order, Smoothing::Exponential);
        let sums = [
            sentence(1),
            sentence(2),
            sentence(3),
            sentence(4),
            f1(first),
            f1(second),
            rouge_l(prediction, reference),
            meteor(
                &vocabulary.lowercase(prediction),
                &vocabulary.lowercase(reference),
            ),
            cider.score(prediction, reference),
        ];
        Self {
            bleu,
            chrf: ChrfCounts::from_overlaps(&overlaps),
            sums,
        }
    }

    fn add(&mut self, other: &Self, weight: f64) {
        self.bleu.add(&other.bleu, weight);
        self.chrf.add(&other.chrf, weight);
        add_all(&mut self.sums, &other.sums, weight);
    }

    fn scores(&self, pairs: f64) -> UnitScores {
        let mean = |at: usize| ratio(self.sums[at], pairs);
        UnitScores {
            bleu: std::array::from_fn(|at| {
                100.0 * self.bleu.corpus(at + 1, Smoothing::Exponential)
            }),
            sentence_bleu: std::array::from_fn(|at| 100.0 * mean(at)),
            rouge_1: 100.0 * mean(4),
            rouge_2: 100.0 * mean(5),
            rouge_l: 100.0 * mean(6),
            meteor: 100.0 * mean(7),
            cider_d: mean(8),
            chrf: 100.0 * self.chrf.score(),
        }
    }
}

impl PublishedSums {
    fn of(pair: Option<PublishedPair>) -> Self {
        pair.map_or_else(Self::default, |pair| {
            let rouge = pair.rouge;
            Self {
                sums: [rouge.rouge_1, rouge.rouge_2, rouge.rouge_l, pair.bleu_4],
                pairs: 1.0,
            }
        })
    }

    fn add(&mut self, other: &Self, weight: f64) {
        add_all(&mut self.sums, &other.sums, weight);
        self.pairs += weight * other.pairs;
    }

    fn scores(&self) -> PublishedScores {
        let [rouge_1, rouge_2, rouge_l, bleu_4] =
            self.sums.map(|sum| 100.0 * ratio(sum, self.pairs));
        PublishedScores {
            rouge_1,
            rouge_2,
            rouge_l,
            bleu_4,
        }
    }
}

impl TextSums {
    /// Adds `other`, taken `weight` times.
    pub(super) fn add(&mut self, other: &Self, weight: f64) {
        self.pairs += weight * other.pairs;
        self.characters.add(&other.characters, weight);
        self.words.add(&other.words, weight);
        self.zh.add(&other.zh, weight);
        add_all(&mut self.zh_sentence, &other.zh_sentence, weight);
        self.ms_swift.add(&other.ms_swift, weight);
        self.ms_swift_3.add(&other.ms_swift_3, weight);
        self.llama_factory.add(&other.llama_factory, weight);
    }

    pub(super) fn scores(&self) -> TextScores {
        TextScores {
            characters: self.characters.scores(self.pairs),
            words: self.words.scores(self.pairs),
            sacrebleu_zh: SacrebleuZhScores {
                bleu: std::array::from_fn(|at| {
                    100.0 * self.zh.corpus(at + 1, Smoothing::Exponential)
                }),
                sentence_bleu: self.zh_sentence.map(|sum| 100.0 * ratio(sum, self.pairs)),
            },
            ms_swift: self.ms_swift.scores(),
            ms_swift_3: self.ms_swift_3.scores(),
            llama_factory: self.llama_factory.scores(),
        }
    }
}

fn add_all<const N: usize>(sums: &mut [f64; N], others: &[f64; N], weight: f64) {
    for (sum, other) in sums.iter_mut().zip(others) {
        *sum += weight * other;
    }
}

/// A mean; 0 over nothing, as the training programs print it.
fn ratio(sum: f64, count: f64) -> f64 {
    if count == 0.0 { 0.0 } else { sum / count }
}

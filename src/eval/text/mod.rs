//! Text metrics for Chinese reports, each on characters and on words, with intervals over studies.
//!
//! [`Evaluation`] takes pairs of texts and gives every score at once ([`TextScores`]), their
//! bootstrap intervals, and the paired comparison of two runs; the metrics themselves lie one a
//! file and can be used alone. They equal the published Python packages (`tests/fixtures/metrics`).
//! They count shared text, not right findings: a report that drops one "no" scores nearly full, so
//! they stand beside the score of findings and never for it, and always beside [`baselines`].
//!
//! Units: `characters` takes every character but white space for a token, Latin letters and digits
//! too; `words` takes the words of [`jieba::cut`]; `sacrebleu_zh` takes Chinese characters alone
//! and Latin runs whole. The training programs' own scores, under their names, keep their own
//! tokens ([`published`]).

use std::collections::BTreeMap;

use serde::Serialize;

pub mod baselines;
pub mod bleu;
pub mod chrf;
pub mod cider;
pub mod jieba;
pub mod lcs;
pub mod meteor;
pub mod ngrams;
pub mod published;
pub mod rouge;
pub mod segment;
mod tally;

pub use super::bootstrap::{Bootstrap, Comparison, Interval};

use tally::Tally;

/// Pairs or settings that cannot be evaluated.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum EvaluateError {
    /// No pairs or no studies.
    #[error("there is nothing to evaluate, expected at least one pair")]
    Empty,
    /// A bootstrap that draws nothing.
    #[error("the bootstrap has `0` resamples, expected at least 1 (1000 is usual)")]
    Resamples,
    /// An interval that holds nothing, everything, or is not a number.
    #[error("the bootstrap's confidence is `{0}`, expected a value between 0 and 1 such as 0.95")]
    Confidence(f64),
    /// Two runs that were not made on the same studies.
    #[error(
        "study `{study}` has other references in one run than in the other, expected both runs \
         on the same test set"
    )]
    DifferentStudies {
        /// The first study, by name, in which they differ.
        study: String,
    },
}

/// One prediction with its reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The study it belongs to; pairs of one study are drawn together.
    pub study: String,
    /// What the model wrote.
    pub prediction: String,
    /// What the data set says.
    pub reference: String,
}

/// Scores on one kind of token; per cent but for `cider_d`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct UnitScores {
    /// Corpus BLEU-1 to 4, exponential smoothing (sacrebleu's).
    pub bleu: [f64; 4],
    /// Mean sentence BLEU-1 to 4, exponential smoothing over the orders that the prediction has.
    pub sentence_bleu: [f64; 4],
    /// Mean ROUGE-1 F1, repeats counted.
    pub rouge_1: f64,
    /// Mean ROUGE-2 F1, repeats counted.
    pub rouge_2: f64,
    /// Mean ROUGE-L F1 of the whole text.
    pub rouge_l: f64,
    /// Mean METEOR, exact matches only.
    pub meteor: f64,
    /// Mean CIDEr-D, 0 to 10, its weights from the references evaluated.
    pub cider_d: f64,
    /// Corpus chrF up to order 6; on words the same formula with words for characters.
    pub chrf: f64,
}

/// BLEU on the tokens of sacrebleu's `zh`, per cent; what `sacrebleu -l xx-zh` prints is `bleu[3]`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SacrebleuZhScores {
    /// Corpus BLEU-1 to 4, exponential smoothing.
    pub bleu: [f64; 4],
    /// Mean sentence BLEU-1 to 4, exponential smoothing over the orders that the prediction has.
    pub sentence_bleu: [f64; 4],
}

/// What a training program prints, per cent; see [`published`].
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct PublishedScores {
    /// Mean ROUGE-1 F1 of the program's package.
    pub rouge_1: f64,
    /// Mean ROUGE-2 F1 of the program's package.
    pub rouge_2: f64,
    /// Mean ROUGE-L F1 of the program's package.
    pub rouge_l: f64,
    /// Mean sentence BLEU-4 of nltk, smoothing method 3.
    pub bleu_4: f64,
}

/// Every text score of a set of pairs.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct TextScores {
    /// On characters.
    pub characters: UnitScores,
    /// On jieba's words.
    pub words: UnitScores,
    /// BLEU as sacrebleu counts Chinese.
    pub sacrebleu_zh: SacrebleuZhScores,
    /// As ms-swift 4 prints them.
    pub ms_swift: PublishedScores,
    /// As ms-swift 3 prints them.
    pub ms_swift_3: PublishedScores,
    /// As LLaMA-Factory prints them.
    pub llama_factory: PublishedScores,
}

impl TextScores {
    /// Names such as `characters.bleu_4`, in the order of [`TextScores::values`].
    #[must_use]
    pub fn names() -> Vec<String> {
        let bleu = (1..=4).map(|order| format!("bleu_{order}"));
        let sentence_bleu = (1..=4).map(|order| format!("sentence_bleu_{order}"));
        let bleus: Vec<String> = bleu.chain(sentence_bleu).collect();
        let others = ["rouge_1", "rouge_2", "rouge_l", "meteor", "cider_d", "chrf"];
        let mut names = Vec::new();
        for unit in ["characters", "words"] {
            names.extend(bleus.iter().map(|name| format!("{unit}.{name}")));
            names.extend(others.iter().map(|name| format!("{unit}.{name}")));
        }
        names.extend(bleus.iter().map(|name| format!("sacrebleu_zh.{name}")));
        for program in ["ms_swift", "ms_swift_3", "llama_factory"] {
            names.extend(
                ["rouge_1", "rouge_2", "rouge_l", "bleu_4"].map(|name| format!("{program}.{name}")),
            );
        }
        names
    }

    /// Every score, in the order of [`TextScores::names`].
    #[must_use]
    pub fn values(&self) -> Vec<f64> {
        let mut values = Vec::new();
        for unit in [&self.characters, &self.words] {
            values.extend(unit.bleu);
            values.extend(unit.sentence_bleu);
            values.extend([
                unit.rouge_1,
                unit.rouge_2,
                unit.rouge_l,
                unit.meteor,
                unit.cider_d,
                unit.chrf,
            ]);
        }
        values.extend(self.sacrebleu_zh.bleu);
        values.extend(self.sacrebleu_zh.sentence_bleu);
        for program in [&self.ms_swift, &self.ms_swift_3, &self.llama_factory] {
            values.extend([
                program.rouge_1,
                program.rouge_2,
                program.rouge_l,
                program.bleu_4,
            ]);
        }
        values
    }
}

/// A set of pairs, counted once; scores, intervals and comparisons are sums over it.
#[derive(Debug, Clone)]
pub struct Evaluation {
    pairs: Vec<Tally>,
    studies: Vec<Study>,
}

/// The pairs of one study together.
#[derive(Debug, Clone)]
struct Study {
    name: String,
    /// Sorted, to tell whether two runs were made on the same test set.
    references: Vec<String>,
    tally: Tally,
}

impl Evaluation {
    /// Cuts and counts `pairs`.
    ///
    /// # Errors
    /// [`EvaluateError::Empty`] without pairs.
    pub fn new(pairs: &[Pair]) -> Result<Self, EvaluateError> {
        if pairs.is_empty() {
            return Err(EvaluateError::Empty);
        }
        let tallies = tally::of_pairs(pairs);
        let mut studies: BTreeMap<&str, Study> = BTreeMap::new();
        for (pair, tally) in pairs.iter().zip(&tallies) {
            let study = studies.entry(&pair.study).or_insert_with(|| Study {
                name: pair.study.clone(),
                references: Vec::new(),
                tally: Tally::default(),
            });
            study.references.push(pair.reference.clone());
            study.tally.add(tally, 1.0);
        }
        let mut studies: Vec<Study> = studies.into_values().collect();
        for study in &mut studies {
            study.references.sort_unstable();
        }
        Ok(Self {
            pairs: tallies,
            studies,
        })
    }

    /// How many studies there are.
    #[must_use]
    pub fn studies(&self) -> usize {
        self.studies.len()
    }

    /// The scores of all pairs, each counted once.
    #[must_use]
    pub fn scores(&self) -> TextScores {
        let mut sum = Tally::default();
        for tally in &self.pairs {
            sum.add(tally, 1.0);
        }
        sum.scores()
    }

    /// The scores of one pair alone, by its place in the pairs given; `None` past the end.
    ///
    /// CIDEr-D keeps the weights of the whole set; corpus BLEU of a prediction under four tokens is
    /// 0.
    #[must_use]
    pub fn pair_scores(&self, index: usize) -> Option<TextScores> {
        self.pairs.get(index).map(Tally::scores)
    }

    /// Every score with its interval, drawn by study, under the names of [`TextScores::names`].
    ///
    /// The weights of CIDEr-D stay those of the whole set in each draw.
    ///
    /// # Errors
    /// [`EvaluateError::Resamples`] and [`EvaluateError::Confidence`] for settings out of range.
    pub fn intervals(
        &self,
        bootstrap: &Bootstrap,
    ) -> Result<Vec<(String, Interval)>, EvaluateError> {
        let intervals = bootstrap.intervals(self.studies.len(), |times| self.weighted(times))?;
        Ok(TextScores::names().into_iter().zip(intervals).collect())
    }

    /// Compares this run with `other`, made on the same studies: each score's difference is `other`
    /// less this.
    ///
    /// # Errors
    /// [`EvaluateError::DifferentStudies`] if the studies or their references differ, else as
    /// [`Evaluation::intervals`].
    pub fn compare(
        &self,
        other: &Self,
        bootstrap: &Bootstrap,
    ) -> Result<Vec<(String, Comparison)>, EvaluateError> {
        self.check_same_studies(other)?;
        let count = self.studies.len();
        let compared = bootstrap.compare(
            count,
            |times| self.weighted(times),
            |times| other.weighted(times),
        )?;
        Ok(TextScores::names().into_iter().zip(compared).collect())
    }

    fn weighted(&self, times: &[f64]) -> Vec<f64> {
        let mut sum = Tally::default();
        for (study, &weight) in self.studies.iter().zip(times) {
            if weight > 0.0 {
                sum.add(&study.tally, weight);
            }
        }
        sum.scores().values()
    }

    fn check_same_studies(&self, other: &Self) -> Result<(), EvaluateError> {
        let longest = self.studies.len().max(other.studies.len());
        for at in 0..longest {
            let (first, second) = (self.studies.get(at), other.studies.get(at));
            let same = match (first, second) {
                (Some(first), Some(second)) => {
                    first.name == second.name && first.references == second.references
                }
                _ => false,
            };
            if !same {
                // Sorted by name, so the lesser of the two is the one that the other run lacks or
                // has otherwise.
                let study = first
                    .into_iter()
                    .chain(second)
                    .map(|study| study.name.clone())
                    .min()
                    .unwrap_or_default();
                return Err(EvaluateError::DifferentStudies { study });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(study: &str, prediction: &str, reference: &str) -> Pair {
        Pair {
            study: study.into(),
            prediction: prediction.into(),
            reference: reference.into(),
        }
    }

    fn pairs() -> Vec<Pair> {
        vec![
            pair("1", "双肺纹理清晰，心影不大。", "双肺纹理清晰，心影增大。"),
            pair("1", "双肺纹理清晰。", "双肺纹理清晰，心影增大。"),
            pair("2", "未见气胸。", "右侧少量气胸。"),
            pair("3", "", "右侧胸腔积液。"),
        ]
    }

    #[test]
    fn names_and_values_go_together() {
        let scores = Evaluation::new(&pairs()).expect("there are pairs").scores();
        let (names, values) = (TextScores::names(), scores.values());
        assert_eq!(names.len(), values.len());
        let value = |name: &str| {
            values[names
                .iter()
                .position(|other| other == name)
                .expect("a known name")]
        };
        assert_eq!(value("characters.bleu_4"), scores.characters.bleu[3]);
        assert_eq!(value("words.cider_d"), scores.words.cider_d);
        assert_eq!(
            value("sacrebleu_zh.sentence_bleu_1"),
            scores.sacrebleu_zh.sentence_bleu[0]
        );
        assert_eq!(value("llama_factory.bleu_4"), scores.llama_factory.bleu_4);
    }

    #[test]
    fn equal_texts_score_full() {
        let same: Vec<Pair> = pairs()
            .into_iter()
            .map(|p| pair(&p.study, &p.reference, &p.reference))
            .collect();
        let scores = Evaluation::new(&same).expect("there are pairs").scores();
        for unit in [scores.characters, scores.words] {
            assert!((unit.bleu[3] - 100.0).abs() < 1e-9);
            assert!((unit.rouge_l - 100.0).abs() < 1e-9);
            assert!((unit.chrf - 100.0).abs() < 1e-9);
        }
    }

    #[test]
    fn the_value_of_an_interval_is_the_score_and_lies_inside() {
        let evaluation = Evaluation::new(&pairs()).expect("there are pairs");
        assert_eq!(evaluation.studies(), 3);
        let scores = evaluation.scores().values();
        for ((name, interval), score) in evaluation
            .intervals(&Bootstrap::default())
            .expect("good")
            .iter()
            .zip(scores)
        {
            assert!((interval.value - score).abs() < 1e-9, "{name}");
            assert!(
                interval.low <= score + 1e-9 && score <= interval.high + 1e-9,
                "{name}: {interval:?}"
            );
        }
    }

    #[test]
    fn runs_are_compared_by_study_in_any_order_of_pairs() {
        let first = Evaluation::new(&pairs()).expect("there are pairs");
        let mut turned = pairs();
        turned.reverse();
        let second = Evaluation::new(&turned).expect("there are pairs");
        for (name, comparison) in first
            .compare(&second, &Bootstrap::default())
            .expect("the same test set")
        {
            assert!(comparison.difference.value.abs() < 1e-9, "{name}");
        }
        turned[0].reference.push('。');
        let other = Evaluation::new(&turned).expect("there are pairs");
        let refused = first
            .compare(&other, &Bootstrap::default())
            .expect_err("another test set");
        assert_eq!(
            refused,
            EvaluateError::DifferentStudies { study: "3".into() }
        );
        let fewer = Evaluation::new(&pairs()[..3]).expect("there are pairs");
        let refused = fewer
            .compare(&first, &Bootstrap::default())
            .expect_err("another test set");
        assert_eq!(
            refused,
            EvaluateError::DifferentStudies { study: "3".into() }
        );
    }

    #[test]
    fn no_pairs_are_refused() {
        assert_eq!(Evaluation::new(&[]).err(), Some(EvaluateError::Empty));
    }
}

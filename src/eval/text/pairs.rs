//! Predictions beside their references, counted once: scores, intervals and comparisons are sums over them.

use std::collections::BTreeMap;

use crate::eval::{
    bootstrap::{Bootstrap, Comparison, Interval},
    error::EvaluateError,
};

use super::{
    language::TextLanguage,
    scores::TextScores,
    sums::{TextSums, of_pairs},
};

/// One prediction with its reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextPair {
    /// The study it belongs to; pairs of one study are drawn together.
    pub study: String,
    /// What the model wrote.
    pub prediction: String,
    /// What the data set says.
    pub reference: String,
}

/// A set of pairs, counted once; scores, intervals and comparisons are sums over it.
#[derive(Debug, Clone)]
pub struct TextEvaluation {
    pairs: Vec<TextSums>,
    studies: Vec<StudyPairs>,
}

/// The pairs of one study together.
#[derive(Debug, Clone)]
struct StudyPairs {
    name: String,
    /// Sorted, to tell whether two runs were made on the same test set.
    references: Vec<String>,
    sums: TextSums,
}

impl TextEvaluation {
    /// Cuts and counts `pairs`, whose words are those of `language`.
    ///
    /// # Errors
    /// [`EvaluateError::Empty`] without pairs.
    pub fn new(pairs: &[TextPair], language: TextLanguage) -> Result<Self, EvaluateError> {
        if pairs.is_empty() {
            return Err(EvaluateError::Empty);
        }
        let texts: Vec<[&str; 2]> = pairs
            .iter()
            .map(|pair| [pair.prediction.as_str(), &pair.reference])
            .collect();
        let sums = of_pairs(&texts, language);
        let mut studies: BTreeMap<&str, StudyPairs> = BTreeMap::new();
        for (pair, of_pair) in pairs.iter().zip(&sums) {
            let study = studies.entry(&pair.study).or_insert_with(|| StudyPairs {
                name: pair.study.clone(),
                references: Vec::new(),
                sums: TextSums::default(),
            });
            study.references.push(pair.reference.clone());
            study.sums.add(of_pair, 1.0);
        }
        let mut studies: Vec<StudyPairs> = studies.into_values().collect();
        for study in &mut studies {
            study.references.sort_unstable();
        }
        Ok(Self {
            pairs: sums,
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
        let mut sum = TextSums::default();
        for pair in &self.pairs {
            sum.add(pair, 1.0);
        }
        sum.scores()
    }

    /// The scores of one pair alone, by its place in the pairs given; `None` past the end.
    ///
    /// CIDEr-D keeps the weights of the whole set; corpus BLEU of a prediction under four tokens is
    /// 0.
    #[must_use]
    pub fn pair_scores(&self, index: usize) -> Option<TextScores> {
        self.pairs.get(index).map(TextSums::scores)
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
    /// [`TextEvaluation::intervals`].
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
            |swapped| self.mixed(other, swapped),
        )?;
        Ok(TextScores::names().into_iter().zip(compared).collect())
    }

    /// The scores of `other` less those of this run, with the studies marked in `swapped` taken from each other.
    fn mixed(&self, other: &Self, swapped: &[bool]) -> Vec<f64> {
        let (mut first, mut second) = (TextSums::default(), TextSums::default());
        for ((a, b), swapped) in self.studies.iter().zip(&other.studies).zip(swapped) {
            let (a, b) = if *swapped { (b, a) } else { (a, b) };
            first.add(&a.sums, 1.0);
            second.add(&b.sums, 1.0);
        }
        let (first, second) = (first.scores().values(), second.scores().values());
        first
            .iter()
            .zip(second)
            .map(|(first, second)| second - first)
            .collect()
    }

    fn weighted(&self, times: &[f64]) -> Vec<f64> {
        let mut sum = TextSums::default();
        for (study, &weight) in self.studies.iter().zip(times) {
            if weight > 0.0 {
                sum.add(&study.sums, weight);
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

    fn pair(study: &str, prediction: &str, reference: &str) -> TextPair {
        TextPair {
            study: study.into(),
            prediction: prediction.into(),
            reference: reference.into(),
        }
    }

    fn pairs() -> Vec<TextPair> {
        vec![
            pair("1", "双肺纹理清晰，心影不大。", "双肺纹理清晰，心影增大。"),
            pair("1", "双肺纹理清晰。", "双肺纹理清晰，心影增大。"),
            pair("2", "未见气胸。", "右侧少量气胸。"),
            pair("3", "", "右侧胸腔积液。"),
        ]
    }

    #[test]
    fn names_and_values_go_together() {
        let scores = TextEvaluation::new(&pairs(), TextLanguage::Chinese)
            .expect("there are pairs")
            .scores();
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
        let same: Vec<TextPair> = pairs()
            .into_iter()
            .map(|p| pair(&p.study, &p.reference, &p.reference))
            .collect();
        let scores = TextEvaluation::new(&same, TextLanguage::Chinese)
            .expect("there are pairs")
            .scores();
        for unit in [scores.characters, scores.words] {
            assert!((unit.bleu[3] - 100.0).abs() < 1e-9);
            assert!((unit.rouge_l - 100.0).abs() < 1e-9);
            assert!((unit.chrf - 100.0).abs() < 1e-9);
        }
    }

    #[test]
    fn the_value_of_an_interval_is_the_score_and_lies_inside() {
        let evaluation =
            TextEvaluation::new(&pairs(), TextLanguage::Chinese).expect("there are pairs");
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
        let first = TextEvaluation::new(&pairs(), TextLanguage::Chinese).expect("there are pairs");
        let mut reversed = pairs();
        reversed.reverse();
        let second =
            TextEvaluation::new(&reversed, TextLanguage::Chinese).expect("there are pairs");
        for (name, comparison) in first
            .compare(&second, &Bootstrap::default())
            .expect("the same test set")
        {
            assert!(comparison.difference.value.abs() < 1e-9, "{name}");
        }
        reversed[0].reference.push('。');
        let other = TextEvaluation::new(&reversed, TextLanguage::Chinese).expect("there are pairs");
        let refused = first
            .compare(&other, &Bootstrap::default())
            .expect_err("another test set");
        assert_eq!(
            refused,
            EvaluateError::DifferentStudies { study: "3".into() }
        );
        let fewer =
            TextEvaluation::new(&pairs()[..3], TextLanguage::Chinese).expect("there are pairs");
        let refused = fewer
            .compare(&first, &Bootstrap::default())
            .expect_err("another test set");
        assert_eq!(
            refused,
            EvaluateError::DifferentStudies { study: "3".into() }
        );
    }

    #[test]
    fn english_words_are_compared_whatever_their_case() {
        let pairs = [pair("1", "no pleural effusion", "No pleural effusion.")];
        let scores = |language| {
            let scores = TextEvaluation::new(&pairs, language)
                .expect("a pair")
                .scores();
            scores.words.bleu[0]
        };
        assert!((scores(TextLanguage::English) - 100.0).abs() < 1e-9);
        assert!(scores(TextLanguage::Chinese) < 60.0);
    }

    #[test]
    fn no_pairs_are_refused() {
        assert_eq!(
            TextEvaluation::new(&[], TextLanguage::Chinese).err(),
            Some(EvaluateError::Empty)
        );
    }
}

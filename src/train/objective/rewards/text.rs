//! Rewards from the text alone, and from text scores against the truth.

use std::{collections::HashSet, sync::Arc};

use serde_json::Value;

use super::{Answered, Reward};
use crate::eval::{
    findings::{RuleSet, Section},
    text::{TextEvaluation, TextLanguage, TextPair, TextScores, segment::characters},
};

/// Characters of a piece that is looked for again.
const PIECE: usize = 10;

/// Share of an answer's pieces that are no repeats.
pub(super) struct Repetition;

impl Reward for Repetition {
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String> {
        let values = answers.iter().map(|one| {
            let text = characters(&one.answer);
            if text.is_empty() {
                return 0.0;
            }
            let mut seen = HashSet::new();
            let pieces = text.windows(PIECE);
            let (mut new, mut all) = (0, 0);
            for piece in pieces {
                all += 1;
                new += usize::from(seen.insert(piece));
            }
            if all == 0 {
                1.0
            } else {
                new as f64 / all as f64
            }
        });
        Ok(values.collect())
    }
}

/// Length in characters within bounds, or near the truth's.
pub(super) struct Length {
    pub least: Option<usize>,
    pub most: Option<usize>,
}

impl Reward for Length {
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String> {
        let values = answers.iter().map(|one| {
            let length = characters(&one.answer).len() as f64;
            let (least, most) = match (self.least, self.most) {
                (None, None) => {
                    let wanted = characters(&one.truth).len() as f64;
                    (wanted, wanted)
                }
                (least, most) => (
                    least.unwrap_or(0) as f64,
                    most.map_or(f64::INFINITY, |most| most as f64),
                ),
            };
            if length == 0.0 {
                0.0
            } else if length < least {
                length / least
            } else if length > most {
                most / length
            } else {
                1.0
            }
        });
        Ok(values.collect())
    }
}

/// Headings of a report, or the keys of a JSON object.
pub(super) struct Format {
    pub rules: Arc<RuleSet>,
    pub json_keys: Option<Vec<String>>,
}

impl Reward for Format {
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String> {
        let values = answers.iter().map(|one| {
            let shares: Vec<bool> = match &self.json_keys {
                Some(keys) => {
                    let object = match serde_json::from_str(one.answer.trim()) {
                        Ok(Value::Object(object)) => object,
                        _ => return 0.0,
                    };
                    std::iter::once(true)
                        .chain(keys.iter().map(|key| object.contains_key(key)))
                        .collect()
                }
                None => {
                    let sections = self.rules.named_sections(&one.answer);
                    let has = |wanted| sections.iter().any(|(section, _)| *section == wanted);
                    vec![has(Section::Findings), has(Section::Impression)]
                }
            };
            shares.iter().filter(|there| **there).count() as f64 / shares.len() as f64
        });
        Ok(values.collect())
    }
}

/// A text score of `eval`.
pub(super) struct Score {
    metric: String,
}

impl Score {
    pub(super) fn new(metric: Option<String>) -> Self {
        Self {
            metric: metric.unwrap_or_default(),
        }
    }
}

/// Checks the name of a text score.
pub(super) fn check_metric(metric: Option<&str>) -> Result<(), String> {
    // The weights of CIDEr-D depend on the other answers of the batch.
    let names = TextScores::names().into_iter();
    let names: Vec<String> = names.filter(|name| !name.ends_with("cider_d")).collect();
    match metric {
        Some(metric) if names.iter().any(|name| name == metric) => Ok(()),
        Some(metric) => Err(format!(
            "`metric` is \"{metric}\", expected one of {}",
            names.join(", ")
        )),
        None => Err("it needs `metric`, such as \"characters.rouge_l\"".to_owned()),
    }
}

impl Reward for Score {
    fn values(&mut self, answers: &[Answered]) -> Result<Vec<f64>, String> {
        let place = TextScores::names()
            .iter()
            .position(|name| *name == self.metric);
        let place = place.ok_or_else(|| format!("there is no score `{}`", self.metric))?;
        let pairs = answers.iter().map(|one| TextPair {
            study: one.row.to_string(),
            prediction: one.answer.clone(),
            reference: one.truth.clone(),
        });
        let pairs: Vec<TextPair> = pairs.collect();
        let language = TextLanguage::guess(answers.iter().map(|one| one.truth.as_str()));
        let scores = TextEvaluation::new(&pairs, language).map_err(|error| error.to_string())?;
        let values = (0..pairs.len()).map(|index| {
            let scores = scores.pair_scores(index).map(|scores| scores.values());
            scores.map_or(0.0, |values| values[place] / 100.0)
        });
        Ok(values.collect())
    }
}

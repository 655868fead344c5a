//! An outcome as JSON, and the images of a page.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::cases::TestSet;
use crate::{
    dataset::Dataset,
    eval::{
        outcome::{CaseReview, EvalOutcome, STATUSES},
        report::page::{CaseImages, PageFacts},
    },
    processor::image::{DecodeLimits, RgbImage, load},
    study::StudyFacts,
};

/// Everything that was found out; text scores in per cent, shares of findings from 0 to 1.
pub(super) fn json(outcome: &EvalOutcome, facts: &PageFacts, study: &StudyFacts) -> Value {
    let facts_of = facts.facts.iter();
    let named = facts_of.map(|(_, english, value)| (english.replace(' ', "_"), json!(value)));
    let mut cases = vec![Value::Null; outcome.cases.len()];
    for (rank, review) in outcome.reviews.iter().enumerate() {
        let (case, text) = (&outcome.cases[review.case], &outcome.texts[review.case]);
        let other = outcome.other.as_ref().map(|run| {
            let review = &run.reviews[review.case];
            json!({
                "answer": run.texts[review.case].answer,
                "thinking": run.texts[review.case].thinking,
                "differences": differences_of(review),
                "false_normal": review.false_normal,
                "invented": review.invented,
                "rouge_l": review.rouge_l,
            })
        });
        cases[review.case] = json!({
            "study": case.study,
            "name": case.name,
            "truth": case.truth,
            "answer": text.answer,
            "thinking": text.thinking,
            "differences": differences_of(review),
            "empty": review.empty,
            "false_normal": review.false_normal,
            "invented": review.invented,
            "contradiction": review.contradiction,
            "rouge_l": review.rouge_l,
            "rank_from_worst": rank + 1,
            "other": other,
        });
    }
    let bootstrap = &outcome.settings.bootstrap;
    json!({
        "program": concat!("xray-qwen3vl ", env!("CARGO_PKG_VERSION")),
        "about": named.collect::<serde_json::Map<String, Value>>(),
        "warnings": facts.warnings.iter().map(|remark| &remark.english).collect::<Vec<_>>(),
        "reports": outcome.cases.len(),
        "studies": outcome.studies,
        "study": study,
        "bootstrap": {
            "resamples": bootstrap.resamples,
            "confidence": bootstrap.confidence,
            "seed": bootstrap.seed,
        },
        "uncertain": outcome.settings.policies,
        "rules": { "name": outcome.rules.0, "guessed": outcome.rules.1 },
        "loss": facts.loss.map(|(loss, perplexity, accuracy)| json!({
            "loss": loss,
            "perplexity": perplexity,
            "token_accuracy": accuracy,
        })),
        "systems": outcome.systems,
        "comparison": outcome.comparison,
        "other": outcome.other.as_ref().map(|run| json!({
            "scores": run.scores,
            "confusion": run.confusion,
        })),
        "subgroups": outcome.subgroups,
        "probabilities": outcome.probabilities,
        "judge": outcome.judge,
        "language": outcome.settings.language,
        "probability_comparison": outcome.probability_comparison,
        "confusion": { "order": STATUSES, "by_finding": outcome.confusion },
        "cases": cases,
    })
}

fn differences_of(review: &CaseReview) -> serde_json::Map<String, Value> {
    let differences = review.differences.iter();
    differences
        .map(|(finding, difference)| (finding.to_string(), json!(difference)))
        .collect()
}

/// Finds and reads the images of cases.
pub(super) struct ImageFinder<'a> {
    set: &'a TestSet,
    data: Option<&'a Dataset>,
    folder: Option<&'a Path>,
    missing: usize,
    first: Option<String>,
}

impl<'a> ImageFinder<'a> {
    pub(super) fn new(
        set: &'a TestSet,
        data: Option<&'a Dataset>,
        folder: Option<&'a Path>,
    ) -> Self {
        Self {
            set,
            data,
            folder,
            missing: 0,
            first: None,
        }
    }

    /// The images of one case.
    pub(super) fn of(&mut self, case: usize) -> CaseImages {
        if let (Some(data), Some(row)) = (self.data, self.set.rows[case])
            && let Some(images) = data.drawn(row)
        {
            return images.into_iter().map(Ok).collect();
        }
        let set = self.set;
        set.images[case]
            .iter()
            .map(|path| self.open(path))
            .collect()
    }

    fn open(&mut self, path: &Path) -> Result<RgbImage, String> {
        let path = match (self.folder, path.file_name()) {
            (Some(folder), Some(name)) => folder.join(name),
            _ => PathBuf::from(path),
        };
        load(&path, &DecodeLimits::default()).map_err(|error| {
            self.missing += 1;
            self.first.get_or_insert_with(|| error.to_string());
            // A page may travel; the folders of this machine stay here.
            let name = path
                .file_name()
                .map(|name| name.to_string_lossy().into_owned());
            format!("影像打不开 cannot be opened: {}", name.unwrap_or_default())
        })
    }

    /// Prints to stderr how many images the page lacks.
    pub(super) fn print_missing(&self) {
        if let Some(first) = &self.first {
            eprintln!(
                "note: {} films of the page cannot be opened, the first: {first}; hint: `--images-dir` names their folder",
                self.missing
            );
        }
    }
}

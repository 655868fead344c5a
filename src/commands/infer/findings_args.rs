//! The arguments of `infer --findings`, and what its probabilities rest on.

use std::{path::PathBuf, sync::Arc};

use clap::Args;

use crate::eval::{
    findings::RuleSet,
    probability::{
        calibration::Calibration,
        evidence::{ClassEvidence, of_reports},
        judged::form_of,
        logit::{DRAWN_REPORTS, ScoreForm, SentenceContext},
    },
};

/// Arguments about the probabilities of findings.
#[derive(Debug, Clone, Default, Args)]
pub struct FindingsArgs {
    /// Also give the probability of each class of finding, from the model's own logits, and mark where it
    /// contradicts the report.
    ///
    /// It is the share of 16 reports, drawn at temperature 1 beside the report itself, that state the finding; a
    /// calibration may ask otherwise. With a calibration each class is present, absent or undecided. A finding that
    /// the report leaves out counts as denied by it.
    #[arg(long, conflicts_with = "show_tags")]
    pub findings: bool,
    /// Calibration that `calibrate` wrote; by default calibration.json in the folder of the adapter or model.
    #[arg(
        long,
        value_name = "FILE.json",
        requires = "findings",
        conflicts_with = "no_calibration"
    )]
    pub calibration: Option<PathBuf>,
    /// Use no calibration, even if there is one: probabilities are those of the logits, and nothing is decided.
    #[arg(long, requires = "findings")]
    pub no_calibration: bool,
    /// Use the calibration even if it was made for another model, question or image size.
    #[arg(long, requires = "findings")]
    pub any_calibration: bool,
    /// Table of words that findings are read from the report with: `openi` (machine-translated), `hospital`, or a
    /// file in the form of theirs; guessed from each report when not given.
    #[arg(long, value_name = "NAME|FILE.toml", requires = "findings")]
    pub rules: Option<String>,
    /// What probabilities rest on; found before the first report.
    #[arg(skip)]
    pub(super) basis: Option<Arc<Basis>>,
}

/// What turns logits into probabilities.
#[derive(Debug)]
pub(super) struct Basis {
    pub(super) calibration: Option<Calibration>,
    /// What a reader of the record has to know of it.
    pub(super) remark: Option<(&'static str, String)>,
    /// Distinguishes records: what the probabilities depend on besides the model.
    pub(super) key: String,
    /// What drawn reports are read with; guessed from them without it.
    pub(super) rules: Option<RuleSet>,
}

impl Basis {
    /// Form of the score.
    pub(super) fn form(&self) -> ScoreForm {
        form_of(self.calibration.as_ref()).0
    }

    /// Reports to be drawn of an image.
    pub(super) fn draws(&self) -> usize {
        let calibration = self.calibration.as_ref();
        calibration.map_or(DRAWN_REPORTS, |one| one.model.draws)
    }

    /// What drawn reports say.
    pub(super) fn read(&self, reports: &[String]) -> Vec<ClassEvidence> {
        let guessed;
        let rules = match &self.rules {
            Some(rules) => rules,
            None => {
                guessed = RuleSet::guess(reports.iter().map(String::as_str));
                &guessed
            }
        };
        of_reports(rules, reports)
    }

    /// After what the sentences are put.
    pub(super) fn context(&self) -> SentenceContext {
        form_of(self.calibration.as_ref()).1
    }

    /// Beginning of the answer before the sentences.
    pub(super) fn lead(&self) -> &str {
        let calibration = self.calibration.as_ref();
        calibration.map_or("", |one| &one.model.lead)
    }
}

/// What [`super::record::settings_hash`] adds for probabilities; empty without them.
pub(super) fn settings_key(args: &FindingsArgs) -> String {
    match &args.basis {
        Some(basis) => format!(" findings {}", basis.key),
        None => String::new(),
    }
}

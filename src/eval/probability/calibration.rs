//! The file `calibration.json`: how logits of one model become probabilities and decisions.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{
    fit::{BIAS_PENALTY, fit, mean_loss},
    logit::{ScoreForm, SentenceContext, sigmoid},
    metrics::{brier, coverage_at, coverage_curve, expected_calibration_error, reliability},
    thresholds::{Decided, Decision, Thresholds},
};
use crate::{
    base::files::{FileError, write_atomic},
    eval::findings::{Finding, UncertainPolicy},
};

/// Name of the file in the folder of an adapter or model.
pub const CALIBRATION_FILE: &str = "calibration.json";

/// Layout number.
const FORMAT: u32 = 1;

/// Largest file that is read, in bytes; one is some 10 kB.
const LARGEST: u64 = 1 << 20;

/// What logits depend on besides the image.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AskedModel {
    /// Fingerprint of the base's weights.
    pub base: String,
    /// SHA-256 of the adapter's weights.
    pub adapter: Option<String>,
    /// Quantisation of the weights at load time.
    pub quantize: Option<String>,
    /// Fewest and most pixels of an image.
    pub pixels: [usize; 2],
    /// The question.
    pub prompt: String,
    /// The system message.
    pub system: Option<String>,
    /// Beginning of the answer, before the sentences.
    pub lead: String,
    /// After what the sentences are put.
    pub context: SentenceContext,
    /// How a sentence is scored.
    pub form: ScoreForm,
    /// Fingerprint of the table of sentences; empty where none is used.
    pub wordings: String,
    /// Reports that are drawn of an image; 0 where sentences are asked for.
    #[serde(default)]
    pub draws: usize,
    /// What drawn reports are read with, as [`RuleSet::identity`](crate::eval::findings::RuleSet::identity) says.
    #[serde(default)]
    pub rules: String,
}

impl AskedModel {
    /// In what this one differs from `other`, each as a phrase; empty if in nothing.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let short = |hash: &str| format!("`{}…`", hash.get(..12).unwrap_or(hash));
        let adapter = |hash: &Option<String>| hash.as_deref().map_or("none".to_owned(), short);
        let text = |text: &Option<String>| format!("{text:?}");
        let pixels = |[least, most]: [usize; 2]| format!("{least} to {most}");
        [
            ("base model", short(&self.base), short(&other.base)),
            ("adapter", adapter(&self.adapter), adapter(&other.adapter)),
            ("--quantize", text(&self.quantize), text(&other.quantize)),
            ("pixels", pixels(self.pixels), pixels(other.pixels)),
            (
                "--prompt",
                format!("{:?}", self.prompt),
                format!("{:?}", other.prompt),
            ),
            ("--system", text(&self.system), text(&other.system)),
            (
                "--lead",
                format!("{:?}", self.lead),
                format!("{:?}", other.lead),
            ),
            (
                "--context",
                self.context.to_string(),
                other.context.to_string(),
            ),
            ("--form", self.form.to_string(), other.form.to_string()),
            (
                "table of sentences",
                self.wordings.clone(),
                other.wordings.clone(),
            ),
            ("--draws", self.draws.to_string(), other.draws.to_string()),
            (
                "--rules for drawn reports",
                self.rules.clone(),
                other.rules.clone(),
            ),
        ]
        .into_iter()
        .filter(|(_, ours, theirs)| ours != theirs)
        .map(|(what, ours, theirs)| format!("{what} {theirs} instead of {ours}"))
        .collect()
    }
}

/// What was calibrated on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CalibrationData {
    /// As it was named.
    pub name: String,
    /// Hash of the file, or the generator's name.
    pub fingerprint: String,
    /// Reports that were scored.
    pub reports: usize,
    /// Rows without an image, which were left out.
    pub without_image: usize,
    /// Who says what is there: the table of words, or `phantom`.
    pub truth: String,
    /// What a doubtful finding counts as.
    pub uncertain: UncertainPolicy,
}

/// How good probabilities are on the calibration set itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fitness {
    /// Mean negative log-likelihood.
    pub loss: f64,
    /// Expected calibration error over ten bins of equal count.
    pub ece: f64,
    /// Brier score.
    pub brier: f64,
    /// Share of cases that can be answered with the target error.
    pub coverage: f64,
}

impl Fitness {
    /// Of probabilities.
    pub fn of(cases: &[(f64, bool)], target_error: f64) -> Self {
        Self {
            loss: mean_loss(cases.iter().copied()),
            ece: expected_calibration_error(&reliability(cases)),
            brier: brier(cases),
            coverage: coverage_at(&coverage_curve(cases), target_error),
        }
    }
}

/// Numbers of one class.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClassCalibration {
    /// Added to the logit after it is divided by the temperature.
    pub bias: f64,
    /// The highest probability that decides "absent"; none if no case does.
    pub absent_to: Option<f64>,
    /// The lowest that decides "present".
    pub present_from: Option<f64>,
    /// Reports that have it.
    pub positives: usize,
    /// Reports that do not.
    pub negatives: usize,
    /// Decisions on the calibration set, and wrong ones among them.
    pub decided: Decided,
}

/// What [`CALIBRATION_FILE`] holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Calibration {
    /// Layout number, 1.
    pub format: u32,
    /// The program that wrote it.
    pub program: String,
    /// What it belongs to.
    pub model: AskedModel,
    /// What it was made from.
    pub data: CalibrationData,
    /// Most errors among decided cases, as a share.
    pub target_error: f64,
    /// Weight of the L2 penalty on the biases.
    pub bias_penalty: f64,
    /// Logits are divided by it.
    pub temperature: f64,
    /// Logits do not rise with the truth: probabilities say next to nothing.
    pub useless: bool,
    /// By class.
    pub classes: BTreeMap<Finding, ClassCalibration>,
    /// Before, over all classes that occur.
    pub before: Option<Fitness>,
    /// After, likewise, on the set it was fitted on.
    pub after: Option<Fitness>,
}

/// A class's logits, each with whether the class is there.
pub type ClassCases = BTreeMap<Finding, Vec<(f64, bool)>>;

/// Why a calibration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// The file cannot be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// It is too large for one.
    #[error("`{}` has {bytes} bytes, too many for a calibration; expected the file that `calibrate` writes", .path.display())]
    Large {
        /// The file.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// It holds something else.
    #[error("`{}` is no calibration ({reason}); expected the file that `calibrate` writes", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It belongs to something else.
    #[error(
        "`{}` is the calibration of another model or question: here {differences}; make one with `calibrate`, name another with --calibration, leave it out with --no-calibration, or use it all the same with --any-calibration",
        .path.display()
    )]
    Other {
        /// The file.
        path: PathBuf,
        /// What differs.
        differences: String,
    },
}

impl Calibration {
    /// Fits `cases`.
    pub fn of(
        model: AskedModel,
        data: CalibrationData,
        cases: &ClassCases,
        target_error: f64,
    ) -> Self {
        let classes: Vec<Vec<(f64, bool)>> = cases.values().cloned().collect();
        let fitted = fit(&classes);
        let mut this = Self {
            format: FORMAT,
            program: concat!("xray-qwen3vl ", env!("CARGO_PKG_VERSION")).to_owned(),
            model,
            data,
            target_error,
            bias_penalty: BIAS_PENALTY,
            temperature: fitted.temperature,
            useless: fitted.useless,
            classes: BTreeMap::new(),
            before: None,
            after: None,
        };
        let (mut before, mut after) = (Vec::new(), Vec::new());
        for ((finding, cases), bias) in cases.iter().zip(fitted.biases) {
            let probabilities: Vec<(f64, bool)> = cases
                .iter()
                .map(|(logit, truth)| (sigmoid(logit / this.temperature + bias), *truth))
                .collect();
            let thresholds = Thresholds::choose(&probabilities, target_error);
            let mut decided = Decided::default();
            for (probability, truth) in &probabilities {
                decided.add(thresholds.decide(*probability), *truth);
            }
            let positives = cases.iter().filter(|(_, truth)| *truth).count();
            if positives > 0 {
                before.extend(cases.iter().map(|(logit, truth)| (sigmoid(*logit), *truth)));
                after.extend(probabilities);
            }
            this.classes.insert(
                *finding,
                ClassCalibration {
                    bias,
                    absent_to: thresholds.absent_to,
                    present_from: thresholds.present_from,
                    positives,
                    negatives: cases.len() - positives,
                    decided,
                },
            );
        }
        if !before.is_empty() {
            this.before = Some(Fitness::of(&before, target_error));
            this.after = Some(Fitness::of(&after, target_error));
        }
        this
    }

    /// Probability and decision of a class; of one it does not know, the bias is the mean of all, and nothing is
    /// decided.
    pub fn apply(&self, finding: Finding, logit: f64) -> (f64, Decision) {
        let Some(class) = self.classes.get(&finding) else {
            let biases = self.classes.values().map(|class| class.bias);
            let mean = biases.sum::<f64>() / self.classes.len().max(1) as f64;
            return (
                sigmoid(logit / self.temperature + mean),
                Decision::Undecided,
            );
        };
        let probability = sigmoid(logit / self.temperature + class.bias);
        let thresholds = Thresholds {
            absent_to: class.absent_to,
            present_from: class.present_from,
        };
        (probability, thresholds.decide(probability))
    }

    /// Writes it.
    ///
    /// # Errors
    /// [`CalibrationError::File`].
    pub fn save(&self, path: &Path) -> Result<(), CalibrationError> {
        Ok(write_atomic(path, |out| {
            serde_json::to_writer_pretty(&mut *out, self)?;
            out.write_all(b"\n")
        })?)
    }

    /// Reads one; `None` if there is no such file.
    ///
    /// # Errors
    /// [`CalibrationError`] names the file and what is wrong.
    pub fn load(path: &Path) -> Result<Option<Self>, CalibrationError> {
        let read = |cause| CalibrationError::File(FileError::read(path, cause));
        let damaged = |reason: String| CalibrationError::Damaged {
            path: path.to_path_buf(),
            reason,
        };
        let bytes = match fs::metadata(path) {
            Ok(facts) => facts.len(),
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(cause) => return Err(read(cause)),
        };
        if bytes > LARGEST {
            let path = path.to_path_buf();
            return Err(CalibrationError::Large { path, bytes });
        }
        let text = fs::read(path).map_err(read)?;
        let this: Self =
            serde_json::from_slice(&text).map_err(|cause| damaged(cause.to_string()))?;
        if this.format != FORMAT {
            return Err(damaged(format!(
                "layout {}, expected {FORMAT}",
                this.format
            )));
        }
        if !(this.temperature.is_finite() && this.temperature > 0.0) {
            let found = this.temperature;
            return Err(damaged(format!(
                "temperature {found}, expected more than 0"
            )));
        }
        Ok(Some(this))
    }

    /// Refuses to be used for anything but what it was made for.
    ///
    /// # Errors
    /// [`CalibrationError::Other`] with all that differs.
    pub fn check(&self, path: &Path, model: &AskedModel) -> Result<(), CalibrationError> {
        let differences = self.model.differences(model);
        if differences.is_empty() {
            return Ok(());
        }
        Err(CalibrationError::Other {
            path: path.to_path_buf(),
            differences: differences.join(", "),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(base: &str) -> AskedModel {
        AskedModel {
            base: base.to_owned(),
            prompt: "?".to_owned(),
            ..AskedModel::default()
        }
    }

    fn made() -> Calibration {
        let class = |shift: f64| -> Vec<(f64, bool)> {
            (0..80)
                .map(|at| (f64::from(at) / 4.0 - 10.0 + shift, at > 40 || at % 9 == 0))
                .collect()
        };
        let cases = ClassCases::from([
            (Finding::Pneumothorax, class(0.0)),
            (Finding::Edema, class(3.0)),
            (Finding::Hernia, vec![(-4.0, false); 30]),
        ]);
        let data = CalibrationData {
            name: "val.jsonl".to_owned(),
            fingerprint: "sha256:0".to_owned(),
            reports: 80,
            without_image: 0,
            truth: "hospital".to_owned(),
            uncertain: UncertainPolicy::AsPresent,
        };
        Calibration::of(asked("aaaaaaaaaaaaaaaa"), data, &cases, 0.05)
    }

    #[test]
    fn a_saved_calibration_says_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CALIBRATION_FILE);
        assert_eq!(Calibration::load(&path).unwrap(), None);
        let made = made();
        made.save(&path).unwrap();
        let read = Calibration::load(&path).unwrap().unwrap();
        assert_eq!(read, made);
        let (low, _) = read.apply(Finding::Pneumothorax, -9.0);
        let (high, _) = read.apply(Finding::Pneumothorax, 9.0);
        assert!(low < 0.3 && high > 0.7, "{low} {high}");
        // A class that the set has no case of is never decided.
        assert_eq!(read.apply(Finding::Hernia, 50.0).1, Decision::Undecided);
        assert_eq!(read.apply(Finding::Fracture, 50.0).1, Decision::Undecided);
        for class in read.classes.values() {
            assert!(class.decided.errors as f64 <= 0.05 * class.decided.decided as f64);
        }
        let (before, after) = (read.before.unwrap(), read.after.unwrap());
        assert!(
            after.loss < before.loss && after.brier < before.brier,
            "{before:?} {after:?}"
        );
    }

    #[test]
    fn another_model_or_question_is_refused_by_name() {
        let made = made();
        let path = Path::new("c.json");
        made.check(path, &made.model).unwrap();
        let mut other = asked("bbbbbbbbbbbbbbbb");
        other.prompt = "!".to_owned();
        let error = made.check(path, &other).unwrap_err().to_string();
        for part in [
            "`c.json`",
            "bbbbbbbbbbbb",
            "aaaaaaaaaaaa",
            "--prompt",
            "--any-calibration",
        ] {
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn what_is_no_calibration_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(CALIBRATION_FILE);
        let good = serde_json::to_string(&made()).unwrap();
        let temperature = serde_json::to_string(&made().temperature).unwrap();
        for text in [
            "{".to_owned(),
            good.replace("\"format\":1", "\"format\":2"),
            good.replace("\"useless\"", "\"worthless\""),
            good.replace(
                &format!("\"temperature\":{temperature}"),
                "\"temperature\":0.0",
            ),
        ] {
            fs::write(&path, text).unwrap();
            let error = Calibration::load(&path).unwrap_err().to_string();
            assert!(error.contains(CALIBRATION_FILE), "{error}");
        }
        fs::write(&path, vec![b' '; LARGEST as usize + 1]).unwrap();
        assert!(matches!(
            Calibration::load(&path),
            Err(CalibrationError::Large { .. })
        ));
    }
}

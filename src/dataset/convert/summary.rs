//! What a conversion made, in numbers, words and pictures.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::corpora::Language;
use super::form::CorpusForm;
use super::options::Split;
use super::selection::{Sections, Views};
use crate::base::plot;
use crate::study::{StudyFacts, counted};

/// Spread of a whole number over rows or images.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Spread {
    /// How many values there are.
    pub count: usize,
    /// Smallest value.
    pub min: usize,
    /// The value that 5 % do not exceed.
    pub p5: usize,
    /// The value in the middle.
    pub p50: usize,
    /// The value that 95 % do not exceed.
    pub p95: usize,
    /// The value that 99 % do not exceed.
    pub p99: usize,
    /// Largest value.
    pub max: usize,
    /// Mean value.
    pub mean: f64,
    /// Sum of all values.
    pub total: usize,
}

impl Spread {
    /// Spread of `values`; `None` if there are none. Percentiles are values that occur, those at
    /// the nearest place.
    pub fn of(values: &[usize]) -> Option<Self> {
        let mut values = values.to_vec();
        values.sort_unstable();
        let (&min, &max) = (values.first()?, values.last()?);
        let last = values.len() - 1;
        let at = |share: f64| values[((last as f64 * share).round() as usize).min(last)];
        let total: usize = values.iter().sum();
        Some(Self {
            count: values.len(),
            min,
            p5: at(0.05),
            p50: at(0.5),
            p95: at(0.95),
            p99: at(0.99),
            max,
            mean: total as f64 / values.len() as f64,
            total,
        })
    }
}

/// Rows of one output file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PartCount {
    /// Rows.
    pub rows: usize,
    /// Studies.
    pub studies: usize,
}

/// Rows of one file that were left out for one reason.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOutRows {
    /// The file of the corpus.
    pub file: String,
    /// Why.
    pub reason: String,
    /// How many rows.
    pub rows: usize,
    /// The first of them, by their number in the file; `missing.txt` lists all.
    pub first: Vec<usize>,
}

/// What a conversion made; `summary.json` holds the same.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// The corpus, or the form of the input.
    pub form: CorpusForm,
    /// Whether the corpus was guessed from its files.
    pub guessed: bool,
    /// SHA-256 of the input file, or of the first of several; empty where a corpus is a tree without a table.
    pub input_sha256: String,
    /// SHA-256 of each table or list of the corpus that was read.
    pub files: BTreeMap<String, String>,
    /// What became of several views of a study; absent where rows stay as they are.
    pub views: Option<Views>,
    /// The sections that are the answer; absent where rows stay as they are.
    pub sections: Option<Sections>,
    /// The language of the reports.
    pub language: Option<Language>,
    /// Seed of all draws.
    pub seed: u64,
    /// What was kept together.
    pub split: Split,
    /// Share of the rows wanted for validation; absent where the corpus' own split has a validation part.
    pub val_ratio: Option<f64>,
    /// Rows of the input.
    pub rows_read: usize,
    /// Rows left out because they have no text, or not the sections wanted.
    pub rows_without_report: usize,
    /// Rows left out because they are not frontal, or not known to be.
    pub rows_not_frontal: usize,
    /// Rows left out because the corpus' own split does not name them.
    pub rows_without_part: usize,
    /// Rows left out because an image is missing; `missing.txt` names each.
    pub rows_without_image: usize,
    /// Rows left out because an image cannot be used; `missing.txt` names each.
    pub rows_with_unusable_image: usize,
    /// Rows left out because there is no reasoning for them; `missing.txt` names each.
    pub rows_without_thinking: usize,
    /// The rows left out, by file and reason.
    pub left_out: Vec<LeftOutRows>,
    /// Images with reasoning that no row is about.
    pub thinking_unused: Vec<String>,
    /// What went into `train.jsonl`.
    pub train: PartCount,
    /// What went into `val.jsonl`.
    pub val: PartCount,
    /// What went into `test.jsonl`, where the corpus' own split has a test part.
    pub test: Option<PartCount>,
    /// How studies were found.
    pub study: StudyFacts,
    /// Studies with rows in more than one part: 0 unless the split is by image, or is the corpus' own.
    pub studies_in_both: usize,
    /// Patients, as far as they are known, with rows in more than one part.
    pub patients_in_both: usize,
    /// What was decided by default, and what there is to know about the corpus.
    pub remarks: Vec<String>,
    /// What has to be looked at before the files are used.
    pub warnings: Vec<String>,
    /// How often each question was drawn.
    pub questions: BTreeMap<String, usize>,
    /// Rows that kept the question they came with.
    pub questions_kept: usize,
    /// Characters of an answer.
    pub characters: Option<Spread>,
    /// Tokens of an answer, without the token that ends it; absent without a tokenizer.
    pub answer_tokens: Option<Spread>,
    /// Tokens of a whole row, image tokens included; absent without a tokenizer.
    pub row_tokens: Option<Spread>,
    /// Width of an image, in pixels.
    pub image_width: Option<Spread>,
    /// Height of an image, in pixels.
    pub image_height: Option<Spread>,
    /// Tokens an image takes.
    pub vision_tokens: Option<Spread>,
    /// Smallest size an image is scaled to, in pixels.
    pub min_pixels: usize,
    /// Largest size an image is scaled to, in pixels.
    pub max_pixels: usize,
}

impl Summary {
    /// Rows of the input that are in neither output file.
    pub fn rows_left_out(&self) -> usize {
        self.rows_without_image
            + self.rows_with_unusable_image
            + self.rows_without_thinking
            + self.rows_without_report
            + self.rows_not_frontal
            + self.rows_without_part
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { train, val, .. } = self;
        let how = if self.guessed {
            " (guessed from its files; `--corpus` names another)"
        } else {
            ""
        };
        writeln!(f, "corpus                 {}{how}", self.form.name())?;
        writeln!(f, "rows read              {}", self.rows_read)?;
        for (what, count) in [
            ("  without image        ", self.rows_without_image),
            ("  image not usable     ", self.rows_with_unusable_image),
            ("  without thinking     ", self.rows_without_thinking),
            ("  without report       ", self.rows_without_report),
            ("  not frontal          ", self.rows_not_frontal),
            ("  in no part of split  ", self.rows_without_part),
        ] {
            if count > 0 {
                writeln!(f, "{what}{count}, left out, see missing.txt")?;
            }
        }
        if !self.thinking_unused.is_empty() {
            let count = self.thinking_unused.len();
            writeln!(
                f,
                "  thinking unused      {count}, no row is about the image"
            )?;
        }
        let test = self.test.iter().map(|test| ("test.jsonl", test));
        for (name, part) in [("train.jsonl", train), ("val.jsonl", val)]
            .into_iter()
            .chain(test)
        {
            let rows = counted(part.rows, "row", "rows");
            let studies = counted(part.studies, "study", "studies");
            writeln!(f, "{name:<22} {rows}, {studies}")?;
        }
        writeln!(f, "{}", self.study.english())?;
        for (what, count) in [
            ("  studies in both      ", self.studies_in_both),
            ("  patients in both     ", self.patients_in_both),
        ] {
            if count > 0 {
                writeln!(
                    f,
                    "{what}{count}: the validation loss is too good; `--split uid` keeps studies and patients together"
                )?;
            }
        }
        for remark in &self.remarks {
            writeln!(f, "note: {remark}")?;
        }
        for warning in &self.warnings {
            writeln!(f, "warning: {warning}")?;
        }
        writeln!(f, "questions drawn        {}", self.questions.len())?;
        if self.questions_kept > 0 {
            writeln!(f, "  kept as they came    {}", self.questions_kept)?;
        }
        writeln!(
            f,
            "{:<22} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>9} {:>10}",
            "", "min", "p5", "p50", "p95", "p99", "max", "mean", "total"
        )?;
        for (what, spread) in [
            ("answer characters", &self.characters),
            ("answer tokens", &self.answer_tokens),
            ("row tokens", &self.row_tokens),
            ("image width", &self.image_width),
            ("image height", &self.image_height),
            ("vision tokens", &self.vision_tokens),
        ] {
            if let Some(s) = spread {
                writeln!(
                    f,
                    "{what:<22} {:>7} {:>7} {:>7} {:>7} {:>7} {:>7} {:>9.1} {:>10}",
                    s.min, s.p5, s.p50, s.p95, s.p99, s.max, s.mean, s.total
                )?;
            }
        }
        Ok(())
    }
}

/// Every number that a [`Summary`] is computed from.
#[derive(Debug, Default)]
pub(super) struct Measures {
    pub(super) characters: Vec<usize>,
    pub(super) answer_tokens: Vec<usize>,
    pub(super) row_tokens: Vec<usize>,
    pub(super) image_width: Vec<usize>,
    pub(super) image_height: Vec<usize>,
    pub(super) vision_tokens: Vec<usize>,
}

impl Measures {
    /// File names and SVG drawings; `None` where nothing was measured.
    pub(super) fn histograms(&self) -> [(&'static str, Option<String>); 4] {
        let draw = |values: &[usize], title, unit| {
            let values: Vec<f64> = values.iter().map(|value| *value as f64).collect();
            (!values.is_empty()).then(|| plot::histogram(&values, title, unit))
        };
        let answers = "Length of the answers";
        let rows = "Length of the rows, image tokens included";
        [
            (
                "characters.svg",
                draw(&self.characters, answers, "characters"),
            ),
            (
                "answer-tokens.svg",
                draw(&self.answer_tokens, answers, "tokens"),
            ),
            ("row-tokens.svg", draw(&self.row_tokens, rows, "tokens")),
            (
                "vision-tokens.svg",
                draw(&self.vision_tokens, "Tokens of the images", "tokens"),
            ),
        ]
    }
}

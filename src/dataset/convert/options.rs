//! What to convert, and how.

use std::path::PathBuf;

use serde::Serialize;

use super::form::{CorpusForm, CorpusKeys};
use super::selection::{Sections, Views};
use crate::dataset::reader::DataOptions;
use crate::study::StudyRule;

/// The questions of the published training.
///
/// Source: `PROMPT_TEMPLATES`, XrayQwen3VL, `scripts/convert_xray_swift.py`.
pub const PROMPTS: [&str; 12] = [
    "通过这张胸部X光影像可以诊断出什么？",
    "请分析这张胸部X光片。",
    "这张X光影像显示了什么？",
    "请对这张胸部X光进行诊断分析。",
    "根据这张X光片，患者的情况如何？",
    "请描述这张胸部X光片的诊断结果。",
    "这张胸部X光影像有什么异常发现吗？",
    "请根据这张X光影像给出诊断意见。",
    "分析这张胸部X光片并给出诊断报告。",
    "请解读这张胸部X光影像的检查结果。",
    "这张X光片反映了哪些临床发现？",
    "请对这张胸部影像进行专业分析。",
];

/// What the split keeps together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Split {
    /// Studies, and patients where they are known.
    #[default]
    Uid,
    /// Nothing: rows are drawn one by one, as published; views of one study, which share a report,
    /// can be in both files.
    Image,
    /// What the corpus itself says: train, validation and test part of each row.
    Official,
}

impl Split {
    /// Whether it is the corpus' own.
    pub(super) fn is_official(self) -> bool {
        matches!(self, Self::Official)
    }
}

/// Share of the rows for validation without another wish, the published one.
pub const VAL_RATIO: f64 = 0.05;

/// What to convert, and how.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// The corpus: a file, or the folder that it is in.
    pub input: PathBuf,
    /// Further corpora of the same form, which go into the same output.
    pub more_inputs: Vec<PathBuf>,
    /// Which corpus it is; guessed from its files without.
    pub corpus: Option<CorpusForm>,
    /// How rows are read that training reads as they are.
    pub reading: DataOptions,
    /// Keys of image and report in a corpus of another form.
    pub keys: Option<CorpusKeys>,
    /// Folder of the images. Without it they are looked for where the corpus is, and rows of `messages` name their own.
    pub images: Option<PathBuf>,
    /// Folder to write to; made if missing.
    pub output: PathBuf,
    /// Whether files of an earlier conversion are replaced.
    pub overwrite: bool,
    /// Whether more than half of the rows may be left out for want of an image or a text.
    pub allow_missing: bool,
    /// Questions to draw from instead of those in the language of the reports; also replaces the question of rows of
    /// `messages` with one turn, which else keep theirs.
    pub prompts: Option<Vec<String>>,
    /// What becomes of several views of a study; by default a row each in corpora, and rows as listed in files.
    pub views: Option<Views>,
    /// Which sections of a report are the answer.
    pub sections: Sections,
    /// Seed of all draws.
    pub seed: u64,
    /// Share of the rows for validation, 0 to below 1; above 0 it is at least one row. [`VAL_RATIO`] without.
    pub val_ratio: Option<f64>,
    /// What the split keeps together; without, the corpus' own split where it has one, else [`Split::Uid`].
    pub split: Option<Split>,
    /// What a study is, where rows do not name theirs.
    pub studies: StudyRule,
    /// File of distilled reasoning; rows without a text in it are left out.
    pub thinking: Option<PathBuf>,
}

impl ConvertOptions {
    /// All corpora.
    pub(super) fn inputs(&self) -> impl Iterator<Item = &PathBuf> {
        std::iter::once(&self.input).chain(&self.more_inputs)
    }

    /// A conversion of `input` into `output` with all defaults and the published seed.
    pub fn new(input: impl Into<PathBuf>, output: impl Into<PathBuf>) -> Self {
        Self {
            input: input.into(),
            more_inputs: Vec::new(),
            corpus: None,
            reading: DataOptions::default(),
            keys: None,
            images: None,
            output: output.into(),
            overwrite: false,
            allow_missing: false,
            prompts: None,
            views: None,
            sections: Sections::default(),
            seed: 42,
            val_ratio: None,
            split: None,
            studies: StudyRule::Guess,
            thinking: None,
        }
    }
}

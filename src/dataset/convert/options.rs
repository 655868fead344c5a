//! What to convert, and how.

use std::path::PathBuf;

use serde::Serialize;

use super::corpus::CorpusKeys;
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
}

/// What to convert, and how.
#[derive(Debug, Clone)]
pub struct ConvertOptions {
    /// The corpus.
    pub input: PathBuf,
    /// How rows are read that training reads as they are.
    pub reading: DataOptions,
    /// Keys of image and report in a corpus of another form.
    pub keys: Option<CorpusKeys>,
    /// Folder of the images; rows of `messages` may do without and name their own.
    pub images: Option<PathBuf>,
    /// Folder to write to; made if missing.
    pub output: PathBuf,
    /// Questions to draw from instead of [`PROMPTS`]; also replaces the question of rows of
    /// `messages` with one turn, which else keep theirs.
    pub prompts: Option<Vec<String>>,
    /// Seed of all draws.
    pub seed: u64,
    /// Share of the rows for validation, 0 to below 1; above 0 it is at least one row.
    pub val_ratio: f64,
    /// What the split keeps together.
    pub split: Split,
    /// What a study is, where rows do not name theirs.
    pub studies: StudyRule,
    /// File of distilled reasoning; rows without a text in it are left out.
    pub thinking: Option<PathBuf>,
}

//! What of a corpus becomes rows, and of which part of its split.

use serde::Serialize;

/// Which part of a corpus' own split a row is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Part {
    Train,
    Val,
    Test,
}

impl Part {
    /// The part of this name, as corpora write it.
    pub(super) fn of(name: &str) -> Option<Self> {
        match name.trim().to_lowercase().as_str() {
            "train" | "training" | "训练" | "训练集" => Some(Self::Train),
            "val" | "valid" | "validate" | "validation" | "dev" | "验证" | "验证集" => {
                Some(Self::Val)
            }
            "test" | "testing" | "测试" | "测试集" => Some(Self::Test),
            _ => None,
        }
    }
}

/// What becomes of several views of a study.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Views {
    /// One row with all of them.
    All,
    /// A row for each frontal one.
    Frontal,
    /// A row for each, as in the published training.
    OnePerImage,
}

/// Which sections of a report are the answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Sections {
    /// The findings alone.
    Findings,
    /// The impression alone.
    Impression,
    /// Both, each after its heading; the whole report where it is not divided.
    #[default]
    Both,
}

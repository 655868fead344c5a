//! The reports of a test set, and what each system wrote about them.

use serde::Serialize;

/// One report of the test set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// The study it belongs to; cases of one study are drawn together.
    pub study: String,
    /// What it is called: its images.
    pub name: String,
    /// What was asked, where it is known.
    pub question: String,
    /// What the data set says.
    pub truth: String,
}

/// What a system wrote about one case.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WrittenReport {
    /// The report.
    pub answer: String,
    /// The reasoning before it.
    pub thinking: Option<String>,
}

impl From<String> for WrittenReport {
    fn from(answer: String) -> Self {
        Self {
            answer,
            thinking: None,
        }
    }
}

/// Who wrote the reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum System {
    /// The model under test.
    Model,
    /// The same report for everyone: the one that fits the training reports best.
    Constant,
    /// Any report of the training set.
    Random,
    /// The report of the training image that looks most alike.
    Neighbour,
    /// The model under test, shown the images of other studies.
    Swapped,
}

impl System {
    /// The key used in files.
    pub fn key(self) -> &'static str {
        match self {
            Self::Model => "model",
            Self::Constant => "constant",
            Self::Random => "random",
            Self::Neighbour => "neighbour",
            Self::Swapped => "swapped",
        }
    }

    /// Names for readers: Chinese, English.
    pub fn names(self) -> (&'static str, &'static str) {
        match self {
            Self::Model => ("模型", "model"),
            Self::Constant => ("最佳固定报告", "best constant report"),
            Self::Random => ("随机报告", "random report"),
            Self::Neighbour => ("最近邻影像的报告", "nearest image's report"),
            Self::Swapped => ("模型，影像互换", "model, images swapped"),
        }
    }
}

/// What one system wrote about all cases, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct SystemTexts {
    /// Who.
    pub system: System,
    /// How it came about, for the reader.
    pub note: String,
    /// One a case.
    pub texts: Vec<WrittenReport>,
}

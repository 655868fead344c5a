//! Flags that say what a study is, the same for every command that asks.

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::UsageError;
use crate::study::StudyRule;

/// Where the study of an image is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum StudyFrom {
    /// In its folder.
    Folder,
    /// Before the first `_` of its file name.
    Name,
    /// Nowhere: every image is a study of its own.
    Image,
}

/// What a study is, where rows do not name it.
#[derive(Debug, Clone, Args)]
pub struct StudyArgs {
    /// Key of a row that names its study.
    ///
    /// Without it, `study`, `study_id` or `uid` count where a row has them, and `patient`, `patient_id` or
    /// `subject_id` for the patient. Without any rule, studies are guessed from the paths of all images, and the
    /// guess is reported with its count.
    #[arg(long, value_name = "KEY", group = "study_rule")]
    pub study_key: Option<String>,
    /// Expression whose first group is the study in the path of an image, such as `(p[0-9]+/s[0-9]+)/`.
    ///
    /// Groups named `study` and `patient` name both.
    #[arg(long, value_name = "RE", group = "study_rule")]
    pub study_regex: Option<String>,
    /// Where the study of an image is written.
    #[arg(long, value_enum, group = "study_rule")]
    pub study_from: Option<StudyFrom>,
}

impl StudyArgs {
    /// The rule typed; the guess without one.
    ///
    /// # Errors
    /// An expression that is none, or has no group.
    pub fn rule(&self) -> Result<StudyRule> {
        if let Some(key) = &self.study_key {
            return Ok(StudyRule::Key(key.clone()));
        }
        if let Some(regex) = &self.study_regex {
            let rule = StudyRule::regex(regex);
            return Ok(rule.map_err(|error| UsageError(format!("--study-regex: {error}")))?);
        }
        Ok(match self.study_from {
            None => StudyRule::Guess,
            Some(StudyFrom::Folder) => StudyRule::Folder,
            Some(StudyFrom::Name) => StudyRule::Name,
            Some(StudyFrom::Image) => StudyRule::Image,
        })
    }
}

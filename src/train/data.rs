//! The data sets of a run: those it names, or what it holds out of its training data.

use super::config::TrainConfig;
use crate::{
    dataset::{Dataset, DatasetError, Fetching},
    study::counted,
};

/// Training and validation data of a run.
#[derive(Debug, Clone)]
pub struct RunData {
    /// Training rows.
    pub train: Dataset,
    /// Validation rows, if any.
    pub validation: Option<Dataset>,
    /// What was held out and what a person should check, in lines.
    pub notes: Vec<String>,
}

impl RunData {
    /// Opens what `config` names; `fetching` is called while images are fetched from the web.
    ///
    /// # Errors
    /// As [`Dataset::open`] and [`Dataset::hold_out`].
    pub fn open(config: &TrainConfig, fetching: Option<Fetching>) -> Result<Self, DatasetError> {
        let mut options = config.data_options();
        options.store = options.store.with_progress(fetching);
        let train = Dataset::open_with(&config.train_data, &options)?;
        options.columns_may_be_absent = true;
        if let Some(name) = &config.val_data {
            return Ok(Self {
                train,
                validation: Some(Dataset::open_with(name, &options)?),
                notes: Vec::new(),
            });
        }
        if config.split_dataset_ratio == 0.0 {
            return Ok(Self {
                train,
                validation: None,
                notes: Vec::new(),
            });
        }
        let parts = train.hold_out(config.split_dataset_ratio, config.seed)?;
        let mut notes = vec![format!(
            "held out of `{}` for validation: {} of {}, whole studies by seed {} (split_dataset_ratio {}); {}",
            config.train_data,
            parts.val.len(),
            counted(train.len(), "row", "rows"),
            config.seed,
            config.split_dataset_ratio,
            parts.studies.facts.english()
        )];
        let doubts = parts.studies.doubts.iter();
        notes.extend(doubts.map(|doubt| format!("warning: {}", doubt.english())));
        Ok(Self {
            train: parts.train,
            validation: Some(parts.val),
            notes,
        })
    }
}

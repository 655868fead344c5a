//! A data set in two: rows to learn from, and whole studies held out to validate on.

use std::collections::BTreeSet;

use super::{
    data_part::SampleSource, error::DatasetError, python_random::PythonRandom, samples::Dataset,
    split::hold_out,
};
use crate::study::{Studies, StudyRow, StudyRule};

/// Both parts, and what is known of their studies.
#[derive(Debug, Clone)]
pub struct HeldOut {
    /// Rows to learn from.
    pub train: Dataset,
    /// Rows to validate on.
    pub val: Dataset,
    /// The studies of all rows.
    pub studies: Studies,
}

impl Dataset {
    /// What a row says of its study.
    ///
    /// # Panics
    /// If `index` is not below [`Self::len`].
    pub fn study_row(&self, index: usize) -> StudyRow {
        let (part, place) = self.part(index);
        let name = format!("`{}`, row {}", part.name, self.row(index));
        match &part.source {
            SampleSource::Rows {
                samples, folder, ..
            } => {
                let sample = &samples[place];
                StudyRow {
                    name,
                    keys: sample.keys.clone(),
                    images: sample.images.clone(),
                    folder: folder.to_string_lossy().into_owned(),
                }
            }
            SampleSource::Phantoms { range, .. } => {
                let seed = part.name.split(':').nth(1).unwrap_or_default();
                let number = range.start + place as u64;
                let study = format!("phantom {seed}:{number}");
                StudyRow {
                    name,
                    keys: [("study".to_owned(), study)].into(),
                    ..StudyRow::default()
                }
            }
        }
    }

    /// Holds out about `ratio` of the rows, at least one, in whole studies (patients where they are known), drawn by
    /// `seed`. The rows of both parts stay in their order, and errors name them by their place in the file.
    ///
    /// # Errors
    /// [`DatasetError::HoldOut`] if nothing would be left to learn from.
    pub fn hold_out(&self, ratio: f64, seed: u64) -> Result<HeldOut, DatasetError> {
        let refused = |reason: String| DatasetError::HoldOut {
            file: self.name.clone(),
            ratio,
            reason,
        };
        let rows: Vec<StudyRow> = (0..self.len()).map(|row| self.study_row(row)).collect();
        let studies = StudyRule::Guess
            .studies(&rows)
            .map_err(|error| refused(error.to_string()))?;
        let held =
            hold_out(&studies.groups, ratio, &mut PythonRandom::new(seed)).map_err(refused)?;
        let part = |wanted: bool, what: &str| {
            let rows = held.iter().enumerate();
            let chosen = rows.filter(|(_, held)| **held == wanted);
            let mut seen = BTreeSet::new();
            let places = chosen.map(|(row, _)| self.place(row));
            // A weight repeats what is learnt, not what is validated on.
            let places = places.filter(|place| !wanted || seen.insert(*place));
            Self {
                chosen: Some(places.collect()),
                fingerprint: format!("{} {what} {ratio} by seed {seed}", self.fingerprint),
                ..self.clone()
            }
        };
        let (train, mut val) = (part(false, "without"), part(true, "held out"));
        val.name = format!("{} (held out)", self.name);
        Ok(HeldOut {
            train,
            val,
            studies,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dataset(folder: &std::path::Path) -> Dataset {
        let rows: String = (0..40)
            .map(|at| {
                let row = serde_json::json!({
                    "messages": [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": format!("{at}")}],
                    "images": [format!("images/{}_{}.png", at / 2, at % 2)],
                });
                format!("{row}\n")
            })
            .collect();
        let path = folder.join("train.jsonl");
        std::fs::write(&path, rows).unwrap();
        Dataset::open(path.to_str().unwrap()).unwrap()
    }

    #[test]
    fn whole_studies_are_held_out_and_the_seed_decides() {
        let folder = tempfile::tempdir().unwrap();
        let all = dataset(folder.path());
        let parts = all.hold_out(0.1, 42).unwrap();
        // 10 % of 40 rows are 4: two studies of two views.
        assert_eq!((parts.train.len(), parts.val.len()), (36, 4));
        let answers = |data: &Dataset| -> Vec<usize> {
            (0..data.len())
                .map(|row| data.text(row).answer.unwrap().parse().unwrap())
                .collect()
        };
        let (train, val) = (answers(&parts.train), answers(&parts.val));
        for pair in val.chunks(2) {
            assert_eq!((pair[0] % 2, pair[0] + 1), (0, pair[1]));
            assert!(!train.contains(&pair[0]) && !train.contains(&pair[1]));
        }
        // Each part knows its files and names a row by its place in the file.
        let files = parts.val.image_files();
        assert_eq!((files.len(), files[0].0), (4, 0));
        assert!(
            parts
                .val
                .study_row(0)
                .name
                .ends_with(&format!("row {}", val[0] + 1))
        );
        let again = all.hold_out(0.1, 42).unwrap();
        assert_eq!(answers(&again.val), val);
        assert_eq!(again.train.fingerprint(), parts.train.fingerprint());
        let other = all.hold_out(0.1, 43).unwrap();
        assert_ne!(answers(&other.val), val);
        assert_ne!(other.train.fingerprint(), parts.train.fingerprint());
    }

    #[test]
    fn one_study_cannot_be_held_out_of_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("one.jsonl");
        let row = r#"{"messages":[{"role":"user","content":"?"},{"role":"assistant","content":"a"}],"study":"x"}"#;
        std::fs::write(&path, format!("{row}\n{row}\n")).unwrap();
        let error = Dataset::open(path.to_str().unwrap())
            .unwrap()
            .hold_out(0.5, 1)
            .unwrap_err();
        let message = error.to_string();
        for sign in ["one.jsonl", "1 study", "val_data", "split_dataset_ratio"] {
            assert!(message.contains(sign), "{message}");
        }
    }
}

//! What the images of a data set gave cause to remark, counted while they are read.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use crate::processor::remark::{Remark, RemarkKind};

/// Remarks by kind, and the images of each kind with their sentences; an image that is read in several
/// epochs counts once.
#[derive(Debug, Default)]
pub struct ImageRemarks(Mutex<BTreeMap<RemarkKind, BTreeMap<String, String>>>);

/// A kind of remark over a data set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemarkCount {
    /// What it is about.
    pub kind: RemarkKind,
    /// Images with such a remark.
    pub images: usize,
    /// The first of them by name.
    pub first: String,
    /// The remark on that one.
    pub text: String,
}

impl ImageRemarks {
    /// Notes the remarks on the image called `name`.
    pub fn note(&self, name: &str, remarks: &[Remark]) {
        if remarks.is_empty() {
            return;
        }
        let mut kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for remark in remarks {
            kinds
                .entry(remark.kind())
                .or_default()
                .insert(name.to_owned(), remark.text().to_owned());
        }
    }

    /// What was noted up to now, in the order of the kinds.
    pub fn counts(&self) -> Vec<RemarkCount> {
        let kinds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kinds
            .iter()
            .filter_map(|(kind, images)| {
                let (first, text) = images.first_key_value()?;
                Some(RemarkCount {
                    kind: *kind,
                    images: images.len(),
                    first: first.clone(),
                    text: text.clone(),
                })
            })
            .collect()
    }

    /// A sentence for each kind.
    pub fn sentences(&self) -> Vec<String> {
        self.counts().iter().map(RemarkCount::sentence).collect()
    }
}

impl RemarkCount {
    /// The count, the first image and its remark.
    pub fn sentence(&self) -> String {
        match self.images {
            1 => format!("`{}`: {}", self.first, self.text),
            count => format!("{count} as `{}`: {}", self.first, self.text),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_counts_once_for_each_kind() {
        let remarks = ImageRemarks::default();
        let hand = [Remark::new(RemarkKind::NotAChest, "its body part is HAND")];
        let flat = [Remark::new(
            RemarkKind::OneColour,
            "all its pixels have one colour",
        )];
        for name in ["b.dcm", "a.dcm", "b.dcm"] {
            remarks.note(name, &hand);
        }
        remarks.note("c.png", &flat);
        remarks.note("d.png", &[]);
        assert_eq!(
            remarks.sentences(),
            [
                "2 as `a.dcm`: its body part is HAND",
                "`c.png`: all its pixels have one colour",
            ]
        );
    }
}

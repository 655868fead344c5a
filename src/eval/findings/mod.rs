//! Reads findings out of Chinese chest X-ray reports by rules, and scores one report against another.
//!
//! The words are in a table (`rules.toml`), the reading of scope, doubt, side and degree in `labeler`;
//! `score` compares truth and prediction, `mesh` compares with the Indiana labels. Nothing here knows the model.
//!
//! Classes: the fourteen of CheXpert (Irvin et al., 2019) and six more that chest reports often name. Each is
//! labelled by its own words only: a present edema does not make a lung opacity present. Decisions a reader
//! must know:
//! - *No finding* is derived: present when the report says or denies something and nothing is present or
//!   uncertain; devices do not count against it, an abnormality outside the twenty does.
//! - A blunted costophrenic angle is an uncertain effusion; pulmonary congestion and heart failure are edema,
//!   infection is pneumonia (as CheXpert); old fractures are present; a finding that is gone is absent.
//! - Several mentions of one class: present wins over uncertain, uncertain over absent.

pub mod evaluation;
mod finding;
mod labeler;
mod labels;
pub mod mesh;
pub mod pair;
mod rules;
pub mod score;
#[cfg(test)]
mod tests;

pub use finding::Finding;
pub use labeler::Labeler;
pub use labels::{FindingLabel, Laterality, Mention, ReportLabels, Severity, Status};
pub use pair::{LabelledPair, UncertainPolicy};
pub use rules::FindingsError;

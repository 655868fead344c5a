//! Reads findings out of Chinese chest X-ray reports by rules, and scores one report against another.
//!
//! The words are in `tables/`: one for the machine-translated corpus, one for reports as hospitals write them. One
//! engine reads scope, doubt, side and degree (`labeler`), and says what it could not read;
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

pub mod agreement;
mod error;
pub mod evaluation;
pub mod export;
mod field;
mod finding;
mod labeler;
mod labels;
pub mod mesh;
pub mod pair;
mod prefilter;
mod rule_set;
mod rules;
pub mod score;
mod sections;
mod syntax;
#[cfg(test)]
mod tests;
mod text;

pub use error::FindingsError;
pub use field::{CHEXPERT_5, Group};
pub use finding::{Finding, OtherFinding};
pub use labeler::Labeler;
pub use labels::{FindingLabel, Laterality, Mention, ReportLabels, Severity, Status, Zone};
pub use pair::{LabelledPair, Policies, UncertainPolicy};
pub use rule_set::{RuleSet, RuleSetError};
pub use sections::Section;

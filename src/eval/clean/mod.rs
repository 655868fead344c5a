//! Finds translation defects in a report corpus and proposes corrections; nothing is changed in silence.
//!
//! The reviewed terms are in `terms.toml`. [`find_defects`] lists every place with the words before and
//! after, [`apply`] changes only the places it is given, [`unified_diff`] shows what changed, and [`correct_json`]
//! writes a corrected copy of a corpus file.

mod corpus;
mod defects;
mod error;
mod terms;
#[cfg(test)]
mod tests;

pub use corpus::{correct_json, read_rows, to_jsonl, unified_diff};
pub use defects::{CorpusReport, Correction, Defect, DefectCount, apply, count_defects};
pub use error::CleanError;
pub use terms::{TermTable, find_defects};

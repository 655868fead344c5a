//! Are the reports right: metrics of text, findings read by rules, tables and pages, and corrections of a corpus.
//!
//! [`evaluate`](evaluate::evaluate) puts [`text`] and [`findings`] together, each score with an interval
//! ([`bootstrap`]) and beside [`baselines`]; [`report`] shows the outcome. No model is known here; [`judge`] asks one over the
//! web when it is given an address.

pub mod baselines;
pub mod bootstrap;
pub mod cases;
pub mod caveat;
pub mod clean;
pub mod error;
pub mod evaluate;
pub mod findings;
pub mod judge;
pub mod outcome;
pub mod predictions;
pub mod probability;
pub mod report;
pub mod subgroups;
pub mod text;

//! Are the reports right: metrics of text, findings read by rules, tables and pages, and corrections of a corpus.

pub mod bootstrap;
pub mod clean;
pub mod findings;
pub mod predictions;
pub mod report;
pub mod text;

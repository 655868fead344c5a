//! An outcome for readers: a table for a terminal, and a page with charts.

pub mod charts;
mod curves;
pub mod label_page;
pub mod names;
pub mod page;
pub mod table;
pub mod thumbnail;

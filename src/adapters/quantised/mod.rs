//! Quantised weights: files, loading, saving, and the memory they take.

pub mod files;
pub mod load;
pub mod memory;
pub mod save;

//! Models and requests of published sizes with random values: for benches, `doctor` and tests.

pub mod lengths;
pub mod requests;
pub mod weights;

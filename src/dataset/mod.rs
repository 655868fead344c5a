//! Data sets: samples from files or from the phantom generator, encoded for training.
//!
//! A data set is named by a path to a JSONL file in ms-swift's form, or by
//! `phantom:SEED:FROM..TO[:plain|terse|partial|mixed|house]`, which draws synthetic studies on demand.

pub mod check;
pub mod convert;
mod encode;
mod error;
mod facts;
mod held_out;
pub mod image_remarks;
pub mod loader;
mod python_random;
pub mod rows;
mod samples;
mod split;
mod unused_keys;

pub use encode::EncodedSample;
pub use error::DatasetError;
pub use facts::{DataFacts, LeftOut};
pub use held_out::HeldOut;
pub use samples::{Dataset, RawSample, SampleText};

//! Data sets: samples from files or from the phantom generator, encoded for training.
//!
//! A data set is named by a path to a file of rows, or by
//! `phantom:SEED:FROM..TO[:plain|terse|partial|mixed|house]`, which draws synthetic studies on demand; several of
//! them by a list with weights.

pub mod check;
mod columns;
pub mod convert;
mod data_part;
mod encode;
mod error;
mod facts;
mod folder;
mod held_out;
pub mod image_remarks;
mod image_store;
mod length;
pub mod loader;
mod mix;
mod python_random;
mod questions;
mod reader;
pub mod rows;
mod samples;
mod split;
mod table;
mod unused_keys;

pub use columns::Columns;
pub use encode::EncodedSample;
pub use error::DatasetError;
pub use facts::{DataFacts, LeftOut};
pub use held_out::HeldOut;
pub use image_store::{Fetching, ImageStore};
pub use mix::{DataName, data_names, files_like, map_paths};
pub use questions::{AskedQuestion, Question, QuestionFile, read_questions};
pub use reader::DataOptions;
pub use samples::{Dataset, RawSample, SampleText};

//! Synthetic chest radiographs ("phantoms") with known findings and Chinese reports.
//!
//! A phantom is a drawing, not a picture of a person: no patient data goes into it. It is small
//! enough (128×128) for a model of a few million parameters to learn, within minutes on a CPU, to
//! read findings off the image, which makes a real end-to-end test of training, inference and
//! scoring possible without a published checkpoint or a licensed data set.
//!
//! Everything is a pure function of `(seed, index)`. The drawing uses only the `f32` operations
//! that IEEE 754 defines exactly (`+ - * /` and `sqrt`; the two rotations use short polynomials),
//! and the randomness is ChaCha with eight rounds, so a pair gives the same bytes on every platform.
//!
//! Images follow the radiological convention: the patient's left is on the image's right.
//!
//! This module knows no tensor, no tokenizer and no model.

mod anatomy;
mod canvas;
mod dataset;
mod draws;
mod finding;
mod labels;
mod lesion;
mod radiograph;
mod report;
mod study;

pub use dataset::{PROMPTS, PhantomDatasetError, PhantomStudies, write_dataset};
pub use finding::{Finding, Side, Zone};
pub use labels::{finding_f1, findings_in_report};
pub use report::{Dialect, write_report};
